"""Ranks and what they say to each other. The only module that reads RANK, WORLD_SIZE and their like.

Every collective here works on the default process group; without one (a single process) it answers at once.
Unless a docstring says otherwise, all ranks must call it, in the same order.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import yaml

from clipdist.errors import UserError


@dataclass(frozen=True)
class World:
    """Who this process is. `rank` counts over all nodes, `local_rank` on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def announced() -> World:
    """What the launcher said through the environment, before any process group exists."""
    return World(
        int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    )


def connected() -> World:
    """What the process group says."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def launcher() -> int:
    """Process id of the torchrun or `accelerate launch` that started this rank; 0 when nobody did."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0


def asked_processes() -> int:
    """How many processes the command line of `accelerate launch` above this process asks for; 0 when there is none.

    The launcher does not pass this on, and with some flags (`--cpu --num_processes 2`) it starts a single process
    without a word.
    """
    try:
        parents = psutil.Process().parents()[:3]
    except psutil.Error:
        return 0
    for parent in parents:
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        if not _launches(words):
            continue
        given = _options(words)
        if number := given.get("num_processes", ""):
            return int(number) if number.isdigit() else 0
        if config := given.get("config_file", ""):
            try:
                return int(yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("num_processes", 0))
            except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError):
                return 0
        return 0
    return 0


def _launches(words: list[str]) -> bool:
    """Whether this is `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`."""
    names = [Path(word).name for word in words[:5]]
    return any(
        name.startswith("accelerate") and ("launch" in name or following == "launch")
        for name, following in pairwise([*names, ""])
    )


def _options(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.setdefault(name.replace("-", "_"), value if equals else following)
    return found


def check_size(expected: int = 0) -> World:
    """The connected world; `UserError` when its size is not the one that the launcher, or the recipe, asked for.

    `expected` is the recipe's `train.processes`, 0 when it leaves the number open. Without this check a wrong
    flag trains one process, or several that know nothing of each other, for hours.
    """
    obtained = connected()
    for asked, by in ((announced().world_size, "the launcher's WORLD_SIZE"), (asked_processes(), "accelerate launch")):
        if asked > 1 and asked != obtained.world_size:
            raise UserError(
                f"{by} asks for {asked} processes, but {obtained.world_size} are connected. Without GPUs use: "
                f"accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes {asked} …"
            )
    if expected and expected != obtained.world_size:
        raise UserError(
            f"train.processes={expected}, but {obtained.world_size} are connected; "
            f"launch {expected} processes or set train.processes=0"
        )
    return obtained


class Traffic:
    """What this rank has sent in collectives of tensors since it was last asked, by purpose.

    Bytes are those of a ring, the least that W ranks can do: (W − 1)·n to gather n from each, 2·(W − 1)/W·n to sum n.
    Seconds are how long the call kept this process; a GPU's collectives go on behind it, so there none are given.
    """

    def __init__(self) -> None:
        self._sent: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def count(self, purpose: str, size: float) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._sent[purpose] = self._sent.get(purpose, 0) + size
        if dist.get_backend() != "nccl":
            self._seconds[purpose] = self._seconds.get(purpose, 0) + time.perf_counter() - began

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(bytes, seconds), each purpose -> sum since the last call."""
        taken = self._sent, self._seconds
        self._sent, self._seconds = {}, {}
        return taken


traffic = Traffic()


def ring_sum_bytes(size: float, world_size: int) -> float:
    """Bytes that each rank sends in a ring that sums `size` bytes."""
    return 2 * (world_size - 1) / world_size * size


def gather_rows(rows_bX: torch.Tensor, *, equal: bool = True, purpose: str = "other") -> torch.Tensor:
    """All ranks' rows joined in rank order, [B, X]; no gradient flows through.

    `equal` promises that every rank has the same number of rows, which saves exchanging the numbers first.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_bX.detach()
    world_size = dist.get_world_size()
    rows_bX = rows_bX.detach().contiguous()
    if equal:
        gathered = rows_bX.new_empty((world_size * rows_bX.shape[0], *rows_bX.shape[1:]))
        with traffic.count(purpose, (world_size - 1) * rows_bX.nbytes):
            dist.all_gather_into_tensor(gathered, rows_bX)
        return gathered
    counts = torch.zeros(world_size, dtype=torch.int64, device=rows_bX.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows_bX)], device=rows_bX.device))
    sizes = counts.tolist()
    padded = rows_bX.new_zeros((max(sizes), *rows_bX.shape[1:]))
    padded[: len(rows_bX)] = rows_bX
    gathered = gather_rows(padded, purpose=purpose).view(world_size, max(sizes), *rows_bX.shape[1:])
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def sum_over_ranks(values: torch.Tensor, purpose: str = "other") -> torch.Tensor:
    """Element-wise sum over ranks, in place; int64 wraps round."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with traffic.count(purpose, ring_sum_bytes(values.nbytes, dist.get_world_size())):
            dist.all_reduce(values)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gather_objects(item: Any) -> list[Any]:
    """Every rank's `item`, in rank order, on every rank. Pickles: for small things that our own ranks made."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: Any) -> Any:
    """Rank 0's `item`, on every rank. Pickles, as `gather_objects`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items)
    return items[0]


def barrier() -> None:
    """Returns when every rank has come here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Not dist.barrier(): under NCCL that one guesses a device.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        sum_over_ranks(torch.zeros(1, device=device))


def report(error: Exception) -> None:
    """Prints a user's error once: on rank 0, or with the rank when it is another's. One line for each fault."""
    world = announced()
    where = f"rank {world.rank}: " if world.rank else ""
    for line in str(error).splitlines():
        print(f"clipdist: error: {where}{line}", file=sys.stderr, flush=True)
