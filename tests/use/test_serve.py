"""`finetune serve`: a real server on a free port, its answers beside those of `predict`, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import ALL, small_images, small_model
from small_runs import finetune as started

import finetune
from finetune.__main__ import main
from finetune.use import serving, serving_answers
from finetune.use.predictor import Predictor
from finetune.use.serving import Server
from finetune.use.serving_answers import Answers
from finetune.use.serving_maps import heat_maps

MULTIPART = {"Content-Type": "multipart/form-data; boundary=xyz"}


@contextmanager
def served(predictor: Predictor) -> Iterator[Server]:
    server = Server(0)
    thread = threading.Thread(target=server.serve, args=(Answers(predictor),))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def predictor(striped_run: Path) -> Predictor:
    return finetune.load(striped_run, device="cpu")


@pytest.fixture(scope="module")
def server(predictor: Predictor) -> Iterator[Server]:
    with served(predictor) as found:
        yield found


def raw(server: Server, data: bytes, *, ends: bool = False) -> bytes:
    """Everything that the server sends for these bytes; `ends`: the client sends no more."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(data)
        if ends:
            client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(2**16), b""))


def ask(
    server: Server, place: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    given = {
        "Host": f"127.0.0.1:{server.server_port}",
        **{key.replace("_", "-"): text for key, text in headers.items()},
    }
    if body is not None:
        given.setdefault("Content-Length", str(len(body)))
    lines = [f"{method or ('GET' if body is None else 'POST')} {place} HTTP/1.1"]
    lines += [f"{key}: {value}" for key, value in given.items() if value]
    head, _, content = raw(server, "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")).partition(
        b"\r\n\r\n"
    )
    status, *rest = head.decode("latin-1").split("\r\n")
    found = dict(line.split(": ", 1) for line in rest)
    assert int(found["Content-Length"]) == len(content) or method == "HEAD"
    return int(status.split()[1]), found, content


def form(*files: tuple[str, bytes]) -> bytes:
    head = b'--xyz\r\nContent-Disposition: form-data; name="a"; filename="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (name.encode(), data) for name, data in files) + b"--xyz--\r\n"


def images(number: int) -> list[bytes]:
    random, found = np.random.default_rng(3), []
    for index in range(number):
        file = io.BytesIO()
        pixels = random.integers(0, 256, size=(20 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, ("PNG", "JPEG")[index % 2])
        found.append(file.getvalue())
    return found


def test_fifty_requests_at_once_have_the_numbers_of_predict(
    server: Server, predictor: Predictor, tmp_path: Path
) -> None:
    files = images(50)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda file: ask(server, "/predict?top_k=3", file), files))
    for number, (status, _, content) in enumerate(answers):
        (tmp_path / f"{number}.img").write_bytes(files[number])
        (wanted,) = predictor.predict(str(tmp_path / f"{number}.img"), top_k=3)
        assert status == 200
        assert json.loads(content) == {
            "name": "image",
            "label": wanted.label,
            "probability": wanted.probability,
            "labels": list(wanted.labels),
            "probabilities": list(wanted.probabilities),
        }
    # Several in one request are what `predict` says of them together, and a broken one is named.
    status, _, content = ask(server, "/predict", form(*((f"{i}.png", files[i]) for i in range(3))), **MULTIPART)
    together = predictor.predict([str(tmp_path / f"{i}.img") for i in range(3)])
    found = json.loads(content)["images"]
    assert status == 200 and [each["name"] for each in found] == ["0.png", "1.png", "2.png"]
    assert [each["probability"] for each in found] == [each.probability for each in together]
    status, _, content = ask(server, "/predict", form(("é/a.png", files[0]), ("b.png", files[1][:90])), **MULTIPART)
    good, bad = json.loads(content)["images"]
    assert status == 422 and json.loads(content)["error"].startswith("1 of 2 images cannot be used: b.png: ")
    assert good["name"] == "a.png" and "label" in good and "error" in bad and "label" not in bad


