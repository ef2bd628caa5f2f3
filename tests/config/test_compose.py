"""Laws of the configuration: our pass and Hydra agree, every choice composes, every mistake is one line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.commands.flags import configure, parse_command_line
from finetune.config import RULED, Conf, DataConf, Mode, SourceKind, as_dict, find_problems
from finetune.config.words.choices import builtin_folder, default_choices, options
from finetune.config.words.composition import file_problem
from finetune.config.words.configuration import compose
from finetune.config.words.quoting import quote, quote_override
from finetune.config.words.settings import PATH_SETTINGS, SECTIONS, SETTINGS, describe_kind, show
from finetune.system.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent.parent / "golden" / "cli_keys.txt"
GROUPS = list(default_choices([builtin_folder()]))
# `test_recipes.py` composes every model and experiment, and builds it.
CHOICES = [(group, name) for group in GROUPS for name in options([builtin_folder()], group)]
CHOICES = [(group, name) for group, name in CHOICES if group not in ("model", "experiment")]
# What a choice needs beside itself.
NEEDS = {
    ("data", "folder"): ["data.root=/images"],
    ("data", "hf"): ["data.name=beans"],
    ("data", "table"): ["data.table=/images.csv"],
    ("data", "torchvision"): ["data.name=CIFAR10", "data.root=/images"],
    ("data", "webdataset"): ["data.root=/images"],
}


def problems(*overrides: str, config_dir: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dir)
    return caught.value.problems


def write(path: str | Path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


# --- the reviewed list of keys ----------------------------------------------------------------------------------------


def test_command_line_keys_are_a_reviewed_list(update_golden: bool) -> None:
    now = "".join(f"{key.name:<28}{show(key.default):<24}{describe_kind(key)}\n" for key in SETTINGS.values())
    if update_golden:
        GOLDEN.write_text(now, encoding="utf-8")
    assert now == GOLDEN.read_text(encoding="utf-8"), (
        "keys, defaults or words changed: pytest tests/test_compose.py --update-golden, and say why in the commit"
    )


def test_every_key_has_a_meaning_in_one_line() -> None:
    for key in SETTINGS.values():
        assert key.meaning and "\n" not in key.meaning, key.name


def test_path_keys_exist() -> None:
    assert all(name in SETTINGS for name in PATH_SETTINGS if not name.startswith("hydra."))


# What a command line without a word is: the schema's defaults, and what data=digits chooses.
DEFAULTS = Conf(data=DataConf(test_fraction=0.3), auto=list(RULED))


# --- every choice composes --------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_schema(folder: Path) -> None:
    assert as_dict(compose([])) == as_dict(DEFAULTS)


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}={name}" for group, name in CHOICES])
def test_every_choice_composes(group: str, name: str, folder: Path) -> None:
    assert compose([f"{group}={name}", *NEEDS.get((group, name), [])])


def test_every_yaml_starts_with_a_line_for_a_person() -> None:
    for path in sorted(builtin_folder().rglob("*.yaml")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "@package" not in line]
        assert re.match(r"# \S.{10,}", lines[0]), path


def test_experiments_say_their_command() -> None:
    for name, path in options([builtin_folder()], "experiment").items():
        assert f"python -m finetune experiment={name}" in path.read_text(encoding="utf-8")


def test_yaml_holds_no_target() -> None:
    assert not [path for path in builtin_folder().rglob("*.yaml") if "_target_" in path.read_text(encoding="utf-8")]


def test_group_and_key_both_choose_the_schedule(folder: Path) -> None:
    assert compose(["sched=cosine_pi"]).sched.mode == compose(["sched.mode=cosine_pi"]).sched.mode == Mode.cosine_pi


def test_command_line_wins_over_experiment_wins_over_default(folder: Path) -> None:
    write(
        "conf/experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /sched: cosine\ntrain:\n  epochs: 3\n",
    )
    assert compose(["experiment=mine"]).sched.mode == Mode.cosine
    assert compose(["experiment=mine"]).train.epochs == 3
    both = compose(["experiment=mine", "sched=cosine_pi", "train.epochs=4"])
    assert (both.sched.mode, both.train.epochs) == (Mode.cosine_pi, 4)


def test_types_come_out_as_the_schema_says(folder: Path) -> None:
    conf = compose(["optim.betas=[0.8,0.9]", "data.source=digits", "deterministic=yes", "optim.lr=1"])
    assert conf.optim.betas == (0.8, 0.9) and isinstance(conf.optim.betas, tuple)
    assert conf.data.source is SourceKind.digits
    assert conf.deterministic is True
    # As OmegaConf has it: 1 and 0 are true and false. It takes any whole number, though, and here others are a mistake.
    assert [compose([f"deterministic={word}"]).deterministic for word in ("1", "0", "'1'", "n")] == [1, 0, 1, 0]
    assert isinstance(conf.optim.lr, float)


# --- paths as people type them ----------------------------------------------------------------------------------------

TYPED = [
    "my photos (2)", "a=b", "a#b", "it's", 'say "hi"', "ümlaut/写真", "shard-{000..012}", "a,b", "back\\slash\\", "123",
    "true", "[x]", "{a: b}", "a:b", " lead", "end ", "100%", "$HOME", "a&b;c|d", "'", '"', "\\'", "~", "a~b", "!@^*?",
    "a\tb",
]  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_paths_work_as_typed(typed: str, folder: Path) -> None:
    path = f"/data/{typed}"
    assert compose(["data=folder", f"data.root={path}"]).data.root == path


@pytest.mark.parametrize("name", [name for name in PATH_SETTINGS if not name.startswith("hydra.")])
def test_home_is_filled_in(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    line = quote_override(f"{name}=~/my photos (2)", multirun=False)
    assert line == f"{name}='/home/me/my photos (2)'"


def test_home_is_filled_in_from_a_yaml_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    write("conf/data/mine.yaml", "source: folder\nroot: ~/pictures\n")
    assert compose(["data=mine"]).data.root == "/home/me/pictures"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30))
@example("a\\'b\\\\")
@settings(max_examples=300, deadline=None)
def test_quoting_is_undone_by_the_grammar(text: str) -> None:
    if "${" in text:
        return  # a reference stays one, also in quotes
    assert OverridesParser.create().parse_override(f"resume={quote(text)}").value() == text


def test_quoted_and_null_stay() -> None:
    for text in ("data.root='a b'", 'data.root="a b"', "data.root=null", "optim.lr=1e-3", "model=clip", "data.root"):
        assert quote_override(text, multirun=False) == text


def test_in_a_multirun_a_comma_separates_paths_unless_quoted() -> None:
    assert quote_override("data.root=a b,c", multirun=True) == "data.root='a b','c'"
    assert quote_override("data.root='a,b',it's", multirun=True) == r"data.root='a,b','it\'s'"
    assert quote_override("data.root=a,b", multirun=False) == "data.root='a,b'"
    assert quote_override("data.root=choice(a,b)", multirun=True) == "data.root=choice(a,b)"


def test_other_texts_are_quoted_where_the_grammar_would_refuse_them(folder: Path) -> None:
    assert compose(["model.name=modèle=(1)"]).model.name == "modèle=(1)"
    assert compose(["model.pretrained=hf-hub:timm/x"]).model.pretrained == "hf-hub:timm/x"


# --- mistakes: (command line, exit code, what each line of the answer holds) ------------------------------------------

BAD: list[tuple[str, int, list[list[str]]]] = [
    # choices
    ("model=clp", 1, [["model=clp", "expected one of", " vit", "'clip'", "./conf/model/clp.yaml"]]),
    ("experiment=digits_prob", 1, [["experiment=digits_prob", "'digits_probe'"]]),
    ("model=null", 1, [["model=null", "left out", " clip,"]]),
    ("model=[clip,vit]", 1, [["one choice", "-m"]]),
    ("data=../model/clip", 1, [["no such choice"]]),
    # keys
    ("optim.layer_deacy=0.7", 1, [["optim.layer_deacy=0.7", "'optim.layer_decay'"]]),
    ("layer_decay=0.7", 1, [["'optim.layer_decay'"]]),
    ("train.warmup=1", 1, [["'sched.warmup'"]]),
    ("modle=clip", 1, [["modle=clip", "'model'"]]),
    ("optim.foo=1", 1, [["optim.foo=1", "optim has name, lr,", "layer_decay"]]),
    ("qqqq=1", 1, [["qqqq=1", "finetune --help"]]),
    ("+optim.foo=1", 1, [["+optim.foo=1", "closed list"]]),
    ("++optim.foo=1", 1, [["++optim.foo=1", "closed list"]]),
    ("+optim.lr=1", 1, [["optim.lr=1", "without the +"]]),
    ("+experiment=digits_probe", 1, [["without the +", "experiment=digits_probe"]]),
    ("~optim.lr", 1, [["~optim.lr", "leave optim.lr out"]]),
    ("~model", 1, [["~model", "leave model out"]]),
    ("optim={lrr:1}", 1, [["optim.lrr", "'optim.lr'"]]),
    ("train=3", 1, [["train holds settings of its own", "train.epochs="]]),
    ("model@x=clip", 1, [["model@x=clip"]]),
    # types and words
    ("optim.lr=abc", 1, [["optim.lr=abc", "expected a number"]]),
    ("optim.lr=", 1, [["optim.lr=", "expected a number"]]),
    ("optim.lr=null", 1, [["optim.lr=null", "expected a number"]]),
    ("optim.lr=true", 1, [["optim.lr=true", "expected a number"]]),
    ("optim.lr=???", 1, [["optim.lr=???", "has to be given"]]),
    ("train.epochs=10.0", 1, [["train.epochs=10.0", "a whole number"]]),
    ("train.epochs=1e1", 1, [["train.epochs=10.0", "a whole number"]]),
    ("deterministic=maybe", 1, [["deterministic=maybe", "true or false"]]),
    ("deterministic=2", 1, [["deterministic=2", "true or false"]]),
    ("train.ema_warmup=-1", 1, [["train.ema_warmup=-1", "true or false"]]),
    ("deterministic=9223372036854775808", 1, [["deterministic=9223372036854775808", "true or false"]]),
    ("sched.mode=cosine_p", 1, [["sched.mode=cosine_p", "linear, cosine, cosine_pi", "'cosine_pi'"]]),
    ("optim.betas=[0.9]", 1, [["optim.betas=[0.9]", "2 numbers"]]),
    ("model.templates=text", 1, [["model.templates=text", "list of texts"]]),
    ("device=cudda", 1, [["device=cudda", "auto, cpu, cuda", "'cuda'"]]),
    # ranges, and what would be ignored
    ("optim.layer_decay=0", 1, [["optim.layer_decay=0", "greater than 0 and at most 1"]]),
    ("optim.layer_decay=1.01", 1, [["optim.layer_decay=1.01", "at most 1"]]),
    ("train.epochs=0", 1, [["train.epochs=0", "at least 1"]]),
    ("sched.cycle=-1", 1, [["sched.cycle=-1", "at least 0"]]),
    ("optim.lr=nan", 1, [["optim.lr=nan", "greater than 0"]]),
    ("seed=-1", 1, [["seed=-1", "at least 0"]]),
    (
        "optim.weight_decay=0 optim.no_weight_decay=[head.*]",
        1,
        [["optim.no_weight_decay", "ignored", "decays nothing"]],
    ),
    ("optim.weight_decay=0 optim.decay_all=true", 1, [["optim.decay_all=true", "decays nothing"]]),
    ("optim.weight_decay=0 optim.decay_embeddings=true", 1, [["optim.decay_embeddings=true", "decays nothing"]]),
    ("optim.layer_decay=1 optim.layer_rule=timm", 1, [["optim.layer_rule=timm", "one rate"]]),
    ("sched.past_cycle=hold", 1, [["sched.past_cycle=hold", "the whole run", "no sooner"]]),
    ("sched.past_cycle=restart sched.cycle=10 train.epochs=10", 1, [["sched.past_cycle=restart", "sched.cycle=10"]]),
    ("sched.warmup=10 sched.cycle=20 train.epochs=10", 1, [["sched.warmup=10", "less than", "10 epochs"]]),
    ("model.head=random model.templates=[simple]", 1, [["model.templates=['simple']", "only a zero-shot head"]]),
    ("data.max_text_mib=3", 1, [["data.max_text_mib=3", "data=digits does not read it"]]),
    ("augment.mixup=1e-320", 1, [["augment.mixup=1e-320: must be 0, or 2.2e-308 or more away from it"]]),
    ("optim.weight_decay=1e-320", 1, [["optim.weight_decay=1e-320: must be 0, or 2.2e-308"]]),
    ("seed=99999999999999999999", 1, [["seed=99999999999999999999: must be at most 9,223,372,036,854,775,807"]]),
    (f"seed=1{25 * '0'}", 1, [["seed=1.0e+25: must be at most"]]),
    (f"seed=-{400 * '9'}", 1, [["seed=-1.0e+400: must be at least 0"]]),
    (f"train.epochs=-{400 * '9'}", 1, [["train.epochs=-1.0e+400: must be at least 1"]]),
    ("data=folder", 1, [["data=folder", "data.root=PATH"]]),
    ("data.root=/x", 1, [["data.root=/x", "ignored", "data=folder"]]),
    (
        "augment=mae augment.mix_images=9 data.batch_size=64",
        1,
        [["augment.mix_images=9", "leaves one image over", "divisor of 64"]],
    ),
    ("augment=mae augment.mix_images=65 data.batch_size=64", 1, [["augment.mix_images=65", "at most 64"]]),
    # several values without -m
    ("optim.lr=1,2", 1, [["optim.lr=1,2", "add -m"]]),
    ("optim.betas=0.9,0.99", 1, [["add -m", "optim.betas=[0.9,0.99]"]]),
    ("model=clip,vit", 1, [["model=clip,vit", "add -m"]]),
    # what cannot be read
    ("optim.lr", 2, [["'optim.lr'", "KEY=VALUE"]]),
    ("optim.lr = 3", 2, [["'optim.lr'", "KEY=VALUE"], ["'='"], ["'3'"]]),
    ("=3", 2, [["nothing in front of the ="]]),
    ("'optim.lr=(a'", 2, [["optim.lr=(a", "expected a number"]]),
    ("'model.templates=[a photo of {}'", 2, [["model.templates", "['one','two']"]]),
    ("''", 2, [["KEY=VALUE"]]),
    ("seed=1 --bogus", 2, [["--bogus", "no such flag"]]),
    # Hydra's own
    ("hydra.run.dri=x", 1, [["hydra.run.dri"]]),
    ("hydra/launcher=nope", 1, [["hydra/launcher/nope", "basic"]]),
    ("hydra.sweep.dir=x", 1, [["ignored", "hydra.run.dir=PATH"]]),
    ("hydra.run.dir=", 1, [["hydra.run.dir=", "names no folder"]]),
    ("-m hydra.sweep.dir=''", 1, [["hydra.sweep.dir=", "names no folder"]]),
    ("precision=FP32", 1, [["precision=FP32", "'fp32'"]]),
    ("hydra.searchpath=[x]", 1, [["--config-dir"]]),
    ("--config-dir /nowhere", 1, [["--config-dir /nowhere", "no such folder"]]),
    ("optim.lr='${train.epoch}'", 1, [["optim.lr", "train.epoch"]]),
    # sweeps: any cell refuses the whole
    ("-m optim.lr=1e-3,abc", 1, [["optim.lr=abc", "a number"]]),
    ("-m sched.mode=linear,cosin", 1, [["sched.mode=cosin", "'cosine'"]]),
    ("-m model=clip,vitt", 1, [["model=vitt", "'vit'"]]),
    ("-m model='glob(x*)'", 1, [["glob(x*)", "matches none", " clip,"]]),
    ("-m sched.mode='glob(*)'", 1, [["sched.mode", "is a setting"]]),
    ("-m optim.layer_decay=0.5,1.5", 1, [["optim.layer_decay=1.5", "at most 1"]]),
    ("-m optim.layer_decay='choice(0.5,1.5)'", 1, [["optim.layer_decay=1.5"]]),
    ("-m train.epochs='range(0,3)'", 1, [["train.epochs=0", "at least 1"]]),
    ("-m optim.lr='interval(0,1)'", 1, [["interval", "optim.lr=A,B,C"]]),
    ("-m train.epochs='range(1,5,0)'", 1, [["has to end"]]),
    ("-m train.epochs='range(1,999999999)'", 1, [["10,000"]]),
    ("-m seed='range(0,200)' data.split_seed='range(0,200)'", 1, [["40,000 jobs", "10,000"]]),
    ("-m train.epochs=3,30 sched.warmup=1,10", 1, [["sched.warmup=10", "3 epochs"]]),
    ("-m hydra.run.dir=x", 1, [["hydra.sweep.dir"]]),
    # all at once
    (
        "model=clp optim.lrr=3 sched.mode=cosin train.epochs=0 data.batch_size=x device=gpu",
        1,
        [["model=clp"], ["optim.lrr"], ["sched.mode"], ["train.epochs=0"], ["data.batch_size"], ["device=gpu"]],
    ),
    (
        "-m data=foldr,digits optim.layer_decay=0.5,2 seed=a,1 train.epoch=3 hydra.sweep.foo=1 --bogus x",
        2,
        [["--bogus"], ["data=foldr"], ["optim.layer_decay=2"], ["seed=a"], ["train.epoch=3"], ["hydra.sweep.foo"]],
    ),
]


@pytest.mark.parametrize(("typed", "code", "expected"), BAD, ids=[case[0] for case in BAD])
def test_every_mistake_is_one_line_and_nothing_is_written(
    typed: str, code: int, expected: list[list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(typed)) == code
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and "Traceback" not in shown.err
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == len(expected), shown.err
    for words in expected:
        assert any(all(word in line for word in words) for line in lines), (words, shown.err)
    assert list(folder.iterdir()) == []


def test_one_mistake_does_not_bring_another(folder: Path) -> None:
    """A group that could not be read says nothing about the settings that depend on it."""
    assert len(problems("data=foldr", "data.root=/x")) == 1
    assert len(problems("sched.cycle=abc", "sched.warmup=20")) == 1
    assert len(problems("augment=nnoe", "augment.degrees=3")) == 1


def test_good_sweeps_are_counted(folder: Path) -> None:
    from finetune.config.words.configuration import read_settings

    words = ["model=glob([clip,vit])", "optim.lr=1e-3,1e-4", "seed=range(0,3)", "experiment=digits_probe"]
    assert read_settings(words, multirun=True).jobs == 12


# --- yaml files of one's own ------------------------------------------------------------------------------------------


def test_own_yaml_is_found_and_wins(folder: Path) -> None:
    write("conf/data/mine.yaml", "source: folder\nroot: /pictures\n")
    write("conf/sched/cosine.yaml", "mode: cosine\nscale_min: 0.1\n")
    write("conf/optim/adamw.yaml", "lr: 0.5\n")
    conf = compose(["data=mine", "sched=cosine"])
    assert (conf.data.root, conf.sched.scale_min, conf.optim.lr) == ("/pictures", 0.1, 0.5)


def test_config_dir_wins_over_the_current_folder(folder: Path) -> None:
    write("conf/optim/fast.yaml", "lr: 0.1\n")
    write("elsewhere/optim/fast.yaml", "lr: 0.2\n")
    assert compose(["optim=fast"]).optim.lr == 0.1
    assert compose(["optim=fast"], config_dir="elsewhere").optim.lr == 0.2


def test_own_file_may_build_on_ours(folder: Path) -> None:
    write("conf/model/big.yaml", "defaults:\n  - vit\nname: vit_base_patch16_224\n")
    write("conf/model/big_first.yaml", "defaults:\n  - _self_\n  - vit\nname: vit_base_patch16_224\n")
    conf = compose(["model=big"])
    assert (conf.model.family.value, conf.model.name) == ("vit", "vit_base_patch16_224")
    assert compose(["model=big_first"]).model.name == "glyph_vit"


def test_a_foreign_conf_folder_does_no_harm(folder: Path) -> None:
    write("conf/config.yaml", "defaults:\n  - db: mysql\nname: theirs\n")
    write("conf/finetune_config.yaml", "x: 1\n")
    write("conf/schema.yaml", "broken: [\n")
    write("conf/db/mysql.yaml", "broken: [\n")
    assert as_dict(compose([])) == as_dict(DEFAULTS)


def test_a_config_yaml_of_ours_changes_the_default_choices(folder: Path) -> None:
    text = (builtin_folder() / "config.yaml").read_text(encoding="utf-8")
    write("conf/config.yaml", text.replace("model: clip", "model: vit").replace("\nhydra:", "\nseed: 7\n\nhydra:"))
    conf = compose([])
    assert (conf.model.name, conf.seed) == ("glyph_vit", 7)


def test_a_broken_config_yaml_of_ours_is_one_line(folder: Path) -> None:
    write("conf/config.yaml", "defaults:\n  - finetune_schema\na: b: c\n")
    (problem,) = problems("seed=1")
    assert problem.startswith("conf/config.yaml, line 3: cannot be read")


BAD_YAML: list[tuple[str, str, list[str]]] = [
    ("data/mine.yaml", "source: digits\nbatch_siez: 3\n", ["mine.yaml, line 2", "batch_siez", "'data.batch_size'"]),
    ("data/mine.yaml", "batch_size: many\n", ["mine.yaml, line 1", "data.batch_size=many", "whole number"]),
    ("data/mine.yaml", "batch_size: -1\n", ["data.batch_size=-1", "must be fit, or at least 1"]),
    ("data/mine.yaml", "a: b: c\n", ["mine.yaml, line 1", "cannot be read"]),
    ("data/mine.yaml", "source: [digits\n", ["mine.yaml, line 2", "cannot be read"]),
    ("data/mine.yaml", "workers: 1\nworkers: 2\n", ["mine.yaml, line 2", "duplicate key workers"]),
    ("data/mine.yaml", "- a\n", ["mine.yaml, line 1", "key: value"]),
    ("data/mine.yaml", "data.workers: 1\n", ["mine.yaml, line 1", "dots"]),
    ("data/mine.yaml", "batch_size: {a: 1}\n", ["mine.yaml, line 1", "data.batch_size", "whole number"]),
    ("data/mine.yaml", "batch_size: !!python/object:os.system 1\n", ["mine.yaml, line 1", "python/object"]),
    ("data/mine.yaml", "source: no\n", ["data.source=false", "digits, folder"]),
    ("data/mine.yaml", "defaults:\n  - foldr\n", ["mine.yaml, line 2", "data=foldr", "'folder'"]),
    ("data/mine.yaml", "defaults:\n  - mine\n", ["brings in itself"]),
    ("data/mine.yaml", "defaults: 3\n", ["data/mine.yaml, line 1", "expected a list"]),
    ("data/mine.yml", "source: digits\n", ["data=mine", "has to end in .yaml"]),
    ("experiment/mine.yaml", "# @package _global_\nsede: 3\n", ["mine.yaml, line 2", "sede", "'seed'"]),
    ("experiment/mine.yaml", "# @package _global_\nsched: cosine\n", ["mine.yaml, line 2", "indented below"]),
    (
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /sched: cosin\n",
        ["mine.yaml, line 3", "sched=cosin", "'cosine'"],
    ),
    (
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /shed: cosine\n",
        ["mine.yaml, line 3", "no such group", "sched"],
    ),
]


@pytest.mark.parametrize(("name", "text", "words"), BAD_YAML, ids=[f"{c[0]}:{c[1]!r}" for c in BAD_YAML])
def test_a_bad_yaml_is_named_with_line_and_reason(name: str, text: str, words: list[str], folder: Path) -> None:
    write(f"conf/{name}", text)
    found = problems(f"{name.split('/')[0]}=mine")
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found


def test_a_yaml_that_is_no_text(folder: Path) -> None:
    write("conf/data/mine.yaml", "")
    Path("conf/data/mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problems("data=mine")[0] or "cannot be read" in problems("data=mine")[0]


def test_an_unreadable_yaml_hides_nothing_else(folder: Path) -> None:
    write("conf/data/mine.yaml", "a: b: c\n")
    write("conf/optim/mine.yaml", "lrr: 3\nlr: fast\n")
    found = problems("data=mine", "optim=mine", "model=clp", "train.epochs=0", "sched.mode=cosin")
    assert len(found) == 6, found


def test_a_yaml_that_takes_no_part_is_not_read(folder: Path) -> None:
    write("conf/data/mine.yaml", "a: b: c\n")
    assert as_dict(compose([])) == as_dict(DEFAULTS)


def test_own_group_with_a_plus(folder: Path) -> None:
    write("conf/cluster/big.yaml", "# @package _global_\ndata:\n  batch_size: 8\n")
    assert compose(["+cluster=big"]).data.batch_size == 8
    assert "no such choice" in problems("+cluster=small")[0]


def test_a_word_for_a_number_works_in_a_file_too(folder: Path) -> None:
    write("conf/data/mine.yaml", "batch_size: fit\n")
    assert compose(["data=mine"]).data.batch_size == compose(["data.batch_size=fit"]).data.batch_size == 0
    write("conf/data/zero.yaml", "batch_size: 0\n")
    for word in ("data.batch_size=0", "data.batch_size=-0", "data.batch_size=00", "data.batch_size=0_0", "data=zero"):
        with pytest.raises(ConfigError, match=r"data\.batch_size=0: write data\.batch_size=fit"):
            compose([word])
    for word, told in {"-2": "must be fit, or at least 1", "Fit": r"or fit or auto \(did you mean 'fit'"}.items():
        with pytest.raises(ConfigError, match=rf"data\.batch_size={word}: .*{told}"):
            compose([f"data.batch_size={word}"])


def test_merge_keys_and_anchors(folder: Path) -> None:
    write("conf/optim/mine.yaml", "lr: &rate 0.5\neps: *rate\n")
    assert (compose(["optim=mine"]).optim.lr, compose(["optim=mine"]).optim.eps) == (0.5, 0.5)


def test_references_in_a_yaml(folder: Path) -> None:
    write("conf/optim/mine.yaml", "lr: ${optim.weight_decay}\n")
    assert compose(["optim=mine", "optim.weight_decay=0.25"]).optim.lr == 0.25
    write("conf/optim/bad.yaml", "lr: ${optim.nothing}\n")
    assert "optim.lr" in problems("optim=bad")[0]


@given(st.text(max_size=60))
@example("<<: 3")
@example("a: &a [*a]")
@example("a: &a\n  b: *a")
@example("? [a]\n: 1")
@example("workers: 2024-01-01")
@example("workers: 0b")
@example("!!set {a}")
@example("\x00")
@example("--- a\n--- b")
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_in_a_yaml_is_answered(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8")
    assert "\n" not in (file_problem(path) or "")


# --- any command line -------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["", "", "", "+", "++", "~", "-", "--"]),
        st.sampled_from([*SETTINGS, *GROUPS, *SECTIONS, "optim.lrr", "hydra.run.dir", "hydra/launcher", "x", ""]),
        st.sampled_from(["=", "=", "=", "", " = ", "=="]),
        st.one_of(
            st.sampled_from(
                ["1", "1,2", "clip", "clip,vit", "null", "[1,2]", "{a:1}", "{lr:1}", "'a'", "${seed}", "${x",
                 "range(1,3)", "choice(a,b)", "glob(*)", "interval(0,1)", "1e-3", "???", "[[1]]", "{a:{b:1}}", "~/x",
                 "a b",
                 "sort(2,1)", "shuffle(1,2)", "range(1,2,0)", "range(a,b)", "int(1.5)", "tag(a,1)", "\\", "'",
                 "${oc.env:HOME}"]
            ),
            st.text(max_size=8),
        ),
    ),
    st.text(max_size=10),
    st.sampled_from(["-m", "--cfg", "job", "-cd", "conf", "--resolve", "-p", "optim", "--run"]),
)  # fmt: skip


FOLDER_STAYS_EMPTY = [HealthCheck.function_scoped_fixture]  # so all examples can share it


@given(st.lists(WORDS, max_size=4))
@example(["hydra/launcher=1"])
@example(["optim={a:{b:1}}"])
@example(["model={a:1}"])
@example(["data={root:[1]}"])
@example(["optim.lr=[1,2]"])
@settings(max_examples=8, deadline=None, suppress_health_check=FOLDER_STAYS_EMPTY)
def test_no_command_line_ends_in_a_stack_trace(folder: Path, words: list[str]) -> None:
    check_answer(folder, words)


@pytest.mark.slow
@given(st.lists(WORDS, max_size=4))
@settings(max_examples=200, deadline=None, suppress_health_check=FOLDER_STAYS_EMPTY)
def test_none_of_many_command_lines_ends_in_a_stack_trace(folder: Path, words: list[str]) -> None:
    check_answer(folder, words)


def check_answer(folder: Path, words: list[str]) -> None:
    """A command line is answered by a good configuration or by a list of problems, and nothing is written."""
    try:
        prepared = configure(parse_command_line([word for word in words if "\x00" not in word]))
    except ConfigError as error:
        assert error.code in (1, 2) and error.problems
        return
    assert not find_problems(prepared.conf) and prepared.jobs >= 1
    assert list(folder.iterdir()) == []


# --- packaging --------------------------------------------------------------------------------------------------------


def test_every_package_is_listed_for_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^    "(finetune[\w.]*)",$', text, re.MULTILINE)) - {"finetune.conf"}
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "finetune").rglob("__init__.py")}
    assert listed == there


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_are_plain_lines(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines if not line.startswith("#"))


def test_the_lower_bounds_are_what_the_tests_were_run_with() -> None:
    def number(version: str) -> tuple[int, ...]:
        """1.4 is 1.4.0."""
        parts = [int(part) for part in version.split(".")]
        return tuple(parts + [0] * (4 - len(parts)))

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    bounds = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', listed, re.MULTILINE))
    assert len(bounds) == len(listed.splitlines()) > 10
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").lower().splitlines()
    ran = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: number(ran[name]) for name in bounds} == {name: number(bounds[name]) for name in bounds}
