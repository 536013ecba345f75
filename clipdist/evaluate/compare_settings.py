"""What runs were made with: configuration, machines and data as flat columns of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NOTHING = "–"
# The run's own name and place always differ, and say nothing.
_OWN = ("name", "runs")
_MACHINE = ("world_size", "hosts", "gpus", "cpu", "platform", "python", "versions", "commit", "parameters")


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf; lists are leaves."""
    if isinstance(tree, Mapping) and tree:
        for name, below in tree.items():
            yield from flat(below, f"{path}.{name}" if path else str(name))
    elif path:
        yield path, NOTHING if tree is None else str(tree)


def differing(columns: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key -> the value in each column, of the keys whose values differ."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = {key: [column.get(key, NOTHING) for column in columns] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's keys, but for the run's own name and place."""
    return dict(flat({name: value for name, value in config.items() if name not in _OWN}))


def machine_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """World size, hosts, GPUs, versions, commit, and the engine of the last start."""
    found = dict(flat({name: environment[name] for name in _MACHINE if name in environment}))
    starts = environment.get("starts") or []
    if starts and isinstance(starts[-1], Mapping) and "engine" in starts[-1]:
        found["engine"] = str(starts[-1]["engine"])
    return found


def data_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """Each shard set's place, digest and splits."""
    found: dict[str, str] = {}
    for number, one in enumerate(environment.get("shard_sets") or []):
        name = f"set {number + 1}"
        found |= {f"{name}, {key}": str(one[key]) for key in ("path", "digest") if key in one}
        found |= {f"{name}, split {split}": str(count) for split, count in (one.get("splits") or {}).items()}
    return found


def common_order(records: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Whether each run has seen the samples of the first in their order, by `data/digest`; empty where none tells."""
    columns = [{one["step"]: one["data/digest"] for one in some if "data/digest" in one} for some in records]
    if not any(columns):
        return {}
    told = [f"to step {max(columns[0]):,}" if columns[0] else NOTHING]
    for column in columns[1:]:
        common = columns[0].keys() & column.keys()
        if not common:
            told.append("no step in common")
            continue
        last = max(common)
        same = column[last] == columns[0][last]
        told.append(f"the same samples to step {last:,}" if same else f"others, by step {last:,}")
    return {"order of samples": told}
