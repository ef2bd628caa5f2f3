"""Laws of the marker: it makes a folder ours, never one with files of others; nothing goes through a link."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.system.files import write_atomic, write_text
from finetune.system.ours import (
    MARKER,
    OWN,
    WHOLE,
    FolderKind,
    OwnNames,
    RefusedError,
    claim,
    look,
    open_own,
    sweep_temporaries,
    temporary_folder,
    temporary_of,
)

KINDS = list(FolderKind)


def names_of(own: OwnNames) -> list[str]:
    """Every name that is ours, folders among them, with an example of each pattern."""
    names = [*own.replaced, *own.in_place, *own.folders]
    names += [name for name in ("epoch_0007.safetensors", "step_3.pt", "step_3.json") if own.has_pattern(name)]
    return names + [f"{folder}/{name}" for folder, inside in own.folders.items() for name in names_of(inside)]


CASES = [(kind, name) for kind in KINDS for name in names_of(OWN[kind])]
MAKERS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"mine"),
    "folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
    "fifo": lambda path: os.mkfifo(path),
}


def content(folder: Path) -> dict[str, object]:
    """Every path below a folder with its type and its bytes or target."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        data = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (status.st_mode, data)
    return found


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("sort", MAKERS)
def test_a_folder_with_one_of_our_names_is_refused_before_a_byte_is_written(
    tmp_path: Path, kind: FolderKind, name: str, sort: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    MAKERS[sort](tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(RefusedError, match=r"so finetune did not make it.*choose another folder") as caught:
        claim(tmp_path, kind)
    assert name in str(caught.value) and content(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_other_names_do_not_matter(tmp_path: Path, kind: FolderKind) -> None:
    for name in ("notes.txt", "epoch_0003 (copy).safetensors", ".config.yaml.77.tmp", "Run.log", "my.lock"):
        (tmp_path / name).write_text(name)
    before = content(tmp_path)
    assert look(tmp_path, kind) is None and content(tmp_path) == before
    marker = claim(tmp_path, kind)
    assert claim(tmp_path, kind) == look(tmp_path, kind) == marker
    assert {**content(tmp_path), MARKER: 0} == {**before, MARKER: 0}
    for other in set(KINDS) - {kind}:
        with pytest.raises(RefusedError, match=f"holds a {kind} .* a {other} needs another"):
            claim(tmp_path, other)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_claimed_folder_has_no_links_in_the_place_of_our_files(tmp_path: Path, kind: FolderKind, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    marker = claim(run, kind)
    path, own = run / name, OWN[kind]
    is_folder = name in own.folders
    for sort, make in MAKERS.items():
        path.parent.mkdir(exist_ok=True)
        make(path)
        if sort == ("folder" if is_folder else "file"):
            assert claim(run, kind) == marker
        else:
            with pytest.raises(RefusedError, match=r"expected .*nothing was changed: remove or move it"):
                claim(run, kind)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if not is_folder:
        (tmp_path / "other").write_text("somebody's")
        os.link(tmp_path / "other", path)
        if name in own.in_place:
            with pytest.raises(RefusedError, match="a second name of a file"):
                claim(run, kind)
        else:  # a rename leaves the other name alone
            assert claim(run, kind) == marker


def test_a_subfolder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    claim(run, FolderKind.run)
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="checkpoints is a symbolic link, expected a folder"):
        claim(run, FolderKind.run)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "{}", "[" * 5000, '{"kind": "run"}', "\x00\xff", "1" * 5000),
        '{"kind": "run", "format": 1, "finetune": "1", "id": "../../../../etc/x"}',
        '{"kind": "walk", "format": 1, "finetune": "1", "id": "0123456789abcdef"}',
        '{"kind": "run", "format": 2, "finetune": "9", "id": "0123456789abcdef"}',
        '{"kind": "run", "format": true, "finetune": "9", "id": "0123456789abcdef"}',
    ],
)
def test_a_damaged_marker_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    before = content(tmp_path)
    with pytest.raises(RefusedError, match=r"choose another folder") as caught:
        claim(tmp_path, FolderKind.run)
    assert str(tmp_path) in str(caught.value) and content(tmp_path) == before


@pytest.mark.parametrize("sort", ["folder", "link", "fifo"])
def test_a_marker_that_is_no_file_is_refused(tmp_path: Path, sort: str) -> None:
    MAKERS[sort](tmp_path / MARKER)
    with pytest.raises(RefusedError, match=r"\.finetune\.json"):
        claim(tmp_path, FolderKind.run)


