"""Ranks and what they say to each other. The only module that reads RANK, WORLD_SIZE and their like.

Every collective here works on the default process group; without one (a single process) it answers at once.
Unless a docstring says otherwise, all ranks must call it, in the same order.
"""

import atexit
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil
import torch
import torch.distributed as dist
import yaml

from clipdist.errors import UserError

EXIT_CODES = "CLIPDIST_EXIT_CODES"
"""The environment's variable behind `exit_codes`."""
STOP = "stop"
"""The file there that asks ranks to stop which did not listen to a signal yet."""


@dataclass(frozen=True)
class World:
    """Who this process is. `rank` counts over all nodes, `local_rank` on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Sent(NamedTuple):
    bytes: float
    seconds: float


class Traffic:
    """What this rank sent through the collectives on tensors below, by purpose, since `take` was last called.

    Bytes are by formula, that of a ring, which no algorithm undercuts by much: to gather, a rank sends its part W − 1
    times; to reduce, 2(W − 1)/W times the tensor. Seconds are measured, from the call until the result is there (on a
    GPU between two events on its stream), and so include the wait for the slowest rank. What is pickled (at a start,
    around a validation, after a bad sample) is no part of a step and is not counted.
    """

    def __init__(self) -> None:
        self._bytes: defaultdict[str, float] = defaultdict(float)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.on_entry: Callable[[], None] = lambda: None
        """Called ahead of each collective, before this rank waits in it."""

    @contextmanager
    def counted(self, purpose: str, sent_bytes: float, device: torch.device) -> Iterator[None]:
        """Around one collective."""
        self.on_entry()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((purpose, start, end))
            if len(self._events) > 256 and self._events[0][2].query():
                self._settle(self._events[:128])
                del self._events[:128]
        else:
            began = time.perf_counter()
            yield
            self._seconds[purpose] += time.perf_counter() - began
        self._bytes[purpose] += sent_bytes

    def _settle(self, events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        for purpose, start, end in events:
            end.synchronize()
            self._seconds[purpose] += start.elapsed_time(end) / 1000

    def take(self) -> dict[str, Sent]:
        """Purpose -> what was sent, and starts anew. Waits for the collectives that a GPU has not done yet."""
        self._settle(self._events)
        found = {purpose: Sent(sent, self._seconds[purpose]) for purpose, sent in self._bytes.items()}
        self._bytes.clear()
        self._seconds.clear()
        self._events.clear()
        return found


traffic = Traffic()


@dataclass(frozen=True)
class Allocation:
    """What SLURM gave to the job that this process is a task of."""

    job: str
    """SLURM's number; of one job of an array, array_index."""
    restarts: int
    """How often SLURM has requeued it."""
    nodes: tuple[str, ...]
    """Host names, in the order that SLURM counts them in."""
    node: int
    """Which of them this is."""
    gpus: int
    """Of this node; 0 without."""
    step: str = ""
    """SLURM's number of the step that `srun` made this process a task of; empty in the job's own script."""
    task: int = 0
    """Which of the step's tasks on this node this is."""
    slurm: bool = True
    """False: there is no SLURM, and this stands for the machine at hand."""

    @property
    def number(self) -> int:
        """The job as a number, for what must differ between jobs."""
        return int("".join(filter(str.isdigit, self.job)) or 0)


def allocation() -> Allocation | None:
    """By SLURM's environment and `scontrol`; None outside of a job."""
    job = _job()
    if job is None:
        return None
    # A step may have fewer nodes than its job, and the node's number counts them.
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    words = ["scontrol", "show", "hostnames", listed]
    nodes = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    number = int(os.environ.get("SLURM_NODEID", 0))
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    step, task = os.environ.get("SLURM_STEP_ID", ""), int(os.environ.get("SLURM_LOCALID", 0))
    return Allocation(job, restarts, tuple(nodes), number, gpus, step, task)


def slurm_job() -> dict[str, str]:
    """The job and how often it was requeued, for the run's notes; empty outside of a job."""
    job = _job()
    return {} if job is None else {"job": job, "requeued": os.environ.get("SLURM_RESTART_COUNT", "0")}


