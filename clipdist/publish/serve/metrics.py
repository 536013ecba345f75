"""What a Prometheus server can learn of the service: a set of metrics for each application, not for the process."""

from collections.abc import Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)
REASONS = ("overload", "size", "timeout", "host", "connections")


class Metrics:
    def __init__(self) -> None:
        self._collected = CollectorRegistry()
        made = self._made
        self.requests = made(
            Counter, "requests", "Requests answered; status 499: the client went away", ["route", "status"]
        )
        self.seconds = made(
            Histogram, "request_seconds", "From a request's head to its whole answer", ["route"], buckets=LATENCIES
        )
        self.batch = made(Histogram, "batch_size", "Items that the model computed together", ["kind"], buckets=SIZES)
        self.model_seconds = made(Counter, "model_seconds", "Seconds that the model was at work")
        self.queue = made(Gauge, "queue_length", "Items that wait for the model")
        self.inside = made(Gauge, "requests_inside", "Requests let in and not yet answered")
        self.refused = made(Counter, "refused", "Requests and connections refused, by reason", ["reason"])
        for reason in REASONS:
            self.refused.labels(reason)  # a rate needs the zero before the first one

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._collected)

    def _made(self, kind: type[Metric], name: str, what: str, labels: Sequence[str] = (), **more: Any) -> Metric:
        return kind(f"clipdist_{name}", what, labels, "", "", "", self._collected, **more)
