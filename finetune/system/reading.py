"""Reads the small text files that a run or a person wrote, as if anybody could have written them.

A file is opened without following links, must be a regular file, and has a limit of size and of depth. Its content then
has to fit a type, by msgspec: a TypedDict, a dataclass, or `Annotated[int, Meta(ge=0)]`. Whatever is wrong with a file
of ours is one `DamagedError`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import IO, Any, TypeVar, is_typeddict

import msgspec
import yaml

from finetune.system.errors import UserError

MAX_BYTES = 2**28  # of JSON: a thousand times what a long run with a thousand layers writes
MAX_YAML_BYTES = 2**20  # yaml is read at about 200 kB a second
MAX_DEPTH = 50
MAX_NODES = 100_000  # of a yaml file, once its aliases are written out
MAX_DIGITS = 400  # of a number in yaml: to convert a longer one may take hours
_MAX_INT = 2**64
# What PyYAML raises on odd input; its constructors of numbers, dates and sets raise more than its own errors.
ANY_OF_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)

T = TypeVar("T")

_BRACKETS = re.compile(rb'[\[\]{}]|"(?:[^"\\]|\\.)*"', re.DOTALL)


class DamagedError(UserError):
    """A file that the program wrote earlier cannot be read, or is not what was written."""

    @classmethod
    def because(cls, path: Path, why: str, mend: str = "") -> DamagedError:
        """The error of a file: `why` in a few words, and how to `mend` it."""
        return cls(f"{path} is damaged: {why}" + (f"; {mend}" if mend else ""))

    @classmethod
    def unreadable(cls, path: Path, error: BaseException) -> DamagedError:
        """The error of a file that another error kept from being read."""
        return cls(f"{path} cannot be read: {first_line(error)}")


class UnfitError(UserError):
    """The content of a file is not what was expected; the text says why in a few words, without the file's name."""


class NotRegularError(OSError):
    """A pipe, a device, a socket or a folder is in the place of a file."""

    def __str__(self) -> str:
        """What is wrong, without the name of the place."""
        return "it is no regular file, but a folder, a pipe or a device"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return reason.splitlines()[0] if reason else type(error).__name__


def open_regular(path: str | Path, *, follow: bool = True) -> IO[bytes]:
    """Open a file to read its bytes; a pipe or a device in its place would be read, or waited for, without end.

    Raises:
        NotRegularError: It is no regular file.
        OSError: It cannot be opened, or is a symbolic link that `follow=False` refuses.
    """
    flags = os.O_RDONLY
    if os.name == "posix":  # Windows has neither of these flags, nor pipes in folders
        flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        if isinstance(error, IsADirectoryError) or error.errno == errno.ENXIO:  # a socket
            raise NotRegularError from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotRegularError
    return file


