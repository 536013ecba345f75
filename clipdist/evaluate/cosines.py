"""Cosines of features, tile by tile in full float32, and what is ranked by them.

Suffixes of names: Q queries, G gallery items, P positives, D feature width; lower case: rows at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdist.data.order import share
from clipdist.errors import UserError
from clipdist.world import World

# float32 matrix products of bitwise equal rows differ by up to 3e-8 with the place of the row in its tile; cosines
# nearer than this are the same number, and a model that gives them cannot tell the two apart.
TIE_TOLERANCE = 1e-6
# Rows of cosines that are ranked whole are taken so many numbers at a time: 16 MiB.
_RANKED_AT_ONCE = 2**22

ALONE = World()

Array = np.ndarray | Tensor


def unit_rows(features: Array, what: str) -> Tensor:
    """Rows of length one, float32, on the device of `features`; a row of zeros stays zero.

    Raises `UserError` unless they are finite and of shape (rows, width).
    """
    tensor = torch.as_tensor(features).detach()
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(f"{what} features have shape {tuple(tensor.shape)}, expected (rows, width), neither of them 0")
    if not (finite := tensor.isfinite().all(dim=1)).all():
        raise UserError(
            f"{int((~finite).sum()):,} of {len(tensor):,} {what} feature rows hold NaN or infinity: "
            "the weights have diverged, or were read in a precision too low for them"
        )
    return torch.nn.functional.normalize(tensor.float(), dim=1)


def integers(values: Array | Sequence[int], name: str) -> np.ndarray:
    """int64, one per row; `UserError` for another shape or type."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{name} has shape {array.shape} and type {array.dtype}, expected one integer per row")
    return array.astype(np.int64)


def owners(text_owner_M: Array | Sequence[int], images: int, texts: int) -> np.ndarray:
    """int64 [M]: the row of each text's image, checked."""
    owner_M = integers(text_owner_M, "text_owner_M")
    if len(owner_M) != texts:
        raise UserError(f"text_owner_M has {len(owner_M):,} entries, expected {texts:,}: one per text")
    if owner_M.min() < 0 or owner_M.max() >= images:
        raise UserError(f"text_owner_M spans {owner_M.min()} to {owner_M.max()}, expected rows of {images:,} images")
    return owner_M


def same_width(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"{names[0]} features are {first.shape[1]} wide, {names[1]} features {second.shape[1]}: "
            "use one model's joint embedding for both"
        )


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
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


def strips(query_QD: Tensor, gallery_GD: Tensor, who: World = ALONE) -> Iterator[tuple[slice, Tensor]]:
    """Yields some queries and their whole rows of cosines, float32 [q, G]; memory O(G). Each rank gets a run of them,
    cut as for one process."""
    rows = max(1, _RANKED_AT_ONCE // len(gallery_GD))
    starts = range(0, len(query_QD), rows)
    with full_float32(query_QD.device.type):
        for start in starts[slice(*share(len(starts), who.rank, who.world_size))]:
            some = slice(start, min(start + rows, len(query_QD)))
            yield some, (query_QD[some] @ gallery_GD.T).clamp_(-1, 1)


def positive_ranks(cosine_qG: Tensor, positive_qG: Tensor) -> Tensor:
    """int64 [q, P]: the ranks of each query's positives, ascending, padded with 0; P is the most that a query has.

    The i-th best positive stands after i - 1 others and after every negative that reaches it: ties count against the
    model, as everywhere.
    """
    counts_q = positive_qG.sum(dim=1)
    P = int(counts_q.max())
    if P == 0:
        return counts_q.new_zeros(len(cosine_qG), 0)
    best_qP = cosine_qG.where(positive_qG, -torch.inf).topk(P, dim=1).values
    reached_qP = best_qP - TIE_TOLERANCE
    everything = cosine_qG.shape[1] - torch.searchsorted(_sorted(cosine_qG), reached_qP)
    positives = P - torch.searchsorted(best_qP.flip(1).contiguous(), reached_qP)
    place_P = torch.arange(1, P + 1, device=cosine_qG.device)
    return torch.where(place_P <= counts_q[:, None], place_P + everything - positives, 0)


def _sorted(rows_qG: Tensor) -> Tensor:
    # numpy sorts float32 on a CPU several times faster than torch, which keeps indices too.
    if rows_qG.device.type == "cpu":
        return torch.from_numpy(np.sort(rows_qG.numpy(), axis=1))
    return rows_qG.sort(dim=1).values


def precision_of(ranks_qP: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """float64 [q] average precision and [q, K] Precision@k of `positive_ranks`; NaN for queries without a positive.

    Average precision is the mean, over the positives, of the precision at each one's rank; Precision@k the share of
    positives among the first k, whatever the number of positives.
    """
    found_qP = ranks_qP > 0
    counts_q = found_qP.sum(dim=1).double()
    place_P = torch.arange(1, ranks_qP.shape[1] + 1, device=ranks_qP.device, dtype=torch.float64)
    average_q = torch.where(found_qP, place_P / ranks_qP.clamp(min=1), 0).sum(dim=1) / counts_q
    at_qK = torch.stack([((ranks_qP <= k) & found_qP).sum(dim=1).double() / k for k in ks], dim=1)
    return average_q, at_qK.where(counts_q[:, None] > 0, torch.nan)


def top_matches(
    query_features_QD: Array, gallery_features_GD: Array, k: int, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, gallery indices) of each query's `k` best matches, best first: float32 and int64, both (Q, min(k, G)).

    Features are normalised here. Memory beyond the features is O(chunk²).
    """
    query_QD, gallery_GD = unit_rows(query_features_QD, "query"), unit_rows(gallery_features_GD, "gallery")
    same_width(query_QD, gallery_GD, ("query", "gallery"))
    all_scores, all_indices = [], []
    with full_float32(query_QD.device.type):
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
