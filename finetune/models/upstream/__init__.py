"""Networks of timm, open_clip and torchvision: one module a library builds them and loads their weights.

This package knows the model's settings, hubs and files; it knows no classes of the data and no layers. Read
`network.py` first: each `from_*` module has a function `read` that returns its `Upstream`. `weight_files.py` reads
files, `downloads.py` fetches them, `skip_init.py` draws no weights in vain, `glyphs.py` has the two bundled models.
"""
