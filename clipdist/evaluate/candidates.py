"""Queries against candidate images with labels: Precision@k, as ConVIRT published it for CheXpert 8×200.

Zhang et al. 2020, arXiv 2010.00747, section 4.2; the files are those of github.com/yuhaozhang/convirt:

    image-retrieval/query.csv      Variable,Path     a class and the path of a query image
    text-retrieval/query.csv       Variable,Text     a class and a sentence
    …/candidate.csv                Path,…,Atelectasis,Cardiomegaly,…   a column per class, 1 where the image has it

Suffixes of names: Q queries, G candidates, C classes, K cut-offs, D feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdist.data.labels import is_absent
from clipdist.errors import UserError
from clipdist.evaluate.cosines import Array, integers, positive_ranks, precision_of, same_width, strips, unit_rows
from clipdist.evaluate.estimates import (
    Estimate,
    Statistic,
    aligned,
    cell,
    estimates,
    mean_of,
    ratio_of,
    unit_numbers,
    without_nan,
)

KS = (5, 10, 50)


@dataclass(frozen=True)
class QueryScores:
    """Precision@k of `queries` against `candidates`, over all and for each class; `chance` is the mean share of right
    candidates, which a random order has at every k."""

    kind: str  # image, text
    queries: int
    candidates: int
    precision: dict[int, Estimate]
    chance: float
    classes: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        found = {
            "kind": f"{self.kind}-image",
            "queries": self.queries,
            "gallery": self.candidates,
            **{f"P@{k}": {**one.to_dict(), "chance": self.chance} for k, one in self.precision.items()},
            "classes": self.classes,
        }
        return without_nan(found)

    def table(self) -> str:
        ks = list(self.precision)
        rows = [[f"{self.kind} → image", "queries", "candidates", *(f"P@{k}" for k in ks)]]
        rows.append(["", f"{self.queries:,}", f"{self.candidates:,}", *(cell(self.precision[k]) for k in ks)])
        rows.append(["  by chance", "", "", *(f"{self.chance:.3f}" for _ in ks)])
        for name, one in self.classes.items():
            values = [f"{one[f'P@{k}']['value']:.3f}" for k in ks]
            rows.append([f"  {name}", f"{one['queries']:,}", f"{one['right']:,} right", *values])
        return "\n".join(aligned(rows))


def query_scores(
    query_features_QD: Array,
    class_Q: Array | Sequence[int],
    candidate_features_GD: Array,
    candidate_has_GC: np.ndarray,
    classes: Sequence[str],
    *,
    kind: str = "image",
    ks: Sequence[int] = KS,
    units: Sequence[Any] | np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> QueryScores:
    """Precision@k: the share, among a query's k nearest candidates, of those with `candidate_has_GC` (bool) for the
    query's class, `class_Q` (int64, a column); mean over queries. Ties count against the model.

    Intervals resample queries (or their `units`), the candidates staying as they are. Memory O(Q + G). Raises
    `UserError` when there are fewer candidates than the largest k, or a class has none.
    """
    query_QD, candidate_GD = unit_rows(query_features_QD, "query"), unit_rows(candidate_features_GD, "candidate")
    same_width(query_QD, candidate_GD, ("query", "candidate"))
    number_Q, has_GC = integers(class_Q, "class_Q"), np.asarray(candidate_has_GC, bool)
    Q, G, C = len(query_QD), len(candidate_GD), len(classes)
    if len(number_Q) != Q or has_GC.shape != (G, C) or number_Q.min() < 0 or number_Q.max() >= C:
        raise UserError(
            f"{len(number_Q):,} classes of {Q:,} queries, labels of shape {has_GC.shape} for {G:,} candidates and {C} "
            "classes: expected one class per query, and one row of labels per candidate"
        )
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > G:
        raise UserError(f"Precision@{', '.join(map(str, ks))} needs {ks[-1] if ks else 1:,} candidates; found {G:,}")
    right_C = has_GC.sum(axis=0)
    if none := [classes[number] for number in np.unique(number_Q) if not right_C[number]]:
        raise UserError(
            f"no candidate has {', '.join(none)}, for which there are queries; expected some with a 1 there"
        )
    has_CG = torch.from_numpy(has_GC.T.copy()).to(query_QD.device)
    numbers = torch.from_numpy(number_Q).to(query_QD.device)
    found = [
        precision_of(positive_ranks(c, has_CG[numbers[rows]]), ks)[1] for rows, c in strips(query_QD, candidate_GD)
    ]
    at_QK = torch.cat(found).cpu().numpy()
    statistics: dict[str, Statistic] = {f"P@{k}": mean_of(at_QK[:, place]) for place, k in enumerate(ks)}
    for number in np.unique(number_Q):
        own = number_Q == number
        statistics |= {f"{number} {k}": ratio_of(at_QK[:, place] * own, own) for place, k in enumerate(ks)}
    estimated = estimates(statistics, unit_numbers(units, Q), bootstrap=bootstrap, seed=seed)
    per_class = {
        classes[number]: {
            "queries": int((number_Q == number).sum()),
            "right": int(right_C[number]),
            **{f"P@{k}": estimated[f"{number} {k}"].to_dict() for k in ks},
        }
        for number in np.unique(number_Q).tolist()
    }
    precision = {k: estimated[f"P@{k}"] for k in ks}
    return QueryScores(kind, Q, G, precision, float((right_C[number_Q] / G).mean()), per_class)


@dataclass(frozen=True)
class Queries:
    """A file of queries and one of candidates, read and checked. `items` are paths of images or sentences; `shared`
    counts images that are both query and candidate, each of which finds itself."""

    kind: str
    items: list[Any]
    class_Q: np.ndarray
    candidates: list[Path]
    has_GC: np.ndarray
    classes: list[str]
    shared: int


def read_queries(queries: Path, candidates: Path, images: Path) -> Queries:
    """The files in ConVIRT's columns: `Variable` with `Path` or `Text` for queries; `Path` and a column per class, of
    numbers, for candidates, which have the class where its cell is 1. Paths are relative to `images`.

    Any table that `clipdist pack` reads will do. Raises `UserError` for missing columns, classes or images.
    """
    from clipdist.data.sets.tables import check_columns, read_table

    asked, offered = read_table(queries), read_table(candidates)
    kind = "image" if "Path" in asked.columns else "text"
    check_columns(asked, ["Variable", "Path" if kind == "image" else "Text"], str(queries))
    cells = asked["Path" if kind == "image" else "Text"]
    names = [str(name).strip() for name in asked["Variable"]]
    classes = sorted(set(names))
    check_columns(offered, ["Path", *classes], str(candidates))
    has_GC = np.stack([[_is_one(value) for value in offered[name]] for name in classes], axis=1)
    paths = [images / str(path) for path in offered["Path"]]
    items = [images / str(path) for path in cells] if kind == "image" else [str(text) for text in cells]
    if kind == "text" and (empty := [row for row, text in cells.items() if is_absent(text) or not str(text).strip()]):
        raise UserError(
            f"{queries}: {len(empty):,} rows without a text, such as row {empty[0]}; expected a sentence each"
        )
    missing = [path for path in [*paths, *(items if kind == "image" else [])] if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of the images that {queries} and {candidates} name are not there, such as {missing[0]}; "
            "expected --images to be the folder that their paths start from"
        )
    class_Q = np.array([classes.index(name) for name in names], np.int64)
    return Queries(kind, items, class_Q, paths, has_GC, classes, len(set(items) & set(paths)))


def _is_one(value: Any) -> bool:
    try:
        return float(value) == 1
    except (TypeError, ValueError):
        return False
