"""Whatever a person types or writes into a yaml file ends in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_whatever_a_person_types_ends_in_order() -> None:
    """A few random configurations; scripts/fuzz.py does a thousand. In a process of its own: it starts many runs."""
    words = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--examples", "15", "--seed", "1"]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.startswith("15 of 15 configurations ended as they should, 5 of them with a yaml file: ")
