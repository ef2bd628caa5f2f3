"""Hydra and OmegaConf: override grammar, composition, launch. Nothing else in the package imports them.

Hydra's search path is `--config-dir`, `./conf`, the built-in folder. The primary configuration is stored under a name
of our own, read from a `config.yaml` that is known to be ours: a file of that name in some other project's `./conf`
cannot take its place.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    OverrideType,
    QuotedString,
    RangeSweep,
)
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config import Conf, as_dict, find_problems
from finetune.config.words.check import MAX_JOBS, Override, Reader, check
from finetune.config.words.commandline import CommandLine, ConfigError, quote, quote_override
from finetune.config.words.saved import find_run, read_values
from finetune.config.words.settings import (
    PATH_SETTINGS,
    SECTIONS,
    SETTINGS,
    build,
    convert,
    describe_kind,
    path_as_typed,
    show,
)
from finetune.config.words.yamlfiles import SCHEMA_NAME, builtin_folder, folders, primary_file
from finetune.system.errors import UserError

PRIMARY_NAME = "finetune_primary_config"
# Hydra 1.4 warns when it is told which version's defaults to use, 1.3 when it is not.
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}
SIGNS = {
    OverrideType.CHANGE: "",
    OverrideType.ADD: "+",
    OverrideType.FORCE_ADD: "++",
    OverrideType.DEL: "~",
}


class _Folders(SearchPathPlugin):
    """Puts the user's folders ahead of the built-in one; completion and --info go through it, too."""

    searched: tuple[Path, ...] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra whenever it makes a search path."""
        for folder in reversed(self.searched):
            search_path.prepend("finetune", f"file://{folder}")


@dataclass
class Prepared:
    """A command line that is known to be good.

    Attributes:
        conf: The configuration; of the first job where it is a sweep.
        cfg: The same as Hydra composed it, with Hydra's own settings.
        overrides: As Hydra's grammar wants them.
        first: Those of the first job, without sweeps.
        jobs: How many runs it asks for.
        run_dir: `hydra.run.dir` or, for a sweep, `hydra.sweep.dir`, where the person gave one.
    """

    conf: Conf
    cfg: DictConfig
    overrides: list[str]
    first: list[str]
    jobs: int
    run_dir: Path | None


def read_settings(line: CommandLine) -> Prepared:
    """Check a command line from end to end; writes nothing.

    Raises:
        ConfigError: With every problem that can be found.
    """
    parsed, unreadable, endless = _parse(line.overrides, multirun=line.multirun)
    try:
        reader = Reader(folders(line.config_dir))
    except FileNotFoundError as error:
        raise ConfigError([*line.problems, *unreadable, *endless, str(error)]) from None
    register(reader.searched)
    asked = next((o.values[0] for o in parsed if o.key == "resume" and o.values[0] is not None), None)
    if asked is not None and not line.problems and not unreadable:
        return _prepare_resume(str(asked), parsed, reader, multirun=line.multirun)
    findings = check(parsed, reader, multirun=line.multirun)
    problems = [*line.problems, *unreadable, *endless, *findings.problems]
    if problems:
        problems += _hydra_problems(parsed)
        raise ConfigError(problems, code=2 if line.problems or unreadable else 1)
    first = [text for override in parsed if (text := _first_value(override))]
    with readable_errors():
        cfg = _compose(first)
        conf = to_conf(cfg)
        given = [o for o in parsed if o.key == ("hydra.sweep.dir" if line.multirun else "hydra.run.dir")]
        run_dir = _run_dir(cfg, multirun=line.multirun) if given else None
    if line.multirun and findings.jobs > 1:
        _refuse_one_folder(cfg)
    return Prepared(conf, cfg, [override.safe for override in parsed], first, findings.jobs, run_dir)


def _prepare_resume(word: str, parsed: Sequence[Override], reader: Reader, *, multirun: bool) -> Prepared:
    """A run that is continued has its own configuration; what stands beside `resume=` is laid over it.

    Raises:
        ConfigError: With every problem that can be found.
    """
    beside = [override for override in parsed if override.key != "resume"]
    problems = [f"{o.text}: has no place beside resume={word}, which says the folder" for o in beside if o.is_hydra]
    problems += [f"{o.text}: write the value itself beside resume={word}" for o in beside if "${" in o.text]
    if multirun:
        problems.append(f"resume={word} continues one run: leave -m out")
    if problems:
        raise ConfigError(problems)
    folder = find_run(path_as_typed(word))
    reader.own = {**read_values(folder), "resume": str(folder), "resume_force": False}
    findings = check(beside, reader, multirun=False)
    if findings.problems:
        raise ConfigError(findings.problems)
    conf = build(findings.values)
    texts = [override.text for override in beside if override.key != "resume_force"]
    return Prepared(conf, OmegaConf.create(as_dict(conf)), texts, texts, 1, folder)


def _compose(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(builtin_folder()), job_name="finetune", **VERSION_BASE):
        return hydra.compose(PRIMARY_NAME, overrides, return_hydra_config=True)


def _hydra_problems(parsed: Sequence[Override]) -> list[str]:
    """What Hydra says about its own settings, where mistakes elsewhere keep the whole from being composed."""
    own = [
        override.safe
        for override in parsed
        if override.is_hydra and not override.sweep and override.key != "hydra.searchpath"
    ]
    if not own:
        return []
    try:
        with readable_errors():
            _compose(own)
    except ConfigError as error:
        return error.problems
    return []


def register(searched: Sequence[Path]) -> None:
    """Tell Hydra the schema, the primary configuration and the folders."""
    primary = OmegaConf.load(primary_file(searched))
    store = ConfigStore.instance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1.4 warns of storing a name again, as the second command in a process does
        store.store(name=SCHEMA_NAME, node=Conf)
        store.store(name=PRIMARY_NAME, node=primary)
    _Folders.searched = tuple(folder for folder in searched if folder != builtin_folder())
    Plugins.instance().register(_Folders)


def to_conf(cfg: DictConfig) -> Conf:
    """Hydra's composition as the typed configuration, references resolved, `~` in paths filled in.

    Raises:
        ConfigError: It holds what the schema or the ranges do not allow.
    """
    problems, values = [], {}
    for name, key in SETTINGS.items():
        try:
            value = convert(key, _plain(OmegaConf.select(cfg, name)))
        except OmegaConfBaseException as error:
            problems.append(f"{name}: {one_line(error)}")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        values[name] = path_as_typed(value) if name in PATH_SETTINGS and isinstance(value, str) else value
    conf = build(values)
    problems = problems or find_problems(conf)
    if problems:
        raise ConfigError(problems)
    return conf


def config_as_yaml(cfg: DictConfig, *, package: str, resolve: bool) -> str:
    """What `--cfg job` prints.

    Args:
        cfg: A composition of Hydra.
        package: Of this part only, such as `optim`; empty: all but Hydra's own settings.
        resolve: Whether references are filled in.

    Raises:
        ValueError: There is no such part.
    """
    if not package:
        keys = [str(key) for key in cfg if key != "hydra"]
        return OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, keys), resolve=resolve)
    part = OmegaConf.select(cfg, package)
    if not OmegaConf.is_config(part):
        raise UserError(f"--package {package}: no such part, expected one of {', '.join(sorted(SECTIONS))}")
    return f"# @package {package}\n{OmegaConf.to_yaml(part, resolve=resolve)}"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _run_dir(cfg: DictConfig, *, multirun: bool) -> Path:
    key, typed = ("hydra.sweep.dir", cfg.hydra.sweep.dir) if multirun else ("hydra.run.dir", cfg.hydra.run.dir)
    if typed is None or not str(typed).strip():  # `hydra.run.dir=$DIR` of a script without DIR
        raise ConfigError([f"{key}= names no folder; give one, or leave it out for a new one in outputs/"])
    return Path(str(typed))


def _refuse_one_folder(cfg: DictConfig) -> None:
    """A `hydra.sweep.subdir` that is the same for every job would put them all into one folder."""
    subdir = OmegaConf.to_container(cfg.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    if "${" not in str(subdir):
        raise ConfigError(
            [
                f"hydra.sweep.subdir={'' if subdir is None else subdir}: every job of a sweep needs a folder"
                " of its own; write hydra.sweep.subdir='${hydra.job.num}', the default, or something else of the job's"
            ]
        )


def _parse(typed: Sequence[str], *, multirun: bool) -> tuple[list[Override], list[str], list[str]]:
    """Every override that Hydra's grammar can read; one line for every other; one for every endless sweep."""
    parser, parsed, problems, endless = OverridesParser.create(), [], [], []
    for text in typed:
        safe = quote_override(text, multirun=multirun)
        try:
            parsed.append(replace(_own(text, parser.parse_override(safe)), safe=safe))
        except ConfigError as error:
            endless += error.problems
        except (HydraException, ValueError, ArithmeticError) as error:
            problems.append(_unparsable(text, error))
    return parsed, problems, endless


