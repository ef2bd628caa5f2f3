"""Downloads one file into a folder on this machine: from a URL, or from the output of a command.

A download is written beside its final place, checked, and renamed once it is whole. A broken download starts again at
the first byte. `http` and `https` are read with the standard library, so that they need no extra package; fsspec reads
every other scheme (`s3`, `gs`, `hf`, ...) with the client that the scheme's extra brings.
"""

import contextlib
import hashlib
import os
import re
import signal
import ssl
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from finetune.config import nearest
from finetune.config.data import REMOTE
from finetune.data.caches.entries import beside, entry_lock, header_of, refuse_foreign, write_header
from finetune.system.errors import UserError
from finetune.system.limits import Limit, in_bytes
from finetune.system.reading import DamagedError
from finetune.system.seals import SealedFile, seal

TRIES = 4
DELAY_S = 1.0  # pause before the second try; each later pause is twice as long
MESSAGES = 2**24  # bytes that a command may write to stderr
SMALL_BYTES = 2**20  # a downloaded file up to this size, such as a list of names, is compared whole
SEALED_BYTES = 2**14  # of a download have a checksum of their own, so that few more are read than an image has
TIMEOUT_S = 60.0  # without a byte from the server
TEMPORARY_CODES = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that a later try may not get
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "azure", "abfs": "azure", "abfss": "azure"}


class StoppedError(Exception):
    """`Progress.stop` was called during a download."""


class BrokenDownloadError(Exception):
    """A download failed in a way that another try may mend."""


class MissingFileError(UserError):
    """There is no such remote file, or this user may not read it."""


def is_remote(place: str) -> bool:
    """Whether `place` is downloaded: it is a URL, or `pipe:` and a command."""
    return REMOTE.match(place) is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file that is not on this machine: `https://host/path/name.tar`, or `pipe:COMMAND`, which prints the file."""

    address: str

    @property
    def is_command(self) -> bool:
        """Whether a command prints the file."""
        return self.address.startswith("pipe:")

    @property
    def name(self) -> str:
        """The name in messages: a URL without user, password and query, which may be secret; a command's last file."""
        if self.is_command:
            files = re.findall(r"[^\s'\"=<|;]*[^\s'\"=<|;/]\.tar\b", self.address.removeprefix("pipe:"))
            return str(files[-1]) if files else f"pipe/{self._digest[:8]}.tar"
        parts = urlsplit(self.address)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def _digest(self) -> str:
        data = self.address.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(data, digest_size=8, usedforsecurity=False).hexdigest()

    def path_in(self, folder: Path) -> Path:
        """Where the downloaded file lies: under the hash of its address and the last part of its name."""
        last = re.sub(r"[^\w.-]", "_", self.name.rpartition("/")[2])[-80:]
        return folder / f"{self._digest}-{last}"


class Progress:
    """The progress bar of all downloads, and the switch that stops them. Several threads share it."""

    def __init__(self, bar: Any, room: Limit) -> None:
        """Count the downloaded bytes in `bar`, a tqdm bar; together they may be no more than `room`."""
        self.commands: set[subprocess.Popen[bytes]] = set()  # those that run now
        self._bar, self._lock, self._stopping = bar, threading.Lock(), threading.Event()
        self._room, self._count = room, 0

    def add(self, count: int) -> None:
        """Advance the bar by `count` bytes; raises StoppedError after `stop`, and LimitError without room."""
        self.wait(0)
        with self._lock:
            self._bar.update(count)
            self._count += count
            if self._count > self._room.most:
                raise self._room.error("data.root: the download")

    def wait(self, seconds: float) -> None:
        """Pause; raises StoppedError after `stop`."""
        if self._stopping.wait(seconds):
            raise StoppedError

    def stop(self) -> None:
        """Kill the running commands, and end each download when it next calls `add` or `wait`."""
        self._stopping.set()
        for process in list(self.commands):
            _kill(process)


def fetch(remote: RemoteFile, folder: Path, check: Callable[[Path], None], progress: Progress) -> None:
    """Download a file to `remote.path_in(folder)` if it is not there, with a seal. Of several processes one downloads.

    A file that is there without its seal is damaged, see `damage_of`, and is downloaded again.

    `folder` is `shards` in a cache folder that was claimed.

    `check` raises UserError if the downloaded file is not what it should be. Raises UserError if the file cannot be
    downloaded, in TRIES tries if the failure may pass (MissingFileError is one); OSError if `folder` cannot be written;
    StoppedError if `progress` was stopped.
    """
    path = remote.path_in(folder)
    part = beside(path)
    with entry_lock(path, on_wait=lambda: progress.wait(0)):
        if path.exists():
            if damage_of(path) is None:
                return
            refuse_foreign(path)
        try:
            _fetch_with_retries(remote, part, check, progress)
            seal(part, block=SEALED_BYTES)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            write_header(path, header_of(path))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def damage_of(path: Path) -> DamagedError | None:
    """How a downloaded file is damaged, by its size and its list of checksums; a large one's content is not read."""
    try:
        file = SealedFile(path)
        if file.size <= SMALL_BYTES:
            file.check()
    except DamagedError as error:
        return error
    return None


def condemn(path: Path) -> None:
    """Let the next start find a downloaded file damaged, of which a block has been: its seal is cut."""
    with contextlib.suppress(OSError):  # it may belong to another user
        os.truncate(path, max(0, path.stat().st_size - 1))