def test_the_page_runs_nothing_but_its_own_script(server: Server) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and headers["Server"] == "finetune"
    policy = headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    # Names of classes and files come into the page as text alone, and nothing is fetched from elsewhere.
    assert not re.search(rb"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://|src=|@import", page)
    assert ask(server, "/", method="HEAD")[2] == b""


def test_what_it_says_of_the_model(server: Server, predictor: Predictor) -> None:
    status, headers, content = ask(server, "/about", Host="localhost")
    about = json.loads(content)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert about["classes"] == ["across", "down", "flat"] and about["threshold"] is None
    assert about["preprocess"] == predictor.preprocess.as_dict() and about["limits"]["bytes"] == 20 * 2**20


def test_what_the_model_saw_is_what_it_reads(server: Server, predictor: Predictor) -> None:
    (file,) = images(1)
    found = json.loads(ask(server, "/predict?view=1", file)[2])
    seen = Image.open(io.BytesIO(base64.b64decode(found["seen"].partition(",")[2])))
    size = predictor.preprocess.size
    assert seen.size == (size, size)
    if predictor.preprocess.resize == "squash":
        assert predictor.predict(seen)[0].probability == pytest.approx(found["probability"], abs=1e-6)
    values = np.array(found["heat_map"])
    assert values.shape[0] == values.shape[1] > 1 and values.min() >= 0 and values.max() in (0, 1)
    assert found["probability"] == predictor.predict(Image.open(io.BytesIO(file)))[0].probability


def test_several_labels_have_a_threshold(labelled_run: tuple[Path, Path]) -> None:
    predictor = finetune.load(labelled_run[0], device="cpu")
    with served(predictor) as server:
        found = json.loads(ask(server, "/predict", images(1)[0])[2])
        assert set(found["scores"]) == set(predictor.classes)
        assert all(value >= predictor.threshold for value in found["probabilities"])
        assert found["label"] == (found["labels"] or [None])[0]
        assert json.loads(ask(server, "/about")[2])["threshold"] == predictor.threshold


PNG = images(1)[0]


