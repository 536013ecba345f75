"""`train.micro_batch: auto`: how many rows fit into memory at a time, found without filling it.

b = rows on this rank, n = rows of a micro-batch, B = rows in the global batch, D = width of the joint embedding.

Two small forward passes tell what autograd keeps of each row, so a straight line tells what it keeps of n. Added to it
is what does not depend on n. A trial with a real step would crash the process, on a cluster after an hour in the queue.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from clipdist import world
from clipdist.errors import UserError
from clipdist.loss.tiles import tile_shape
from clipdist.model.build import needs_whole_batch
from clipdist.model.freeze import StageConfig, apply_stage
from clipdist.model.tower_model import TowerModel

SAFE_SHARE = 0.85
"""Of the free memory: allocators round up and leave gaps, libraries take workspaces."""
PROBES = (2, 4)
"""Rows of the two passes; batch statistics need two."""
TRANSIENT = 2
"""How many times the largest activation the backward pass holds besides what was kept: the gradient that comes into a
layer, and the one that leaves it."""
GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """Bytes of one forward pass: all that autograd keeps, and the largest single activation."""

    total: int
    largest: int


@dataclass(frozen=True)
class Estimate:
    """Bytes that a step needs beyond the weights, which are in memory already."""

    fixed: int
    """Gradients, optimiser state, images of the whole batch, features, the loss' tiles."""
    per_row: int
    """Of a micro-batch."""

    def of(self, rows: int) -> int:
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Choice:
    """What was chosen and why, as `environment.json` has it; bytes are those of this rank."""

    micro_batch: int
    fixed_bytes: int
    bytes_per_row: int
    free_bytes: int

    def __str__(self) -> str:
        needed = self.fixed_bytes + self.bytes_per_row * self.micro_batch
        return (
            f"train.micro_batch=auto: {self.micro_batch} rows at a time, about {needed / GIB:.2f} GiB beside the "
            f"weights ({self.fixed_bytes / GIB:.2f} GiB + {self.bytes_per_row / 2**20:.1f} MiB a row) of "
            f"{self.free_bytes / GIB:.2f} GiB that are free"
        )

    def noted(self) -> dict[str, Any]:
        return asdict(self)


