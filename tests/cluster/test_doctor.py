"""`clipdist doctor` as a task on each of two nodes of a real SLURM."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import LocalSlurm
from tests.conftest import write_recipe
from tests.distributed.test_training import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
DOCTOR = [sys.executable, "-m", "clipdist.cli", "doctor"]


class Doctors:
    """Jobs on two nodes in a folder of their own, which end COMPLETED whatever the doctor says."""

    def __init__(self, slurm: LocalSlurm, folder: Path, shapes: Path) -> None:
        self.slurm, self.folder, self.recipe = slurm, folder, write_recipe(folder, shapes)

    def words(self, *options: str) -> str:
        return shlex.join([*DOCTOR, str(self.recipe), "--cpu", "--shared", str(self.folder / "jobs"), *options])

    def run(self, lines: str) -> str:
        """What a job of these lines of bash prints."""
        script, log = self.folder / "job.sh", self.folder / "log"
        script.write_text(f"#!/bin/bash\n{lines}\ntrue\n", encoding="utf-8")
        number = self.slurm.submit("--nodes=2", f"--output={log}", str(script), cwd=ROOT, OMP_NUM_THREADS="1")
        try:
            self.slurm.wait(number)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text(errors='replace')}") from None
        return log.read_text(encoding="utf-8")


@pytest.fixture
def doctors(slurm: LocalSlurm, tmp_path: Path, shapes: Path) -> Doctors:
    return Doctors(slurm, tmp_path, shapes)


def by_name(text: str) -> dict[str, Any]:
    return {finding["name"]: finding for finding in json.loads(text)["findings"]}


def test_two_nodes_agree_and_their_links_are_timed(doctors: Doctors) -> None:
    """The second doctor of the job does not read what the first one left."""
    words = doctors.words("--processes-per-node", "2", "--links")
    said = doctors.run(f"srun --ntasks-per-node=1 {words} --json; echo code $?; srun --ntasks-per-node=1 {words}")
    first, _, second = said.partition("code 0\n")
    found = by_name(first)
    assert found["nodes"]["says"] == "all 2 have answered"
    assert found["links"]["says"].startswith("all-reduce of 64 MiB over 4 processes on 2 nodes: ")
    assert found["links"]["says"].endswith(" GB/s (bus bandwidth, gloo)")
    assert "is refused here" in found["locks between nodes"]["says"]
    assert len(found["locks between nodes"]["nodes"]) == 1, "the first node holds it"
    assert found["clocks"]["level"] == found["torch everywhere"]["level"] == "ok"
    assert found["recipe"]["says"] == "tiny: 24 pairs a step, 6 a process"
    assert found["recipe"]["nodes"] == ["n1", "n2"]
    assert found["host name"]["level"] == "warn", "the nodes of this SLURM are one machine"
    assert {finding["level"] for finding in found.values()} == {"ok", "warn"}
    assert "all 2 nodes: nobody trains" in second
    assert len(list((doctors.folder / "jobs").glob("doctor-*"))) == 2


def test_a_node_that_does_not_answer_is_named(doctors: Doctors) -> None:
    words = doctors.words("--wait-seconds", "5", "--links", "--json")
    lines = f"srun --ntasks-per-node=1 bash -c {shlex.quote(f'[[ $SLURM_NODEID == 1 ]] || exec {words}')}"
    said = doctors.run(f"{lines} 2>{doctors.folder / 'err'}; echo code $?")
    text, _, code = said.rpartition("code ")
    found = by_name(text)
    assert code == "2\n"
    assert (found["nodes"]["level"], found["nodes"]["nodes"]) == ("error", ["n2"])
    assert "n2: no answer, expected one of each of 2 nodes" in found["nodes"]["says"]
    assert "not all nodes have answered" in found["links"]["says"]


def test_in_the_jobs_own_script_it_looks_at_that_node_alone(doctors: Doctors) -> None:
    text, _, code = doctors.run(f"{doctors.words('--json')}; echo code $?").rpartition("code ")
    found = by_name(text)
    assert code == "0\n"
    assert found["job"]["level"] == "warn"
    assert "the job has 2 nodes, and this looks at n1 alone; start it as: srun" in found["job"]["says"]
    assert "nodes" not in found


def test_several_tasks_on_a_node_are_refused(doctors: Doctors) -> None:
    said = doctors.run(f"srun --overcommit --nodes=1 --ntasks=2 {doctors.words()}; echo code $?")
    assert "clipdist doctor is one task of each node" in said
    assert said.endswith("code 2\n")
