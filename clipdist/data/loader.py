"""Shard set -> batches on this rank, in the planned order, whatever the ranks and workers.

b = rows on this rank, B = rows in the global batch, T = tokens of the longest caption among the b.
"""

import math
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler

from clipdist.data.order import consumed_hash, share
from clipdist.data.rows import BadRecord, Piece, Task, TrainRows
from clipdist.data.staging import OwnMemory, Staging
from clipdist.errors import UserError, WorkerKilled

if TYPE_CHECKING:
    from clipdist.data.read_ahead import ReadAhead

# A worker prepares this many rows at a time: small enough that the first batch is there soon and that
# all workers share a step, large enough that handing over costs nothing.
ROWS_PER_TASK = 32
MASK_64 = (1 << 64) - 1


@dataclass
class Batch:
    """The rows of one step on this rank."""

    step: int
    images_b3HW: torch.Tensor  # uint8, channels last in memory
    token_ids_bT: torch.Tensor  # int64; T is 0 where captions are not read
    attention_mask_bT: torch.Tensor  # int64
    group_b: torch.Tensor | None  # int64; for a classifier the number of the class
    keys: list[str]
    consumed: int  # sum over rows of hash(step, key), modulo 2^64
    bad: list[BadRecord]
    wait_seconds: float = 0.0  # how long the training process stood still for this batch

    def __len__(self) -> int:
        return len(self.keys)

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("images_b3HW", "token_ids_bT", "attention_mask_bT", "group_b")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turns PyTorch's notice of a dead worker, which may strike at any line of the training process, into
    `WorkerKilled`."""
    try:
        yield
    except WorkerKilled:
        raise
    except Exception as error:
        # Whoever it struck may have failed once more while cleaning up: torch.save does, closing its file.
        notice: BaseException | None = error
        while notice and not (isinstance(notice, RuntimeError) and str(notice).startswith("DataLoader worker")):
            notice = notice.__cause__ or notice.__context__
        if notice is None:
            raise
        end = re.search(r"signal: (\w+)|exit code (\d+)", f"{notice} {notice.__cause__ or ''}")
        how = end[0] if end else "without a word"
        raise WorkerKilled(
            f"a loader worker was ended from outside ({how}), most often because memory ran out: lower data.workers, "
            f"data.prefetch or data.max_image_pixels, or ask for more memory; the run goes on from its last checkpoint"
        ) from error


class _Tasks(Sampler[Task]):
    """This rank's tasks from a step on, without end within `steps`."""

    def __init__(self, first_step: int, steps: int, start: int, stop: int) -> None:
        self.first_step, self.steps, self.start, self.stop = first_step, steps, start, stop

    def __iter__(self) -> Iterator[Task]:
        for step in range(self.first_step, self.steps):
            for start in range(self.start, self.stop, ROWS_PER_TASK):
                yield Task(step, start, min(start + ROWS_PER_TASK, self.stop))


