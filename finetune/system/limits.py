"""Sizes that files and settings claim are checked here, before memory, disk or file handles are asked for.

Every refusal is one line: what was claimed, the limit, and the key that raises it; where no key does, what to do.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from finetune.system.errors import UserError
from finetune.system.memory import free_memory
from finetune.system.reading import open_regular

if sys.platform != "win32":  # which has no limit of this kind
    import resource

MIB = 2**20
OPEN_FILES = 4096  # that a process allows itself where the system lets it, once its first limit is too low


class LimitError(UserError):
    """A size above a limit."""


def in_bytes(num_bytes: float) -> str:
    """A size in the largest unit that it fills: `0 bytes`, `7.9 KiB`, `1.50 GiB`; all sizes in messages look so."""
    size, units = float(num_bytes), ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        if round(abs(size)) < 1024 or unit == units[-1]:
            break
        size /= 1024
    if unit == "bytes":
        return f"{size:,.0f} bytes" if size != 1 else "1 byte"
    return f"{size:,.2f} {unit}" if size < 9.995 else f"{size:,.1f} {unit}" if size < 99.95 else f"{size:,.0f} {unit}"


@dataclass(frozen=True)
class Limit:
    """The most that one thing may hold."""

    most: int
    mend: str  # the key that raises the limit, or what to do where none does; it ends the message
    unit: str = ""  # what is counted, such as `columns`; empty: bytes

    def check(self, subject: str, number: int) -> None:
        """A LimitError where `subject`, such as `data.table=x.csv: row 3`, claims a larger `number`."""
        if number > self.most:
            raise LimitError(
                f"{subject}: has {self._words(number)}, and at most {self._words(self.most)} can be used; {self.mend}"
            )

    def error(self, subject: str) -> LimitError:
        """The error for a `subject` that goes on after `most`, where nobody knows how long."""
        return LimitError(f"{subject}: has more than {self._words(self.most)}; {self.mend}")

    def _words(self, number: int) -> str:
        return f"{number:,} {self.unit}" if self.unit else in_bytes(number)


def image_limit(max_image_mib: int) -> Limit:
    """The bytes of one decoded image, three a pixel."""
    return Limit(max_image_mib * MIB, f"data.max_image_mib (now {max_image_mib}) raises the limit")


def text_limit(max_text_mib: int) -> Limit:
    """The bytes of one text: a row of a table, a json or label of a shard, a list of class names."""
    return Limit(max_text_mib * MIB, f"data.max_text_mib (now {max_text_mib}) raises the limit")


NAMES = Limit(16 * MIB, "that is no list of class names")
CLASSES = Limit(1_000_000, "is it really the class that is read as the label?", "classes")
NAME = Limit(4096, "a path or the name of a class is shorter", "letters")
COLUMNS = Limit(100_000, "leave out columns that no key names", "columns")


def check_memory(subject: str, num_bytes: int, mend: str) -> None:
    """A LimitError where `subject` needs more bytes of memory than this process can take now.

    Only for what is certainly needed at once: an estimate that is too high would refuse a run that fits.
    """
    free = free_memory()
    if free is not None and num_bytes > free:
        raise LimitError(f"{subject} needs {in_bytes(num_bytes)} of memory, {in_bytes(free)} are free; {mend}")


def check_open_files(needed: int, fewer: str = "") -> None:
    """Make sure that this process may have `needed` files open; raises its own limit if it may.

    Raises:
        LimitError: The system allows fewer; its text has `fewer`, which says what needs fewer.
    """
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard == resource.RLIM_INFINITY or needed <= hard:
        more = max(needed, OPEN_FILES)
        more = more if hard == resource.RLIM_INFINITY else min(more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        return
    # The hard limit, which `ulimit -n` lowers as well, and which nobody but an administrator raises.
    who = "a new shell may allow more, else an administrator can (nofile in /etc/security/limits.conf)"
    raise LimitError(f"this run opens up to {needed} files, and this process may open {hard}{fewer}; {who}")


def read_text(path: Path, subject: str, limit: Limit) -> str:
    """The text of a UTF-8 file of a person's, with or without a byte order mark; `subject` names it, with its key.

    Raises:
        LimitError: The file is longer than `limit`.
        UserError: The file is no UTF-8.
        OSError: The file cannot be read; the text of the error begins with `subject`.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limit.most + 1)
            if len(data) > limit.most:
                size = os.fstat(file.fileno()).st_size
                limit.check(subject, max(size, len(data)))
    except OSError as error:
        raise OSError(f"{subject}: cannot be read: {error.strerror or error}") from error
    return text_of(data, subject)


