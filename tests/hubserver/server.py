"""Two listeners on 127.0.0.1, each on a port of its own: the Hub, and the CDN that it sends large downloads to."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeAlias

from tests.hubserver import transfer
from tests.hubserver.accounts import Accounts
from tests.hubserver.api import ROUTES
from tests.hubserver.faults import Bend, Fault, served
from tests.hubserver.messages import Answer, RefusedError, Request, unquoted
from tests.hubserver.store import Store

Serve: TypeAlias = Callable[[Request], Answer]


@dataclass(frozen=True)
class Seen:
    """One line of the log."""

    place: str
    """ "hub" or "cdn"."""
    method: str
    target: str
    status: int
    sent: int
    """Bytes of the body."""
    token: str | None


class Hub:
    """A Hub that runs between `start` and `stop`."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.accounts = Accounts()
        self.faults: list[Fault] = []
        self.log: list[Seen] = []
        self.epoch = 1
        """Part of the CDN's addresses; those of another epoch have expired."""
        self._hub = Listener(lambda request: self._answer("hub", request, self._route))
        self._cdn = Listener(lambda request: self._answer("cdn", request, lambda r: transfer.from_cdn(self, r)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.port}"

    def cdn_address(self, oid: str) -> str:
        """Where the CDN serves a large file, until the addresses expire."""
        return f"http://127.0.0.1:{self._cdn.port}/{oid}?epoch={self.epoch}"

    def expire_addresses(self) -> None:
        """Ends the life of all addresses of the CDN that were handed out."""
        self.epoch += 1

    def start(self) -> None:
        """Listens, from the second time on at the same ports."""
        self._hub.start()
        self._cdn.start()

    def stop(self) -> None:
        """Closes both ports and every open connection."""
        self._hub.stop()
        self._cdn.stop()

    def fault(self, pattern: str, bend: Bend, *, times: int | None = None, skip: int = 0) -> Fault:
        """From now on, bends the answers to requests whose "METHOD target" matches."""
        self.faults.append(Fault(pattern, bend, times, skip))
        return self.faults[-1]

    def seen(self, place: str = "", method: str = "", path: str = "") -> list[Seen]:
        """The log, narrowed."""
        return [s for s in self.log if place in s.place and method in s.method and path in s.target]

    def _answer(self, place: str, request: Request, serve: Serve) -> Answer:
        answer = served(request, lambda r: _safely(serve, r), self.faults)
        sent = 0 if request.method == "HEAD" else len(answer.body[: answer.cut])
        self.log.append(Seen(place, request.method, request.target, answer.status, sent, request.token))
        return answer

    def _route(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, handler in ROUTES:
            found = pattern.fullmatch(request.path) if wanted == method else None
            if found is not None:
                return handler(self, request, unquoted(found.groupdict()))
        raise RefusedError(404, message=f"no route for {request.method} {request.path}")


def _safely(serve: Serve, request: Request) -> Answer:
    try:
        return serve(request)
    except RefusedError as refusal:
        return refusal.answer()


class Listener:
    """One port. Keeps the open connections, so that stopping really ends the service."""

    def __init__(self, answer: Serve) -> None:
        self.answer = answer
        self.port = 0
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Binds; the first time to a free port."""
        self._server = _Server(self.port, self.answer)
        self.port = self._server.server_address[1]
        # A short poll: shutting down waits for it.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Unbinds. Does nothing when stopped already."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._thread.join()
            self._server = self._thread = None


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, port: int, answer: Serve) -> None:
        self.answer = answer
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Connection)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        # Clients that leave in the middle are part of the tests.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_any(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._body())
        self._send(self.server.answer(request))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - names that http.server asks for

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer) -> None:
        if answer.cut == -1:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.slow_head:
            self._trickle(b"".join(self._headers_buffer) + b"\r\n", answer.pace)
        else:
            self.end_headers()
        if self.command != "HEAD":
            self._trickle(answer.body[: answer.cut], answer.pace)
        self.close_connection |= answer.cut is not None
        self.wfile.flush()

    def _trickle(self, data: bytes, pace: float) -> None:
        if not pace:
            self.wfile.write(data)
            return
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(pace)
