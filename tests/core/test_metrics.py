"""Metrics equal scikit-learn's, however the batches fall; losses equal their formulas; settings are checked by name."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics as sk
from torch import Tensor

from finetune.app.run import run
from finetune.config import (
    LABEL_METRICS,
    MULTILABEL_METRICS,
    AugmentConf,
    Conf,
    DataConf,
    Loss,
    SourceKind,
    TrainConf,
    find_problems,
    measured_metrics,
)
from finetune.core.losses import asymmetric_loss, binary_cross_entropy, build_criterion, cross_entropy
from finetune.core.metrics import LabelMeter, MultilabelMeter, average_precision, build_meter, top1, top5
from finetune.core.metrics import classes as classes_module
from finetune.models import build_model
from finetune.models.heads.offsets import offsets, with_head_bias
from finetune.report.scores import draw_confusion, write_scores
from finetune.runs.weights import put_weights, read_weights

SIZES = (1, 7, 8, 9, 33)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sklearn")


def random_scores(size: int, num_classes: int, seed: int, *, ties: bool) -> Tensor:
    scores = torch.randn(size, num_classes, generator=torch.Generator().manual_seed(seed)) * 2
    return scores.round() if ties else scores


def random_labels(size: int, num_classes: int, seed: int, *, absent: bool) -> Tensor:
    """Without the first and the last class where `absent`."""
    generator = torch.Generator().manual_seed(seed + 1)
    low, high = (1, num_classes - 1) if absent and num_classes > 2 else (0, num_classes)
    return torch.randint(low, high, (size,), generator=generator)


def metered(meter: LabelMeter | MultilabelMeter, scores: Tensor, targets: Tensor, batch_size: int) -> dict[str, float]:
    meter.reset()
    for part in zip(scores.split(batch_size), targets.split(batch_size), strict=True):
        meter.add(*part)
    return meter.results()


def ece_by_hand(scores: Tensor, labels: Tensor) -> float:
    """Guo et al.'s sum, bin by bin."""
    confidence, predicted = scores.softmax(1).max(1)
    total = 0.0
    for i in range(15):
        inside = (confidence.double() > i / 15) & (confidence.double() <= (i + 1) / 15)
        if inside.any():
            gap = (predicted == labels)[inside].double().mean() - confidence[inside].double().mean()
            total += abs(float(gap)) * int(inside.sum()) / len(labels)
    return total


CASES = list(itertools.product(SIZES, (2, 9), (False, True), (False, True)))


@pytest.mark.parametrize(("size", "num_classes", "ties", "absent"), CASES)
def test_single_label_metrics_equal_scikit_learns(size: int, num_classes: int, ties: bool, absent: bool) -> None:
    scores = random_scores(size, num_classes, size, ties=ties)
    labels = random_labels(size, num_classes, size, absent=absent)
    meter = LabelMeter(cross_entropy, LABEL_METRICS)
    truth, given = labels.numpy(), scores.numpy().argmax(1)
    every = range(num_classes)
    expected = {
        "loss": F.cross_entropy(scores.double(), labels).item(),
        "top1": sk.accuracy_score(truth, given),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, given),
        "macro_f1": sk.f1_score(truth, given, average="macro", zero_division=0),
        "ece": ece_by_hand(scores, labels),
    }
    # Of equal scores the first class is the higher one: what scikit-learn is told by counting backwards.
    highest = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :5]
    expected["top5"] = np.mean([label in row for label, row in zip(truth, highest, strict=True)])
    if not ties and num_classes > 5:
        assert expected["top5"] == sk.top_k_accuracy_score(truth, scores.numpy(), k=5, labels=list(every))
    for batch_size in (1, 4, 64):
        found = metered(meter, scores, labels, batch_size)
        assert found == pytest.approx(expected, abs=1e-6), batch_size
        assert {name: found[name] for name in expected if name != "loss"} == pytest.approx(
            {name: value for name, value in expected.items() if name != "loss"}, abs=1e-7
        )
        if batch_size != 4:
            continue
        details = meter.details()
        assert details["confusion"] == sk.confusion_matrix(truth, given, labels=list(every)).tolist()
        precision, recall, f1, images = sk.precision_recall_fscore_support(
            truth, given, labels=list(every), zero_division=np.nan
        )
        for name, column in {"accuracy": recall, "precision": precision, "f1": f1, "images": images}.items():
            ours = [math.nan if row[name] is None else row[name] for row in details["classes"]]
            np.testing.assert_allclose(ours, column, atol=1e-12)


