"""Laws of the files of scores: what was written is read back, whatever the classes are called."""

from pathlib import Path

import pytest

from finetune.report.scores import plot_confusion, write_scores


@pytest.mark.parametrize("name", ["a\u2028b", "a\x0cb", "a\x85b", "a\nb", 'a,"b', "=1"])
def test_a_confusion_matrix_is_drawn_again_whatever_its_classes_are_called(tmp_path: Path, name: str) -> None:
    details = {"confusion": [[3, 1], [0, 2]], "classes": [{"recall": 0.75}, {"recall": 1.0}]}
    write_scores(tmp_path, "test", {"test/top1": 0.8}, details=details, classes=[name, "cat"])
    (tmp_path / "confusion.png").unlink()
    plot_confusion(tmp_path)
    assert (tmp_path / "confusion.png").exists()
