"""Runs a function on several real processes joined by gloo, and brings back each rank's answer or traceback."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One process imports torch once; ranks are forked from it in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clipdist.config", "clipdist.train.loop", "clipdist.loss.reference"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """[function(rank, world_size, *args) of each rank]. A rank that raises, or hangs beyond `timeout`, fails the test
    with its traceback; the others are ended."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(sender, str(rendezvous), rank, world_size, function, args))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Any], timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = multiprocessing.connection.wait(waiting, max(0.0, end - time.monotonic()))
        assert ready, f"ranks {[r for r in range(len(pipes)) if r not in answers]} gave no answer in {timeout:.0f} s"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                good, answer = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without an answer") from None
            assert good, f"rank {rank} raised:\n{answer}"
            answers[rank] = pickle.loads(answer)
    return [answers[rank] for rank in range(len(pipes))]


def _rank(
    sender: Any, rendezvous: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", **{key: str(n) for key, n in numbers.items()})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        # Plain bytes: tensors sent as such live in shared memory that ends with this process.
        sender.send((True, pickle.dumps(function(rank, world_size, *args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))