def multi_case(size: int, num_classes: int, *, ties: bool, density: float) -> tuple[Tensor, Tensor]:
    """Scores, and labels of which the first class never occurs, the second always."""
    scores = random_scores(size, num_classes, size, ties=ties)
    labels = torch.rand(size, num_classes, generator=torch.Generator().manual_seed(size + 2)) < density
    labels[:, 0] = False
    labels[:, 1] = True
    return scores, labels.float()


@pytest.mark.parametrize(
    ("size", "num_classes", "ties", "density"), list(itertools.product(SIZES, (2, 9), (False, True), (0.0, 0.3)))
)
def test_multi_label_metrics_equal_scikit_learns(size: int, num_classes: int, ties: bool, density: float) -> None:
    scores, labels = multi_case(size, num_classes, ties=ties, density=density)
    meter = MultilabelMeter(binary_cross_entropy, MULTILABEL_METRICS)
    truth = labels.numpy().astype(int)
    occurs = truth.any(axis=0)
    ap = [sk.average_precision_score(truth[:, c], scores.numpy()[:, c]) for c in range(num_classes) if occurs[c]]
    best = scores.argmax(1)
    expected = {
        "loss": F.binary_cross_entropy_with_logits(scores.double(), labels.double()).item(),
        "top1": float(labels[torch.arange(size), best].mean()),
        "map": np.mean(ap),
    }
    for k in (3, 5):
        claimed = np.zeros_like(truth)
        for row, order in enumerate(np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]):
            claimed[row, order] = 1
        values = sk.precision_recall_fscore_support(truth, claimed, average="micro", zero_division=0)[:3]
        expected |= {f"{n}_at_{k}": v for n, v in zip(("precision", "recall", "f1"), values, strict=True)}
    for batch_size in (1, 4, 64):
        found = metered(meter, scores, labels, batch_size)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        if batch_size != 4:
            continue
        details = meter.details()
        claimed = (scores.sigmoid() >= details["threshold"]).numpy().astype(int)
        assert found["f1_micro"] == pytest.approx(sk.f1_score(truth, claimed, average="micro", zero_division=0))
        by_class = sk.f1_score(truth, claimed, average=None, zero_division=np.nan)
        neither = ~(truth.any(axis=0) | claimed.any(axis=0))
        assert found["f1_macro"] == pytest.approx(np.mean(by_class[~neither]))
        for threshold in np.arange(0, 1, 0.05):
            other = (scores.sigmoid() >= threshold).numpy()
            assert 2 * (truth & other).sum() / (truth.sum() + other.sum()) <= found["f1_micro"] + 1e-9
        shown = [row["average_precision"] for row in details["classes"]]
        assert [value for value in shown if value is not None] == pytest.approx(ap)
        assert [value is None for value in shown] == (~occurs).tolist()


def test_a_threshold_from_validation_is_used_as_it_is() -> None:
    scores, labels = multi_case(33, 6, ties=False, density=0.3)
    chosen = MultilabelMeter(binary_cross_entropy, MULTILABEL_METRICS)
    metered(chosen, scores, labels, 8)
    threshold = chosen.details()["threshold"]
    other_scores, other_labels = multi_case(32, 6, ties=False, density=0.3)
    given = MultilabelMeter(binary_cross_entropy, MULTILABEL_METRICS, threshold=threshold)
    found = metered(given, other_scores, other_labels, 8)
    assert given.details()["threshold"] == threshold
    claimed = (other_scores.sigmoid() >= threshold).numpy().astype(int)
    assert found["f1_micro"] == pytest.approx(sk.f1_score(other_labels.numpy().astype(int), claimed, average="micro"))


def test_average_precision_in_parts_and_with_all_scores_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = multi_case(50, 9, ties=True, density=0.4)
    whole = average_precision(scores, labels > 0)
    monkeypatch.setattr("finetune.core.metrics.multilabel.SORTED_AT_ONCE", 100)
    torch.testing.assert_close(average_precision(scores, labels > 0), whole, rtol=0, atol=0, equal_nan=True)
    same = average_precision(torch.zeros(10, 1), torch.arange(10)[:, None] < 3)
    assert same.tolist() == [0.3]


