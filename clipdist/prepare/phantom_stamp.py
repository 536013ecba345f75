"""What folders of drawn data hold so that none passes as real: README.txt for people, phantom.json for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAMP = "phantom.json"


def write_stamp(folder: Path, stamp: Mapping[str, Any], readme: str) -> None:
    """Marks `folder`; `stamp["what"]` names the kind of data and contains the word synthetic."""
    assert "synthetic" in stamp["what"]
    (folder / "README.txt").write_text(readme, encoding="utf-8")
    (folder / STAMP).write_text(json.dumps(dict(stamp), indent=1) + "\n", encoding="utf-8")


def is_phantom(folder: Path) -> bool:
    """Whether a program of this package drew what `folder` holds."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and "synthetic" in str(stamp.get("what"))
