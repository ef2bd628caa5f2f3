"""The commands as a person types them: exit codes, folders, what is printed, and when torch is imported."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from finetune.commands import COMMANDS
from finetune.commands.flags import FLAGS, configure, parse_command_line
from finetune.commands.help import EXAMPLES, HIGHLIGHTS, help_page
from finetune.config import Conf
from finetune.config.words.choices import builtin_folder, folders
from finetune.config.words.settings import SETTINGS
from finetune.runs.folders import new_folder, usable_folder
from finetune.system.errors import UserError
from finetune.system.signals import Interrupted

ROOT = Path(__file__).parent.parent.parent
FakeRun = Callable[[Conf, Path, list[str]], None]


def command(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m finetune` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRun], list[tuple[Conf, Path, list[str]]]]:
    """Put a function in the place of `finetune.app.run.run`; gives back the calls."""

    def install(act: FakeRun) -> list[tuple[Conf, Path, list[str]]]:
        calls: list[tuple[Conf, Path, list[str]]] = []

        def run(conf: Conf, run_dir: Path, overrides: list[str], quiet: bool = False) -> dict[str, Any]:
            calls.append((conf, run_dir, overrides))
            act(conf, run_dir, overrides)
            result = {
                "status": "finished",
                "overrides": overrides,
                "seed": conf.seed,
                "val/top1": 0.5,
                "test/top1": 0.5,
            }
            (run_dir / "result.json").write_text(json.dumps({**result, "epochs": 1, "seconds": 1.0}))
            return result

        module = types.ModuleType("finetune.app.run")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "finetune.app.run", module)
        return calls

    return install


def fine(conf: Conf, run_dir: Path, overrides: list[str]) -> None:
    """A run with nothing to do."""


# --- what answers without torch ---------------------------------------------------------------------------------------

PROBE = """
import runpy, sys
sys.argv = ["finetune", *{words!r}]
try:
    runpy.run_module("finetune", run_name="__main__")
except SystemExit as stop:
    code = stop.code or 0
names = ("torch", "torchvision", "timm", "open_clip", "sklearn", "numpy", "matplotlib")
heavy = [name for name in names if name in sys.modules]
print("IMPORTED", code, heavy, "hydra" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "code", "hydra"),
    [
        (["--help"], 0, False),
        (["--cfg", "job"], 0, True),
        (["-m", "model=clip,vitt", "optim.layer_deacy=0.7", "--bogus"], 2, True),
    ],
)
def test_torch_stays_out_until_the_configuration_is_good(
    words: list[str], code: int, hydra: bool, folder: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = PROBE.format(words=words)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert f"IMPORTED {code} [] {hydra}" in done.stdout, done.stdout + done.stderr


def test_importing_finetune_is_light(folder: Path) -> None:
    script = "import sys, finetune; from finetune import SchedulerConf; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_is_for_a_person(folder: Path) -> None:
    page = help_page(folders())
    for words in ("Usage:", "model=", " clip, ", "sched.mode=linear", "Examples:", "-m", "--cfg", "install=bash"):
        assert words in page
    assert len(HIGHLIGHTS) == 10 and all(name in SETTINGS for name in HIGHLIGHTS)
    assert all(f"{name}=" in page for name in HIGHLIGHTS)
    assert all(flag.names[0] in page for flag in FLAGS if flag.help)
    assert max(map(len, page.splitlines())) <= 120
    assert len(page.splitlines()) <= 70


def test_help_lists_the_commands_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = help_page(folders())
    assert re.findall(r"^  (\w+) {2,}", page.partition("Groups")[0], re.MULTILINE) == list(COMMANDS)
    assert main(["help"]) == 0
    assert capsys.readouterr().out == page + "\n"


def test_help_all_shows_every_setting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help-all"]) == 0
    page = capsys.readouterr().out
    assert re.findall(r"^  ([\w.]+)=", page, re.MULTILINE) == list(SETTINGS)
    assert max(map(len, page.splitlines())) <= 100
    for words in (
        "optim.layer_decay=auto",
        "[greater than 0 and at most 1]",
        "[linear, cosine, cosine_pi]",
        "\nsched\n",
    ):
        assert words in page


def test_a_mistyped_command_is_refused_with_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["descirbe", "model=vit"]) == 2
    shown = capsys.readouterr().err
    assert "did you mean 'describe'?" in shown and shown.count("\n") == 1


