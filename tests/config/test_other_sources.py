"""Laws of the shares of the splits: those of the digits are for the digits alone, wherever the source is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.words.configuration import compose, read_settings
from finetune.system.errors import ConfigError

OWN, DIGITS = (0.1, 0.1), (0.1, 0.3)
EXPERIMENT = "# @package _global_\n{defaults}data:\n  source: {source}\n  root: pictures\n{more}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def shares(*words: str, config_dir: str | None = None) -> tuple[float, float]:
    """The shares of val and test; the same again from the words that each job of a sweep gets."""
    prepared = read_settings(list(words), config_dir=config_dir)
    again = compose(prepared.overrides, config_dir).data
    assert again == prepared.conf.data
    assert (prepared.cfg.data.val_fraction, prepared.cfg.data.test_fraction) == (
        again.val_fraction,
        again.test_fraction,
    )
    return again.val_fraction, again.test_fraction


@pytest.mark.parametrize(
    "words",
    [
        ["data.source=folder", "data.root=x"],
        ["data.source='folder'", "data.root=x"],
        ['data.source="folder"', "data={root: x}"],
        ["data={source: folder, root: x}"],
        ["data={source: 'webdataset'}", "data.root=x"],
        ["data={source: table, table: x.csv}", "data.on_error=skip"],
        ["data.source=hf", "data.name=beans"],
        ["data=digits", "data.source=folder", "data.root=x"],
        ["data.source=${oc.env:OWN_SOURCE}", "data.root=x"],
        ["experiment=digits_probe", "data.source=folder", "data.root=x"],
        ["data.source=folder", "data.root=x", "data.val_fraction=0.1"],
    ],
)
def test_other_images_have_their_own_shares(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_SOURCE", "folder")
    assert shares(*words) == OWN


def test_the_digits_keep_theirs() -> None:
    for words in ([], ["data=digits"], ["data.source=digits"], ["data={source: digits}"], ["experiment=digits_probe"]):
        assert shares(*words) == DIGITS
    assert not read_settings(["data.source=digits"]).overrides[1:]


def test_what_a_person_says_stays() -> None:
    given = ["data.source=folder", "data.root=x"]
    assert shares(*given, "data.test_fraction=0.3") == DIGITS
    assert shares("data={source: folder, root: x, test_fraction: 0.3}") == DIGITS
    assert shares(*given, "data.val_fraction=0", "data.test_fraction=0") == (0, 0)
    # 0.75 and the 0.3 of the digits would leave nothing to learn.
    assert shares(*given, "data.val_fraction=0.75") == (0.75, 0.1)


def test_files_of_a_person_have_the_shares_of_their_source() -> None:
    write("conf/experiment/plain.yaml", EXPERIMENT.format(defaults="", source="folder", more=""))
    write("conf/experiment/quoted.yaml", EXPERIMENT.format(defaults="", source='"webdataset"', more=""))
    over = "defaults:\n  - override /data: digits\n"
    write("conf/experiment/over.yaml", EXPERIMENT.format(defaults=over, source="folder", more=""))
    write("conf/experiment/third.yaml", EXPERIMENT.format(defaults="", source="folder", more="  test_fraction: 0.3\n"))
    for name in ("plain", "quoted", "over"):
        assert shares(f"experiment={name}") == OWN
    assert shares("experiment=third") == DIGITS
    assert shares("experiment=[digits_probe,plain]") == OWN
    assert shares("experiment=plain", "data.source=digits", "data.root=null") == DIGITS


def test_data_files_of_a_person_have_the_shares_of_their_source() -> None:
    write("conf/data/mine.yaml", "source: folder\nroot: x\n")
    write("conf/data/built_on.yaml", "defaults: [digits, _self_]\nsource: folder\nroot: x\n")
    write("other/data/digits.yaml", "source: folder\nroot: x\ntest_fraction: 0.2\n")
    assert shares("data=mine") == shares("data=built_on") == OWN
    assert shares(config_dir="other") == (0.1, 0.2)  # this file is theirs, whatever its name


def test_the_primary_file_of_a_person_counts(tmp_path: Path) -> None:
    primary = "defaults:\n  - finetune_schema\n  - model: clip\n  - data: digits\n  - optim: adamw\n  - sched: linear\n"
    primary += "  - augment: light\n  - _self_\n  - experiment: null\n"
    write("mine/config.yaml", primary + "data:\n  source: folder\n  root: x\n")
    assert shares(config_dir="mine") == OWN


def test_every_job_of_a_sweep_has_the_shares_of_its_source() -> None:
    write("conf/experiment/a.yaml", EXPERIMENT.format(defaults="", source="folder", more=""))
    write("conf/experiment/b.yaml", EXPERIMENT.format(defaults="", source="webdataset", more="  fraction: 0.5\n"))
    for words in (["experiment=a,b"], ["data.source=folder,webdataset", "data.root=x"], ["experiment=a", "seed=1,2"]):
        prepared = read_settings(words, multirun=True)
        assert prepared.jobs == 2
        assert "data.test_fraction=0.1" in prepared.overrides and "data.test_fraction=0.1" in prepared.first
    for words in (["experiment=a,digits_probe"], ["data.source=digits,folder"]):
        with pytest.raises(ConfigError, match=r"test_fraction is another one for the digits.*such as data=digits"):
            read_settings(words, multirun=True)
