"""Globs of parameter names, as settings hold them: which names they match, and an error for one that matches none."""

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from finetune.system.errors import UserError


def matched(globs: Collection[str], names: Sequence[str], key: str) -> set[str]:
    """The `names` that any of the `globs` matches; `key` is the setting that holds the globs.

    Raises:
        UserError: A glob matches no name. It says the nearest name, or the nearest module with everything in it.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            modules = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
            choices = {name.lower(): name for name in [*names, *sorted(f"{module}.*" for module in modules)]}
            close = choices[difflib.get_close_matches(glob.lower(), choices, n=1, cutoff=0.0)[0]]
            examples = f"names look like {names[0]}, {names[-1]}"
            raise UserError(f"{key}: '{glob}' matches no parameter; did you mean '{close}'? {examples}")
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}
