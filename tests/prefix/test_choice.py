"""Where activations are cached: by the room that they need, the time that they save, and the room there is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.config import AugmentConf, PrefixCache, PrefixConf, Recipe
from finetune.prefix import choice
from finetune.prefix.choice import RoomNeeded, choose_place
from finetune.prefix.measuring import Measured
from finetune.prefix.planning import is_read_once, why_not_cacheable
from finetune.prefix.sweep_memory import shared_between_runs

GIB = 2**30
CHEAP = Measured(seconds=1e-1, loading=1e-3, bytes=GIB // 100, dtype=torch.float32)


def needed(*, there: str = "", beside: int = 0, spare: int = 0, views: int = 1, split: str = "train") -> RoomNeeded:
    """100 activations, which the place `there` holds already, and `beside` others that are still to be computed."""
    kinds = (PrefixCache.device, PrefixCache.ram, PrefixCache.disk)
    missing = {kind: beside + (0 if kind == there else 100) for kind in kinds}
    return RoomNeeded(split, views, missing, dict.fromkeys(kinds, 100 + beside), dict.fromkeys(kinds[:2], spare))


def chosen(
    folder: Path, kind: str = "auto", need: RoomNeeded | None = None, measured: Measured = CHEAP, device: str = "cpu",
    max_gib: float = 50.0,
) -> str:  # fmt: skip
    """The place for 1 GiB unless said otherwise."""
    conf = PrefixConf(cache=PrefixCache(kind), max_gib=max_gib)
    return str(choose_place(conf, measured, need or needed(), torch.device(device), folder)[0])


def test_auto_does_not_cache_activations_that_are_read_once() -> None:
    assert is_read_once(PrefixCache.auto, 1.0) and not is_read_once(PrefixCache.auto, 2.0)
    assert not is_read_once(PrefixCache.ram, 1.0)
    with shared_between_runs():
        assert not is_read_once(PrefixCache.auto, 1.0)


def test_where_activations_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"ram": 4 * GIB, "device": 3 * GIB, "disk": 4 * GIB}
    monkeypatch.setattr(choice, "free_memory", lambda: free["ram"])
    monkeypatch.setattr(choice.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free["disk"]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["device"], 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB // 2)
    assert chosen(tmp_path) == "ram" and chosen(tmp_path, device="cuda") == "device"  # 30 % of 3.5 GiB
    free["device"] = free["ram"] = int(1.9 * GIB)  # half of it, or 30 %, may be taken unasked
    assert chosen(tmp_path, device="cuda") == chosen(tmp_path) == "disk"
    assert chosen(tmp_path, need=needed(there="ram")) == chosen(tmp_path, need=needed(spare=GIB)) == "ram"
    assert chosen(tmp_path, "ram") == "ram"  # asked for, all of it may be taken
    assert chosen(tmp_path, max_gib=1.2) == "none" and chosen(tmp_path, max_gib=1.3) == "disk"
    assert chosen(tmp_path, need=needed(beside=10), max_gib=1.3) == "none"
    free["disk"] = GIB // 10
    assert chosen(tmp_path) == "none" and chosen(tmp_path, need=needed(there="disk")) == "disk"
    assert chosen(tmp_path, "disk", need=needed(there="disk")) == "disk"
    with pytest.raises(ValueError, match=r"need 1\.00 GiB and 102 MiB may be taken"):
        chosen(tmp_path, "disk")
    assert chosen(tmp_path, "disk", need=needed(there="disk"), max_gib=0.5) == "disk"  # nothing will be written
    free["disk"] = 4 * GIB
    (tmp_path / "file").write_text("")
    assert chosen(tmp_path / "file" / "cache") == "none"  # no folder can be made there
    quick = replace(CHEAP, seconds=1e-4, loading=0.0)  # 10 MB come in 5 ms from memory, in 20 from disk
    assert chosen(tmp_path, measured=quick) == "none"
    assert chosen(tmp_path, measured=replace(quick, loading=1e-1)) == "disk"


def test_what_does_not_fit_is_told_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "free_memory", lambda: GIB // 2)
    for dtype, is_tried in ((torch.float32, True), (torch.float16, False)):
        for views, words in ((4, "12 images in 4 views"), (1, "50 images")):
            with pytest.raises(ValueError) as told:
                chosen(tmp_path, "ram", need=needed(views=views), measured=replace(CHEAP, dtype=dtype))
            text = str(told.value)
            assert "those of train" in text and f"need 1.00 GiB and 512 MiB may be taken, enough for {words}." in text
            assert "prefix.cache=disk" in text and ("fewer augment.views" in text) == (views > 1)
            assert ("prefix.dtype=fp16" in text) == is_tried


def test_what_fits_nowhere_unasked_is_told_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"ram": int(1.2 * GIB), "disk": GIB // 2}
    monkeypatch.setattr(choice, "free_memory", lambda: free["ram"])
    monkeypatch.setattr(choice.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free["disk"]))

    def told(**changes: object) -> str:
        measured = replace(CHEAP, **changes)
        kind, why = choose_place(PrefixConf(), measured, needed(views=4), torch.device("cpu"), tmp_path)
        assert kind == "none"
        return why

    text = told()
    assert "ram: 1.00 GiB, and auto takes at most 614 MiB; disk: 1.00 GiB, and auto takes at most 410 MiB" in text
    assert text.endswith("Would do: prefix.cache=ram, fewer augment.views, prefix.dtype=fp16, which takes half")
    assert "prefix.dtype" not in told(dtype=torch.float16)
    free["ram"] = GIB
    assert "prefix.cache=ram" in told()
    free["ram"] -= 2**21
    assert "prefix.cache=" not in told()
    need, conf, place = needed(), PrefixConf(max_gib=1.2), torch.device("cpu")
    half = replace(CHEAP, dtype=torch.float16)
    assert choose_place(conf, half, need, place, tmp_path)[1].endswith("auto takes at most 410 MiB)")
    free["disk"] = 4 * GIB
    assert choose_place(conf, half, need, place, tmp_path)[1].endswith("Would do: prefix.cache=disk, prefix.max_gib=2")


def test_what_earlier_jobs_left_keeps_to_the_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what would be free without it, it and what this run adds together."""
    monkeypatch.setattr(choice, "free_memory", lambda: 2 * GIB)
    cpu = torch.device("cpu")

    def fits(spare: int, there: str = "") -> bool:
        return choice.fits_beside_others(PrefixCache.ram, CHEAP, needed(spare=spare, there=there), cpu)

    assert fits(0) and fits(0, there="ram")  # 1 GiB of 2
    assert not fits(GIB // 10)  # 1.1 of 2.1
    assert fits(9 * GIB, there="ram")  # what is there already takes no more room


@pytest.mark.parametrize(
    ("views", "words"), [(0, "augment.cutmix=0 augment.views=K would"), (2, "augment.cutmix=0 would")]
)
def test_a_mixed_run_is_told_what_would_allow_a_cache(views: int, words: str) -> None:
    augment = AugmentConf(recipe=Recipe.light, mixup=0.2, views=views)
    assert words in str(why_not_cacheable(augment, 0))
