"""The paths of a table: their endings, and what they look like where no file is there, with the key that mends it."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

from finetune.config import DataConf
from finetune.config.data import REMOTE
from finetune.data.images.decode import EXTENSIONS
from finetune.data.packed import PackedStrings
from finetune.system.errors import UserError
from finetune.system.natural import natural_key

LOOKED_AT = 20  # paths, spread over the table
FOLDERS = 1000  # below data.root, in which the paths are looked for
AUTO = "auto"  # the value of data.path_suffix that takes whatever image has the name


def found_paths(names: PackedStrings, root: str, table: str, conf: DataConf) -> tuple[PackedStrings, tuple[str, ...]]:
    """The paths with `data.path_suffix` behind them, with `/` for each backslash of Windows; and warnings.

    If some paths lead to no file, nothing is said: the check of the images lists them. If none does, raises the
    UserError that says what they look like, where that can be seen.
    """
    if conf.path_suffix:
        names = PackedStrings(_with_ending(names, root, conf.path_suffix))
    step = max(1, len(names) // LOOKED_AT)
    some = [names[row] for row in range(0, len(names), step)][:LOOKED_AT]
    if _any_exists(root, some):
        return names, ()
    if _any_exists(root, [name.replace("\\", "/") for name in some]):
        shown = f"the paths in {table} have backslashes, as on Windows; each is read as /: {some[0]}"
        return PackedStrings(name.replace("\\", "/") for name in names), (shown,)
    if problem := _looks_like(some, root, table, conf):
        raise UserError(f"data.table={table}: no file at any path that was looked at, such as {some[0]}: {problem}")
    return names, ()


def _any_exists(root: str, names: list[str]) -> bool:
    return any(os.path.isfile(os.path.join(root, name)) for name in names if "\0" not in name)


def _with_ending(names: PackedStrings, root: str, suffix: str) -> Iterator[str]:
    """Each name with its ending; one that ends so, or with `auto` as an image does, stays."""
    listed: dict[str, dict[str, str]] = {}  # folder -> name without its ending -> name of the image
    for name in names:
        if suffix != AUTO:
            yield name if name.lower().endswith(suffix.lower()) else name + suffix
            continue
        if os.path.splitext(name)[1].lower() in EXTENSIONS:
            yield name
            continue
        folder, stem = os.path.split(os.path.join(root, name))
        if folder not in listed:
            listed[folder] = _images_in(folder)
        file = listed[folder].get(stem, stem)
        if "/" in file:
            raise UserError(f"data.path_suffix=auto: {name} may be {file.replace('/', ' or ')}; say the ending")
        yield name + file.removeprefix(stem)


def _images_in(folder: str) -> dict[str, str]:
    """The images in a folder by their names without the ending; several of one name with `/` between them."""
    found: dict[str, str] = {}
    for file in sorted(os.listdir(folder), key=natural_key) if os.path.isdir(folder) else ():
        stem, ending = os.path.splitext(file)
        if ending.lower() in EXTENSIONS:
            found[stem] = f"{found[stem]}/{file}" if stem in found else file
    return found


def _looks_like(some: list[str], root: str, table: str, conf: DataConf) -> str:
    """What paths that lead nowhere look like, and how to mend that; empty if nothing is seen."""
    first = some[0]
    if first.lower().startswith("file:"):
        plain = unquote(re.sub("^file:(//(localhost(?=/))?)?", "", first, flags=re.IGNORECASE))
        return f"it is an address of a file on a machine; write it as a path, {plain}"
    if REMOTE.match(first):
        return "it is an address; download the images and name their files, or pack them as shards (data=webdataset)"
    if re.fullmatch(r"(['\"`]).*\1", first) and _any_exists(root, [first[1:-1]]):
        return f"there is {first[1:-1]}; take the quotes off, or write double ones"
    for name in some:
        for ending in sorted({*EXTENSIONS, *map(str.upper, EXTENSIONS)}):
            if _any_exists(root, [name + ending]):
                return f"there is {name}{ending}, so the ending is missing: add data.path_suffix={ending} (or auto)"
    here = os.path.abspath(root)
    above = [os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    below = [os.path.join(here, folder) for folder in _names_in(here) if not folder.startswith(".")][:FOLDERS]
    for place in dict.fromkeys([os.path.dirname(os.path.abspath(table)), os.getcwd(), *above, *below]):
        if place != here and _any_exists(place, some):
            return f"the files are found from another folder: set data.root={place}"
    parts = re.split(r"[\\/]+", first)
    for count in range(1, len(parts)):
        rest = "/".join(parts[count:])
        if _any_exists(here, [rest]):
            return f"there is {rest} in {here}: take {'/'.join(parts[:count])}/ off the paths"
    if re.match(r"[A-Za-z]:[\\/]|\\\\", first):
        return "it is a path of Windows; write paths from data.root on, such as cat/1.jpg"
    if near := _in_other_case(here, first):
        return f"there is {near}, in other upper and lower case; write the names as the files have them"
    if _any_exists(here, [plain := unquote(first)]):
        return f"there is {plain}; write the paths as the files are called, not as in an address"
    stem, ending = os.path.splitext(first)
    if near := next((stem + other for other in sorted(EXTENSIONS) if _any_exists(here, [stem + other])), ""):
        return f"there is {near}, with another ending than {ending}; write the endings as the files have them"
    return ""


def _in_other_case(root: str, path: str) -> str:
    """The file below `root` whose path differs from `path` in nothing but case; empty if there is none."""
    found = ""
    for part in path.split("/"):
        same = {name.casefold(): name for name in _names_in(os.path.join(root, found))}
        if part.casefold() not in same:
            return ""
        found = os.path.join(found, same[part.casefold()])
    return found


def _names_in(folder: str) -> list[str]:
    return sorted(os.listdir(folder), key=natural_key) if os.path.isdir(folder) else []
