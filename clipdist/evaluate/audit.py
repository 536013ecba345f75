"""What a shard set's splits share, what it holds twice, how its captions, classes and pictures are.

Leaks are units, pictures (equal bytes, or the same to the eye) and, where features are given, neighbours in a model's
space that lie in several splits. The rest is told, not judged.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.classes import field_values
from clipdist.data.images.quality import QualityLimits
from clipdist.data.sets.duplicates import (
    CANDIDATE_BITS,
    Duplicates,
    check_bits,
    cosine_pairs,
    find_duplicates,
    groups_of_equal,
)
from clipdist.data.sets.survey import Survey
from clipdist.errors import UserError
from clipdist.evaluate.audit_captions import caption_figures, tokenizer_figures
from clipdist.prepare.units import joined_units

# Findings of one kind, and classes, that are listed; the counts are always exact.
LISTED = 1000
LEAKS = ("units", "same", "near", "embedding")


@dataclass(frozen=True)
class AuditOptions:
    """`label`: field of the classes. `bits`: see `find_duplicates`. `cosine`: from here on two features are neighbours.
    `tokenizers`: see `tokenizer_figures`."""

    label: str = "label"
    bits: int = CANDIDATE_BITS
    cosine: float = 0.95
    limits: QualityLimits = field(default_factory=QualityLimits)
    tokenizers: Sequence[str] = ()
    max_tokens: int = 77
    vocabulary: int = 8000

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 < self.cosine <= 1:
            raise UserError(f"--cosine: found {self.cosine}, expected above 0 and at most 1")


@dataclass
class Features:
    """Unit vectors, float32 [F, D], of the samples `rows`; `name` says where they are from."""

    rows: np.ndarray
    vectors_FD: np.ndarray
    name: str


@dataclass
class Audit:
    """`body` is what `--json` prints; the findings in it name samples by key and by `row` in the survey."""

    survey: Survey
    duplicates: Duplicates
    body: dict[str, Any]

    @property
    def leaks(self) -> bool:
        return any(self.body["leaks"][kind]["straddling"] for kind in LEAKS if kind in self.body["leaks"])


def audit_survey(survey: Survey, options: AuditOptions | None = None, features: Features | None = None) -> Audit:
    """Compares what a survey found. Raises `UserError` for a tokenizer that cannot be had."""
    options = options or AuditOptions()
    duplicates = find_duplicates(survey.samples["image"], survey.looks, options.bits)
    body: dict[str, Any] = {
        "set": str(survey.folder),
        "samples": len(survey.rows),
        "splits": _per_split(survey, np.ones(len(survey.rows), bool)),
        "unreadable": _unreadable(survey),
        "leaks": {"units": _units(survey), "same": _same(survey), "near": _near(survey, duplicates)},
        "captions": caption_figures(survey),
        "classes": _classes(survey, options.label),
        "quality": _quality(survey, options.limits),
        "sizes": _sizes(survey),
    }
    if features is not None:
        body["leaks"]["embedding"] = _embedding(survey, features, options.cosine)
    if options.tokenizers:
        body["tokenizers"] = tokenizer_figures(
            survey, options.tokenizers, max_tokens=options.max_tokens, vocabulary=options.vocabulary
        )
    return Audit(survey, duplicates, body)


def features_from(survey: Survey, path: Path) -> Features:
    """Features that were computed elsewhere: an `.npz` with `keys`, strings, and `image_features`, float [F, D]."""
    expected = "expected an .npz of `keys`, strings, and `image_features`, [N, D]"
    try:
        held = np.load(path, allow_pickle=False)
        if not isinstance(held, np.lib.npyio.NpzFile):
            raise UserError(f"--embeddings {path}: found one array of shape {held.shape}; {expected}")
        with held:
            names, vectors = held["keys"], np.asarray(held["image_features"], np.float32)
    except UserError:
        raise
    except Exception as error:  # cut short, damaged, or of another program: NumPy and zipfile raise many kinds
        raise UserError(f"--embeddings {path}: {error}; {expected}") from None
    if names.ndim != 1 or names.dtype.kind != "U" or vectors.ndim != 2 or len(names) != len(vectors):
        raise UserError(
            f"--embeddings {path}: found `keys` of shape {names.shape}, {names.dtype}, and `image_features` of shape "
            f"{vectors.shape}; {expected}"
        )
    keys = names.tolist()
    if twice := [key for key, times in Counter(keys).items() if times > 1]:
        raise UserError(
            f"--embeddings {path}: {len(twice):,} keys, such as {twice[0]!r}, come more than once; expected each once"
        )
    if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(1))):
        raise UserError(
            f"--embeddings {path}: {len(wrong):,} of {len(keys):,} features, such as that of {keys[wrong[0]]!r}, are "
            f"not finite numbers; compute them again"
        )
    row_of = {survey.rows.key(row): row for row in np.flatnonzero(survey.rows.whole).tolist()}
    known = [place for place, key in enumerate(keys) if key in row_of]
    if not known:
        raise UserError(f"--embeddings {path}: none of its keys, such as {keys[:1]}, is one of {survey.folder}")
    vectors = vectors[known]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return Features(np.array([row_of[keys[place]] for place in known], np.int64), vectors, str(path))


def features_of(survey: Survey, model: Path, *, workers: int = 0, device: str | None = None) -> Features:
    """Image features of every readable sample, by a model folder."""
    from clipdist.evaluate.embed import embed_split
    from clipdist.model.saved import load_dual_encoder

    saved = load_dual_encoder(model, device)
    rows, vectors = [], []
    for name in survey.rows.splits:
        split, own = survey.readable(name)
        if not len(own):
            continue
        found = embed_split(saved.model, saved.tokenizer, split, workers=workers)
        rows.append(own[found.numbers_N])
        vectors.append(found.image_features_ND)
    if not rows:
        raise UserError(f"{survey.folder}: --model: no shard can be opened; run: clipdist verify {survey.folder}")
    return Features(np.concatenate(rows), np.concatenate(vectors), str(model))


def _place(survey: Survey, row: int) -> dict[str, Any]:
    return {"row": int(row), "split": survey.rows.split(row), "key": survey.rows.key(row)}


def _unreadable(survey: Survey) -> dict[str, Any]:
    """Samples that cannot be read; those of `shards` that cannot be opened are told together, and listed last."""
    samples = Counter(survey.rows.file(row) for row in np.flatnonzero(~survey.rows.whole).tolist())
    shards = [{"shard": file, "samples": samples[file], "reason": why} for file, why in survey.rows.damaged.items()]
    listed = [_place(survey, row) | {"reason": why} for row, why in list(survey.bad.items())[:LISTED]]
    return {"count": len(survey.bad), "shards": shards, "listed": listed}


def _per_split(survey: Survey, chosen: np.ndarray) -> dict[str, int]:
    counts = np.bincount(survey.rows.split_of[chosen], minlength=len(survey.rows.splits))
    return dict(zip(survey.rows.splits, counts.tolist(), strict=True))


# What lies in several splits


def _units(survey: Survey) -> dict[str, Any]:
    units = survey.samples["unit"]
    listed: list[dict[str, Any]] = []
    straddling = 0
    for group in groups_of_equal(units):
        if len(np.unique(survey.rows.split_of[group])) > 1:
            straddling += 1
            if len(listed) < LISTED:
                counts = np.bincount(survey.rows.split_of[group], minlength=len(survey.rows.splits)).tolist()
                held = {name: count for name, count in zip(survey.rows.splits, counts, strict=True) if count}
                listed.append({"unit": survey.unit(int(group[0])), "splits": held})
    found = {"units": len(np.unique(units[units != 0])), "without": int((units == 0).sum())}
    return found | {"straddling": straddling, "listed": listed}


def _same(survey: Survey) -> dict[str, Any]:
    """Pictures of equal bytes; a listed group shows one row of each split, or two of the one."""
    groups, copies = 0, 0
    listed: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    straddling = 0
    for group in groups_of_equal(survey.samples["image"]):
        groups, copies = groups + 1, copies + len(group) - 1
        _, first = np.unique(survey.rows.split_of[group], return_index=True)
        straddles = len(first) > 1
        straddling += straddles
        if len(listed[straddles]) < LISTED:
            shown = group[np.sort(first)] if straddles else group[:2]
            pictures = [_place(survey, row) for row in shown]
            listed[straddles].append({"pictures": pictures, "times": len(group), "straddles": straddles})
    both = [*listed[True], *listed[False]][:LISTED]
    return {"groups": groups, "copies": copies, "straddling": straddling, "listed": both}


def _near(survey: Survey, duplicates: Duplicates) -> dict[str, Any]:
    """Pairs that look alike: all are counted, those across splits listed first."""
    pairs, straddles = _moved_across(survey, duplicates)
    found = _pairs(survey, pairs, duplicates.scores_P, straddles)
    units = joined_units(None, duplicates.edges(), len(survey.rows))
    sizes = np.bincount(units)
    return found | {
        "pictures": len(np.unique(duplicates.pairs_P2)),
        "largest_group": int(sizes.max(initial=0)),
        "cut_short": duplicates.cut_short,
    }


def _moved_across(survey: Survey, duplicates: Duplicates) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, whether they straddle): a pair of rows, each the first of its bytes, stands for their copies too; where
    copies lie in another split, these are the rows that tell."""
    split_of, pairs = survey.rows.split_of, duplicates.pairs_P2.copy()
    rows_of: dict[int, list[int]] = {}
    for row in np.flatnonzero(duplicates.first_N != np.arange(len(duplicates.first_N))):
        rows_of.setdefault(int(duplicates.first_N[row]), []).append(int(row))
    straddles = split_of[pairs[:, 0]] != split_of[pairs[:, 1]]
    for place in np.flatnonzero(~straddles):
        for side in (0, 1):
            kept, moved = int(pairs[place, 1 - side]), int(pairs[place, side])
            other = [row for row in rows_of.get(moved, []) if split_of[row] != split_of[kept]]
            if other and not straddles[place]:
                pairs[place, side], straddles[place] = other[0], True
    return pairs, straddles


