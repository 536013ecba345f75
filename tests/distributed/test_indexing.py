"""A folder that was never indexed, through real processes: one indexes, all open it, or all say why not."""

import time
from pathlib import Path

import pytest

from clipdist.data.sets import index
from clipdist.data.sets.index import open_or_index
from clipdist.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.unit.tars import PNG, pairs, plain_tar


def opened(rank: int, world_size: int, folder: Path) -> tuple[bool, str]:
    """(whether this rank indexed, the first key or what is wrong)."""
    real, calls = index.index_folder, []

    def slow(path: Path, **options: object) -> object:
        calls.append(path)
        time.sleep(0.3)
        return real(path, **options)  # type: ignore[arg-type]

    index.index_folder = slow  # type: ignore[assignment]
    index.REPORT_SECONDS = 0.05
    try:
        key = open_or_index(folder).split("train").read(0).key
        return bool(calls), key
    except UserError as error:
        return bool(calls), str(error)


@pytest.mark.parametrize("name", ["a", "/a"])
def test_one_rank_indexes_and_all_go_on_or_stop(name: str, tmp_path: Path) -> None:
    plain_tar(tmp_path / "train-0.tar", pairs("a") if name == "a" else [("/a.png", PNG)])
    answers = run_ranks(2, opened, tmp_path)
    assert answers == [(True, answers[0][1]), (False, answers[0][1])]
    assert answers[0][1] == "a" if name == "a" else "points outside the archive" in answers[0][1]
