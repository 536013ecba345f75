"""What one request may ask for, and the middleware that holds every request to it before its body is kept anywhere."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipdist.errors import UserError
from clipdist.model.saved import MAX_IMAGE_PIXELS
from clipdist.publish.serve.metrics import Metrics

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}
ENCODED_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
RETRY_SECONDS = 2
GONE = 499
"""Counted for requests whose client went away before the answer began, as nginx does."""


@dataclass(frozen=True)
class Limits:
    """Of every request: bytes of its body, pixels of an image, characters of a text, files and classes of one request,
    seconds from its first byte to the end of its answer, of which `body_seconds` for its body. Of all together:
    requests let in at once, and open connections."""

    max_upload_bytes: int = 16 * 2**20
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_text_characters: int = 2000
    max_batch_files: int = 32
    max_classes: int = 200
    max_queue: int = 64
    max_connections: int = 256
    timeout_seconds: float = 60.0
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"--{option(name)}: found {value}, expected more than 0")
        if self.max_image_pixels > MAX_IMAGE_PIXELS:
            raise UserError(
                f"--max-image-pixels: found {self.max_image_pixels}, expected {MAX_IMAGE_PIXELS} or fewer, which is "
                f"what a model reads"
            )


def option(name: str) -> str:
    """The option of the command that sets a field of `Limits`."""
    return {"timeout_seconds": "timeout", "body_seconds": "body-timeout"}.get(name, name.replace("_", "-"))


class Refused(HTTPException):
    """A request that gets `status` and a message for whoever sent it."""


@dataclass
class Admission:
    """How many requests may be let in and not be answered yet, and how many are."""

    limit: int
    inside: int = 0


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"status": status, "message": message}}, status, headers)


class Guard:
    """Around the whole application: security headers, admission, size and time of bodies, the time of all, metrics."""

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, admission: Admission, hosts: frozenset[str] | None
    ) -> None:
        self.app, self.limits, self.metrics, self.admission, self.hosts = app, limits, metrics, admission, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        answer, body = _Answer(send), _Body(receive, self.limits, self.metrics)
        try:
            async with asyncio.timeout(self.limits.timeout_seconds), body.stops_when_gone(answer):
                await self._admitted(scope, body, answer)
        except TimeoutError:
            self.metrics.refused.labels("timeout").inc()
            if answer.status:
                raise  # it has begun: only a closed connection tells that it is not whole
            message = f"no answer within {self.limits.timeout_seconds:g} s; try again later"
            await error_response(504, message)(scope, receive, answer.send)
        except Exception:
            answer.status = answer.status or 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(answer.status or GONE)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _admitted(self, scope: Scope, body: "_Body", answer: "_Answer") -> None:
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused(scope, body.receive, answer.send)
            return
        if scope["method"] in ("GET", "HEAD"):
            await self.app(scope, body.receive, answer.send)
            return
        if self.admission.inside >= self.admission.limit:
            self.metrics.refused.labels("overload").inc()
            message = f"{self.admission.limit} requests are waiting already; try again in a moment"
            retry = {"Retry-After": str(RETRY_SECONDS)}
            await error_response(503, message, retry)(scope, body.receive, answer.send)
            return
        self.admission.inside += 1
        try:
            await self.app(scope, body.receive, answer.send)
        finally:
            self.admission.inside -= 1

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            self.metrics.refused.labels("host").inc()
            return error_response(421, "this service does not answer under that host name")
        length = headers.get("content-length", "0")
        # Python refuses numbers of more than 4,300 digits.
        if length.isdecimal() and (len(length) > 18 or int(length) > self.limits.max_upload_bytes):
            self.metrics.refused.labels("size").inc()
            return error_response(413, too_large(self.limits.max_upload_bytes))
        return None


def host_of(header: str) -> str:
    """The host that a Host header names, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def too_large(most: int) -> str:
    return f"more than {most:,} bytes were sent, and that is the most that is taken"


class _Answer:
    """Adds the security headers, and knows the status once there is one."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *ENCODED_HEADERS]
        await self._send(message)


class _Body:
    """Counts a body while it arrives, whatever its Content-Length said."""

    def __init__(self, receive: Receive, limits: Limits, metrics: Metrics) -> None:
        self._receive, self._limits, self._metrics = receive, limits, metrics
        self._bytes, self._whole, self._end = 0, asyncio.Event(), time.monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        """Raises `Refused` for a body that is too large, or too slow."""
        if self._whole.is_set():
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._end - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self._metrics.refused.labels("timeout").inc()
            seconds = self._limits.body_seconds
            raise Refused(408, f"the request did not arrive whole within {seconds:g} s; try again") from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.max_upload_bytes:
            self._metrics.refused.labels("size").inc()
            raise Refused(413, too_large(self._limits.max_upload_bytes))
        if not message.get("more_body", False):
            self._whole.set()
        return message

    @asynccontextmanager
    async def stops_when_gone(self, answer: _Answer) -> AsyncIterator[None]:
        """Cancels what is within once the client has gone away before its answer began, so that nothing is computed
        for nobody; then it ends quietly."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            await self._whole.wait()
            while (await self._receive())["type"] != "http.disconnect":
                pass
            if not answer.status:
                gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
        finally:
            watcher.cancel()
