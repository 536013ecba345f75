"""Retrieval scores of image and text features: recall, ranks, precision and cosines, with gallery, chance and interval.

Suffixes of names: N images, M texts, Q queries, G gallery items, K cut-offs, D feature width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdist import world
from clipdist.data.order import share
from clipdist.errors import UserError
from clipdist.evaluate.cosines import (
    ALONE,
    TIE_TOLERANCE,
    Array,
    full_float32,
    integers,
    owners,
    positive_ranks,
    precision_of,
    same_width,
    strips,
    unit_rows,
)
from clipdist.evaluate.estimates import (
    CONFIDENCE,
    Estimate,
    Measured,
    Statistic,
    aligned,
    cell,
    estimates,
    mean_of,
    median_of,
    unit_numbers,
    without_nan,
)
from clipdist.progress import progress

HISTOGRAM_BINS = 100


@dataclass(frozen=True)
class Direction:
    """Scores of one direction: `queries` ranked `gallery` items each. `chance[k]` is R@k of a random ranking.

    `positives` is the mean number of right answers that a query has; mean average precision and Precision@k are there
    when they were asked for.
    """

    queries: int
    gallery: int
    recall: dict[int, Estimate]
    chance: dict[int, float]
    median_rank: Estimate
    mean_rank: float
    mean_reciprocal_rank: float
    # Every query's rank, 0 for one without a positive; kept in memory for examples, not written to JSON.
    ranks_Q: np.ndarray = field(repr=False, compare=False)
    mean_average_precision: Estimate | None = None
    average_precision_Q: np.ndarray | None = field(default=None, repr=False, compare=False)  # NaN without a positive
    precision: dict[int, Estimate] = field(default_factory=dict)
    positives: float = 1.0

    def statistics(self) -> dict[str, Statistic]:
        """R@k of the queries that have a positive, by name."""
        rank_Q = self.ranks_Q[self.ranks_Q > 0]
        return {f"R@{k}": mean_of(rank_Q <= k) for k in self.recall}

    def to_dict(self) -> dict[str, Any]:
        recall = {f"R@{k}": {**self.recall[k].to_dict(), "chance": self.chance[k]} for k in self.recall}
        precise = {f"P@{k}": estimate.to_dict() for k, estimate in self.precision.items()}
        if self.mean_average_precision is not None:
            precise["mAP"] = self.mean_average_precision.to_dict()
        return (
            recall
            | precise
            | {
                "positives": self.positives,
                "median_rank": self.median_rank.to_dict(),
                "mean_rank": {"value": self.mean_rank},
                "mean_reciprocal_rank": {"value": self.mean_reciprocal_rank},
                "queries": self.queries,
                "gallery": self.gallery,
            }
        )


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
        return without_nan(scores)

    def measured(self, text_owner_M: np.ndarray) -> dict[str, Measured]:
        """R@k of both directions as functions of the queries, for subgroups; by the direction's name."""
        asked_N = np.flatnonzero(self.image_to_text.ranks_Q)
        asked_M = np.flatnonzero(self.text_to_image.ranks_Q)
        return {
            "image_to_text": Measured(self.image_to_text.statistics(), asked_N),
            "text_to_image": Measured(self.text_to_image.statistics(), np.asarray(text_owner_M)[asked_M]),
        }

    def table(self) -> str:
        """A plain-text table of both directions with intervals, chance and the size of each gallery."""
        directions = (("image → text", self.image_to_text), ("text → image", self.text_to_image))
        ks = list(self.image_to_text.recall)
        rows = [["", "queries", "gallery", *(f"R@{k}" for k in ks), "median rank", "mean rank", "MRR"]]
        for name, one in directions:
            recalls = [cell(one.recall[k]) for k in ks]
            ranks = [cell(one.median_rank, ",.1f"), f"{one.mean_rank:,.1f}", f"{one.mean_reciprocal_rank:.3f}"]
            rows.append([name, f"{one.queries:,}", f"{one.gallery:,}", *recalls, *ranks])
            rows.append(["  by chance", "", "", *(f"{one.chance[k]:.2g}" for k in ks), "", "", ""])
        precise = [["", "right answers", "mAP", *(f"P@{k}" for k in ks)]]
        for name, one in directions:
            if one.mean_average_precision is not None and one.positives > 1:
                precisions = [cell(one.precision[k]) for k in ks]
                precise.append([name, f"{one.positives:,.1f}", cell(one.mean_average_precision), *precisions])
        cosines = f"mean cosine: positives {self.cosine_pos:.3f}, negatives {self.cosine_neg:.3f}"
        several = ["", *aligned(precise), ""] if len(precise) > 1 else []
        return "\n".join([*aligned(rows), *several, cosines, *self._notes()])

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
    precision: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    chunk: int = 1024,
    quiet: bool = True,
    shared: bool = False,
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

    `precision` adds mean average precision and Precision@k, which say how a model does where a query has several right
    answers. Where it has one they say no more than the rank does (1/rank, and R@k / k); elsewhere all of a query's
    cosines are sorted, a few queries at a time.

    Memory beyond the features is O(chunk² + N + M), never N x M; time is two matrix products of N x M x D. 1,024 suits
    the caches of a CPU (8 s for 20,000 x 20,000 x 256 on one core, half the time of 4,096).

    `shared`: all ranks call it, with equal features; each walks its part of the rows, and all get the scores, which are
    those of one process.

    Raises `UserError` for features that are not finite, or whose sizes contradict each other.
    """
    image_ND, text_MD = unit_rows(image_features_ND, "image"), unit_rows(text_features_MD, "text")
    N, M = len(image_ND), len(text_MD)
    same_width(image_ND, text_MD, ("image", "text"))
    owner_M = owners(text_owner_M, N, M)
    if chunk < 1 or not ks or min(ks) < 1:
        raise UserError(f"chunk={chunk} and ks={tuple(ks)}: expected a chunk and at least one k, all of 1 or more")
    for name, given, expected in (("group_N", group_N, N), ("units", units, N), ("texts", texts, M)):
        if given is not None and len(given) != expected:
            raise UserError(f"{name} has {len(given):,} entries, expected {expected:,}: one per row of the features")
    group = np.arange(N) if group_N is None else np.unique(integers(group_N, "group_N"), return_inverse=True)[1]
    who = world.connected() if shared else ALONE
    pairs = _Pairs(image_ND, text_MD, group, group[owner_M], chunk, quiet, who)
    best_N, best_M, histogram, cosine_pos, cosine_neg = pairs.best_positives()
    rank_N, rank_M = pairs.ranks(best_N, best_M)
    unit_N = unit_numbers(units, N)
    ks = sorted(set(ks))

    def direction(rank_Q: np.ndarray, positives_Q: np.ndarray, unit_Q: np.ndarray, by_text: bool) -> Direction:
        precise = pairs.precision(by_text, rank_Q, positives_Q, ks) if precision else None
        return _direction(rank_Q, positives_Q, unit_Q, N if by_text else M, ks, precise, bootstrap, seed)

    texts_of_group, images_of_group = (np.bincount(g, minlength=group.max() + 1) for g in (pairs.group_M, group))
    return RetrievalScores(
        image_to_text=direction(rank_N, texts_of_group[group], unit_N, False),
        text_to_image=direction(rank_M, images_of_group[pairs.group_M], unit_N[owner_M], True),
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


class _Pairs:
    """The N x M matrix of cosines, walked tile by tile; both passes see the very same numbers. Each rank of `who` walks
    a run of its rows, cut as for one process, and what they found is joined."""

    def __init__(
        self,
        image_ND: Tensor,
        text_MD: Tensor,
        group_N: np.ndarray,
        group_M: np.ndarray,
        chunk: int,
        quiet: bool,
        who: world.World,
    ) -> None:
        self.who = who
        self.image_ND, self.text_MD, self.group_M, self.chunk, self.quiet = image_ND, text_MD, group_M, chunk, quiet
        tops = range(0, len(image_ND), chunk)
        own = tops[slice(*share(len(tops), who.rank, who.world_size))]
        self.starts = [(r, c) for r in own for c in range(0, len(text_MD), chunk)]
        self.row_group_N = torch.from_numpy(group_N).to(image_ND.device)
        self.column_group_M = torch.from_numpy(group_M).to(image_ND.device)

    def _tiles(self, description: str) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields rows, columns, their cosines (float32) and which of them are positives (bool)."""
        with full_float32(self.image_ND.device.type):
            for r, c in progress(self.starts, unit="tile", description=description, quiet=self.quiet):
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
        # In one tensor: thousands of small ones, made between tiles, would keep the heap from using their places again.
        sums = torch.zeros(len(self.starts), device=device)
        for tile, (rows, columns, cosine, positive) in enumerate(self._tiles("best positives")):
            masked = cosine.where(positive, -torch.inf)
            best_N[rows] = best_N[rows].maximum(masked.amax(1))
            best_M[columns] = best_M[columns].maximum(masked.amax(0))
            of_positives = cosine[positive]
            sums[tile] = of_positives.sum()
            counts[0] += _binned(of_positives)
            counts[1] += _binned(cosine.flatten())
        best_N, best_M = (self._over_ranks(best, world.max_over_ranks) for best in (best_N, best_M))
        positives, everything = self._over_ranks(counts, world.sum_over_ranks).cpu().numpy()
        # In the order of the tiles, so that the sum is that of one process to the last bit.
        of_tiles = self._over_ranks(sums, _all_rows)
        edges = tuple(np.linspace(-1, 1, HISTOGRAM_BINS + 1).round(6).tolist())
        histogram = Histogram(edges, tuple(positives.tolist()), tuple((everything - positives).tolist()))
        positive_sum = float(of_tiles.cpu().double().sum())
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
        above_N, above_M = (self._over_ranks(above, world.sum_over_ranks) for above in (above_N, above_M))
        rank_N, rank_M = (
            torch.where(best.isfinite(), above + 1, 0).cpu().numpy()
            for best, above in ((best_N, above_N), (best_M, above_M))
        )
        return rank_N, rank_M

    def precision(
        self, by_text: bool, rank_Q: np.ndarray, positives_Q: np.ndarray, ks: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """float64 [Q] average precision and [Q, K] Precision@k of images or of texts as queries; NaN for those without
        a positive."""
        if positives_Q.max() <= 1:
            rank_Q = np.where(rank_Q > 0, rank_Q, np.nan)
            return 1 / rank_Q, np.where(np.isnan(rank_Q[:, None]), np.nan, (rank_Q[:, None] <= ks) / np.array(ks))
        queries, gallery = (self.text_MD, self.image_ND) if by_text else (self.image_ND, self.text_MD)
        query_group, gallery_group = self.row_group_N, self.column_group_M
        if by_text:
            query_group, gallery_group = gallery_group, query_group
        empty = torch.zeros(0, dtype=torch.float64, device=queries.device)
        found = [(empty, empty.reshape(0, len(ks)))]
        found += [
            precision_of(positive_ranks(cosine, query_group[rows, None] == gallery_group[None, :]), ks)
            for rows, cosine in strips(queries, gallery, self.who)
        ]
        average_Q, at_QK = (
            self._over_ranks(torch.cat(parts), _all_rows).cpu().numpy() for parts in zip(*found, strict=True)
        )
        return average_Q, at_QK

    def _over_ranks(self, values: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        if self.who.world_size == 1:
            return values
        return join(values.to(world.collective_device(values.device))).to(values.device)


def _all_rows(rows_bX: Tensor) -> Tensor:
    return world.gather_rows(rows_bX, equal=False)


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
    precise: tuple[np.ndarray, np.ndarray] | None,
    bootstrap: int,
    seed: int,
) -> Direction:
    asked = rank_Q > 0
    rank, positives = rank_Q[asked], positives_Q[asked]
    statistics = {f"R@{k}": mean_of(rank <= k) for k in ks} | {"median": median_of(rank)}
    if precise is not None:
        average_Q, at_QK = precise
        statistics |= {"mAP": mean_of(average_Q[asked])}
        statistics |= {f"P@{k}": mean_of(at_QK[asked, place]) for place, k in enumerate(ks)}
    found = estimates(statistics, unit_Q[asked], bootstrap=bootstrap, seed=seed)
    return Direction(
        queries=len(rank),
        gallery=gallery,
        recall={k: found[f"R@{k}"] for k in ks},
        chance={k: chance_of_recall(positives, gallery, k) for k in ks},
        median_rank=found["median"],
        mean_rank=float(rank.mean()),
        mean_reciprocal_rank=float((1 / rank).mean()),
        ranks_Q=rank_Q,
        mean_average_precision=found.get("mAP"),
        average_precision_Q=None if precise is None else precise[0],
        precision={k: found[f"P@{k}"] for k in ks} if precise is not None else {},
        positives=float(positives.mean()),
    )


def chance_of_recall(positives_Q: np.ndarray, gallery: int, k: int) -> float:
    """R@k of a random order: 1 - (chance of drawing k negatives in a row without replacement), mean over queries."""
    miss = np.ones(len(positives_Q))
    for drawn in range(min(k, gallery)):
        miss *= np.maximum(gallery - positives_Q - drawn, 0) / (gallery - drawn)
    return float(1 - miss.mean())


def _shared_texts(texts: Sequence[str], owner_M: np.ndarray) -> int:
    """Texts whose exact words another image bears too."""
    images_of = Counter(text for text, _ in set(zip(texts, owner_M.tolist(), strict=True)))
    return sum(images_of[text] > 1 for text in texts)
