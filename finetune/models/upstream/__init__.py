"""Networks of timm, open_clip and torchvision: one module a library builds them and loads their weights.

This package knows the model's settings, hubs and files; it knows no classes of the data and no layers. Each `from_*`
module has a function `read(conf, ...)` that returns an `Upstream` (`network.py`, read it first). `weight_files.py`
reads files, `downloads.py` fetches them, `skip_init.py` saves the drawing of weights that a file replaces, and
`glyphs.py` describes the two bundled models.
"""
