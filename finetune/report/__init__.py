"""Reports: tables, pictures and CSV files of one run, and of the many runs of a sweep.

This room reads the files that runs leave (`runs/`), and knows no torch. Only functions that draw import matplotlib.
Read `columns.py` first (the columns of the history), then `run_figures.py` (one run) and `sweep.py` (many).
"""
