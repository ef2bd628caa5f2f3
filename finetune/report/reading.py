"""Reads `result.json` and its like: JSON objects, and numbers of which some may be missing."""

import json
import math
from pathlib import Path
from typing import Any

from finetune.system.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; a UserError where the file is damaged or holds no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is this the folder of a run?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return data


def number(value: object) -> float:
    """`value` as a float; NaN for anything that is no number. JSON files of runs hold null in the place of NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
