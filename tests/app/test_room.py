"""Laws of settings that no machine can hold: refused in one line before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.__main__ import main

FREE = 2**30


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model.image_size=100000000", "model.image_size=100000000: must be at most 16,384"),
        (
            "model.image_size=16384 data.batch_size=64",
            "a batch of 64 images of 16,384 pixels a side needs 192 GiB of memory, 1.00 GiB are",
        ),
        ("model.image_size=1024 data.batch_size=2", "training on a batch of 2 images of 1,024 pixels a side needs"),
        ("data.epoch_images=2000000000", "the order of 2,000,000,000 images an epoch needs 59.6 GiB of memory"),
        ("data.epoch_images=2147483648", "data.epoch_images=2147483648: must be at most 2,147,483,647"),
        ("data.batch_size=100000000", "data.batch_size=100000000: must be at most 1,048,576"),
        ("data.workers=9999", "data.workers=9999: expected auto or a number from 0 to 1024"),
        ("augment.views=99999999999999999999", "augment.views=99999999999999999999: must be at most 2,147,483,647"),
        ("train.epochs=1000000 sched.interval=step", "at most 10,000,000 steps can be used; every step's rate"),
        ("train.epochs=10000000", "train.epochs=10000000: must be at most 1,000,000"),
        ("data.cache=disk data.cache_gib=1e300", "data.cache_gib=1e+300: must be greater than 0 and at most"),
        (f"seed={'9' * 5000}", "seed=9999999999"),
    ],
)
def test_absurd_numbers_are_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    monkeypatch.setattr("finetune.system.limits.free_memory", lambda: FREE)
    assert main([*words.split(), "hydra.run.dir=run"]) in (1, 2)
    text = capsys.readouterr().err
    assert expected in text and "at fault" not in text and text.count("\n") == 1