def test_equal_scores_rank_as_argmax_has_it_and_nan_is_never_right() -> None:
    scores = torch.zeros(3, 8)
    assert top5(scores, torch.tensor([0, 4, 5])).tolist() == [1, 1, 0]
    assert top1(scores, torch.tensor([0, 4, 5])).tolist() == [1, 0, 0]
    scores[:, 2] = math.nan
    assert top5(scores, torch.tensor([2, 0, 5])).tolist() == [0, 1, 1]


def test_top1_of_shares() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 5)
    targets = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0.7, 0.3, 0], [0.3, 0.7, 0]])
    assert top1(logits, targets).tolist() == [1, 0, 0, 1, 0]


def test_one_class_and_no_batch_left_over() -> None:
    meter = LabelMeter(cross_entropy, LABEL_METRICS)
    found = metered(meter, torch.randn(9, 1), torch.zeros(9, dtype=torch.int64), 4)
    assert found == {"loss": 0.0, "top1": 1.0, "top5": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0, "ece": 0.0}
    assert metered(meter, torch.zeros(2, 2), torch.tensor([0, 1]), 4)["top1"] == 0.5


def test_a_score_that_is_not_a_number_shows() -> None:
    scores = torch.randn(9, 4)
    scores[3, 2] = math.nan
    found = metered(LabelMeter(cross_entropy, LABEL_METRICS), scores, torch.arange(9) % 4, 4)
    assert math.isnan(found["loss"]) and math.isnan(found["ece"])


def test_many_classes_keep_no_matrix_but_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = random_scores(33, 6, 0, ties=False), random_labels(33, 6, 0, absent=True)
    small, large = LabelMeter(cross_entropy, LABEL_METRICS), LabelMeter(cross_entropy, LABEL_METRICS)
    expected = metered(small, scores, labels, 8)
    monkeypatch.setattr(classes_module, "MATRIX_CLASSES", 5)
    assert metered(large, scores, labels, 8) == expected
    assert large.details() == {**small.details(), "confusion": None}


# --- losses ----------------------------------------------------------------------------------------------------------


def test_smoothing_before_or_after_mixing_is_the_same() -> None:
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    one_hot = F.one_hot(labels, 5).float()
    for loss in (cross_entropy, binary_cross_entropy):
        torch.testing.assert_close(loss(logits, labels, 0.1), loss(logits, one_hot, 0.1))
        mixed = 0.3 * one_hot + 0.7 * one_hot.roll(1, 0)
        smooth = one_hot * 0.9 + 0.1 / 5
        torch.testing.assert_close(loss(logits, mixed, 0.1), loss(logits, 0.3 * smooth + 0.7 * smooth.roll(1, 0)))
    torch.testing.assert_close(cross_entropy(logits, labels), -logits.log_softmax(1)[torch.arange(6), labels])


def test_class_weights_are_factors() -> None:
    logits, labels, weights = torch.randn(6, 5), torch.arange(6) % 5, torch.rand(5)
    torch.testing.assert_close(
        cross_entropy(logits, labels, class_weights=weights), cross_entropy(logits, labels) * weights[labels]
    )
    shares = (torch.rand(6, 5) < 0.4).float()
    by_hand = F.binary_cross_entropy_with_logits(logits, shares, reduction="none") * weights
    torch.testing.assert_close(binary_cross_entropy(logits, shares, class_weights=weights), by_hand.mean(1))


