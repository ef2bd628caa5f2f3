"""A pickle read as data: nothing that it names is imported, and nothing is called.

A pickle is a small program for a machine with a stack, which may call any function of Python. Here an own machine does
its steps on values that stand for themselves: a call becomes a `Call`, an object an `Instance`. The caller finds in
them what it knows and leaves the rest. No step takes more memory than the bytes of the pickle justify.
"""

import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from finetune.system.errors import UserError

# The largest real files, checkpoints with a long history, take a tenth of this. More would keep the start waiting.
MAX_STEPS = 5_000_000
# Keys of dicts that are neither texts nor small numbers. More could be chosen to collide, which takes a dict hours.
MAX_ODD_KEYS = 20_000
ZIP_START = b"PK\3\4"
# torch before 1.6 wrote these in a row: a magic number, a version, the system, the content, the keys of the storages.
LEGACY_PICKLES = 5
# Largest pickle, and largest file of code, in bytes. OpenAI's are below 1 MiB.
MAX_TEXT = 16 * 2**20
# A file of weights is not compressed. An archive that claims far more bytes than it has is made to fill the memory.
MAX_GROWTH = 8
_SMALL = 2**60  # from here on, Python gives several numbers one hash


class PickleError(ValueError):
    """The bytes are no pickle, or one with steps that a file of weights does not need."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the pickle names; it is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        """The full name: `torch._utils._rebuild_tensor_v2`."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Call:
    """A call that the pickle asks for and that is not made, with what the pickle puts into the object afterwards."""

    function: Name
    args: tuple[Any, ...]
    state: Any = None
    entries: dict[Any, Any] | None = None  # of a dict of another class, such as OrderedDict


@dataclass(eq=False, slots=True)
class Instance:
    """An object of a class, with the state and the entries that the pickle gives it."""

    cls: Name
    state: Any = None
    entries: dict[Any, Any] | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """Something outside the pickle: a storage of a tensor."""

    key: Any


@dataclass
class Outside:
    """What a pickle names that is not in it."""

    references: list[Reference] = field(default_factory=list)  # in their order
    code: set[str] = field(default_factory=set)  # functions that run programs, reach other machines or remove files


# Modules whose functions no file of weights has a use for; of the others alone those that run a text as code.
_CODE = re.compile(
    r"(os|posix|nt|subprocess|pty|runpy|importlib|_?socket|shutil|webbrowser|ctypes|_ctypes|pdb|bdb|code|timeit|pip"
    r"|marshal|commands|popen2|platform|urllib|requests|httpx|aiohttp|http|ftplib|smtplib|distutils|setuptools"
    r"|cProfile|sys|torch\.(hub|utils\.cpp_extension))"
    r"(\..*)?\._?[a-z]\w*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|__import__|open|input|breakpoint|apply)"
)


class Held:
    """An open file that is asked for no more bytes than it has: room is made for as many as are asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        """`size` is that of the whole file, in bytes."""
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, number: int) -> bytes:
        """The next bytes, up to `number`."""
        return self.file.read(min(number, max(self.size - self.file.tell(), 0)))


class _Mark:
    """Stands in the stack where a group of values begins."""


_MARK = _Mark()


class _Stack(list[Any]):
    """The machine's stack; counts the odd keys so far, and notes what lies outside of the pickle."""

    odd_keys = 0

    def __init__(self, outside: Outside) -> None:
        super().__init__()
        self.outside = outside

    def name(self, module: str, name: str) -> None:
        """Push a class or function that the pickle names."""
        self.append(Name(module, name))
        if _CODE.fullmatch(str(self[-1])):
            self.outside.code.add(str(self[-1]))


