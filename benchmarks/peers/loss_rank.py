"""One rank of one contestant of benchmarks/loss.py: times the loss and its gradients, answers with a line of JSON.

Run by loss.py in a process of its own, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT:
python benchmarks/peers/loss_rank.py CONTESTANT ROWS WIDTH STEPS DEVICE DTYPE
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

SCALE = 1 / 0.07
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def clipdist_loss(**options: Any) -> Loss:
    from clipdist.loss import ContrastiveLoss

    criterion = ContrastiveLoss(**options)
    return lambda image, text, scale: criterion(image, text, scale)


def open_clip_loss(local: bool, rank: int, world_size: int) -> Loss:
    """Its two published forms, both with gradients through the gather: without, gradients would be wrong."""
    from open_clip.loss import ClipLoss

    criterion = ClipLoss(local_loss=local, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size)
    return lambda image, text, scale: criterion(image, text, scale)


def materialised_loss() -> Loss:
    """What anyone would write for one device: all logits, two cross-entropies."""

    def loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = scale.to(image.dtype) * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2

    return loss


def make(contestant: str, rank: int, world_size: int) -> Loss:
    if contestant.startswith("clipdist"):
        return clipdist_loss(**({"backend": "tiles"} if contestant == "clipdist_tiles" else {}))
    if contestant == "materialised":
        assert world_size == 1
        return materialised_loss()
    return open_clip_loss(contestant == "open_clip_local", rank, world_size)


def status(field: str) -> int:
    """A size from /proc/self/status, bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


class Memory:
    """Growth of the peak since it was made: of the device, or of this process's resident set."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the peak starts anew
        self.before = status("VmRSS")

    def peak(self) -> int:
        after = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else status("VmHWM")
        return after - self.before


def loopback_bytes() -> int:
    """Bytes that anyone on this machine has sent over the loopback interface."""
    with open("/proc/net/dev", encoding="utf-8") as file:
        line = next(line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def main() -> None:
    contestant, rows, width, steps, device_name, dtype_name = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    loss = make(contestant, rank, world_size)
    generator = torch.Generator().manual_seed(rank)
    features = [
        functional.normalize(torch.randn(int(rows), width_, generator=generator), dim=1) for width_ in [int(width)] * 2
    ]
    scale = torch.tensor(SCALE, device=device)
    answer: dict[str, Any] = {}
    seconds = []

    def step(leaves: list[torch.Tensor]) -> torch.Tensor:
        value = loss(*leaves)
        value.backward()
        return value

    # A first step on a few rows: what is imported, compiled and connected once is no part of a step.
    leaves = [tensor[:64].to(device, dtype, copy=True).requires_grad_() for tensor in features]
    step([*leaves, scale.clone().requires_grad_()])
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in features]
    leaves.append(scale.clone().requires_grad_())
    if device.type == "cuda":
        step(leaves)  # chooses the kernel's blocks for this size
        for leaf in leaves:
            leaf.grad = None
    settle(device)
    memory, sent = Memory(device), loopback_bytes()
    for _ in range(int(steps)):
        for leaf in leaves:
            leaf.grad = None
        settle(device)
        began = time.perf_counter()
        value = step(leaves)
        settle(device)
        seconds.append(time.perf_counter() - began)
    answer = {
        "rank": rank,
        "seconds": seconds,
        "peak_bytes": memory.peak(),
        # All ranks share the interface, and a rank sends as much as every other.
        "sent_bytes_per_step": (loopback_bytes() - sent) / int(steps) / world_size,
        "loss": float(value.detach()),
        "gradient_norm": float(leaves[0].grad.float().norm()),  # type: ignore[union-attr]
    }
    print(json.dumps(answer), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
