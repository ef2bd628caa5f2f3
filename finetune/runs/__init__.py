"""A run directory: its folder, its history, its checkpoints, and how a run that was stopped continues.

This room knows the training state (`core`) and the settings as plain values, but neither images nor models. Read
`resume.py` first, then `saver.py`, which writes the checkpoints, and `epoch_files.py`, which says which of them stay.
"""