def read_pickle(data: bytes | IO[bytes] | Held, *, objects: bool = False, outside: Outside | None = None) -> Any:
    """The value of a pickle: None, numbers, texts, tuples, lists, dicts, and the classes of this module.

    Dicts keep only the entries whose key is a text, and texts by number, which may name classes. With `objects`, the
    steps by which programs save objects of their own are known, too: such an object is a `Call` or an `Instance`, and
    the items of a list of another class are left out. What the pickle names outside of itself goes into `outside`. Of
    an open file the next pickle is read.

    Raises:
        PickleError: A step is unknown, senseless, or made to keep Python busy.
    """
    stack = _Stack(Outside() if outside is None else outside)
    memo: dict[int, Any] = {}
    values, steps = ((*_VALUES, *_MORE_VALUES), _STEPS | _MORE_STEPS) if objects else (_VALUES, _STEPS)
    try:
        for step, (opcode, operand, _) in enumerate(pickletools.genops(data)):  # type: ignore[arg-type]
            arg: Any = operand
            if step == MAX_STEPS:
                raise PickleError(f"its pickle has more than {MAX_STEPS:,} steps")
            name = opcode.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in values:
                stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name == "GLOBAL":
                stack.name(*arg.split(" ", 1))
            elif name in steps:
                steps[name](stack)
            elif name == "MEMOIZE" and objects:
                memo[len(memo)] = stack[-1]
            elif name not in ("PROTO", "STOP") and not (name == "FRAME" and objects):
                raise PickleError(f"its pickle has a step {name}, which files of weights do not need")
    except PickleError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise PickleError(f"its pickle is no whole one ({error})") from error
    if len(stack) != 1:
        raise PickleError("its pickle is no whole one")
    return stack[0]


def check_pickles(path: Path) -> None:
    """Raise an error for a file of `torch.save` that is made to keep Python busy or to fill the memory; before torch.

    Raises:
        PickleError: Its pickle is of that kind, or no whole one.
        UserError: See `check_growth`.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START  # as torch decides: there may be an archive behind a pickle
        file.seek(0)
        if not is_zip:
            held = Held(file, path.stat().st_size)
            for _ in range(LEGACY_PICKLES):
                read_pickle(held)
        elif zipfile.is_zipfile(file):  # else it is a damaged one, of which torch says what it makes of it
            with zipfile.ZipFile(file) as archive:
                check_growth(archive, path)
                for info in archive.infolist():
                    if info.filename.endswith("/data.pkl"):
                        with archive.open(info) as pickled:
                            read_pickle(pickled.read(info.file_size))


def check_growth(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise a UserError for a zip that would take far more memory than its file has bytes."""
    claimed, held = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    if claimed > MAX_GROWTH * held + MAX_TEXT:
        raise UserError(
            f"{path} is refused: its {held:,} bytes claim to hold {claimed:,}, which no file of weights does"
        )


def _group(stack: _Stack) -> list[Any]:
    """Take the values above the last mark, and the mark."""
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _pop(stack: _Stack, number: int) -> list[Any]:
    values = [stack.pop() for _ in range(number)]
    if any(value is _MARK for value in values):
        raise PickleError("its pickle is no whole one")
    return values[::-1]


