"""Two runs or more beside each other: scores and what they differ by, query by query; settings, machines and data.

Differences are those of the same queries: both models' outcomes are resampled together, by the units that the
evaluations resampled, so what makes a query hard for both counts in neither's favour.

Suffixes of names: N images, Q queries, U units, R resamples.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clipdist.errors import UserError
from clipdist.evaluate.classification import auroc_of, balanced_accuracy_of, mean_of_statistics
from clipdist.evaluate.compare_settings import common_order, data_of, differing, machine_of, settings_of
from clipdist.evaluate.estimates import (
    Estimate,
    Statistic,
    percentiles,
    ratio_of,
    resampled,
    unit_name,
    unit_numbers,
)
from clipdist.evaluate.outcomes import CLASS_PARTS, DIRECTIONS, Outcomes
from clipdist.evaluate.subgroups import FEWEST_UNITS
from clipdist.train.records import METRICS, read_records

# What must be equal for two evaluations to measure the same thing, and what it is called.
SAME = {"split": "split", "groups": "groups", "unit": "unit"}
# Parts of an evaluation, and what makes two of them the same measurement.
SETTINGS: dict[str, tuple[str, ...]] = {
    "in_batch": ("batch", "batches"),
    "pool": ("pool", "repeats"),
    "zero_shot": ("field", "classes", "prompts", "templates"),
    "classification": ("field", "classes"),
    "calibration": ("fitted_on",),
    "probe": ("fields", "classes", "fitted_on", "features"),
}
_DETAILS = ("classes", "subgroups", "confusion", "cosine_histogram", "labels", "leaks", "outcomes", "reliability")


@dataclass
class Run:
    """What the folder of a run holds, as far as it is there; `evaluations` by the names of their files."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def outcomes(self, stem: str) -> Outcomes:
        """Raises `UserError` where there are none that belong to this evaluation."""
        about = self.evaluations[stem].get("outcomes")
        if "query_candidates" in self.evaluations[stem]:
            raise UserError(f"{self.name}: of queries against labelled candidates, single outcomes are not kept")
        if not about:
            raise UserError(f"{self.name}: made before outcomes of single queries were kept; run clipdist eval again")
        return Outcomes.load(self._evaluation_folder / str(about["file"]), str(about["xxh3_64"]))

    @property
    def _evaluation_folder(self) -> Path:
        inner = self.folder / "evaluation"
        return inner if inner.is_dir() else self.folder


@dataclass(frozen=True)
class Difference:
    """How much higher `run` scores than the reference. `p` is two-sided, None where units are too few to tell;
    `adjusted` is Holm's, over all that are tested."""

    run: str
    evaluation: str
    metric: str
    estimate: Estimate
    p: float | None
    adjusted: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "estimate": self.estimate.to_dict()}


@dataclass(frozen=True)
class Measurement:
    """An evaluation of the reference, and those of the other runs that measured the same: metric -> run -> score."""

    name: str
    about: str
    scores: dict[str, dict[str, Estimate]]
    differences: dict[tuple[str, str], Difference]  # (metric, run)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """`refused`: (evaluation, run, why) of what is not comparable. The first run is the reference."""

    runs: tuple[Run, ...]
    measurements: tuple[Measurement, ...]
    refused: tuple[tuple[str, str, str], ...]
    settings: dict[str, list[str]]
    environment: dict[str, list[str]]
    data: dict[str, list[str]]
    tested: int
    bootstrap: int

    def to_dict(self) -> dict[str, Any]:
        measured = [
            {
                "name": one.name,
                "about": one.about,
                "scores": {m: {run: e.to_dict() for run, e in row.items()} for m, row in one.scores.items()},
                "differences": [difference.to_dict() for difference in one.differences.values()],
                "notes": list(one.notes),
            }
            for one in self.measurements
        ]
        return {
            "runs": {run.name: str(run.folder) for run in self.runs},
            "evaluations": measured,
            "not_comparable": [{"evaluation": e, "run": run, "why": why} for e, run, why in self.refused],
            "comparisons": self.tested,
            "bootstrap": self.bootstrap,
            "settings": self.settings,
            "environment": self.environment,
            "data": self.data,
        }


