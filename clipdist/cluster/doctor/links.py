"""How fast ranks sum tensors with each other: an all-reduce, timed, on the ranks of one machine or of a job's nodes.

Each node starts its ranks by itself, as `python -m clipdist.cluster.doctor.links FOLDER SECONDS DEVICE`. They leave
small
files in a folder that all nodes see, which tell who came, who joined and who failed, and the result.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from clipdist import world
from clipdist.cluster.doctor.findings import Finding, figure
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError

MEBIBYTES = 64
WARM_UPS = 2
GRACE_SECONDS = 2.0
RESULT, FAILED = "result.json", "failed"
SLOW_GBPS = 1.0
"""Between nodes with GPUs, less is told of: it is what NCCL reaches by TCP over 10-gigabit Ethernet."""


def measure_all_reduce(device: torch.device, mebibytes: int = MEBIBYTES, repetitions: int = 5) -> float:
    """Bus bandwidth of summing a float32 tensor of `mebibytes` MiB over all ranks, in GB/s (10^9 bytes).

    By the definition of nccl-tests (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): 2(W − 1)/W × bytes /
    seconds for W ranks, which does not depend on W where the links are the limit, and so can be compared with theirs.
    Seconds are the mean of `repetitions`, after two that are not counted, on the slowest rank.

    All ranks of the default process group call it, each with its own device; the answer is equal on all. Raises
    `UserError` in a single process, which has no links.
    """
    ranks = world.connected().world_size
    if ranks < 2:
        raise UserError("an all-reduce needs at least two processes, found one; launch more")
    values = torch.zeros(mebibytes * (1 << 18), device=device)
    for _ in range(WARM_UPS):
        world.sum_over_ranks(values, "links")
    _settle(device)
    world.barrier()
    began = time.perf_counter()
    for _ in range(repetitions):
        world.sum_over_ranks(values, "links")
    _settle(device)
    seconds = torch.tensor([(time.perf_counter() - began) / repetitions], dtype=torch.float64, device=device)
    world.max_over_ranks(seconds, "links")
    return world.all_reduce_bytes(values.nbytes) / float(seconds) / 1e9


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Links:
    """What is to be measured: `processes` ranks on each of `nodes`, which meet at a port of the first of them."""

    folder: Path
    nodes: Sequence[str]
    processes: int
    address: str
    port: int
    cpu: bool
    seconds: float
    """For all of it, the start of the processes included."""

    @property
    def ranks(self) -> int:
        return len(self.nodes) * self.processes


def measure_links(links: Links, node: int = 0) -> Finding:
    """Starts the ranks of node number `node`, and waits until they have ended, at most `links.seconds`. Every node
    calls it; the finding of the first one counts."""
    if links.ranks < 2:
        return Finding("links", "ok", "one process alone has none to measure")
    links.folder.mkdir(parents=True, exist_ok=True)
    processes = [_start(links, node, local) for local in range(links.processes)]
    try:
        _watch(links, processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(GRACE_SECONDS)
    return conclude(links)


def _start(links: Links, node: int, local: int) -> "subprocess.Popen[bytes]":
    rank = node * links.processes + local
    numbers = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": links.ranks, "LOCAL_WORLD_SIZE": links.processes}
    place = {"MASTER_ADDR": links.address, "MASTER_PORT": str(links.port)}
    words = [str(links.folder), str(links.seconds), "cpu" if links.cpu else "any"]
    with open(links.folder / f"rank-{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "clipdist.cluster.doctor.links", *words],
            env={**os.environ, **place, **{name: str(number) for name, number in numbers.items()}},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _watch(links: Links, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Until all ranks here have ended, or one, here or elsewhere, has failed and the others had time to say why."""
    end = time.monotonic() + links.seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) and not any(codes):
            return
        if any(codes):
            (links.folder / FAILED).touch()
        if (links.folder / FAILED).exists():
            time.sleep(GRACE_SECONDS)
            return
        time.sleep(0.1)


def conclude(links: Links) -> Finding:
    """What the files of the ranks say."""
    nodes = len(links.nodes)
    where = f"{links.ranks} processes on {f'{nodes} nodes' if nodes > 1 else 'one node'}"
    result = links.folder / RESULT
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
        rate = found["gigabytes_per_second"]
        told = f"all-reduce of {MEBIBYTES} MiB over {where}: {figure(rate)} GB/s (bus bandwidth, {found['backend']})"
        if found["backend"] == "nccl" and nodes > 1 and rate < SLOW_GBPS:
            advice = "see which interface NCCL takes (NCCL_DEBUG=INFO), and set NCCL_SOCKET_IFNAME or NCCL_IB_HCA"
            return Finding("links", "warn", f"{told}, expected at least {SLOW_GBPS:g}; {advice} in slurm/site.sh")
        return Finding("links", "ok", told)
    came, joined = ({n for n in range(links.ranks) if _note(links.folder, n, word).exists()} for word in NOTES)
    if absent := sorted(set(range(links.ranks)) - came):
        named = ", ".join(f"{rank} ({links.nodes[rank // links.processes]})" for rank in absent)
        what = f"did not come within {links.seconds:.0f} s: rank {named}"
    elif len(joined) < links.ranks:
        apart = ", ".join(f"{rank} ({links.nodes[rank // links.processes]})" for rank in sorted(came - joined))
        what = (
            f"all ranks came, and these could not connect to {links.address} port {links.port} within "
            f"{links.seconds:.0f} s: {apart}; is there a firewall, or the wrong interface (NCCL_SOCKET_IFNAME, "
            f"GLOO_SOCKET_IFNAME)?"
        )
    else:
        what = f"all ranks joined, and the all-reduce did not end within {links.seconds:.0f} s"
    said = _last_words(links)
    return Finding("links", "error", f"{where}, all-reduce not measured; {what}{said}; see {links.folder}/rank-*.log")


NOTES = ("came", "joined")


def _note(folder: Path, rank: int, word: str) -> Path:
    return folder / f"rank-{rank}.{word}"


def _last_words(links: Links) -> str:
    """The last line that the first rank which complained has written."""
    for rank in range(links.ranks):
        log = links.folder / f"rank-{rank}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        if errors := [line.strip() for line in lines if "Error" in line and not line.startswith(" ")]:
            return f"; rank {rank} says: {errors[-1][:200]}"
    return ""


def main(words: Sequence[str]) -> None:
    """What a rank runs."""
    folder, seconds, device_kind = Path(words[0]), float(words[1]), words[2]
    signal.alarm(int(seconds) + 5)  # ends it, whoever started it
    who = world.announced()
    _note(folder, who.rank, NOTES[0]).touch()
    cuda = device_kind != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", who.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    world.barrier()
    _note(folder, who.rank, NOTES[1]).touch()
    rate = measure_all_reduce(device)
    if who.is_main:
        told = {"gigabytes_per_second": rate, "backend": backend}
        write_atomically(folder / RESULT, json.dumps(told).encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