def _top(stack: _Stack, kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise PickleError(f"its pickle treats a {type(stack[-1]).__name__} as a {kind.__name__}")
    return stack[-1]


def _set(stack: _Stack, items: list[Any]) -> None:
    _count_odd(stack, items[::2])
    pairs = list(zip(items[::2], items[1::2], strict=True))
    named = {key: value for key, value in pairs if isinstance(key, str) or _is_row(key, value)}
    if isinstance(stack[-1], (Call, Instance)):  # an OrderedDict is a call
        if stack[-1].entries is None:
            stack[-1].entries = {}
        stack[-1].entries.update(named)
    else:
        _top(stack, dict).update(named)


def _is_row(key: object, value: object) -> bool:
    return type(key) is int and 0 <= key < _SMALL and type(value) is str


def _count_odd(stack: _Stack, keys: Iterable[Any]) -> None:
    """Count the keys that collide more easily than texts; a tuple in a tuple could overflow Python's own stack."""
    for key in keys:
        if isinstance(key, str) or (isinstance(key, int) and abs(key) < _SMALL):
            continue
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise PickleError("its pickle has nested tuples for keys")
        stack.odd_keys += 1
    if stack.odd_keys > MAX_ODD_KEYS:
        raise PickleError(f"its pickle has more than {MAX_ODD_KEYS:,} odd keys")


def _extend(stack: _Stack, items: list[Any]) -> None:
    _top(stack, list).extend(items)


def _call(stack: _Stack) -> None:
    function, args = _pop(stack, 2)
    if isinstance(function, Call):  # of what another call gives: a method, for example
        function = Name(function.function.module, f"{function.function.name}(...)")
    if not isinstance(function, Name) or not isinstance(args, tuple):
        raise PickleError("its pickle calls what is no function")
    # A set, or an OrderedDict, may be made of a list: of its keys, or of pairs.
    for arg in args:
        if isinstance(arg, (list, tuple)) and function.module in ("collections", "builtins", "__builtin__"):
            _count_odd(stack, arg)
            _count_odd(stack, (pair[0] for pair in arg if isinstance(pair, (list, tuple)) and pair))
        if isinstance(arg, int) and function.name == "bytearray":
            raise PickleError("its pickle asks for empty memory")
    stack.append(Call(function, args))


def _make(stack: _Stack) -> None:
    cls, _ = _pop(stack, 2)
    if not isinstance(cls, Name):
        raise PickleError("its pickle makes an object of what is no class")
    stack.append(Instance(cls))


def _build(stack: _Stack) -> None:
    (state,) = _pop(stack, 1)
    if not isinstance(stack[-1], Call):
        _top(stack, Instance)
    stack[-1].state = state


def _refer(stack: _Stack) -> None:
    stack.append(Reference(*_pop(stack, 1)))
    stack.outside.references.append(stack[-1])


def _name(stack: _Stack) -> None:
    module, name = _pop(stack, 2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("its pickle names a class by what is no text")
    stack.name(module, name)


def _make_by_words(stack: _Stack) -> None:
    cls, args, _ = _pop(stack, 3)
    stack += [cls, args]
    _make(stack)


def _add(stack: _Stack, items: list[Any]) -> None:
    """Append to a list or a set; the items of other objects, such as a deque, are left out."""
    if isinstance(stack[-1], Call) and stack[-1].args and str(stack[-1].function) == "builtins.set":
        (held,) = stack[-1].args
        held += items if isinstance(held, list) else ()
    elif not isinstance(stack[-1], (Call, Instance)):
        _extend(stack, items)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_VALUES: tuple[str, ...] = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_STEPS: dict[str, Callable[[_Stack], None]] = {
    "EMPTY_LIST": lambda stack: stack.append([]),
    "EMPTY_SET": lambda stack: stack.append(Call(Name("builtins", "set"), ())),
    "EMPTY_DICT": lambda stack: stack.append({}),
    "TUPLE": lambda stack: stack.append(tuple(_group(stack))),
    "TUPLE1": lambda stack: stack.append(tuple(_pop(stack, 1))),
    "TUPLE2": lambda stack: stack.append(tuple(_pop(stack, 2))),
    "TUPLE3": lambda stack: stack.append(tuple(_pop(stack, 3))),
    "APPEND": lambda stack: _extend(stack, _pop(stack, 1)),
    "APPENDS": lambda stack: _extend(stack, _group(stack)),
    "SETITEM": lambda stack: _set(stack, _pop(stack, 2)),
    "SETITEMS": lambda stack: _set(stack, _group(stack)),
    "BINPERSID": _refer,
    "REDUCE": _call,
    "NEWOBJ": _make,
    "BUILD": _build,
}
# The steps of objects: lists, sets and dicts of other classes, texts and bytes of protocols up to 5.
_MORE_VALUES = (
    *("LONG4", "FLOAT", "INT", "LONG", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_MORE_STEPS: dict[str, Callable[[_Stack], None]] = {
    "EMPTY_SET": lambda stack: stack.append(Call(Name("builtins", "set"), ([],))),
    "POP": lambda stack: stack.__delitem__(-1),
    "POP_MARK": lambda stack: _group(stack).clear(),
    "DUP": lambda stack: stack.append(stack[-1]),
    "STACK_GLOBAL": _name,
    "NEWOBJ_EX": _make_by_words,
    "LIST": lambda stack: stack.append(_group(stack)),
    "FROZENSET": lambda stack: stack.append(Call(Name("builtins", "frozenset"), (_group(stack),))),
    "APPEND": lambda stack: _add(stack, _pop(stack, 1)),
    "APPENDS": lambda stack: _add(stack, _group(stack)),
    "ADDITEMS": lambda stack: _add(stack, _group(stack)),
}
