"""Too much, too slow, too many: what the service refuses, and that it stays well. Mostly over real connections."""

import asyncio
import json
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from clipdist.errors import UserError
from clipdist.publish.serve.engine import IMAGES
from clipdist.publish.serve.limits import Limits
from clipdist.publish.serve.service import Service
from tests.conftest import picture
from tests.unit.pictures import encoded
from tests.unit.serving import client_of, make_service, running
from tests.unit.test_serve import problem

RED = picture("red", "square", "left")


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG of one bit a pixel whose header says so, whatever is in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def form(image: bytes, boundary: str = "x") -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head.encode() + image + f"\r\n--{boundary}--\r\n".encode()


def head(length: int | str, path: str = "/api/image", more: str = "") -> bytes:
    size = f"Content-Length: {length}" if isinstance(length, int) else length
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"{size}\r\n{more}\r\n"
    ).encode()


def refused(service: Service, reason: str) -> float:
    families = text_string_to_metric_families(service.metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return next(s.value for s in samples if s.name == "clipdist_refused_total" and s.labels["reason"] == reason)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the next answer; (0, {}, None) when the connection is cut."""
    file = connection.makefile("rb")
    try:
        line = file.readline()
    except ConnectionResetError:
        line = b""
    if not line:
        return 0, {}, None
    headers = {}
    while (one := file.readline()) not in (b"\r\n", b""):
        name, _, value = one.decode().partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers, json.loads(file.read(int(headers["content-length"])))


def test_a_bomb_is_told_by_its_header() -> None:
    service = make_service()
    with client_of(service) as client:
        bomb = png(50_000, 50_000)
        assert "50,000 × 50,000" in problem(client.post("/api/image", files={"image": bomb}), 413)
        dense = png(20_000, 20_000, bytes(20_000 * 2501))
        assert len(dense) < 100_000
        assert "20,000 × 20,000" in problem(client.post("/api/image", files={"image": dense}), 413)
        assert "cannot be read" in problem(client.post("/api/image", files={"image": png(5000, 5000)}), 422)
        gif = encoded(Image.new("L", (1, 1)), "GIF")
        gif = gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]
        problem(client.post("/api/image", files={"image": gif}), 413)
        assert client.post("/api/image", files={"image": RED}).status_code == 200


def test_a_large_upload_is_refused_before_it_is_whole() -> None:
    service = make_service(limits=Limits(max_upload_bytes=100_000))
    with running(service) as port:
        with connect(port) as connection:
            connection.sendall(head(200_000_000))
            status, _, body = answer(connection)
            assert (status, body["error"]["status"]) == (413, 413), "told by the Content-Length, before any of it"
        with connect(port) as connection:
            connection.sendall(head("Transfer-Encoding: chunked"))
            begun = form(b"")[:-9]
            connection.sendall(f"{len(begun):x}\r\n".encode() + begun + b"\r\n")
            for _ in range(40):  # 160,000 bytes that no header announced
                connection.sendall(b"1000\r\n" + bytes(0x1000) + b"\r\n")
                time.sleep(0.002)
            status, _, body = answer(connection)
            assert status == 413
            assert "100,000 bytes" in body["error"]["message"]
        assert refused(service, "size") == 2
        with connect(port) as connection:
            # What is beyond the announced length is no part of the request.
            sent = form(RED)
            connection.sendall(head(len(sent)) + sent + bytes(50_000))
            assert answer(connection)[0] == 200
        with connect(port) as connection:
            connection.sendall(b"rubbish\r\n\r\n")
            status, _, body = answer(connection)
            assert (status, body["error"]["message"]) == (400, "this is no valid HTTP request")


def test_whoever_is_slow_is_cut_off() -> None:
    service = make_service(limits=Limits(body_seconds=0.3, timeout_seconds=20.0))
    with running(service, head_seconds=0.5) as port:
        with connect(port) as connection:
            connection.sendall(head(10_000) + b"--x\r\n")
            status, _, body = answer(connection)
            assert (status, body["error"]["status"]) == (408, 408)
            until(lambda: service.admission.inside == 0)  # its place is free once the answer has been sent
        with connect(port) as connection:  # a head that never ends
            began = time.monotonic()
            connection.sendall(b"GET / HTTP/1.1\r\n")
            status = -1
            while status < 0 and time.monotonic() - began < 15:
                try:
                    connection.sendall(b"X: y\r\n")
                    connection.settimeout(0.1)
                    status = answer(connection)[0]
                except TimeoutError:
                    pass
                except OSError:
                    status = 0
            assert status == 0
        with connect(port) as connection:  # says nothing at all
            assert connection.recv(1) == b""
        with connect(port) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert answer(connection)[0] == 200


def test_connections_are_counted() -> None:
    service = make_service(limits=Limits(max_connections=3))
    with running(service) as port:
        some = [connect(port) for _ in range(3)]
        for one in some:
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert answer(one)[0] == 200
        with connect(port) as beyond:
            status, headers, body = answer(beyond)
            assert (status, headers["retry-after"]) == (503, "2")
            assert "too many connections" in body["error"]["message"]
        assert refused(service, "connections") == 1
        for one in some:
            one.close()


class Held:
    """A service whose model waits until it is let go."""

    def __init__(self, **limits: Any) -> None:
        self.service = make_service(limits=Limits(**limits), max_batch=1, max_wait_seconds=0.0)
        self.gate, look = threading.Event(), self.service.engine._look

        def slow(looks: Any) -> Any:
            self.gate.wait(20)
            return look(looks)

        self.service.engine._look = slow  # type: ignore[method-assign]


@pytest.fixture
def held() -> Iterator[type[Held]]:
    made: list[Held] = []

    class Noted(Held):
        def __init__(self, **limits: Any) -> None:
            super().__init__(**limits)
            made.append(self)

    yield Noted
    for one in made:
        one.gate.set()


def ask(port: int, ticket: str = "t") -> socket.socket:
    connection, sent = connect(port), form(RED)
    connection.sendall(head(len(sent), more=f"X-Ticket: {ticket}\r\n") + sent)
    return connection


def get(port: int, path: str) -> Any:
    with connect(port) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return answer(connection)[2]


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_line_has_an_end_and_everyone_sees_their_place(held: type[Held]) -> None:
    one = held(max_queue=3)
    with running(one.service) as port:
        some = []
        for n in range(3):
            some.append(ask(port, f"ticket-{n}"))
            until(lambda n=n: one.service.admission.inside == n + 1 and len(one.service.batcher) == n)
        assert get(port, "/api/queue") == {"waiting": 3, "limit": 3}
        assert [get(port, f"/api/queue/ticket-{n}")["position"] for n in range(3)] == [None, 1, 2]
        with ask(port) as beyond:
            status, headers, body = answer(beyond)
            assert (status, headers["retry-after"]) == (503, "2")
            assert "3 requests are waiting already" in body["error"]["message"]
        assert refused(one.service, "overload") == 1
        some[1].close()  # gives up, and the next one moves up
        until(lambda: get(port, "/api/queue/ticket-2")["position"] == 1)
        assert get(port, "/api/queue") == {"waiting": 2, "limit": 3}
        one.gate.set()
        assert [answer(some[n])[0] for n in (0, 2)] == [200, 200]
        assert 'status="499"} 1.0' in one.service.metrics.text().decode()
        for connection in some:
            connection.close()


def test_no_answer_in_time_is_said(held: type[Held]) -> None:
    one = held(timeout_seconds=0.4)
    with running(one.service) as port:
        with ask(port) as first:
            status, _, body = answer(first)
            assert (status, body["error"]["message"]) == (504, "no answer within 0.4 s; try again later")
        stuck = {"error": {"status": 503, "message": "the model does not come back from its work"}}
        until(lambda: get(port, "/healthz") == stuck)
        one.gate.set()
        until(lambda: get(port, "/healthz") == {"status": "ok"})
        with ask(port) as again:
            assert answer(again)[0] == 200


def test_a_graceful_end_answers_what_was_let_in(held: type[Held]) -> None:
    one = held()
    with running(one.service) as port:
        waiting = ask(port)
        until(lambda: one.service.batcher.busy_seconds() > 0)
        threading.Timer(0.3, one.gate.set).start()
    assert answer(waiting)[0] == 200
    waiting.close()
    with pytest.raises(OSError, match="refused"):
        connect(port)


def test_nothing_that_was_sent_reaches_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: pytest.fail("written to a file"))
    with client_of(make_service()) as client:
        sent = RED + bytes(5 * 2**20)  # five times what the parser would keep in memory by default
        assert client.post("/api/image", files={"image": sent}).status_code == 200


def test_images_that_come_together_are_computed_together() -> None:
    service = make_service(max_batch=8, max_wait_seconds=5.0)
    with running(service) as port:
        service.admission.inside += 1  # one more is on its way
        some = [ask(port) for _ in range(8)]
        assert [answer(one)[2]["batched_with"] for one in some] == [8] * 8
        for one in some:
            one.close()


def test_limits_make_sense() -> None:
    for name, value in (("max_queue", 0), ("timeout_seconds", float("nan")), ("max_image_pixels", 10**9)):
        with pytest.raises(UserError, match="--timeout" if name == "timeout_seconds" else name.replace("_", "-")):
            Limits(**{name: value})  # type: ignore[arg-type]


def test_a_batch_of_files_waits_like_others(held: type[Held]) -> None:
    async def main() -> None:
        one = held()
        try:
            table = asyncio.create_task(one.service.table([("a", RED), ("b", RED), ("c", b"x")], "mine"))
            while len(one.service.batcher) < 1:
                await asyncio.sleep(0.01)
            assert one.service.batcher.position("mine") == 1
            one.gate.set()
            assert len((await table).splitlines()) == 4
            assert (await one.service.batcher.ask(IMAGES, await look(one.service)))[1] == 1
        finally:
            one.service.close()

    async def look(service: Service) -> Any:
        from clipdist.publish.serve.engine import Look

        return Look(await service._decoded(RED), 0)

    asyncio.run(main())
