"""Files of our own, as an attacker or a broken disk would leave them: one line that names the file, soon."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
import yaml
from msgspec import Meta

from finetune.system.errors import UserError
from finetune.system.reading import (
    ANY_OF_YAML,
    MAX_BYTES,
    DamagedError,
    UnfitError,
    YamlLoader,
    read_file,
    read_json,
    read_json_lines,
    read_yaml,
)

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(i + 1)}: &{chr(i + 1)} [{', '.join([f'*{chr(i)}'] * 9)}]\n" for i in range(ord("a"), ord("l"))
)


class Known(TypedDict, total=False):
    status: str
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    parts: dict[str, list[float]]


@dataclass
class Row:
    name: str
    index: int


# Text -> a word of the reason.
JSONS = {
    b"": "empty",
    b"\n \n": "empty",
    b"[]": "expected 'object'",
    b"null": "expected 'object'",
    b"3": "expected 'object'",
    b"[" * 20_000: "50 levels",
    b'{"a":' * 20_000: "50 levels",
    b'{"a": "' + b"\\" * 99_999 + b"[" * 100_000: "50 levels",
    b'{"pid": -1}': ">= 1",
    b'{"pid": true}': "expected 'int'",
    b'{"pid": 3000000000}': "<= 2147483647",
    b'{"pid": 1' + b"0" * 30 + b"}": "64 bits",
    b'{"other": 1' + b"0" * 5_000 + b"}": "64 bits",
    b'{"other": 1e999}': "out of range",
    b'{"other": NaN}': "no number of JSON",
    b'{"other": -Infinity}': "no number of JSON",
    b'{"status": 5}': "expected 'str'",
    b'{"parts": {"a": [1.0, {}]}}': "content.parts[...][1]",
    b'{"status": "a': "no JSON",
    b'{"status": "\xff"}': "UTF-8",
    b"\x00" * 100: "no JSON",
    bytes(range(256)): "UTF-8",
}
YAMLS = {
    "": "expected 'object'",
    "- 1": "expected 'object'",
    "null": "expected 'object'",
    "1: 2": "expected 'str'",
    "a: &a [*a]": "alias",
    LAUGHS: "alias",
    "[" * 20_000: "50 levels",
    "{" * 20_000: "50 levels",
    "- " * 20_000: "50 levels",
    "a: " + "1:" * 300_000 + "1": "400 digits",
    "a: " + "1" * 5_000: "400 digits",
    "a: !!int " + '"' + "1:" * 300_000 + '1"': "400 digits",
    "a: 2001-99-99": "month",
    "a: !!python/object/apply:os.system [x]": "line 1: could not determine",
    "a: 1\n\tb: 2": "line 2",
    "a: \0": "unacceptable character",
    "a: [1": "line 1",
    "--- 1\n--- 2": "another document",
    'a: !!float ""': "not of its type",
    "a: !!bool x": "not of its type",
    "a: !!timestamp x": "not of its type",
    "? [a]\n: 1": "unhashable",
}


def refusal(path: Path, read: Any) -> str:
    with pytest.raises(DamagedError) as found:
        read(path)
    text = str(found.value)
    assert str(path) in text and "\n" not in text and len(text) < 500 and text.endswith("; remove it")
    return text


@pytest.mark.parametrize("content", JSONS, ids=range(len(JSONS)))
def test_json_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert JSONS[content] in refusal(path, lambda path: read_json(path, Known, mend="remove it"))
    if content.strip():
        path.write_bytes(b'{"status": "fine"}\n\n' + content.replace(b"\n", b"") + b"\n")
        assert "line 3: " in refusal(path, lambda path: read_json_lines(path, Known, mend="remove it"))


@pytest.mark.parametrize("content", YAMLS, ids=range(len(YAMLS)))
def test_yaml_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    assert YAMLS[content] in refusal(path, lambda path: read_yaml(path, dict[str, Any], mend="remove it"))


def test_yaml_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("a: é".encode("latin-1"))
    assert "UTF-8" in refusal(path, lambda path: read_yaml(path, dict[str, Any], mend="remove it"))


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 5 * 2**30)
    elif kind == "link":
        path.with_suffix(".target").write_text("{}")
        path.symlink_to(path.with_suffix(".target"))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.skipif(os.name != "posix", reason="no pipes in folders")
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "link", "device"])
def test_only_a_regular_file_of_fair_size_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    special(kind, path)
    reason = {"huge": f"{5 * 2**30:,} bytes", "link": "symbolic link", "device": "symbolic link"}.get(kind, "regular")
    readers = (read_json, read_json_lines, read_yaml)
    for read in readers:
        assert reason in refusal(path, lambda path, read=read: read(path, Known, mend="remove it"))


@pytest.mark.skipif(os.name != "posix", reason="no pipes in folders")
def test_a_link_is_followed_where_it_is_asked_for_but_not_to_a_pipe(tmp_path: Path) -> None:
    for name, kind in {"a": "link", "b": "pipe"}.items():
        special(kind, tmp_path / name)
    (tmp_path / "to_pipe").symlink_to(tmp_path / "b")
    assert read_file(tmp_path / "a", limit=10, follow=True) == b"{}"
    with pytest.raises(UnfitError, match="no regular file"):
        read_file(tmp_path / "to_pipe", limit=10, follow=True)


def test_a_missing_file_is_missing_and_not_damaged(tmp_path: Path) -> None:
    for read in (read_json, read_json_lines, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "x", Known)


def test_what_fits_is_returned_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"status": "\\udcff", "val/top1": 1, "n": null, "parts": {"a": [1]}, "big": 18446744073709551615}')
    found = read_json(path, Known)
    assert found == {"status": "\udcff", "val/top1": 1, "n": None, "parts": {"a": [1]}, "big": 2**64 - 1}
    assert type(found["val/top1"]) is int and type(found["parts"]["a"][0]) is int  # as written, and not 1.0
    path.write_text('{"name": "a", "index": 2}\n\n{"name": "b", "index": 3}')
    assert read_json_lines(path, Row) == [Row("a", 2), Row("b", 3)]
    path.write_text("a: [1, 2.5, yes, x]\nb: {c: null}\n")
    assert read_yaml(path, dict[str, Any]) == {"a": [1, 2.5, True, "x"], "b": {"c": None}}
    deep = "[" * 50 + "]" * 50
    path.write_text(deep)
    assert isinstance(read_json(path, list), list)
    path.write_text('"' + "[" * 1000 + '"')  # brackets in a text nest nothing
    assert read_json(path, str) == "[" * 1000


def test_a_file_may_have_exactly_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("[1]")
    assert read_json(path, list, limit=3) == [1]
    with pytest.raises(DamagedError, match="3 bytes, and 2"):
        read_json(path, list, limit=2)
    assert MAX_BYTES > 1


def test_yaml_of_a_person_may_have_aliases_but_not_without_end() -> None:
    good = "a: &a {k: 1, l: [1, 2]}\nb: *a\nc: {<<: *a, k: 2}\n"
    assert yaml.load(good, Loader=YamlLoader)["c"] == {"k": 2, "l": [1, 2]}
    merges = "a: &a {k: 1}\n" + "".join(
        f"m{i + 1}: &m{i + 1} {{<<: [{', '.join(['*a' if i == 0 else f'*m{i}'] * 9)}]}}\n" for i in range(9)
    )
    for text in (LAUGHS, merges, "a: &a [*a]", "a: &a {b: *a}", "&a [*a]", "a: &a {<<: *a}"):
        with pytest.raises(UserError, match="alias"):
            yaml.load(text, Loader=YamlLoader)
    with pytest.raises(ANY_OF_YAML, match="undefined alias"):
        yaml.load("a: *b", Loader=YamlLoader)
