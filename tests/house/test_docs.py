"""What the documents show runs as it stands there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from finetune.system.ours import MARKER, OWN, FolderKind

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "finetune"
MAP = "## Every file\n"  # of ARCHITECTURE.md
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_the_names_on_the_architecture_page_exist() -> None:
    """`core/sched.py:CURVES` is the name CURVES in finetune/core/sched.py."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "CONTRIBUTING.md"))
    found = re.findall(r"`((?:[\w.]+/)*\w+\.py)(?::(\w+))?`", text)
    assert len(found) > 30
    for path, name in found:
        file = next((base / path for base in (ROOT / "finetune", ROOT) if (base / path).is_file()), None)
        assert file is not None, f"{path} does not exist"
        is_defined = rf"^ *(?:async )?(?:def |class |){name}\b"
        assert re.search(is_defined, file.read_text(encoding="utf-8"), re.MULTILINE), f"{path} defines no {name}"


def test_the_readme_names_every_file_that_a_run_leaves() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What a run leaves")[2].partition("## ")[0]
    run = OWN[FolderKind.run]
    names = [*run.replaced, *run.in_place, *run.folders, *run.folders["checkpoints"].replaced, MARKER]
    missing = [name for name in names if f"{name}`" not in table and f"{name}/`" not in table]
    assert missing == ["checkpoints", "damaged.pt"], missing


def map_of_files() -> str:
    """A line for each module of the package, the first sentence of its docstring, under its folder."""
    lines = []
    for init in sorted(PACKAGE.rglob("__init__.py")):
        folder = init.parent.relative_to(PACKAGE).as_posix()
        lines += ["", f"**`{folder}/`** {first_sentence(init)}" if folder != "." else "**`finetune/`**", ""]
        modules = (path for path in sorted(init.parent.glob("*.py")) if path != init)
        lines += [f"* `{path.relative_to(PACKAGE).as_posix()}`: {first_sentence(path)}" for path in modules]
    return "\n".join(lines) + "\n"


def first_sentence(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.) ", " ".join(said.partition("\n\n")[0].split()))[0]


def test_the_map_names_every_file_once_with_the_sentence_at_its_top(update_golden: bool) -> None:
    page = ROOT / "ARCHITECTURE.md"
    text = page.read_text(encoding="utf-8")
    above, found, below = text.partition(MAP)
    assert found
    if update_golden:
        page.write_text(f"{above}{MAP}{map_of_files()}", encoding="utf-8")
    else:
        mend = "files or their docstrings changed: pytest tests/house/test_docs.py --update-golden rewrites the map"
        assert below == map_of_files(), mend
