"""`data.batch_size=fit`: the largest batch that fits, and advice where memory runs out."""

from __future__ import annotations

from unittest.mock import Mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.app.batch_size import DEFAULT_BATCH, divisors, largest_fitting, out_of_memory, with_batch
from finetune.config import Conf


@given(st.integers(1, 512), st.integers(0, 600))
def test_the_search_finds_the_largest_that_fits(batch: int, limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    expected = max((size for size in divisors(batch) if size <= limit), default=None)
    assert largest_fitting(divisors(batch), fits) == expected
    assert len(tried) <= len(divisors(batch)).bit_length()


def test_advice_where_memory_runs_out() -> None:
    """Who asked for `auto` is not sent in a circle."""
    parts = Mock(device=torch.device("cpu"), conf=Conf(), is_auto_batch=False)
    text = out_of_memory(parts, step=4)
    assert "in step 5" in text and "data.batch_size=32 train.accumulate=2" in text and "data.batch_size=fit" in text
    parts.is_auto_batch = True
    text = out_of_memory(parts)
    assert "out of memory on cpu. Try" in text and "data.batch_size=fit" not in text


def test_a_found_batch_keeps_the_images_of_a_step() -> None:
    conf = Conf()
    conf.train.accumulate = 3
    found = with_batch(conf, 48)
    assert found.data.batch_size * found.train.accumulate == DEFAULT_BATCH * 3
    conf.optim.recipe_batch = 2048
    assert with_batch(conf, 256).train.accumulate == 8
