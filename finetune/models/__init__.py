"""Pretrained networks as `LayeredModel`s with a classifier, their preprocessing, and where all of it comes from.

This room knows the model's settings, the libraries of networks and `core/layers.py`, but no data, run or optimizer.
Read `build.py` first. `upstream/` builds a network and loads its weights, `layering/` cuts it into layers, `heads/`
makes the classifier; `patches.py` speeds up patch embeddings, `param_groups.py` serves others' training scripts.
"""

from finetune.models.build import BuiltModel as BuiltModel
from finetune.models.build import build_model as build_model
