"""Classifiers on top of an image network, and how their first values are made.

A head knows features and class names, but no files of weights, and no library of networks: only `pooling.py` does,
which changes how a network pools. Read `head.py` first, the linear classifier. `zeroshot.py` makes a head from class
names, `probe.py` by logistic regression; `offsets.py` sets its bias for several labels an image.
"""