def read_run(folder: Path) -> Run:
    """Raises `UserError` where the folder is none of a run or of evaluations, or a file in it is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of a run, such as runs/phantom")
    run = Run(folder.resolve().name, folder)
    try:
        if (folder / "config.yaml").exists():
            run.config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        if (folder / "environment.json").exists():
            run.environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        run.records = read_records(folder / METRICS)[0]
        for path in sorted(run._evaluation_folder.glob("*.json")):
            body = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(body, dict) and ("data_digest" in body or "query_candidates" in body):
                run.evaluations[path.stem] = body
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: a file of this run cannot be read ({str(error).splitlines()[0]})") from None
    for name, found in (("config.yaml", run.config), ("environment.json", run.environment)):
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise UserError(f"{folder / name}: found a {kind}, expected names with values; restore or remove the file")
    if not (run.config or run.evaluations):
        raise UserError(f"{folder}: neither config.yaml nor an evaluation in it; expected the folder of a run")
    return run


def compare_runs(runs: Sequence[Run], *, bootstrap: int = 10_000, seed: int = 0) -> Comparison:
    """Each run beside the first. Raises `UserError` for fewer than two, or two of the same folder.

    Two evaluations are compared when they measured the same: the same samples of the same split (by the shards'
    checksums), the same groups and the same units. Everything else is named with the reason.
    """
    if len(runs) < 2 or len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError(f"found {len(runs)} runs; expected two or more, each once")
    runs = _distinct_names(runs)
    reference, others = runs[0], runs[1:]
    refused: list[tuple[str, str, str]] = []
    measurements = []
    matched: dict[str, set[str]] = {run.name: set() for run in others}
    for stem, body in reference.evaluations.items():
        same: list[tuple[Run, str]] = []
        for run in others:
            found = _counterpart(stem, body, run)
            if found is None:
                refused.append((stem, run.name, f"{run.name} has no evaluation of it"))
                continue
            matched[run.name].add(found)
            why = why_not(body, run.evaluations[found])
            if why:
                refused.append((stem, run.name, why))
            else:
                same.append((run, found))
                parts = _other_parts(body, run.evaluations[found])
                refused += [(f"{stem}, {part}", run.name, "measured with other settings") for part in parts]
        if same:
            measurements.append(_measurement(reference, stem, same, bootstrap, seed))
    for run in others:
        left = [stem for stem in run.evaluations if stem not in matched[run.name]]
        refused += [(stem, run.name, f"{reference.name} has no evaluation of it") for stem in left]
    measurements = _adjusted(measurements)
    tested = sum(one.p is not None for many in measurements for one in many.differences.values())
    return Comparison(
        tuple(runs),
        tuple(measurements),
        tuple(refused),
        differing([settings_of(run.config) for run in runs]),
        differing([machine_of(run.environment) for run in runs]),
        differing([data_of(run.environment) for run in runs]) | common_order([run.records for run in runs]),
        tested,
        bootstrap,
    )


def _distinct_names(runs: Sequence[Run]) -> list[Run]:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        for run in runs:
            run.name = str(run.folder)
    return list(runs)


def _counterpart(stem: str, body: Mapping[str, Any], run: Run) -> str | None:
    """The run's evaluation of the same split or queries, or else of the same name."""
    for name, other in run.evaluations.items():
        for kind in ("split_digest", "queries_digest"):
            if body.get(kind) and body.get(kind) == other.get(kind) and not why_not(body, other):
                return name
    return stem if stem in run.evaluations else None


