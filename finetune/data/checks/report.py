"""The work of `finetune check`: examine every image, say what was found, and write the lists of faulty ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.data.checks.examine import DataReport, examine
from finetune.data.checks.known_images import KnownImages
from finetune.data.checks.summary import duplicate_lines, summary, unreadable_lines, write_lines
from finetune.data.split import Source
from finetune.system.files import write_text

MAX_DUPLICATES = 20  # groups in the text; all of them are in the file


def check_source(source: Source, cache_dir: str | None, folder: Path) -> tuple[DataReport, str]:
    """Examine every image of `source`; return what was found, and the same as text for a person.

    Writes `data.txt` into `folder`, and `duplicates.txt` and `unreadable.txt` where there is something to list.
    """
    report = examine(source, KnownImages(cache_dir, source.location))
    text = summary(source, report)
    write_text(folder / "data.txt", text.encode("utf-8", "backslashreplace").decode() + "\n")
    duplicates = duplicate_lines(source, report)
    unreadable = unreadable_lines(report.unreadable)
    title = "images are the same to the last byte in several splits or classes"
    text += _write_list(folder / "duplicates.txt", title, duplicates, shown=MAX_DUPLICATES)
    text += _write_list(folder / "unreadable.txt", "images cannot be read", unreadable, shown=len(unreadable))
    return report, text


def _write_list(path: Path, title: str, lines: Sequence[str], *, shown: int) -> str:
    """Write `lines` to `path`, if there are any; return their number and the first `shown` of them as text."""
    if not lines:
        return ""
    write_lines(path, lines)
    said = [f"\n\n{len(lines):,} {title} ({path}):", *(f"  {line}" for line in lines[:shown])]
    said += [f"  ... and {len(lines) - shown:,} more"] * (len(lines) > shown)
    return "\n".join(said)
