"""Where a batch's pixels are put together.

Loader workers fill memory that the training process reads: no copy through a pipe, no files in /dev/shm. Its pages are
anonymous and shared with the workers by fork, so a container's small /dev/shm does not limit them and nothing stays
behind when a process dies. Without workers, a batch has memory of its own.
"""

import logging
import mmap
import threading
from math import prod
from typing import Protocol

import numpy as np
import torch

logger = logging.getLogger(__name__)


class Pixels(Protocol):
    """Where the pixels of a step's rows are put, and how the whole batch is taken away."""

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """Where rows start..stop (counted on this rank) of a step are put: uint8 [n, side, side, 3]."""
        ...

    def batch(self, step: int, device: torch.device) -> torch.Tensor:
        """A step's pixels on `device`, uint8 [b, 3, side, side] with channels last, once all its rows are there."""
        ...


class OwnMemory:
    """For a loader without workers: every batch in memory of its own, which is handed over and not copied."""

    def __init__(self, rows: int, side: int) -> None:
        self.shape = (rows, side, side, 3)
        self._step, self._pixels = -1, np.empty((0, side, side, 3), np.uint8)

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        if step != self._step:
            self._step, self._pixels = step, np.empty(self.shape, np.uint8)
        return self._pixels[start:stop]

    def batch(self, step: int, device: torch.device) -> torch.Tensor:
        assert step == self._step
        self._step = -1  # it is another's now
        return torch.from_numpy(self._pixels).permute(0, 3, 1, 2).to(device)


class Staging:
    """A ring of `slots` batches of pixels, uint8 [slots, rows, side, side, 3]; step `s` lives in slot `s % slots`.

    Made before the workers are forked. A slot may be filled again once its batch was copied out.
    """

    def __init__(self, slots: int, rows: int, side: int) -> None:
        self.shape = (slots, rows, side, side, 3)
        self._memory = mmap.mmap(-1, prod(self.shape))
        self._pixels = np.frombuffer(self._memory, np.uint8).reshape(self.shape)
        self._tensor = torch.from_numpy(self._pixels)
        self._pinned = False

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        return self._pixels[step % self.shape[0], start:stop]

    def pin(self) -> None:
        """Lets the GPU read the pages by itself, after the workers were forked. Without it copies still are right, but
        do not overlap with computation."""
        # In a thread of its own: a failure would stay behind as the thread's last CUDA error, and strike later.
        thread = threading.Thread(target=self._register)
        thread.start()
        thread.join()

    def _register(self) -> None:
        size = self._tensor.nbytes
        code = int(torch.cuda.cudart().cudaHostRegister(self._tensor.data_ptr(), size, 0))
        self._pinned = code == 0
        if not self._pinned:
            logger.warning("%d MiB of loader memory could not be pinned (code %d)", size >> 20, code)

    def unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._tensor.data_ptr())
            self._pinned = False

    def batch(self, step: int, device: torch.device) -> torch.Tensor:
        """A copy. On a GPU it may still be running: wait for the current stream before the slot is filled again."""
        images = self._tensor[step % self.shape[0]].permute(0, 3, 1, 2)
        if device.type == "cpu":
            return images.clone(memory_format=torch.preserve_format)
        return images.to(device, non_blocking=True)
