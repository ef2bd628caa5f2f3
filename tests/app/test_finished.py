"""The numbers of a finished run are compared with what it wrote before a report shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from small_runs import go, small

from finetune.__main__ import main
from finetune.runs.finished import CHECKSUMS, check_finished
from finetune.system.reading import DamagedError


def test_a_changed_number_is_named_and_no_report_shows_it(
    tmp_path: Path, stripes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    result = go(small(stripes), folder)
    assert set(result[CHECKSUMS]) == {"result.json", "history.jsonl", "rates.json", "metrics.json", "confusion.csv"}
    check_finished(folder)
    assert main(["report", str(folder)]) == 0
    for name, before, after in [
        ("result.json", '"test/top1": ', '"test/top1": 1'),
        ("history.jsonl", '"val/loss": ', '"val/loss": 1'),
        ("rates.json", '"x": [', '"x": [0, '),
        ("metrics.json", '"val"', '"vak"'),
        ("confusion.csv", "across,", "across,1"),
    ]:
        path = folder / name
        whole = path.read_text()
        assert before in whole
        path.write_text(whole.replace(before, after, 1))
        with pytest.raises(DamagedError, match=name):
            check_finished(folder)
        assert main(["report", str(folder)]) == 1
        assert f"{name} is damaged: it is not what the run wrote" in capsys.readouterr().err
        path.write_text(whole)
    changed = json.loads((folder / "result.json").read_text())
    del changed[CHECKSUMS]
    (folder / "result.json").write_text(json.dumps({**changed, "test/top1": 0.5}))
    assert main(["report", str(folder)]) == 0  # for who has edited it on purpose


def test_what_a_clock_says_and_numbers_that_are_none_do_not_count(tmp_path: Path) -> None:
    from finetune.runs.finished import checksums

    one = checksums(tmp_path, {"status": "finished", "seconds": 1.0, "val/top1": math.nan})
    assert one == checksums(tmp_path, {"status": "finished", "seconds": 2.0, "val/top1": None})
    assert one != checksums(tmp_path, {"status": "finished", "seconds": 1.0, "val/top1": 0.5})
