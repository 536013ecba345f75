"""Which rank, and which node, the others wait for."""

import socket

import torch

from clipdist import world

WAITED_IN = ("features", "vectors", "agreement")
"""Exchanges at which each rank waits until the last one has come, in every step and under every engine."""


class Stragglers:
    """Compares how long ranks wait for each other: who waits least is who the others wait for. All ranks construct it,
    and call its method together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.hosts: list[str] = world.gather_objects(socket.gethostname())
        nodes = list(dict.fromkeys(self.hosts))
        self._node_of = [nodes.index(host) for host in self.hosts]

    def compare(self, data_seconds: float, exchanges: dict[str, float]) -> tuple[float, dict[str, float | int | str]]:
        """(what ranks waited for data on average, what a line of the metrics says of the slowest).

        `data_seconds` is what this rank waited for data; `exchanges` has its seconds per step in each exchange, as
        `metrics.communication` names them. Slow data is part of a rank's slowness. What the engine waits for within the
        backward pass is not seen, but a rank that is slow there is slow before it, too.
        """
        waited = sum(exchanges.get(f"perf/seconds_{purpose}", 0.0) for purpose in WAITED_IN)
        own = torch.tensor([[data_seconds, waited]], dtype=torch.float64, device=self.device)
        data_W, waited_W = world.gather_rows(own).T.tolist()
        mean = sum(data_W) / len(data_W)
        if len(waited_W) == 1:
            return mean, {}
        slowest = min(range(len(waited_W)), key=waited_W.__getitem__)
        return mean, {
            "perf/slowest_rank": slowest,
            "perf/slowest_node": self._node_of[slowest],
            "perf/slowest_host": self.hosts[slowest],
            "perf/straggler_seconds": max(waited_W) - waited_W[slowest],
        }
