"""The disk of a job's run refuses for a while: training goes on, and what belongs there is written later."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.jobs import Job, assert_the_same
from tests.cluster.slurm import LocalSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


class Disk:
    """A small file system of its own, mounted at a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))

    def fill(self) -> None:
        with open(self.folder / "filler", "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(b"x" * size) == size:
                        pass
                except OSError:
                    continue

    def empty(self) -> None:
        (self.folder / "filler").unlink()

    def close(self) -> None:
        """Whoever has files open keeps these; whoever opens one finds it read-only, as after an error of the disk."""
        # Aside first: nodes see what is mounted, not that it is made read-only afterwards.
        aside = self.folder.with_name("read-only")
        aside.mkdir()
        mount("--bind", str(self.folder), str(aside))
        mount("-o", "remount,bind,ro", str(aside))
        mount("--bind", str(aside), str(self.folder))

    def open(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@pytest.fixture
def disk(slurm: LocalSlurm, tmp_path: Path) -> Iterator[Disk]:
    folder = slurm.disks / tmp_path.name
    folder.mkdir()
    yield Disk(folder / "runs")
    for mounted in (folder / "read-only", folder / "runs"):
        while os.path.ismount(mounted):
            subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.mark.parametrize(
    ("spoil", "mend", "reason"),
    [(Disk.fill, Disk.empty, "No space left on device"), (Disk.close, Disk.open, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_the_disk_refuses_for_a_while(
    spoil: Callable[[Disk], None],
    mend: Callable[[Disk], None],
    reason: str,
    disk: Disk,
    slurm: LocalSlurm,
    cluster_recipe: Callable[..., Path],
    raw: Path,
    undisturbed: Path,
) -> None:
    folder = disk.folder.parent
    (folder / "data").symlink_to(undisturbed / "data")
    job = Job(slurm, folder, cluster_recipe(folder), raw)
    job.reach(6)
    spoil(disk)
    end = time.monotonic() + 60
    while f"cannot be written ({reason}); trying again" not in job.said(whole=True):
        assert time.monotonic() < end, job.said()
        time.sleep(0.1)
    time.sleep(15)
    ranks = len(job.ranks())
    mend(disk)
    assert ranks == 4, "nobody gave up meanwhile"
    assert job.finish()["Restarts"] == "0"
    assert "start 1 in this allocation" not in job.said(whole=True)
    assert "is written again, after" in job.said(whole=True)
    assert_the_same(job.run, undisturbed)
