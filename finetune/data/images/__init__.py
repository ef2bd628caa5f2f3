"""From the bytes of an image file to the pixels that the model sees: decode, resize, augment, mix.

`decode.py` reads files, `resize.py` and `transforms.py` make the model's square, `recipes.py` holds the augmentation
that starts with a random crop, `mix.py` MixUp and CutMix. This package knows no data set, no cache and no worker.
"""