@pytest.mark.parametrize(
    ("status", "place", "body", "headers", "message"),
    [
        (403, "/", None, {"Host": "evil.example"}, "Host must be"),
        (403, "/", None, {"Host": "127.0.0.1.evil.example:80"}, "Host must be"),
        (403, "/about", None, {"Host": ""}, "Host must be"),
        (403, "/about", None, {"Origin": "http://evil.example"}, "another page"),
        (403, "/predict", PNG, {"Origin": "null"}, "another page"),
        (403, "/predict", PNG, {"Origin": "http://127.0.0.1:1"}, "another page"),
        (403, "/predict", PNG, {"Sec_Fetch_Site": "cross-site"}, "another page"),
        (403, "/predict", PNG, {"Sec_Fetch_Site": "same-site"}, "another page"),
        (404, "/../etc/passwd", None, {}, "there is GET /"),
        (404, "/etc/passwd", None, {}, "there is GET /"),
        (404, "http://127.0.0.1/predict", PNG, {}, "there is GET /"),
        (405, "/predict", None, {}, "asked by POST"),
        (405, "/about", PNG, {}, "asked by GET"),
        (400, "/predict", b"", {}, "the body is empty"),
        (411, "/predict", PNG, {"Content_Length": ""}, "Content-Length is missing"),
        (411, "/predict", PNG, {"Transfer_Encoding": "chunked"}, "Transfer-Encoding"),
        (400, "/predict", PNG, {"Content_Length": "-1"}, "one whole number"),
        (400, "/predict", PNG, {"Content_Length": "1_0"}, "one whole number"),
        (400, "/predict", PNG, {"Content_Length": "5\r\nContent-Length: 6"}, "one whole number"),
        (413, "/predict", PNG, {"Content_Length": str(2**30)}, "at most 20,971,520"),
        (415, "/predict", PNG, {"Content_Type": "application/json"}, "expected an image"),
        (415, "/predict", PNG, {"Content_Type": "text/html"}, "expected an image"),
        (422, "/predict", b"no image", {}, "cannot be read as an image"),
        (422, "/predict", PNG[:-30], {"Content_Type": "image/png"}, "cannot be read as an image"),
        (422, "/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n", {}, "cannot be read as an image"),
        (422, "/predict", b"/etc/passwd", {}, "cannot be read as an image"),
        (400, "/predict?top_k=0", PNG, {}, "top_k must be"),
        (400, "/predict?top_k=%EF%BC%91", PNG, {}, "top_k must be"),
        (400, "/predict?view=2", PNG, {}, "view must be"),
        (400, "/predict?path=/etc/passwd", PNG, {}, "nothing else"),
        (400, "/predict?" + "a=1&" * 50, PNG, {}, "nothing else"),
        (400, "/predict", PNG, {"Content_Type": "multipart/form-data"}, "boundary"),
        (400, "/predict", PNG, {"Content_Type": f"multipart/form-data; boundary={'x' * 71}"}, "boundary"),
        (400, "/predict", PNG, MULTIPART, "its last boundary is missing"),
        (400, "/predict", b"--xyz--", MULTIPART, "holds no image"),
        (400, "/predict", b"--xyz\r\nno end of headers\r\n--xyz--", MULTIPART, "no headers"),
        (400, "/predict", b"--xyz\r\n" + b"a" * 9000 + b"\r\n\r\n\r\n--xyz--", MULTIPART, "too long ones"),
        (400, "/predict", form(("a\"; filename*=utf-8''b; filename*1=\"c", PNG)), MULTIPART, "name of a file"),
        (413, "/predict", form(*[("a", b"")] * 65), MULTIPART, "more than 64 images"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    server: Server, status: int, place: str, body: bytes | None, headers: dict[str, str], message: str
) -> None:
    headers = {key.replace("-", "_"): value for key, value in headers.items()}
    code, sent, content = ask(server, place, body, **headers)
    assert (code, sent["Content-Type"]) == (status, "application/json"), content
    assert message in json.loads(content)["error"] and content.count(b"\n") == 1
    assert "Access-Control-Allow-Origin" not in sent and "Traceback" not in content.decode()


def test_a_decompression_bomb_is_refused(server: Server) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    status, _, content = ask(server, "/predict", file.getvalue())
    assert status == 422 and "decompression bomb" in json.loads(content)["error"]


def test_bytes_that_are_no_http(server: Server) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
    ):
        assert b"<html" not in raw(server, data).lower()
    long = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n"
    assert raw(server, long).startswith(b"HTTP/1.1 431") and raw(server, b"", ends=True) == b""
    assert ask(server, "/", method="OPTIONS")[0] == 501
    assert ask(server, "/about")[0] == 200  # it goes on


def test_a_body_is_asked_for_only_where_it_will_be_read(server: Server) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(PNG)}\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(f"{head}\r\n".encode())
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(PNG)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert raw(server, f"{head}Content-Type: text/html\r\n\r\n".encode(), ends=True).startswith(b"HTTP/1.1 415")
    assert raw(server, f"{head}\r\n".encode() + PNG[:9], ends=True).count(b"the body ended after 9 of") == 1


def test_a_refused_upload_still_gets_its_answer(server: Server) -> None:
    status, _, content = ask(server, "/predict", bytes(22 * 2**20))  # more than any buffer of the system
    assert status == 413 and b"send fewer or smaller" in content


def test_slow_clients_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "IDLE_S", 0.2)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    assert raw(server, head + b"12").startswith(b"HTTP/1.1 408") and raw(server, head[:20]) == b""
    monkeypatch.setattr(serving, "IDLE_S", 60.0)
    monkeypatch.setattr(serving, "REQUEST_S", 0.5)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(head)
        with pytest.raises(OSError):  # it has closed, though a byte came every time
            for _ in range(1000):
                client.sendall(b"1")
                time.sleep(0.02)


