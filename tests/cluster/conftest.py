"""One SLURM for all of these tests, and a run that is small enough to be killed often."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipdist.prepare.phantom import write_skincap_layout
from tests.cluster.jobs import Job
from tests.cluster.slurm import LocalSlurm, missing
from tests.conftest import TINY

WANTED = "CLIPDIST_CLUSTER_TESTS"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """These tests need what a machine may lack; where they are asked for by name, a lack is an error."""
    reason = missing()
    if reason and os.environ.get(WANTED) != "1":
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    assert not missing(), missing()
    # Not below pytest's own folder: munge wants its socket where everybody may come.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = LocalSlurm(Path(folder))
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms in the layout that SkinCAP comes in."""
    folder = tmp_path_factory.mktemp("raw") / "SkinCAP"
    write_skincap_layout(folder, 140, 48, 0, 1)
    return folder


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """The tiny recipe, with dropout, for the script to run in `folder`."""
    tree = yaml.safe_load(yaml.safe_dump(TINY))
    tree["data"] |= {"set": str(folder / "data"), "workers": 1}
    tree["runs"] = str(folder / "runs")
    tree["model"]["projection"]["dropout"] = 0.1
    tree["model"]["text"] |= {"max_tokens": 64}
    tree["model"]["text"]["options"] |= {"max_position_embeddings": 64}
    tree["train"] |= {"global_batch": 16, "epochs": 6, **changes}
    tree["checkpoint"] = {"every_steps": 4, "every_minutes": 0, "keep": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cluster_recipe() -> Callable[..., Path]:
    return tiny_recipe


@pytest.fixture(scope="session")
def undisturbed(
    slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory, cluster_recipe: Callable[..., Path], raw: Path
) -> Path:
    """The folder of the run that nothing happened to; its set is packed by the job."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(slurm, folder, cluster_recipe(folder), raw, preflight=True)
    found = job.finish()
    assert found["Restarts"] == "0"
    assert re.search(r"^\d+ checks(, nothing wrong|: \d+ warning)", job.said(whole=True), re.MULTILINE), "the preflight"
    return folder
