"""Shards that are not on this machine: asked for, measured, and fetched in parallel under one bar."""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import tarfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.config import DataConf
from finetune.data.cache_dir import cache_folder
from finetune.data.sources.fetching import Progress, Remote, StoppedError, fetch, length_of, read_small
from finetune.system.errors import UserError
from finetune.system.files import write_bytes
from finetune.system.signals import at_once

logger = logging.getLogger("finetune")

THREADS = 4
MEASURED = 64  # shards whose length is asked for ahead of a download that is not allowed yet
CLASSES_BYTES = 2**22  # a list of class names is no longer than this


def fetch_shards(remotes: Sequence[Remote], conf: DataConf, class_files: Sequence[str]) -> list[Path]:
    """Where each shard lies on this machine, fetched now if need be and `data.download` allows it.

    Args:
        remotes: The shards.
        conf: `data.download`, `data.cache_dir` and `data.cache_gib`.
        class_files: Names of lists of classes, that may lie beside the first shard or in the folder above.

    Raises:
        ValueError: Shards are missing and `data.download` is false, or the disk is too small, or fetching failed.
        OSError: The folder cannot be written.
    """
    folder = cache_folder(conf.cache_dir) / "shards"
    missing = [remote for remote in remotes if not remote.place_in(folder).exists()]
    if missing:
        if not conf.download:
            raise UserError(_refusal(missing, len(remotes), folder))
        _fetch_missing(missing, remotes[0], folder, class_files)
    places = [remote.place_in(folder) for remote in remotes]
    _warn_of_size(places, folder, conf)
    return places


def _fetch_missing(missing: Sequence[Remote], first: Remote, folder: Path, class_files: Sequence[str]) -> None:
    """Fetch what is not there, and the lists of classes beside the first shard."""
    with at_once():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lengths = _lengths(missing)
            _check_room(missing, lengths, folder)
            _fetch_all(missing, folder, None if None in lengths else sum(filter(None, lengths)))
            for remote in [one for file in class_files for one in _beside(first, file)]:
                data = read_small(remote, CLASSES_BYTES)
                if data is not None:
                    write_bytes(remote.place_in(folder), data)
        except OSError as error:
            raise OSError(f"data.root: cannot write to {folder}: {error.strerror or error}") from error


def _warn_of_size(places: Sequence[Path], folder: Path, conf: DataConf) -> None:
    """Say when fetched shards pass `data.cache_gib`; they are not removed.

    Other caches can be made again from what is on this machine. A shard comes back only if its server, its signature
    and a `data.download=true` are still there, and for as long and as much as it took the first time.
    """
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run has just renamed its part
            total += path.stat().st_size
    own = sum(place.stat().st_size for place in places)
    if total > conf.cache_gib * 2**30:
        logger.warning(
            "%s holds %.2f GiB of fetched shards, %.2f of them not of this run: more than data.cache_gib=%g, and"
            " nothing removes them; delete those that you no longer need",
            folder, total / 2**30, (total - own) / 2**30, conf.cache_gib,
        )  # fmt: skip


def fetched_class_files(first: Remote, conf: DataConf, class_files: Sequence[str]) -> list[Path]:
    """Lists of classes that came with the shards, the nearest first."""
    folder = cache_folder(conf.cache_dir) / "shards"
    places = [remote.place_in(folder) for file in class_files for remote in _beside(first, file)]
    return [place for place in places if place.exists()]


def _beside(shard: Remote, file: str) -> list[Remote]:
    """`file` beside a shard, and in the folder above."""
    if shard.is_pipe:
        return []
    path, mark, query = shard.address.partition("?")
    folder = path.rpartition("/")[0]
    above = folder.rpartition("/")[0]
    folders = [folder] if above.endswith("/") else [folder, above]  # https://host has nothing above it
    return [Remote(f"{one}/{file}{mark}{query}") for one in folders]


def _refusal(missing: Sequence[Remote], total: int, folder: Path) -> str:
    """What is missing, how large it is, and how to get it."""
    step = max(1, len(missing) // MEASURED)
    asked = missing[::step]
    known = [length for length in _lengths(asked) if length is not None]
    size = ", of unknown size"
    if known:
        about = "" if len(known) == len(missing) else "about "
        size = f", {about}{sum(known) / len(known) * len(missing) / 2**30:.2f} GiB"
    return (
        f"data.root: {len(missing):,} of {total:,} shards are not on this machine yet{size}; the first is"
        f" {missing[0].shown}. data.download=true fetches them once, into {folder}"
    )


def _lengths(remotes: Sequence[Remote]) -> list[int | None]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(length_of, remotes))


def _check_room(missing: Sequence[Remote], lengths: Sequence[int | None], folder: Path) -> None:
    """Whether the disk has room for what is known to come."""
    parts = [Path(f"{remote.place_in(folder)}.part") for remote in missing]
    there = sum(part.stat().st_size for part in parts if part.exists())
    needed, free = sum(filter(None, lengths)) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data.root: the shards need {needed / 2**30:.2f} GiB more in {folder}, where {free / 2**30:.2f} are free:"
            " choose another data.cache_dir"
        )


def _fetch_all(remotes: Sequence[Remote], folder: Path, total: int | None) -> None:
    """Fetch each, some at a time; the first error ends it all."""
    waiting, done = deque(remotes), queue.Queue[BaseException | None]()
    with tqdm(total=total, desc="fetch shards", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        progress = Progress(bar)

        def work() -> None:
            while waiting:
                try:
                    remote = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                done.put(_outcome(lambda remote=remote: fetch(remote, folder, check_tar, progress)))  # type: ignore[misc]

        # Daemons, so that a person who has enough waits for no server.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(THREADS, len(remotes)))]
        for thread in threads:
            thread.start()
        try:
            for _ in remotes:
                error = done.get()
                if error is not None:
                    raise error
        finally:
            progress.stop()
            deadline = time.monotonic() + 2
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))


def _outcome(work: Callable[[], object]) -> BaseException | None:
    """What `work` raised: it travels to the main thread."""
    try:
        work()
    except (ValueError, OSError, StoppedError) as error:
        return error
    return None


def check_tar(path: Path) -> None:
    """Whether a file is a whole tar archive, by its headers and its end.

    Raises:
        ValueError: It is not.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for _ in tar:
                tar.members = []  # type: ignore[attr-defined]  # or memory grows with the archive
            check_end(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"it is no whole tar archive: {error}") from error


def check_end(path: Path, offset: int) -> None:
    """Whether a tar archive ends where its reader stopped, which also stops at damage as if it were the end.

    Raises:
        ReadError: There is no block of zeros at `offset`, by which an archive ends.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it breaks off at byte {offset:,}")
