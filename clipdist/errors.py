"""The exceptions that the command line prints without a traceback, and what makes them of a disk's errors."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something that the user can change: the message says what was found, what was expected, and what to do."""


class DiskError(UserError):
    """A disk is full, read-only or failing: the same call may succeed once it is better. `reason` is the system's."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class WorkerKilled(RuntimeError):
    """A loader worker was ended from outside; the message says how, and what to do."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILING = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN)  # the last two: an evicted client
_CLOSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


@contextmanager
def disk_errors(folder: Path, needed: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns a full, read-only or failing disk into a `DiskError`, and a folder that cannot be written into a
    `UserError`; other exceptions pass.

    `needed` tells how far the work came and how much space all of it needs; with it, also a full disk that has become
    a `UserError` on the way is told of in these words.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if needed and number in _FULL:
            raise DiskError(
                f"{folder}: no space left on this disk, or its quota is used up, {needed()}; free some or choose "
                f"another folder",
                os.strerror(number),
            ) from error
        if isinstance(error, UserError) or number not in (*_FULL, *_FAILING, *_CLOSED):
            raise
        if number in _CLOSED:
            raise UserError(f"{folder}: cannot be written ({os.strerror(number)}); choose another folder") from error
        raise _disk_error(folder, number) from error


@contextmanager
def disk_outages(folder: Path) -> Iterator[None]:
    """The same for a folder that could be written before: whatever the system refuses there now may pass (a mount that
    is gone, rights that a ticket gave), so all of it is a `DiskError`."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if isinstance(error, DiskError) or not number:
            raise
        raise _disk_error(folder, number) from error


def _disk_error(folder: Path, number: int) -> DiskError:
    reason = os.strerror(number)
    advice = (
        "free some space and run it again" if number in _FULL else "run it again when it can, or choose another folder"
    )
    return DiskError(f"{folder}: cannot be written ({reason}); {advice}", reason)


def _error_number(error: BaseException | None) -> int:
    """The operating system's error number behind an exception; 0 when there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # how safetensors words it
            return int(found[1])
        error = error.__cause__ or error.__context__  # torch.save: a RuntimeError over the file's own
    return 0
