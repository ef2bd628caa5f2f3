"""Laws of shards by URL and from commands: fetched once, whole, as good as local ones, whatever breaks on the way."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from finetune.__main__ import main
from finetune.config import CacheKind, Conf, DataConf, SourceKind, find_problems
from finetune.config.words.saved import read_conf
from finetune.core.preprocess import Preprocess
from finetune.data import Loader, Source, open_source
from finetune.data.caches.entries import beside, cache_folder, claim_cache
from finetune.data.checks.examine import examine
from finetune.data.checks.known_images import KnownImages
from finetune.data.sources import fetching, remote_shards
from finetune.data.sources.fetching import RemoteFile
from finetune.system.limits import in_bytes
from finetune.system.reading import DamagedError
from finetune.system.seals import read_sealed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and process groups")
NAMES = ["train-0000.tar", "train-0001.tar", "val-0000.tar", "test-0000.tar"]
PATTERNS = "train-{0000..0001}.tar", "{val,test}-0000.tar"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Four local shards of 8 images each, two classes by number."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        with tarfile.open(folder / name, "w") as tar:
            for i in range(8):
                pixels = np.random.default_rng([number, i]).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                for ending, data in (("png", image.getvalue()), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. Each request for a file in `plan` fails in the next way that is listed there ("": none)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.plan: dict[str, list[str]] = {}
        self.log: list[str] = []
        self.delay_s = 0.0
        self.says_length = True
        self.base = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        server.log.append(self.path)
        turns = server.plan.get(name, [])
        todo = turns.pop(0) if turns else ""
        if todo.isdecimal():
            self.send_error(int(todo))
            return
        path = server.folder / name
        if not path.exists():
            self.send_error(404)
            return
        data = b"<html>please log in</html>" * 100 if todo == "page" else path.read_bytes()
        self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        rest = data[: int(todo.removeprefix("die"))] if todo.startswith("die") else data
        for i in range(0, len(rest), 4096):
            self.wfile.write(rest[i : i + 4096])
            self.wfile.flush()
            time.sleep(server.delay_s)
        if todo.startswith("die"):
            self.close_connection = True


@pytest.fixture
def server(packed: Path) -> Iterator[Server]:
    serving = Server(packed)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DELAY_S", 0.001)


def conf(tmp_path: Path, root: str, **changes: object) -> DataConf:
    settings = {"download": True, "cache_dir": str(tmp_path / "cache"), **changes}
    return DataConf(source=SourceKind.webdataset, root=root, **settings)  # type: ignore[arg-type]


def content(source: Source) -> dict[str, list[tuple[str, str, bytes]]]:
    """Of each split (name of the image in its shard, class, bytes)."""
    return {
        name: [
            (split.name_of(i).rpartition("/")[2], source.classes[int(split.labels[i])], split.store.read(row))
            for i, row in enumerate(split.rows.tolist())
        ]
        for name, split in source.splits.items()
    }


def url(server: Server) -> str:
    return "::".join(f"{server.base}/set/{pattern}" for pattern in PATTERNS)


def local(packed: Path) -> Source:
    return open_source(DataConf(source=SourceKind.webdataset, root=str(packed)))


def fetched(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (cache_folder(str(tmp_path / "cache")) / "shards").glob("*.tar"))


def test_urls_give_what_local_shards_give_and_are_asked_once(tmp_path: Path, packed: Path, server: Server) -> None:
    source = open_source(conf(tmp_path, url(server)))
    assert content(source) == content(local(packed))
    assert [len(source.splits[name]) for name in ("train", "val", "test")] == [16, 8, 8]
    assert source.splits["val"].name_of(0).startswith(f"{server.base}/set/val-0000.tar/")
    asked = len(server.log)
    assert sum(path.endswith(".tar") for path in server.log) == 8
    again = open_source(conf(tmp_path, url(server), download=False))  # all there: nothing to allow, nobody to ask
    assert content(again) == content(source) and len(server.log) == asked
    report = examine(again, KnownImages(str(tmp_path / "cache"), again.location))
    assert not report.unreadable and "32 decoded" in report.coverage
    assert examine(again, KnownImages(str(tmp_path / "cache"), again.location)).remembered == 32


def test_nothing_is_fetched_unasked(tmp_path: Path, packed: Path, server: Server) -> None:
    size = sum((packed / name).stat().st_size for name in NAMES)
    with pytest.raises(ValueError, match=r"not on this machine yet: 4 of 4 shards, .* data\.download=true") as error:
        open_source(conf(tmp_path, url(server), download=False))
    assert in_bytes(size) in str(error.value) and len(server.log) == 4
    with pytest.raises(ValueError, match="of unknown size"):
        open_source(conf(tmp_path, f"pipe:cat {packed}/train-0000.tar", download=False))
    assert not (tmp_path / "cache").exists()


def test_class_names_come_along(tmp_path: Path, packed: Path, server: Server) -> None:
    (packed / "classes.txt").write_text("cat\ndog\n")
    assert open_source(conf(tmp_path, url(server))).classes == ("cat", "dog")
    assert open_source(conf(tmp_path, url(server), download=False)).classes == ("cat", "dog")
    server.plan["classes.txt"] = ["page"] * 9
    other = conf(tmp_path, url(server), cache_dir=str(tmp_path / "other"))
    assert open_source(other).classes == ("0", "1")  # a server that says "log in" for everything names no class


def test_secrets_of_an_address_are_never_shown(tmp_path: Path, server: Server) -> None:
    source = open_source(conf(tmp_path, f"{server.base}/set/train-0000.tar?signature=s3cret"))
    assert "s3cret" not in f"{source.description} {source.location} {source.splits['train'].name_of(0)}"
    assert "s3cret" in server.log[0] and "s3cret" not in str(fetched(tmp_path))
    for address in (f"{server.base}/set/none.tar?signature=s3cret", "http://me:s3cret@127.0.0.1/0.tar"):
        with pytest.raises(ValueError, match=r"cannot be fetched: (HTTP 404|user and password)") as error:
            open_source(conf(tmp_path, address))
        assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("says_length", [True, False])
def test_a_broken_download_starts_again(tmp_path: Path, packed: Path, server: Server, says_length: bool) -> None:
    server.says_length = says_length
    server.plan = {"train-0001.tar": ["", "die9000", "503", "429"], "val-0000.tar": ["", "die0", "die513"]}
    assert content(open_source(conf(tmp_path, url(server)))) == content(local(packed))
    assert not list((cache_folder(str(tmp_path / "cache")) / "shards").glob("*.tmp"))


def test_the_rest_of_a_killed_download_is_no_trap(tmp_path: Path, packed: Path, server: Server) -> None:
    place = RemoteFile(f"{server.base}/train-0000.tar").path_in(cache_folder(str(tmp_path / "cache")) / "shards")
    claim_cache(place.parent.parent)
    place.parent.mkdir()
    beside(place).write_bytes((packed / "train-0001.tar").read_bytes() * 2)
    open_source(conf(tmp_path, f"{server.base}/train-0000.tar"))
    assert read_sealed(place) == (packed / "train-0000.tar").read_bytes()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (["503"] * 9, r"HTTP 503 .*4 tries in a row"),
        (["", "die4096"] + ["die0"] * 9, r"(ended after|broke).*4 tries in a row"),
        (["", "page"], r"no whole tar archive"),
        (["", "403"], r"HTTP 403"),
        (["403"], r"HTTP 403"),
    ],
)
def test_what_cannot_be_mended_is_said_in_a_line(tmp_path: Path, server: Server, plan: list[str], words: str) -> None:
    server.plan["train-0001.tar"] = plan
    with pytest.raises(ValueError, match=rf"train-0001\.tar cannot be fetched.*{words}") as error:
        open_source(conf(tmp_path, url(server)))
    assert "\n" not in str(error.value) and not any("train-0001" in name for name in fetched(tmp_path))


def test_nobody_there(tmp_path: Path, server: Server) -> None:
    server.server_close()
    with pytest.raises(ValueError, match=r"cannot be fetched \(.*refused.*\), 4 tries in a row"):
        open_source(conf(tmp_path, f"{server.base}/0.tar"))
    with pytest.raises(ValueError, match="not on this machine yet: 1 of 1 shard, of unknown size"):
        open_source(conf(tmp_path, f"{server.base}/0.tar", download=False))


def test_room_is_looked_at_first(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    monkeypatch.setattr(remote_shards.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(ValueError, match=r"the shards need .* more in .* choose another data\.cache_dir"):
        open_source(conf(tmp_path, url(server)))
    assert fetched(tmp_path) == []


def test_fetched_shards_keep_to_the_bound_of_the_caches(tmp_path: Path, packed: Path, server: Server) -> None:
    size = sum((packed / name).stat().st_size for name in NAMES)
    small = conf(tmp_path, url(server), cache_gib=0.9 * size / 2**30)
    assert not [line for line in find_problems(Conf(data=small)) if "cache_gib" in line]
    open_source(conf(tmp_path, f"{server.base}/set/train-0000.tar", cache_gib=0.9 * size / 2**30))
    with pytest.raises(ValueError, match=r"holds .* of shards: together more than data\.cache_gib="):
        open_source(small)
    assert len(fetched(tmp_path)) == 1
    open_source(conf(tmp_path, url(server), cache_gib=1.01 * size / 2**30))
    open_source(small)  # nothing is left to download
    assert any("cache_gib" in line for line in find_problems(Conf(data=conf(tmp_path, str(packed), cache_gib=1.0))))


def test_a_download_without_an_end_stops_at_the_bound_of_the_caches(tmp_path: Path) -> None:
    for command in ("pipe:yes", "pipe:yes >&2; cat x.tar"):
        with pytest.raises(
            ValueError, match=r"more than 1\.0. MiB; data\.cache_gib|says more than 16\.0 MiB on stderr"
        ):
            open_source(conf(tmp_path, command, cache_gib=1 / 1024))
    assert fetched(tmp_path) == []


@pytest.mark.parametrize("length", [None, "9" * 18, "9" * 5000, "1" + "0" * 12])
def test_a_server_without_an_end_fills_no_disk(tmp_path: Path, length: str | None) -> None:
    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as endless:
        thread = threading.Thread(target=endless.serve_forever)
        thread.start()
        try:
            with pytest.raises(ValueError, match=r"data\.cache_gib=|the shards need .* more in"):
                address = f"http://127.0.0.1:{endless.server_port}/0.tar"
                open_source(conf(tmp_path, address, cache_gib=1 / 1024, max_text_mib=1))
        finally:
            endless.shutdown()
            thread.join()
    assert fetched(tmp_path) == []


# --- other schemes ---------------------------------------------------------------------------------------------------


def test_other_schemes_give_what_local_shards_give(tmp_path: Path, packed: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    (packed / "classes.txt").write_text("cat\ndog\n")
    for path in packed.iterdir():
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    root = "::".join(f"memory://set/{pattern}" for pattern in PATTERNS)
    with pytest.raises(ValueError, match=r"not on this machine yet: 4 of 4 shards, "):
        open_source(conf(tmp_path, root, download=False))
    assert content(open_source(conf(tmp_path, root))) == content(local(packed))
    memory.rm("/set", recursive=True)
    assert open_source(conf(tmp_path, root, download=False)).classes == ("cat", "dog")
    assert open_source(conf(tmp_path, f"file://{packed}/{NAMES[0]}")).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://b/a.tar", r"pip install 'finetune\[s3\]'"),
        ("gcs://b/a.tar", r"pip install 'finetune\[gs\]'"),
        ("abfs://b/a.tar", r"pip install 'finetune\[azure\]'"),
        ("oss://b/a.tar", r"the client for oss:// is not installed: .*ossfs"),
        ("s33://b/a.tar", r"no client is known for s33:// \(did you mean 's3'\?\)"),
        ("memory://none.tar", r"there is no such file"),
    ],
)
def test_what_a_scheme_needs_is_said(tmp_path: Path, address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in ("s3fs", "gcsfs", "adlfs", "ossfs"):
        monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(ValueError, match=words) as error:
        open_source(conf(tmp_path, address))
    assert "\n" not in str(error.value) and "cannot be fetched" in str(error.value)


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_give_what_local_shards_give(tmp_path: Path, packed: Path) -> None:
    root = "::".join(f"pipe:echo it goes >&2; cat {packed}/{pattern}" for pattern in PATTERNS)
    source = open_source(conf(tmp_path, root))
    assert content(source) == content(local(packed))
    assert source.splits["test"].name_of(0).startswith(f"{packed}/test-0000.tar/")
    shutil.rmtree(packed)
    assert len(content(open_source(conf(tmp_path, root, download=False)))["train"]) == 16


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cat FILE; echo no such bucket >&2; exit 3", "exit code 3: no such bucket"),
        ("head -c 9000 FILE", "no whole tar archive"),
        ("cat FILE | head -c 5000 #.tar", "no whole tar archive"),
        ("true", "no whole tar archive"),
        ("no-such-command FILE", "the shell cannot run the command .*no-such-command"),
        ("cat FILE; kill -9 $$", "exit code -9"),
    ],
)
def test_what_commands_get_wrong_is_said(tmp_path: Path, packed: Path, command: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        open_source(conf(tmp_path, f"pipe:{command.replace('FILE', str(packed / 'train-0000.tar'))}"))
    assert "\n" not in str(error.value) and fetched(tmp_path) == []


def test_a_command_that_fails_at_first_is_tried_again(tmp_path: Path, packed: Path) -> None:
    once = tmp_path / "once"
    command = f"if test -e {once}; then cat {packed}/train-0000.tar; else touch {once}; head -c 999 {once}; exit 1; fi"
    assert sum(map(len, content(open_source(conf(tmp_path, f"pipe:{command}"))).values())) == 8


def test_a_failure_ends_the_commands_beside_it(tmp_path: Path, packed: Path) -> None:
    number = tmp_path / "number"
    slow = f"pipe:(echo $$ > {number}; sleep 600; cat {packed}/train-0000.tar)"
    fast = f"pipe:while ! test -s {number}; do sleep 0.05; done; no-such-command 1.tar"
    with pytest.raises(ValueError, match="no-such-command"):
        open_source(conf(tmp_path, f"{slow}::{fast}"))
    for _ in range(200):  # a killed process is listed until it gets a processor to end on
        listed = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True, check=True).stdout
        groups = [line.split() for line in listed.splitlines()]
        alive = [state for group, state in groups if group == number.read_text().strip() and state[0] != "Z"]
        if not alive:
            break
        time.sleep(0.05)
    assert alive == []


@pytest.fixture
def started(tmp_path: Path, packed: Path) -> Path:
    """A run of one epoch whose images come from commands, each of which leaves a mark; its cache is gone."""
    root = "::".join(f"pipe:touch {tmp_path}/ran; cat {packed}/{pattern}" for pattern in PATTERNS)
    words = ["data=webdataset", f'data.root="{root}"', "data.download=true", f"data.cache_dir={tmp_path}/cache"]
    assert main([*words, "model.head=random", "train.epochs=1", f"hydra.run.dir={tmp_path}/run"]) == 0
    (tmp_path / "ran").unlink()
    shutil.rmtree(tmp_path / "cache")
    return tmp_path / "run"


def test_a_command_of_a_resumed_folder_is_shown_and_runs_only_when_allowed_on_the_command_line(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "allow_pipe: true" in (started / "config.yaml").read_text()  # which does not count
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    for command in ([], ["check"], ["describe"], ["train"]):
        capsys.readouterr()
        assert main([*command, f"resume={started}", "train.epochs=2"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        for part in (f"pipe:touch {tmp_path}/ran; cat ", "data.allow_pipe=true", str(started)):
            assert part in line, command
    assert not (tmp_path / "ran").exists()
    assert before == {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    assert main([f"resume={started}", "train.epochs=2", "data.allow_pipe=true"]) == 0
    assert (tmp_path / "ran").exists()
    assert json.loads((started / "result.json").read_text())["epochs"] == 2


def test_a_command_typed_beside_resume_runs(started: Path, tmp_path: Path, packed: Path) -> None:
    root = f"pipe:touch {tmp_path}/typed; cat {packed}/{{train-0000,train-0001,val-0000,test-0000}}.tar"
    assert main([f"resume={started}", f'data.root="{root}"', "train.epochs=2", "resume_force=true"]) == 0
    assert (tmp_path / "typed").exists() and not (tmp_path / "ran").exists()


def test_a_command_of_a_resumed_folder_cannot_hide_what_it_is(
    started: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((started / "config.yaml").read_text())
    config["data"]["root"] = "x.tar::pipe:rm -r a\x1b[2K\r\u202e\nb" + " " * 3000 + "; cat y.tar"
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main([f"resume={started}"]) == 1
    shown = capsys.readouterr().err
    assert r"pipe:rm -r a\x1b[2K\x0d\u202e\x0ab ; cat y.tar" in shown and "\x1b" not in shown
    config["data"]["root"] = "${oc.env:HOME}/x.tar"
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([f"resume={started}"]) == 1
    assert "data.root came from the environment" in capsys.readouterr().err


@pytest.mark.parametrize("beside", ["x.tar", "./x.tar", "../x/{0..3}.tar", "~/x.tar", "file:///x.tar", ""])
def test_no_part_beside_a_command_lets_it_run(
    started: Path, tmp_path: Path, beside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths are written out on the way, so that `data.root` differs from that in the file."""
    config = yaml.safe_load((started / "config.yaml").read_text())
    own = config["data"]["root"]
    for root in (f"{beside}::{own}", f"{own}::{beside}"):
        config["data"] |= {"root": root, "download": True}
        (started / "config.yaml").write_text(yaml.safe_dump(config))
        for words in ([], ["data.workers=0"], ["data.source=webdataset"], ["resume_force=true", "seed=4"]):
            assert main([f"resume={started}", *words]) == 1, root
            assert "its config.yaml reads the images from a command" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_other_commands_on_a_run_directory_run_no_command_of_it(started: Path, tmp_path: Path) -> None:
    """`finetune replay` reads the settings in this way."""
    conf = read_conf(started)
    assert not conf.data.allow_pipe
    with pytest.raises(ValueError, match=r"pipe:touch .* was not run.*data\.allow_pipe=true"):
        open_source(conf.data)
    assert not (tmp_path / "ran").exists()