def _own(text: str, parsed: HydraOverride) -> Override:
    """Hydra's parsed override as ours.

    Raises:
        ConfigError: A range that never ends, or is too long.
        ValueError: It has no key.
    """
    if not parsed.key_or_group:
        raise UserError("nothing in front of the =")
    key = parsed.key_or_group if parsed.package is None else f"{parsed.key_or_group}@{parsed.package}"
    assert parsed.type is not None
    sign = SIGNS[parsed.type]
    value: Any = parsed.value()
    if isinstance(value, ChoiceSweep):
        return Override(text, key, sign, tuple(_unquoted(item) for item in value.list), "choice")
    if isinstance(value, Glob):
        return Override(text, key, sign, tuple(value.include), "glob", tuple(value.exclude))
    if isinstance(value, IntervalSweep):
        return Override(text, key, sign, (value.start, value.end), "interval")
    if isinstance(value, RangeSweep):
        assert value.start is not None and value.stop is not None
        start, stop, step = float(value.start), float(value.stop), float(value.step)
        if not all(map(math.isfinite, (start, stop, step))) or step == 0 or (stop - start) / step > MAX_JOBS:
            raise ConfigError([f"{text}: range(START,STOP,STEP) has to end, after {MAX_JOBS:,} values at most"])
        values = tuple(parsed.sweep_iterator())
        if not values:
            raise ConfigError([f"{text}: this range is empty; it starts at START and ends before STOP"])
        return Override(text, key, sign, values, "range")
    return Override(text, key, sign, (_unquoted(value),))