def why_not(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why two evaluations do not measure the same; None where they do."""
    kinds = [
        {name for name in (*DIRECTIONS, "classification", "query_candidates") if name in body} for body in (one, other)
    ]
    if kinds[0] != kinds[1]:
        return "one ranks, the other classifies"
    digest = "split_digest" if "split_digest" in one and "split_digest" in other else "data_digest"
    if one.get(digest) != other.get(digest):
        return f"other data (digests {one.get(digest)} and {other.get(digest)})"
    for name, words in SAME.items():
        if one.get(name) != other.get(name):
            return f"other {words} ({one.get(name)} and {other.get(name)})"
    left = [sorted(str(bad.get("key")) for bad in body.get("left_out") or []) for body in (one, other)]
    if left[0] != left[1]:
        return f"another gallery: {len(left[0]):,} and {len(left[1]):,} samples could not be read"
    if "query_candidates" in one:
        return _other_queries(one, other)
    for way in DIRECTIONS:
        sizes = [(body.get(way) or {}).get("gallery") for body in (one, other)]
        if sizes[0] != sizes[1]:
            told = ["unknown" if size is None else f"{size:,}" for size in sizes]
            return f"another gallery ({told[0]} and {told[1]})"
    return None


def _other_queries(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """By what the files of queries and candidates hold, wherever they lie."""
    if not (one.get("queries_digest") and other.get("queries_digest")):
        return "made before digests of the queries' files were kept; run clipdist eval again"
    sizes = [[body["query_candidates"].get(name) for name in ("kind", "queries", "gallery")] for body in (one, other)]
    same = one["queries_digest"] == other["queries_digest"] and sizes[0] == sizes[1]
    return None if same else "other queries or candidates"


def _measurement(reference: Run, stem: str, same: Sequence[tuple[Run, str]], bootstrap: int, seed: int) -> Measurement:
    own = reference.evaluations[stem]
    notes: list[str] = []
    scores = {name: {reference.name: estimate} for name, estimate in _scores(own, own)}
    differences: dict[tuple[str, str], Difference] = {}
    for run, other_stem in same:
        body = run.evaluations[other_stem]
        for name, estimate in _scores(body, own):
            scores.setdefault(name, {})[run.name] = estimate
        if body.get("model_digest") and body.get("model_digest") == own.get("model_digest"):
            notes.append(f"{run.name} and {reference.name} have the same weights")
        try:
            both = reference.outcomes(stem), run.outcomes(other_stem)
            found = paired_differences(*both, bootstrap=bootstrap, seed=seed)
        except UserError as error:
            notes.append(f"not tested: {error}")
            continue
        left = {part: why for part, why in _other_classes(*both).items() if part not in _other_parts(own, body)}
        notes += [f"{run.name}: {part} is not tested: {why}" for part, why in left.items()]
        for name, (estimate, p) in found.items():
            if name in scores and run.name in scores[name]:
                differences[name, run.name] = Difference(run.name, stem, name, estimate, p)
    told = [f"split {own['split']}"] if own.get("split") else []
    galleries = [(own.get(way) or {}).get("gallery") for way in DIRECTIONS]
    if None not in galleries:
        told.append(f"gallery {galleries[0]:,} texts, {galleries[1]:,} images")
    told += [f"{word} {own[word]}" for word in ("groups", "unit") if own.get(word)]
    return Measurement(stem, ", ".join(told), scores, differences, tuple(notes))


def _other_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Parts that both have, measured in ways that are not the same; calibration is that of the classes' part."""
    found = [
        part
        for part, names in SETTINGS.items()
        if part in one and part in other and any(_setting(one[part], n) != _setting(other[part], n) for n in names)
    ]
    both = "calibration" in one and "calibration" in other and "calibration" not in found
    return [*found, "calibration"] if both and any(part in found for part in CLASS_PARTS) else found


def _setting(part: Mapping[str, Any], name: str) -> Any:
    value = part.get(name)
    return list(value) if isinstance(value, dict) else value


def _scores(body: Mapping[str, Any], reference: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    """(name, score) of everything in an evaluation that is a number with or without an interval, but for single classes
    and subgroups, and for parts that the reference measured otherwise."""
    other = _other_parts(reference, body)
    for name, value in body.items():
        if name in (*other, *_DETAILS):
            continue
        single = name in DIRECTIONS and (value.get("positives") or 0) <= 1
        for path, estimate in _leaves(name, value):
            # Of a single right answer, precision says what the rank says.
            if not (single and path.rpartition("/")[2].startswith(("P@", "mAP"))):
                yield path, estimate


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Estimate]]:
    if isinstance(value, dict):
        if "value" in value:
            if isinstance(value["value"], int | float):
                yield path, Estimate(float(value["value"]), value.get("low"), value.get("high"))
            return
        for name, below in value.items():
            if name not in _DETAILS:
                yield from _leaves(f"{path}/{name}", below)
    elif path.endswith("/scores") and isinstance(value, list):
        for one in value:
            yield from _leaves(f"probe/{one['kind']}, {one['fraction']:.3g} of the labels", one.get("score"))
    elif path in ("cosine_pos", "cosine_neg") and isinstance(value, int | float):
        yield path, Estimate(float(value))


