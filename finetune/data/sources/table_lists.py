"""Which tables `data.table` names: a file, a folder of tables, or a pattern."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from finetune.data.images.decode import EXTENSIONS
from finetune.data.sources.data_files import DataFile, FileKind, in_folder, matches, with_splits
from finetune.data.sources.table_formats import SEPARATORS
from finetune.system.errors import UserError
from finetune.system.natural import natural_key
from finetune.system.terminal import counted

ENDINGS = tuple(end + more for end in SEPARATORS for more in ("", ".gz"))
TABLES = FileKind("data.table", "table", ENDINGS, f"files that end in {' '.join(SEPARATORS)}")
_PART = re.compile(r"(.*)-\d+-of-(\d+)(\..*)")


def list_tables(place: str, *, has_splits: bool) -> tuple[list[DataFile], Counter[str]]:
    """Every table once, in natural order of the names, and the numbers of files of each kind that are none.

    If `has_splits`, the names of several tables say their splits, as those of shards do. Raises FileNotFoundError
    without a table; UserError where a folder may be read in two ways, or holds tables of several kinds.
    """
    left_out: Counter[str] = Counter()
    if not os.path.isdir(place):
        found = {DataFile(path, path) for path in matches(place, TABLES)}
        if not found:
            raise FileNotFoundError(f"data.table={place}: there is no such file")
    else:
        found = set(in_folder(place, TABLES, left_out))
        left_out = Counter({kind: count for kind, count in left_out.items() if kind not in EXTENSIONS})
        if not found:
            seen = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(5)) or "nothing"
            hub = f"; data=hf data.name={place} reads data sets of the datasets library" if ".arrow" in left_out else ""
            raise UserError(f"data.table={place}: is a folder without {TABLES.wanted} (found {seen}){hub}")
    kinds = sorted({_ending(file) for file in found})
    if len(kinds) > 1:
        how = f"name one kind by a pattern, such as 'data.table={os.path.join(place, '*' + kinds[0])}'"
        raise UserError(f"data.table={place}: {counted(len(found), 'table')} of the kinds {', '.join(kinds)}; {how}")
    files = with_splits(found, TABLES, left_out) if has_splits else [replace(file, split=0) for file in found]
    return sorted(files, key=lambda file: natural_key(file.name)), left_out


def _ending(file: DataFile) -> str:
    return os.path.splitext(file.name.lower().removesuffix(".gz"))[1]


def parts_that_lack(tables: Sequence[DataFile]) -> list[str]:
    """A warning for each set of tables, such as `train-00000-of-00002.parquet`, of which not all are read."""
    found: dict[tuple[str, ...], list[str]] = {}
    for table in tables:
        if part := _PART.fullmatch(os.path.basename(table.name)):
            found.setdefault((os.path.dirname(table.name), *part.groups()), []).append(table.name)
    warnings = []
    for (folder, start, total, end), names in found.items():
        if len(names) < int(total):
            how = f"'data.table={os.path.join(folder, f'{start}-*-of-{total}{end}')}' reads all that are there"
            read = f"{len(names):,} of them {'are' if len(names) > 1 else 'is'} read"
            warnings.append(f"{names[0]} is one of {int(total):,} files, by its name, and {read}; {how}")
    return warnings
