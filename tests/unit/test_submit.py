"""What launch/submit.py checks before anything is queued, and what it would queue; on a real SLURM: tests/cluster."""

import argparse
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdist.cluster.submit import minutes, prepare, resources_of, send, write_submitted
from clipdist.config import load_config, read_config
from clipdist.errors import UserError
from tests.conftest import TrainedRun
from tests.distributed.test_training import ROOT

CPU = ("--gpus-per-node", "0", "--processes-per-node", "2", "--accelerate-config", "launch/accelerate/cpu.yaml")


def words(*given: str) -> argparse.Namespace:
    from clipdist.cluster.submit import add_resource_arguments

    parser = argparse.ArgumentParser()
    add_resource_arguments(parser)
    return parser.parse_args(given)


def submit(*given: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/submit.py", *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("10:30", 11),
        ("04:00:00", 240),
        ("2-12", 3600),
        ("1-00:30", 1470),
        ("2-00:00:00", 2880),
        ("0:0:1", 1),
    ],
)
def test_times_as_sbatch_takes_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "4h", "1:2:3:4", "1-", "-"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a time such as 04:00:00"):
        minutes(text)


def test_a_dry_run_prints_what_sbatch_would_get_and_writes_nothing(recipe: Callable[..., Path]) -> None:
    path = recipe()
    given = ("--partition", "gpu", "--account", "mine", "--nodes", "3", "--gpus-per-node", "4", "--time", "1-00")
    done = submit(
        path,
        *given,
        "--mem",
        "64GB",
        "--cpus-per-task",
        "8",
        "--sbatch",
        "mail-type=END",
        "--setup",
        "module load cuda",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--partition=gpu",
        "--account=mine",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--time=1440",
        "--signal=USR2@300",
        "--mem=64GB",
        "--mail-type=END",
        "--job-name=tiny",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}" in lines
    assert " --cpus-per-task=8" in next(line for line in lines if line.startswith("srun ")), "it would be bound to one"
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if line.startswith("srun "))
    assert not (path.parent / "runs").exists()
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def test_what_is_interpolated_is_quoted(recipe: Callable[..., Path]) -> None:
    done = submit(recipe(runs="/tmp/a b;$(c)"), "--dry-run", "--sbatch", "comment=a b;c", *CPU)
    assert "#SBATCH --comment='a b;c'" in done.stdout
    assert "'/tmp/a b;$(c)/tiny/slurm'" in done.stdout


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({"train__epochz": 3}, (), "unknown key train.epochz; did you mean epochs?"),
        ({"data__set": "nowhere"}, (), "nowhere"),
        ({"data__train_split": "trian"}, (), "no split 'trian'; it has 'train', 'val'"),
        ({}, ("--nodes", "5"), "train.global_batch=24 does not divide by 10 processes"),
        ({}, ("--accelerate-config", "launch/accelerate/gpuu.yaml"), "launch/accelerate/gpuu.yaml: cannot be read"),
        ({}, ("--accelerate-config", "launch/recipes/skincap.yaml"), "no configuration of accelerate"),
        ({"train__precision": "fp16"}, (), "train.precision=fp16 needs a GPU"),
        ({"train__processes": 4}, (), "train.processes=4, but 1 × 2 would run"),
        ({}, ("--processes-per-node", "0"), "expected at least 1"),
        ({}, ("--sbatch", "exclusive"), "--sbatch exclusive: expected key=value"),
        ({}, ("--cluster", "local", "--nodes", "2"), "--cluster local has one node"),
    ],
)
def test_what_is_wrong_is_found_before(
    changes: dict[str, object], given: tuple[str, ...], said: str, recipe: Callable[..., Path]
) -> None:
    path = recipe(**changes)
    args = words(*CPU, *given)

    def check() -> None:  # as the script does, in this process
        resources_of(args)
        prepare(load_config(path, []), args)

    with pytest.raises(UserError) as caught:
        check()
    assert said in str(caught.value)
    assert not (path.parent / "runs").exists()


def test_what_is_wrong_ends_with_code_2(recipe: Callable[..., Path]) -> None:
    done = submit(recipe(), "data.set=nowhere", *CPU)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("clipdist: error: shard set nowhere: there is no such folder")


def test_a_gpu_need_not_be_here(recipe: Callable[..., Path]) -> None:
    """One submits from a login node."""
    prepare(load_config(recipe(), ["train.precision=fp16"]), words("--gpus-per-node", "2"))


def test_tars_without_an_index_are_the_jobs_business(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a-0000.tar").write_bytes(b"")
    prepare(load_config(recipe(data__set=str(tmp_path / "tars")), []), words(*CPU))


def test_a_run_of_another_recipe_is_refused(trained_run: TrainedRun) -> None:
    config = load_config(trained_run.recipe, ["optim.lr=0.1"])
    with pytest.raises(UserError, match=r"the run there was made with another recipe \(optim.lr: 0.005 → 0.1\)"):
        prepare(config, words(*CPU))
    prepare(load_config(trained_run.recipe, []), words(*CPU))


def test_only_the_resolved_configuration_is_submitted(recipe: Callable[..., Path]) -> None:
    path = recipe()
    config = load_config(path, ["train.epochs=7"])
    job = write_submitted(config, prepare(config, words(*CPU)))
    (written,) = job.training.words
    path.write_text("changed while the job waits")
    assert read_config(Path(written)) == config
    assert Path(written).parent == config.folder / "submitted"
    again = write_submitted(config, job)
    assert again.training.words != job.training.words, "a job that waits keeps its own"
    assert job.evaluate[0] == str(config.folder / "model")


def test_a_signal_before_the_start_submits_the_same_again(recipe: Callable[..., Path]) -> None:
    config = load_config(recipe(), [])
    job = prepare(config, words(*CPU))
    assert job.checkpoint().function == job
    assert pickle.loads(pickle.dumps(job)) == job


def test_without_slurm_the_way_out_is_named(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    args = words(*CPU)
    job = prepare(load_config(recipe(), []), args)
    with pytest.raises(UserError, match=r"no srun here.*--cluster local or --dry-run"):
        send(job, "tiny", resources_of(args))


@pytest.mark.slow
def test_a_job_of_this_machine(recipe: Callable[..., Path]) -> None:
    """From the script to the evaluation, through submitit's own executor."""
    path = recipe(checkpoint__every_steps=4)
    done = submit(path, *CPU, "--cluster", "local", "train.epochs=2")
    run = path.parent / "runs" / "tiny"
    assert done.returncode == 0, done.stderr + done.stdout
    assert list((run / "evaluation").glob("*.json"))
    ranks = sorted((run / "logs").glob("local-*/rank-*.log"))
    assert [file.name for file in ranks] == ["rank-0.log", "rank-1.log"]
    assert "step 14/14" in ranks[0].read_text()
