"""The exceptions that the command line prints without a traceback, and what makes them of a disk's errors."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something that the user can change: the message says what was found, what was expected, and what to do."""


class WorkerKilled(RuntimeError):
    """A loader worker was ended from outside; the message says how, and what to do."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


@contextmanager
def disk_errors(folder: Path, needed: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns a full disk, and a folder that cannot be written, into a `UserError`; other exceptions pass.

    `needed` tells how far the work came and how much space all of it needs; with it, also a full disk that has become
    a `UserError` on the way is told of in these words.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if needed and number in _FULL:
            raise UserError(
                f"{folder}: no space left on this disk, or its quota is used up, {needed()}; free some or choose "
                f"another folder"
            ) from error
        if isinstance(error, UserError) or number not in (*_FULL, *_CLOSED):
            raise
        advice = "free some space and run it again" if number in _FULL else "choose another folder"
        raise UserError(f"{folder}: cannot be written ({os.strerror(number)}); {advice}") from error


def _error_number(error: BaseException | None) -> int:
    """The operating system's error number behind an exception; 0 when there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # how safetensors words it
            return int(found[1])
        error = error.__cause__ or error.__context__  # torch.save: a RuntimeError over the file's own
    return 0