class TrainLoader:
    """Iterates over this rank's batches of steps first_step..steps of a run; epochs follow without a gap.

    Workers write pixels into shared memory; a thread of this process copies finished batches to `device` while the
    training step runs. Iterate once at a time, and close the iterator (or exhaust it) to end the workers.

    Raises `UserError` when the global batch does not divide by the world size: equal parts are what makes
    averaged gradients those of the global batch. Raises `WorkerKilled` when a worker dies.
    """

    def __init__(
        self,
        rows: TrainRows,
        *,
        rank: int,
        world_size: int,
        first_step: int,
        steps: int,
        device: torch.device | None = None,
    ) -> None:
        config, order = rows.config, rows.order
        if order.global_batch % world_size:
            raise UserError(
                f"train.global_batch={order.global_batch} does not divide by {world_size} processes; "
                f"choose a multiple of {world_size}, or another number of processes"
            )
        self.rows, self.device = rows, device or torch.device("cpu")
        self.first_step, self.steps = first_step, steps
        start, stop = share(order.global_batch, rank, world_size)
        self.rows_per_rank = stop - start
        rows.first_row = start
        self._shared: Staging | None = None
        if config.workers:
            # Work is handed out this far ahead of the batch that is being put together, which holds a slot itself.
            ahead = math.ceil(config.workers * config.prefetch / math.ceil(self.rows_per_rank / ROWS_PER_TASK))
            self._shared = Staging(ahead + 2, self.rows_per_rank, rows.side)
        rows.staging = self._shared or OwnMemory(self.rows_per_rank, rows.side)
        self._loader = DataLoader(
            rows,
            batch_size=None,
            sampler=_Tasks(first_step, steps, start, stop),
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            collate_fn=unchanged,
            worker_init_fn=quiet_worker,
            # The staging memory reaches the workers by fork alone.
            multiprocessing_context="fork" if config.workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        source = iter(self._loader)  # forks the workers: before any thread is there
        batches = self._in_background(source, self._shared) if self._shared else self._assembled(source)
        with closing(batches), worker_errors(), self._read_ahead() as ahead:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                batch.wait_seconds = time.perf_counter() - began
                if ahead is not None:
                    ahead.advance(batch.step)
                yield batch

    def _read_ahead(self) -> "AbstractContextManager[ReadAhead | None]":
        """Fetches shards of a remote set before their turn."""
        split, order = self.rows.split, self.rows.order
        if not split.is_remote:
            return nullcontext()
        from clipdist.data.read_ahead import ReadAhead, upcoming_shards

        first_row = self.rows.first_row
        upcoming = upcoming_shards(order, split, first_row, first_row + self.rows_per_rank, self.first_step, self.steps)
        return ReadAhead(split, upcoming, self.rows.config.remote.read_ahead_shards)

    def _in_background(self, source: Iterator[Any], staging: Staging) -> Generator[Batch]:
        """Batches put together by a thread, one ahead of the training step."""
        if self.device.type == "cuda":
            staging.pin()
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=1)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(source, ready, stop), name="batches", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if self.device.type == "cuda":
                    for tensor in item.tensors().values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield item
        finally:
            stop.set()
            while thread.is_alive():
                with suppress(queue.Empty):
                    ready.get_nowait()
                thread.join(timeout=0.05)
            staging.unpin()

    def _fill(self, source: Iterator[Any], ready: "queue.Queue[Any]", stop: threading.Event) -> None:
        """The thread: puts batches, and at the end None or the exception that ended it."""
        last: BaseException | None = None
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            with torch.cuda.stream(stream):
                for batch in self._assembled(source):
                    if stream is not None:
                        stream.synchronize()  # before the next piece of work may be put where this batch lay
                    if not _put(ready, batch, stop):
                        return
        except BaseException as error:
            last = error
        _put(ready, last, stop)

    def _assembled(self, source: Iterator[Any]) -> Generator[Batch]:
        pieces: list[Piece] = []
        for piece in source:
            if isinstance(piece, UserError):
                raise piece
            pieces.append(piece)
            if sum(len(part.keys) for part in pieces) == self.rows_per_rank:
                yield self._assemble(pieces)
                pieces = []
        assert not pieces, "the last step is incomplete"

    def _assemble(self, pieces: Sequence[Piece]) -> Batch:
        step = pieces[0].step
        assert all(piece.step == step for piece in pieces)
        keys = [key for piece in pieces for key in piece.keys]
        tokens, mask = self.rows.pad([ids for piece in pieces for ids in piece.token_ids])
        groups = None
        if pieces[0].groups is not None:
            groups = torch.tensor([group for piece in pieces for group in piece.groups or []], dtype=torch.int64)
        assert self.rows.staging is not None
        batch = Batch(
            step=step,
            images_b3HW=self.rows.staging.batch(step, self.device),
            token_ids_bT=tokens,
            attention_mask_bT=mask,
            group_b=groups,
            keys=keys,
            consumed=sum(consumed_hash(step, key) for key in keys) & MASK_64,
            bad=[record for piece in pieces for record in piece.bad],
        )
        for name, tensor in batch.tensors().items():
            setattr(batch, name, tensor.to(self.device))
        return batch


def _put(ready: "queue.Queue[Any]", item: Any, stop: threading.Event) -> bool:
    """Waits for room, unless nobody waits any more; says whether the item was put."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def unchanged(item: Any) -> Any:
    return item


def quiet_worker(worker: int) -> None:
    # Workers run side by side: threads of their own would fight over the cores.
    torch.set_num_threads(1)
    # A launcher or SLURM asks all processes to stop. The rank decides when: it still needs batches until the step at
    # which all ranks agree. So a worker heeds its parent alone. Only who waits for a signal learns who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), name="SIGTERM", daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
