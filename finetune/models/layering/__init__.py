"""Which parameter of a network belongs to which layer, and how one layer runs alone.

This package knows the structure of the networks of timm, open_clip and torchvision; it knows neither weights nor
settings. Read `towers.py` first: its three functions give the layers of a network, and its registry `CHAINS` lists the
families that run layer by layer. `rules.py` sorts names into layers, `running.py` builds the functions that run a
layer, `*_networks.py` hold the rules and functions of each library, `class_token.py` the shorter last block.
"""
