"""From what a person typed to a configuration that is known to be good, or to every reason why it is not.

    keys         every setting: type, conversion, nearest valid name      (standard library)
    commandline  flags anywhere, paths as typed                           (standard library)
    yamlfiles    where yaml files are found, and what is wrong with each  (PyYAML)
    check        one pass over all of it, every cell of a sweep           (no Hydra)
    composition  Hydra's grammar, composition and launch                  (Hydra and OmegaConf live here alone)
    folders      a new folder for every run                               (standard library)
    usage        the page behind --help                                   (no Hydra)

Hydra is imported by the functions that need it, so that `--help` does not pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config import Conf
from finetune.config.words.commandline import CommandLine, ConfigError, parse_command_line

__all__ = ["CommandLine", "ConfigError", "compose", "parse_command_line"]


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Conf:
    """The configuration of one run, as the command line would make it.

    Args:
        overrides: As typed: `["model=vit", "optim.lr=1e-3"]`.
        config_dir: As given with `--config-dir`.

    Raises:
        ConfigError: With every problem that can be found.
    """
    from finetune.config.words.configuration import read_settings

    flags = {} if config_dir is None else {"--config-dir": config_dir}
    return read_settings(CommandLine(flags, list(overrides))).conf
