"""Mistakes of people, apart from faults of the program."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the person at the keyboard can mend; its text says what happened, what was expected, and how.

    The commands show it as one line and end with exit code 1. Any other exception is a fault of the program, and is
    shown as one, with the place of its traceback.
    """
