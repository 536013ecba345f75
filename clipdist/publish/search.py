"""Exact search: for each query the rows of greatest inner product, as a float64 computation over all rows would find.

First every row's product is bounded through its 8-bit copy (see coarse.py), a quarter of the bytes of float32; then the
few rows that may be among the best are computed in float64 from the stored float16. Ties go to the lower row. Memory
does not grow with the number of rows.

N rows, D wide, Q queries, B rows of a block.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from clipdist.errors import UserError
from clipdist.publish.coarse import LEVELS, quantised, rows_at_once

BLOCK_ENTRIES = 1 << 22
"""Products of a block, rows times queries: many, because each block makes the threads wait for each other."""
SMALLEST_BLOCK = 1 << 12
QUERIES_AT_ONCE = 256
SLACK = 2.0**-20
"""Share of |x|·|q| that float32 arithmetic of the estimates may be off by, and more."""


@dataclass(frozen=True)
class Found:
    """The best rows of each query, best first."""

    rows: list[np.ndarray]  # int64
    scores: list[np.ndarray]  # float64: inner products
    looked_at: int  # rows that were computed in full, over all queries


def search_exact(
    features_ND: np.ndarray, coarse_ND: np.ndarray, bounds_3N: np.ndarray, query_QD: np.ndarray, top: int
) -> Found:
    """`top` rows for each query, or all where there are fewer.

    Takes what a gallery's files hold, mapped or not. Raises `UserError` for queries of another width or that are not
    finite.
    """
    query_QD = check_queries(query_QD, features_ND.shape[1], top)
    rows: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    looked_at = 0
    for start in range(0, len(query_QD), QUERIES_AT_ONCE):
        some_QD = query_QD[start : start + QUERIES_AT_ONCE]
        for query_D, candidates in zip(some_QD, _candidates(coarse_ND, bounds_3N, some_QD, top), strict=True):
            looked_at += len(candidates)
            score = exact_scores(features_ND, candidates, query_D)
            best = np.lexsort((candidates, -score))[:top]
            rows.append(candidates[best])
            scores.append(score[best])
    return Found(rows, scores, looked_at)


def check_queries(query_QD: np.ndarray, width: int, top: int) -> np.ndarray:
    """float64 [Q, D]."""
    query_QD = np.asarray(query_QD, np.float64)
    if query_QD.ndim != 2 or query_QD.shape[1] != width:
        raise UserError(f"queries: found shape {list(query_QD.shape)}, expected [Q, {width}]")
    if not np.isfinite(query_QD).all():
        raise UserError("queries: found values that are not finite; expected unit vectors")
    if top < 1:
        raise UserError(f"top: found {top}, expected 1 or more")
    return query_QD


def exact_scores(features_ND: np.ndarray, rows: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """float64 inner products of some rows; equal rows have equal ones, wherever they stand."""
    step = rows_at_once(features_ND.shape[1])
    parts = [
        # Not a matrix product: its sums depend on where a row stands in a block.
        (features_ND[rows[start : start + step]].astype(np.float64) * query_D).sum(axis=1)
        for start in range(0, len(rows), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


class _Best:
    """What is left of one query's rows: those whose upper bound reaches the `top`-th greatest lower bound."""

    def __init__(self, top: int) -> None:
        self.top, self.threshold = top, -np.inf
        self.rows, self.lower, self.upper = np.zeros(0, np.int64), np.zeros(0), np.zeros(0)

    def add(self, rows: np.ndarray, estimate: np.ndarray, off: np.ndarray) -> None:
        """Products of `rows` lie within `off` of `estimate`."""
        self.rows = np.concatenate([self.rows, rows])
        self.lower = np.concatenate([self.lower, estimate - off])
        self.upper = np.concatenate([self.upper, estimate + off])
        if len(self.rows) > self.top:
            self.threshold = float(np.partition(self.lower, -self.top)[-self.top])
            kept = self.upper >= self.threshold
            self.rows, self.lower, self.upper = self.rows[kept], self.lower[kept], self.upper[kept]


