r"""Laws of references `${...}`: filled in before rules are applied, named where they cannot be, and never leaked."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from finetune.__main__ import main
from finetune.config.environment import escaped, is_local_path, plain
from finetune.config.words.configuration import compose, read_settings
from finetune.system import terminal
from finetune.system.errors import ConfigError


def refused(*words: str, multirun: bool = False) -> str:
    with pytest.raises(ConfigError) as error:
        read_settings(words, multirun=multirun)
    return str(error.value)


@pytest.fixture
def variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An empty folder to work in, with IMG set and MISSING not."""
    monkeypatch.setenv("IMG", "/some/where")
    monkeypatch.delenv("MISSING", raising=False)
    return monkeypatch


def test_a_reference_counts_before_rules_are_applied(variables: pytest.MonkeyPatch) -> None:
    own = Path("conf/data/mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("source: folder\nroot: ${oc.env:IMG}\n")
    assert compose(["data=mine"]).data.root == "/some/where"
    assert compose(["data=folder", "data.root=${oc.env:IMG}/b"]).data.root == "/some/where/b"
    assert compose(["data=folder", "data.root=${oc.env:MISSING,/other}"]).data.root == "/other"
    assert compose(["seed=3", "data.shots_seed=${seed}", "data.shots=1"]).data.shots_seed == 3
    variables.setenv("N", "7")
    assert compose(["seed=${oc.env:N}"]).seed == compose(["seed=${oc.decode:${oc.env:N}}"]).seed == 7
    assert compose(["data.classes=[a,'${oc.env:N}']"]).data.classes == ["a", "7"]
    assert compose(["data.classes=${oc.decode:'[a,b]'}"]).data.classes == ["a", "b"]
    assert compose(["data=hf", r"data.name=\${x}"]).data.name == "${x}"
    variables.setenv("M", "vit")
    assert compose(["model=${oc.env:M}"]).model.family == "vit"
    # Rules see the value: this was 'needs data.root=PATH', or nothing at all.
    variables.setenv("EMPTY", "")
    assert "data=folder needs data.root=PATH" in refused("data=folder", "data.root=${oc.env:EMPTY}")
    variables.setenv("N", "-7")
    assert "seed=-7: must be at least 0" in refused("seed=${oc.env:N}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["data=folder", "data.root=${oc.env:MISSING}"],
            "data.root=${oc.env:MISSING}: the environment variable MISSING",
        ),
        (["seed=${oc.env:MISSING}"], "or give a default: ${oc.env:MISSING,VALUE}"),
        (["optim={lr: ${oc.env:MISSING}}"], "optim.lr=${oc.env:MISSING}: the environment"),
        (["data.classes=[a,'${oc.env:MISSING}']"], "data.classes=['a','${oc.env:MISSING}']: the environment"),
        (["hydra.run.dir=${oc.env:MISSING}"], "hydra.run.dir=${oc.env:MISSING}: the environment"),
        (["resume=${oc.env:MISSING}"], "resume=${oc.env:MISSING}: the environment"),
        (["model=${oc.env:MISSING}"], "model=${oc.env:MISSING}: the environment"),
        (["seed=${oc.evn:N}"], "no such resolver oc.evn (did you mean 'oc.env'?)"),
        (["optim.lr=${optim.lrr}"], "no such setting optim.lrr (did you mean 'optim.lr'?)"),
        (["seed=${seed}"], "seed=${seed}: it refers to itself"),
        (["optim.lr=${optim.weight_decay}", "optim.weight_decay=${optim.lr}"], "it refers to itself"),
        (["model=${oc.env:IMG}"], "model=${oc.env:IMG}: what it stands for is no choice"),
    ],
)
def test_what_cannot_be_filled_in_is_named(variables: pytest.MonkeyPatch, words: list[str], expected: str) -> None:
    assert expected in refused(*words)


