"""What the doctor's checks find, in words; and what several nodes found, as one table."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Level = Literal["ok", "warn", "error"]
LEVELS: tuple[Level, ...] = ("error", "warn", "ok")
MUST_AGREE: dict[str, tuple[Level, str]] = {
    "clipdist": ("error", "start all nodes from one environment on the shared file system"),
    "torch": ("error", "start all nodes from one environment on the shared file system"),
    "NCCL": ("error", "ranks of different versions do not connect; start all nodes from one environment"),
    "Python": ("warn", "start all nodes from one environment on the shared file system"),
    "NVIDIA driver": ("warn", "tell the administrators, or exclude the odd node with sbatch --exclude"),
    "GPUs": ("warn", "each step waits for the slowest; ask for one kind with --constraint or --gpus-per-node=KIND:N"),
}
"""What is compared between nodes: how bad a difference is, and what to do."""
CLOCK_SECONDS = 1.0
"""Clocks that differ by more are told of."""
WIDTH = 118


@dataclass(frozen=True)
class Finding:
    """`says` is a sentence: what was found, and, unless all is well, what was expected and what to do."""

    name: str
    level: Level
    says: str
    nodes: tuple[str, ...] = ()
    """Who found it; empty where there is one machine alone."""


def figure(value: float) -> str:
    """A measured number as people read it: 0.83, 4.1, 47, 1,200."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


@dataclass(frozen=True)
class NodeReport:
    """What one node of a job found."""

    node: str
    findings: list[Finding]
    facts: dict[str, str] = field(default_factory=dict)
    """What the keys of `MUST_AGREE` are there; empty values are not compared."""
    file_clock: float | None = None
    """Seconds by which the shared file system's clock is ahead of the node's; None: not measured."""
    clock_bounds: tuple[float, float] | None = None
    """Between which seconds the node's clock is ahead of the first node's, by the order of what both have seen."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "NodeReport":
        found: dict[str, Any] = json.loads(text)
        bounds = found["clock_bounds"]
        findings = [Finding(**{**one, "nodes": tuple(one["nodes"])}) for one in found.pop("findings")]
        return NodeReport(**{**found, "findings": findings, "clock_bounds": tuple(bounds) if bounds else None})


def merge(reports: Sequence[NodeReport], nodes: Sequence[str]) -> list[Finding]:
    """One list of the reports of several nodes: what no two nodes may differ in, then each node's own findings.

    `nodes` are all that were to report, in order, the first node first.
    """
    answered = {report.node: report for report in reports}
    silent = [node for node in nodes if node not in answered]
    merged = [_answers(len(nodes), silent)]
    ordered = [answered[node] for node in nodes if node in answered]
    if len(nodes) > 1:
        merged += [
            _agreement(name, ordered) for name in MUST_AGREE if any(report.facts.get(name) for report in ordered)
        ]
        merged.append(_clocks(ordered))
    grouped: dict[tuple[str, Level, str], list[Finding]] = {}
    for report in ordered:
        for finding in report.findings:
            # What is well differs in figures alone: one line for all nodes.
            key = (finding.name, finding.level, "" if finding.level == "ok" else finding.says)
            grouped.setdefault(key, []).append(replace(finding, nodes=(report.node,)))
    for group in grouped.values():
        names = tuple(dict.fromkeys(finding.nodes[0] for finding in group))
        several = len({finding.says for finding in group}) > 1
        merged.append(replace(group[0], nodes=names, says=group[0].says + (f" (on {names[0]})" if several else "")))
    return merged


def _answers(expected: int, silent: Sequence[str]) -> Finding:
    if not silent:
        return Finding("nodes", "ok", f"all {expected} have answered")
    return Finding(
        "nodes",
        "error",
        f"{', '.join(silent)}: no answer, expected one of each of {expected} nodes; see their output, whether they are "
        f"up (sinfo -N -l), and whether the folder of --shared is the same there",
        tuple(silent),
    )


def _agreement(name: str, reports: Sequence[NodeReport]) -> Finding:
    having: dict[str, list[str]] = {}
    for report in reports:
        having.setdefault(report.facts.get(name, ""), []).append(report.node)
    if len(having) == 1:
        return Finding(f"{name} everywhere", "ok", next(iter(having)))
    level, advice = MUST_AGREE[name]
    found = "; ".join(f"{value or 'none'} on {', '.join(nodes)}" for value, nodes in having.items())
    return Finding(f"{name} everywhere", level, f"differs: {found}; {advice}")


def _clocks(reports: Sequence[NodeReport]) -> Finding:
    """Clocks compared with the first node's: through the clock of the file system, where that is a server's own, and by
    what must have happened before what."""
    ahead = {report.node: _ahead(report, reports[0]) for report in reports[1:]}
    known = {node: seconds for node, seconds in ahead.items() if seconds is not None}
    if not known:
        return Finding("clocks", "warn", "not compared: no other node has measured its own against the shared folder")
    wrong = {node: seconds for node, seconds in known.items() if abs(seconds) > CLOCK_SECONDS}
    if not wrong:
        largest = max(map(abs, known.values()))
        return Finding("clocks", "ok", f"agree, as far as files tell, to {figure(max(largest, 0.05))} s")
    told = ", ".join(
        f"{node} is {figure(abs(seconds))} s {'ahead of' if seconds > 0 else 'behind'} {reports[0].node}"
        for node, seconds in wrong.items()
    )
    return Finding(
        "clocks",
        "warn",
        f"{told}; expected at most {CLOCK_SECONDS:g} s, since logs and the ages of files mislead; ask the "
        f"administrators to synchronise them (chronyc tracking)",
        tuple(wrong),
    )


def _ahead(report: NodeReport, first: NodeReport) -> float | None:
    """Seconds that are certain by which a node's clock is ahead of the first node's."""
    found = []
    if report.file_clock is not None and first.file_clock is not None:
        found.append(first.file_clock - report.file_clock)
    if report.clock_bounds is not None:
        low, high = report.clock_bounds
        found.append(max(low, 0.0) + min(high, 0.0))
    return max(found, key=abs, default=None)


def exit_code(findings: Sequence[Finding]) -> int:
    """0, or 2 where one is an error."""
    return 2 if any(finding.level == "error" for finding in findings) else 0


def table(findings: Sequence[Finding], nodes: Sequence[str] = ()) -> str:
    """Lines for people, the worst last, where the eye rests; `nodes` are all that there are."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for level in LEVELS[::-1]:
        for finding in findings:
            if finding.level == level:
                start = f"{level:5}  {finding.name:{width}}  "
                text = f"{_who(finding.nodes, nodes)}{finding.says}"
                lines.append(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))
    return "\n".join([*lines, "", summary(findings)])


def _who(found_by: Sequence[str], nodes: Sequence[str]) -> str:
    if not found_by or len(nodes) < 2:
        return ""
    return f"all {len(nodes)} nodes: " if len(found_by) == len(nodes) else f"{', '.join(found_by)}: "


def summary(findings: Sequence[Finding]) -> str:
    levels = Counter(finding.level for finding in findings)
    errors, warnings = levels["error"], levels["warn"]
    if not errors and not warnings:
        return f"{len(findings)} checks, nothing wrong"
    words = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((errors, "error"), (warnings, "warning")) if n]
    return f"{len(findings)} checks: {', '.join(words)}"


def as_json(findings: Sequence[Finding]) -> Mapping[str, Any]:
    """For machines."""
    return {"exit_code": exit_code(findings), "findings": [asdict(finding) for finding in findings]}
