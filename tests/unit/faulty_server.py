"""A file server on loopback that answers range requests and, on demand, misbehaves as networks and servers do."""

import http.server
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FaultyServer:
    """Serves `folder`. `faults[name]` holds what goes wrong with the next requests for that file, first come first:
    a status (403, 404, 429, 500), or `stall`, `reset`, `truncate`, `flip`; `always[name]` with every one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: defaultdict[str, deque[int | str]] = defaultdict(deque)
        self.always: dict[str, int | str] = {}
        self.ranges = True
        self.seconds_per_answer = 0.0
        self.requests: list[tuple[str, int]] = []  # file, first byte
        self.closing = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                owner.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/set"

    def fetched(self, ending: str = ".tar") -> Counter[str]:
        """How often each file was asked for from its first byte on."""
        return Counter(name for name, start in self.requests if name.endswith(ending) and start == 0)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.requests.append((name, start))
        fault = self.faults[name].popleft() if self.faults[name] else self.always.get(name)
        if not (self.folder / name).is_file():
            fault = 404
        if isinstance(fault, int):
            return request.send_error(fault)
        if fault == "stall":
            self.closing.wait(20)
            return None
        time.sleep(self.seconds_per_answer)
        whole = (self.folder / name).read_bytes()
        body = whole
        if asked and self.ranges:
            body = whole[start : int(asked[2]) + 1]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        else:
            request.send_response(200)
        if fault == "flip":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault in ("reset", "truncate"):
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                request.connection.close()
            return None
        request.wfile.write(body)
        return None

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    # A client that went away, or was reset, is what the tests are about.
    server._server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.start()
    try:
        yield server
    finally:
        server.stop()
