"""What a configuration took from the environment, and how `config.yaml` records it. Standard library only.

A text that came from the environment may be a secret, such as the token of an address. So `config.yaml` has it in clear
only where it is a path on this machine; else it keeps the reference `${oc.env:NAME}`. No log shows it.
"""

import os
import re
from typing import Any

from finetune.config.conf import Conf, as_dict, leaves

_kept: dict[tuple[str, str], Any] = {}  # dotted key and its value as text -> the reference that it came from
# A reference, and the backslashes in front of it; an odd number of them makes it plain text.
_REFERENCE = re.compile(r"(\\*)\$\{")


def is_local_path(text: str) -> bool:
    """Whether a text is a path on this machine: it begins like one, or it or the folder that it lies in is there."""
    if re.search(r"(^|::)(pipe:|[a-z][a-z0-9+.-]+://)", text):
        return False
    path = os.path.expanduser(text)
    if os.path.isabs(path) or path.startswith(("./", "../")):
        return True
    return os.path.lexists(path) or (os.sep in path and os.path.isdir(os.path.dirname(path)))


def keep_reference(key: str, value: Any, reference: Any) -> None:
    """Let `config.yaml` have the `reference` in the place of `value`, where that is the value of the setting `key`."""
    _kept[key, repr(value)] = reference


def recorded(conf: Conf) -> dict[str, Any]:
    """`as_dict` as `config.yaml` has it: with references in the place of texts from the environment."""
    tree = as_dict(conf)
    for key, section, item in leaves(conf):
        holder: Any = tree
        for part in key.split(".")[:-1]:
            holder = holder[part]
        kept = _kept.get((key, repr(getattr(section, item.name))))
        holder[item.name] = escaped(holder[item.name]) if kept is None else kept
    return tree


def escaped(value: Any) -> Any:
    r"""A value, or a tree of values, in which `${` is plain text: `\${`."""
    if isinstance(value, dict):
        return {name: escaped(part) for name, part in value.items()}
    if isinstance(value, list):
        return [escaped(part) for part in value]
    return _REFERENCE.sub(lambda found: f"{2 * found[1]}\\${{", value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """The value of which `escaped` made this one; None where it holds a reference."""
    if isinstance(value, list):
        parts = [plain(part) for part in value]
        return None if None in parts else parts
    if not isinstance(value, str):
        return value
    if any(len(found[1]) % 2 == 0 for found in _REFERENCE.finditer(value)):
        return None
    return _REFERENCE.sub(lambda found: "\\" * (len(found[1]) // 2) + "${", value)
