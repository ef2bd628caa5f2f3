"""From the words `KEY=VALUE` that a person typed to a configuration without mistakes, or to the list of them.

`settings` knows every key, `quoting` and `overrides` read the words, `choices` finds the yaml files, `composition` lets
Hydra compose them, `problems` looks at the result. Read `configuration.py` first: it calls them in order. The modules
that import Hydra are imported by the commands once they need them, so that `--help` does not pay for it.
"""
