"""The files of one kind, tar shards or tables, that a place names on this machine, and the splits in their names."""

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from finetune.data.sources.fetching import RemoteFile, is_remote
from finetune.data.sources.layout import LITTER, has_marker
from finetune.data.split import SPLITS
from finetune.data.split_words import is_extra, split_of
from finetune.system.errors import UserError
from finetune.system.limits import Limit
from finetune.system.terminal import counted

MOST = 1_000_000  # files in one pattern
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{},\s]+(?:,[^{},\s]+)+)\}")
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class FileKind:
    """A kind of file that holds many images, in the words of messages."""

    key: str  # the setting that names such files: `data.root`
    noun: str  # `shard`
    endings: tuple[str, ...]  # of their names, in small letters
    wanted: str  # all endings in words: `.tar files`
    companions: tuple[str, ...] = ()  # names of files that are read beside them, and so are not left out

    @property
    def limit(self) -> Limit:
        """The most files that one pattern may name."""
        return Limit(MOST, "a larger number is most likely a typing mistake", f"{self.noun}s")


@dataclass(frozen=True)
class DataFile:
    """A file with many images on this machine, which was perhaps downloaded from `remote`."""

    path: str
    name: str  # in messages: the path, or the address that it was downloaded from
    split: int | None = None  # index into SPLITS; None where nothing says which
    remote: RemoteFile | None = None


def place_name(place: str) -> str:
    """A place as messages name it."""
    return RemoteFile(place).name if is_remote(place) else place


def matches(place: str, kind: FileKind) -> list[str]:
    """The files that a local pattern stands for; a file or folder that has this very name comes before any pattern.

    Raises FileNotFoundError for a name without `*`, `?` and `[` that does not exist.
    """
    found: list[str] = []
    missing = []
    for name in [place] if os.path.exists(place) else expand_braces(place, kind):
        folder, file = os.path.split(name)
        pattern = os.path.join(glob.escape(folder), file) if os.path.isdir(folder) else name
        if os.path.exists(name):
            found.append(name)
        elif files := glob.glob(pattern):
            found += files
        elif not glob.has_magic(file if os.path.isdir(folder) else name):
            missing.append(name)  # also in a folder such as w[v2]
    if found and missing:
        some = f"{', '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}"
        raise FileNotFoundError(f"{kind.key}={place}: there is no file for {counted(len(missing), kind.noun)}: {some}")
    return found


def in_folder(
    folder: str, kind: FileKind, left_out: Counter[str], *, split: int | None = None, above: tuple[str, ...] = ()
) -> Iterator[DataFile]:
    """The files in a folder, at any depth; without `split` those in its `train/ val/ test/` are of these splits.

    `above` are the folders on the way there. Files of other kinds are counted in `left_out`.
    """
    folders, files = _entries(folder, kind)
    for name in files:
        path = os.path.join(folder, name)
        if name.lower().endswith(kind.endings):
            yield DataFile(path, path, split)
        elif name not in kind.companions:
            left_out[_ending(name)] += 1
    here = (*above, os.path.realpath(folder))
    inner = {
        name: list(in_folder(os.path.join(folder, name), kind, left_out, split=_split_in(name, split), above=here))
        for name in folders
        if os.path.realpath(os.path.join(folder, name)) not in here  # a link to a folder above
    }
    named = [name for name in inner if split is None and split_of(name) is not None]
    for name in named:
        if not inner[name]:
            where = os.path.join(folder, name)
            raise UserError(f"{kind.key}: {where} is named like a split and has no {kind.wanted}")
    extra = [name for name in inner if named and inner[name] and is_extra(name)]
    others = [name for name in inner if named and inner[name] and name not in (*named, *extra)]
    if others:
        both = f"{', '.join(others)} beside {', '.join(named)}, and all of them hold {kind.noun}s"
        raise UserError(f"{kind.key}={folder}: {both}; move the first into train, or away")
    for name in extra:
        left_out[f"{kind.noun} in {name}"] += len(inner.pop(name))
    for inside in inner.values():
        yield from inside


def _split_in(name: str, split: int | None) -> int | None:
    """The split of the files in a folder, which lies in one of `split`."""
    return split_of(name) if split is None else split


