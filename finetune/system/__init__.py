"""What any program needs: files and locks, signals, the console, the log, tables, progress bars, memory.

This room knows neither torch nor the settings, and no other room. It imports only the standard library, filelock and
tqdm, so that a mistake in the command line is answered at once. Read `errors.py` first (which mistakes are a person's
and which the program's), then `log.py`.
"""
