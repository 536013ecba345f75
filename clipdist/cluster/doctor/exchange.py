"""How the nodes of a job tell each other what they found: by files in a folder that all see.

The first node holds a lock there and says so; each other one tries the lock, and leaves its report; the first node
collects them. So the exchange itself shows whether locks and files reach from node to node. It may hang with the file
system: the command calls it in a child process (bounded.py).
"""

import fcntl
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipdist.cluster.doctor.findings import Finding, NodeReport
from clipdist.cluster.doctor.shared_folder import GRANTED, REFUSED, try_lock
from clipdist.cluster.meeting import names
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.world import Allocation

POLL_SECONDS = 0.1
BEGUN, HELD = "begun.json", "held"


def meeting_folder(shared: Path, allocation: Allocation) -> Path:
    """Of this step alone: a second doctor in the same job, and one after a requeue, meet elsewhere."""
    return shared / f"doctor-{allocation.job}-{allocation.restarts}-{allocation.step}"


def _report(node: int) -> str:
    return f"node-{node:05d}.json"


def collect(folder: Path, nodes: Sequence[str], own: NodeReport, seconds: float) -> list[NodeReport]:
    """The first node's part: its own report and those of all nodes that answer within `seconds`, each with what was
    seen of its clock and its try of the lock.

    Raises `UserError` when the folder cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / HELD, "w", encoding="utf-8") as held:
            fault = ""
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                fault = str(error.strerror)
            began, word = time.time(), secrets.token_hex(8)
            write_atomically(folder / BEGUN, json.dumps({"word": word, "lock": fault}).encode())
            reports = {0: own}
            end = time.monotonic() + seconds
            while len(reports) < len(nodes) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
                for number in _arrived(folder, len(nodes)) - reports.keys():
                    found = json.loads((folder / _report(number)).read_text(encoding="utf-8"))
                    if found["word"] == word:
                        # It was written after this node had begun, and before now.
                        bounds = (found["written"] - time.time(), found["written"] - began)
                        reports[number] = replace(NodeReport.from_json(found["report"]), clock_bounds=bounds)
    return [reports[number] for number in sorted(reports)]


def _arrived(folder: Path, nodes: int) -> set[int]:
    there = names(folder)
    return {number for number in range(1, nodes) if _report(number) in there}


def deliver(folder: Path, allocation: Allocation, own: NodeReport, seconds: float) -> None:
    """Another node's part: waits until the first node has begun, tries its lock, and leaves the report.

    Raises `UserError` when that does not begin within `seconds`, or the report cannot be written.
    """
    begun = wait_for(folder, BEGUN, seconds)
    if begun is None:
        raise UserError(
            f"{folder}: the first node, {allocation.nodes[0]}, has not begun within {seconds:.0f} s; see its output, "
            f"and whether {folder.parent} is a folder that all nodes share"
        )
    own = replace(own, findings=[*own.findings, check_lock(begun["lock"], folder, allocation.nodes[0])])
    with disk_errors(folder):
        told = {"word": begun["word"], "report": own.to_json(), "written": time.time()}
        write_atomically(folder / _report(allocation.node), json.dumps(told).encode())


def check_lock(fault: str, folder: Path, first: str) -> Finding:
    """Tries the lock that the first node holds; `fault`: why it does not."""
    tried = fault or try_lock(folder / HELD)
    if tried == REFUSED:
        return Finding("locks between nodes", "ok", f"one that {first} holds is refused here")
    what = f"got the lock that {first} holds" if tried == GRANTED else f"a lock of {folder} cannot be tried ({tried})"
    return Finding(
        "locks between nodes",
        "error",
        f"{what}, expected to be refused; two jobs could train one run and spoil it: have the file system mounted with "
        f"locks that reach from node to node (Lustre: -o flock; NFS: no nolock or local_lock)",
    )


def say(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Leaves something for the other nodes; `UserError` when the folder cannot be written."""
    with disk_errors(folder):
        write_atomically(folder / name, json.dumps(content).encode())


def wait_for(folder: Path, name: str, seconds: float) -> dict[str, Any] | None:
    """What another node has left under this name; None when it has not within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if name in names(folder):
            found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            return found
        time.sleep(POLL_SECONDS)
    return None
