"""Text for people: safe to print on a terminal and to paste into a shell, numbers of things, error messages."""

import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Collection, Sequence

# KEY='value' with no other quote in it stays as it is: the shell takes the quotes away, and the value needs none.
_SHELL_SAFE = re.compile(r"[\w./+-]+='[^'\\]*'")
# Invisible characters that turn the direction of the text around them, and so can show one name as another.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


_hidden: dict[str, str] = {}  # texts that no output may show -> what stands in their place
MAX_LINE = 4_000  # letters of an error
# A text of so many letters is hidden wherever it stands. A shorter one stands inside other words by chance, so it is
# hidden as a word of its own. Those of one or two letters are everywhere and keep no secret.
MIN_HIDDEN, MIN_HIDDEN_WORD = 6, 3


def hide(secret: str, shown: str) -> None:
    """From now on `printable` shows `shown` in the place of `secret`, such as a token, and of its part behind a `?`."""
    for text in (secret, secret.partition("?")[2]):
        if len(text) >= MIN_HIDDEN_WORD:
            _hidden[text] = shown


def without_secrets(text: str) -> str:
    """`text` with every secret replaced, see `hide`."""
    for secret, shown in _hidden.items():
        if secret not in text:
            continue
        if len(secret) >= MIN_HIDDEN:
            text = text.replace(secret, shown)
        else:
            text = re.sub(rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])", shown.replace("\\", r"\\"), text)
    return text


def printable(text: str, keep: Collection[str] = "") -> str:
    r"""`text` with control characters, text-direction marks and lone surrogates as visible escapes (`\x1b`).

    File and class names come from anywhere: an escape sequence in a name must not steer the terminal, and a line break
    must not forge a line of the log. Letters of all scripts stay, and the characters in `keep`. Secrets are replaced.
    """
    return "".join(char if char in keep else _escape(char) for char in without_secrets(text))


def _escape(char: str) -> str:
    if char not in _BIDI and unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp"):
        return char
    return char.encode("ascii", "backslashreplace").decode("ascii") if ord(char) > 127 else f"\\x{ord(char):02x}"


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: `1 image`, `2,000 images`, and `2 classes` where `many` is `classes`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def command(words: Sequence[str]) -> str:
    """Returns settings as a person pastes them into a shell, on one line: quoted where the shell would change them."""
    return " ".join(
        word if _SHELL_SAFE.fullmatch(word) and printable(word) == word else _quoted(word) for word in words
    )


def _quoted(word: str) -> str:
    r"""The word in quotes; control characters, and bytes that are no text, as escapes of bash and zsh: `$'a\x0ab'`."""
    if printable(word) == word:
        return shlex.quote(word)
    shown = (char if printable(char) == char and char not in "\\'" else _as_bytes(char) for char in word)
    return f"$'{''.join(shown)}'"


def _as_bytes(char: str) -> str:
    data = char.encode("utf-8", "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass")
    return "".join(f"\\x{value:02x}" for value in data)


def open_closed_streams() -> None:
    """Let standard streams that the caller has closed (`>&-`) lead nowhere.

    Else the next file that is opened, such as weights, takes the stream's number, and a library prints into it.
    """
    # In the order of their numbers, 0 to 2; they stay open as long as the process.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def complain(problem: str) -> None:
    """Print `error: <problem>` on stderr as one line of at most `MAX_LINE` letters, control characters escaped."""
    text = printable(" ".join(problem.split()))
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE - 600]} [...] {text[-500:]}"  # what was typed, and how to mend it
    print(f"error: {text}", file=sys.stderr)