def text_of(data: bytes, subject: str, *, strict: bool = True) -> str:
    """The content of such a file as text; a UserError that begins with `subject` if it is no UTF-8.

    If not `strict`, bytes that are no UTF-8 are carried through as lone surrogates, as those of file names are.
    """
    if problem := encoding_problem(data[:64]):
        raise UserError(f"{subject}: {problem}")
    try:
        return data.decode("utf-8-sig", "strict" if strict else "surrogateescape")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{subject}: line {line} is no UTF-8 text; save the file as UTF-8") from error


def text_lines(text: str) -> list[str]:
    """The lines of a text without the blanks around them, empty ones left out.

    Unlike `str.splitlines` this cuts at line breaks alone: a name may hold U+2028 and other letters, which no editor
    shows as the end of a line.
    """
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


# The first bytes of files that are given in the place of a text, each with what it is and how to mend that.
_BEGINNINGS = {
    b"\xff\xfe": ("is text in UTF-16, as Excel saves `Unicode text`", "save it as UTF-8 (`CSV UTF-8` in Excel)"),
    b"\xfe\xff": ("is text in UTF-16", "save it as UTF-8 (`CSV UTF-8` in Excel)"),
    b"PK\x03\x04": ("is a zip archive or a sheet of Excel", "save it as text in UTF-8 (`CSV UTF-8` in Excel)"),
    b"\xd0\xcf\x11\xe0": ("is a sheet of Excel", "save it as text in UTF-8 (`CSV UTF-8` in Excel)"),
    b"\x1f\x8b": ("is packed by gzip", "unpack it, or for a table let its name end in .gz"),
    b"PAR1": ("is a Parquet file", "let its name end in .parquet"),
    b"<!doctype": ("is a web page", "download the file itself"),
    b"<html": ("is a web page", "download the file itself"),
    b"SQLite": ("is a data base of SQLite", "save the rows as text in UTF-8"),
}


def encoding_problem(start: bytes) -> str:
    """Why a file that starts with these 64 bytes is no text in UTF-8, and how to mend that; empty if it may be one."""
    for beginning, (what, how) in _BEGINNINGS.items():
        if start.lower().startswith(beginning.lower()):
            return f"{what}, expected text in UTF-8; {how}"
    if start.count(0) * 4 > len(start):  # every second byte of plain letters in UTF-16 is 0
        return "looks like text in UTF-16, or is no text; save it as UTF-8 (`CSV UTF-8` in Excel)"
    return ""


class BoundedLines(Iterator[str]):
    """The lines of a text file, where a line, or several that make one record, are never longer than a limit."""

    def __init__(self, file: IO[str], subject: str, limit: Limit) -> None:
        """Read `file`; its letters count as bytes."""
        self._file, self._subject, self._limit = file, subject, limit
        self.number = 0  # of the last line, from 1
        self.total = 0  # letters of all lines
        self.taken = 0  # letters since the last record ended; whoever reads records sets it to 0 after each

    def __next__(self) -> str:
        """The next line with its line break; raises LimitError."""
        rest = self._limit.most - self.taken
        line = self._file.readline(rest + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.taken += len(line)
        self.total += len(line)
        if len(line) > rest:
            raise self._limit.error(f"{self._subject}row {self.number}")
        return line
