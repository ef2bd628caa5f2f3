"""Activation blocks: rows and slots, files that change meanwhile, damage, two processes that want the same block."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from finetune.config import PrefixCache
from finetune.data.caches import opening
from finetune.prefix import feed as feed_module
from finetune.prefix.feed import Feed
from finetune.prefix.store import ActivationBlock, BlockBuilder, build_in_memory, open_on_disk

CPU = torch.device("cpu")
PLACE = Path("cache", "activations", f"{'1' * 32}-float32-{'2' * 32}-0")


def rows_of(block: ActivationBlock) -> list[list[float]]:
    """All activations of a block without damage."""
    values, damaged = block.read(torch.arange(len(block.values)))
    assert not damaged and values.dtype == block.values.dtype
    return values.tolist()


@pytest.mark.parametrize("on_disk", [False, True])
def test_unreadable_images_have_a_slot_and_no_row(tmp_path: Path, on_disk: bool) -> None:
    """Also at the beginning, before the size of an image's activations is known, and at the end."""

    def fill(builder: BlockBuilder) -> None:
        nobody = torch.zeros(2, dtype=torch.bool)
        for values in (None, torch.ones(2, 3), None, None, torch.full((1, 3), 2.0), None):
            present = nobody if values is None else torch.tensor([True, len(values) == 2])
            builder.put(values, present, torch.float32)

    block = open_on_disk(tmp_path / PLACE, 12, fill)[0] if on_disk else build_in_memory(12, fill, CPU)
    assert block.present.nonzero().flatten().tolist() == [2, 3, 8]
    assert rows_of(block) == [[1] * 3, [1] * 3, [2] * 3]
    assert block.rows_of(torch.tensor([8, 2, 3])).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="not one image"):
        build_in_memory(2, lambda builder: builder.put(None, torch.zeros(2, dtype=torch.bool), torch.float32), CPU)


def test_what_lies_on_disk_is_fetched_ahead_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches beyond the one that the loop has; never all of them, which may not fit into memory."""
    asked, read = [], feed_module._read

    def noted(block: ActivationBlock, slots: torch.Tensor, *, pin: bool) -> tuple[torch.Tensor, list[int]]:
        asked.append(slots.tolist())
        return read(block, slots, pin=pin)

    monkeypatch.setattr(feed_module, "_read", noted)
    loader = Mock(num_images=12, most_showings=lambda: torch.ones(12, dtype=torch.int64))
    feed = Feed(loader, title="train", device=CPU, prefix=Mock(), cache=Mock(kind=PrefixCache.disk))
    slots = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    block = ActivationBlock(torch.arange(12.0)[:, None], torch.ones(12, dtype=torch.bool), torch.float32)
    for number, values in enumerate(feed._prefetched(block, slots, [2] * 6, 0)):
        assert values.flatten().tolist() == slots[2 * number : 2 * number + 2].tolist()
        deadline = time.monotonic() + 10
        while len(asked) < min(6, number + 1 + feed_module.PREFETCH) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(asked) == min(6, number + 1 + feed_module.PREFETCH)


def test_what_lies_on_disk_is_not_read_into_memory_and_not_mapped(tmp_path: Path) -> None:
    """A map would end the process where another one cuts the file."""
    block = open_on_disk(tmp_path / PLACE, 4, _fill)[0]
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    assert str(tmp_path / PLACE) not in maps and block.values.device.type == "meta"


def _replace(path: Path, content: bytes) -> None:
    path.rename(path.with_name("other"))
    path.write_bytes(content)


MEANWHILE = {  # what another program does to the file of a block that is open, and the rows that are damaged then
    "flip": (lambda path: _write_at(path, 13, b"x"), [1]),
    "flip twice": (lambda path: (_write_at(path, 13, b"x"), _write_at(path, 47, b"y")), [1, 3]),
    "cut": (lambda path: os.truncate(path, 30), [2, 3]),
    "empty": (lambda path: os.truncate(path, 0), [0, 1, 2, 3]),
    "shifted": (lambda path: path.write_bytes(b"abcd" + path.read_bytes()), [0, 1, 2, 3]),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), []),
    "gone": (os.unlink, []),  # as by `finetune cache clear`: a run goes on with the file that it has opened
    "folder gone": (lambda path: shutil.rmtree(path.parent), []),
    "another's": (lambda path: _replace(path, bytes(1000)), []),
}


def _write_at(path: Path, place: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("name", MEANWHILE)
def test_a_file_that_changes_while_it_is_read_gives_no_other_number(tmp_path: Path, name: str) -> None:
    place = tmp_path / PLACE
    block = open_on_disk(place, 4, _fill)[0]
    path, (do, expected) = place / "activations", MEANWHILE[name]
    assert rows_of(block) == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]  # all were compared once
    whole = path.read_bytes()
    do(path)
    before = path.read_bytes() if path.exists() else b""
    values, damaged = block.read(torch.tensor([3, 2, 1, 0]))
    assert sorted(3 - place for place in damaged) == expected
    assert all(values[i].tolist() == [3 - i] * 3 for i in range(4) if i not in damaged)
    for row in range(4):
        assert block.mend(row, torch.full((3,), float(row)))
    assert rows_of(block) == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
    if name in ("gone", "folder gone", "another's"):  # nothing is written to a file that is not the one
        assert (path.read_bytes() if path.exists() else b"") == before
    else:
        assert path.read_bytes()[:48] == whole[:48]


def test_of_two_that_find_the_same_damage_one_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one has read the damage, too, and must not remove the block that the faster one has built anew."""
    place = tmp_path / PLACE
    open_on_disk(place, 4, _fill)
    (place / "activations").write_bytes(b"")
    real = opening.entry_lock

    @contextlib.contextmanager
    def overtaken(entry: Path) -> Iterator[None]:
        monkeypatch.setattr(opening, "entry_lock", real)
        assert open_on_disk(place, 4, _fill)[1]  # the other one, in the moment before this one has the lock
        with real(entry):
            yield

    monkeypatch.setattr(opening, "entry_lock", overtaken)
    block, built = open_on_disk(place, 4, _fill)
    assert not built and rows_of(block) == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]


