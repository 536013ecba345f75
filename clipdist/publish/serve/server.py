"""The HTTP server: how many connections there may be, how long one may take to say what it wants, and how all ends."""

import asyncio
import json
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from clipdist.publish.serve.limits import Guard
from clipdist.publish.serve.metrics import Metrics

HEAD_SECONDS = 10.0
SHUTDOWN_SECONDS = 20


def server_of(app: Guard, head_seconds: float = HEAD_SECONDS) -> uvicorn.Server:
    """On SIGTERM or Ctrl-C it takes no more connections, and answers what it has let in, for `SHUTDOWN_SECONDS`."""
    protocol = bounded_protocol(app.metrics, max_connections=app.limits.max_connections, head_seconds=head_seconds)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_config=None,
            access_log=False,  # it would tell who asked for what
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )


def bounded_protocol(metrics: Metrics, *, max_connections: int, head_seconds: float) -> type[asyncio.Protocol]:
    """The protocol for uvicorn. A connection beyond `max_connections` is told so and closed. One on which no request is
    under way for `head_seconds` is cut, however busily it dribbles: before the first, in the middle of a head, between
    two requests, or while it sends a body that was refused."""

    class BoundedProtocol(H11Protocol):
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                metrics.refused.labels("connections").inc()
                self._say(503, "too many connections; try again in a moment", "Retry-After: 2\r\n")
                return
            self._resting_since = self.loop.time()
            self._watch = self.loop.call_later(head_seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._watch is not None:
                self._watch.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._resting_since = self.loop.time()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self._say(400, "this is no valid HTTP request")
            else:
                self.transport.close()

        def _look(self) -> None:
            working = self.cycle is not None and not self.cycle.response_complete
            rested = self.loop.time() - self._resting_since
            if self.transport.is_closing() or (not working and rested >= head_seconds):
                self.transport.abort()
                return
            self._watch = self.loop.call_later(head_seconds if working else head_seconds - rested, self._look)

        def _say(self, status: int, message: str, more: str = "") -> None:
            body = json.dumps({"error": {"status": status, "message": message}})
            phrase = {400: "Bad Request", 503: "Service Unavailable"}[status]
            head = (
                f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                f"{more}Connection: close\r\n\r\n"
            )
            self.transport.write((head + body).encode())
            self.transport.close()

    return BoundedProtocol