def test_asymmetric_loss_is_its_formula_and_bce_where_nothing_is_asymmetric() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64) * 3
    labels = (torch.rand(6, 5) < 0.4).double()
    p = logits.sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    by_hand = -(labels * (1 - p) * p.log() + (1 - labels) * shifted**4 * (1 - shifted).log()).mean(1)
    ours = asymmetric_loss(logits, labels, gamma_pos=1, gamma_neg=4, shift=0.05)
    torch.testing.assert_close(ours.double(), by_hand, rtol=1e-5, atol=1e-6)
    plain = asymmetric_loss(logits, labels, gamma_pos=0, gamma_neg=0, shift=0)
    torch.testing.assert_close(plain, binary_cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("gamma_pos", "gamma_neg", "shift"), [(0, 4, 0.05), (0.5, 0.5, 0.05), (0.5, 0.5, 0), (1, 1, 0)]
)
def test_asymmetric_gradients_are_finite_for_extreme_scores(gamma_pos: float, gamma_neg: float, shift: float) -> None:
    logits = torch.tensor([[-200.0, -20, -3, -2.9444, 0, 20, 200]]).repeat(2, 1).requires_grad_()
    labels = torch.tensor([[0.0], [1.0]]).repeat(1, 7)
    asymmetric_loss(logits, labels, gamma_pos=gamma_pos, gamma_neg=gamma_neg, shift=shift).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_each_kind_of_labels_has_its_loss() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    many = (torch.rand(4, 3) < 0.5).float()
    assert torch.equal(build_criterion(TrainConf())(logits, labels, 0.1), cross_entropy(logits, labels, 0.1))
    assert torch.equal(
        build_criterion(TrainConf(), is_multilabel=True)(logits, many, 0.0), binary_cross_entropy(logits, many)
    )
    asl = build_criterion(TrainConf(loss=Loss.asl), is_multilabel=True)
    assert torch.equal(asl(logits, many, 0.0), asymmetric_loss(logits, many, gamma_pos=0, gamma_neg=4, shift=0.05))
    with pytest.raises(ValueError, match=r"train\.loss=ce needs exactly one label"):
        build_criterion(TrainConf(loss=Loss.ce), is_multilabel=True)


# --- names -----------------------------------------------------------------------------------------------------------


def problem(**train: object) -> str:
    found = find_problems(Conf(train=TrainConf(**train)))  # type: ignore[arg-type]
    assert len(found) == 1, found
    return found[0]


def test_names_of_metrics_are_checked() -> None:
    assert find_problems(Conf()) == []
    assert find_problems(Conf(train=TrainConf(metrics=["ece", "top5"], monitor="val/ece"))) == []
    assert "did you mean 'balanced_accuracy'" in problem(metrics=["balanced_acuracy"])
    assert "did you mean 'val/top1'" in problem(monitor="val/top_1")
    assert "did you mean 'val/top1'" in problem(monitor="val/top10", metrics=["ece"])
    assert "expected one of" in problem(monitor="val/map", metrics=["ece"])
    assert "auto stands alone" in problem(metrics=["auto", "ece"])
    assert "train.asl_shift=0.1 would be ignored" in problem(asl_shift=0.1)


def test_auto_follows_the_labels() -> None:
    assert measured_metrics(TrainConf(), is_multilabel=False) == (LABEL_METRICS, "val/top1")
    assert measured_metrics(TrainConf(), is_multilabel=True) == (MULTILABEL_METRICS, "val/map")
    few = TrainConf(metrics=["f1_micro"])
    assert measured_metrics(few, is_multilabel=True) == (("f1_micro", "map"), "val/map")
    with pytest.raises(ValueError, match="f1_micro is no metric for images with one label"):
        measured_metrics(few, is_multilabel=False)
    with pytest.raises(ValueError, match="ece is no metric for images with several labels"):
        measured_metrics(TrainConf(monitor="val/ece"), is_multilabel=True)


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_about_classes(tmp_path: Path) -> None:
    meter = LabelMeter(cross_entropy, LABEL_METRICS)
    found = metered(meter, random_scores(33, 3, 0, ties=False), random_labels(33, 3, 0, absent=False), 8)
    names = ["a,b", "ü $x$", "c"]
    for split in ("val", "test"):
        write_scores(tmp_path, split, found, details=meter.details(), classes=names)
    assert (tmp_path / "confusion.csv").read_text(encoding="utf-8").splitlines()[0] == 'true \\ predicted,"a,b",ü $x$,c'
    assert (tmp_path / "confusion_val.csv").exists() and (tmp_path / "confusion.png").stat().st_size > 5_000
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics.keys() == {"val", "test"} and "threshold" not in metrics["test"]
    several = MultilabelMeter(binary_cross_entropy, ["f1_micro"], threshold=0.25)
    found = metered(several, *multi_case(9, 3, ties=False, density=0.3), 4)
    write_scores(tmp_path, "val", found, details=several.details(), classes=names)
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["val"]["threshold"] == 0.25
    assert metrics.keys() == {"val"}, "scores of the test are of weights that are no longer the best"