# --- processes -------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def _open(data: DataConf, results: object) -> None:
    results.put(content(open_source(data)))  # type: ignore[attr-defined]


def test_runs_that_fetch_at_once_fetch_once(tmp_path: Path, packed: Path, server: Server) -> None:
    server.delay_s = 0.02
    results = FORK.Queue()
    processes = [FORK.Process(target=_open, args=(conf(tmp_path, url(server)), results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [content(local(packed))] * 3
    assert sum(path.endswith(".tar") for path in server.log) == 16  # each process asks for 4 lengths; one downloads


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_fetch_at_once_and_the_next_start_fetches_the_rest(
    tmp_path: Path, packed: Path, server: Server, signum: signal.Signals, code: int
) -> None:
    server.delay_s = 30
    run = tmp_path / "run"
    words = ["data=webdataset", f"data.root='{url(server)}'", "data.download=true", "model=vit", "train.epochs=1"]
    words += [f"data.cache_dir={tmp_path / 'cache'}", "data.batch_size=8", f"hydra.run.dir={run}"]
    command = [sys.executable, "-m", "finetune", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((cache_folder(str(tmp_path / "cache")) / "shards").glob("*.tmp")):
        time.sleep(0.05)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=25)
    assert process.returncode == code, text
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    server.delay_s = 0
    assert content(open_source(conf(tmp_path, url(server)))) == content(local(packed))


def test_fetched_shards_feed_a_cache_that_lasts(tmp_path: Path, server: Server) -> None:
    from finetune.core.preprocess import Preprocess
    from finetune.data.caches.pixel_cache import first_step, open_cache

    data = conf(tmp_path, url(server), cache=CacheKind.disk)
    for _ in range(2):
        split = open_source(data).splits["train"]
        open_cache(split, first_step(Preprocess(16, (0, 0, 0), (1, 1, 1)), None), data)
    assert len([path for path in (cache_folder(str(tmp_path / "cache")) / "pixels").iterdir() if path.is_dir()]) == 1


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_no_change_of_a_stored_shard_or_list_changes_an_image_a_label_or_a_name(
    tmp_path: Path, packed: Path, server: Server
) -> None:
    (packed / "classes.txt").write_text("ant\nbee\n")
    data = conf(tmp_path, f"{server.base}/set/{PATTERNS[0]}")
    expected = content(open_source(data))
    shards = sorted((cache_folder(str(tmp_path / "cache")) / "shards").glob("*-train-0001.tar"))
    shards += (cache_folder(str(tmp_path / "cache")) / "shards").glob("*-classes.txt")
    assert len(shards) == 3  # the list in the folder of the shards, and the one above, which is not used
    outcomes = []
    for path in shards:
        whole = path.read_bytes()
        size = len(read_sealed(path))
        # A header and its padding, an image, a label, the zeros at the end, the seal.
        places = [*range(0, min(size, 1024), 90), *range(min(1100, size - 1), size, 4099), *range(size, len(whole), 3)]
        changes = [flipped(whole, place) for place in places] + [whole[:n] for n in (0, 100, size, len(whole) - 1)]
        changes += [whole + b"x", whole[:512] + bytes(512) + whole[1024:], bytes(len(whole)), bytes(512) + whole[512:]]
        for change in changes:
            path.write_bytes(change)
            for again in (data, conf(tmp_path, data.root or "", download=False)):
                try:
                    assert content(open_source(again)) == expected
                    outcomes.append("fetched again" if path.read_bytes() == whole else "no effect")
                except DamagedError as error:
                    assert str(path) in str(error) and "data.download=true" in str(error)
                    outcomes.append("refused")
                path.write_bytes(change)
            path.write_bytes(whole)
    assert outcomes.count("fetched again") > 50 < outcomes.count("refused")
    assert content(open_source(data)) == expected


def test_damage_that_an_epoch_meets_is_fetched_again_at_the_next_start(
    tmp_path: Path, packed: Path, server: Server
) -> None:
    data = conf(tmp_path, f"{server.base}/set/train-0000.tar")
    source = open_source(data)
    expected = content(source)
    (path,) = (cache_folder(str(tmp_path / "cache")) / "shards").glob("*.tar")
    whole = path.read_bytes()
    source = open_source(data)  # has compared headers and labels; this small shard is one block, so those are all of it
    path.write_bytes(flipped(whole, whole.index(b"IDAT") + 50))
    source.splits["train"].store._sealed[0]._is_checked = bytearray(len(whole))  # type: ignore[attr-defined]
    with pytest.raises(DamagedError, match=r"train-0000\.tar is damaged: .*data\.download=true"):
        content(source)
    with pytest.raises(DamagedError, match=r"data\.download=true"):
        open_source(conf(tmp_path, data.root or "", download=False))
    assert content(open_source(data)) == expected and path.read_bytes() == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_over_a_damaged_shard_stops_and_leaves_no_image_out(
    tmp_path: Path, packed: Path, server: Server, workers: str
) -> None:
    data = conf(tmp_path, f"{server.base}/set/train-0000.tar", on_error="skip", workers=workers, batch_size=2)
    source = open_source(data)
    (path,) = (tmp_path / "cache").rglob("shards/*.tar")
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, whole.index(b"IDAT") + 50))
    split = source.splits["train"]
    split.store._sealed[0]._is_checked = bytearray(len(whole))  # type: ignore[attr-defined]
    square = Preprocess(16, (0, 0, 0), (1, 1, 1))
    loader = Loader(split, square, conf=data, augment=None, seed=0, device=torch.device("cpu"))
    with pytest.raises(DamagedError, match=r"train-0000\.tar is damaged: .*data\.download=true"):
        list(loader.epoch(0))
    loader.close()
