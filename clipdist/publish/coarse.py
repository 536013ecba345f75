"""A copy of features in 8 bits, by which an exact search passes over nearly all rows.

Of a row its difference x from some centre is kept, as integers c from −127 to 127 and a scale s, with the length of
what that leaves out, ε ≥ |x − s·c|. For a query q, kept as t·d likewise with the rest f = q − t·d,

    x·q = s·t·(c·d) + s·c·f + (x − s·c)·q,    so    |x·q − s·t·(c·d)| ≤ (|x| + ε)·|f| + ε·|q|,

and c·d is exact in integers. What is left are the rows that this bound cannot exclude; they are looked at in full. The
centre's own product with q is the same for all rows, so it decides nothing. As centre serves the mean: the features of
many models lie close together, and what tells them apart is then smaller than the features are, and so is the bound.

N rows, D wide, Q queries.
"""

from pathlib import Path

import numpy as np

BLOCK_BYTES = 1 << 24
"""Of float32 rows that are worked upon at once."""
LEVELS = 127
ROUNDING = 1 + 1e-5
"""Lengths are multiplied by it, so that float32's rounding cannot make a bound too small."""


def rows_at_once(width: int) -> int:
    return max(1, BLOCK_BYTES // (4 * width))


def quantised(rows_ND: np.ndarray, centre_D: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [N, D], float32 [3, N]) of rows: c, and s, ε and |x|, the last two not too small; a row that is the centre
    has scale 0."""
    rows_ND = np.asarray(rows_ND, np.float32)
    whole_N = np.linalg.norm(rows_ND, axis=1)
    rows_ND = rows_ND - np.float32(centre_D)
    bounds_3N = np.empty((3, len(rows_ND)), np.float32)
    bounds_3N[0] = np.abs(rows_ND).max(axis=1) / LEVELS
    scale_N1 = bounds_3N[0][:, None]
    coarse_ND = np.rint(rows_ND / np.where(scale_N1 > 0, scale_N1, 1)).clip(-LEVELS, LEVELS)
    bounds_3N[2] = np.linalg.norm(rows_ND, axis=1) * ROUNDING
    # The second term is for what float32 loses of each value, here and where the centre is taken away.
    lost_N = 1e-6 * (whole_N + bounds_3N[2])
    bounds_3N[1] = np.linalg.norm(rows_ND - scale_N1 * coarse_ND, axis=1) * ROUNDING + lost_N
    return coarse_ND.astype(np.int8), bounds_3N


def mean_row(features_ND: np.ndarray) -> np.ndarray:
    """float32 [D]; equal features give equal ones."""
    step = rows_at_once(features_ND.shape[1])
    total_D = np.zeros(features_ND.shape[1])
    for start in range(0, len(features_ND), step):
        total_D += features_ND[start : start + step].sum(axis=0, dtype=np.float64)
    return (total_D / max(1, len(features_ND))).astype(np.float32)


def write_coarse(features_ND: np.ndarray, partial: Path) -> list[Path]:
    """Writes `<x>_coarse.npy.partial` and `<x>_bounds.npy.partial`; returns both."""
    beside = partial.with_name(partial.name.replace("_coarse", "_bounds"))
    coarse = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int8, shape=features_ND.shape)
    bounds = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=(3, len(features_ND)))
    step, centre_D = rows_at_once(features_ND.shape[1]), mean_row(features_ND)
    for start in range(0, len(features_ND), step):
        stop = start + step
        coarse[start:stop], bounds[:, start:stop] = quantised(features_ND[start:stop], centre_D)
    coarse.flush()
    bounds.flush()
    return [partial, beside]
