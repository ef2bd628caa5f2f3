"""The house plan: imports point one way, heavy packages stay where they belong, modules and functions stay small."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "finetune"

# A room imports only from rooms on a lower level.
LEVELS = {
    "system": 0,
    "config": 1,
    "core": 2,
    "models": 3, "data": 3, "runs": 3,
    "prefix": 4, "report": 4,
    "app": 5, "use": 5,
    "commands": 6,
    "__main__": 7, "__init__": 7,
}  # fmt: skip
# Inside `data/` a part imports only from parts on a lower floor, or from itself.
FLOORS = {
    "packed": 0, "split_words": 0, "streams": 1,
    "images": 2,
    "split": 3,
    "cutting": 4, "caches": 4, "labels": 4,
    "selection": 5, "loading": 5,
    "checks": 6,
    "grouping": 7,
    "sources": 8,
    "__init__": 9,
}  # fmt: skip
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
HEAVY = ("torch", "torchvision", "timm", "open_clip", "numpy")
# Rooms and modules that answer without torch: a typing mistake, `--help`, a report of a finished run.
WITHOUT_TORCH = (
    "system",
    "config",
    "report",
    "commands/__init__.py",
    "commands/train.py",
    "__main__.py",
    "__init__.py",
)


def room(path: Path) -> str:
    """`models/heads/head.py` -> models, `__main__.py` -> __main__."""
    return path.parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at module level) for every import outside `if TYPE_CHECKING`."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, top))
                if child.module.split(".")[0] == "finetune":
                    found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    visit(tree(path), True)
    return found


def modules_imported(path: Path) -> set[Path]:
    """The modules of the package that `path` imports, as paths; a package stands for its `__init__.py`."""
    found = set()
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "finetune":
            continue
        for candidate in (Path(*parts[1:-1], f"{parts[-1]}.py"), Path(*parts[1:], "__init__.py")):
            if len(parts) > 1 and candidate in MODULES:
                found.add(candidate)
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_every_room_has_a_level_and_the_ground_floor_is_small() -> None:
    rooms = {room(path) for path in MODULES}
    assert rooms <= LEVELS.keys(), "a new room needs a level in this test"
    entries = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert len(entries) <= 12, sorted(entries)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path: Path) -> None:
    for other in modules_imported(path):
        if room(other) != room(path) and other != Path("__init__.py"):
            assert LEVELS[room(other)] < LEVELS[room(path)], f"{path} imports {other}"


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) == "data"], ids=str)
def test_the_floors_of_data(path: Path) -> None:
    def floor(module: Path) -> int:
        return FLOORS[module.parts[1].removesuffix(".py")]

    for other in modules_imported(path):
        if room(other) == "data" and other.parts[1] != path.parts[1] and other != Path("data/__init__.py"):
            assert floor(other) < floor(path), f"{path} imports {other}"


def test_no_circle_inside_a_room() -> None:
    """A package's `__init__.py` lists what it offers; its own modules import each other by their full names."""
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(map(str, (*above, path)))
        if path in done:
            return
        for other in modules_imported(path):
            visit(other, (*above, path))
        done.add(path)

    for path in MODULES:
        visit(path, ())


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    name = path.as_posix()
    for module, top in imports(path):
        root = module.split(".")[0]
        if root in ("hydra", "omegaconf"):
            assert name.startswith(("config/words/", "app/launchers")), f"{path} imports {module}"
        lazy = (
            "timm",
            "open_clip",
            "transformers",
            "matplotlib",
            "tensorboard",
            "wandb",
            "mlflow",
            "sklearn",
            "fsspec",
        )
        if root in lazy or module.startswith("torchvision.models"):
            assert not top, f"{path} imports {module} at the top, so every start pays for it"
        if module.startswith("torch.distributed"):
            assert name in ("core/distributed.py", "runs/checkpoint.py"), f"{path} imports {module}"
        if root in HEAVY and (room(path) in WITHOUT_TORCH or name in WITHOUT_TORCH):
            raise AssertionError(f"{path} imports {module}")
        if room(path) == "config" and not name.startswith("config/words/"):
            assert root not in ("yaml", "tqdm"), f"{path} imports {module}: standard library only"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    """An import inside a function hides what a module depends on; it is for libraries that cost a start too much."""
    if room(path) in ("commands", "__main__", "__init__"):
        return  # each command imports its rooms once its words are known to be good
    for module, top in imports(path):
        if module.split(".")[0] == "finetune":
            assert top, f"{path} imports {module} inside a function"


def test_core_knows_no_data_no_files_no_log() -> None:
    for path in MODULES:
        if room(path) == "core":
            for module, _ in imports(path):
                assert module.split(".")[0] not in ("pathlib", "yaml", "tqdm"), f"{path} imports {module}"
                assert not module.startswith(("finetune.system.files", "finetune.system.log")), f"{path}: {module}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = (PACKAGE / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{path} has two reasons to change by now"
    for node in functions(path):
        lines = (node.end_lineno or 0) - node.lineno + 1
        assert lines <= 50, f"{path}: {node.name} has {lines} lines"
        names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]]
        assert len([name for name in names if name not in ("self", "cls")]) <= 7, f"{path}: {node.name}: {names}"


def test_the_whole_configuration_goes_no_further_than_the_composition_root() -> None:
    """Only `app/` and the commands take a `Conf`; that lower rooms take no `app.build.Run` follows from the levels."""
    for path in MODULES:
        if room(path) in ("app", "commands", "config"):
            continue
        for node in functions(path):
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
                assert kind != "Conf", f"{path}: {node.name} takes a whole {kind}"


def test_no_drawers_and_no_probing() -> None:
    for path in MODULES:
        assert path.stem not in ("utils", "util", "helpers", "helper", "misc", "manager", "common"), path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "hasattr", f"{path}:{node.lineno} probes with hasattr"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} catches everything"


def test_every_room_says_what_it_is_for() -> None:
    for path in MODULES:
        if path.name == "__init__.py" and len(path.parts) == 2:
            said = ast.get_docstring(tree(path)) or ""
            assert len(said.splitlines()) >= 3, f"{path}: what the room is for, what it may know, what to read first"


def test_top_level_holds_only_what_the_plan_names() -> None:
    allowed = {"pyproject.toml", "constraints.txt", "constraints-lowest.txt", "LICENSE"}
    allowed |= {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"}
    allowed |= {"conf", "finetune", "scripts", "tests", "outputs", "docs"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed
