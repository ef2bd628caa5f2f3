"""The frozen layers of a model: they run once for each image and view, and their output, the activations, is cached.

May know `system`, `config`, `core` and `data`; not the whole configuration, nor a run's folder. Read `feed.py` first
(how a batch of activations reaches the training loop), then `planning.py` (where activations are cached).
"""