def _pairs(survey: Survey, pairs: np.ndarray, scores: np.ndarray, straddles: np.ndarray) -> dict[str, Any]:
    order = np.lexsort((-scores, ~straddles))[:LISTED]
    listed = [
        {
            "pictures": [_place(survey, row) for row in pairs[place]],
            "score": round(float(scores[place]), 3),
            "straddles": bool(straddles[place]),
        }
        for place in order
    ]
    return {"pairs": len(pairs), "straddling": int(straddles.sum()), "listed": listed}


def _embedding(survey: Survey, features: Features, cosine: float) -> dict[str, Any]:
    pairs, cosines = cosine_pairs(features.vectors_FD, cosine)
    pairs = np.sort(features.rows[pairs], axis=1)
    straddles = survey.rows.split_of[pairs[:, 0]] != survey.rows.split_of[pairs[:, 1]]
    found = {"features": features.name, "cosine": cosine, "pictures": len(features.rows)}
    return found | _pairs(survey, pairs, cosines, straddles)


# What is told


def _classes(survey: Survey, label: str) -> dict[str, Any]:
    """Samples of each class per split; imbalance is the largest class by the smallest."""
    splits: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {}
    for name in survey.rows.splits:
        values = field_values(survey.readable(name)[0], label)
        found = values.counts()
        for value, count in found.items():
            counts.setdefault(value, dict.fromkeys(survey.rows.splits, 0))[name] = count
        numbers = list(found.values())
        splits[name] = {
            "classes": len(found),
            "largest": max(numbers, default=0),
            "smallest": min(numbers, default=0),
            "imbalance": round(max(numbers) / min(numbers), 1) if numbers else None,
            "lacking": values.lacking,
        }
    for one in splits.values():
        one["absent"] = len(counts) - one["classes"]
    by_size = sorted(counts.items(), key=lambda item: -sum(item[1].values()))
    return {"field": label, "classes": len(counts), "splits": splits, "counts": dict(by_size[:LISTED])}


