"""Laws of texts: on the command line each is the text that was typed; yaml that reads it otherwise is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.words.configuration import compose, read_settings
from finetune.system.errors import ConfigError

WORDS = [
    "1_1",
    "010",
    "08",
    "1e3",
    "yes",
    "No",
    "true",
    "off",
    "null",
    "~",
    "0x1F",
    "12:30",
    ".5",
    "1.",
    "-1",
    "inf",
    "7",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_text_is_what_was_typed(word: str) -> None:
    table = ["data=table", "data.table=x.csv"]
    assert compose([*table, f"data.classes=[{word}, dog]"]).data.classes == [word, "dog"]
    assert compose([*table, f"data.classes=['{word}',\"a,b\"]"]).data.classes == [word, "a,b"]
    if word not in ("null", "~"):
        assert compose([*table, f"data.path_column={word}"]).data.path_column == word
        assert compose(["data=hf", f"data.name={word}"]).data.name == word
    found = read_settings([*table, f"data.split_column={word},b"], multirun=True)
    assert found.jobs == 2 and str(found.conf.data.split_column) in (word, "None")


def test_a_text_that_is_read_as_a_number_within_brackets_asks_for_quotes() -> None:
    for word in ("data={classes: [1_1,b]}", "data.name=choice(1_1,1_2)", "data={label_column: true}"):
        with pytest.raises(ConfigError, match=r"read as \w+; put each text in quotes"):
            read_settings(["data=hf", word], multirun=True)
    assert compose(["data=table", "data.table=x", "data={classes: ['1_1',b, 7]}"]).data.classes == ["1_1", "b", "7"]
    assert read_settings(["data.workers=choice(2,4)"], multirun=True).jobs == 2


def test_numbers_and_words_of_other_settings_stay() -> None:
    conf = compose(["optim.lr=1e-3", "data.download=yes", "data.workers=4", "seed=7", "data=hf", "data.name=x"])
    assert (conf.optim.lr, conf.data.download, conf.data.workers, conf.seed) == (1e-3, True, "4", 7)


@pytest.mark.parametrize("word", [word for word in WORDS if word not in ("null", "~", "08", "7", "-1", "1.", "inf")])
@pytest.mark.parametrize("where", ["data", "experiment"])
def test_yaml_that_reads_a_text_otherwise_is_refused(tmp_path: Path, word: str, where: str) -> None:
    (tmp_path / where).mkdir()
    text = "table: x.csv\nsource: table\nclasses: [{}, dog]\n"
    if where == "experiment":
        text = "# @package _global_\ndata:\n  " + text.replace("\n", "\n  ").rstrip() + "\n"

    def read(written: str) -> list[str]:
        (tmp_path / where / "mine.yaml").write_text(text.format(written))
        return compose([f"{where}=mine"], str(tmp_path)).data.classes

    assert read(f"'{word}'") == [word, "dog"]
    try:
        assert read(word) == [word, "dog"]  # some that look like numbers are texts to OmegaConf
    except ConfigError as error:
        (line,) = error.problems
        assert f"mine.yaml, line {3 if where == 'data' else 5}: data.classes: yaml reads {word} as" in line
        assert f"put it in quotes: '{word}'" in line


def test_yaml_that_is_certainly_read_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for word in ("yes", "no", "010", "1_1", "1e3", "0x1F"):
        (tmp_path / "data" / "mine.yaml").write_text(f"source: table\ntable: x\nlabel_column: {word}\n")
        with pytest.raises(ConfigError, match=rf"line 3: data\.label_column: yaml reads {word} as"):
            compose(["data=mine"], str(tmp_path))