def _candidates(coarse_ND: np.ndarray, bounds_3N: np.ndarray, query_QD: np.ndarray, top: int) -> list[np.ndarray]:
    """For each query the rows, in order, that may be among its best."""
    direction_QD, (scale_Q, rest_Q, length_Q) = quantised(query_QD)
    unit_DQ = torch.from_numpy(direction_QD).t()
    scale_Q = np.where(scale_Q > 0, scale_Q, 1).astype(np.float64)
    best = [_Best(top) for _ in query_QD]
    step = max(SMALLEST_BLOCK, BLOCK_ENTRIES // len(query_QD))

    def off(error: np.ndarray, length: np.ndarray, query: int | slice) -> np.ndarray:
        """How much a product may differ from its estimate."""
        rest, whole = rest_Q[query].astype(np.float64), length_Q[query].astype(np.float64)
        return error.astype(np.float64) * (whole + rest) + length.astype(np.float64) * (rest + SLACK * whole)

    for start in range(0, len(coarse_ND), step):
        scale_B, error_B, length_B = bounds_3N[:, start : start + step]
        product_BQ = int_product(torch.from_numpy(coarse_ND[start : start + step]), unit_DQ)
        # In units of the query's scale.
        estimate_BQ = product_BQ * torch.from_numpy(scale_B)[:, None]
        off_Q = off(error_B.max(), length_B.max(), slice(None))
        threshold_Q = np.array([one.threshold for one in best])
        if start == 0 and len(estimate_BQ) > top:
            # The first block's own best estimates exclude most of its rows at once.
            threshold_Q = _reached(estimate_BQ, top).double().numpy() * scale_Q - off_Q
        floor_Q = ((threshold_Q - off_Q) / scale_Q).astype(np.float32)
        queries, rows = (estimate_BQ.t() >= torch.from_numpy(floor_Q)[:, None]).nonzero().t().numpy()
        ends = np.searchsorted(queries, np.arange(len(best)), side="right").tolist()
        for query, (begin, end) in enumerate(pairwise([0, *ends])):
            if begin < end:
                own = rows[begin:end]
                estimate = estimate_BQ[own, query].double().numpy() * scale_Q[query]
                best[query].add(own + start, estimate, off(error_B[own], length_B[own], query))
    return [np.sort(one.rows) for one in best]


def _reached(estimate_BQ: torch.Tensor, top: int) -> torch.Tensor:
    """[Q]: what at least `top` rows reach. The greatest of runs of rows stand for all: one pass, no sort."""
    runs = max(top, SMALLEST_BLOCK)
    length = len(estimate_BQ) // runs
    if length > 1:
        estimate_BQ = estimate_BQ[: runs * length].unflatten(0, (runs, length)).amax(1)
    return estimate_BQ.topk(top, dim=0).values[-1]


_INTEGER_KERNEL: list[bool] = []


def int_product(coarse_BD: torch.Tensor, unit_DQ: torch.Tensor) -> torch.Tensor:
    """int8 [B, D] times int8 [D, Q], exactly; int32, or float32 where this processor's integer kernel saturates."""
    if not _INTEGER_KERNEL:
        # Without VNNI some kernels add pairs of products in 16 bits, which 2·127² overflows.
        extreme = torch.full((16, 64), LEVELS, dtype=torch.int8)
        expected = 64 * LEVELS**2
        signs = [torch._int_mm(a, b.t()) for a in (extreme, -extreme) for b in (extreme, -extreme)]
        right = [bool((made == sign * expected).all()) for made, sign in zip(signs, (1, -1, -1, 1), strict=True)]
        _INTEGER_KERNEL.append(all(right))
    if _INTEGER_KERNEL[0]:
        return torch._int_mm(coarse_BD, unit_DQ)
    return coarse_BD.float() @ unit_DQ.float()