def _fetch_with_retries(remote: RemoteFile, part: Path, check: Callable[[Path], None], progress: Progress) -> None:
    work = _run_command if remote.is_command else _download
    for number in range(1, TRIES + 1):
        is_length_known = True
        try:
            is_length_known = work(remote.address, part, progress)
            check(part)
            return
        except (BrokenDownloadError, UserError) as error:
            # A download of unknown length may have been cut short, so another try may be whole.
            if isinstance(error, UserError) and is_length_known:
                raise type(error)(f"{remote.name} cannot be fetched: {error}") from error
            if number == TRIES:
                raise UserError(f"{remote.name} cannot be fetched ({error}), {TRIES} tries in a row") from error
        if part.exists():
            progress.add(-part.stat().st_size)  # the next try counts from the first byte
            part.unlink()
        progress.wait(DELAY_S * 2 ** (number - 1))


def _run_command(address: str, part: Path, progress: Progress) -> bool:
    """Write the output of the shell command after `pipe:` to `part`; False, since its right length is unknown."""
    with tempfile.TemporaryFile() as stderr, open(part, "wb") as stdout:
        # The command comes from the user's own configuration. WebDataset gives it to a shell, too.
        # A session of its own, so that the command's children can be killed with it.
        command, no_input = address.removeprefix("pipe:"), subprocess.DEVNULL
        process = subprocess.Popen(
            command, shell=True, stdin=no_input, stdout=stdout, stderr=stderr, start_new_session=True
        )
        progress.commands.add(process)
        try:
            size = 0
            while process.poll() is None:
                size = _add_written(stdout, size, progress)
                if os.fstat(stderr.fileno()).st_size > MESSAGES:
                    raise UserError(f"the command says more than {in_bytes(MESSAGES)} on stderr")
                progress.wait(0.02)
            _add_written(stdout, size, progress)
        finally:
            _kill(process)
            process.wait()
            progress.commands.discard(process)
        stderr.seek(0)
        lines = [line.strip() for line in stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
    message = lines[-1][:500] if lines else "it said nothing"
    if process.returncode in (126, 127):
        raise UserError(f"the shell cannot run the command ({message})")
    if process.returncode:
        raise BrokenDownloadError(f"the command ended with exit code {process.returncode}: {message}")
    return False


def _add_written(file: IO[bytes], before: int, progress: Progress) -> int:
    """The length of `file`, which a command writes; the bytes beyond `before` count as downloaded."""
    size = os.fstat(file.fileno()).st_size
    if size > before:
        progress.add(size - before)
    return size


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:
        return  # another process may have this number by now
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _download(address: str, part: Path, progress: Progress) -> bool:
    """Write the file at a URL to `part`; whether the server has said how long the file is."""
    source, length = _open(address)
    size = 0
    with source, open(part, "wb") as file:
        while data := _read(source):
            file.write(data)
            size += len(data)
            progress.add(len(data))
    if length is not None and size != length:
        raise BrokenDownloadError(f"it ended after {size:,} of {length:,} bytes")
    return length is not None


def _read(source: IO[bytes]) -> bytes:
    try:
        return source.read(2**18)
    except Exception as error:  # each client has errors of its own; the last try shows this one to the user
        raise BrokenDownloadError(f"the connection broke: {_in_words(error)}") from error


def length_of(remote: RemoteFile) -> int | None:
    """The length in bytes; None for a command, and if the server does not say it or cannot be reached now.

    Raises UserError if the server has no such file or refuses it, or if the client for the scheme is missing.
    """
    if remote.is_command:
        return None
    try:
        source, length = _open(remote.address)  # reads the headers only
        source.close()
    except BrokenDownloadError:
        return None
    except UserError as error:
        raise UserError(f"{remote.name} cannot be fetched: {error}") from error
    return length


def _open(address: str) -> tuple[IO[bytes], int | None]:
    """The file at a URL, and its length if known; raises BrokenDownloadError if another try may help, or UserError."""
    if not address.startswith(("http://", "https://")):
        return _open_with_fsspec(address)
    if "@" in urlsplit(address).netloc:
        raise UserError("user and password do not belong into a URL: use pipe:curl with a .netrc file")
    request = urllib.request.Request(address, headers={"User-Agent": "finetune", "Accept-Encoding": "identity"})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        kind = BrokenDownloadError if error.code in TEMPORARY_CODES else MissingFileError
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except Exception as error:  # sockets, TLS and http.client have errors of their own
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(str(error.reason)) from error
        raise BrokenDownloadError(_in_words(error)) from error
    length = answer.headers["Content-Length"] or ""
    return answer, int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None


def _open_with_fsspec(address: str) -> tuple[IO[bytes], int | None]:
    import fsspec  # type: ignore[import-untyped, unused-ignore]

    scheme = address.partition("://")[0]
    known = fsspec.available_protocols()
    if scheme not in known:
        raise UserError(f"no client is known for {scheme}://{nearest(scheme, known)}")
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
        length = filesystem.info(path).get("size")
        return filesystem.open(path, "rb"), length
    except ImportError as error:
        install = f"pip install 'finetune[{EXTRAS[scheme]}]'" if scheme in EXTRAS else _in_words(error)
        raise UserError(f"the client for {scheme}:// is not installed: {install}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise MissingFileError(f"there is no such file, or it may not be read ({_in_words(error)})") from error
    except Exception as error:  # each client has errors of its own; the last try shows this one to the user
        raise BrokenDownloadError(_in_words(error)) from error


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
