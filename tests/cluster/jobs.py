"""A job on the local SLURM, and what its processes do."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT, column, weights

LAST = 36
"""The last step of the run."""
IN_BATCH = 8
"""Fewer pictures than the 32 of a batch as published are validated here."""


class Job:
    """A job of slurm/train_skincap.sh on 2 nodes × 2 tasks."""

    def __init__(
        self,
        slurm: LocalSlurm,
        folder: Path,
        recipe: Path,
        raw: Path,
        *options: str,
        words: Sequence[str] = (),
        preflight: bool = False,
    ) -> None:
        self.slurm, self.run, self.log = slurm, folder / "runs" / "tiny", folder / "job.log"
        variables = {
            "RECIPE": str(recipe),
            "SKINCAP_RAW": str(raw),
            "ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml",
            "OMP_NUM_THREADS": "1",
            "IN_BATCH": str(IN_BATCH),
            "PREFLIGHT": "--preflight" if preflight else "--no-preflight",
        }
        options = ("--nodes=2", "--gpus-per-node=2", f"--output={self.log}", *options)
        self.number = slurm.submit(*options, "slurm/train_skincap.sh", *words, cwd=ROOT, **variables)

    @classmethod
    def of(cls, slurm: LocalSlurm, number: str, run: Path, log: Path) -> "Job":
        """One that something else has put into the queue."""
        job = cls.__new__(cls)
        job.slurm, job.number, job.run, job.log = slurm, number, run, log
        return job

    def reach(self, step: int, seconds: float = 120) -> None:
        """Until the run has logged this step."""
        end = time.monotonic() + seconds
        while not ((self.run / "metrics.jsonl").exists() and max(column(self.run, "train/loss"), default=0) >= step):
            state = self.slurm.job(self.number)
            assert state["JobState"] in ("RUNNING", "PENDING"), f"{state['JobState']}: {self.said()}"
            assert time.monotonic() < end, f"{self.said()}\n{self.states()}"
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks; they are this machine's, too."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            ours = environment.get("SLURM_JOB_ID") == self.number and "RANK" in environment
            if ours and "clipdist.train" in words and "--config_file" not in words:
                found.append((int(environment["RANK"]), process.pid, process))
        first = {}
        for rank, _, process in sorted(found, key=lambda item: item[:2]):
            first.setdefault(rank, process)  # loader workers are forked from a rank later
        return list(first.values())

    def states(self) -> str:
        """What each rank and its loader workers are at, for a job that gets nowhere."""
        lines = []
        for rank, process in enumerate(self.ranks()):
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error, OSError):
                    waits = [
                        (thread / "comm").read_text().strip() + ":" + (thread / "wchan").read_text()
                        for thread in sorted(Path(f"/proc/{one.pid}/task").iterdir())
                    ]
                    lines.append(f"rank {rank}: {one.pid} {one.status()} {sum(one.cpu_times()[:2]):.1f} s {waits}")
        return "\n".join(lines)

    def finish(self, seconds: float = 240) -> dict[str, str]:
        try:
            return self.slurm.wait(self.number, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def ranks_once_there(self, number: int, seconds: float = 120) -> list[psutil.Process]:
        end = time.monotonic() + seconds
        while len(found := self.ranks()) < number:
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)
        return found

    def nodes_once_running(self) -> list[str]:
        self.slurm.wait(self.number, ("RUNNING",))
        return self.nodes()

    def nodes(self) -> list[str]:
        """Of a job that waits for some, none."""
        listed = self.slurm.job(self.number)["NodeList"]
        return [] if listed == "(null)" else self.slurm.run("scontrol", "show", "hostnames", listed).split()

    def leave(self) -> None:
        """Ends it for good, whatever it is at: a job that fails its test must not disturb the next one."""
        self.slurm.run("scancel", self.number)

    def said(self, whole: bool = False) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text if whole else text[-6000:]


def assert_the_same(run: Path, undisturbed: Path, last: int = LAST) -> None:
    whole = undisturbed / "runs" / "tiny"
    assert column(run, "data/digest") == column(whole, "data/digest")
    assert len(column(run, "data/digest")) == last
    assert column(run, "train/loss") == column(whole, "train/loss")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name
    assert (run / "report.html").exists()
