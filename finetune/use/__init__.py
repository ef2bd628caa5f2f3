"""What one does with a finished run: load it, predict and embed new images.

The room knows models, data and the weights files of runs; it does not know how a run is trained. Read `loading.py`
first: everything else takes the `Predictor` that it returns.
"""