def _unquoted(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    if isinstance(value, dict):
        return {_unquoted(key): _unquoted(item) for key, item in value.items()}
    return value


def _unparsable(text: str, error: Exception) -> str:
    if "=" not in text:
        return f"'{text}': cannot be read; write KEY=VALUE without spaces around the =, such as optim.lr=1e-3"
    key, _, value = text.partition("=")
    if not key:
        return f"'{text}': nothing in front of the =; write KEY=VALUE without spaces around the ="
    reason = str(error).splitlines()[0].partition(" expecting ")[0]
    if key not in SETTINGS:
        hint = f"text with special characters goes in two pairs of quotes: '{key}=\"{value}\"'"
    elif isinstance(SETTINGS[key].default, list):
        hint = f"each text of a list goes in quotes of its own: \"{key}=['one','two']\""
    else:
        hint = f"expected {describe_kind(SETTINGS[key])}, such as {key}={show(SETTINGS[key].default)}"
    return f"{text}: cannot be read ({reason}); {hint}"


def _first_value(override: Override) -> str:
    """The override with the first value of its sweep; empty for a glob, whose first choice changes nothing here."""
    if not override.sweep:
        return override.safe
    if override.sweep == "glob":
        return ""
    value = override.values[0]
    shown = quote(value) if isinstance(value, str) else "null" if value is None else str(value)
    return f"{override.safe.partition('=')[0]}={shown}"


# Lines that OmegaConf adds for its own developers.
_NOISE = ("full_key:", "object_type=", "reference_type=", "See https://")


def one_line(error: BaseException) -> str:
    """An error of Hydra or OmegaConf, with its cause, in one line."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines = [line.strip() for line in str(current).partition("Config search path:")[0].splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith(_NOISE))
        parts += [text] if text and text not in " ".join(parts) else []
        current = current.__cause__
    return ": ".join(parts) or type(error).__name__


# Hydra meets odd input with whatever its own code runs into, not with its own exceptions alone.
_ANY_OF_HYDRA = (
    HydraException,
    OmegaConfBaseException,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """What Hydra and OmegaConf raise becomes a ConfigError of one line.

    Raises:
        ConfigError: In place of their exceptions.
    """
    try:
        yield
    except ConfigError:
        raise
    except _ANY_OF_HYDRA as error:
        raise ConfigError([one_line(error)]) from error


def launch(task: Callable[[DictConfig], Any], arguments: Sequence[str], searched: Sequence[Path]) -> None:
    """Hand over to Hydra: a run, a sweep, or one of its own commands.

    Args:
        task: Called once a job, inside Hydra's launcher.
        arguments: Flags and overrides, as Hydra's grammar wants them.
        searched: The folders of yaml files.

    Raises:
        ConfigError: In place of Hydra's and OmegaConf's exceptions.
        SystemExit: Hydra's own commands end this way.
    """
    register(searched)
    program, before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program[0], *arguments]
    # Hydra would print a stack trace; with this it raises instead, and the error becomes one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with readable_errors():
            main = hydra.main(config_path=str(builtin_folder()), config_name=PRIMARY_NAME, **VERSION_BASE)
            main(task)()
    finally:
        sys.argv = program
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


@dataclass
class Job:
    """What Hydra says about the job that is running.

    Attributes:
        folder: Where it goes.
        overrides: What the command line changed for it.
        number: Of the job in its sweep; None for a single run.
        sweep: The sweep's folder, absolute; None for a single run.
    """

    folder: Path
    overrides: list[str]
    number: int | None
    sweep: Path | None


def current_job() -> Job:
    """To be called inside a task."""
    config = HydraConfig.get()
    multirun = config.mode is not None and config.mode.name == "MULTIRUN"
    number = int(config.job.num) if multirun else None
    folder, start = Path(str(config.runtime.output_dir)), Path(str(config.runtime.cwd))
    # As a person would type it: Hydra has made it absolute. Unless `hydra.job.chdir` has gone there.
    if folder.is_relative_to(start) and start == Path.cwd():
        folder = folder.relative_to(start)
    sweep = Path(os.path.abspath(start / str(config.sweep.dir))) if multirun else None
    return Job(folder, [str(text) for text in config.overrides.task], number, sweep)