def even_micro_batch(rows: int, most: int) -> int:
    """The rows of a micro-batch where `rows` are embedded in as few as `most` rows at a time allow, all about equal: a
    job that goes on with more or fewer processes has another share, which the recipe's number need not divide."""
    return -(-rows // -(-rows // min(most, rows)))


def choose_micro_batch(
    model: TowerModel,
    unused: frozenset[str],
    stages: Sequence[StageConfig],
    *,
    rows: int,
    max_tokens: int,
    precision: torch.dtype,
    tile: int | None = None,
) -> Choice:
    """The largest divisor of `rows`, the rank's share of the global batch, whose step fits into the free memory.

    All ranks call it, before the model is wrapped; they take the smallest of their answers. `unused` names parameters
    that never train, `stages` what trains when (none: everything): the hungriest counts. Engines that shard gradients
    and optimiser state need less than is reckoned here, never more.

    Raises `UserError` on all ranks when one of them has no room even for the smallest micro-batch; batch statistics
    over the whole batch allow none but all rows. Leaves random states, buffers, gradients and what trains as they were.
    """
    device = next(model.parameters()).device
    estimate = estimate_step(model, unused, stages, rows=rows, max_tokens=max_tokens, precision=precision, tile=tile)
    world.barrier()  # ranks of one node look at the same memory: each before any of them fills it
    free = free_bytes(device)
    whole = needs_whole_batch(model)
    candidates = [rows] if whole else [n for n in range(rows, 0, -1) if rows % n == 0]
    fitting = next((n for n in candidates if estimate.of(n) <= SAFE_SHARE * free), 0)
    agreed = -int(world.max_over_ranks(torch.tensor([-fitting], device=device)))
    if not agreed:
        least = candidates[-1]
        why = "its batch normalisation needs all rows at once; set model.image.batch_norm=frozen, or " if whole else ""
        raise UserError(
            f"train.micro_batch=auto: a step with {least} rows at a time needs about "
            f"{estimate.of(least) / GIB:.2f} GiB beside the weights, and {SAFE_SHARE:.0%} of {free / GIB:.2f} GiB may "
            f"be used, on this rank or another that has less; {why}choose a smaller model, side or global batch, "
            f"train.precision=bf16, or more GPUs"
        )
    return Choice(agreed, estimate.fixed, estimate.per_row, free)


def estimate_step(
    model: TowerModel,
    unused: frozenset[str],
    stages: Sequence[StageConfig],
    *,
    rows: int,
    max_tokens: int,
    precision: torch.dtype,
    tile: int | None = None,
) -> Estimate:
    """Measures and adds up; captions are taken to be as long as they may be."""
    device = next(model.parameters()).device
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    estimates = []
    try:
        for stage in stages or [StageConfig()]:
            apply_stage(model, stage, unused)
            model.train()
            few, more = (kept_bytes(model, n, max_tokens, precision) for n in PROBES)
            between = PROBES[1] - PROBES[0]
            slope = (more.total - few.total) / between
            start = max(0.0, few.total - PROBES[0] * slope)  # such as weights cast to half precision
            largest = max(0.0, (more.largest - few.largest) / between)
            # Gradients, and AdamW's two moments.
            update = 3 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
            estimates.append((update + start, slope + TRANSIENT * largest))
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        model.train(was_training)
    around = _around_the_towers(rows, model.joint_width, model.image.side, device, tile)
    return Estimate(math.ceil(max(e[0] for e in estimates) + around), math.ceil(max(e[1] for e in estimates)))


def _around_the_towers(rows: int, width: int, side: int, device: torch.device, tile: int | None) -> int:
    """Bytes of a step that depend on the batch and not on the micro-batch."""
    global_batch = rows * world.connected().world_size
    images = 2 * rows * 3 * side * side  # this step's and the next's, uint8
    if not width:  # a loss that adds up over micro-batches
        return images
    # float32: own features, their gradients, the loss' scaled copies, targets and pulls, of both sides; all features.
    features = 4 * width * (10 * rows + 2 * global_batch)
    tile_rows, tile_columns = tile_shape(device, tile)
    tiles = 4 * 2 * min(tile_rows, rows) * min(tile_columns, global_batch)
    return images + features + tiles


def kept_bytes(model: TowerModel, rows: int, tokens: int, precision: torch.dtype) -> Kept:
    """Runs the model forward and counts each piece of memory that autograd keeps once; weights, buffers and inputs
    are no part of it. Leaves random states and buffers as they were."""
    device = next(model.parameters()).device
    inputs = model.example(rows, tokens, device)
    known = {_place(t) for t in (*model.parameters(), *model.buffers(), *inputs)}
    found: dict[int, int] = {}
    largest = 0

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in known:
            # The graph holds the memory for as long as it is counted, so no address comes twice.
            found[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def note(module: nn.Module, given: Any, made: Any) -> None:
        nonlocal largest
        if isinstance(made, Tensor):
            largest = max(largest, made.nbytes)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32),
        ):
            made = model(*inputs)
        del made
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return Kept(sum(found.values()), max([largest, *found.values()]))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take. Of a GPU: what is free, and what torch has reserved and does not use. Of a
    CPU: what the system or the process' control group has left, whichever is less, divided by the ranks here."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = psutil.virtual_memory().available
    limited = cgroup_free_bytes()
    return (free if limited is None else min(free, limited)) // world.ranks_on_node()


def cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the tightest memory limit around this process leaves (SLURM, Docker and Kubernetes set such); None without
    any. Pages of files that the kernel would give up count as free. Understands versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in lines:
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # A container sees its own group as the root, whatever its path is called outside.
        found += [
            left
            for folder in (group, *group.parents)
            if folder.is_relative_to(base) and (left := _left(folder, names)) is not None
        ]
    return min(found, default=None)


def _left(folder: Path, names: tuple[str, str, str]) -> int | None:
    """Bytes that the limit of one control group leaves; None without a limit."""
    limit_name, used_name, reclaimable = names
    try:
        limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(statistics.get(reclaimable, 0)))


@contextmanager
def out_of_memory(micro_batch: int, rows: int, precision: str) -> Iterator[None]:
    """Turns a GPU's lack of memory within a step into a `UserError` that says what to set; `rows` are this rank's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = next((n for n in range(micro_batch // 2, 0, -1) if rows % n == 0), 0)
        smaller = f"set train.micro_batch={half}" if half else "set a smaller model or model.image.side"
        other = "" if precision == "bf16" else ", or train.precision=bf16"
        told = ". ".join(str(error).split(". ")[:2])
        raise UserError(
            f"out of memory with {micro_batch} rows per micro-batch ({told}); {smaller}{other}; activation "
            f"checkpointing (checkpoint_activations of model.image and model.text) also lowers it, and "
            f"train.micro_batch=auto measures what fits"
        ) from error