def _quality(survey: Survey, limits: QualityLimits) -> dict[str, Any]:
    faults = limits.faults(survey.quality, survey.samples["width"].astype(int), survey.samples["height"].astype(int))
    found = {}
    for fault, badness in faults.items():
        rows = np.flatnonzero(~np.isnan(badness))
        worst = rows[np.argsort(-badness[rows], kind="stable")][:LISTED]
        found[fault] = {
            "count": len(rows),
            "splits": _per_split(survey, rows),
            "limit": getattr(limits, fault),
            "listed": [_place(survey, row) | {"value": round(abs(float(badness[row])), 3)} for row in worst],
        }
    return found


def _sizes(survey: Survey) -> dict[str, Any]:
    """Per split: percentiles of sides in pixels and of the aspect, width by height; the commonest sizes."""
    found: dict[str, Any] = {}
    for number, name in enumerate(survey.rows.splits):
        own = survey.samples[(survey.rows.split_of == number) & (survey.samples["width"] > 0)]
        width, height = own["width"].astype(np.int64), own["height"].astype(np.int64)
        if not len(own):
            continue
        sizes, counts = np.unique(np.stack([width, height], 1), axis=0, return_counts=True)
        commonest = [
            {"size": sizes[place].tolist(), "times": int(counts[place])}
            for place in np.argsort(-counts, kind="stable")[:5]
        ]
        found[name] = {
            "shorter_side": _percentiles(np.minimum(width, height)),
            "longer_side": _percentiles(np.maximum(width, height)),
            "aspect": _percentiles(width / height),
            "sizes": len(sizes),
            "commonest": commonest,
        }
    return found


def _percentiles(values: np.ndarray) -> dict[str, float]:
    places = {"smallest": 0, "5 %": 5, "median": 50, "95 %": 95, "largest": 100}
    return {name: round(float(np.percentile(values, place)), 3) for name, place in places.items()}


def to_json(audit: Audit) -> str:
    return json.dumps({"leaks_found": audit.leaks, **audit.body}, indent=1, ensure_ascii=False)
