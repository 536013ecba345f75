"""What the doctor makes of several nodes: the exchange of their reports, what must agree, and the table."""

import fcntl
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clipdist import world
from clipdist.cluster.doctor import exchange
from clipdist.cluster.doctor.bounded import Work
from clipdist.cluster.doctor.findings import Finding, NodeReport, exit_code, merge, table
from clipdist.errors import UserError
from clipdist.world import Allocation

FACTS = {"clipdist": "0.1.0", "torch": "2.9.0", "NCCL": "2.27.3", "Python": "3.12.1", "NVIDIA driver": "580.65"}
NODES = ("n1", "n2", "n3")


def report(node: str, **changes: object) -> NodeReport:
    given = {
        "findings": [Finding("memory", "ok", f"{node[1:]} GiB free")],
        "facts": FACTS,
        "file_clock": 0.0,
        **changes,
    }
    return NodeReport(node, **given)  # type: ignore[arg-type]


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_nodes_that_are_alike() -> None:
    found = merge([report(node) for node in NODES], NODES)
    assert {finding.level for finding in found} == {"ok"}
    assert exit_code(found) == 0
    assert named(found, "torch everywhere").says == "2.9.0"
    assert named(found, "memory") == Finding("memory", "ok", "1 GiB free (on n1)", NODES)
    assert "all 3 nodes: 1 GiB free (on n1)" in table(found, NODES)
    assert table(found, NODES).endswith("checks, nothing wrong")


def test_each_line_names_its_nodes_and_the_worst_comes_last() -> None:
    bad, odd = Finding("shard set", "error", "it is gone"), Finding("memory", "warn", "too little")
    found = merge([report("n1"), report("n2", findings=[odd, bad]), report("n3", findings=[bad])], NODES)
    assert named(found, "shard set").nodes == ("n2", "n3")
    lines = table(found, NODES).splitlines()
    assert lines[-3].split() == ["error", "shard", "set", "n2,", "n3:", "it", "is", "gone"]
    assert lines[-4].split()[:3] == ["warn", "memory", "n2:"]
    assert lines[-1].endswith("1 error, 1 warning")
    assert exit_code(found) == 2


def test_who_has_not_answered_is_named() -> None:
    found = named(merge([report("n1"), report("n3")], NODES), "nodes")
    assert (found.level, found.nodes) == ("error", ("n2",))
    assert found.says.startswith("n2: no answer, expected one of each of 3 nodes")


@pytest.mark.parametrize(("name", "level"), [("torch", "error"), ("NCCL", "error"), ("NVIDIA driver", "warn")])
def test_versions_that_differ(name: str, level: str) -> None:
    found = named(merge([report("n1"), report("n2", facts={**FACTS, name: "1.0"})], NODES[:2]), f"{name} everywhere")
    assert found.level == level
    assert found.says.startswith(f"differs: {FACTS[name]} on n1; 1.0 on n2; ")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # The file system stamps with its server's clock: what n2 takes for 30 s behind is n2 being 30 s ahead.
        ({"file_clock": -30.0}, "n2 is 30 s ahead of n1"),
        ({"file_clock": 30.0}, "n2 is 30 s behind n1"),
        # It stamps with each node's own: only the order of events tells.
        ({"clock_bounds": (25.0, 40.0)}, "n2 is 25 s ahead of n1"),
        ({"clock_bounds": (-40.0, -25.0)}, "n2 is 25 s behind n1"),
        ({"clock_bounds": (-9.0, 4.0)}, ""),
        ({"file_clock": -0.4}, ""),
    ],
)
def test_clocks_of_two_nodes(changes: dict[str, object], told: str) -> None:
    found = named(merge([report("n1"), report("n2", **changes)], NODES[:2]), "clocks")
    assert (found.level, told in found.says) == ("warn" if told else "ok", True)


def test_clocks_that_nobody_measured() -> None:
    reports = [report(node, file_clock=None) for node in NODES[:2]]
    assert named(merge(reports, NODES[:2]), "clocks").level == "warn"


def test_a_report_as_text() -> None:
    told = report("n2", findings=[Finding("a", "warn", "ß", ("n2",))], clock_bounds=(-1.0, 2.0))
    assert NodeReport.from_json(told.to_json()) == told


def test_a_step_of_fewer_nodes_than_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol` is one that takes commas apart."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho $3 | tr , ' '\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "12", "JOB_NODELIST": "n1,n2,n3", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("STEP_NODELIST", "STEP_ID", "NODEID", "LOCALID", "GPUS_ON_NODE"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert world.allocation() == Allocation("12", 2, NODES, 0, 0), "the job's script"
    for name, value in {"STEP_NODELIST": "n2,n3", "STEP_ID": "4", "NODEID": "1", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert world.allocation() == Allocation("12", 2, ("n2", "n3"), 1, 0, step="4", task=1)


def allocation(node: int, restarts: int = 0) -> Allocation:
    return Allocation("12", restarts, NODES[:2], node, 0, step="3")


def late(own: NodeReport, folder: Path, clock_ahead: float) -> None:
    """The second node, whose clock is ahead."""
    truth = time.time
    time.time = lambda: truth() + clock_ahead  # in a child of its own
    exchange.deliver(folder, allocation(1), own, 20)


def test_two_nodes_exchange_what_they_found(tmp_path: Path) -> None:
    folder = exchange.meeting_folder(tmp_path / "jobs", allocation(0))
    assert folder != exchange.meeting_folder(tmp_path / "jobs", replace(allocation(0), step="4"))
    assert folder != exchange.meeting_folder(tmp_path / "jobs", allocation(0, restarts=1))
    other = Work(late, report("n2"), folder, 100.0)
    found = Work(exchange.collect, folder, NODES[:2], report("n1"), 20.0).result(30)
    other.result(30)
    assert [one.node for one in found] == ["n1", "n2"]
    assert named(found[1].findings, "locks between nodes").level == "ok"
    clocks = named(merge(found, NODES[:2]), "clocks")
    assert (clocks.level, clocks.nodes) == ("warn", ("n2",))
    assert 80 <= float(clocks.says.split()[2]) <= 100, "less what it waited"


def test_what_an_earlier_job_left_is_no_answer(tmp_path: Path) -> None:
    told = {"word": "of another", "report": report("n2").to_json(), "written": time.time()}
    (tmp_path / "node-00001.json").write_text(json.dumps(told))
    found = exchange.collect(tmp_path, NODES[:2], report("n1"), 0.5)
    assert [one.node for one in found] == ["n1"]


def test_the_first_node_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the first node, n1, has not begun within 0 s"):
        exchange.deliver(tmp_path / "jobs", allocation(1), report("n2"), 0.3)


def test_locks_that_do_not_reach_from_node_to_node(tmp_path: Path) -> None:
    (tmp_path / exchange.HELD).touch()
    free = exchange.check_lock("", tmp_path, "n1")
    assert (free.level, "got the lock that n1 holds" in free.says) == ("error", True)
    none = exchange.check_lock("No locks available", tmp_path, "n1")
    assert (none.level, "cannot be tried (No locks available)" in none.says) == ("error", True)
    with open(tmp_path / exchange.HELD, "w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert Work(exchange.check_lock, "", tmp_path, "n1").result(20).level == "ok"
