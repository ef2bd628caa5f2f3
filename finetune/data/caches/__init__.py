"""Caches of images: the cache folder and its locks, decoded images in memory, on disk or on the device.

Read `entries.py` first, the folder; then `opening.py` and `records.py`, which find damage; then `pixel_cache.py`. A
cache changes no pixel. This package knows splits and images, and neither batches nor workers.
"""
