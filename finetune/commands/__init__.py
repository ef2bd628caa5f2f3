"""The commands: each has a file, which reads its part of the command line, calls the rooms below, and prints.

This room may know every other room. A command imports torch only once its command line is known to be good, so that
`--help` and a typing mistake are answered at once. Read `train.py` first: `finetune` without a command runs it.
"""

# Name and what it does, in the order in which `finetune --help` lists them.
COMMANDS: dict[str, str] = {
    "train": "fine-tune a model; the command may be left out",
    "describe": "every layer with its rate, memory, work and schedule; loads no data and no weights",
    "check": "look at the data before training: counts, damaged files, duplicates, a contact sheet",
    "predict": "the classes of new images by a finished run, or by a CLIP without training",
    "embed": "the features of new images by any layer, for search and clustering",
    "serve": "a page on this machine to try a model with images, and a JSON endpoint",
    "export": "a run as a folder that timm or another library loads, proven there on real images",
    "cache": "list the decoded images, activations and fetched shards that runs have cached, or clear them",
    "report": "draw the pictures of a run, or the summary of a sweep, again",
    "replay": "compute a step that was not finite again: which layer, which image",
    "schema": "print the settings as a JSON schema, with which editors complete and check yaml files",
    "help": "print this page, or every setting with --help-all",
}
