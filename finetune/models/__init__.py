"""Pretrained networks as `LayeredModel`s with a classifier, their preprocessing, and where all of it comes from.

This room knows the model's settings, the libraries of networks (timm, open_clip, torchvision) and `core/layers.py`; it
knows no data, no run and no optimizer. Read `build.py` first: `build_model` is the way in. `upstream/` builds a network
and loads its weights, `layering/` says which name belongs to which layer, `heads/` makes the classifier; `patches.py`
computes patch embeddings faster on a CPU, and `param_groups.py` serves other people's training scripts.
"""

from finetune.models.build import BuiltModel as BuiltModel
from finetune.models.build import build_model as build_model
