"""The one exception that the command line prints without a traceback, and what makes it of a disk's errors."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something that the user can change: the message says what was found, what was expected, and what to do."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, and a folder that cannot be written, into a `UserError`; other exceptions pass."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
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