def test_of_many_that_claim_at_once_all_get_the_same_marker(tmp_path: Path) -> None:
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        found: list[object] = []
        start = threading.Barrier(4)

        def work(folder: Path = folder, found: list[object] = found, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(claim(folder, FolderKind.cache))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and len(set(found)) == 1 and [path.name for path in folder.iterdir()] == [MARKER]
    with pytest.raises(FileNotFoundError):
        claim(tmp_path / "missing", FolderKind.run)


def test_a_claim_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert claim(tmp_path, FolderKind.run) == look(tmp_path, FolderKind.run)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


@pytest.mark.parametrize("mode", ["a", "w", "ab+"])
def test_a_file_is_opened_without_following_anything(tmp_path: Path, mode: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"somebody's")
    path = tmp_path / "run.log"
    for make in (
        lambda: path.symlink_to(victim),
        lambda: os.link(victim, path),
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to(tmp_path / "new"),
    ):
        make()
        with pytest.raises(RefusedError, match="nothing was changed"):
            open_own(path, mode)
        assert victim.read_bytes() == b"somebody's" and not (tmp_path / "new").exists()
        path.rmdir() if path.is_dir() else path.unlink()
    for _ in range(2):
        with open_own(path, mode) as file:
            file.write(b"x" if "b" in mode else "x")
    assert path.read_bytes() == (b"x" if mode == "w" else b"xx")


def test_temporaries_carry_the_id_and_no_others_are_swept(tmp_path: Path) -> None:
    marker = claim(tmp_path, FolderKind.run)
    other = "0" * 16 if marker.id != "0" * 16 else "1" * 16
    foreign = [".a.77.tmp", ".a.tmp", "a.tmp", f".a.{other}-77.tmp", f".a.{marker.id}.tmp", f"a.{marker.id}-7.tmp"]
    foreign.append(f"..finetune.json.{other}-8.tmp")
    own = ("checkpoints", "bad_batch")
    folders = [tmp_path, *(tmp_path / name for name in (*own, "of others"))]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        assert temporary_of(folder / "a.b").name == f".a.b.{marker.id}-{os.getpid()}.tmp"
        for each in [*foreign, f".a.{marker.id}-77.tmp"]:
            (folder / each).write_text("x")
        (folder / f".f.{marker.id}-77.tmp").mkdir()
    sweep_temporaries(tmp_path, FolderKind.run)
    for folder in folders:
        left = {path.name for path in folder.iterdir()} - {MARKER, *(path.name for path in folders)}
        kept = [f".a.{marker.id}-77.tmp"] if folder.name == "of others" else []
        assert left == {*foreign, f".f.{marker.id}-77.tmp", *kept}, folder
    loose = tmp_path.parent / f"loose{random.random()}"
    loose.mkdir()
    assert temporary_of(loose / "a") != temporary_of(loose / "a")


def test_a_library_with_temporary_names_of_its_own_leaves_nothing_behind(tmp_path: Path) -> None:
    """safetensors writes .tmpXXXXXX beside the file that it was asked for; a kill leaves that, as large as a model."""
    marker, place = claim(tmp_path, FolderKind.run), tmp_path / "checkpoints"
    place.mkdir()
    path = place / "last.safetensors"
    with pytest.raises(OSError, match="full"), temporary_folder(path) as folder:
        assert folder.parent == place and folder.name == f".last.safetensors.parts.{marker.id}-{os.getpid()}.tmp"
        (folder / ".tmpQMcGfw").write_text("x")
        (folder / WHOLE).write_text("x")
        raise OSError("full")
    assert not list(place.iterdir())
    left, mixed, foreign = (
        place / f".x.parts.{ident}-{number}.tmp" for ident, number in ((marker.id, 7), (marker.id, 8), ("0" * 16, 9))
    )
    for each in (left, mixed, foreign):
        each.mkdir()
        (each / ".tmpQMcGfw").write_text("x")
    (mixed / "notes.txt").write_text("somebody's")
    (mixed / "folder").mkdir()
    sweep_temporaries(tmp_path, FolderKind.run)
    assert not left.exists() and (foreign / ".tmpQMcGfw").exists()
    assert {path.name for path in mixed.iterdir()} == {"notes.txt", "folder"}
    # Under the number of this process, too.
    (place / folder.name).mkdir()
    (place / folder.name / ".tmpQMcGfw").write_text("x")
    with temporary_folder(path) as again:
        assert not list(again.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_claim_left_that_was_killed_goes_with_the_next_one(tmp_path: Path, kind: FolderKind) -> None:
    """However much of its marker was written by then; a file that only has such a name stays."""
    first = tmp_path / "first"
    first.mkdir()
    ident = claim(first, kind).id
    text, folder = (first / MARKER).read_text(), tmp_path / "folder"
    folder.mkdir()
    for number, length in enumerate([0, 1, 7, 12, 26, 40, len(text)]):
        (folder / f"..finetune.json.{ident}-{number}.tmp").write_text(text[:length])
    foreign = {"7": "somebody's", "8": text[1:], "9": text.replace(ident, "f" * 16), "10": " " * 5000}
    for number, content in foreign.items():
        (folder / f"..finetune.json.{ident}-{number}.tmp").write_text(content)
    (folder / f"..finetune.json.{ident}-11.tmp").symlink_to("nowhere")
    claim(folder, kind)
    names = {f"..finetune.json.{ident}-{number}.tmp" for number in (*foreign, "11")}
    assert {path.name for path in folder.iterdir()} == {MARKER, *names}


def test_a_temporary_follows_no_link_that_waits_under_its_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    claim(run, FolderKind.run)
    victim = tmp_path / "victim"
    victim.write_bytes(b"somebody's")
    temporary_of(run / "config.yaml").symlink_to(victim)
    write_text(run / "config.yaml", "new")
    assert victim.read_bytes() == b"somebody's" and (run / "config.yaml").read_text() == "new"
    (run / "lr.png").symlink_to(victim)
    write_atomic(run / "lr.png", lambda path: path.write_bytes(b"new"))
    assert victim.read_bytes() == b"somebody's" and not (run / "lr.png").is_symlink()
