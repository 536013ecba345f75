"""A small shard set, plain and compressed, for the tests of shards."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.shard_sets import write_set


@pytest.fixture(scope="module", params=[False, True], ids=["tar", "zst"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that tests must not change."""
    return write_set(tmp_path_factory.mktemp("made") / "set", zstd=request.param)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same set, to be damaged."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def appeared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were put in place by renaming, in order."""
    names: list[str] = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        names.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    return names