def read_file(path: Path, *, limit: int, follow: bool = False) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; a symbolic link is refused unless `follow`.

    A pipe or a device in the place of the file does not block.

    Raises:
        FileNotFoundError: There is no such file.
        UnfitError: It is no such file, or cannot be read.
    """
    try:
        with open_regular(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > limit else file.read(limit + 1)  # the file may be growing
            if max(size, len(content)) > limit:
                raise UnfitError(f"it has {size:,} bytes, and {limit:,} are the most that it may have")
            return content
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise UnfitError("it is a symbolic link") from None
        raise UnfitError(first_line(error)) from None


def read_json(path: Path, kind: type[T], *, limit: int = MAX_BYTES, mend: str = "") -> T:
    """The content of a JSON file of ours, which fits `kind`; see `parse_json`.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: It cannot be read, or holds something else; the text ends with how to `mend` it.
    """
    try:
        return parse_json(read_file(path, limit=limit), kind)
    except UnfitError as error:
        raise DamagedError.because(path, str(error), mend) from None


def read_json_lines(path: Path, kind: type[T], *, limit: int = MAX_BYTES, mend: str = "") -> list[T]:
    """The lines of a file of ours that has a JSON value a line, empty lines left out; errors as of `read_json`."""
    try:
        return parse_json_lines(read_file(path, limit=limit), kind)
    except UnfitError as error:
        raise DamagedError.because(path, str(error), mend) from None


def parse_json_lines(text: bytes, kind: type[T]) -> list[T]:
    """A text with a JSON value a line as values of the type `kind`; see `parse_json`. An UnfitError names the line."""
    values = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.strip():
            try:
                values.append(parse_json(line, kind))
            except UnfitError as error:
                raise UnfitError(f"line {number}: {error}") from None
    return values


def parse_json(text: bytes, kind: type[T]) -> T:
    """A JSON text in UTF-8 as a value of the type `kind`.

    Entries of an object that a TypedDict does not name stay as they are. NaN, infinities, and whole numbers of more
    than 64 bits are refused.

    Raises:
        UnfitError: It is no such text.
    """
    if not text.strip():
        raise UnfitError("it is empty")
    _refuse_depth(text)
    try:
        decoded = text.decode("utf-8")
        value = json.loads(decoded, parse_constant=_constant, parse_float=_real, parse_int=_whole)
    except UnicodeDecodeError:
        raise UnfitError("it is no text in UTF-8") from None
    except ValueError as error:
        raise UnfitError(f"it is no JSON ({error})") from None
    return fitted(value, kind)


def fitted(value: Any, kind: type[T]) -> T:
    """`value`, of plain types, as a value of the type `kind`; an UnfitError says where it does not fit.

    A TypedDict is checked and returned as it is, with the entries that its type does not name.
    """
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$", "`content").replace("`", "'")
        raise UnfitError(f"{text[:1].lower()}{text[1:]}") from None
    return value if is_typeddict(kind) else converted


def _refuse_depth(text: bytes) -> None:
    """An UnfitError for JSON that is nested so deep that reading it would overflow the stack."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise UnfitError(f"it is nested more than {MAX_DEPTH} levels deep")


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > _MAX_INT:
        raise ValueError("a whole number has more than 64 bits")
    return int(digits)


class YamlLoader(yaml.SafeLoader):
    """PyYAML's loader of plain values, with limits of depth, of size once aliases are written out, and of digits."""

    allow_aliases = True

    def __init__(self, text: str) -> None:
        """Read from `text`."""
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}  # anchor -> nodes under it, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; an UnfitError beyond the limits. Its name is PyYAML's."""
        event, before = self.peek_event(), self._nodes  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            if not self.allow_aliases:
                raise UnfitError("it has an alias (`*name`), which the program never writes")
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise UnfitError("an alias (`*name`) contains itself")
            self._nodes += self._sizes.get(str(event.anchor), 0)
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > MAX_DEPTH:
            raise UnfitError(f"it is nested more than {MAX_DEPTH} levels deep")
        if self._nodes > MAX_NODES:
            raise UnfitError(f"it has more than {MAX_NODES:,} values, those behind aliases (`*name`) counted")
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_DIGITS and node.tag.endswith((":int", ":float")):
            raise UnfitError(f"a number has more than {MAX_DIGITS} digits")
        if not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None):
            self._sizes[event.anchor] = self._nodes - before
        self._depth -= 1
        return node


class _OwnYaml(YamlLoader):
    allow_aliases = False


def yaml_text(path: Path, *, follow: bool = False) -> str:
    """The text of a yaml file; FileNotFoundError, or an UnfitError that says why it is none."""
    try:
        return read_file(path, limit=MAX_YAML_BYTES, follow=follow).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnfitError("not saved as UTF-8 text") from None


def read_yaml(path: Path, kind: type[T], *, mend: str = "") -> T:
    """The content of a yaml file of ours, which fits `kind`; it has no aliases. Errors as of `read_json`."""
    try:
        return fitted(yaml.load(yaml_text(path), Loader=_OwnYaml), kind)  # a loader of plain values
    except UnfitError as error:
        raise DamagedError.because(path, str(error), mend) from None
    except ANY_OF_YAML as error:
        raise DamagedError.because(path, yaml_problem(error), mend) from None


def yaml_problem(error: BaseException) -> str:
    """Why PyYAML could not read a text, in one line, with the number of the line where it is known."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return first_line(error) if isinstance(error, (yaml.YAMLError, ValueError)) else "a value is not of its type"
    where = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
    return where + " ".join((error.problem or error.context or "not yaml").split())
