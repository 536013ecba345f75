"""`clipdist eval` says the same on any number of processes, to the last digit."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TrainedRun
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import LAUNCH, ROOT


def scored(rank: int, world_size: int) -> Any:
    """Tiles of 7 rows, fewer and more than there are ranks; several right answers, so that whole rows are sorted."""
    from clipdist.evaluate.retrieval import retrieval_scores

    found = []
    for N, M in ((5, 9), (40, 60)):
        rng = np.random.default_rng(N)
        image, text, owner = rng.normal(size=(N, 16)), rng.normal(size=(M, 16)), rng.integers(N, size=M)
        how: dict[str, Any] = {"group_N": np.arange(N) // 3, "chunk": 7, "bootstrap": 50, "precision": True}
        scores = retrieval_scores(image, text, owner, shared=True, **how)
        both = scores.image_to_text, scores.text_to_image
        found.append(
            (scores.to_dict(), [one.ranks_Q.tolist() for one in both], [one.average_precision_Q for one in both])
        )
    return found


def test_retrieval_walked_by_several_ranks_is_that_of_one() -> None:
    (truth,) = run_ranks(1, scored)
    for world_size in (2, 3):
        for answer in run_ranks(world_size, scored):
            for (scores, ranks, precision), (true_scores, true_ranks, true_precision) in zip(
                answer, truth, strict=True
            ):
                assert scores == true_scores
                assert ranks == true_ranks
                for one, other in zip(precision, true_precision, strict=True):
                    np.testing.assert_array_equal(one, other)


def evaluated(rank: int, world_size: int, words: list[str], out: str) -> int:
    from clipdist import cli

    return cli.main(["eval", *words, "--out", f"{out}/{world_size}"])


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_evaluate_as_one(processes: int, trained_run: TrainedRun, tmp_path: Path) -> None:
    """168 images are six pieces of 32; classes, probes and a temperature need a second split."""
    words = [str(trained_run.folder / "model"), "--data", str(trained_run.shapes), "--split", "train", "--workers", "0"]
    words += ["--bootstrap", "50", "--groups", "label", "--in-batch", "8", "--zero-shot", "label"]
    words += ["--calibrate", "val", "--probe", "label", "--probe-train", "val", "--fractions", "1", "--examples", "1"]
    before = (trained_run.folder / "report.html").read_bytes()
    try:
        for world_size in (1, processes):
            assert run_ranks(world_size, evaluated, words, str(tmp_path), timeout=300) == [0] * world_size
    finally:
        (trained_run.folder / "report.html").write_bytes(before)
    bodies = [json.loads((tmp_path / str(n) / "shapes-train.json").read_text()) for n in (1, processes)]
    assert bodies[0]["image_to_text"]["R@1"]["low"] is not None
    assert bodies[0]["probe"]["scores"]
    assert bodies[0] == bodies[1]
    names = [sorted(path.name for path in (tmp_path / str(n)).iterdir()) for n in (1, processes)]
    assert names[0] == names[1]


def launched(trained_run: TrainedRun, out: Path, split: str) -> subprocess.CompletedProcess[str]:
    words = ["--num_processes", "2", "-m", "clipdist.cli", "eval", str(trained_run.folder / "model"), "--workers", "0"]
    words += ["--data", str(trained_run.shapes), "--out", str(out), "--split", split, "--audit", "none"]
    return subprocess.run([*LAUNCH, *words], capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.slow
def test_a_launcher_starts_it(trained_run: TrainedRun, tmp_path: Path) -> None:
    done = launched(trained_run, tmp_path, "val")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("^image → text", done.stdout, re.M)) == 1, "rank 0 alone prints"
    assert json.loads((tmp_path / "shapes-val.json").read_text())["images"] == 32


@pytest.mark.slow
def test_an_error_is_said_once(trained_run: TrainedRun, tmp_path: Path) -> None:
    done = launched(trained_run, tmp_path, "tset")
    assert done.returncode != 0
    assert done.stderr.count("clipdist: error:") == 1
    assert "no split 'tset'" in done.stderr
