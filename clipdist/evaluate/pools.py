"""Retrieval in small galleries, as published: in batches of k, and of one image against k captions.

Such scores rise as the gallery shrinks. They are comparable only with others of the same k, and never with those over
a whole gallery (`retrieval_scores`); so each carries the size of its gallery and the level of chance in it.

Suffixes of names: N images, M texts, k rows of a batch or captions of a pool, D feature width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdist.errors import UserError
from clipdist.evaluate.cosines import TIE_TOLERANCE, Array, full_float32, integers, owners, same_width, unit_rows
from clipdist.evaluate.estimates import (
    Estimate,
    Statistic,
    aligned,
    cell,
    estimates,
    ratio_of,
    unit_numbers,
    without_nan,
)
from clipdist.evaluate.retrieval import chance_of_recall

_NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True)
class BatchScores:
    """Means over batches of `batch` pairs, and so over galleries of that many. `unknowing_loss` is ln(batch), which a
    model scores that answers the same to everything; `scale` is 1/temperature, on which the loss depends."""

    batch: int
    batches: int
    queries: int
    recall: dict[str, dict[int, Estimate]]  # direction -> k -> R@k
    chance: dict[int, float]
    loss: Estimate
    scale: float

    @property
    def unknowing_loss(self) -> float:
        return math.log(self.batch)

    def to_dict(self) -> dict[str, Any]:
        directions = {
            way: {f"R@{k}": {**one.to_dict(), "chance": self.chance[k]} for k, one in recall.items()}
            for way, recall in self.recall.items()
        }
        counts = {"batch": self.batch, "gallery": self.batch, "batches": self.batches, "queries": self.queries}
        loss = {"loss": self.loss.to_dict(), "unknowing_loss": self.unknowing_loss, "scale": self.scale}
        return without_nan({**counts, **directions, **loss})

    def table(self) -> str:
        """Plain text, the size of the gallery beside every score."""
        rows = [["in batches", "queries", "gallery", *(f"R@{k}" for k in self.chance)]]
        for name, way in (("image → text", "image_to_text"), ("text → image", "text_to_image")):
            recalls = [cell(self.recall[way][k]) for k in self.chance]
            rows.append([name, f"{self.queries:,}", f"{self.batch:,}", *recalls])
        rows.append(["  by chance", "", "", *(f"{chance:.2g}" for chance in self.chance.values())])
        loss = (
            f"loss in batches of {self.batch}: {cell(self.loss, '.4f')}; "
            f"ln {self.batch} = {self.unknowing_loss:.4f} knows nothing"
        )
        return "\n".join([*aligned(rows), loss])


@dataclass(frozen=True)
class PoolScores:
    """One image against `pool` captions: its own, and others of another text and group. `top[k]` is the share of
    images whose own caption is among the first k."""

    pool: int
    repeats: int
    queries: int
    top: dict[int, Estimate]
    chance: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        counts = {"pool": self.pool, "gallery": self.pool, "repeats": self.repeats, "queries": self.queries}
        top = {f"top-{k}": {**one.to_dict(), "chance": self.chance[k]} for k, one in self.top.items()}
        return without_nan({**counts, **top})

    def table(self) -> str:
        rows = [["in pools", "queries", "gallery", *(f"top-{k}" for k in self.top)]]
        rows.append(["image → text", f"{self.queries:,}", f"{self.pool:,}", *(cell(one) for one in self.top.values())])
        rows.append(["  by chance", "", "", *(f"{chance:.2g}" for chance in self.chance.values())])
        return "\n".join(aligned(rows))


def in_batch_scores(
    image_features_ND: Array,
    text_features_MD: Array,
    text_owner_M: Array | Sequence[int],
    *,
    batch: int = 32,
    scale: float,
    group_N: Array | Sequence[int] | None = None,
    units: Sequence[Any] | np.ndarray | None = None,
    ks: Sequence[int] = (1, 5, 10),
    repeats: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
) -> BatchScores:
    """Mean recall, and mean InfoNCE loss at `scale` (1/temperature), of shuffled batches of `batch` pairs.

    The images that have a text are shuffled and cut into batches, `repeats` times; what is left over of each shuffle is
    dropped. An image goes with one of its texts, drawn anew each time. Positives are a pair's own, and those of equal
    `group_N`. Everything drawn follows from `seed`. Ties count against the model. The loss is symmetric, as in training
    with equal weights of both directions and without label smoothing.

    Intervals resample units of images, each with all the batches that it stood in. Memory beyond the features is
    O(N + batch²). Raises `UserError` for fewer images than a batch holds.
    """
    image_ND, text_MD, owner_M, unit_N = _checked(image_features_ND, text_features_MD, text_owner_M, units)
    N = len(image_ND)
    group = torch.arange(N) if group_N is None else torch.from_numpy(integers(group_N, "group_N"))
    asked = np.unique(owner_M)
    if batch < 2 or len(asked) < batch:
        raise UserError(f"batches of {batch}: found {len(asked):,} images with a text; expected 2 to that many")
    ks = [k for k in sorted(set(ks)) if k < batch]
    device = image_ND.device
    sums = {name: np.zeros(N) for name in ("loss", *(f"{way} {k}" for way in ("image", "text") for k in ks))}
    counts_N, positives = np.zeros(N), []
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        text_of_N = _one_text_each(owner_M, N, rng)
        rows = rng.permutation(asked)[: len(asked) // batch * batch].reshape(-1, batch)
        counts_N[rows] += 1
        for some in np.array_split(rows, math.ceil(rows.size * batch / _NUMBERS_AT_ONCE) or 1):
            images, texts = (torch.from_numpy(a[some]).to(device) for a in (np.arange(N), text_of_N))
            same = group[some][:, :, None] == group[some][:, None, :]
            ranks, loss = _ranked_batches(image_ND[images], text_MD[texts], same.to(device), scale)
            sums["loss"][some] += loss.cpu().numpy()
            for way, rank in ranks.items():
                for k in ks:
                    sums[f"{way} {k}"][some] += (rank <= k).cpu().numpy()
            positives.append(same.sum(dim=2).flatten().numpy())
    statistics = {name: ratio_of(sum_N[asked], counts_N[asked]) for name, sum_N in sums.items()}
    found = estimates(statistics, unit_N[asked], bootstrap=bootstrap, seed=seed)
    return BatchScores(
        batch=batch,
        batches=repeats * (len(asked) // batch),
        queries=len(asked),
        recall={
            f"{way}_to_{other}": {k: found[f"{way} {k}"] for k in ks}
            for way, other in (("image", "text"), ("text", "image"))
        },
        chance={k: chance_of_recall(np.concatenate(positives), batch, k) for k in ks},
        loss=found["loss"],
        scale=scale,
    )


def pool_scores(
    image_features_ND: Array,
    text_features_MD: Array,
    text_owner_M: Array | Sequence[int],
    texts: Sequence[str],
    *,
    pool: int = 50,
    group_N: Array | Sequence[int] | None = None,
    units: Sequence[Any] | np.ndarray | None = None,
    ks: Sequence[int] = (1, 5),
    repeats: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
) -> PoolScores:
    """Each image that has a text against `pool` captions, `repeats` times: one of its own, drawn, and `pool` - 1 drawn
    without replacement from the distinct texts that no image of its group bears.

    Everything drawn follows from `seed`. Ties count against the model. Intervals resample units of images, each with
    all its pools. Memory beyond the features is O(N + M); nothing of N x M is held.

    Raises `UserError` where the set has too few texts that are wrong for an image.
    """
    image_ND, text_MD, owner_M, unit_N = _checked(image_features_ND, text_features_MD, text_owner_M, units)
    N = len(image_ND)
    if len(texts) != len(text_MD):
        raise UserError(f"texts has {len(texts):,} entries, expected {len(text_MD):,}: one per row of the features")
    group = np.arange(N) if group_N is None else np.unique(integers(group_N, "group_N"), return_inverse=True)[1]
    first_T, distinct_M = _distinct(texts)
    wrong = _WrongTexts(group, group[owner_M], distinct_M, len(first_T), pool - 1)
    asked = np.unique(owner_M)
    ks = [k for k in sorted(set(ks)) if k < pool]
    hits_NK = np.zeros((N, len(ks)))
    rng = np.random.default_rng(seed)
    rows = max(1, _NUMBERS_AT_ONCE // (pool * image_ND.shape[1]))
    for _ in range(repeats):
        text_of_N = _one_text_each(owner_M, N, rng)
        for start in range(0, len(asked), rows):
            some = asked[start : start + rows]
            pools = np.stack([first_T[wrong.draw(image, rng)] for image in some])
            with full_float32(image_ND.device.type):
                own = (image_ND[some] * text_MD[text_of_N[some]]).sum(dim=1)
                others = torch.einsum("nd,nkd->nk", image_ND[some], text_MD[pools])
            rank = 1 + (others >= own[:, None] - TIE_TOLERANCE).sum(dim=1).cpu().numpy()
            hits_NK[some] += rank[:, None] <= np.array(ks)
    repeats_N = np.full(len(asked), repeats)
    statistics: dict[int, Statistic] = {k: ratio_of(hits_NK[asked, place], repeats_N) for place, k in enumerate(ks)}
    found = estimates({str(k): one for k, one in statistics.items()}, unit_N[asked], bootstrap=bootstrap, seed=seed)
    return PoolScores(pool, repeats, len(asked), {k: found[str(k)] for k in ks}, {k: k / pool for k in ks})


class _WrongTexts:
    """Draws distinct texts that no image of an image's group bears."""

    def __init__(self, group_N: np.ndarray, group_M: np.ndarray, distinct_M: np.ndarray, T: int, count: int) -> None:
        self.group_N, self.T, self.count = group_N, T, count
        borne = np.unique(np.stack([group_M, distinct_M]), axis=1)
        groups = np.arange(group_N.max() + 2)
        self.starts, self.borne = np.searchsorted(borne[0], groups), borne[1]
        most = np.diff(self.starts).max()
        if count < 1 or T - most < count:
            raise UserError(
                f"a pool of {count + 1}: found {T:,} distinct texts, of which an image's group bears up to {most:,}; "
                f"expected 2 to {T - most + 1:,}: choose a smaller pool, or narrower groups"
            )

    def draw(self, image: int, rng: np.random.Generator) -> np.ndarray:
        group = self.group_N[image]
        borne = self.borne[self.starts[group] : self.starts[group + 1]]
        # Numbers of a list without the borne ones; each is put back past those that stand before it.
        drawn = rng.choice(self.T - len(borne), self.count, replace=False, shuffle=False)
        return drawn + np.searchsorted(borne - np.arange(len(borne)), drawn, side="right")


