"""From the words `KEY=VALUE` that a person typed to a configuration without mistakes, or to the list of mistakes.

`settings` knows every key, `quoting` and `overrides` read the words, `choices` finds the yaml files, `composition` lets
Hydra compose them, `problems` checks the result. Read `configuration.py` first: it calls them in order. The commands
import the modules that need Hydra only when they use them, so that `--help` is quick.
"""
