"""Classifiers on top of an image network, and how their first values are made.

A head knows features and class names, but no library of networks (`pooling.py` excepted, which changes how a network
pools) and no files of weights. Read `head.py` first: the linear classifier, and how it replaces the one that a network
brings. `zeroshot.py` makes a head from class names, `probe.py` by logistic regression; `offsets.py` sets its bias for
several labels an image.
"""
