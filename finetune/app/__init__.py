"""One run, put together: the only room whose functions take the whole configuration, or everything a run is built of.

May know every room but the commands. Read `run.py` first: it is the order of events. Then `build.py` (what a run is
built of), `feeds.py` (the batches of its splits), `training.py` (what happens after each step and epoch), `scoring.py`
(zero-shot, linear probe, test) and `session.py` (the record of one start).
"""
