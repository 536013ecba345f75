"""The commands of docs/slurm.md do what the page says, one after another in a checkout of their own."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cluster.jobs import IN_BATCH
from tests.cluster.slurm import LocalSlurm
from tests.distributed.test_training import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]
PAGE = ROOT / "docs" / "slurm.md"
CPU = "--processes-per-node 1 --accelerate-config launch/accelerate/cpu.yaml data.set=data/skincap"


def commands() -> list[str]:
    """Lines of the page's blocks of shell, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


class Reader:
    """Somebody who types them."""

    def __init__(self, slurm: LocalSlurm, folder: Path, raw: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.environment = {**slurm.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
        self.environment["IN_BATCH"] = str(IN_BATCH)
        self.environment["PATH"] = f"{folder}/.venv/bin:{self.environment['PATH']}"
        self.raw = str(raw)

    def type(self, line: str) -> str:
        """What it prints. A job that it submits is waited for."""
        line = line.replace("/path/to/SkinCAP", self.raw)
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            self.environment[name] = value
            return ""
        done = subprocess.run(
            shlex.split(line), capture_output=True, text=True, timeout=300, cwd=self.folder, env=self.environment
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if "launch/sweep.py" in line:
            end = time.monotonic() + 600
            while self.slurm.run("squeue", "--noheader"):
                assert time.monotonic() < end, self.slurm.logs()
                time.sleep(0.5)
        elif told := re.search(r"(?:Submitted batch job|^job) (\d+)", done.stdout):
            self.slurm.wait(told[1], seconds=400)
        return done.stdout


@pytest.fixture
def reader(slurm: LocalSlurm, tmp_path: Path, raw: Path, cluster_recipe: Callable[..., Path]) -> Reader:
    folder = tmp_path / "clipdist"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, timeout=60)
    os.symlink(ROOT / ".venv", folder / ".venv")
    # Without GPUs, and in seconds: the same recipe's name over small towers.
    tree = yaml.safe_load(cluster_recipe(tmp_path).read_text(encoding="utf-8"))
    tree["data"]["set"], tree["runs"] = "data/skincap", "runs"
    (folder / "launch" / "recipes" / "skincap.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return Reader(slurm, folder, raw)


def test_every_command_works(reader: Reader) -> None:
    typed = []
    for line in commands():
        typed.append(line)
        if line.startswith("make "):
            continue  # the environment is there; tests of the README make one
        if line.startswith("clipdist board"):
            continue  # it stays until Ctrl-C; tests/unit/test_board.py opens it
        if line.startswith("python launch/submit.py") and "--dry-run" not in line:
            line += f" {CPU} --no-preflight"
        if line.startswith("python launch/sweep.py") and "--show" not in line:
            line += f" {CPU} --no-preflight"
        if "slurm/pack.sh" in line:
            line = line.replace("--out data/skincap", "--out data/packed-by-a-job")
        said = reader.type(line)
        if line.startswith("cp slurm/site.example.sh"):
            with open(reader.folder / "slurm" / "site.sh", "a", encoding="utf-8") as file:
                file.write("export ACCELERATE_CONFIG=launch/accelerate/cpu.yaml PROCESSES_PER_NODE=1\n")
        if "slurm/train_skincap.sh" in line:
            assert (reader.folder / "runs" / "skincap" / "report.html").exists()
        if "--dry-run" in line:
            assert "#SBATCH --gpus-per-node=4" in said
        if line.startswith("clipdist runs"):
            assert re.search(r"^skincap +finished", said, re.MULTILINE)
            assert re.search(r"^submitted +finished", said, re.MULTILINE)
    assert (reader.folder / "data" / "packed-by-a-job" / "manifest.json").exists()
    words = " ".join(typed)
    for verb in ("sbatch", "launch/submit.py", "launch/sweep.py", "clipdist doctor", "clipdist logs", "clipdist stop"):
        assert verb in words, f"the page no longer shows {verb}"
