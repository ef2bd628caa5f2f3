"""The web server of `finetune serve`: a page to try a model, and a JSON endpoint, for this machine alone.

Read `_Handler.do_POST` first. A request passes these checks in order: who asks (`_check_asker`), the address, the
type and the length of the body, a place in the queue. Only then its body is read.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from finetune.system.errors import UserError, fault_line
from finetune.system.terminal import complain
from finetune.use.serving_answers import Answers
from finetune.use.serving_uploads import MOST_BYTES, RefusedError, check_type, images_in, length_of

ADDRESS = "127.0.0.1"  # never another one: nobody is asked for a password
MOST_CONNECTIONS = 256
IDLE_S, REQUEST_S = 10.0, 60.0  # how long a client may send nothing, and how long it may take for a whole request
DRAINED_S = 2.0  # how long the rest of a refused body is read, so that the client gets to read why
METHODS = {"/": "GET", "/about": "GET", "/predict": "POST"}
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
FLAGS = {"0": False, "1": True}


class Server(http.server.ThreadingHTTPServer):
    """Listens on this machine only. It has the port from the start, and answers once `serve` runs."""

    answers: Answers

    daemon_threads = True  # a slow client does not hold up the end
    block_on_close = False
    request_queue_size = 128
    # On Windows this would let two servers take one port.
    allow_reuse_address = os.name != "nt"
    allow_reuse_port = False

    def __init__(self, port: int) -> None:
        """Take the port; 0 is any free one. A UserError where it cannot be had."""
        super().__init__((ADDRESS, port), _Handler, bind_and_activate=False)
        self.page, self.policy = read_page()
        self._connections = threading.Semaphore(MOST_CONNECTIONS)
        try:
            self.server_bind()
            self.server_activate()
        except OSError as error:
            self.server_close()
            is_used = error.errno == errno.EADDRINUSE
            why = "is in use" if is_used else f"cannot be had ({error.strerror or error})"
            raise UserError(f"port {port} {why}; another one is --port N, and --port 0 takes a free one") from error

    def serve(self, answers: Answers) -> None:
        """Answer until `shutdown` or Ctrl-C, which it raises. Requests that wait by then get no answer."""
        self.answers = answers
        try:
            self.serve_forever()
        finally:
            self.server_close()
            answers.close()

    def server_bind(self) -> None:
        """Bind without asking a name server for the name of this machine."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are too many."""
        if not self._connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(FULL)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The work of such a thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of a fault in one line; a client that went away is none."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            complain(fault_line(error, "the server goes on"))


