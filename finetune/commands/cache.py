"""`finetune cache` lists what runs have cached; `finetune cache clear` removes it."""

import argparse
import time
from collections.abc import Sequence
from datetime import datetime

from finetune.system.limits import in_bytes
from finetune.system.log import say
from finetune.system.terminal import counted, printable

KINDS = ("pixels", "activations", "shards")
EPILOG = (
    "pixels: decoded images (data.cache=disk); activations: the output of frozen layers (prefix.cache=disk); shards:"
    " tar files fetched from elsewhere. A run makes again, or fetches again, the entries that it needs. Nothing else in"
    " the folder is removed. Do not clear while a run that uses the cache is starting."
)


def main(words: Sequence[str]) -> int:
    """List the entries of the cache folder, or remove them; the exit code."""
    description = "List what runs have cached, or remove it."
    parser = argparse.ArgumentParser(prog="finetune cache", description=description, epilog=EPILOG)
    what = "clear: remove the entries; data.cache_dir: the folder of runs with that setting"
    parser.add_argument("words", nargs="*", metavar="clear | data.cache_dir=PATH", help=what)
    parser.add_argument("--kind", choices=KINDS, help="only entries of this kind")
    older = "only entries that no run used for so many days"
    parser.add_argument("--older-than", type=float, metavar="DAYS", default=0.0, help=older)
    flags = parser.parse_intermixed_args(words)
    is_clear, settings = "clear" in flags.words, [word for word in flags.words if word != "clear"]
    for word in settings:
        if not word.startswith("data.cache_dir="):
            parser.error(f"{word}: expected clear or data.cache_dir=PATH")
    cache_dir = settings[-1].partition("=")[2] if settings else None
    # Later than `--help`: the rooms below import torch.
    from finetune.data.caches.entries import cache_folder, find_entries, remove_abandoned, remove_entry

    cache = cache_folder(cache_dir)
    limit = time.time() - flags.older_than * 86_400
    entries = [item for item in find_entries(cache) if flags.kind in (None, item.kind) and item.used <= limit]
    if is_clear:
        for kind in [flags.kind] if flags.kind else KINDS:
            remove_abandoned(cache, kind)
    shown = [item for item in entries if not is_clear or remove_entry(item)]
    for item in shown:
        used = datetime.fromtimestamp(item.used).strftime("%Y-%m-%d %H:%M")
        say(f"{item.kind:<11}  {in_bytes(item.num_bytes):>12}  {used}  {printable(str(item.path))}")
    total = sum(item.num_bytes for item in shown)
    title, number = "removed" if is_clear else "total", counted(len(shown), "entry", "entries")
    say(f"{title:<11}  {in_bytes(total):>12}  {number} in {cache}")
    if len(shown) < len(entries):
        stay = counted(len(entries) - len(shown), "entry that stays", "entries that stay")
        say(f"{stay}: in use by a run, or in a folder that cannot be written")
    return 0
