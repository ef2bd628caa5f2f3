"""Settings that recipes need, in whole small runs: freezing by name, the resize that weights carry, dropped images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import assert_same_run, go, small

from finetune.config import (
    CacheKind,
    DataConf,
    Family,
    ModelConf,
    PrefixCache,
    Recipe,
    Resize,
    SourceKind,
    find_problems,
)
from finetune.core.preprocess import Preprocess
from finetune.models import build_model
from finetune.runs.weights import metadata_of

STEM = ["visual.conv1.*", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre.*"]


def test_a_stem_frozen_by_name_is_the_frozen_prefix(stripes: Path, tmp_path: Path) -> None:
    """Bit for bit the run with `fix_layer=0`, its cached activations included."""
    cached = {"augment__recipe": Recipe.none, "prefix__cache": PrefixCache.ram}
    go(small(stripes, optim__fix_layer=0, **cached), tmp_path / "layer")
    go(small(stripes, optim__freeze=STEM, **cached), tmp_path / "names")
    assert_same_run(tmp_path / "layer", tmp_path / "names")
    rates = [json.loads((tmp_path / name / "rates.json").read_text()) for name in ("layer", "names")]
    assert rates[0] == rates[1] and rates[0]["frozen"] == ["stem"]
    assert "train: computed once, cached (ram)" in (tmp_path / "names" / "run.log").read_text()


def test_a_run_with_parameters_frozen_by_name_stops_and_goes_on_to_the_same_bits(stripes: Path, tmp_path: Path) -> None:
    def conf(epochs: int):  # the same curve for any number of epochs
        return small(stripes, optim__freeze=[STEM[0], "*resblocks.2.*"], sched__cycle=4, train__epochs=epochs)

    go(conf(3), tmp_path / "straight")
    go(conf(2), tmp_path / "stopped")
    again = conf(3)
    again.resume = str(tmp_path / "stopped")
    go(again, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    state = torch.load(tmp_path / "stopped" / "checkpoints" / "last.pt", weights_only=True)
    learning = {name for group in state["optimizer"]["param_groups"] for name in group["param_names"]}
    assert not any("conv1" in name or "resblocks.2." in name for name in learning)
    assert {"visual.class_embedding", "visual.ln_pre.weight"} <= learning
    log = (tmp_path / "straight" / "run.log").read_text()
    assert re.search(r" 0  stem .*  learns, [\d,]+ frozen", log) and re.search(r" 3  block\.3 .*  frozen", log)


@pytest.mark.parametrize("resize", [Resize.shortest, Resize.squash, Resize.pad])
@pytest.mark.parametrize("cache", [CacheKind.none, CacheKind.ram])
def test_weights_carry_the_resize_of_their_run(tmp_path: Path, resize: Resize, cache: CacheKind) -> None:
    """So a run from these weights sees images as they were trained, without the settings."""
    random = np.random.default_rng(0)
    for name in ("tall", "wide"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(12):
            shape = (50, 31, 3) if name == "tall" else (27, 60, 3)
            pixels = random.integers(0, 255, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    conf = small(tmp_path / "data", data__resize=resize, data__cache=cache, augment__recipe=Recipe.none)
    conf.model = ModelConf(family=Family.vit, name="glyph_vit")
    if resize == Resize.shortest:
        conf.data.eval_resize = 39
    go(conf, tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    stored = Preprocess(**json.loads(metadata_of(best)["preprocess"]))
    size = stored.size
    assert stored.resize == {"shortest": "crop", "squash": "squash", "pad": "pad"}[resize]
    assert stored.shorter_side == (39 if resize == Resize.shortest else size)
    again = build_model(ModelConf(family=Family.vit, name="glyph_vit", pretrained=str(best)), ["tall", "wide"])
    assert again.preprocess.as_dict() == stored.as_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data__eval_resize": 20, "data__resize": Resize.shortest},
            ["data.eval_resize=20", "smaller than the 32 pixels"],
        ),
        ({"data__eval_resize": 40}, ["would be ignored: these weights squash", "data.resize=shortest"]),
        ({"optim__freeze": ["visual.conv2.*"]}, ["'visual.conv2.*' matches no parameter", "'visual.conv1."]),
        ({"optim__freeze": STEM, "optim__fix_layer": 0}, ["'visual.conv1.*' would be ignored", "optim.fix_layer=0"]),
        ({"optim__freeze": [STEM[0]], "prefix__cache": "ram"}, ["prefix.cache=ram would be ignored", "optim.freeze"]),
        ({"sched__min_lr": 1.0}, ["sched.min_lr=1", "less than the peak rate, 0.001"]),
    ],
)
def test_what_only_the_model_can_tell_is_one_line(
    stripes: Path, tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"\.") as caught:
        go(small(stripes, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_batch_that_memory_makes_still_holds_the_groups_that_are_mixed(stripes: Path, tmp_path: Path) -> None:
    """With `data.batch_size=fit` nobody knows the micro-batch before the model runs on the device."""
    mixed = {"augment__recipe": Recipe.crop, "augment__mixup": 0.8, "augment__mix_images": 80}
    conf = small(stripes, data__batch_size=0, **mixed)
    assert not find_problems(conf)
    with pytest.raises(ValueError, match=r"batch_size=fit came to 64 images: augment\.mix_images=80: .* at most 64"):
        go(conf, tmp_path / "run")


def test_the_last_images_of_an_epoch_are_dropped_where_they_fill_no_step(stripes: Path, tmp_path: Path) -> None:
    """36 training images in steps of 2 x 5: 3 whole ones, other images every epoch; all 36 where a step takes 40."""
    steps, cut = {}, {"data__val_fraction": 0.1, "data__test_fraction": 0.3}
    for name, changes in {
        "kept": {"train__accumulate": 2},
        "dropped": {"train__accumulate": 2, "data__drop_last": True},
        "one": {"train__accumulate": 8, "data__drop_last": True},
    }.items():
        go(small(stripes, data__batch_size=5, sched__interval="step", **cut, **changes), tmp_path / name)
        state = torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)
        steps[name] = state["counters"]["step"]
        said = "leaves out 6 images of 36, other ones each time, since a step takes 10"
        log = (tmp_path / name / "run.log").read_text()
        assert (said in log) == ("leaves out" in log) == (name == "dropped")
    assert steps == {"kept": 2 * 4, "dropped": 2 * 3, "one": 2 * 1}


def test_the_threshold_of_the_test_is_that_of_the_best_weights(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{name}/{i}.png,{name}{'|odd' if i % 2 else ''}" for name in ("across", "down") for i in range(20)]
    table = stripes / "several.csv"
    table.write_text("\n".join(["path,label", *lines]))
    data = DataConf(source=SourceKind.table, table=str(table), label_separator="|", batch_size=8)
    conf = small(stripes, model=ModelConf(family=Family.vit, name="glyph_vit"), data=data)
    monkeypatch.setattr("finetune.app.training.write_scores", lambda *args: None)  # so metrics.json has no `val`
    go(conf, tmp_path / "run")
    stored = metadata_of(tmp_path / "run" / "checkpoints" / "best.safetensors")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["threshold"] == json.loads(stored["threshold"])