def read_page() -> tuple[bytes, str]:
    """The page, and the policy that lets a browser run its own script and style and nothing else."""
    page = files("finetune.use").joinpath("serving_page.html").read_bytes()
    allowed = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        allowed[tag] = base64.b64encode(hashlib.sha256(inside).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


class Answer(NamedTuple):
    """What a client gets."""

    status: int  # of HTTP
    kind: str  # its Content-Type
    body: bytes


def _as_json(status: int, answer: Any) -> Answer:
    # Letters beyond ASCII are escapes, and so is half a letter that a class name may have.
    return Answer(status, "application/json", json.dumps(answer, allow_nan=False).encode("ascii") + b"\n")


class _Timed(io.RawIOBase):
    """What a client sends, until it pauses for `IDLE_S` or has taken `REQUEST_S` in all: then a TimeoutError."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.ends_at = connection, time.monotonic() + REQUEST_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(min(left, IDLE_S))
        return self._connection.recv_into(buffer)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    protocol_version = "HTTP/1.1"  # so that clients may wait for `100 Continue`; each connection closes all the same

    def setup(self) -> None:
        """Limit the time of reading and of writing."""
        super().setup()
        self._timed = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._timed, 2**16)
        self._is_read = True  # whether the body was read, or there is none

    def version_string(self) -> str:
        """No versions for strangers."""
        return "finetune"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a request is no news."""

    def handle_expect_100(self) -> bool:
        """Not yet: only a body that will be read is asked for."""
        return True

    def do_GET(self) -> None:
        """Answer with the page, or with what the model is."""
        self._answer({"/": self._page, "/about": self._about})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Answer with what the model says of images."""
        self._is_read = False
        self._answer({"/predict": self._predict})

    def _answer(self, places: Mapping[str, Callable[[], Answer]]) -> None:
        """Check who asks, then answer by the function of the address. Whatever happens, the client gets an answer."""
        try:
            self._check_asker()
            path = urlsplit(self.path).path if self.path.startswith("/") else ""
            if path not in places:
                if path in METHODS:
                    raise RefusedError(405, f"{path} is asked by {METHODS[path]}")
                raise RefusedError(404, "there is GET /, GET /about and POST /predict")
            answer = places[path]()
        except RefusedError as error:
            answer = _as_json(error.status, {"error": error.reason})
        except TimeoutError:
            answer = _as_json(408, {"error": f"no bytes for {IDLE_S:.0f} s, or not all within {REQUEST_S:.0f} s"})
        except UserError as error:  # of the model or of the memory: nothing that another request would mend
            complain(str(error))
            answer = _as_json(500, {"error": " ".join(str(error).split())})
        except ConnectionError:
            raise
        except Exception as error:  # a fault in one request ends no other one, and is told on the terminal
            complain(fault_line(error, "the server goes on"))
            answer = _as_json(500, {"error": "finetune is at fault; the terminal of the server says more"})
        self._send(answer)

    def _check_asker(self) -> None:
        """Refuse requests that a page of somebody else makes a browser send.

        Under a name of their own that leads to this machine (DNS rebinding) the Host is that name. From another page
        the Origin is that page's.
        """
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", hosts[0], re.IGNORECASE):
            raise RefusedError(403, f"Host must be {ADDRESS} or localhost")
        origins = self.headers.get_all("Origin") or []
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            raise RefusedError(403, "another page may not ask: the Origin is not this server")
        site = self.headers.get("Sec-Fetch-Site", "none")
        if self.command == "POST" and site not in ("same-origin", "none"):
            raise RefusedError(403, "another page may not ask: Sec-Fetch-Site is not same-origin")

    def _page(self) -> Answer:
        return Answer(200, "text/html; charset=utf-8", self.server.page)

    def _about(self) -> Answer:
        return _as_json(200, self.server.answers.about())

    def _predict(self) -> Answer:
        top_k, has_view = self._query()
        is_form = check_type(self.headers)
        length = length_of(self.headers)
        with self.server.answers.place():
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.send_response_only(HTTPStatus.CONTINUE)
                self.end_headers()
            body = self.rfile.read(length)
            self._is_read = True
            if len(body) < length:
                raise RefusedError(400, f"the body ended after {len(body):,} of {length:,} bytes")
            found = self.server.answers.predict(images_in(self.headers, body), top_k=top_k, has_view=has_view)
        bad = [f"{each['name']}: {each['error']}" for each in found if "error" in each]
        if not is_form:
            return _as_json(422 if bad else 200, {"error": bad[0]} if bad else found[0])
        problem = {"error": f"{len(bad)} of {len(found)} images cannot be used: {bad[0]}"} if bad else {}
        return _as_json(422 if bad else 200, {**problem, "images": found})

    def _query(self) -> tuple[int, bool]:
        """`top_k`, and whether `view=1` asks for what the model saw."""
        try:
            query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True, max_num_fields=10))
        except ValueError:
            query = {"": ""}
        top_k, view = query.pop("top_k", "1"), query.pop("view", "0")
        if query:
            raise RefusedError(400, "the query may hold top_k=N and view=1, and nothing else")
        if not re.fullmatch(r"[0-9]{1,9}", top_k, re.ASCII) or not int(top_k):
            raise RefusedError(400, "top_k must be a whole number of 1 or more")
        if view not in FLAGS:
            raise RefusedError(400, "view must be 0 or 1")
        return int(top_k), FLAGS[view]

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself: a request that is no HTTP, or a method that is unknown here."""
        self._send(_as_json(code, {"error": message or HTTPStatus(code).phrase}))

    def _send(self, answer: Answer) -> None:
        """Send a whole answer, and end the connection."""
        self.connection.settimeout(IDLE_S)
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
            "Connection": "close",  # `send_header` makes it true
        }
        if answer.status == 405:
            headers["Allow"] = "POST" if self.command in ("GET", "HEAD") else "GET, HEAD"
        if answer.status == 503:
            headers["Retry-After"] = "1"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self._drain()

    def _drain(self) -> None:
        """Read the rest of a refused body: to close over unread bytes resets the connection, and the answer is lost."""
        if self._is_read:
            return
        self._is_read = True
        self._timed.ends_at = min(self._timed.ends_at, time.monotonic() + DRAINED_S)
        try:
            self.connection.shutdown(socket.SHUT_WR)
            left = 2 * MOST_BYTES
            while left > 0 and (part := self.rfile.read1(2**16)):
                left -= len(part)
        except (OSError, TimeoutError):
            self.close_connection = True
