"""Batches of a split, epoch by epoch. Read `loader.py` first: it puts the parts together.

`order.py` says which images an epoch shows, `batches.py` makes one batch of them, `workers.py` starts the processes
that do so. This package knows images and caches; it does not know where images come from.
"""
