"""Draw what a command printed as a picture of a terminal, for the README.

python -m finetune model=clip sched.mode=cosine_pi > run.txt
python scripts/terminal_picture.py run.txt docs/run.svg --title "python -m finetune model=clip sched.mode=cosine_pi"
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

CHAR_W, LINE_H, PAD, BAR_H = 8.0, 18, 16, 34


def draw(lines: list[str], title: str) -> str:
    """The SVG text of a terminal window that shows `lines` below the command `title`."""
    rows = [f"$ {title}", *lines]
    width = max(len(row) for row in rows) * CHAR_W + 2 * PAD
    height = len(rows) * LINE_H + 2 * PAD + BAR_H
    lights = enumerate(("#ff5f57", "#febc2e", "#28c840"))
    dots = "".join(f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="{colour}"/>' for i, colour in lights)
    texts = []
    for number, row in enumerate(rows):
        is_score = row.startswith(("zero-shot", "fine-tuned"))
        colour = "#7ee787" if number == 0 else "#ffa657" if is_score else "#e6edf3"
        y = BAR_H + PAD + number * LINE_H + 12
        texts.append(f'<text x="{PAD}" y="{y}" fill="{colour}" xml:space="preserve">{escape(row)}</text>')
    box = f'viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}'
        ' font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="13">'
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}{"".join(texts)}</svg>\n'
    )


def main() -> None:
    """Read the text, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="what the command printed")
    parser.add_argument("svg", type=Path, help="the picture to write")
    parser.add_argument("--title", required=True, help="the command")
    arguments = parser.parse_args()
    lines = [line.expandtabs() for line in arguments.text.read_text(encoding="utf-8").splitlines()]
    arguments.svg.write_text(draw(lines, arguments.title), encoding="utf-8")


if __name__ == "__main__":
    main()
