"""Writes a model as a folder of another library, and proves with that library alone that it gives the same scores.

Each format has a file: it refuses what the format cannot hold, writes, and says how the folder is loaded. Read
`export.py` first.
"""
