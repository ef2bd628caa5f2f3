"""Which parameter of a network belongs to which layer, and how one layer runs alone.

This package knows the networks of timm, open_clip and torchvision, and neither weights nor settings. Read `towers.py`
first: it gives the layers of a network. `rules.py` sorts names into layers, `running.py` builds the functions that run
a layer, `*_networks.py` hold the rules and functions of each library, `class_token.py` the shorter last block.
"""