def _entries(folder: str, kind: FileKind) -> tuple[list[str], list[str]]:
    """Names of the visible folders that are not ours, and of the visible files."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError as error:  # without this error a split would be missing and nobody would know
        raise UserError(f"{kind.key}: {folder} may not be listed (permission denied); change its rights") from error
    names = [name for name in names if not name.startswith(".") and name not in LITTER]
    folders = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    files = [name for name in names if name not in set(folders)]
    return [name for name in folders if not has_marker(os.path.join(folder, name))], files


def _ending(name: str) -> str:
    """The ending of a file of another kind: `.tar.gz`, `.json`."""
    packed = re.search(r"\.tar\.\w+$", name.lower())
    return packed[0] if packed else os.path.splitext(name)[1].lower() or "file without an ending"


def with_splits(files: Collection[DataFile], kind: FileKind, left_out: Counter[str]) -> Collection[DataFile]:
    """The files with the splits that their names give, such as `val/000.tar`, `val-000.tar` or `val000.tar`.

    The word of a folder counts below the folder of all files, which is only a place. If all files are named after
    one split, or none is, their names do not count and the splits are cut by seed. Files such as `unlabeled-000.tar`
    beside those of splits are counted in `left_out`. Raises UserError where folder and file name two splits, and where
    files of val or test lie beside files that no split has its name from: they would be trained on.
    """
    splits: dict[DataFile, int | None] = {}
    extra: dict[DataFile, str] = {}
    paths = {file: file.name.replace(os.sep, "/").split("/") for file in files}
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    above = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
    for file, (*folders, name) in paths.items():
        folder = folders[-1] if len(folders) > above else ""
        words = re.split(r"[-_.\d]+", name)
        of_file = [split for word in words if (split := split_of(word)) is not None]
        of_folder = split_of(folder) if file.split is None else file.split
        if of_file and of_folder is not None and of_folder not in of_file:
            both = f"its folder is of {SPLITS[of_folder]} and its name says {SPLITS[of_file[0]]}"
            raise UserError(f"{kind.key}: {file.name}: {both}; rename it, or move it away")
        splits[file] = of_folder if of_folder is not None else next(iter(of_file), None)
        if splits[file] is None and (word := next(filter(is_extra, (folder, *words)), None)):
            extra[file] = word
    named = {split for file, split in splits.items() if file not in extra}
    if not named & {1, 2} or len(named) == 1:
        return [replace(file, split=0) for file in files]
    if None in named:
        others = sorted(file.name for file, split in splits.items() if split is None and file not in extra)
        one = next(file.name for file, split in splits.items() if split)
        both = f"{one} is named like a split and {', '.join(others[:SHOWN])} like none"
        raise UserError(f"{kind.key}: {both}; put the {kind.noun}s into folders train, val and test, or name them so")
    left_out.update(f"{kind.noun} of {word}" for word in extra.values())
    return [replace(file, split=split or 0) for file, split in splits.items() if file not in extra]


def expand_braces(pattern: str, kind: FileKind) -> list[str]:
    """`{train,val}-{000..012}.tar` -> each of the 26 names."""
    subject = f"{kind.key}={place_name(pattern)[:200]}"
    kind.limit.check(subject, math.prod(len(_middles(found, kind)) for found in _BRACES.finditer(pattern)))
    names = [pattern]
    while found := _BRACES.search(names[0]):
        # Every name has as many braces, since what stands in their place holds none.
        kind.limit.check(subject, len(names) * len(_middles(found, kind)))
        matches = [match for name in names if (match := _BRACES.search(name))]
        names = [
            f"{match.string[: match.start()]}{middle}{match.string[match.end() :]}"
            for match in matches
            for middle in _middles(match, kind)
        ]
    return names


def _middles(braces: re.Match[str], kind: FileKind) -> Sequence[str]:
    """What `_BRACES` stands for: the words, or the numbers with as many digits as the first one."""
    first, last, words = braces.groups()
    if words:
        return str(words).split(",")
    for end in (first, last):
        kind.limit.check(f"{kind.key}: {braces[0][:200]}", 0 if len(end) < 19 else 10**18)
    count = abs(int(last) - int(first)) + 1
    kind.limit.check(f"{kind.key}: {braces[0]}", count)
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + step, step)]
