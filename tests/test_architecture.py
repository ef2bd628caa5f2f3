"""The house plan: imports point one way, heavy packages stay where they belong, modules and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "finetune"

# A module imports finetune's modules only from levels below its own; within a package siblings may import each other.
LEVELS = {
    # The configuration: `config` is the page that everybody reads, the other two are parts of it.
    "schema": -2, "data_settings": -1, "augment_settings": -1, "train_settings": -1,
    "optim_settings": -1, "prefix_settings": -1, "shelf": 0,
    "config": 0, "layers": 0, "metrics": 0, "preprocess": 0, "files": -1, "signals": 0, "terminal": -1, "lock": 0,
    "compose": 1, "losses": 1, "finite": 1, "claim": 1, "ema": 1, "recipe": 1, "sched": 1, "optim": 1,
    "distributed": 1, "models": 1, "data": 1, "log": 0, "records": 0, "allocator": 0, "device": 1,
    "loop": 2, "multilabel": 2, "prefix": 2, "lrd": 2, "plan": 2, "cost": 2, "compiling": 2,
    "checkpoint": 3,
    "saving": 4, "bad_batch": 4, "parts": 4, "resume": 5, "memory": 5, "feeding": 5,
    "utilisation": 5, "training": 6, "probing": 5,
    "run": 7,
    "__main__": 8, "__init__": 8, "describe": 8, "check_data": 8, "evaluate": 8, "predict": 8, "export": 8, "replay": 8,
    # No torch in these: they read what runs have left.
    "figure": 1, "scores": 2, "rates_figure": 2, "sweep_figure": 2, "sweep": 3, "report": 4,
}  # fmt: skip
# Read before the configuration is known to be good, so standard library only.
SETTINGS = (
    *("schema", "data_settings", "augment_settings", "optim_settings", "train_settings", "prefix_settings"),
    *("config", "preprocess", "files", "signals"),
)
DRAWERS = ("figure", "scores", "rates_figure", "sweep_figure", "sweep", "report")
ENTRIES = {name for name, level in LEVELS.items() if level == 8}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def component(path: Path) -> str:
    """`models/clip.py` -> models, `loop.py` -> loop."""
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at module level) for every import outside `if TYPE_CHECKING`."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, top))
                if child.module == "finetune":
                    found.extend((f"finetune.{alias.name}", top) for alias in child.names)
            visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path: Path) -> None:
    own = component(path)
    assert own in LEVELS, f"{path}: give the new component a level in this test"
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "finetune" or len(parts) == 1 or parts[1] == own or parts[1] == "__version__":
            continue
        assert LEVELS[parts[1]] < LEVELS[own], f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    own = component(path)
    for module, top in imports(path):
        root = module.split(".")[0]
        if root in ("hydra", "omegaconf"):
            assert own == "compose" or own in ENTRIES, f"{path} imports {module}"
        if root in ("timm", "open_clip", "matplotlib", "tensorboard", "wandb", "mlflow") or module.startswith(
            "torchvision.models"
        ):
            assert not top, f"{path} imports {module} at the top, so every start pays for it"
        if module.startswith("torch.distributed"):
            assert own in ("distributed", "checkpoint"), f"{path} imports {module}"
        if root in ("torch", "torchvision", "timm", "open_clip", "numpy"):
            assert own not in (*SETTINGS, "compose", "log", "records", "shelf", *DRAWERS), f"{path} imports {module}"
            assert own != "__main__", f"{path} imports {module}: the entry answers before torch is there"
        if own in SETTINGS:
            assert root not in ("yaml", "tqdm"), f"{path} imports {module}: standard library only"


def test_the_loop_never_sees_data_logs_or_files() -> None:
    seen = {module.split(".")[1] for module, _ in imports(Path("loop.py")) if module.startswith("finetune.")}
    assert seen <= {"config", "layers", "losses", "metrics", "ema", "finite"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = (PACKAGE / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450, f"{path} has two reasons to change by now"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (code[-1].end_lineno or 0) - code[0].lineno + 1 if code else 0
            assert lines <= 60, f"{path}: {node.name} has {lines} lines"
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 9, f"{path}: {node.name} takes too many arguments"


def test_a_training_step_can_be_read_in_two_files() -> None:
    """A newcomer reads layers.py and loop.py: code lines, without docstrings, comments and blank lines."""
    lines = 0
    for name in ("layers.py", "loop.py"):
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        lines += len(ast.unparse(tree).splitlines())
    assert lines <= 300


def test_no_drawers_and_no_probing() -> None:
    for path in MODULES:
        assert path.stem not in ("utils", "util", "helpers", "helper", "misc", "manager", "common"), path
        for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "hasattr", f"{path}:{node.lineno} probes with hasattr"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} catches everything"


def test_top_level_holds_only_what_the_plan_names() -> None:
    allowed = {
        "pyproject.toml",
        "constraints.txt",
        "constraints-lowest.txt",
        "conf",
        "finetune",
        "scripts",
        "tests",
        "outputs",
        "README.md",
        "docs",
        "LICENSE",
    }
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed
