"""From a command line to a configuration without mistakes, or to the list of all mistakes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config.conf import Conf
from finetune.config.data import pipe_commands
from finetune.config.words.choices import default_choices, find_option, folders, options
from finetune.config.words.composition import Composition, file_problem, register, to_conf
from finetune.config.words.other_sources import OtherSources
from finetune.config.words.overrides import Override, parse_overrides
from finetune.config.words.problems import Request, check_cells, sort_overrides
from finetune.config.words.quoting import quote
from finetune.config.words.references import explained, fill_in_text
from finetune.config.words.saved import base_of
from finetune.config.words.settings import path_as_typed
from finetune.system.errors import ConfigError
from finetune.system.terminal import printable


@dataclass
class Prepared:
    """A command line without mistakes."""

    conf: Conf  # of the first job in a sweep
    cfg: DictConfig  # the same as Hydra composed it, with Hydra's own settings
    overrides: list[str]  # in Hydra's grammar
    first: list[str]  # those of the first job, without sweeps
    jobs: int  # the number of runs
    run_dir: Path | None  # `hydra.run.dir` or, for a sweep, `hydra.sweep.dir`, where the person gave one


def read_settings(
    typed: Sequence[str],
    *,
    config_dir: str | None = None,
    multirun: bool = False,
    find_run: Callable[[str], Path] = Path,
) -> Prepared:
    """Check the words of a command line from end to end; writes nothing.

    The choices are looked up first, then Hydra composes them (see also `OtherSources`), then one pass over the composed
    tree and the overrides finds every other mistake. Several values are allowed in a `multirun` only. `find_run` gives
    the run directory that `resume=WORD` names.

    Raises:
        ConfigError: With every mistake that can be found.
    """
    searched = folders(config_dir)
    overrides, unreadable = parse_overrides(_with_choices(typed, searched), multirun=multirun)
    asked = next((o.values[0] for o in overrides if o.key == "resume" and o.values and o.values[0] is not None), None)
    run_dir: Path | None = None
    if asked is not None and not unreadable:
        asked = fill_in_text(str(asked), "resume")
        overrides = _beside_resume(str(asked), overrides, multirun=multirun)
        run_dir = find_run(path_as_typed(str(asked)))
    base = (
        None
        if run_dir is None
        else replace(base_of(run_dir, [o.key for o in overrides]), resume=str(run_dir), resume_force=False)
    )
    register(searched, base)
    request = sort_overrides(overrides, searched, multirun=multirun)
    _check_files(request, searched)
    sources = OtherSources(request, lambda chosen, more: Composition(searched, [*_words(request, chosen), *more]))
    first = check_cells(request, sources)
    request.add(*sources.problems())
    if unreadable or request.problems or first is None:
        raise ConfigError([*unreadable, *request.problems], code=2 if unreadable else 1)
    conf = to_conf(first.cfg)
    if run_dir is not None and base is not None:
        conf = _continued(run_dir, conf, base, {o.key for o in overrides})
        texts = [o.text for o in overrides if o.key != "resume_force"]
        return Prepared(conf, first.cfg, texts, texts, 1, run_dir)
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    if any(override.key == key for override in overrides):
        run_dir = Path(_given_folder(first.cfg, key))
    if request.jobs > 1:
        _refuse_one_folder(first.cfg)
    words = [*(o.safe for o in overrides), *sources.words]
    return Prepared(conf, first.cfg, words, first.overrides, request.jobs, run_dir)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Conf:
    """The configuration of one run for the words of a command line, such as `["model=vit", "optim.lr=1e-3"]`."""
    return read_settings(overrides, config_dir=config_dir).conf


def _with_choices(typed: Sequence[str], searched: Sequence[Path]) -> list[str]:
    """The words with references in choices, such as `model=${oc.env:MODEL}`, filled in: a choice is looked up first."""
    groups, words = default_choices(searched), []
    for word in typed:
        key, equals, value = word.partition("=")
        is_choice = equals and key.lstrip("+") in groups and not value.startswith("{")
        words.append(f"{key}={_chosen(value, key.lstrip('+'), searched)}" if is_choice else word)
    return words


def _chosen(value: str, group: str, searched: Sequence[Path]) -> str:
    """The choice of a group that `value` names; what a reference holds is not shown, since it may be a secret."""
    word = fill_in_text(value, group)
    if word != value and not all(find_option(searched, group, part) for part in word.strip("[]").split(",")):
        found = ", ".join(options(searched, group))
        raise ConfigError([f"{group}={value}: what it stands for is no choice, expected one of {found}"])
    return word


def _beside_resume(word: str, overrides: Sequence[Override], *, multirun: bool) -> list[Override]:
    """The overrides beside `resume=word`, which change the configuration of that run; a ConfigError for bad ones."""
    beside = [override for override in overrides if override.key != "resume"]
    problems = [f"{o.text}: has no place beside resume={word}, which says the folder" for o in beside if o.is_hydra]
    if multirun:
        problems.append(f"resume={word} continues one run: leave -m out")
    if problems:
        raise ConfigError(problems)
    return beside


def _continued(run_dir: Path, conf: Conf, base: Conf, given: set[str]) -> Conf:
    """The configuration of the run in `run_dir`, whose own is `base`, with the settings `given` beside `resume=`."""
    _refuse_strange_commands(run_dir, conf, base, is_given="data.root" in given)
    chosen = [name for name in base.chosen if name not in given]
    # Of the commands in it, those are left that the person typed.
    return replace(conf, data=replace(conf.data, allow_pipe=True), chosen=chosen)


def _refuse_strange_commands(run_dir: Path, conf: Conf, base: Conf, *, is_given: bool) -> None:
    """A ConfigError where a run's own `config.yaml`, `base`, reads images from a command, and nobody allowed it.

    `is_given`: whether the command line has a `data.root` of its own.
    """
    # Part by part: what is no command of the run, such as a relative path, may have been written out meanwhile.
    theirs = [] if is_given else (base.data.root or "").split("::")
    if (strange := [one for one in pipe_commands(conf.data) if one in theirs]) and not conf.data.allow_pipe:
        shown = ", ".join(map(printable, strange))
        problem = f"resume={run_dir}: its config.yaml reads the images from a command, which runs with your rights"
        raise ConfigError([f"{problem}: {shown}. Nothing was run: if you know it, add data.allow_pipe=true"])


def _check_files(request: Request, searched: Sequence[Path]) -> None:
    """Take the choices out of `request` whose files cannot be read, so that Hydra can compose the others."""
    for group, alternatives in list(request.choices.items()):
        paths = [find_option(searched, group.lstrip("+"), option) for chosen in alternatives for option in chosen]
        broken = [problem for path in paths if path is not None and (problem := file_problem(path))]
        if broken:
            request.add(*broken)
            request.unread.add(group)
            del request.choices[group]


def _words(request: Request, chosen: dict[str, list[str]]) -> list[str]:
    """The overrides of one combination of choices, with the first value of every setting."""
    values = {group: ",".join(map(quote, options)) for group, options in chosen.items()}
    choices = [f"{group}={text if len(chosen[group]) == 1 else f'[{text}]'}" for group, text in values.items()]
    return choices + [override.first for override in request.settings]


def _given_folder(cfg: DictConfig, key: str) -> str:
    try:
        typed = OmegaConf.select(cfg, key)
    except OmegaConfBaseException as error:
        raw = OmegaConf.to_container(cfg.hydra[key.split(".")[1]], resolve=False)["dir"]  # type: ignore[index,call-overload]
        raise ConfigError([f"{key}={raw}: {explained(error, key, raw)}"]) from None
    if typed is None or not str(typed).strip():  # `hydra.run.dir=$DIR` of a script without DIR
        raise ConfigError([f"{key}= names no folder; give one, or leave it out for a new one in outputs/"])
    if "${" in str(typed) or "\0" in str(typed):
        what = "${" if "${" in str(typed) else "a null character"
        raise ConfigError([f"{key}={printable(str(typed))}: a folder with {what} in its name can not be used"])
    return str(typed)


def _refuse_one_folder(cfg: DictConfig) -> None:
    """Refuse a `hydra.sweep.subdir` that is the same for every job: it would put them all into one folder."""
    subdir = OmegaConf.to_container(cfg.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    if not re.search(r"(?<!\\)(\\\\)*\$\{", str(subdir)):  # one behind a backslash is no reference
        mend = "every job of a sweep needs a folder of its own, such as hydra.sweep.subdir='${hydra.job.num}'"
        raise ConfigError([f"hydra.sweep.subdir={subdir or ''}: {mend}"])
