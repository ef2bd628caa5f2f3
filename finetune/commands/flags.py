"""The command line of the commands that take settings: flags, wherever they stand, and `KEY=VALUE` words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from finetune.config.fields import nearest
from finetune.config.words.settings import SETTINGS, nearest_setting, path_as_typed
from finetune.runs.find import find_run
from finetune.system.errors import ConfigError

if TYPE_CHECKING:
    from finetune.config.words.configuration import Prepared


class Parser(argparse.ArgumentParser):
    """Raises a mistake as one line, where argparse prints the usage page."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError with exit code 2."""
        raise ConfigError([message.removeprefix("argument ")], code=2)


def command_parser(name: str, usage: str, text: str, epilog: str) -> Parser:
    """The parser of the command `finetune NAME`, whose words `usage` shows; `--help` prints `epilog` as it stands."""
    prog, raw = f"finetune {name}", argparse.RawDescriptionHelpFormatter
    return Parser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=text,
        epilog=epilog,
        formatter_class=raw,
        allow_abbrev=False,
    )


@dataclass(frozen=True)
class Flag:
    """A word that starts with a dash."""

    names: tuple[str, ...]  # all its spellings, the long one first
    help: str  # one line for `--help`; empty: not shown there
    value: str = ""  # the name of its value in `--help`; empty: it takes none
    words: tuple[str, ...] = ()  # the valid values; empty: any
    optional: bool = False  # whether the value may be left out


INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAGS = (
    Flag(("--help", "-h"), "this page"),
    Flag(("--help-all",), "every setting with its default, meaning and range"),
    Flag(("--multirun", "-m"), "run every combination of the comma-separated values, then compare them"),
    Flag(("--cfg", "-c"), "print the configuration and stop: job, hydra or all", "WHAT", ("job", "hydra", "all")),
    Flag(("--resolve",), "with --cfg: fill in the ${...} references"),
    Flag(("--package", "-p"), "with --cfg: print this part only, such as optim", "PART"),
    Flag(("--config-dir", "-cd"), "search DIR for yaml files ahead of ./conf and the built-in ones", "DIR"),
    Flag(("--version",), "the version of finetune"),
    Flag(("--hydra-help",), "what Hydra itself understands"),
    Flag(("--info", "-i"), "how the configuration was found and put together", "WHAT", INFOS, optional=True),
    Flag(("--shell-completion", "-sc"), ""),
    Flag(("--run", "-r"), ""),
)
_BY_NAME = {name: flag for flag in FLAGS for name in flag.names}
# Flags of Hydra that would replace the primary configuration, with the way to do the same here.
_REFUSED = dict.fromkeys(("--config-name", "-cn"), "write conf/experiment/NAME.yaml and experiment=NAME")
_REFUSED |= dict.fromkeys(("--config-path", "-cp"), "use --config-dir DIR")
_REFUSED["--experimental-rerun"] = "give the overrides of that run's result.json again"


@dataclass
class CommandLine:
    """A command line, sorted."""

    flags: dict[str, str] = field(default_factory=dict)  # long name to value, which is empty where it takes none
    overrides: list[str] = field(default_factory=list)  # all other words, as typed
    problems: list[str] = field(default_factory=list)  # one line each; with any, no command may start

    @property
    def multirun(self) -> bool:
        """Whether values separated by commas are to be run one after the other."""
        return "--multirun" in self.flags or "hydra.mode=MULTIRUN" in self.overrides

    @property
    def config_dir(self) -> str | None:
        """The folder given with `--config-dir`, with `~` filled in."""
        given = self.flags.get("--config-dir")
        return None if given is None else path_as_typed(given)


def hydra_flags(line: CommandLine) -> list[str]:
    """The flags that Hydra answers itself, in the order typed."""
    pairs = [pair for pair in line.flags.items() if pair[0] not in ("--config-dir", "--multirun", "--run")]
    return [word for pair in pairs for word in pair if word]


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Sort words into flags and overrides, wherever they stand; mistakes become `problems`."""
    line, words = CommandLine(), list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            line.overrides += words
            break
        if not word.startswith("-"):
            line.overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        flag = _BY_NAME.get(name)
        if flag is None:
            line.problems.append(_unknown_flag(word, name))
            if not equals and words and "=" not in words[0] and not words[0].startswith("-"):
                words.pop(0)  # most likely its value; one mistake, one line
        else:
            _take_flag(line, flag, value if equals else None, words)
    exclusive = [name for name in ("--multirun", "--cfg", "--info", "--run") if name in line.flags]
    if len(exclusive) > 1:
        line.problems.append(f"{' and '.join(exclusive)} exclude each other: leave one out")
    lonely = [name for name in ("--resolve", "--package") if name in line.flags and "--cfg" not in line.flags]
    line.problems += [f"{name} only says how --cfg prints: add --cfg job, or leave it out" for name in lonely]
    return line


def _take_flag(line: CommandLine, flag: Flag, value: str | None, words: list[str]) -> None:
    """Store `flag`, with the value that it needs taken from `words`."""
    name = flag.names[0]
    if not flag.value:
        if value is not None:
            line.problems.append(f"{name}={value}: {name} takes no value")
        line.flags[name] = ""
        return
    if value is None and words and not words[0].startswith("-") and (not flag.optional or words[0] in flag.words):
        value = words.pop(0)
    if value is None and flag.optional:
        value = flag.words[0]
    if value is None:
        line.problems.append(f"{name} needs a value: {name} {flag.value}")
    elif flag.words and value not in flag.words:
        line.problems.append(f"{name} {value}: expected one of {', '.join(flag.words)}{nearest(value, flag.words)}")
    else:
        line.flags[name] = value


def _unknown_flag(word: str, name: str) -> str:
    if name in _REFUSED:
        return f"{name} is not used here: {_REFUSED[name]}"
    setting = name.lstrip("-").replace("-", "_")
    meant = [key for key in SETTINGS if setting in (key, key.rpartition(".")[2])]
    if meant:
        return f"{word}: settings are written without dashes: {meant[0]}=VALUE"
    close = nearest(name, [long for flag in FLAGS for long in flag.names if long.startswith("--")])
    shown = ", ".join(flag.names[0] for flag in FLAGS if flag.help)
    return f"{word}: no such flag{close or nearest_setting(setting)}; flags: {shown}"


def configure(line: CommandLine) -> Prepared:
    """The configuration that a command line asks for; a ConfigError with every mistake of the line."""
    from finetune.config.words.configuration import read_settings  # only now: it imports Hydra

    try:
        prepared = read_settings(line.overrides, config_dir=line.config_dir, multirun=line.multirun, find_run=find_run)
    except ConfigError as error:
        raise ConfigError([*line.problems, *error.problems], code=2 if line.problems else error.code) from None
    if line.problems:
        raise ConfigError(line.problems, code=2)
    return prepared
