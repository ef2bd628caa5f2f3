"""The rule for what nobody set, and the head that is chosen: what they look at, leave alone and record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import assert_same_run

from finetune.__main__ import main
from finetune.app.rule import choose
from finetune.config import RULED, Conf
from finetune.config.words.configuration import compose

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def chosen(conf: Conf, images: int, parameters: int = 1_200_000) -> dict[str, object]:
    return {choice.name: choice.value for choice in choose(conf, images=images, parameters=parameters)}


@pytest.mark.parametrize(
    ("images", "epochs", "batch"),
    [(3, 40, 8), (100, 40, 8), (256, 40, 16), (500, 20, 16), (1_079, 10, 16), (3_300, 10, 64), (1_281_167, 10, 64)],
)
def test_small_data_get_more_epochs_and_smaller_batches(images: int, epochs: int, batch: int) -> None:
    found = chosen(Conf(auto=list(RULED)), images)
    assert (found["train.epochs"], found["data.batch_size"]) == (epochs, batch)


def test_the_batch_follows_the_epochs_that_the_user_set() -> None:
    for epochs, batch in ((1, 8), (4, 8), (8, 16), (50, 64)):
        found = chosen(compose([f"train.epochs={epochs}"]), 1_000)
        assert found["data.batch_size"] == batch and "train.epochs" not in found
    assert chosen(compose(["train.epochs=50", "train.accumulate=4"]), 1_000)["data.batch_size"] == 24


def test_a_larger_network_gets_a_smaller_rate_and_one_from_scratch_no_decay() -> None:
    conf = compose([])
    rates = [chosen(conf, 1_000, parameters)["optim.lr"] for parameters in (10_000, 1_200_000, 86_000_000, 10**10)]
    assert rates[0] == rates[1] == 1e-3 and rates == sorted(rates, reverse=True) and 0 < rates[3] < rates[2] < 3e-4
    assert chosen(conf, 1_000)["optim.layer_decay"] == 0.75
    assert chosen(compose(["model=vit", "model.pretrained=none"]), 1_000)["optim.layer_decay"] == 1.0


def test_no_last_batch_of_one_image_and_no_batch_that_mixing_cannot_use() -> None:
    for images in (65, 97, 129, 193, 257, 641):
        assert images % int(str(chosen(compose(["train.epochs=5"]), images)["data.batch_size"])) != 1, images
    conf = compose(["augment.mixup=0.8", "augment.mix_images=16"])
    assert chosen(conf, 20)["data.batch_size"] == 16


@pytest.mark.parametrize("name", PRESETS)
def test_published_recipes_stay_as_published(name: str) -> None:
    conf = compose([f"experiment={name}"])
    assert not {"optim.lr", "train.epochs"} & {*conf.auto}
    found = chosen(conf, 300, 86_000_000)
    assert found.get("optim.layer_decay", 0.75) == 0.75 and found.get("sched.warmup", 0) == 0
    if name != "digits_probe":
        assert "data.batch_size" not in found and "optim.layer_decay" not in found


def test_other_optimizers_and_rates_relative_to_a_batch_keep_their_own() -> None:
    assert "optim.lr" not in compose(["optim=sgd"]).auto and "optim.lr" in compose(["optim=muon"]).auto
    assert chosen(compose(["optim.name=lamb"]), 100, 86_000_000)["optim.lr"] == 1e-3
    found = chosen(compose(["optim.lr_base_batch=256"]), 100, 86_000_000)
    assert (found["data.batch_size"], found["optim.lr"]) == (64, 1e-3)


def test_the_word_auto_stands_where_a_number_does() -> None:
    assert compose([]).auto == list(RULED)
    assert compose(["optim.lr=1e-3", "data.batch_size=fit"]).auto == [
        name for name in RULED if name not in ("optim.lr", "data.batch_size")
    ]
    assert "train.epochs" in compose(["experiment=mkt", "train.epochs=auto"]).auto
    for word in ("optim.lr=Auto", "train.epochs=automatic", "optim.weight_decay=auto"):
        with pytest.raises(ValueError, match=r"expected a (whole )?number"):
            compose([word])


def test_what_is_chosen_is_shown_recorded_and_found_again(folder: Path, stripes: Path, capsys) -> None:
    words = ["model=vit", "data=folder", f"data.root={stripes}", "train.epochs=1", "hydra.run.dir=run"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "chosen by the rule" in shown.out + shown.err and "data.batch_size=8" in shown.out + shown.err
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["data"]["batch_size"] == 8 and "auto" not in (recorded["optim"]["lr"], recorded["train"]["epochs"])
    assert set(recorded["chosen"]) == {*RULED} - {"train.epochs"}
    before = Path("run/history.jsonl").read_bytes()
    assert main(words) == 0 and "nothing to do" in capsys.readouterr().out  # the same command: the same configuration
    assert main([*words, "optim.lr=1e-2"]) == 1
    assert "optim.lr: 0.001 -> 0.01" in capsys.readouterr().err
    # What the run chose is the run's: more images or another rule later change nothing about it.
    assert main(["resume=run", "train.epochs=2"]) == 0
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["data"]["batch_size"] == 8 and recorded["train"]["epochs"] == 2
    assert Path("run/history.jsonl").read_bytes().startswith(before)


def test_a_run_that_was_killed_before_it_chose_chooses_then(folder: Path, stripes: Path) -> None:
    words = ["model=vit", "data=folder", f"data.root={stripes}", "train.epochs=1", "hydra.run.dir=run"]
    assert main(words) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    del config["chosen"]
    config["optim"]["lr"] = config["data"]["batch_size"] = "auto"
    for path in (Path("run/checkpoints").iterdir(), [Path("run/history.jsonl"), Path("run/result.json")]):
        for one in path:
            one.unlink()
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert main(["resume=run"]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["data"]["batch_size"] == 8 and config["chosen"] == ["data.batch_size", "optim.lr"]
    assert json.loads(Path("run/result.json").read_text())["status"] == "finished"


def test_a_list_of_what_was_chosen_is_checked_when_it_is_read(folder: Path, stripes: Path, capsys) -> None:
    assert main(["model=vit", "data=folder", f"data.root={stripes}", "train.epochs=1", "hydra.run.dir=run"]) == 0
    text = Path("run/config.yaml").read_text()
    for other in ("chosen: 3\n", "chosen:\n- optim.betas\n", "chosen:\n- {a: 1}\n"):
        Path("run/config.yaml").write_text(text.partition("chosen:")[0] + other)
        assert main(["resume=run"]) == 1
        assert "chosen: expected a list out of" in capsys.readouterr().err


def test_what_was_chosen_must_go_with_what_was_set(folder: Path, stripes: Path, capsys) -> None:
    words = ["model=vit", "data=folder", f"data.root={stripes}", "sched.warmup=60"]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert "sched.warmup=60: must be less than" in told and "train.epochs=40" in told and "Traceback" not in told


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Three classes of noise whose names say nothing of it: zero-shot is at chance."""
    random = np.random.default_rng(0)
    for index, name in enumerate(("seven", "ampersand", "letter k")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(16):
            pixels = random.normal(60 + 70 * index, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_a_zero_shot_head_at_chance_gives_way_to_a_random_one(folder: Path, strange: Path, capsys) -> None:
    words = ["data=folder", f"data.root={strange}", "train.epochs=1", "optim.lr=1e-3", "data.batch_size=8"]
    assert main([*words, "hydra.run.dir=run"]) == 0
    shown = capsys.readouterr()
    assert "model.head=random: zero-shot gives" in shown.out + shown.err
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["model"]["head"] == "random" and "model.head" in recorded["chosen"]
    assert main([*words, "hydra.run.dir=run"]) == 0 and "nothing to do" in capsys.readouterr().out
    # The same weights, to the last bit, as where the user says random.
    assert main([*words, "model.head=random", "hydra.run.dir=said"]) == 0
    assert_same_run(Path("run"), Path("said"))
    assert main([*words, "model.head=zeroshot", "hydra.run.dir=kept"]) == 0
    assert json.loads(Path("kept/result.json").read_text())["zeroshot/top1"] < 0.8


def test_a_zero_shot_head_that_knows_the_classes_stays(folder: Path, capsys) -> None:
    words = ["train.epochs=1", "data.shots=4", "data.batch_size=8", "hydra.run.dir=run"]
    assert main(words) == 0
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["model"]["head"] == "zeroshot" and "model.head" in recorded["chosen"]
    assert json.loads(Path("run/result.json").read_text())["zeroshot/top1"] > 0.9
    assert main(["resume=run", "train.epochs=2"]) == 0


def test_choosing_replaces_only_what_is_open() -> None:
    conf = dataclasses.replace(compose(["optim.lr=1e-2"]))
    taken = conf.choose({"optim.lr": 1.0, "data.batch_size": 8, "model.head": "random"})
    assert taken.optim.lr == 1e-2 and taken.data.batch_size == 8 and taken.model.head == "random"
    assert taken.chosen == ["data.batch_size", "model.head"] and "data.batch_size" not in taken.auto
    assert conf.data.batch_size == 64 and conf.chosen == []
