"""Numbers in `result.json` and its like, of which some may be missing."""

import math


def number(value: object) -> float:
    """`value` as a float; NaN for anything that is no number. JSON files of runs hold null in the place of NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
