"""What a Prometheus server can learn of the service: a set of metrics for each application, not for the process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "clipdist_requests",
            "Requests answered, by route and status; 499: the client went away",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "clipdist_request_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.batch = Histogram(
            "clipdist_batch_size",
            "Items that went through the model together",
            ["kind"],
            buckets=SIZES,
            registry=self.registry,
        )
        self.model_seconds = Counter(
            "clipdist_model_seconds", "Seconds that the model was at work", registry=self.registry
        )
        self.queue = Gauge("clipdist_queue_length", "Items that wait for the model", registry=self.registry)
        self.inside = Gauge("clipdist_requests_inside", "Requests let in and not yet answered", registry=self.registry)
        self.refused = Counter(
            "clipdist_refused",
            "Requests and connections refused: overload, size, timeout, host, connections",
            ["reason"],
            registry=self.registry,
        )
        for reason in ("overload", "size", "timeout", "host", "connections"):
            self.refused.labels(reason)  # a rate needs the zero before the first one

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