# Differences, query by query


def paired_differences(
    one: Outcomes, other: Outcomes, *, bootstrap: int = 10_000, seed: int = 0
) -> dict[str, tuple[Estimate, float | None]]:
    """Metric -> (the other's score less the one's, with its 95 % interval; its two-sided p) over the same queries.

    Units are drawn with replacement, and both models' outcomes go with them. p is twice the smaller share of resamples
    on either side of zero, counting those at zero on both and the observed difference as one more (Davison and Hinkley
    1997, section 4.4): 1 for equal outcomes, and never below 2 / (resamples + 1). With fewer than 10 units there is no
    p. A part whose classes differ is left out. Raises `UserError` where the two did not rank the same.
    """
    units = _check_same(one, other)
    unit_N = unit_numbers(units, len(one.keys))
    left = _other_classes(one, other)
    found: dict[str, tuple[Estimate, float | None]] = {}

    def tell(names: Mapping[str, Statistic], unit_Q: np.ndarray) -> None:
        units = len(np.unique(unit_Q))
        for name, (value, drawn_R) in resampled(names, unit_Q, bootstrap=bootstrap, seed=seed).items():
            p = p_value(drawn_R) if units >= FEWEST_UNITS and bootstrap else None
            found[name] = (Estimate(value, *percentiles(drawn_R)), p)

    for way in DIRECTIONS:
        if f"{way}/rank" not in one.arrays or f"{way}/rank" not in other.arrays:
            continue
        unit_Q = unit_N if way == "image_to_text" else unit_N[one.arrays["text/owner"]]
        asked = one.arrays[f"{way}/rank"] > 0
        values = [_values(outcomes.arrays, way, asked) for outcomes in (one, other)]
        tell(
            *_means_by_unit(
                {name: values[1][name] - values[0][name] for name in values[0] if name in values[1]}, unit_Q[asked]
            )
        )
    for part in CLASS_PARTS:
        if part in left or f"{part}/rank" not in one.arrays or f"{part}/rank" not in other.arrays:
            continue
        asked = one.arrays[f"{part}/rank"] > 0
        unit_Q = unit_N[asked]
        right = [(outcomes.arrays[f"{part}/rank"][asked] == 1).astype(float) for outcomes in (one, other)]
        five = [(outcomes.arrays[f"{part}/rank"][asked] <= 5).astype(float) for outcomes in (one, other)]
        changes = {f"{part}/top-1": right[1] - right[0], f"{part}/top-5": five[1] - five[0]}
        tell(*_means_by_unit(changes, unit_Q))
        tell(_of_classes(part, one, other, asked), unit_Q)
    return found


def p_value(drawn_R: np.ndarray) -> float | None:
    """Two-sided, of differences in resamples; None where most are undefined."""
    defined = drawn_R[np.isfinite(drawn_R)]
    if 2 * len(defined) <= len(drawn_R):
        return None
    smaller = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (len(defined) + 1))


