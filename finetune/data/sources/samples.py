"""The samples in one tar shard: an image and the files with its label, by their names, as in WebDataset."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from finetune.data.images.decode import EXTENSIONS
from finetune.data.sources.layout import LITTER
from finetune.system.errors import UserError
from finetune.system.limits import Limit, text_of
from finetune.system.terminal import counted

SHOWN = 5  # names in a message
USUAL_KEY = "label"  # of a label in a .json; a .cls file goes before it. Where a person named a key, no .cls is read


class Sample(NamedTuple):
    """An image with its label."""

    name: str  # of the image file in the archive
    offset: int  # of its first byte in the archive
    size: int  # in bytes
    label: Any  # as the .cls or .json holds it; None if it has none
    more: dict[str, Any]  # the content of its .json; empty if it has none


class _File(NamedTuple):
    """An image file in the archive."""

    name: str
    offset: int
    size: int
    sample: str  # its name up to the first dot of the file
    rest: str  # its name from there on: `.seg.png`


class Samples:
    """Takes the files of an archive one by one; then pairs images with labels.

    The files of a sample agree in their names up to the last dot, such as `a_0.5.png` and `a_0.5.cls`. Without such a
    label an image belongs to the sample up to its first dot: beside `a.cls` and no other image `a.left.png` is the
    image, but beside `a.png` it is one more file, which is left out.
    """

    def __init__(self, subject: str, limit: Limit, label_key: str) -> None:
        """Take the name of the archive in messages, the most bytes of a text, and the key of the label in a .json."""
        self.left_out: Counter[str] = Counter()  # kind -> number of files that are neither images nor labels
        self._subject, self._limit, self._key = subject, limit, label_key
        self._images: dict[str, _File] = {}
        self._texts: dict[str, str] = {}  # contents of .cls
        self._objects: dict[str, dict[str, Any]] = {}  # contents of .json
        self._broken: dict[str, str] = {}  # .json files that hold no object, each with the reason

    def add(self, member: tarfile.TarInfo, tar: IO[bytes]) -> None:
        """Take the next file; raises UserError where it is too large, no text, or a second image of one name."""
        folder, _, file = member.name.rpartition("/")
        if file.startswith(".") or not LITTER.isdisjoint(folder.split("/")):
            return
        stem, dot, ending = file.rpartition(".")
        start = f"{folder}/" if folder else ""
        key, ending = f"{start}{stem}", ending.lower()
        if dot and f".{ending}" in EXTENSIONS:
            if key in self._images:
                raise UserError(
                    f"{self._subject}: {self._images[key].name} and {member.name} are both the image of {key}"
                )
            first, _, rest = file.partition(".")
            self._images[key] = _File(member.name, member.offset_data, member.size, f"{start}{first}", f".{rest}")
        elif dot and ending in ("cls", "json"):
            subject = f"{self._subject}: {member.name}"
            self._limit.check(subject, member.size)
            tar.seek(member.offset_data)
            self._take_text(key, ending, tar.read(member.size), subject)
        else:
            self.left_out[f".{ending}" if dot else "file without an ending"] += 1

    def _take_text(self, key: str, ending: str, content: bytes, subject: str) -> None:
        if ending == "cls":
            self._texts[key] = text_of(content, subject, strict=False)
            return
        try:
            value = json.loads(text_of(content, subject, strict=False))
        except json.JSONDecodeError as error:
            self._broken[key] = f"{key}.json is no JSON: {error}"
        except (ValueError, RecursionError):
            self._broken[key] = f"{key}.json has a number or brackets beyond what is read"
        else:
            if isinstance(value, dict):
                self._objects[key] = value
            else:
                self._broken[key] = f"{key}.json holds no object such as {{{json.dumps(self._key)}: ...}}"

    def labelled(self, *, all_have: bool) -> Iterator[Sample]:
        """Every image with its label, in the order of the images.

        A UserError names images whose .json is none, and if `all_have` labels, images without one.
        """
        used = {key for key in self._images if self._has_label(key)}
        rivals = Counter(image.sample for key, image in self._images.items() if key not in used)
        without: list[str] = []
        found: list[Sample] = []
        for key, image in self._images.items():
            of_sample = key not in used and self._has_label(image.sample) and image.sample != key
            if of_sample and (image.sample in used or rivals[image.sample] > 1):
                self.left_out[image.rest] += 1
            elif of_sample or key in used:
                chosen = image.sample if of_sample else key
                more = self._objects.get(chosen, {})
                label = self._text(chosen) or more[self._key]
                found.append(Sample(image.name, image.offset, image.size, label, more))
            elif all_have or key in self._broken:
                reason = self._broken.get(key)
                without.append(f"{image.name} ({reason})" if reason else image.name)
            else:
                found.append(Sample(image.name, image.offset, image.size, None, self._objects.get(key, {})))
        if without:
            some = f"{counted(len(without), 'image')} without a label, such as {', '.join(without[:SHOWN])}"
            how = f"expected a .cls beside each, or a .json with {self._key!r} (data.label_column)"
            if self._key != USUAL_KEY:
                how = f"expected a .json with {self._key!r} beside each, as data.label_column says"
                how += "; leave it out to read the .cls" if self._texts else ""
            raise UserError(f"{self._subject}: {some}; {how}")
        alone = {*self._texts, *self._objects} - used - {image.sample for image in self._images.values()}
        self.left_out.update({"label without an image": len(alone)} if alone else {})
        return iter(found)

    def _has_label(self, key: str) -> bool:
        return bool(self._text(key)) or self._key in self._objects.get(key, ())

    def _text(self, key: str) -> str:
        """The label in a .cls; empty where there is none, or where a person named the key of a .json."""
        return self._texts.get(key, "").strip() if self._key == USUAL_KEY else ""
