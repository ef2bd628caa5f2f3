"""The types of the small files of a run, for those who read them again: `result.json`, `rates.json` and others.

A type names the entries that the program relies on. A file may hold more, such as the scores of any metric.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from finetune.system.reading import fitted, read_json

Result = dict[str, Any]  # the content of `result.json`

PromiseKind = Literal["bitwise", "close", "none"]
Count = Annotated[int, Meta(ge=0, le=2**53)]
# Pictures cannot show larger numbers; a float32 ends at 3.4e38. NaN and infinities are stored as null.
Number = Annotated[float, Meta(ge=-1e100, le=1e100)] | None


class _ResultStatus(TypedDict):
    status: Literal["running", "finished", "failed", "diverged", "interrupted"]


class _Result(_ResultStatus, total=False):
    error: str | None
    overrides: list[str]
    resumed_at: list[Count]
    monitor: str
    loss: Literal["ce", "bce", "asl"]
    settings: str  # see `digest_of` in earlier.py
    checksums: dict[str, str]  # see finished.py
    promise: PromiseKind
    promise_reasons: list[str]
    auto_batch_size: Annotated[int, Meta(ge=1, le=2**31)]
    epochs: Count
    best_epoch: Count
    seconds: Number


class _Curves(TypedDict):
    x: list[Number]
    layers: dict[str, list[Number]]


class _CurvesBefore(_Curves):
    epochs: Count


class _Rates(_Curves):
    interval: Literal["epoch", "step"]
    frozen: list[str]


class _RatesWithBefore(_Rates, total=False):
    before: _CurvesBefore


class Row(TypedDict):
    """An epoch's row of `history.jsonl`; its other entries are numbers too."""

    epoch: Annotated[int, Meta(ge=1, le=10_000_000)]
    lr: dict[str, Number]  # group name -> rate with which the epoch began


class JobEntry(TypedDict, total=False):
    """A line of `jobs.jsonl`: a sweep that starts, a job that begins, or one that was refused its folder."""

    start: str
    id: str
    job: str
    refused: str


def read_result(path: Path) -> Result:
    """The content of a `result.json`; see `read_json` for errors."""
    return dict(read_json(path, _Result, mend="remove it: a run that continues writes it again"))


def read_rates(path: Path) -> dict[str, Any]:
    """The content of a `rates.json`; see `read_json` for errors."""
    return dict(read_json(path, _RatesWithBefore, mend="remove it: a run that continues writes it again"))


def history_row(value: Any) -> dict[str, Any]:
    """A line of `history.jsonl`, once it has been found to be one; an UnfitError says where it is none."""
    fitted(value, dict[str, Number | dict[str, Number]])
    return dict(fitted(value, Row))
