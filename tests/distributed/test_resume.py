"""Ranks that see the run's folder each in their own way, as nodes see a shared file system."""

from pathlib import Path

import pytest

from clipdist import world
from clipdist.errors import DiskError, UserError
from tests.conftest import write_recipe
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import train_rank


def reopen(rank: int, world_size: int, recipe: str, overrides: list[str], hidden: str) -> tuple[str | None, str, str]:
    """The checkpoint that `open_run` finds, or its error. Rank 1 lacks the newest checkpoint in what it lists, or never
    sees one of its files."""
    from clipdist.config import load_config
    from clipdist.data.mixing import Mixture
    from clipdist.train import checkpoint, run_folder

    run_folder.SEEN_SECONDS = 0.5
    finished, is_file = checkpoint._finished, Path.is_file
    if rank and hidden == "newest":
        checkpoint._finished = lambda folder: finished(folder)[:-1]
    elif rank and hidden:
        Path.is_file = lambda path: path.name != hidden and is_file(path)  # type: ignore[assignment, method-assign]
    config = load_config(Path(recipe), overrides)
    try:
        found = run_folder.open_run(config, Mixture.open(config.data), world.connected())
    except UserError as error:
        return None, type(error).__name__, str(error)
    return found.checkpoint.name if found.checkpoint else None, "", ""


@pytest.fixture(scope="module")
def stopped(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """The recipe of a run with checkpoints, and their names."""
    folder = tmp_path_factory.mktemp("stopped")
    path = write_recipe(folder, shapes, train__epochs=2, checkpoint__every_steps=3, checkpoint__in_background=False)
    assert run_ranks(1, train_rank, str(path), []) == [0]
    return str(path), sorted(found.name for found in (path.parent / "runs" / "tiny" / "checkpoints").glob("step-*"))


def test_a_rank_that_does_not_see_the_newest_checkpoint_goes_on_from_it(stopped: tuple[str, list[str]]) -> None:
    recipe, names = stopped
    assert len(names) > 1
    assert run_ranks(2, reopen, recipe, [], "newest") == [(names[-1], "", "")] * 2


def test_a_file_that_one_rank_never_sees_ends_all_of_them(stopped: tuple[str, list[str]]) -> None:
    recipe, names = stopped
    first, second = run_ranks(2, reopen, recipe, [], "state.json")
    assert first == second
    assert first[:2] == (None, DiskError.__name__)
    assert f"{names[-1]}: rank 1 does not see state.json" in first[2]


def test_what_rank_0_refuses_all_refuse_in_its_words(stopped: tuple[str, list[str]]) -> None:
    first, second = run_ranks(2, reopen, stopped[0], ["resume=never"], "")
    assert first == second
    assert first[:2] == (None, UserError.__name__)
    assert "already holds a run" in first[2]
