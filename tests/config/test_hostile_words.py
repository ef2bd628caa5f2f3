"""Yaml files and words of a person that are too large, too deep or no yaml end in one line that names them, soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.config.words.configuration import compose, read_settings
from finetune.system.errors import ConfigError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(i + 1)}: &{chr(i + 1)} [{', '.join([f'*{chr(i)}'] * 9)}]\n" for i in range(ord("a"), ord("l"))
)
FILES: dict[bytes, str] = {
    b"[" * 20_000: "50 levels",
    b"optim: " + b"{a: " * 20_000: "50 levels",
    b"- " * 20_000: "50 levels",
    b"optim: &a {lr: *a}": "contains itself",
    b"optim: &a\n  lr: 1\n  <<: *a": "contains itself",
    LAUGHS.encode(): "100,000 values",
    b"optim: {lr: " + b"1:" * 300_000 + b"1}": "400 digits",
    b"seed: " + b"1" * 5_000: "400 digits",
    b"- 1\n- 2": "expected lines like",
    b"optim:\n\tlr: 1": "line 3",
    b"seed: 1\0": "special characters",
    "# é\nseed: 1".encode("latin-1"): "UTF-8",
    b"seed: !!python/object/apply:os.system [x]": "line 2",
    b'optim: {lr: !!float ""}': "not of its type",
    b"? [a]\n: 1": "line 2",
    b"seed: [1": "line",
}


@pytest.fixture
def conf(folder: Path) -> Path:
    (folder / "conf" / "experiment").mkdir(parents=True)
    return folder / "conf"


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["--cfg", "job", *words]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 5_000 and "at fault" not in err
    return err


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_a_yaml_file_that_cannot_be_read_is_named_also_where_another_file_brings_it_in(
    conf: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (conf / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + content)
    text = refusal(capsys, "experiment=mine")
    assert "conf/experiment/mine.yaml" in text
    assert FILES[content] in text
    (conf / "experiment" / "above.yaml").write_text("# @package _global_\ndefaults:\n  - mine\n")
    refusal(capsys, "experiment=above")


def test_aliases_that_end_are_fine(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "# @package _global_\noptim: &a {lr: 0.5}\nsched: {warmup: 3}\n"
    (conf / "experiment" / "mine.yaml").write_text(text)
    assert main(["--cfg", "job", "experiment=mine"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="no pipes in folders")
@pytest.mark.parametrize("place", ["experiment/mine.yaml", "config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "huge", "device"])
def test_what_is_no_small_file_neither_blocks_nor_fills_memory(
    conf: Path, capsys: pytest.CaptureFixture[str], place: str, kind: str
) -> None:
    path = conf / place
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 5 * 2**30)
    problem = "5,368,709,120 bytes" if kind == "huge" else "it is no regular file"
    if place == "config.yaml":  # nobody knows whether it is ours, so it is not passed over
        text = refusal(capsys)
        assert "conf/config.yaml: cannot be read" in text and "move it" in text
        assert kind != "huge" or problem in text
    else:
        assert problem in refusal(capsys, "experiment=mine")


def test_a_config_yaml_that_is_no_text_is_not_passed_over(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (conf / "config.yaml").write_bytes("name: \u00e4\n".encode("utf-16"))
    assert "conf/config.yaml: cannot be read: not saved as UTF-8 text; move it" in refusal(capsys)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr=" + "[" * 200_000, "200,009 letters"),
        ("data.classes=" + "[" * 3_000, "50 brackets"),
        ("data.classes=" + "[" * 300 + "]" * 300, "50 brackets"),
        ("optim={" + "a:{" * 5_000, "50 brackets"),
        ("data.name=" + "${a:" * 5_000, "50 brackets"),
        ("optim.lr=" + "range(0," * 5_000, "50 brackets"),
        ("seed=" + "1" * 5_000, "seed="),
        ("optim.lr=" + "1" * 5_000, "optim.lr="),
        ("data.name='" + "\\" * 100_001, "data.name="),
        ("data.name=" + "\\" * 100_001, "data.name="),
        ("x" * 100_000 + "=1", "no such setting"),
        ("--" + "x" * 100_000, "no such flag"),
        ("model=" + "x" * 100_000, "model=xxx"),
    ],
    ids=range(13),
)
def test_a_word_beyond_all_bounds_is_one_short_line(
    folder: Path, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert expected in refusal(capsys, word)


def put(kind: str, path: Path) -> None:
    """Put something else than a yaml file into the place of one."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"broken": "/nowhere/x.yaml", "loop": path.name, "device": "/dev/zero"}[kind])


@pytest.mark.parametrize("kind", ["pipe", "folder", "broken", "loop", "device"])
@pytest.mark.parametrize("group", ["experiment", "data", "model"])
def test_a_choice_that_is_no_readable_file_is_named_and_not_looked_for_elsewhere(
    conf: Path, capsys: pytest.CaptureFixture[str], kind: str, group: str
) -> None:
    (conf / group).mkdir(exist_ok=True)
    put(kind, conf / group / "mine.yaml")
    assert f"conf/{group}/mine.yaml: cannot be read: " in (text := refusal(capsys, f"{group}=mine"))
    assert "no such choice" not in text
    entry = "mine" if group == "experiment" else f"override /{group}: mine"
    (conf / "experiment" / "above.yaml").write_text(f"# @package _global_\ndefaults:\n  - {entry}\n")
    assert f"conf/{group}/mine.yaml: cannot be read: " in refusal(capsys, "experiment=above")


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ("[no]", "yaml reads no as no text; put it in quotes: 'no'"),
        ("[{model: no}]", "yaml reads no as no text"),
        ("[{data: [digits, 010]}]", "yaml reads 010 as no text"),
        ("3", "expected a list"),
        ("{model: clip}", "expected a list"),
        ("[[clip]]", "expected lines like `- model: clip`"),
        ("[{model: clip, data: digits}]", "expected lines like `- model: clip`"),
    ],
)
@pytest.mark.parametrize("group", ["experiment", "model"])
def test_a_bad_list_of_defaults_is_named_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, defaults: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / "conf" / group / "mine.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\n")
    with pytest.raises(ConfigError) as caught:
        compose([f"{group}=mine"])
    assert str(caught.value).startswith(f"conf/{group}/mine.yaml, line 2: defaults: ") and words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("optim: {lr: 1e-4}\n", "`# @package _global_`")])
def test_an_experiment_that_sets_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^conf/experiment/mine\.yaml, line 1: ") as caught:
        compose(["experiment=mine"])
    assert words in str(caught.value)


@pytest.mark.parametrize("typed", ["model=${oc.env:A_TOKEN}", "data=[${oc.env:A_TOKEN}]", "model=x${oc.env:A_TOKEN}"])
def test_a_choice_from_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setenv("A_TOKEN", "hunter2-hunter2")
    with pytest.raises(ConfigError) as caught:
        compose([typed])
    assert "hunter2" not in str(caught.value) and "A_TOKEN" in str(caught.value)


@pytest.mark.parametrize("word", [r"hydra.run.dir=a/\${x}/b", r"hydra.run.dir='\${now:%Y}'"])
def test_a_folder_that_a_reference_would_have_named_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="in its name can not be used"):
        compose([word])
    assert not list(tmp_path.iterdir())


def test_a_sweep_whose_jobs_share_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="every job of a sweep needs a folder of its own"):
        read_settings(["seed=0,1", r"hydra.sweep.subdir=\${hydra.job.num}"], multirun=True)
