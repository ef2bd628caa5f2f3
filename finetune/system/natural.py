"""The order of names as people count: `class 2` before `class 10`."""

import re
import unicodedata


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key that counts as people do: `class 2` before `class 10`, upper and lower case together."""
    parts = [part for part in re.split(r"(\d+)", text.casefold()) if part]
    return [_number_key(part) if part.isdecimal() else (1, 0, part) for part in parts], text


def _number_key(digits: str) -> tuple[int, int, str]:
    """A sort key of a number with any count of digits: `int` takes no more than 4,300."""
    if not digits.isascii():  # digits of other scripts
        digits = "".join(str(unicodedata.decimal(digit)) for digit in digits)
    digits = digits.lstrip("0")
    return 0, len(digits), digits
