"""Which images are unreadable, doubled or unexpected: found before training, not in the middle of it.

Read `start.py` first, the check at the start of a run. `examine.py` reads the images, `known_images.py` remembers the
results, `summary.py` (for the command `finetune check`) and `contact_sheet.py` show them.
"""
