"""What the built-in `data/digits.yaml` sets is for the digits: with another `data.source` it goes back to its default.

The source may come from a word, an experiment, a file of the user's or the environment, so it is known only after the
composition. Words such as `data.test_fraction=0.1` are added to the command line then, and Hydra composes once more.
"""

from collections.abc import Callable, Sequence

from finetune.config.data import SourceKind
from finetune.config.fields import show
from finetune.config.words.choices import builtin_folder
from finetune.config.words.composition import Composition
from finetune.config.words.problems import Request
from finetune.config.words.references import Reference
from finetune.config.words.settings import SETTINGS
from finetune.system.errors import ConfigError

Chosen = dict[str, list[str]]


class OtherSources:
    """Composes combinations of choices, each with the words that take the settings of another source back.

    Attributes:
        words: The words of all combinations, such as `data.test_fraction=0.1`.
    """

    def __init__(self, request: Request, compose: Callable[[Chosen, Sequence[str]], Composition]) -> None:
        """`compose` composes a combination (group to options) with additional words."""
        self._request, self._compose = request, compose
        self._composed: list[Composition] = []
        self.words: list[str] = []

    def __call__(self, chosen: Chosen) -> Composition:
        """Compose this combination; a ConfigError where Hydra cannot, or where its jobs need different words."""
        composed = self._compose(chosen, ())
        if foreign := self._foreign(composed):
            words = [f"{name}={show(SETTINGS[name].default)}" for name in foreign]
            self.words += [word for word in words if word not in self.words]
            composed = self._compose(chosen, words)
        self._composed.append(composed)
        return composed

    def problems(self) -> list[str]:
        """A line for each setting of which some jobs of a sweep need the default, while other jobs have a value."""
        found = []
        for name in (word.partition("=")[0] for word in self.words):
            default = SETTINGS[name].default
            if any(composed.reading.values.get(name, default) != default for composed in self._composed):
                found.append(_mixed(name))
        return found

    def _foreign(self, composed: Composition) -> list[str]:
        """The settings that the built-in file of another source has set to something else than their default."""
        values, sources, found = composed.reading.values, self._sources(composed), []
        names = [name for name in values if name.startswith("data.") and values[name] != SETTINGS[name].default]
        for name in names if sources - {SourceKind.digits.value} else []:
            setter = None if name in self._request.values else composed.setter(name)
            if setter is None or setter[0].parent != builtin_folder() / "data" or name == "data.source":
                continue
            if others := sources - {setter[0].stem}:
                if others != sources:
                    raise ConfigError([_mixed(name)])
                found.append(name)
        return found

    def _sources(self, composed: Composition) -> set[str]:
        """The sources that the jobs of this combination have; empty where none can be read."""
        known = []
        for value in self._request.values.get("data.source", ()):
            is_reference = isinstance(value, Reference)
            known.append(composed.filled("data.source", value).values.get("data.source") if is_reference else value)
        known = known or [composed.reading.values.get("data.source")]
        return {value.value for value in known if isinstance(value, SourceKind)}


def _mixed(name: str) -> str:
    mend = f"sweep over whole choices, such as data=digits,folder, or give {name}=NUMBER"
    return f"{name} is another one for the digits than for other images, and this sweep has both: {mend}"
