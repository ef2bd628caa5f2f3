"""References such as `${optim.lr}` and `${oc.env:HOME}`: filled in once, here, before any rule looks at a value."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from finetune.config.environment import is_local_path
from finetune.config.fields import nearest, show
from finetune.config.words.settings import PATH_SETTINGS, SETTINGS, Reading, convert, nearest_setting
from finetune.system.errors import ConfigError, UserError
from finetune.system.terminal import MIN_HIDDEN_WORD, hide

# What resolvers raise of themselves; OmegaConf wraps most of it.
_ERRORS = (OmegaConfBaseException, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
_taken: list[tuple[str, str]] = []  # environment variables that were read since the list was emptied


def _env(key: str, *default: Any) -> Any:
    """OmegaConf's `oc.env`, which notes what it reads."""
    found = oc.env(key, *default)
    if not default or found != default[0]:
        _taken.append((key, str(found)))
    return found


OmegaConf.register_new_resolver("oc.env", _env, replace=True)


@dataclass(frozen=True)
class Reference:
    """A value on the command line that is known once the configuration is composed."""

    text: Any  # a text, or a list of texts


@dataclass
class Filled:
    """References that were filled in."""

    reading: Reading = field(default_factory=Reading)
    kept: list[str] = field(default_factory=list)  # settings that no file and no log may show in clear


def fill_in(cfg: DictConfig, references: dict[str, Any]) -> Filled:
    """The settings `references`, dotted key to raw value, of a composition; mistakes become `reading.problems`."""
    filled = Filled()
    for name, raw in references.items():
        _taken.clear()
        try:
            value = OmegaConf.select(cfg, name, throw_on_missing=True)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            filled.reading.values[name] = convert(SETTINGS[name], value)
        except UserError as error:
            filled.reading.problems[name] = f"{_shown(name, raw)}: {error}" if not _taken else _hidden(name, raw)
        except _ERRORS as error:
            filled.reading.problems[name] = f"{_shown(name, raw)}: {explained(error, name, raw)}"
        if _taken and _may_be_secret(name, filled.reading.values.get(name, "")):
            filled.kept.append(name)
            for variable, text in _taken:
                if not is_local_path(text):
                    _hide(text, f"${{oc.env:{variable}}}", filled.reading.values.get(name))
    return filled


def _hide(text: str, reference: str, value: Any) -> None:
    """Let no output show `text`, nor the words of the setting's `value` that it is a part of: it may be a short one."""
    hide(text, reference)
    whole = " ".join(map(str, value if isinstance(value, list) else [value]))
    for word in re.findall(rf"[^\W_]*{re.escape(text)}[^\W_]*", whole) if len(text) >= MIN_HIDDEN_WORD else ():
        hide(word, word.replace(text, reference))


def fill_in_one(cfg: DictConfig, name: str, reference: Reference) -> Filled:
    """`fill_in` of one setting, as if the composition had this reference in its place."""
    other = cfg.copy()
    OmegaConf.update(other, name, reference.text, force_add=True)
    return fill_in(other, {name: reference.text})


def fill_in_text(text: str, key: str) -> str:
    """A text of the command line that is needed before anything is composed, such as `resume=${oc.env:RUN}`.

    Raises:
        ConfigError: It refers to what is not there, or to other settings.
    """
    try:
        return str(OmegaConf.select(OmegaConf.create({"value": text}), "value")) if "${" in text else text
    except _ERRORS as error:
        raise ConfigError([f"{key}={text}: {explained(error, key, text)}"]) from None


def _may_be_secret(name: str, value: Any) -> bool:
    """Whether a value from the environment is a text other than a path: numbers and words out of a list are none."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and not is_local_path(text) for text in texts) and not SETTINGS[name].words


def _shown(name: str, raw: Any) -> str:
    return f"{name}={show(raw)}"


def _hidden(name: str, raw: Any) -> str:
    return f"{_shown(name, raw)}: what stands in the environment does not fit ({SETTINGS[name].meaning})"


def explained(error: BaseException, name: str, raw: Any) -> str:
    """Why a reference cannot be filled in, in a few words, with the nearest name that would do."""
    text = " ".join(str(error).split())
    if found := re.search(r"Environment variable '(.*?)' not found", text):
        example = f"${{oc.env:{found[1]},{'/path' if name in PATH_SETTINGS else 'VALUE'}}}"
        return f"the environment variable {found[1]} is not set; set it, or give a default: {example}"
    if found := re.search(r"Unsupported interpolation type (\S+)", text):
        known = _resolvers()
        return f"no such resolver {found[1]}{nearest(found[1], known)}; there are {', '.join(known)}"
    if found := re.search(r"Interpolation key '(.*?)' not found", text):
        return f"no such setting {found[1]}{nearest_setting(found[1])}"
    if isinstance(error, RecursionError) or "Recursive interpolation" in text or "recursion" in text:
        return "it refers to itself"
    return text.partition(" full_key:")[0] or type(error).__name__


def _resolvers() -> Iterable[str]:
    return sorted(name for name in BaseContainer._resolvers if not name.startswith("_"))
