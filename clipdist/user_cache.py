"""Where what can be made again is kept on this machine's own disk."""

import os
from pathlib import Path


def user_cache(part: str, given: str = "") -> Path:
    """The folder `part` in `given`, else $CLIPDIST_CACHE, else $XDG_CACHE_HOME/clipdist, else ~/.cache/clipdist.

    Raises `RuntimeError` for a user without a home folder, where nothing else is set.
    """
    given = given or os.environ.get("CLIPDIST_CACHE", "")
    if given:
        return Path(given).expanduser().absolute() / part
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path there is invalid and ignored (XDG Base Directory Specification).
    return (base if base.is_absolute() else Path.home() / ".cache") / "clipdist" / part
