"""Retrieval scores of image and text features: recall, ranks and cosines, with gallery, chance level and interval.

Suffixes of names: N images, M texts, Q queries, G gallery items, U units of resampling, K cut-offs, D feature width.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdist.errors import UserError
from clipdist.progress import progress

# float32 matrix products of bitwise equal rows differ by up to 3e-8 with the place of the row in its tile; cosines
# nearer than this are the same number, and a model that gives them cannot tell the two apart.
TIE_TOLERANCE = 1e-6
CONFIDENCE = 0.95
HISTOGRAM_BINS = 100
_DRAWS_AT_ONCE = 2**22

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Estimate:
    """A score and its bootstrap percentile interval; `low` and `high` are None where nothing was resampled."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Direction:
    """Scores of one direction: `queries` ranked `gallery` items each. `chance[k]` is R@k of a random ranking."""

    queries: int
    gallery: int
    recall: dict[int, Estimate]
    chance: dict[int, float]
    median_rank: Estimate
    mean_rank: float
    mean_reciprocal_rank: float
    # Every query's rank, 0 for one without a positive; kept in memory for examples, not written to JSON.
    ranks_Q: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        recall = {f"R@{k}": {**self.recall[k].to_dict(), "chance": self.chance[k]} for k in self.recall}
        return recall | {
            "median_rank": self.median_rank.to_dict(),
            "mean_rank": {"value": self.mean_rank},
            "mean_reciprocal_rank": {"value": self.mean_reciprocal_rank},
            "queries": self.queries,
            "gallery": self.gallery,
        }


