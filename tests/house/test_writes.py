"""The list of all places in the package that write, rename or remove files, each with the reason why it is safe.

A new place fails the test until it is here. `scripts/kill_test.py` and its like may kill a run before and after each.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "finetune"
# Methods of paths, functions of os and shutil, and writers of libraries.
METHODS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "rename", "touch", "symlink_to", "hardlink_to"}
METHODS |= {"chmod", "truncate", "savefig", "tofile"}
FUNCTIONS = {
    f"os.{name}" for name in ("link", "makedirs", "mkdir", "open", "remove", "removedirs", "rename", "renames")
}
FUNCTIONS |= {f"os.{name}" for name in ("replace", "rmdir", "symlink", "truncate", "unlink", "utime", "ftruncate")}
FUNCTIONS |= {f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move", "rmtree")}
FUNCTIONS |= {
    "np.save",
    "np.savez",
    "np.memmap",
    "torch.save",
    "save_file",
    "write_text",
    "subprocess.Popen",
    "open_own",
}
FUNCTIONS |= {"write_atomic", "write_whole", "write_json", "sheet.save", "last.replace", "link_or_copy"}

RUN = "the folder was claimed as a run, and its lock is held"
TEMPORARY = "a temporary file that `write_atomic` has made"
CACHE = "inside a claimed cache: a name with its id, a folder with its header, or an entry that `is_own` has found"
READS = "opens for reading"
# File -> (reason, functions).
PLACES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "__main__.py": [("writes to /dev/null", ("main",))],
    "app/run.py": [(RUN, ("_learn", "_start"))],
    "app/session.py": [(RUN, ("_write_config", "accept", "write_result"))],
    "commands/train.py": [("the folder of a job, which is claimed before anything is written there", ("_job",))],
    "data/caches/entries.py": [
        (
            CACHE,
            ("write_header", "made_once", "begin", "remove_entry", "drop", "remove_abandoned", "_remove_leftovers"),
        ),
        (CACHE, ("_remove_folder", "mark_used")),
        ("makes the folder that it claims", ("claim_cache",)),
    ],
    "data/caches/pixel_cache.py": [(CACHE, ("_build",))],
    "data/caches/records.py": [(f"{CACHE}; follows no link, and is the file that was read", ("mend",))],
    "data/checks/contact_sheet.py": [("the folder was claimed as a check", ("write_contact_sheet",))],
    "data/checks/known_images.py": [(CACHE, ("save",)), (TEMPORARY, ("_write",))],
    "data/checks/start.py": [(RUN, ("start", "add"))],
    "data/checks/summary.py": [("the folder was claimed as a check, or as a run", ("check_source", "write_lines"))],
    "data/sources/fetching.py": [
        (CACHE, ("fetch", "_fetch_with_retries", "_download", "_run_command")),
        ("cuts the seal of a file that had one", ("condemn",)),
    ],
    "data/sources/remote_shards.py": [(CACHE, ("fetch_shards",))],
    "prefix/store.py": [(CACHE, ("_write", "__init__"))],
    "report/look.py": [("a claimed folder, or a file that a person named for the picture", ("save_figure",))],
    "report/scores.py": [(RUN, ("write_scores",))],
    "report/sweep.py": [("the folder was claimed as a sweep", ("_write_csv",))],
    "runs/bad_batch.py": [(RUN, ("store",)), (TEMPORARY, ("write",))],
    "runs/checkpoint.py": [(RUN, ("write_state",)), (TEMPORARY, ("write",))],
    "runs/earlier.py": [(f"{RUN}; no step was saved there", ("remove_given_up",))],
    "runs/epoch_files.py": [
        (f"{RUN}; the metadata say who wrote a file", ("latest_state", "remove_epochs", "settle", "_put_back"))
    ],
    "runs/folders.py": [
        ("new or empty folders, and a marker that is alone in one", ("new_folder", "usable_folder", "run_folder")),
        ("the folder was claimed as a sweep; opened by `open_own`", ("_append",)),
        ("claims the folder; replaces no file", ("record_failure",)),
        (READS, ("where_traceback",)),
    ],
    "runs/history.py": [(RUN, ("append", "restore"))],
    "runs/saver.py": [(RUN, ("_write", "finish", "_make_best"))],
    "runs/weights.py": [(TEMPORARY, ("write",)), (RUN, ("write_weights", "write_whole"))],
    "system/files.py": [
        ("beside its place, under a name with the folder's id", ("write_atomic", "link_or_copy", "_second_name")),
        ("the same", ("write_text", "write_json")),
        (READS, ("sync_folder",)),
    ],
    "system/locks.py": [(RUN, ("run_lock",))],
    "system/log.py": [("writes to /dev/null", ("say",)), ("opened by `open_own`", ("_open",))],
    "system/ours.py": [
        ("follows no link and replaces nothing", ("_open_safely", "_write_marker", "_write_new")),
        ("only a regular file with one name", ("opener",)),
        (
            "only names with the folder's id, or a marker's beginning",
            ("create_temporary", "sweep_temporaries", "_sweep_claims", "temporary_folder", "_remove_parts"),
        ),
    ],
    "system/reading.py": [(READS, ("open_regular",))],
    "system/seals.py": [(TEMPORARY, ("seal", "put_checksum", "sort_metadata"))],
    "system/terminal.py": [("writes to /dev/null", ("open_closed_streams",))],
    "use/exporting/checking.py": [("a temporary folder of this process", ("check",))],
    "use/exporting/export.py": [("in the new folder of `made_at`", ("export",))],
    "use/exporting/fresh.py": [("the temporary folder of `checking.py`", ("main",))],
    "use/exporting/int8_file.py": [("in the new folder of `made_at`, and a temporary one", ("quantise",))],
    "use/exporting/pt2_file.py": [("in the new folder of `made_at`", ("write",)), (TEMPORARY, ("_save",))],
    "use/exporting/open_clip_folder.py": [("in the new folder of `made_at`", ("write",))],
    "use/exporting/place.py": [
        ("a new folder under a name of ours, which is renamed to a place where nothing is", ("made_at",)),
        ("folders under such a name with our marker, whose lock is free", ("_sweep",)),
    ],
    "use/exporting/timm_folder.py": [("in the new folder of `made_at`", ("write_files",))],
    "use/exporting/transformers_clip.py": [("in the new folder of `made_at`", ("write",))],
    "use/record.py": [
        ("files of an output that was not there, whose marker was found, or that `--overwrite` names", ("append",)),
        ("the same", ("replace_head", "commit", "finish", "_begun", "_cut", "_take_away")),
        ("the folder was claimed as a table", ("add_part",)),
        ("a lock, and temporary files, with the name of the output in theirs", ("open_record", "_sweep")),
    ],
    "use/sorting.py": [
        ("the folder was claimed as a sorted one; no link in it is followed", ("__init__", "put", "_put"))
    ],
}


def writers(tree: ast.Module) -> set[str]:
    """The names of the innermost functions that call something which may write."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.Call) and may_write(child):
                found.add(inner)
            visit(child, inner)

    visit(tree, "")
    return found


