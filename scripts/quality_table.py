"""The table of `bench_quality.py` from its lines: means, spreads, and differences of pairs with their intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEY = ("set", "arm", "seed", "version")


def read_rows(path: Path) -> list[Row]:
    """The finished cells. A last line that a kill cut short counts as none; any other bad line ends the program."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise SystemExit(f"{path}:{number}: is no JSON; remove the line, and its cell is computed again") from None
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a line; what a kill left of a line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row, sort_keys=True).encode() + b"\n")


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes a cell another cell."""
    return tuple(row[name] for name in KEY)


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, and half the width of its 95 % interval (None: one pair has none)."""

    mean: float
    sd: float
    half: float | None
    pairs: int


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """`first - second`, pair by pair, with Student's interval for the mean of the differences."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(gaps)
    if len(gaps) < 2:
        return Difference(mean, 0.0, None, len(gaps))
    from scipy.stats import t

    sd = statistics.stdev(gaps)
    return Difference(mean, sd, float(t.ppf(0.975, len(gaps) - 1)) * sd / math.sqrt(len(gaps)), len(gaps))


def newest(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """(set, arm) -> seed -> the row that was written last, whatever its version."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["set"], row["arm"]), {})[row["seed"]] = row
    return found


def markdown(rows: Sequence[Row], reference: str = "ours") -> str:
    """Two tables: scores of every arm on every set, and the reference minus each arm over the seeds that both have."""
    cells = newest(rows)
    sets = list(dict.fromkeys(row["set"] for row in rows))
    arms = sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda arm: (not arm.startswith("ours"), arm))
    if not rows:
        return "no finished cells"
    lines = ["Test top1 in percent: mean (sd) of the seeds; [how many seeds] where not three.", ""]
    lines += _head(["arm", *sets])
    for arm in arms:
        lines.append(_line([arm, *(_score(cells.get((name, arm), {})) for name in sets)]))
    lines += ["", f"`{reference}` minus each arm, in points, seed by seed: mean ± half of the 95 % interval (sd of the"
              " differences). The last column is the mean over the sets.", ""]  # fmt: skip
    lines += _head(["arm", *sets, "all sets"])
    for arm in arms:
        if arm == reference:
            continue
        gaps = [_gap(cells.get((name, reference), {}), cells.get((name, arm), {})) for name in sets]
        known = [gap.mean for gap in gaps if gap is not None]
        overall = paired(known, [0.0] * len(known)) if known else None
        lines.append(_line([arm, *(_shown(gap) for gap in [*gaps, overall])]))
    lines += ["", *_notes(cells, sets, arms)]
    return "\n".join(lines)


def _score(seeds: dict[int, Row]) -> str:
    scores = [100 * row["test"] for row in seeds.values()]
    if not scores:
        return ""
    spread = f" ({statistics.stdev(scores):.1f})" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.1f}{spread}" + (f" [{len(scores)}]" if len(scores) != 3 else "")


def _gap(first: dict[int, Row], second: dict[int, Row]) -> Difference | None:
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    return paired([100 * first[seed]["test"] for seed in seeds], [100 * second[seed]["test"] for seed in seeds])


def _shown(gap: Difference | None) -> str:
    if gap is None:
        return ""
    return f"{gap.mean:+.1f}" if gap.half is None else f"{gap.mean:+.1f} ± {gap.half:.1f} ({gap.sd:.1f})"


def _notes(cells: dict[tuple[str, str], dict[int, Row]], sets: Sequence[str], arms: Sequence[str]) -> list[str]:
    """What validation chose, the seconds of a run, and where rows of several versions stand in one table."""
    lines = _head(["set", "arm", "seconds of the chosen run", "steps", "chosen, by seed"])
    mixed = []
    for name in sets:
        for arm in arms:
            seeds = cells.get((name, arm), {})
            if seeds:
                chosen = ", ".join(str(seeds[seed]["chosen"]) for seed in sorted(seeds))
                seconds = statistics.fmean(row["seconds"] for row in seeds.values())
                steps = max(row["steps"] for row in seeds.values())
                lines.append(_line([name, arm, f"{seconds:.0f}", str(steps), chosen]))
            if len(versions := sorted({row["version"] for row in seeds.values()})) > 1:
                mixed.append(f"{name}, {arm}: seeds of several versions ({', '.join(versions)})")
    return [*lines, *(["", *mixed] if mixed else [])]


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
