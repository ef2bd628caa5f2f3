"""Time lost to saving at the end of every epoch, on the bundled CLIP and the digits.

    python scripts/bench_saving.py --epochs 5

Three figures, each as a share of the time of training and validation: how long training waited for copies and for
earlier saves; the processor time of the writing thread, which training loses at most where it has only one core; and
what the same saves would take if training waited for them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.app.run import run  # noqa: E402
from finetune.config import Conf  # noqa: E402
from finetune.runs.saver import Saver  # noqa: E402


def measure(epochs: int, *, waits: bool) -> tuple[float, float, float]:
    """(waited, writing, training) in seconds, over all epochs."""
    conf, savers, written = Conf(), [], []
    conf.train.epochs, conf.train.max_save_share = epochs, 1.0
    original, work = Saver.save_epoch, Saver._work

    def save_epoch(self: Saver, *args: Any, **named: Any) -> bool:
        savers.append(self)
        began = time.perf_counter()
        is_saved = original(self, *args, **named)
        if waits:
            self.wait()
            self.stalled_s = getattr(self, "measured_s", 0.0) + time.perf_counter() - began
            self.measured_s = self.stalled_s  # type: ignore[attr-defined]
        return is_saved

    def timed(self: Saver, *args: Any) -> None:
        work(self, *args)
        written.append(time.thread_time())  # processor time of the writing thread

    patch = mock.patch.multiple(Saver, save_epoch=save_epoch, _work=timed)
    with tempfile.TemporaryDirectory() as folder, patch:
        result = run(conf, Path(folder), [], quiet=True)
    return savers[0].stalled_s, sum(written), result["seconds"]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    for waits in (False, True):
        waited, writing, training = measure(given.epochs, waits=waits)
        title = "training waits for each save" if waits else "a thread writes"
        print(
            f"{title}: training waited {waited:.3f} s of {training:.1f} s ({100 * waited / training:.2f} %); writing"
            f" took {writing:.3f} s of a processor ({100 * writing / training:.2f} %)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