def _values(arrays: Mapping[str, np.ndarray], way: str, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> each query's own share in it."""
    rank_Q = arrays[f"{way}/rank"][asked].astype(np.float64)
    found = {f"{way}/R@{k}": (rank_Q <= k).astype(np.float64) for k in (1, 5, 10)}
    found[f"{way}/mean_reciprocal_rank"] = 1 / rank_Q
    if f"{way}/average_precision" in arrays:
        found[f"{way}/mAP"] = arrays[f"{way}/average_precision"][asked]
    return found


def _means_by_unit(values: Mapping[str, np.ndarray], unit_Q: np.ndarray) -> tuple[dict[str, Statistic], np.ndarray]:
    """Means over queries as statistics of units, of which there are fewer."""
    unit_Q = np.unique(unit_Q, return_inverse=True)[1]
    count_U = np.bincount(unit_Q)
    statistics = {name: ratio_of(np.bincount(unit_Q, weights=value_Q), count_U) for name, value_Q in values.items()}
    return statistics, np.arange(len(count_U))


def _of_classes(part: str, one: Outcomes, other: Outcomes, asked: np.ndarray) -> dict[str, Statistic]:
    label_Q = one.arrays[f"{part}/label"][asked]
    balanced = [balanced_accuracy_of(o.arrays[f"{part}/rank"][asked] == 1, label_Q) for o in (one, other)]
    found = {f"{part}/balanced_accuracy": _less(*balanced)}
    name = f"{part}/log_probability"
    if name in one.arrays and name in other.arrays:
        counts = np.bincount(label_Q, minlength=one.arrays[name].shape[1])
        binary = len(counts) == 2
        scored = [c for c, count in enumerate(counts) if 0 < count < len(label_Q) and not (binary and c == 0)]
        areas = [
            mean_of_statistics([auroc_of(o.arrays[name][asked][:, c], label_Q == c) for c in scored])
            for o in (one, other)
        ]
        if scored:
            found[f"{part}/auroc"] = _less(*areas)
    return found


def _less(one: Statistic, other: Statistic) -> Statistic:
    return lambda times_rQ: other(times_rQ) - one(times_rQ)


def _check_same(one: Outcomes, other: Outcomes) -> list[str | None] | None:
    """The units of both. Raises `UserError` where the two did not rank the same."""
    if list(one.keys) != list(other.keys):
        only = [len(set(a.keys) - set(b.keys)) for a, b in ((one, other), (other, one))]
        raise UserError(f"the galleries differ: {only[0]:,} images are only in the one, {only[1]:,} only in the other")
    units, others = (None if o.units is None else [unit_name(unit) for unit in o.units] for o in (one, other))
    if units != others:
        raise UserError("the units differ; evaluate both with the same --unit")
    for name in ("text/owner", "text/hash"):
        if name in one.arrays and name in other.arrays and not np.array_equal(one.arrays[name], other.arrays[name]):
            raise UserError("the captions differ")
    if any(_other_queries_asked(way, one, other) for way in DIRECTIONS):
        raise UserError("the queries with a right answer differ")
    return units


def _other_classes(one: Outcomes, other: Outcomes) -> dict[str, str]:
    """Part -> why its outcomes are not of the same classes, for those that differ in them."""
    found = {}
    for part in CLASS_PARTS:
        labels = [o.arrays.get(f"{part}/label") for o in (one, other)]
        if labels[0] is not None and labels[1] is not None and not np.array_equal(labels[0], labels[1]):
            found[part] = "the images' classes differ"
        elif _other_queries_asked(part, one, other):
            found[part] = "the images with a class differ"
    return found


def _other_queries_asked(part: str, one: Outcomes, other: Outcomes) -> bool:
    ranks = [o.arrays.get(f"{part}/rank") for o in (one, other)]
    return ranks[0] is not None and ranks[1] is not None and not np.array_equal(ranks[0] > 0, ranks[1] > 0)


def holm(p: Sequence[float]) -> list[float]:
    """Each p adjusted for all of them, so that the chance of any false finding stays below the level (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted, highest = [0.0] * len(p), 0.0
    for place, number in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p) - place) * p[number]))
        adjusted[number] = highest
    return adjusted


def _adjusted(measurements: Sequence[Measurement]) -> list[Measurement]:
    tested = [one.p for many in measurements for one in many.differences.values() if one.p is not None]
    adjusted = iter(holm(tested))
    return [
        Measurement(
            many.name,
            many.about,
            many.scores,
            {
                place: Difference(
                    one.run, one.evaluation, one.metric, one.estimate, one.p, None if one.p is None else next(adjusted)
                )
                for place, one in many.differences.items()
            },
            many.notes,
        )
        for many in measurements
    ]
