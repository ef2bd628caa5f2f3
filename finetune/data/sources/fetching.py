"""Files by URL, and what commands print: fetched once into a folder on this machine, whole, then read from there.

Each is written beside its place and renamed when it is whole; one process fetches it while others wait. What broke off
goes on where it stopped if the server can do that (RFC 9110, section 14), and from the start otherwise. Standard
library only: `urllib` for URLs, a shell for commands.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from finetune.config.data import REMOTE
from finetune.system.errors import UserError
from finetune.system.locks import file_lock

TRIES = 5  # in a row that bring nothing new
DELAY_S = 1.0  # ahead of the second try; twice that ahead of the next, and so on
TIMEOUT_S = 60.0  # without a byte
CHUNK_BYTES = 2**18
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP states that may be gone a moment later

Check = Callable[[Path], None]


def is_remote(place: str) -> bool:
    """Whether `place` is fetched: a URL, or `pipe:` and a command."""
    return REMOTE.match(place) is not None


class StoppedError(Exception):
    """Fetching was asked to end."""


class _BrokenError(Exception):
    """What a second try may mend."""


class _NoSuchPartError(_BrokenError):
    """The server has no rest of the file: there is no more, or it is another file by now."""


@dataclass(frozen=True)
class Remote:
    """A file that is not on this machine: `https://host/path/name.tar`, or `pipe:COMMAND`, whose output it is."""

    address: str

    @property
    def is_pipe(self) -> bool:
        """Whether a command prints it."""
        return self.address.startswith("pipe:")

    @property
    def shown(self) -> str:
        """How messages call it: without user, password and query, which may be secrets; of a command its last file."""
        if self.is_pipe:
            files = re.findall(r"[^\s'\"=<|;]*[^\s'\"=<|;/]\.tar\b", self.address.removeprefix("pipe:"))
            return str(files[-1]) if files else f"pipe/{self.digest[:8]}.tar"
        parts = urlsplit(self.address)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def digest(self) -> str:
        """A hash of the whole address."""
        data = self.address.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(data, digest_size=8, usedforsecurity=False).hexdigest()

    def place_in(self, folder: Path) -> Path:
        """Where it is kept: a hash of the whole address, then the last part of its name."""
        last = re.sub(r"[^\w.-]", "_", self.shown.rpartition("/")[2])[-80:]
        return folder / f"{self.digest}-{last}"


class Progress:
    """How far all fetching came, and whether it is to end; for many threads."""

    def __init__(self, bar: Any) -> None:
        """Show it in `bar`, of tqdm, in bytes."""
        self._bar = bar
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def add(self, count: int) -> None:
        """So many bytes more; raises StoppedError once `stop` was called."""
        with self._lock:
            self._bar.update(count)
        self.wait(0)

    def wait(self, seconds: float) -> None:
        """Pause; raises StoppedError once `stop` was called."""
        if self._stopping.wait(seconds):
            raise StoppedError

    @contextlib.contextmanager
    def watching(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Let `stop` end `process` and its children, and end them in any case at the end."""
        with self._lock:
            self._processes.add(process)
        try:
            self.wait(0)
            yield
        finally:
            _kill(process)
            process.wait()
            with self._lock:
                self._processes.remove(process)

    def stop(self) -> None:
        """End all that is under way."""
        self._stopping.set()
        with self._lock:
            for process in self._processes:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it has started."""
    if process.returncode is not None:
        return  # its number may be another's by now
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def fetch(remote: Remote, folder: Path, check: Check, progress: Progress) -> Path:
    """The file on this machine, fetched now where it is not there; `folder` exists.

    Args:
        remote: What to fetch.
        folder: Where it is kept.
        check: Raises ValueError where the file is not what it should be.
        progress: Told of every byte.

    Raises:
        ValueError: It cannot be fetched, also after some tries.
        OSError: The folder cannot be written.
        StoppedError: `progress` was stopped.
    """
    place = remote.place_in(folder)
    if place.exists():
        return place
    with file_lock(place.with_name(f"{place.name}.lock"), on_wait=lambda: progress.wait(0.0)):
        if place.exists():  # another run fetched it while this one waited
            return place
        # Where there are no locks each process has a file of its own.
        part = place.with_name(f"{place.name}.part" if os.name == "posix" else f"{place.name}.{os.getpid()}.part")
        _fetch_whole(remote, part, check, progress)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, place)
        _note_of(part).unlink(missing_ok=True)
    return place


def _fetch_whole(remote: Remote, part: Path, check: Check, progress: Progress) -> None:
    """Try until `part` is whole, or no try brings anything new."""
    once = _run_command if remote.is_pipe else _download
    failures, furthest = 0, 0
    while True:
        try:
            is_length_known = once(remote, part, progress)
            _checked(part, check, is_length_known)
            return
        except _BrokenError as error:
            reached = part.stat().st_size if part.exists() else 0
            # A command always starts anew: then only the number of tries ends it.
            failures = 1 if reached > furthest and not remote.is_pipe else failures + 1
            furthest = max(furthest, reached)
            if failures >= TRIES:
                raise UserError(f"{remote.shown} cannot be fetched ({error}), {TRIES} tries in a row") from error
        except ValueError as error:
            raise UserError(f"{remote.shown} cannot be fetched: {error}") from error
        progress.wait(DELAY_S * 2 ** (failures - 1))


def _checked(part: Path, check: Check, is_length_known: bool) -> None:
    """Whether the file is what it should be; if not it goes, or it would be taken for a good beginning."""
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        if is_length_known:
            raise
        raise _BrokenError(str(error)) from error


# --- commands --------------------------------------------------------------------------------------------------------


def _run_command(remote: Remote, part: Path, progress: Progress) -> bool:
    """Write what the command prints to `part`; False: nobody said how long it would be."""
    command = remote.address.removeprefix("pipe:")
    written = 0
    with tempfile.TemporaryFile() as words, open(part, "wb") as file:
        # The command stands in the user's own configuration; a shell is what WebDataset gives it, too.
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            start_new_session=True,  # so that what it starts can be ended with it
        )
        assert process.stdout is not None
        with process.stdout, progress.watching(process):
            while data := process.stdout.read(CHUNK_BYTES):
                file.write(data)
                written += len(data)
                progress.add(len(data))
            code = process.wait()
        words.seek(0)
        said = words.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")[:500]
    if code in (126, 127):
        raise UserError(f"the shell cannot run the command ({last})")
    if code:
        progress.add(-written)
        raise _BrokenError(f"the command ended with exit code {code}: {last}")
    return False


# --- URLs ------------------------------------------------------------------------------------------------------------


def length_of(remote: Remote) -> int | None:
    """Bytes, as the server says them; None where it does not, or cannot be reached now, and for commands.

    Raises:
        ValueError: The server says that there is no such file, or that it may not be had.
    """
    if remote.is_pipe:
        return None
    try:
        for method in ("HEAD", "GET"):  # a signed URL may allow only the second
            try:
                with _open(remote, method, {}) as answer:
                    return _number(answer.headers["Content-Length"])
            except ValueError:
                if method == "GET":
                    raise
    except _BrokenError:
        pass
    except ValueError as error:
        raise UserError(f"{remote.shown} cannot be fetched: {error}") from error
    return None


def read_small(remote: Remote, limit_bytes: int) -> bytes | None:
    """A small file that may be there or not; None where it is not, is a web page, or is larger than `limit_bytes`."""
    try:
        with _open(remote, "GET", {}) as answer:
            data = b"".join(_chunks(answer, limit_bytes))
            is_page = answer.headers.get_content_type() == "text/html" or data.lstrip().startswith(b"<")
    except (_BrokenError, ValueError):
        return None
    return None if is_page or len(data) > limit_bytes else data


def _download(remote: Remote, part: Path, progress: Progress) -> bool:
    """Bring `part` from where it is to its end; whether the server said how long it is."""
    have, headers = _resumed(part)
    try:
        with _open(remote, "GET", headers) as answer:
            length = _number(answer.headers["Content-Length"])
            start = have if answer.status == 206 else 0
            if start and not str(answer.headers["Content-Range"]).startswith(f"bytes {start}-"):
                raise _NoSuchPartError("the server sent another part than was asked for")
            if not start:
                part.unlink(missing_ok=True)  # ahead of the note: it may be a part of an older version
                _write_note(part, answer)
            size = _append(answer, part, start, progress)
    except _NoSuchPartError:
        part.unlink(missing_ok=True)
        raise
    if length is not None and size != start + length:
        progress.add(-size)
        raise _BrokenError(f"it ended after {size:,} of {start + length:,} bytes")
    return length is not None


def _append(answer: http.client.HTTPResponse, part: Path, start: int, progress: Progress) -> int:
    """Write the body behind the first `start` bytes of `part`; how many bytes there are then."""
    with open(part, "ab", buffering=0) as file:  # what has come is kept, whatever becomes of this process
        progress.add(start)
        try:
            for data in _chunks(answer):
                file.write(data)
                progress.add(len(data))
        except _BrokenError:
            progress.add(-file.tell())
            raise
        return file.tell()


def _resumed(part: Path) -> tuple[int, dict[str, str]]:
    """(bytes that are there, headers that ask for the others): nothing where it cannot be told that they fit."""
    try:
        tag = str(json.loads(_note_of(part).read_bytes())["tag"])
        have = part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return 0, {}
    return (have, {"Range": f"bytes={have}-", "If-Range": tag}) if have and tag else (0, {})


def _write_note(part: Path, answer: http.client.HTTPResponse) -> None:
    """Which version of the file `part` is a part of."""
    tag = answer.headers["ETag"] or ""
    if not tag or tag.startswith("W/"):  # a weak one does not promise the same bytes
        tag = answer.headers["Last-Modified"] or ""
    _note_of(part).write_text(json.dumps({"tag": tag}), encoding="utf-8")


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


@contextlib.contextmanager
def _open(remote: Remote, method: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """The server's answer; raises ValueError where it will never be another, _BrokenError where it may."""
    parts = urlsplit(remote.address)
    if "@" in parts.netloc:
        raise UserError("user and password do not belong into a URL: use pipe:curl with a .netrc file")
    request = urllib.request.Request(
        remote.address, method=method, headers={"User-Agent": "finetune", "Accept-Encoding": "identity", **headers}
    )
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        words = f"HTTP {error.code} {error.reason}"
        if error.code in PASSING:
            raise _BrokenError(words) from error
        if error.code == 416 and headers:  # there is no more than what is there, or another file by now
            raise _NoSuchPartError("the server has no such part") from error
        raise UserError(words) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(str(error.reason)) from error
        raise _BrokenError(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(str(error) or type(error).__name__) from error
    with answer:
        yield answer


def _chunks(answer: http.client.HTTPResponse, limit_bytes: int | None = None) -> Iterator[bytes]:
    """The body piece by piece, to the first that passes `limit_bytes`."""
    count = 0
    while limit_bytes is None or count <= limit_bytes:
        try:
            data = answer.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenError(f"the connection broke: {error or type(error).__name__}") from error
        if not data:
            return
        count += len(data)
        yield data


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
