"""How long a start takes from a table of millions of rows: from the process to the first training batch, by stage.

    python scripts/bench_rows.py                                     5,000,000 rows: .csv, and .parquet with pyarrow
    python scripts/bench_rows.py --rows 200000 --formats csv jsonl   fewer rows, other formats
    python scripts/bench_rows.py --folder DIR                        keep the files there, for the next time

Every path is there and can be read: 5,000 files a folder and class, hard links to 500 JPEGs of 160x120. So the disk
holds few bytes, but the system knows as many names as there are rows, and nothing here remembers a file by its
content. The check of the files has its usual budget; its memory of earlier starts is thrown away before each start. A
start is a process of its own, so its highest memory is that start's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILES = 500  # that all names are links to: a file has at most 65,000 names on ext4
IN_FOLDER = 5000
FORMATS = ("csv", "quoted.csv", "tsv", "jsonl", "parquet")


def paths(rows: int) -> Iterator[tuple[str, str]]:
    """(path, class) of each row."""
    for row in range(rows):
        name = f"class{row // IN_FOLDER:04}"
        yield f"images/{name}/{row:07}.jpg", name


def make_files(root: Path, rows: int) -> None:
    """The files, unless they are there."""
    if (root / f"{rows}.done").exists():
        return
    from PIL import Image

    (root / "files").mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        coarse = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(root / "files" / f"{number}.jpg")
    for row, (path, name) in enumerate(paths(rows)):
        if row % IN_FOLDER == 0:
            (root / "images" / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(root / "files" / f"{row % FILES}.jpg", root / path)
    (root / f"{rows}.done").touch()


def make_table(root: Path, rows: int, ending: str) -> Path:
    """A table with columns path and label beside the images."""
    table = root / f"rows-{rows}.{ending}"
    if table.exists():
        return table
    if ending == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        schema, cells = pyarrow.schema([("path", pyarrow.string()), ("label", pyarrow.string())]), paths(rows)
        with parquet.ParquetWriter(table, schema) as writer:
            # In parts: the highest memory of this process would count as that of the start, which it starts.
            while part := list(itertools.islice(cells, 100_000)):
                writer.write_table(pyarrow.table(list(zip(*part, strict=True)), schema=schema))
        return table
    with open(table, "w", encoding="utf-8", newline="") as file:
        if ending == "jsonl":
            file.writelines(json.dumps({"path": path, "label": name}) + "\n" for path, name in paths(rows))
        else:
            quoting = csv.QUOTE_ALL if ending == "quoted.csv" else csv.QUOTE_MINIMAL
            lines = csv.writer(file, delimiter="\t" if ending == "tsv" else ",", quoting=quoting)
            lines.writerow(["path", "label"])
            lines.writerows(paths(rows))
    return table


class Stages:
    """What each part of a start took: seconds of the clock and of the processor, highest memory so far in GB."""

    def __init__(self, began: float) -> None:
        """The process was started at `began`, by the clock of `time.time`."""
        self.rows: list[tuple[str, float, float, float]] = []
        self._clock, self._processor = began, 0.0

    def end(self, name: str) -> None:
        """What came since the last call was `name`."""
        clock, processor = time.time(), time.process_time()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        self.rows.append((name, clock - self._clock, processor - self._processor, memory))
        self._clock, self._processor = clock, processor


def start(table: str, cache_dir: str, began: float) -> None:
    """One start, in a process of its own; prints its stages as JSON."""
    import torch

    from finetune.config import AugmentConf, DataConf, SourceKind
    from finetune.core.preprocess import Preprocess
    from finetune.data import Loader, check_at_start
    from finetune.data.selection import split_up
    from finetune.data.sources.tables import find_table

    logging.getLogger("finetune").setLevel(logging.ERROR)  # of links to one file it warns, and rightly so
    stages = Stages(began)
    stages.end("start of Python, imports")
    conf = DataConf(source=SourceKind.table, table=table, cache_dir=cache_dir)
    found = find_table(conf)
    stages.end("table")
    source = split_up(found, conf)
    del found
    stages.end("splits")
    source = check_at_start(source, conf, Path(cache_dir))
    stages.end(f"check, {conf.check_budget_s:g} s and half of that for headers")
    preprocess = Preprocess(224, (0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
    split, device = source.splits["train"], torch.device("cpu")
    loader = Loader(split, preprocess, conf=conf, augment=AugmentConf(), seed=0, device=device)
    images, _, _ = next(loader.epoch(0))
    assert len(images) == conf.batch_size
    stages.end("order, loader, first batch")
    print(json.dumps(stages.rows))


def measured(table: Path) -> list[Any]:
    """The stages of one start from `table`, nothing remembered."""
    with tempfile.TemporaryDirectory() as cache_dir:
        command = [sys.executable, __file__, "--start", str(table), cache_dir, repr(time.time())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Any] = json.loads(done.stdout)
    return rows


def show(title: str, rows: list[Any]) -> None:
    """A line a stage, and the sum."""
    print(f"\n{title}\n  {'':<50}{'seconds':>9}{'of a core':>11}{'GB so far':>11}")
    _, clocks, processors, memories = zip(*rows, strict=True)
    for name, clock, processor, memory in [*rows, ("all of it", sum(clocks), sum(processors), max(memories))]:
        print(f"  {name:<50}{clock:>9.1f}{processor:>11.1f}{memory:>11.2f}", flush=True)


def main() -> None:
    """Make the files, start, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--formats", nargs="+", choices=FORMATS)
    parser.add_argument("--folder", type=Path, help="where the files are made and left; else they are removed")
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        table, cache_dir, began = arguments.start
        start(table, cache_dir, float(began))
        return
    has_parquet = importlib.util.find_spec("pyarrow") is not None
    formats = arguments.formats or ["csv", *["parquet"] * has_parquet]
    root = arguments.folder or Path(tempfile.mkdtemp())
    try:
        make_files(root, arguments.rows)
        for ending in formats:
            table = make_table(root, arguments.rows, ending)
            title = f"{arguments.rows:,} rows, .{ending} ({table.stat().st_size / 1e6:,.0f} MB)"
            show(title, measured(table))
    finally:
        if not arguments.folder:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
