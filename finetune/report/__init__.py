"""Reports: tables, pictures and CSV files of one run, and of the many runs of a sweep.

This room reads the files that runs leave (`runs/`), and knows no torch: a report can be made on any machine. Only
functions that draw import matplotlib. Read `columns.py` first (which columns of the history a person sees), then
`run_figures.py` (one run) and `sweep.py` (many).
"""
