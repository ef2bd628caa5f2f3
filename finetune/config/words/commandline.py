"""What a person typed, taken apart: flags (wherever they stand) and settings, quoted where Hydra's grammar needs it.

Standard library only: nothing here can be slow, so every command can start with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.config.fields import nearest
from finetune.config.words.settings import PATH_SETTINGS, SETTINGS, nearest_setting, path_as_typed
from finetune.system.errors import UserError


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line a problem.

    Attributes:
        problems: The lines.
        code: What the process exits with: 1, or 2 where the command line itself cannot be read.
    """

    def __init__(self, problems: Sequence[str], code: int = 1) -> None:
        """Keep the lines and the exit code; the text of the exception is the lines."""
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.code = code


@dataclass(frozen=True)
class Flag:
    """A word that starts with a dash.

    Attributes:
        names: All its spellings, the long one first.
        help: One line for `--help`; empty: not shown there.
        value: What follows it, as `--help` shows it; empty: nothing does.
        words: The valid values; empty: any.
        optional: Whether the value may be left out.
    """

    names: tuple[str, ...]
    help: str
    value: str = ""
    words: tuple[str, ...] = ()
    optional: bool = False


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
    Flag(
        ("--info", "-i"),
        "how the configuration was found and put together",
        "WHAT",
        ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        optional=True,
    ),
    Flag(("--shell-completion", "-sc"), ""),
    Flag(("--run", "-r"), ""),
)
_BY_NAME = {name: flag for flag in FLAGS for name in flag.names}
# Flags of Hydra that would replace the primary configuration, with what serves instead.
_REFUSED = {
    "--config-name": "write conf/experiment/NAME.yaml and experiment=NAME",
    "-cn": "write conf/experiment/NAME.yaml and experiment=NAME",
    "--config-path": "use --config-dir DIR",
    "-cp": "use --config-dir DIR",
    "--experimental-rerun": "give the overrides of that run's result.json again",
}


@dataclass
class CommandLine:
    """A command line taken apart.

    Attributes:
        flags: Long name of each flag given, to its value (empty where it takes none).
        overrides: Everything else, as typed, in order.
        problems: What cannot be read, one line each; then nothing may be started.
    """

    flags: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

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
    """The flags that Hydra answers itself, as its own parser wants them; `--config-dir` is ours."""
    found: list[str] = []
    for name, value in line.flags.items():
        if name not in ("--config-dir", "--multirun", "--run"):
            found += [name, value] if value else [name]
    return found


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Sort words into flags and overrides, wherever they stand; reports, never raises."""
    line = CommandLine()
    words = list(argv)
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
    if value is None and words and not words[0].startswith("-"):
        usable = words[0] in flag.words if flag.words else True
        if usable or not flag.optional:
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


# What Hydra reads as a sweep, and so is never taken for a path or a text.
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
# Letters that stand for themselves in Hydra's grammar.
_PLAIN = re.compile(r"[A-Za-z0-9_/\-+.$%*@?|: ]*")


def quote(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar: backslashes are doubled only where they stand ahead of a quote."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"


def _split_values(text: str) -> list[str]:
    """`text` at its commas, but for those in a quoted value."""
    values, rest = [], text
    while True:
        quoted = _QUOTED.match(rest)
        if quoted and (quoted.end() == len(rest) or rest[quoted.end()] == ","):
            end = quoted.end()
        else:
            end = rest.find(",") if "," in rest else len(rest)
        values.append(rest[:end])
        if end == len(rest):
            return values
        rest = rest[end + 1 :]


def _quote_value(text: str, *, path: bool) -> str:
    """One value quoted where that is needed: a path always, another text where the grammar would refuse it."""
    if _QUOTED.fullmatch(text) or text == "null":
        return text
    if path:
        return quote(path_as_typed(text))
    return text if _PLAIN.fullmatch(text) else quote(text)


def quote_override(text: str, *, multirun: bool) -> str:
    """An override as Hydra's grammar wants it: paths and texts work as people type them.

    Values already in quotes, sweeps (`choice(...)`) and all keys that hold no single text stay as they are. In a
    multirun a comma separates values, so a path that holds one needs quotes there.
    """
    key, equals, value = text.partition("=")
    name = key.lstrip("+")
    path = name in PATH_SETTINGS
    if not equals or not (path or (name in SETTINGS and SETTINGS[name].kind is str)) or _SWEEP.fullmatch(value):
        return text
    values = _split_values(value) if multirun or not path else [value]
    return f"{key}=" + ",".join(_quote_value(part, path=path) for part in values)