def test_what_is_damaged_and_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / PLACE
    open_on_disk(place, 4, _fill)
    (place / "activations").write_bytes(b"")

    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match=r"-0 is damaged and cannot be removed: Permission denied; remove it by hand"):
        open_on_disk(place, 4, _fill)


def test_a_damaged_row_is_found_as_it_is_read_and_mended_for_all(tmp_path: Path) -> None:
    place = tmp_path / PLACE
    open_on_disk(place, 4, _fill)
    path = place / "activations"
    whole = path.read_bytes()
    for start in range(12, 24):  # row 1
        path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        block, built = open_on_disk(place, 4, _fill)
        assert not built and block.read(torch.tensor([0, 2, 3]))[1] == []
        assert block.read(torch.tensor([3, 1]))[1] == [1]
        assert not block.mend(1, torch.full((3,), 9.0)) and path.read_bytes() != whole  # other numbers are not written
        assert block.read(torch.tensor([1]))[1] == [0] and block.mend(1, torch.ones(3))
        assert block.read(torch.tensor([1]))[0].tolist() == [[1] * 3] and block.read(torch.tensor([1]))[1] == []
        assert path.read_bytes() == whole
    for start in range(48, len(whole)):  # the checksums
        path.write_bytes(whole[:start] + bytes([whole[start] ^ 8]) + whole[start + 1 :])
        assert open_on_disk(place, 4, _fill)[1] and path.read_bytes() == whole


def _fill(builder: BlockBuilder, pause_s: float = 0.0) -> None:
    for value in range(4):
        builder.put(torch.full((1, 3), float(value)), torch.tensor([True]), torch.float32)
        time.sleep(pause_s)


def _build(place: Path, built: object) -> None:
    built.put(open_on_disk(place, 4, functools.partial(_fill, pause_s=0.2))[1])  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_builders_make_one_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    context, place = multiprocessing.get_context("spawn"), tmp_path / PLACE
    built = context.Queue()
    doomed = context.Process(target=_build, args=(place, built))
    doomed.start()
    while not list((tmp_path / PLACE).parent.glob("*.tmp")):
        time.sleep(0.02)
    doomed.kill()
    doomed.join()
    assert not place.exists()
    pair = [context.Process(target=_build, args=(place, built)) for _ in range(2)]
    for process in pair:
        process.start()
    assert sorted(built.get(timeout=60) for _ in pair) == [False, True]
    for process in pair:
        process.join()
    assert not list((tmp_path / PLACE).parent.glob("*.tmp"))
    block, again = open_on_disk(place, 4, _fill)
    assert not again and rows_of(block) == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