@dataclass(frozen=True)
class Histogram:
    """Counts of cosines of positive and of negative pairs between `edges` (one more than the counts, from -1 to 1)."""

    edges: tuple[float, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def to_dict(self) -> dict[str, list[float]]:
        return {"edges": list(self.edges), "positive": list(self.positive), "negative": list(self.negative)}


@dataclass(frozen=True)
class RetrievalScores:
    """Both directions, and what a reader needs to know to judge them.

    `duplicate_texts` counts texts that some other image bears too (None when the texts were not given): unless such
    images are grouped, none of these can be ranked first. `units` is the number of resampled units, None when images
    were resampled one by one. Cosines are means over every pair of the whole N x M matrix, not of a sample.
    """

    image_to_text: Direction
    text_to_image: Direction
    images: int
    texts: int
    grouped: bool
    units: int | None
    duplicate_texts: int | None
    cosine_pos: float
    cosine_neg: float
    cosine_histogram: Histogram = field(repr=False)
    bootstrap: int

    def flat(self) -> dict[str, float]:
        """Point estimates under the names used in metrics: `image_to_text/R@1`, ..., `gallery`, `cosine_neg`."""
        values: dict[str, float] = {}
        for name, direction in (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image)):
            values |= {f"{name}/R@{k}": estimate.value for k, estimate in direction.recall.items()}
            values[f"{name}/median_rank"] = direction.median_rank.value
            values[f"{name}/mean_rank"] = direction.mean_rank
            values[f"{name}/mean_reciprocal_rank"] = direction.mean_reciprocal_rank
        return values | {
            "gallery": float(self.images),
            "gallery_texts": float(self.texts),
            "cosine_pos": self.cosine_pos,
            "cosine_neg": self.cosine_neg,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single ranks, ready for JSON; values that do not exist are None, never NaN."""
        scores = {
            "image_to_text": self.image_to_text.to_dict(),
            "text_to_image": self.text_to_image.to_dict(),
            "images": self.images,
            "texts": self.texts,
            "grouped": self.grouped,
            "units": self.units,
            "duplicate_texts": self.duplicate_texts,
            "cosine_pos": self.cosine_pos,
            "cosine_neg": self.cosine_neg,
            "cosine_histogram": self.cosine_histogram.to_dict(),
            "bootstrap": self.bootstrap,
            "confidence": CONFIDENCE,
        }
        return _without_nan(scores)

    def table(self) -> str:
        """A plain-text table of both directions with intervals, chance and the size of each gallery."""
        ks = list(self.image_to_text.recall)
        rows = [["", "queries", "gallery", *(f"R@{k}" for k in ks), "median rank", "mean rank", "MRR"]]
        for name, one in (("image → text", self.image_to_text), ("text → image", self.text_to_image)):
            recalls = [_cell(one.recall[k], ".3f") for k in ks]
            ranks = [_cell(one.median_rank, ",.1f"), f"{one.mean_rank:,.1f}", f"{one.mean_reciprocal_rank:.3f}"]
            rows.append([name, f"{one.queries:,}", f"{one.gallery:,}", *recalls, *ranks])
            rows.append(["  by chance", "", "", *(f"{one.chance[k]:.2g}" for k in ks), "", "", ""])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [_justified(row, widths) for row in rows]
        cosines = f"mean cosine: positives {self.cosine_pos:.3f}, negatives {self.cosine_neg:.3f}"
        return "\n".join([*lines, cosines, *self._notes()])

    def _notes(self) -> list[str]:
        notes = []
        if self.image_to_text.recall and next(iter(self.image_to_text.recall.values())).low is not None:
            of = "images" if self.units is None else f"the {self.units:,} units"
            notes.append(f"[{CONFIDENCE:.0%} intervals from {self.bootstrap:,} resamples of {of}]")
        if self.duplicate_texts:
            effect = "" if self.grouped else ", so cannot be ranked first"
            notes.append(f"{self.duplicate_texts:,} of {self.texts:,} texts also belong to another image{effect}")
        return notes


def retrieval_scores(
    image_features_ND: Array,
    text_features_MD: Array,
    text_owner_M: Array | Sequence[int],
    *,
    group_N: Array | Sequence[int] | None = None,
    units: Sequence[Any] | np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    bootstrap: int = 1000,
    seed: int = 0,
    chunk: int = 1024,
    quiet: bool = True,
) -> RetrievalScores:
    """Exact scores of every image against all texts and of every text against all images.

    Text j belongs to image `text_owner_M[j]`; an image may have several texts, or none (it then only stands in the
    gallery of the texts). Positives of an image are its texts, and those of images of equal `group_N`; positives of a
    text are its image, and images of that group. Features of any float type are normalised here, in float32, on the
    device on which they lie.

    The rank of a query is 1 + the number of non-positives that score at least as high as its best positive. **Ties
    count against the model** (within `TIE_TOLERANCE`), so one that answers the same to everything is ranked last
    rather than first. Ranks count exactly: nothing is sampled.

    Intervals are 95 % bootstrap percentiles over whole units: `units[i]`, such as the patient of image i, or else
    each image with all its texts (as where its unit is None). `bootstrap=0` leaves them out. They state the sampling
    error of the queries, with the gallery as it is. Where every query is right, or only one unit exists, resampling
    cannot tell the error: the width is zero, or the interval None.

    Memory beyond the features is O(chunk²), never N x M; time is two matrix products of N x M x D. 1,024 suits the
    caches of a CPU (8 s for 20,000 x 20,000 x 256 on one core, half the time of 4,096).

    Raises `UserError` for features that are not finite, or whose sizes contradict each other.
    """
    image_ND, text_MD = _features(image_features_ND, "image"), _features(text_features_MD, "text")
    owner_M = _integers(text_owner_M, "text_owner_M")
    N, M = len(image_ND), len(text_MD)
    _check(image_ND, text_MD, owner_M, chunk, ks)
    for name, given, expected in (("group_N", group_N, N), ("units", units, N), ("texts", texts, M)):
        if given is not None and len(given) != expected:
            raise UserError(f"{name} has {len(given):,} entries, expected {expected:,}: one per row of the features")
    group = np.arange(N) if group_N is None else np.unique(_integers(group_N, "group_N"), return_inverse=True)[1]
    pairs = _Pairs(image_ND, text_MD, group, group[owner_M], chunk, quiet)
    best_N, best_M, histogram, cosine_pos, cosine_neg = pairs.best_positives()
    rank_N, rank_M = pairs.ranks(best_N, best_M)
    unit_N = np.arange(N) if units is None else _numbered(units)

    def direction(rank_Q: np.ndarray, positives_Q: np.ndarray, unit_Q: np.ndarray, gallery: int) -> Direction:
        return _direction(rank_Q, positives_Q, unit_Q, gallery, sorted(set(ks)), bootstrap, seed)

    texts_of_group, images_of_group = (np.bincount(g, minlength=group.max() + 1) for g in (pairs.group_M, group))
    return RetrievalScores(
        image_to_text=direction(rank_N, texts_of_group[group], unit_N, M),
        text_to_image=direction(rank_M, images_of_group[pairs.group_M], unit_N[owner_M], N),
        images=N,
        texts=M,
        grouped=group_N is not None,
        units=None if units is None else int(unit_N.max()) + 1,
        duplicate_texts=None if texts is None else _shared_texts(texts, owner_M),
        cosine_pos=cosine_pos,
        cosine_neg=cosine_neg,
        cosine_histogram=histogram,
        bootstrap=bootstrap,
    )


def top_matches(
    query_features_QD: Array, gallery_features_GD: Array, k: int, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, gallery indices) of each query's `k` best matches, best first: float32 and int64, both (Q, min(k, G)).

    Features are normalised here. Memory beyond the features is O(chunk²).
    """
    query_QD, gallery_GD = _features(query_features_QD, "query"), _features(gallery_features_GD, "gallery")
    if query_QD.shape[1] != gallery_GD.shape[1]:
        raise UserError(
            f"queries are {query_QD.shape[1]} wide, the gallery {gallery_GD.shape[1]}: use one model for both"
        )
    all_scores, all_indices = [], []
    with _full_float32(query_QD.device.type):
        for rows_qD in query_QD.split(chunk):
            scores_qk = rows_qD.new_empty(len(rows_qD), 0)
            indices_qk = torch.empty(len(rows_qD), 0, dtype=torch.int64, device=rows_qD.device)
            for start in range(0, len(gallery_GD), chunk):
                tile_qg = rows_qD @ gallery_GD[start : start + chunk].T
                scores, places = tile_qg.topk(min(k, tile_qg.shape[1]), dim=1)
                scores_qk, indices_qk = torch.cat([scores_qk, scores], 1), torch.cat([indices_qk, places + start], 1)
                scores_qk, keep = scores_qk.topk(min(k, scores_qk.shape[1]), dim=1)
                indices_qk = indices_qk.gather(1, keep)
            all_scores.append(scores_qk.cpu().numpy())
            all_indices.append(indices_qk.cpu().numpy())
    return np.concatenate(all_scores), np.concatenate(all_indices)


class _Pairs:
    """The N x M matrix of cosines, walked tile by tile; both passes see the very same numbers."""

    def __init__(
        self, image_ND: Tensor, text_MD: Tensor, group_N: np.ndarray, group_M: np.ndarray, chunk: int, quiet: bool
    ) -> None:
        self.image_ND, self.text_MD, self.group_M, self.chunk, self.quiet = image_ND, text_MD, group_M, chunk, quiet
        self.row_group_N = torch.from_numpy(group_N).to(image_ND.device)
        self.column_group_M = torch.from_numpy(group_M).to(image_ND.device)

    def _tiles(self, description: str) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields rows, columns, their cosines (float32) and which of them are positives (bool)."""
        starts = [
            (r, c) for r in range(0, len(self.image_ND), self.chunk) for c in range(0, len(self.text_MD), self.chunk)
        ]
        with _full_float32(self.image_ND.device.type):
            for r, c in progress(starts, unit="tile", description=description, quiet=self.quiet):
                rows, columns = slice(r, r + self.chunk), slice(c, c + self.chunk)
                cosine = (self.image_ND[rows] @ self.text_MD[columns].T).clamp_(-1, 1)
                yield rows, columns, cosine, self.row_group_N[rows, None] == self.column_group_M[None, columns]

    def best_positives(self) -> tuple[Tensor, Tensor, Histogram, float, float]:
        """Each image's and each text's best positive cosine (-inf without one), the histogram of all pairs, and the
        mean cosine of positives and of negatives (NaN where every pair is positive)."""
        device = self.image_ND.device
        best_N = torch.full((len(self.image_ND),), -torch.inf, device=device)
        best_M = torch.full((len(self.text_MD),), -torch.inf, device=device)
        counts = torch.zeros(2, HISTOGRAM_BINS, dtype=torch.int64, device=device)
        sums = []
        for rows, columns, cosine, positive in self._tiles("best positives"):
            masked = cosine.where(positive, -torch.inf)
            best_N[rows] = best_N[rows].maximum(masked.amax(1))
            best_M[columns] = best_M[columns].maximum(masked.amax(0))
            of_positives = cosine[positive]
            sums.append(of_positives.sum())
            counts[0] += _binned(of_positives)
            counts[1] += _binned(cosine.flatten())
        positives, everything = counts.cpu().numpy()
        edges = tuple(np.linspace(-1, 1, HISTOGRAM_BINS + 1).round(6).tolist())
        histogram = Histogram(edges, tuple(positives.tolist()), tuple((everything - positives).tolist()))
        positive_sum = float(torch.stack(sums).cpu().double().sum())
        # The sum over all pairs needs no pair: Σ_ij x_i·y_j = (Σ_i x_i)·(Σ_j y_j).
        everything_sum = float(_column_sums(self.image_ND) @ _column_sums(self.text_MD))
        negatives = sum(histogram.negative)
        negative_mean = (everything_sum - positive_sum) / negatives if negatives else float("nan")
        return best_N, best_M, histogram, positive_sum / sum(histogram.positive), negative_mean

    def ranks(self, best_N: Tensor, best_M: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """1 + the number of negatives that reach the best positive; int64, 0 where there is no positive."""
        above_N, above_M = (torch.zeros(len(best), dtype=torch.int64, device=best.device) for best in (best_N, best_M))
        for rows, columns, cosine, positive in self._tiles("ranks"):
            negative = ~positive
            above_N[rows] += ((cosine >= best_N[rows, None] - TIE_TOLERANCE) & negative).sum(1)
            above_M[columns] += ((cosine >= best_M[None, columns] - TIE_TOLERANCE) & negative).sum(0)
        rank_N, rank_M = (
            torch.where(best.isfinite(), above + 1, 0).cpu().numpy()
            for best, above in ((best_N, above_N), (best_M, above_M))
        )
        return rank_N, rank_M


def _binned(cosines: Tensor) -> Tensor:
    """Counts per bin; several times faster than torch.histc, and exact beyond float32's 2^24."""
    bins = cosines.add(1).mul_(HISTOGRAM_BINS / 2).int().clamp_(max=HISTOGRAM_BINS - 1)
    return bins.bincount(minlength=HISTOGRAM_BINS)


def _column_sums(features: Tensor) -> Tensor:
    return torch.stack([rows.cpu().double().sum(0) for rows in features.split(65_536)]).sum(0)


def _direction(
    rank_Q: np.ndarray,
    positives_Q: np.ndarray,
    unit_Q: np.ndarray,
    gallery: int,
    ks: Sequence[int],
    bootstrap: int,
    seed: int,
) -> Direction:
    asked = rank_Q > 0
    rank, positives = rank_Q[asked], positives_Q[asked]
    unit = np.unique(unit_Q[asked], return_inverse=True)[1]
    recall_low_high, median_low_high = _intervals(rank, unit, ks, bootstrap, seed)
    return Direction(
        queries=len(rank),
        gallery=gallery,
        recall={k: Estimate(float((rank <= k).mean()), *recall_low_high[place]) for place, k in enumerate(ks)},
        chance={k: _chance(positives, gallery, k) for k in ks},
        median_rank=Estimate(float(np.median(rank)), *median_low_high),
        mean_rank=float(rank.mean()),
        mean_reciprocal_rank=float((1 / rank).mean()),
        ranks_Q=rank_Q,
    )


def _chance(positives_Q: np.ndarray, gallery: int, k: int) -> float:
    """R@k of a random order: 1 - (chance of drawing k negatives in a row without replacement), mean over queries."""
    miss = np.ones(len(positives_Q))
    for drawn in range(min(k, gallery)):
        miss *= np.maximum(gallery - positives_Q - drawn, 0) / (gallery - drawn)
    return float(1 - miss.mean())


def _intervals(
    rank_Q: np.ndarray, unit_Q: np.ndarray, ks: Sequence[int], bootstrap: int, seed: int
) -> tuple[list[tuple[float | None, float | None]], tuple[float | None, float | None]]:
    """Percentile intervals of R@k, for each k, and of the median rank, resampling units with replacement."""
    U = int(unit_Q.max()) + 1
    if bootstrap == 0 or U < 2:
        return [(None, None)] * len(ks), (None, None)
    rng = np.random.default_rng(seed)
    size_U = np.bincount(unit_Q, minlength=U)
    hits_UK = np.stack([np.bincount(unit_Q, weights=rank_Q <= k, minlength=U) for k in ks], axis=1)
    order = np.argsort(rank_Q, kind="stable")
    sorted_rank_Q, unit_by_rank_Q = rank_Q[order], unit_Q[order]
    recalls, medians = [], []
    block = max(1, _DRAWS_AT_ONCE // len(rank_Q))
    for start in range(0, bootstrap, block):
        rows = min(block, bootstrap - start)
        drawn = rng.integers(U, size=(rows, U)) + U * np.arange(rows)[:, None]
        times_rU = np.bincount(drawn.ravel(), minlength=rows * U).reshape(rows, U)
        total_r = times_rU @ size_U
        recalls.append(times_rU @ hits_UK / total_r[:, None])
        # Cumulated multiplicities of the sorted ranks give each resample's median without sorting it.
        reached_rQ = times_rU[:, unit_by_rank_Q].cumsum(axis=1)
        middle = [(reached_rQ <= place[:, None]).sum(axis=1) for place in ((total_r - 1) // 2, total_r // 2)]
        medians.append((sorted_rank_Q[middle[0]] + sorted_rank_Q[middle[1]]) / 2)
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low_K, high_K = np.quantile(np.concatenate(recalls), tails, axis=0)
    low, high = np.quantile(np.concatenate(medians), tails)
    return list(zip(low_K.tolist(), high_K.tolist(), strict=True)), (float(low), float(high))


def _numbered(units: Sequence[Any] | np.ndarray) -> np.ndarray:
    """A number per distinct unit; every None gets one of its own."""
    numbers: dict[Any, int] = {}
    return np.array(
        [numbers.setdefault(place if unit is None else (unit,), len(numbers)) for place, unit in enumerate(units)]
    )


def _shared_texts(texts: Sequence[str], owner_M: np.ndarray) -> int:
    """Texts whose exact words another image bears too."""
    images_of = Counter(text for text, _ in set(zip(texts, owner_M.tolist(), strict=True)))
    return sum(images_of[text] > 1 for text in texts)


def _features(features: Array, what: str) -> Tensor:
    """Rows of length one, float32; a row of zeros stays zero."""
    tensor = torch.as_tensor(features).detach()
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(f"{what} features have shape {tuple(tensor.shape)}, expected (rows, width), neither of them 0")
    if not (finite := tensor.isfinite().all(dim=1)).all():
        raise UserError(
            f"{int((~finite).sum()):,} of {len(tensor):,} {what} feature rows hold NaN or infinity: "
            "the weights have diverged, or were read in a precision too low for them"
        )
    return torch.nn.functional.normalize(tensor.float(), dim=1)


def _integers(values: Array | Sequence[int], name: str) -> np.ndarray:
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{name} has shape {array.shape} and type {array.dtype}, expected one integer per row")
    return array.astype(np.int64)


def _check(image_ND: Tensor, text_MD: Tensor, owner_M: np.ndarray, chunk: int, ks: Sequence[int]) -> None:
    N, M = len(image_ND), len(text_MD)
    if image_ND.shape[1] != text_MD.shape[1]:
        raise UserError(
            f"image features are {image_ND.shape[1]} wide, text features {text_MD.shape[1]}: use the joint embedding"
        )
    if len(owner_M) != M:
        raise UserError(f"text_owner_M has {len(owner_M):,} entries, expected {M:,}: one per text")
    if owner_M.min() < 0 or owner_M.max() >= N:
        raise UserError(f"text_owner_M spans {owner_M.min()} to {owner_M.max()}, expected rows of {N:,} images")
    if chunk < 1 or not ks or min(ks) < 1:
        raise UserError(f"chunk={chunk} and ks={tuple(ks)}: expected a chunk and at least one k, all of 1 or more")


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Full float32 products inside: TF32 and autocast, right for training, would turn near misses into ties."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # torch before 2.9 knows only `allow_tf32`; from then on the two ways must not be mixed.
    setting, full = ("fp32_precision", "ieee") if hasattr(backends[0], "fp32_precision") else ("allow_tf32", False)
    before = [(backend, getattr(backend, setting)) for backend in backends if hasattr(backend, setting)]
    for backend, _ in before:
        setattr(backend, setting, full)
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, value in before:
            setattr(backend, setting, value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and value != value else value


def _cell(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _justified(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()
