"""Checks what a run will meet before it is started: GPUs and driver, the shared file system, room on disks, memory,
limits, the recipe, the shard set. Exit code 0 when nothing is an error, else 2.

On a login node or a laptop it looks at this machine. As a task of a job it looks at each node, and compares them:

  srun --ntasks-per-node=1 clipdist doctor launch/recipes/skincap.yaml --shared runs/.jobs --links
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipdist.cluster.doctor.findings import Finding
    from clipdist.cluster.doctor.preflight import Health
    from clipdist.config import RunConfig
    from clipdist.world import Allocation

LINKS_FILE = "links.json"
SLACK_SECONDS = 15.0
"""What writing, reading and the start of a process may add to a time-out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="YAML recipe; without, what can be said without")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--processes-per-node", type=int, default=0, metavar="N", help="default: one for each GPU that is there"
    )
    parser.add_argument("--cpu", action="store_true", help="the launch is for CPUs: no GPU is expected")
    parser.add_argument(
        "--shared", type=Path, metavar="DIR", help="folder that all nodes see (in a job of several nodes: runs/.jobs)"
    )
    parser.add_argument("--links", action="store_true", help="also time an all-reduce over all processes")
    parser.add_argument(
        "--wait-seconds", type=float, default=60.0, metavar="S", help="how long to wait for other nodes (60)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from clipdist import world
    from clipdist.cluster.doctor.findings import Finding
    from clipdist.cluster.doctor.preflight import Launch, examine
    from clipdist.errors import UserError

    allocation = world.allocation()
    if allocation and allocation.task:
        raise UserError(
            f"clipdist doctor is one task of each node, found task {allocation.task} of one; start it as: srun "
            f"--ntasks-per-node=1 clipdist doctor …"
        )
    several = bool(allocation and allocation.step and len(allocation.nodes) > 1)
    shared = args.shared or (Path("runs/.jobs") if several else None)
    config, faults = _read(args)
    launch = Launch(args.processes_per_node, gpus=allocation.gpus if allocation else 0, cpu=args.cpu)
    if allocation and several:
        launch = Launch(launch.processes, allocation.nodes, launch.gpus, launch.cpu)
    elif allocation and len(allocation.nodes) > 1:
        faults.append(
            Finding(
                "job",
                "warn",
                f"the job has {len(allocation.nodes)} nodes, and this looks at {socket.gethostname()} alone; start it "
                f"as: srun --ntasks-per-node=1 clipdist doctor …",
            )
        )
    health = examine(config, launch, shared=shared)
    health.findings[:0] = faults
    if allocation and several and shared:
        return _together(args, allocation, shared, health)
    findings = [*health.findings, *([_links_here(args, health)] if args.links else [])]
    return _tell(findings, (), args.json)


def _read(args: argparse.Namespace) -> "tuple[RunConfig | None, list[Finding]]":
    """The recipe; None without one, and when it is wrong: then that is found."""
    from clipdist.cluster.doctor.preflight import SECONDS, Questions
    from clipdist.config import load_config

    if args.recipe is None:
        return None, []
    questions = Questions(SECONDS)
    return questions.ask("recipe", load_config, args.recipe, args.overrides)(), questions.findings


def _tell(findings: "list[Finding]", nodes: tuple[str, ...], as_json: bool) -> int:
    from clipdist.cluster.doctor import findings as told

    text = json.dumps(told.as_json(findings), indent=1, ensure_ascii=False) if as_json else told.table(findings, nodes)
    print(text, flush=True)
    return told.exit_code(findings)


def _links_here(args: argparse.Namespace, health: "Health") -> "Finding":
    from clipdist.cluster.doctor.links import Links, measure_links
    from clipdist.cluster.node import free_port

    folder, host = Path(tempfile.mkdtemp(prefix="clipdist-links-")), (socket.gethostname(),)
    words = (health.launch.processes, "127.0.0.1", free_port(os.getpid()), args.cpu, args.wait_seconds)
    found = measure_links(Links(folder, host, *words))
    if found.level == "ok":  # else it names what the ranks have written there
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _together(args: argparse.Namespace, allocation: "Allocation", shared: Path, health: "Health") -> int:
    """On each node of a job. The first one prints, and its exit code is the verdict; another one fails only when it
    could not tell the first what it found."""
    from clipdist.cluster.doctor import exchange
    from clipdist.cluster.doctor.bounded import Hung, Work
    from clipdist.cluster.doctor.findings import Finding, NodeReport, merge
    from clipdist.errors import UserError

    folder, name = exchange.meeting_folder(shared, allocation), allocation.nodes[allocation.node]
    own = NodeReport(name, health.findings, health.facts, health.file_clock)
    limit = args.wait_seconds + SLACK_SECONDS
    try:
        if allocation.node:
            Work(exchange.deliver, folder, allocation, own, args.wait_seconds).result(limit)
            if args.links:
                Work(_links_of_node, args, allocation, folder, health, True).result(2 * limit + SLACK_SECONDS)
            return 0
        reports = Work(exchange.collect, folder, allocation.nodes, own, args.wait_seconds).result(limit)
        findings = merge(reports, allocation.nodes)
        if args.links:
            complete = len(reports) == len(allocation.nodes)
            work = Work(_links_of_node, args, allocation, folder, health, complete)
            findings.append(work.result(limit + SLACK_SECONDS))
    except (Hung, RuntimeError, UserError) as error:
        findings = [*health.findings, Finding("shared folder", "error", f"{folder}: {error}")]
        print(f"{name} alone, since the nodes could not tell each other what they found:", file=sys.stderr)
    return _tell(findings, allocation.nodes, args.json)


def _links_of_node(
    args: argparse.Namespace, allocation: "Allocation", folder: Path, health: "Health", complete: bool
) -> "Finding":
    """The first node says where to meet, or that the links are not measured, since not all nodes are there."""
    from clipdist.cluster.doctor import exchange
    from clipdist.cluster.doctor.findings import Finding
    from clipdist.cluster.doctor.links import Links, measure_links
    from clipdist.cluster.node import free_port

    lacking = Finding("links", "error", "not measured, since not all nodes have answered; see the line on nodes")
    if allocation.node == 0:
        port = free_port(allocation.number + int(allocation.step)) if complete else 0
        exchange.say(folder, LINKS_FILE, {"port": port})
    else:
        port = (exchange.wait_for(folder, LINKS_FILE, args.wait_seconds + SLACK_SECONDS) or {"port": 0})["port"]
    if not port:
        return lacking
    words = (health.launch.processes, allocation.nodes[0], port, args.cpu, args.wait_seconds)
    return measure_links(Links(folder / "links", allocation.nodes, *words), allocation.node)
