"""Downloads the shards that are not on this machine: several at a time, under one progress bar."""

import contextlib
import logging
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.config import DataConf
from finetune.data.caches.entries import GIB, cache_folder, claim_cache, size_of
from finetune.data.sources.fetching import MissingFileError, Progress, RemoteFile, damage_of, fetch, length_of
from finetune.data.sources.tar_files import tar_members
from finetune.system.errors import UserError
from finetune.system.limits import Limit, LimitError, in_bytes, text_limit
from finetune.system.reading import DamagedError
from finetune.system.signals import at_once
from finetune.system.terminal import counted, printable

logger = logging.getLogger("finetune")

MEASURED = 32  # lengths that are asked for; those of more shards are estimated from these
CLASS_FILES = ("classes.txt", "classnames.txt")  # lists with a class name a line, for labels that are numbers


def fetch_shards(remotes: Sequence[RemoteFile], conf: DataConf) -> list[Path]:
    """Return the path of each downloaded shard; download missing and damaged ones if `data.download` allows it.

    Lists of class names that lie beside the first shard, or in the folder above, are downloaded with the shards. Raises
    UserError if shards may not be downloaded or have no room, or if a download fails; OSError if the folder refuses.
    """
    folder, near = cache_folder(conf.cache_dir) / "shards", _class_files_near(remotes[0])
    damaged = _damaged([remote.path_in(folder) for remote in (*remotes, *near)], conf)
    missing = [remote for remote in remotes if (path := remote.path_in(folder)) in damaged or not path.exists()]
    if missing or damaged:
        commands = [printable(remote.address) for remote in missing if remote.is_command]
        if commands and not conf.allow_pipe:
            raise UserError(
                f"data.root: {commands[0]} was not run: data.allow_pipe is false. If you know the command, add"
                " data.allow_pipe=true; a run directory's own setting of it does not count"
            )
        with at_once():  # a stop signal costs nothing but this start: the next one downloads what is still missing
            num_bytes, size = _size(missing)
            if not conf.download:
                raise UserError(
                    f"data.root: not on this machine yet: {len(missing):,} of {counted(len(remotes), 'shard')}, {size};"
                    f" the first is {missing[0].name}. data.download=true fetches them once, into {folder}"
                )
            try:
                claim_cache(folder.parent)
                folder.mkdir(exist_ok=True)
                room = _check_room(num_bytes or 0, folder, conf.cache_gib)
                lists = {remote: text_limit(conf.max_text_mib) for remote in near}
                _fetch_all(missing, lists, folder, num_bytes, room)
            except OSError as error:
                raise OSError(f"data.root: cannot write to {folder}: {error.strerror or error}") from error
    return [remote.path_in(folder) for remote in remotes]


def _damaged(paths: Sequence[Path], conf: DataConf) -> set[Path]:
    """Those of some downloaded files that are damaged, with a warning; a DamagedError if none may be downloaded."""
    found = set()
    for path in paths:
        if path.exists() and (damage := damage_of(path)) is not None:
            if not conf.download:
                raise DamagedError(f"{damage}; data.download=true fetches it again")
            logger.warning("%s; it is fetched again", damage)
            found.add(path)
    return found


def fetched_class_files(first: RemoteFile, conf: DataConf) -> list[Path]:
    """Lists of class names that were downloaded with the shards; the nearest to the first shard comes first."""
    folder = cache_folder(conf.cache_dir) / "shards"
    return [path for remote in _class_files_near(first) if (path := remote.path_in(folder)).exists()]


def _class_files_near(shard: RemoteFile) -> list[RemoteFile]:
    """Where lists of class names may lie: in the folder of the shard, and in the folder above."""
    if shard.is_command:
        return []
    path, mark, query = shard.address.partition("?")
    folder = path.rpartition("/")[0]
    above = folder.rpartition("/")[0]
    folders = [folder] if above.endswith("/") else [folder, above]  # there is no folder above https://host
    return [RemoteFile(f"{place}/{file}{mark}{query}") for file in CLASS_FILES for place in folders]


def _size(missing: Sequence[RemoteFile]) -> tuple[int | None, str]:
    """The total length of some shards in bytes, None if it is unknown; and words for it."""
    if not missing:
        return 0, ""
    asked = missing[:: -(-len(missing) // MEASURED)]
    total = 0
    for remote in asked:
        length = length_of(remote)
        if length is None:
            return None, "of unknown size"
        total += length
    estimate = total * len(missing) // len(asked)
    return estimate, f"{'about ' if len(asked) < len(missing) else ''}{in_bytes(estimate)}"


def _check_room(num_bytes: int, folder: Path, limit_gib: float) -> Limit:
    """How many bytes may be downloaded into `folder`, by its disk and by `data.cache_gib`.

    Raises UserError if `num_bytes` do not fit.
    """
    free, stored = shutil.disk_usage(folder).free, size_of(folder)
    problem = f"data.root: the shards need {in_bytes(num_bytes)} more in {folder}"
    if num_bytes > free:
        raise UserError(f"{problem}, where {in_bytes(free)} are free: choose another data.cache_dir")
    room, mend = int(limit_gib * GIB) - stored, "remove shards (finetune cache clear --kind shards)"
    if num_bytes > room:
        both = f"which holds {in_bytes(stored)} of shards: together more than data.cache_gib={limit_gib:g}"
        raise UserError(f"{problem}, {both}; raise it, or {mend}")
    if free < room:
        return Limit(free, "the disk is full then: choose another data.cache_dir")
    return Limit(max(0, room), f"data.cache_gib={limit_gib:g} raises the limit, or {mend}")


def _fetch_all(
    shards: Sequence[RemoteFile],
    lists: Mapping[RemoteFile, Limit],
    folder: Path,
    num_bytes: int | None,
    room: Limit,
) -> None:
    """Download `lists`, each with the most bytes that it may have, and `shards`, which share the `room`."""
    with tqdm(total=num_bytes, desc="fetch shards", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        progress = Progress(bar, room)
        # Before the shards, since a later start that finds every shard downloads nothing at all.
        for class_list, limit in lists.items():
            # A longer file is most likely a web page, and no list of class names.
            with contextlib.suppress(MissingFileError, LimitError):
                fetch(class_list, folder, _check_class_file, Progress(bar, limit))
        # The threads of this pool are daemons: Ctrl-C does not wait for a server, as it would with concurrent.futures.
        with ThreadPool(4) as pool:
            try:
                for _ in pool.imap_unordered(lambda remote: fetch(remote, folder, check_tar, progress), shards):
                    pass  # the first error is raised here
            finally:
                progress.stop()


def _check_class_file(path: Path) -> None:
    # Some servers send a web page in the place of a missing file.
    if path.read_bytes().lstrip().startswith(b"<"):
        raise MissingFileError("it is no list of class names")


def check_tar(path: Path) -> None:
    """Raises UserError if a file is not a whole tar archive, by its headers and its end."""
    try:
        for _ in tar_members(str(path)):
            pass
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"it is no whole tar archive: {error}") from error