def test_a_fault_outside_a_run_names_its_place_and_how_to_see_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.commands.help.help_page", {}.__getitem__)
    assert main(["--help"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: finetune is at fault: ") and "(finetune/commands/help.py, line " in shown
    assert "FINETUNE_TRACEBACK=1" in shown and shown.count("\n") == 1
    monkeypatch.setenv("FINETUNE_TRACEBACK", "1")
    assert main(["--help"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_help_shows_files_of_ones_own(folder: Path) -> None:
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "mine.yaml").write_text("source: digits\n")
    page = help_page(folders())
    assert re.search(r"data= +digits, .*mine\*", page)
    assert "* from conf" in page


def test_the_examples_of_the_help_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [configure(parse_command_line(shlex.split(words))).jobs for _, words in EXAMPLES]
    assert jobs == [1, 1, 9]


def test_help_wins_over_mistakes_and_version_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim.lrr=1", "-h"]) == 0
    assert "Usage:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"finetune \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m finetune --help | head -1",
        shell=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("finetune:") and done.stderr == ""


def test_cfg_prints_the_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["sched=cosine_pi", "--cfg", "job", "optim.lr=0.5"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["sched"]["mode"] == "cosine_pi" and tree["optim"]["lr"] == 0.5 and "hydra" not in tree
    assert main(["--cfg", "job", "-p", "sched"]) == 0
    assert capsys.readouterr().out.startswith("# @package sched\nmode: linear\n")
    assert main(["--cfg", "job", "optim.lr=${optim.weight_decay}", "--resolve", "-p", "optim"]) == 0
    assert "lr: 0.05" in capsys.readouterr().out
    assert main(["--cfg", "job", "-p", "optimm"]) == 1
    assert "augment, data, model, optim" in capsys.readouterr().err
    assert main(["--cfg", "hydra"]) == 0
    assert "job_logging" in capsys.readouterr().out
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("sched=", {"sched=cosine", "sched=linear"}), ("optim.la", {"optim.layer_decay="}), ("data=m", {"data=mine"})],
)
def test_shell_completion(
    typed: str, expected: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "mine.yaml").write_text("source: digits\n")
    line = f"finetune {typed}"
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setattr(sys, "argv", ["finetune"])
    assert main(["-sc", "query=bash"]) == 0
    assert expected <= set(capsys.readouterr().out.split())


def test_completion_can_be_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/finetune"])
    assert main(["-sc", "install=bash"]) == 0
    assert "finetune" in capsys.readouterr().out


# --- run folders ------------------------------------------------------------------------------------------------------


def test_folders_made_in_the_same_instant_differ(folder: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 999_990)
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: new_folder(multirun=False, now=now), range(64)))
    assert len(set(made)) == 64 and all(path.is_dir() for path in made)
    assert str(min(made)) == "outputs/2026-01-02/03-04-05-999990"
    assert str(new_folder(multirun=True, now=now)) == "outputs/sweeps/2026-01-02/03-04-05-999990"


@pytest.mark.parametrize("blocked", ["outputs", "outputs/2026-01-02"])
def test_a_file_in_the_way_is_said(blocked: str, folder: Path) -> None:
    Path(blocked).parent.mkdir(parents=True, exist_ok=True)
    Path(blocked).write_text("")
    with pytest.raises(OSError, match=r"cannot write to outputs/2026-01-02.*hydra\.run\.dir=PATH"):
        new_folder(multirun=False, now=datetime(2026, 1, 2))


def test_a_named_folder_that_cannot_be_written(folder: Path) -> None:
    Path("file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(OSError, match="cannot write to"):
            usable_folder(Path(name))
    closed = Path("closed")
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # root may write anywhere
        with pytest.raises(OSError, match="may not be written"):
            usable_folder(closed)


@pytest.mark.parametrize("sort", ["folder", "FIFO", "link"])
def test_a_config_yaml_that_cannot_be_read_is_named(
    sort: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("conf").mkdir()
    {"folder": os.mkdir, "FIFO": os.mkfifo, "link": lambda path: os.symlink("gone", path)}[sort]("conf/config.yaml")
    assert main(["--cfg", "job"]) == 1
    assert "conf/config.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("typed", [None, "", " "])
def test_a_completion_query_without_a_line_says_how_to_install(
    typed: str | None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    if typed is not None:
        monkeypatch.setenv("COMP_LINE", typed)
    assert main(["--shell-completion", "query=bash"]) == 1
    assert "COMP_LINE" in capsys.readouterr().err


def test_a_named_folder_that_cannot_be_made_leaves_none_above_it(folder: Path) -> None:
    with pytest.raises(OSError, match="cannot write to"):
        usable_folder(Path("new/below") / ("x" * 300) / "run")
    Path("nowhere").symlink_to("gone")
    with pytest.raises(OSError, match="a file is in its way"):
        usable_folder(Path("nowhere/new/run"))
    assert [path.name for path in Path().iterdir()] == ["nowhere"]


def test_a_folder_that_cannot_be_written_ends_the_command_before_any_work(
    folder: Path, fake_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_run(fine)
    Path("outputs").write_text("")
    for words in ([], ["-m", "seed=1,2"], ["hydra.run.dir=outputs/x"]):
        assert main(words) == 1
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and "cannot write to outputs" in shown.err
    assert not calls


# --- single runs ------------------------------------------------------------------------------------------------------


def test_a_run_gets_its_configuration_and_an_empty_folder(folder: Path, fake_run: Any) -> None:
    seen: list[list[Path]] = []
    calls = fake_run(lambda conf, run_dir, overrides: seen.append(list(run_dir.iterdir())))
    assert main(["model=vit", "train.epochs=3"]) == 0
    ((conf, run_dir, overrides),) = calls
    assert (conf.model.name, conf.train.epochs) == ("glyph_vit", 3)
    assert overrides == ["model=vit", "train.epochs=3"]
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}", os.path.relpath(run_dir))
    assert seen == [[]], "Hydra writes nothing into it"
    assert {path.name for path in run_dir.iterdir()} == {"result.json"}
    assert sorted(path.name for path in folder.iterdir()) == ["outputs"]


@pytest.mark.parametrize("typed", ["my run (2)", "a=b,c", "it's"])
def test_a_named_run_folder_works_as_typed(typed: str, folder: Path, fake_run: Any) -> None:
    calls = fake_run(fine)
    assert main([f"hydra.run.dir={typed}"]) == 0
    assert os.path.relpath(calls[0][1]) == typed and Path(typed).is_dir()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            UserError("optim.fix_layer=9:\nthis model has layers 0 to 8"),
            "optim.fix_layer=9: this model has layers 0 to 8",
        ),
        (FileNotFoundError("data.root=/x: no such folder"), "data.root=/x: no such folder"),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
        (RuntimeError("a fault"), "finetune is at fault: RuntimeError: a fault (finetune/commands/train.py, line "),
        (ValueError("of torch"), "finetune is at fault: ValueError: of torch"),
    ],
)
def test_a_failing_run_is_one_line(
    error: Exception, said: str, folder: Path, fake_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(conf: Conf, run_dir: Path, overrides: list[str]) -> None:
        raise error

    calls = fake_run(fail)
    assert main(["seed=3"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}") and shown.count("\n") == 1
    run_dir = calls[0][1]
    assert json.loads((run_dir / "result.json").read_text())["status"] == "failed"
    assert "Traceback" in (run_dir / "run.log").read_text()


def test_a_failure_never_writes_over_what_a_run_left(folder: Path, fake_run: Any) -> None:
    def fail(conf: Conf, run_dir: Path, overrides: list[str]) -> None:
        raise UserError("the folder holds another run")

    fake_run(fail)
    Path("old").mkdir()
    Path("old/result.json").write_text("{}")
    Path("old/run.log").write_text("before")
    assert main(["hydra.run.dir=old"]) == 1
    assert Path("old/result.json").read_text() == "{}" and Path("old/run.log").read_text() == "before"


def test_ctrl_c_and_signals_have_their_exit_codes(folder: Path, fake_run: Any) -> None:
    def stop(conf: Conf, run_dir: Path, overrides: list[str]) -> None:
        raise KeyboardInterrupt if conf.seed == 1 else Interrupted(15)

    fake_run(stop)
    assert main(["seed=1"]) == 130
    with pytest.raises(SystemExit) as caught:
        main(["seed=2"])
    assert caught.value.code == 143


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_cell_and_a_failed_one_does_not_end_it(
    folder: Path, fake_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_some(conf: Conf, run_dir: Path, overrides: list[str]) -> None:
        if conf.seed == 1:
            raise UserError("this one fails") if conf.optim.lr > 0.1 else RuntimeError("a fault")

    calls = fake_run(fail_some)
    assert main(["optim.lr=0.1,0.2", "-m", "seed=range(0,2)", "model=vit"]) == 1
    assert [(conf.optim.lr, conf.seed) for conf, _, _ in calls] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    folders_made = [run_dir for _, run_dir, _ in calls]
    assert [path.name for path in folders_made] == list("0123")
    (sweep,) = {path.parent for path in folders_made}
    assert re.fullmatch(r"outputs/sweeps/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}", os.path.relpath(sweep))
    assert all((path / "result.json").is_file() for path in folders_made)
    assert (sweep / "summary.csv").is_file()
    shown = capsys.readouterr()
    assert "this one fails" in shown.err and "4 jobs" in shown.out
    assert "Traceback" not in shown.err


def test_a_good_sweep_ends_with_0(folder: Path, fake_run: Any) -> None:
    calls = fake_run(fine)
    assert main(["-m", "model=clip,vit", "hydra.sweep.dir=my sweep"]) == 0
    assert [conf.model.name for conf, _, _ in calls] == ["glyph_clip", "glyph_vit"]
    assert Path("my sweep/0").is_dir() and Path("my sweep/summary.csv").is_file()


def test_paths_in_a_sweep(folder: Path, fake_run: Any) -> None:
    calls = fake_run(fine)
    assert main(["-m", "data=folder", "data.root=/a b,/c(1)"]) == 0
    assert [conf.data.root for conf, _, _ in calls] == ["/a b", "/c(1)"]


def test_ctrl_c_in_a_sweep_still_sums_it_up(folder: Path, fake_run: Any) -> None:
    def stop(conf: Conf, run_dir: Path, overrides: list[str]) -> None:
        if conf.seed == 1:
            raise Interrupted(2)

    calls = fake_run(stop)
    with pytest.raises(SystemExit) as caught:
        main(["-m", "seed=0,1,2", "hydra.sweep.dir=s"])
    assert caught.value.code == 130 and len(calls) == 2
    assert Path("s/summary.csv").is_file()


# --- as a process -----------------------------------------------------------------------------------------------------


def test_a_mistake_as_a_process(folder: Path) -> None:
    done = command("model=vit", "optim.layer_deacy=0.5", "--bogus", cwd=folder, code=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 2 and "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


def test_the_repository_itself_is_a_fine_place_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert folders() == [builtin_folder()]
