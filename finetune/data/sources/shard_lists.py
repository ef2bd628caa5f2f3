"""Which tar shards `data.root` names, on this machine and elsewhere, and the splits that their names give."""

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from finetune.config import DataConf
from finetune.data.sources.fetching import RemoteFile, is_remote
from finetune.data.sources.layout import LITTER, has_marker
from finetune.data.sources.remote_shards import CLASS_FILES, fetch_shards
from finetune.data.split import SPLITS
from finetune.data.split_words import is_extra, split_of
from finetune.system.errors import UserError
from finetune.system.limits import Limit
from finetune.system.natural import natural_key
from finetune.system.terminal import counted

SHARDS = Limit(1_000_000, "a larger number is most likely a typing mistake", "shards")  # in one pattern
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{},\s]+(?:,[^{},\s]+)+)\}")
SHOWN = 5  # names in a message
LAYOUT = "expected .tar shards with pairs such as 0001.jpg and 0001.cls (a class number or name)"


@dataclass(frozen=True)
class Shard:
    """A tar file on this machine, which was perhaps downloaded from `remote`."""

    path: str
    name: str  # in messages: the path, or the address that it was downloaded from
    split: int | None = None  # index into SPLITS; None where nothing says which
    remote: RemoteFile | None = None


def places(conf: DataConf) -> list[str]:
    """The places in `data.root`, which `::` separates as in WebDataset."""
    return [os.path.expanduser(part) for part in (conf.root or "").split("::")]


def place_name(place: str) -> str:
    """A place as messages name it."""
    return RemoteFile(place).name if is_remote(place) else place


def list_shards(conf: DataConf) -> tuple[list[Shard], Counter[str]]:
    """Every shard once, in natural order of the names, and the numbers of files of each kind that are none.

    Downloads those shards that are not on this machine. Raises FileNotFoundError where there are none, or where one of
    them is missing; UserError where a folder may be read in two ways.
    """
    found: set[Shard] = set()
    left_out: Counter[str] = Counter()
    remotes: dict[RemoteFile, None] = {}  # each once, in this order
    for place in places(conf):
        if is_remote(place):
            remotes |= dict.fromkeys(map(RemoteFile, expand_braces(place)))
        elif os.path.isdir(place):
            found |= set(_in_folder(place, None, left_out, ()))
        else:
            found |= {Shard(path, path) for path in _matches(place)}
    if remotes:
        paths = fetch_shards(list(remotes), conf)
        found |= {Shard(str(path), remote.name, None, remote) for path, remote in zip(paths, remotes, strict=True)}
    if not found:
        seen = f" (found {', '.join(f'{count:,} {kind}' for kind, count in left_out.most_common(5))})"
        packed = any(_is_packed(kind) for kind in left_out)
        mend = "unpack these, since an image is read at its place in a .tar" if packed else LAYOUT
        raise FileNotFoundError(f"data.root={conf.root}: no .tar files there{seen if left_out else ''}; {mend}")
    shards = _with_splits(found, left_out)
    return sorted(shards, key=lambda shard: (natural_key(shard.name), shard.path)), left_out


def _matches(place: str) -> list[str]:
    """The files that a local pattern stands for; a file or folder that has this very name comes before any pattern.

    Raises FileNotFoundError for a name without `*`, `?` and `[` that does not exist.
    """
    found: list[str] = []
    missing = []
    for name in [place] if os.path.exists(place) else expand_braces(place):
        folder, file = os.path.split(name)
        pattern = os.path.join(glob.escape(folder), file) if os.path.isdir(folder) else name
        if os.path.exists(name):
            found.append(name)
        elif matches := glob.glob(pattern):
            found += matches
        elif not glob.has_magic(file if os.path.isdir(folder) else name):
            missing.append(name)  # also in a folder such as w[v2]
    if found and missing:
        some = f"{', '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}"
        raise FileNotFoundError(f"data.root={place}: there is no file for {counted(len(missing), 'shard')}: {some}")
    return found


def _in_folder(folder: str, split: int | None, left_out: Counter[str], above: tuple[str, ...]) -> Iterator[Shard]:
    """The shards in a folder of one split, at any depth; without `split` also those in its `train/ val/ test/`."""
    folders, files = _entries(folder)
    for name in files:
        path = os.path.join(folder, name)
        if name.lower().endswith(".tar"):
            yield Shard(path, path, split)
        elif name not in CLASS_FILES:
            left_out[_kind(name)] += 1
    here = (*above, os.path.realpath(folder))
    shards = {
        name: list(_in_folder(os.path.join(folder, name), _split_in(name, split), left_out, here))
        for name in folders
        if os.path.realpath(os.path.join(folder, name)) not in here  # a link to a folder above
    }
    named = [name for name in shards if split is None and split_of(name) is not None]
    for name in named:
        if not shards[name]:
            raise UserError(f"data.root: {os.path.join(folder, name)} is named like a split and has no .tar files")
    extra = [name for name in shards if named and shards[name] and is_extra(name)]
    others = [name for name in shards if named and shards[name] and name not in (*named, *extra)]
    if others:
        both = f"{', '.join(others)} beside {', '.join(named)}"
        raise UserError(f"data.root={folder}: {both}, and all of them hold shards; move the first into train, or away")
    for name in extra:
        left_out[f"shard in {name}"] += len(shards.pop(name))
    for inside in shards.values():
        yield from inside