def _ranked_batches(
    image_nkD: Tensor, text_nkD: Tensor, same_nkk: Tensor, scale: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Ranks [n, k] of each image's and each text's best positive, and each pair's share of the loss, float64 [n, k]."""
    with full_float32(image_nkD.device.type):
        cosine = torch.bmm(image_nkD, text_nkD.transpose(1, 2))
    ranks = {}
    for way, rows, right in (("image", cosine, same_nkk), ("text", cosine.transpose(1, 2), same_nkk.transpose(1, 2))):
        best = rows.where(right, -torch.inf).amax(dim=2, keepdim=True)
        ranks[way] = 1 + ((rows >= best - TIE_TOLERANCE) & ~right).sum(dim=2)
    logits = scale * cosine.double()
    target = same_nkk / same_nkk.sum(dim=2, keepdim=True)
    by_image = logits.logsumexp(dim=2) - (target * logits).sum(dim=2)
    by_text = logits.logsumexp(dim=1) - (target * logits).sum(dim=1)
    return ranks, (by_image + by_text) / 2


def _one_text_each(owner_M: np.ndarray, N: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [N]: one of each image's texts at random, -1 for an image without one."""
    order = rng.permutation(len(owner_M))
    text_of_N = np.full(N, -1)
    text_of_N[owner_M[order]] = order  # of several, the last written stays
    return text_of_N


def _distinct(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(the row of each distinct text's first bearer, the number of each row's distinct text)."""
    numbers: dict[str, int] = {}
    number_M = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    return np.unique(number_M, return_index=True)[1], number_M


def _checked(
    image_features_ND: Array,
    text_features_MD: Array,
    text_owner_M: Array | Sequence[int],
    units: Sequence[Any] | np.ndarray | None,
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    image_ND, text_MD = unit_rows(image_features_ND, "image"), unit_rows(text_features_MD, "text")
    same_width(image_ND, text_MD, ("image", "text"))
    owner_M = owners(text_owner_M, len(image_ND), len(text_MD))
    return image_ND, text_MD, owner_M, unit_numbers(units, len(image_ND))
