"""What `bench.py` prints and draws: a table a row, and a picture of all of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from finetune.report import look

COLOURS = {"plain": look.FAINT, "tuned": look.ORANGE, "ours": look.BLUE}
Arm = dict[str, Any]


def median(arm: Arm) -> float:
    """Seconds of an arm."""
    return statistics.median(arm["seconds"])


def rivals_of(arm: Arm, arms: list[Arm]) -> tuple[Arm | None, Arm | None]:
    """(plain, tuned) that an arm is measured against; tuned in the arm's own precision where there is one."""
    plain = next((other for other in arms if other["loop"] == "plain"), None)
    tuned = [other for other in arms if other["loop"] == "tuned"]
    same = [other for other in tuned if other["precision"] == arm["precision"]]
    return plain, (same or tuned or [None])[0]


def partner_of(arm: Arm, arms: list[Arm]) -> Arm | None:
    """Whose results an arm's are held against: tuned in its precision, which computes everything in every epoch.

    Where tuned does not run in that precision, the first arm that does. None for the partner itself.
    """
    same = [other for other in arms if other["precision"] == arm["precision"]]
    partner = next((other for other in same if other["loop"] == "tuned"), same[0])
    return None if partner is arm else partner


def apart_lines(arms: list[Arm], key: str) -> list[str]:
    """A line an arm that has a partner: how far they are apart in `same_pixels` or `timed_runs`."""
    return [
        "{} and {from} are apart by: loss {loss:.1e}, logits {logits:.1e}".format(arm["name"], **arm[key])
        for arm in arms
        if key in arm
    ]


def decoders_line(apart: dict[str, float]) -> str:
    """The decoders' own difference, for people."""
    return (
        f"our decoding and resizing and Pillow's are apart by at most {apart['largest_levels']} of 256 levels, in"
        f" {100 * apart['share_of_values']:.2f} % of the values of {apart['images']} images"
    )


def table(title: str, arms: list[Arm]) -> str:
    """One row of the benchmark: medians, ratios, memory, share of the matmul peak, and how far results are apart.

    The columns of what is apart are of the same decoded pixels: parity of the training alone. Below the table is how
    far the timed runs are, whose decoders differ.
    """
    lines = [
        f"\n### {title}",
        "",
        "| arm | seconds (least to most) | core-seconds | x plain | x tuned | memory MiB | of the matmul peak"
        " | loss apart | logits apart | from |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        ratios = [f"{median(rival) / median(arm):.2f}" if rival else "" for rival in rivals_of(arm, arms)]
        spread = f"{median(arm):.1f} ({min(arm['seconds']):.1f} to {max(arm['seconds']):.1f})"
        memory = "not measured" if arm["rise_mib"] is None else f"{max(arm['rise_mib']):,.0f}"
        found = arm.get("same_pixels")
        apart = [f"{found['loss']:.1e}", f"{found['logits']:.1e}", found["from"]] if found else [""] * 3
        share = f"{100 * arm['share_of_peak']:.0f} %"
        cores = f"{statistics.median(arm['core_seconds']):.1f}"
        lines.append("| " + " | ".join([arm["name"], spread, cores, *ratios, memory, share, *apart]) + " |")
    timed = [f"* as timed, {line}" for line in apart_lines(arms, "timed_runs")]
    return "\n".join([*lines, "", *timed] if timed else lines)


def optimizer_table(title: str, arms: list[Arm]) -> str:
    """The optimizer's step."""
    lines = [f"\n### {title}", "", "| arm | milliseconds a step (least to most) | x torch's default |", "|---|---|---|"]
    base = median(arms[0])
    for arm in arms:
        times = [1000 * seconds for seconds in arm["seconds"]]
        spread = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        lines.append(f"| {arm['name']} | {spread} | {base / median(arm):.2f} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """A panel a row, a bar an arm: seconds, and how many times as fast as the loops it is measured against."""
    rows = [row for row in report["rows"] if row["arms"]]
    bars = sum(len(row["arms"]) for row in rows)
    canvas = look.new_figure(1.3 + 0.34 * bars + 0.75 * len(rows))
    heights = [len(row["arms"]) for row in rows]
    panels = canvas.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (axes,), row in zip(panels, rows, strict=True):
        _panel(axes, row)
    top = 1 - 1.25 / canvas.get_figheight()
    space = 0.55 / (0.34 * bars / len(rows))
    canvas.subplots_adjust(left=0.2, right=0.86, top=top, bottom=0.25 / canvas.get_figheight(), hspace=space)
    look.headline(canvas, "From images on disk to the final checkpoint", report["machine"])
    look.save_figure(canvas, path)


def _panel(axes: Any, row: dict[str, Any]) -> None:
    arms = row["arms"]
    longest = max(map(median, arms))
    for place, arm in enumerate(arms):
        seconds = median(arm)
        axes.barh(place, seconds, height=0.7, color=COLOURS.get(arm["loop"], look.PURPLE))
        names = ("plain", "tuned")
        pairs = zip(names, rivals_of(arm, arms) if row["name"] != "optimizer" else (arms[0], None), strict=True)
        ratios = [f"{median(rival) / seconds:.1f} x {name}" for name, rival in pairs if rival and rival is not arm]
        text = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
        text += f"   {', '.join(ratios)}" if arm["loop"] == "ours" and ratios else ""
        axes.text(seconds + longest * 0.008, place, text, va="center", fontsize=10, color=look.INK)
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms], fontsize=10, color=look.INK)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.12)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(look.FAINT)
    axes.tick_params(length=0)
    axes.set_title(row["title"], loc="left", fontsize=11, color=look.INK, weight="bold")