def may_write(call: ast.Call) -> bool:
    name, method = ast.unparse(call.func), call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name == "open" or method == "open":
        modes = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
        written = [mode for mode in map(str, modes) if set(mode) <= set("rwaxbt+") and set(mode) & set("wax+")]
        return name == "os.open" or bool(written)
    return name in FUNCTIONS or method in METHODS


def test_every_place_that_writes_is_listed_with_its_reason() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        functions = writers(ast.parse(path.read_text(encoding="utf-8")))
        if functions:
            found[path.relative_to(PACKAGE).as_posix()] = functions
    listed = {path: {name for _, names in places for name in names} for path, places in PLACES.items()}
    assert found == listed


def test_the_list_would_find_each_way_to_write() -> None:
    for call in (
        "open(p, 'w')",
        "path.open('ab')",
        "open(p, mode='r+b')",
        "os.replace(a, b)",
        "p.unlink()",
        "p.mkdir()",
    ):
        assert may_write(ast.parse(call, mode="eval").body), call  # type: ignore[arg-type]
    for call in ("open(p)", "open(p, 'rb')", "text.replace('a', 'b')", "dataclasses.replace(a)", "names.remove(x)"):
        assert not may_write(ast.parse(call, mode="eval").body), call  # type: ignore[arg-type]