def test_a_value_from_the_environment_that_does_not_fit_is_not_shown(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("SECRET", "hunter22")
    assert "hunter22" not in (text := refused("seed=${oc.env:SECRET}")) and "seed=${oc.env:SECRET}" in text


def test_every_value_of_a_sweep_is_filled_in_and_checked(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("A", "1")
    variables.setenv("B", "-2")
    text = refused("seed=${oc.env:A},${oc.env:B},${oc.env:MISSING}", multirun=True)
    assert "seed=-2: must be" in text and "MISSING is not set" in text
    assert read_settings(["seed=${oc.env:A},5"], multirun=True).jobs == 2


@given(st.text(alphabet="\\${}a:.", max_size=12))
def test_plain_text_survives_being_recorded(text: str) -> None:
    assert plain(escaped(text)) == text
    assert OmegaConf.create({"x": escaped(text)}).x == text


def test_what_is_a_path_on_this_machine(folder: Path) -> None:
    (folder / "here").mkdir()
    for text in ("/nowhere", "~/x", "./x", "here", "here/x.csv"):
        assert is_local_path(text), text
    for text in ("https://host/x", "pipe:cat x", "here::s3://x/y", "abc", "abc/def", ""):
        assert not is_local_path(text), text


def shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(24):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            for ending, data in (("png", buffer.getvalue()), ("cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def everything_in(run: Path) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in run.rglob("*") if path.is_file())


def test_a_secret_of_the_environment_stays_there(
    variables: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(folder / "0.tar")
    variables.setenv("TOKEN", "s3cr3t-t0ken")
    variables.setenv("BASE", str(folder))
    root = "data.root=pipe:cat ${oc.env:BASE}/0.tar # ${oc.env:TOKEN}"
    words = ["data=webdataset", "data.download=true", "data.cache_dir=${oc.env:BASE}/cache", "train.epochs=1"]
    words += ["data.workers=0", "augment=none", "hydra.run.dir=run", "optim.fix_layer=3", "data.batch_size=8"]
    assert main([*words, root]) == 0
    saved = yaml.safe_load((folder / "run" / "config.yaml").read_text())["data"]
    assert saved["root"] == root.removeprefix("data.root=")  # an address: the reference
    assert saved["cache_dir"] == f"{folder}/cache"  # a path: in clear
    assert f"data.root='{saved['root']}'" in json.loads((folder / "run" / "result.json").read_text())["overrides"]
    assert "s3cr3t-t0ken" not in everything_in(folder / "run") + "".join(capsys.readouterr())
    # The same command finds its own run; another one is refused, and names no secret either.
    assert main([*words, root]) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*words, "data.root=pipe:cat 0.tar", "seed=1"]) == 1
    assert "data.root: pipe:cat ${oc.env:BASE}/0.tar # ${oc.env:TOKEN} ->" in capsys.readouterr().err
    # A file in a folder, which may come from anybody, asks the environment for nothing.
    assert main(["resume=run", "train.epochs=2"]) == 1
    text = capsys.readouterr().err
    assert "config.yaml: data.root came from the environment" in text and "s3cr3t" not in text
    assert main(["resume=run", root, "train.epochs=2"]) == 0
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["data"]["root"] == saved["root"]
    assert "s3cr3t-t0ken" not in everything_in(folder / "run") + "".join(capsys.readouterr())


def test_a_failing_address_does_not_show_its_secret(
    variables: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables.setenv("TOKEN", "s3cr3t-t0ken")
    root = "data.root=pipe:echo the token is ${oc.env:TOKEN} >&2; exit 127"
    assert main(["data=webdataset", "data.download=true", "data.cache_dir=cache", "hydra.run.dir=run", root]) == 1
    assert "the token is ${oc.env:TOKEN}" in (text := "".join(capsys.readouterr())) and "s3cr3t" not in text
    assert "s3cr3t" not in everything_in(folder / "run")


@pytest.mark.parametrize("secret", ["k3y", "pw42", "a.b-c", "x+y?z"])
def test_a_short_secret_is_hidden_where_it_is_a_word_of_its_own_or_a_part_of_the_settings_words(
    variables: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str], secret: str
) -> None:
    variables.setattr(terminal, "_hidden", {})
    variables.setenv("TOKEN", secret)
    root = "data.root=pipe:echo 'is ${oc.env:TOKEN} or pre${oc.env:TOKEN} (${oc.env:TOKEN})' >&2; exit 127"
    assert main(["data=webdataset", "data.download=true", "data.cache_dir=cache", "hydra.run.dir=run", root]) == 1
    assert "is ${oc.env:TOKEN} or " in (text := "".join(capsys.readouterr()))
    assert secret not in text + everything_in(folder / "run")


def test_a_short_text_of_the_environment_changes_no_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_hidden", {})
    for secret in ("cat", "7", "is"):
        terminal.hide(secret, r"${oc.env:A}\1")
    assert terminal.printable("concatenate 7 cats: this is 0.7") == "concatenate 7 cats: this is 0.7"
    assert terminal.printable("cat cat_1 'cat' cats") == r"${oc.env:A}\1 ${oc.env:A}\1_1 '${oc.env:A}\1' cats"
