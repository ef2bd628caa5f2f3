"""The one reader of labels, for tables, shards and data sets of the hub; and class names that look alike."""

import json
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.split import SPLITS
from finetune.system.errors import UserError
from finetune.system.limits import CLASSES, NAME, check_memory
from finetune.system.natural import natural_key
from finetune.system.terminal import counted

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

_REMEMBERED = 2**24  # letters of cells whose labels are remembered
SHOWN, LISTED = 40, 5  # letters of a cell, and look-alikes, that a message shows
# Texts that programs write for a missing value: what pandas reads as one (`na_values` of its read_csv), and its NaT.
MISSING = frozenset(
    ["#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "-NaN", "-nan", "NaN", "nan"]
)
MISSING |= {"<NA>", "N/A", "NA", "n/a", "NULL", "null", "None", "NaT"}
_NEGATIVE = "-1"  # in val or test alone: how data sets withhold labels
_NAME_IT = "if it is the name of a class, write it otherwise, or list all classes in data.classes"


class LabelError(Exception):
    """The label of an image cannot be used; the text follows the image's name or row in the message."""


class NoLabelError(LabelError):
    """An image has no label: the cell is empty, or has a text that programs write for a missing value."""


class LabelReader:
    """Labels of images, one after the other: texts and whole numbers, or lists of them.

    A text loses the blanks around it; one that is a list in JSON, such as `[0, 2]`, is read as that list. No label
    (None, an empty text, one of `MISSING`), a fraction, a structure and several lines are a LabelError, and so is a
    list where other images have no list. With a `separator` each text holds several labels, or none.

    Images of val and test may have no label: see `take_out_withheld`.
    """

    def __init__(self, column: str, separator: str | None = None, names: Collection[str] = ()) -> None:
        """Take the name of the column or key, for messages, and `data.label_separator`.

        `names` are certainly names of classes, such as those in `data.classes`: `None` and `[a b]` may be among them.
        """
        self.column, self._separator, self._names = column, separator, frozenset(names)
        self.several: bool | None = True if separator else None  # whether images may have several; None: not known yet
        self.known: dict[str, int] = {}  # label -> its id, in the order of reading
        self.merged: list[list[str]] = []  # numbers that were written in two ways: `1.0` and `1`
        self._ids = array("i")  # of all images, one after the other
        self._counts = array("i")  # labels of each image
        self._lacking = array("q")  # places, from 0, of the images that were added without a label
        self._remembered: dict[tuple[type, str], list[int]] = {}  # most cells repeat, and reading each again is slow
        self._letters = 0  # in `_remembered`
        self._lengths: set[int] = set()  # of the lists, before repeated labels are dropped

    def take(self, cell: Any, split: int = 0) -> None:
        """Read a cell, and take its labels for the next image, of the split `split`; raises LabelError."""
        try:
            ids = self.ids(cell)
        except NoLabelError:
            if not split:
                raise
            ids = []
            self._lacking.append(len(self._counts))
        self._ids.extend(ids)
        self._counts.append(len(ids))

    def ids(self, cell: Any) -> list[int]:
        """The ids of the labels in a cell; raises LabelError."""
        # By type, too: of equal numbers 1 is the class "1" and True is the class "True".
        key = (type(cell), str(cell))
        ids = self._remembered.get(key)
        if ids is None:
            ids = [self.known.setdefault(word, len(self.known)) for word in self._words(cell)]
            self._letters += len(key[1])
            if self._letters > _REMEMBERED:
                self._remembered, self._letters = {}, len(key[1])
            self._remembered[key] = ids
        return ids

    def take_out_withheld(self, given: Sequence[int]) -> tuple[list[bool], Counter[str]]:
        """Take out the images of a val or test without any label: whether each image stays, and what was taken out.

        Such labels are withheld: no cell of the split has one but -1, and -1 is no class of train. `given` has the
        index into SPLITS of each image.
        """
        self._settle()
        splits, counts, ids = (np.array(part, dtype=np.int64) for part in (given, self._counts, self._ids))
        of_id = np.repeat(splits, counts)
        negative = self.known.get(_NEGATIVE)
        is_label = np.ones(len(ids), dtype=bool)
        if negative is not None and _NEGATIVE not in self._names and negative not in ids[of_id == 0]:
            is_label = ids != negative
        left_out: Counter[str] = Counter()
        stays = np.ones(len(splits), dtype=bool)
        for split in range(1, len(SPLITS)):
            here = splits == split
            if here.any() and not is_label[of_id == split].any():
                stays[here] = False
                left_out[f"image without a label in {SPLITS[split]}"] = int(here.sum())
        if left_out:
            self._keep(stays, counts, ids)
        return stays.tolist(), left_out

    def _settle(self) -> None:
        """Take the point off whole numbers such as `1.0`, where all labels are whole numbers and one has a point.

        So a column that a program has written as numbers means the same in a text as in Parquet and JSON, where 1.0 is
        the number 1. Versions (1.0, 1.1) stay as they are, and so do all labels where a person or the data lists names
        with a point.
        """
        plain = {word: word.partition(".")[0] for word in self.known}
        listed = any("." in name for name in self._names)
        if listed or not all(map(re.compile(r"-?\d+(\.0+)?").fullmatch, plain)):
            return
        known = {word: place for place, word in enumerate(dict.fromkeys(plain.values()))}
        if known != self.known:
            self.merged = [[word, short] for word, short in plain.items() if word != short and short in self.known]
            new = [known[short] for short in plain.values()]
            self._ids = array("i", [new[label] for label in self._ids])
            self.known = known
            self._remembered.clear()

    def _keep(self, stays: Flags, counts: Numbers, ids: Numbers) -> None:
        """Forget the images that do not stay, and labels that no other image has."""
        used, ids = np.unique(ids[np.repeat(stays, counts)], return_inverse=True)
        words = list(self.known)
        self.known = {words[old]: new for new, old in enumerate(used.tolist())}
        place = np.cumsum(stays) - 1
        self._lacking = array("q", [int(place[row]) for row in self._lacking if stays[row]])
        self._ids, self._counts = array("i", ids.tolist()), array("i", counts[stays].tolist())
        self._remembered.clear()

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line where numbers were written in two ways."""
        if not self.merged:
            return ()
        pairs = " and of ".join(" and ".join(pair) for pair in self.merged[:LISTED])
        return (f"all labels are whole numbers, so images of {pairs} are in one class",)

    @property
    def lacking(self) -> Sequence[int]:
        """The places, from 0, of the images that have no label."""
        return self._lacking

    def _words(self, cell: Any) -> Sequence[str]:
        if isinstance(cell, str) and cell.lstrip().startswith("["):
            cell = self._list_in(cell.strip())
        is_list = isinstance(cell, list)
        if is_no_label(cell) and not self._separator:
            raise NoLabelError(f"has no {self.column}")
        if self.several is None:
            self.several = is_list
        if is_list and self._separator:
            raise LabelError(f"has a list in {self.column}: leave data.label_separator out")
        if is_list != (self.several and not self._separator):
            one = f"has one label in {self.column} where others have lists"
            raise LabelError(f"has a list in {self.column} where others have one label" if is_list else one)
        if self._separator:
            cells: list[Any] = str(cell).split(self._separator) if cell is not None else []
            cells = [part for part in cells if part.strip()]  # an image without any label is allowed
        else:
            cells = cell if is_list else [cell]
        if is_list:
            self._lengths.add(len(cells))
        return list(dict.fromkeys(map(self._word, cells)))

    def _list_in(self, text: str) -> Any:
        """The list that a text holds in JSON; the text itself if it holds none, such as `[unknown]`."""
        if text in self._names or not text.endswith("]") or len(text) > NAME.most:
            return text
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if not re.search(r"[\s,'\"]", text[1:-1].strip()):
                return text
        how = f'write a list as ["a", "b"]; {_NAME_IT}'
        raise LabelError(f"has {self.column}={text[:SHOWN]!r}, which looks like a list and is none in JSON: {how}")

    def _word(self, cell: Any) -> str:
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)  # Parquet gives a column of whole numbers with gaps as 3.0
        if is_no_label(cell):
            raise NoLabelError(f"has no {self.column}")
        if isinstance(cell, (float, dict, list, bytes)):
            raise LabelError(f"has {self.column}={str(cell)[:SHOWN]!r}, expected a text or a whole number")
        word = str(cell) if cell in self._names else str(cell).strip()
        if len(word) > NAME.most:
            raise LabelError(f"has a {self.column} of {len(word):,} letters, at most {NAME.most:,} are read")
        if word in MISSING and isinstance(cell, str) and word not in self._names:
            raise NoLabelError(f"has {self.column}={word!r}, as programs write a missing label; {_NAME_IT}")
        if "\n" in word or "\r" in word:
            how = "expected one; write several as a list, such as [0, 2]"
            raise LabelError(f"has {self.column}={word[:SHOWN]!r}, a label of several lines; {how}")
        return word

    def names(self, subject: str) -> tuple[str, ...]:
        """All labels in natural order; a UserError that begins with `subject` where they are too many."""
        self._settle()
        CLASSES.check(subject, len(self.known))
        return tuple(sorted(self.known, key=natural_key))

    def tensor(self, classes: Sequence[str], indices: Mapping[str, int] | None = None) -> Tensor:
        """Labels as indices into `classes`: int64 (n,), or float32 (n, classes) if an image may have several.

        `indices` has the class of each label, where a label is not the name of its class.
        """
        index = indices if indices is not None else {name: label for label, name in enumerate(classes)}
        label_of_id = np.array([index[name] for name in self.known], dtype=np.int64)
        labels = torch.from_numpy(label_of_id[np.array(self._ids, dtype=np.int64)])
        if not self.several:
            return labels
        if len(self._lengths) == 1 and max(self._lengths) > 1 and self.known.keys() <= {"0", "1"}:
            places = f"each list in {self.column} is {max(self._lengths)} numbers 0 and 1, a place for each class"
            raise UserError(f"{places}; expected the classes of the image, such as [2] for [0, 0, 1]")
        counts = torch.from_numpy(np.array(self._counts))
        subject = f"the table of {counted(len(counts), 'image')} and {counted(len(classes), 'class', 'classes')}"
        check_memory(subject, 4 * len(counts) * len(classes), f"is {self.column} the right label (data.label_column)?")
        table = torch.zeros(len(counts), len(classes))
        table[torch.repeat_interleave(torch.arange(len(counts)), counts), labels] = 1
        return table


def is_no_label(cell: Any) -> bool:
    """Whether a cell is empty: None, not a number, or a text of blanks."""
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Names that agree but for case, blanks, quotes, zeros, invisible letters or the Unicode form, in lists.

    Single letters of both cases are classes of their own, as in sets of handwriting.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")  # no zero-width space
        seen = re.sub(r"^\s*(['\"`])(.*)\1\s*$", r"\2", seen)
        plain = re.sub(r"(?<=^\d)\.0*$|(?<=\d\d)\.0*$", "", unicodedata.normalize("NFKC", seen).strip())
        plain = re.sub(r"(?<=\w)[-_\s]+(?=\w)", " ", plain if len(plain) == 1 else plain.casefold())
        found.setdefault(re.sub(r"(?<![\d.])0+(?=\d)", "", plain), []).append(name)
    return [same for same in found.values() if len(same) > 1]


def name_warnings(classes: Collection[str]) -> list[str]:
    """Warnings where class names look alike, like several labels, or like no label."""
    warnings = _look_alike_warnings(classes)
    known = set(classes)
    quoted = [name for name in classes if re.fullmatch(r"(['\"`]).*\1", name)]
    if quoted:
        how = "take the quotes off, unless they belong to the name"
        warnings.append(f"{counted(len(quoted), 'class name')} in quotes, such as {visibly(quoted[0])}; {how}")
    several = [
        name for name in classes if len(parts := re.split(r"[|;,+&]", name)) > 1 and known >= set(map(str.strip, parts))
    ]
    if several:
        how = "give them as a list, or in a table name what separates them by data.label_separator"
        warnings.append(
            f"{counted(len(several), 'class name')} may be several labels, such as {visibly(several[0])}; {how}"
        )
    if {"-1", "0"} <= known:
        warnings.append("-1 is read as a class; if it means that an image has no label, leave such images out")
    return warnings


def _look_alike_warnings(classes: Collection[str]) -> list[str]:
    groups = look_alikes(classes)
    if not groups:
        return []
    shown = ", ".join(" and ".join(visibly(name) for name in names) for names in groups[:LISTED])
    more = f" and {len(groups) - LISTED:,} more" if len(groups) > LISTED else ""
    return [f"class names look alike and are different classes: {shown}{more}; if they are one, give them one name"]


def visibly(name: str) -> str:
    r"""A name in quotes, with letters beyond ASCII as escapes: 'caf\xe9' and 'cafe\u0301' show their difference."""
    return ascii(name)


def told_apart(names: Collection[str], others: Collection[str]) -> list[str]:
    """`names` as a message lists them: those that look like one of `others` are shown by `visibly`."""
    alike = {name for group in look_alikes(dict.fromkeys([*names, *others])) for name in group}
    return [visibly(name) if name in alike else name for name in names]
