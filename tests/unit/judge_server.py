"""A small server of chat completions or rewards that answers, refuses, is silent or talks nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """An endpoint whose replies are decided by a mode; keeps what it was asked."""

    def __init__(self) -> None:
        self.mode = "correct"
        self.answer: Callable[[dict[str, Any]], Any] | None = None
        """In place of the mode: what is replied to a request, as JSON."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.fail_first = 0
        self.release = threading.Event()
        self.lock = threading.Lock()

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self.lock:
            self.requests.append({"path": handler.path, **json.loads(body)})
            self.headers.append(dict(handler.headers))
            failing = self.fail_first > 0
            self.fail_first -= 1
        if failing:
            handler.send_error(503)
        elif self.mode.isdigit():
            handler.send_response(int(self.mode))
            handler.send_header("Location", "/v1/chat/completions")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        elif self.answer is not None:
            self._send(handler, json.dumps(self.answer(json.loads(body))).encode())
        elif self.mode == "silent":
            self.release.wait()
        elif self.mode == "drip":
            self._drip(handler)
        elif self.mode == "closed":
            handler.connection.close()
        elif self.mode == "html":
            self._send(handler, b"<html>Welcome</html>")
        elif self.mode == "empty":
            self._send(handler, b'{"choices": []}')
        elif self.mode == "null":
            self._send(handler, b'{"choices": [{"message": {"content": null}}]}')
        else:
            self._send(handler, json.dumps({"choices": [{"message": {"content": self.mode}}]}).encode())

    def _send(self, handler: BaseHTTPRequestHandler, data: bytes, length: int | None = None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(length or len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _drip(self, handler: BaseHTTPRequestHandler) -> None:
        """Byte by byte, without end."""
        self._send(handler, b"{", length=10**6)
        while not self.release.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()


@contextmanager
def serving() -> Iterator[tuple[Server, str]]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(OSError, ValueError):  # the client has gone
                state.reply(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        state.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