def test_a_full_queue_and_too_many_connections_are_503(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_answers, "MOST_WAITING", 1)
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 2)
    with served(predictor) as server:
        with server.answers.place():
            status, headers, content = ask(server, "/predict", PNG)
            assert status == 503 and headers["Retry-After"] == "1" and b"waiting already" in content
        assert ask(server, "/predict", PNG)[0] == 200
        place = ("127.0.0.1", server.server_port)
        with socket.create_connection(place) as one, socket.create_connection(place) as other:
            one.sendall(b"G")
            other.sendall(b"G")
            assert raw(server, b"").startswith(b"HTTP/1.1 503")
        wait_until(lambda: raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200"))


def wait_until(holds: Callable[[], bool]) -> None:
    """The thread of a connection ends a moment after its client has gone."""
    while not holds():
        time.sleep(0.02)


def test_a_fault_of_one_request_ends_no_other(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("secret words")

    with served(predictor) as server:
        with monkeypatch.context() as patch:
            patch.setattr(serving_answers, "heat_maps", fails)
            status, _, content = ask(server, "/predict?view=1", PNG)
        assert status == 500 and b"secret" not in content and "secret words" in capsys.readouterr().err
        assert ask(server, "/predict?view=1", PNG)[0] == 200


def test_a_port_in_use_is_one_line(server: Server, striped_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(striped_run), "--port", str(server.server_port)]) == 1
    error = capsys.readouterr().err
    assert f"port {server.server_port} is in use" in error and error.count("\n") == 1
    for words, message in (
        ([], "RUN is missing"),
        (["a", "b"], "one RUN is served; b is too much"),
        (["a", "--port", "65536"], "expected 0 to 65535"),
        (["a", "--host", "0.0.0.0"], "unrecognized"),
    ):
        assert main(["serve", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["serve", "nowhere", "--port", "0"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_ctrl_c_ends_it_and_nothing_is_written(striped_run: Path, folder: Path) -> None:
    before = sorted(path.name for path in striped_run.rglob("*"))
    process = started("serve", str(striped_run), "--port", "0", "--device", "cpu", cwd=folder, wait=False)
    assert process.stdout is not None
    port = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
    assert port is not None
    with socket.create_connection(("127.0.0.1", int(port[1]))) as idle:
        idle.sendall(b"GET / HT")  # a client that never ends its request
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ended\n", "")
    assert not list(folder.iterdir()) and sorted(path.name for path in striped_run.rglob("*")) == before


@pytest.mark.parametrize("name", ALL)
def test_every_network_says_where_it_looked(name: str) -> None:
    model = small_model(name).eval().requires_grad_(False)
    found = heat_maps(model, small_images(name, 2), torch.float32)
    assert found is not None and found.ndim == 3 and len(found) == 2 and found.shape[1] == found.shape[2]
    assert found.min() >= 0 and found.max() == 1 and not torch.equal(found[0], found[1])


def test_a_map_shows_the_place_that_alone_matters() -> None:
    """Of a network that adds up one map, HiResCAM is exactly what each place adds to the score that won."""
    model = small_model("tv-resnet").eval().requires_grad_(False)
    inputs = small_images("tv-resnet", 1)
    found = heat_maps(model, inputs, torch.float32)
    assert found is not None
    with torch.no_grad():
        activations = model(inputs, stop=model.num_blocks + 1)
        won = int(model(inputs).argmax())
        weight = model.net.get_parameter("fc.weight")[won]
    wanted = (activations[0] * weight[:, None, None]).sum(dim=0).clamp(min=0)
    assert torch.allclose(found[0], wanted / wanted.max(), atol=1e-5)