def _job() -> str | None:
    """SLURM's number of the job around this process. One job of an array has the array's own number, and by that SLURM
    would signal and requeue all of them; so each is called by its place in the array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def exit_codes() -> Path | None:
    """Where each rank is to note its exit code, which the launcher would not pass on; None where nobody asks."""
    folder = os.environ.get(EXIT_CODES)
    return Path(folder) if folder else None


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


def ranks_on_node() -> int:
    """How many ranks share this machine's memory, by what the launcher said; all of them when it did not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", connected().world_size))


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


def gather_rows(rows_bX: torch.Tensor, *, equal: bool = True, purpose: str = "other") -> torch.Tensor:
    """All ranks' rows joined in rank order, [B, X]; no gradient flows through.

    `equal` promises that every rank has the same number of rows, which saves exchanging the numbers first. `purpose`
    is what `traffic` counts it under.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_bX.detach()
    world_size = dist.get_world_size()
    rows_bX = rows_bX.detach().contiguous()
    if equal:
        gathered = rows_bX.new_empty((world_size * rows_bX.shape[0], *rows_bX.shape[1:]))
        with traffic.counted(purpose, (world_size - 1) * rows_bX.nbytes, rows_bX.device):
            dist.all_gather_into_tensor(gathered, rows_bX)
        return gathered
    counts = gather_rows(torch.tensor([len(rows_bX)], device=rows_bX.device), purpose=purpose)
    sizes = counts.tolist()
    padded = rows_bX.new_zeros((max(sizes), *rows_bX.shape[1:]))
    padded[: len(rows_bX)] = rows_bX
    gathered = gather_rows(padded, purpose=purpose).view(world_size, max(sizes), *rows_bX.shape[1:])
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def sum_over_ranks(values: torch.Tensor, purpose: str = "other") -> torch.Tensor:
    """Element-wise sum over ranks, in place; int64 wraps round."""
    return _reduce(values, dist.ReduceOp.SUM, purpose)


def max_over_ranks(values: torch.Tensor, purpose: str = "other") -> torch.Tensor:
    """Element-wise maximum over ranks, in place."""
    return _reduce(values, dist.ReduceOp.MAX, purpose)


def _reduce(values: torch.Tensor, operation: Any, purpose: str) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        with traffic.counted(purpose, all_reduce_bytes(values.nbytes), values.device):
            dist.all_reduce(values, operation)
    return values


def collective_device(device: torch.device) -> torch.device:
    """Where a tensor on `device` must lie for the collectives here: NCCL takes those of GPUs alone."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def all_reduce_bytes(tensor_bytes: int) -> float:
    """What one rank sends when a tensor of so many bytes is summed over all ranks in a ring."""
    world_size = connected().world_size
    return 2 * (world_size - 1) / world_size * tensor_bytes


def gather_objects(item: Any) -> list[Any]:
    """Every rank's `item`, in rank order, on every rank. Pickles: for small things that our own ranks made."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    traffic.on_entry()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: Any) -> Any:
    """Rank 0's `item`, on every rank. Pickles, as `gather_objects`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return item
    items = [item]
    traffic.on_entry()
    dist.broadcast_object_list(items)
    return items[0]


def barrier() -> None:
    """Returns when every rank has come here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Not dist.barrier(): under NCCL that one guesses a device.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        sum_over_ranks(torch.zeros(1, device=device)).item()  # NCCL's own call returns at once


def report_last(error: Exception) -> None:
    """`report`, by a process that ends now, one of several perhaps."""
    if announced().rank:
        # Most errors strike every rank: rank 0 prints them and the launcher ends the others meanwhile. Whoever is still
        # here has one of its own.
        time.sleep(3)
    report(error)


def end(code: int) -> NoReturn:
    """Ends the process. One of several ranks goes without the interpreter's own last steps, during which a thread of
    gloo that lets go of a tensor would abort it (PyTorch's issue 190489); what was registered with `atexit` is done."""
    if announced().world_size > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def report(error: Exception) -> None:
    """Prints a user's error once: on rank 0, or with the rank when it is another's. One line for each fault."""
    world = announced()
    where = f"rank {world.rank}: " if world.rank else ""
    for line in str(error).splitlines():
        print(f"clipdist: error: {where}{line}", file=sys.stderr, flush=True)