@pytest.mark.parametrize("num_classes", [1, 2, 41])
def test_confusions_are_drawn_for_any_number_of_classes(tmp_path: Path, num_classes: int) -> None:
    matrix = (torch.eye(num_classes, dtype=torch.int64) * 5).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(tmp_path / "one.png", matrix, [f"class {i}" for i in range(num_classes)])
        matrix[0] = [0] * num_classes  # a class without test images
        draw_confusion(tmp_path / "two.png", matrix, [f"class {i}" for i in range(num_classes)])


# --- a run -----------------------------------------------------------------------------------------------------------


def test_offsets_answer_yes_as_often_as_the_labels_do() -> None:
    logits = random_scores(500, 4, 0, ties=False).double() * torch.tensor([1, 3, 10, 0.1]) + 25
    labels = (
        torch.rand(900, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 0.1, 0.9, 0.3])
    ).float()
    labels[:, 3] = 0
    moved = logits + offsets(logits, labels)
    torch.testing.assert_close(moved.sigmoid().mean(0), (labels.double().sum(0) + 1) / 902, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images that are bright on the left, at the top, both or neither, and their table."""
    folder = tmp_path_factory.mktemp("tagged")
    random = np.random.default_rng(0)
    lines = ["path,label"]
    for index in range(120):
        tags = [name for bit, name in ((1, "left"), (2, "top")) if index & bit] + ["any"]
        pixels = random.integers(0, 60, size=(32, 32))
        pixels[:, :16] += 150 * ("left" in tags)
        pixels[:16] += 40 * ("top" in tags)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{'|'.join(tags)}")
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("changes", [{}, {"loss": Loss.asl, "metrics": ["f1_micro"], "monitor": "val/f1_micro"}])
def test_a_run_with_several_labels_an_image(tagged: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    conf = Conf(data=DataConf(source=SourceKind.table, table=str(tagged / "table.csv"), label_separator="|"))
    conf.data.batch_size = 16
    conf.train = TrainConf(epochs=3, label_smoothing=0.05, **changes)  # type: ignore[arg-type]
    conf.augment = AugmentConf(mixup=0.2)
    assert find_problems(conf) == []
    result = run(conf, tmp_path, [], quiet=True)
    monitor = "f1_micro" if changes else "map"
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert result[f"val/{monitor}"] == max(row[f"val/{monitor}"] for row in rows) > 0.75
    assert result[f"test/{monitor}"] > 0.75 and 0 <= result["zeroshot/top1"] <= 1
    assert result[f"test/zeroshot/{monitor}"] > 0 and ("val/map" in result) == (not changes)
    assert rows[0]["train/loss"] < 1.5  # not the 20 of scores that no offset has brought down
    known = json.loads((tmp_path / "metrics.json").read_text())
    assert known["test"]["threshold"] == known["val"]["threshold"]
    assert list(known["test"]["classes"]) == ["any", "left", "top"]
    assert not (tmp_path / "confusion.csv").exists()
    _, about = read_weights(tmp_path / "checkpoints" / "best.safetensors")  # all that a prediction needs
    assert json.loads(about["is_multilabel"]) is True
    assert json.loads(about["threshold"]) == known["val"]["threshold"] > 0
    assert 0 < json.loads(read_weights(tmp_path / "checkpoints" / "last.safetensors")[1]["threshold"]) < 1
    model = build_model(with_head_bias(conf.model, is_multilabel=True), ["any", "left", "top"], load=False).model
    best = tmp_path / "checkpoints" / "best.safetensors"
    put_weights(read_weights(best)[0], model, best)


def test_the_threshold_is_that_of_the_best_f1_and_a_given_one_stays() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), (torch.rand(40, 3) > 0.6).float()
    losses = build_criterion(TrainConf(), is_multilabel=True)
    for given in (None, 0.25):
        meter = build_meter(lambda x, y: losses(x, y, 0.0), ["f1_micro"], is_multilabel=True, threshold=given)
        meter.add(logits, labels)
        found = meter.threshold()
        assert found == meter.details()["threshold"] and found is not None and given in (None, found)
        claimed = torch.sigmoid(logits) >= found
        hits = 2 * (claimed * labels).sum() / (claimed.sum() + labels.sum())
        assert meter.results()["f1_micro"] == pytest.approx(float(hits), abs=1e-6)
    single = build_meter(lambda x, y: x.sum(1), [], is_multilabel=False)
    assert single.threshold() is None