def _split_in(name: str, split: int | None) -> int | None:
    """The split of the shards in a folder, which lies in one of `split`."""
    return split_of(name) if split is None else split


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the visible folders that are not ours, and of the visible files."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError as error:  # without this error a split would be missing and nobody would know
        raise UserError(f"data.root: {folder} may not be listed (permission denied); change its rights") from error
    names = [name for name in names if not name.startswith(".") and name not in LITTER]
    folders = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    files = [name for name in names if name not in set(folders)]
    return [name for name in folders if not has_marker(os.path.join(folder, name))], files


def _kind(name: str) -> str:
    """The ending of a file that is no shard: `.tar.gz`, `.json`."""
    packed = re.search(r"\.tar\.\w+$", name.lower())
    return packed[0] if packed else os.path.splitext(name)[1].lower() or "file without an ending"


def _is_packed(kind: str) -> bool:
    return kind.startswith(".tar.") or kind in (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")


def _with_splits(shards: Collection[Shard], left_out: Counter[str]) -> Collection[Shard]:
    """The shards with the splits that their names give, such as `val/000.tar`, `val-000.tar` or `val000.tar`.

    The word of a folder counts below the folder of all shards, which is only a place. If all shards are named after
    one split, or none is, their names do not count and the splits are cut by seed. Shards such as `unlabeled-000.tar`
    beside those of splits are counted in `left_out`. Raises UserError where folder and file name two splits, and where
    shards of val or test lie beside shards that no split has its name from: they would be trained on.
    """
    splits: dict[Shard, int | None] = {}
    extra: dict[Shard, str] = {}
    paths = {shard: shard.name.replace(os.sep, "/").split("/") for shard in shards}
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    above = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
    for shard, (*folders, file) in paths.items():
        folder = folders[-1] if len(folders) > above else ""
        words = re.split(r"[-_.\d]+", file)
        of_file = [split for word in words if (split := split_of(word)) is not None]
        of_folder = split_of(folder) if shard.split is None else shard.split
        if of_file and of_folder is not None and of_folder not in of_file:
            both = f"its folder is of {SPLITS[of_folder]} and its name says {SPLITS[of_file[0]]}"
            raise UserError(f"data.root: {shard.name}: {both}; rename it, or move it away")
        splits[shard] = of_folder if of_folder is not None else next(iter(of_file), None)
        if splits[shard] is None and (word := next(filter(is_extra, (folder, *words)), None)):
            extra[shard] = word
    named = {split for shard, split in splits.items() if shard not in extra}
    if not named & {1, 2} or len(named) == 1:
        return [replace(shard, split=0) for shard in shards]
    if None in named:
        others = sorted(shard.name for shard, split in splits.items() if split is None and shard not in extra)
        one = next(shard.name for shard, split in splits.items() if split)
        both = f"{one} is named like a split and {', '.join(others[:SHOWN])} like none"
        raise UserError(f"data.root: {both}; put the shards into folders train, val and test, or name them so")
    left_out.update(f"shard of {word}" for word in extra.values())
    return [replace(shard, split=split or 0) for shard, split in splits.items() if shard not in extra]


def expand_braces(pattern: str) -> list[str]:
    """`{train,val}-{000..012}.tar` -> each of the 26 names."""
    subject = f"data.root={place_name(pattern)[:200]}"
    SHARDS.check(subject, math.prod(len(_middles(found)) for found in _BRACES.finditer(pattern)))
    names = [pattern]
    while found := _BRACES.search(names[0]):
        # Every name has as many braces, since what stands in their place holds none.
        SHARDS.check(subject, len(names) * len(_middles(found)))
        matches = [match for name in names if (match := _BRACES.search(name))]
        names = [
            f"{match.string[: match.start()]}{middle}{match.string[match.end() :]}"
            for match in matches
            for middle in _middles(match)
        ]
    return names


def _middles(braces: re.Match[str]) -> Sequence[str]:
    """What `_BRACES` stands for: the words, or the numbers with as many digits as the first one."""
    first, last, words = braces.groups()
    if words:
        return str(words).split(",")
    for end in (first, last):
        SHARDS.check(f"data.root: {braces[0][:200]}", 0 if len(end) < 19 else 10**18)
    count = abs(int(last) - int(first)) + 1
    SHARDS.check(f"data.root: {braces[0]}", count)
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + step, step)]
