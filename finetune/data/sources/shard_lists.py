"""Which tar shards `data.root` names, on this machine and elsewhere, and the splits that their names give."""

import os
from collections import Counter

from finetune.config import DataConf
from finetune.data.sources.data_files import DataFile, FileKind, expand_braces, in_folder, matches, with_splits
from finetune.data.sources.fetching import RemoteFile, is_remote
from finetune.data.sources.remote_shards import CLASS_FILES, fetch_shards
from finetune.system.natural import natural_key

LAYOUT = "expected .tar shards with pairs such as 0001.jpg and 0001.cls (a class number or name)"
SHARDS = FileKind("data.root", "shard", (".tar",), ".tar files", CLASS_FILES)


def places(conf: DataConf) -> list[str]:
    """The places in `data.root`, which `::` separates as in WebDataset."""
    return [os.path.expanduser(part) for part in (conf.root or "").split("::")]


def list_shards(conf: DataConf) -> tuple[list[DataFile], Counter[str]]:
    """Every shard once, in natural order of the names, and the numbers of files of each kind that are none.

    Downloads those shards that are not on this machine. Raises FileNotFoundError where there are none, or where one of
    them is missing; UserError where a folder may be read in two ways.
    """
    found: set[DataFile] = set()
    left_out: Counter[str] = Counter()
    remotes: dict[RemoteFile, None] = {}  # each once, in this order
    for place in places(conf):
        if is_remote(place):
            remotes |= dict.fromkeys(map(RemoteFile, expand_braces(place, SHARDS)))
        elif os.path.isdir(place):
            found |= set(in_folder(place, SHARDS, left_out))
        else:
            found |= {DataFile(path, path) for path in matches(place, SHARDS)}
    if remotes:
        paths = fetch_shards(list(remotes), conf)
        found |= {DataFile(str(path), remote.name, None, remote) for path, remote in zip(paths, remotes, strict=True)}
    if not found:
        seen = f" (found {', '.join(f'{count:,} {kind}' for kind, count in left_out.most_common(5))})"
        packed = any(_is_packed(kind) for kind in left_out)
        mend = "unpack these, since an image is read at its place in a .tar" if packed else LAYOUT
        raise FileNotFoundError(f"data.root={conf.root}: no .tar files there{seen if left_out else ''}; {mend}")
    shards = with_splits(found, SHARDS, left_out)
    return sorted(shards, key=lambda shard: (natural_key(shard.name), shard.path)), left_out


def _is_packed(kind: str) -> bool:
    return kind.startswith(".tar.") or kind in (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
