"""A training step and its parts: layers, rates, optimizer, losses, metrics, and the loop over epochs.

The room knows torch and the sections of the settings. It knows no images, no files and no log.
Read `layers.py` and `loop.py` first: together they are the whole of a training step. `rates.py` and `sched.py` hold
everything about learning rates; `fit.py` repeats the step over epochs.
"""
