"""What a stranger's file of weights says about itself is checked before it is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune.core.preprocess import Preprocess
from finetune.models.upstream.weight_files import read_metadata
from finetune.system.reading import DamagedError

GOOD = Preprocess(32, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35))


def saved(path: Path, **metadata: str) -> Path:
    save_file({"w": torch.zeros(1)}, path / "w.safetensors", metadata=metadata)
    return path / "w.safetensors"


def test_good_metadata_are_read(tmp_path: Path) -> None:
    values = json.dumps({**GOOD.as_dict(), "of_a_later_version": 1})
    found = read_metadata(saved(tmp_path, preprocess=values, classes='["a", "b"]'))
    assert found.preprocess == GOOD and [*found.named.values()] == [["a", "b"]]


@pytest.mark.parametrize(
    "change",
    [
        *({"size": 0}, {"size": -5}, {"size": 1e300}, {"size": "x"}, {"size": True}, {"size": None}),
        *({"std": [0, 0, 0]}, {"std": [1, 1, -1]}, {"mean": "abc"}, {"mean": [1, 2]}, {"mean": [float("nan")] * 3}),
        *({"interpolation": "\x1b[2J"}, {"resize": "stretch"}, {"crop_fraction": 0}, {"crop_fraction": 7}),
        {"channels": -1},
    ],
    ids=str,
)
def test_bad_preprocessing_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match=r"w\.safetensors is damaged: its metadata 'preprocess': "):
        read_metadata(saved(tmp_path, preprocess=json.dumps({**GOOD.as_dict(), **change})))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "[1, 2]", '{"a": "b"}', '"cat"'], ids=lambda text: text[:9])
@pytest.mark.parametrize("key", ["classes", "preprocess", "changes"])
def test_metadata_of_other_types_are_named(tmp_path: Path, key: str, text: str) -> None:
    if (key, text) == ("changes", '{"a": "b"}'):
        return  # all of its entries may be missing, and further ones are of a later version
    with pytest.raises(DamagedError, match=rf"w\.safetensors is damaged: its metadata '{key}': "):
        read_metadata(saved(tmp_path, **{key: text}))
