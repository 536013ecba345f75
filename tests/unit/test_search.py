"""Exact search against a plain float64 computation over all rows; the index that is not exact against the exact one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.errors import UserError
from clipdist.publish import search
from clipdist.publish.coarse import mean_row, quantised
from clipdist.publish.search import exact_scores, int_product, search_exact


def brute_force(features_ND: np.ndarray, query_D: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and float64 products, by a sort of all of them."""
    score_N = (features_ND.astype(np.float64) * query_D.astype(np.float64)).sum(axis=1)
    best = sorted(range(len(score_N)), key=lambda row: (-score_N[row], row))[:top]
    return np.array(best, np.int64), score_N[best]


def coarse(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As a gallery holds them."""
    return quantised(features_ND, mean_row(features_ND))


def unit_rows(draw: np.random.Generator, rows: int, width: int, spread: float = 1.0) -> np.ndarray:
    """float16 rows around one direction; spread 0: all equal."""
    rows_ND = draw.normal(size=width) + spread * draw.normal(size=(rows, width))
    return (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 400),
    width=st.sampled_from([1, 2, 3, 16, 33, 128]),
    queries=st.integers(1, 5),
    top=st.integers(1, 30),
    spread=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
    copies=st.booleans(),
)
def test_the_best_rows_are_those_of_float64(
    seed: int, rows: int, width: int, queries: int, top: int, spread: float, copies: bool
) -> None:
    draw = np.random.default_rng(seed)
    features_ND = unit_rows(draw, rows, width, spread)
    if copies:  # equal rows far apart: ties, which go to the lower row
        features_ND[draw.integers(0, rows, rows)] = features_ND[draw.integers(0, rows, rows)]
    query_QD = draw.normal(size=(queries, width)).astype(np.float32)
    query_QD[0] = features_ND[0]
    found = search_exact(features_ND, *coarse(features_ND), query_QD, top)
    for query_D, own, scores in zip(query_QD, found.rows, found.scores, strict=True):
        expected, expected_scores = brute_force(features_ND, query_D, top)
        np.testing.assert_array_equal(own, expected)
        np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("value", [0.0, 6e-8, 65504.0])
def test_odd_rows_and_queries(value: float) -> None:
    """Zeros, the smallest and the largest of float16, beside ordinary rows; a query of zeros ties with everything."""
    features_ND = unit_rows(np.random.default_rng(0), 50, 8)
    features_ND[::7] = value
    query_QD = np.stack([np.zeros(8), np.ones(8), features_ND[1].astype(np.float64)])
    found = search_exact(features_ND, *coarse(features_ND), query_QD, 9)
    for query_D, own in zip(query_QD, found.rows, strict=True):
        np.testing.assert_array_equal(own, brute_force(features_ND, query_D, 9)[0])
    np.testing.assert_array_equal(found.rows[0], np.arange(9))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([1, 7, 64, 1500]), spread=st.sampled_from([0.0, 0.1, 1.0]))
def test_no_product_lies_outside_its_bound(seed: int, width: int, spread: float) -> None:
    draw = np.random.default_rng(seed)
    features_ND = unit_rows(draw, 40, width, spread)
    query_D = draw.normal(size=width)
    centre_D = mean_row(features_ND)
    coarse_ND, (scale_N, error_N, length_N) = quantised(features_ND, centre_D)
    unit_1D, ((scale,), (rest,), (length,)) = quantised(query_D[None])
    estimate_N = scale_N.astype(np.float64) * float(scale) * (coarse_ND.astype(np.int64) @ unit_1D[0].astype(np.int64))
    off_N = error_N.astype(np.float64) * (length + rest) + length_N * float(rest)
    product_N = (features_ND.astype(np.float64) - centre_D.astype(np.float64)) @ query_D
    assert (np.abs(product_N - estimate_N) <= off_N).all()


@pytest.mark.parametrize("spread", [10.0, 0.1, 0.02])
def test_many_blocks_and_queries_few_rows_looked_at(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """Also where rows have cosines beyond .99 with each other, as those of a model that has hardly learnt."""
    monkeypatch.setattr(search, "SMALLEST_BLOCK", 64)
    monkeypatch.setattr(search, "BLOCK_ENTRIES", 700)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 7)
    draw = np.random.default_rng(3)
    features_ND = unit_rows(draw, 5000, 64, spread)
    query_QD = unit_rows(draw, 20, 64, 10.0).astype(np.float32)
    found = search_exact(features_ND, *coarse(features_ND), query_QD, 10)
    for query_D, own in zip(query_QD, found.rows, strict=True):
        np.testing.assert_array_equal(own, brute_force(features_ND, query_D, 10)[0])
    assert found.looked_at < 0.1 * 20 * 5000, "the bounds exclude nearly all rows"


def test_a_processor_without_an_exact_integer_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    a, b = (torch.from_numpy(draw.integers(-127, 128, (30, 77), dtype=np.int8)) for _ in range(2))
    expected = a.long() @ b.long().t()
    assert (int_product(a, b.t()).long() == expected).all()
    exact = torch._int_mm
    monkeypatch.setattr(search, "_INTEGER_KERNEL", [])
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: exact(x, y).clamp(-(2**15), 2**15 - 1))
    assert (int_product(a, b.t()).long() == expected).all()


def test_what_cannot_be_searched_for() -> None:
    features_ND = unit_rows(np.random.default_rng(0), 5, 4)
    held = features_ND, *coarse(features_ND)
    for wrong, said in (
        (np.ones((1, 3)), "expected \\[Q, 4\\]"),
        (np.ones(4), "expected \\[Q, 4\\]"),
        (np.full((1, 4), np.nan), "not finite"),
    ):
        with pytest.raises(UserError, match=said):
            search_exact(*held, wrong, 3)
    with pytest.raises(UserError, match="expected 1 or more"):
        search_exact(*held, np.ones((1, 4)), 0)
    assert search_exact(*held, np.ones((0, 4)), 3).rows == []


class Gallery:
    """As much of a gallery as an index asks for."""

    kinds = ("image",)

    def __init__(self, folder: Path, features_ND: np.ndarray) -> None:
        self.folder, self.features_ND = folder, features_ND

    def features(self, among: str) -> np.ndarray:
        return self.features_ND

    def coarse(self, among: str) -> tuple[np.ndarray, np.ndarray]:
        return coarse(self.features_ND)

    def digest(self, among: str) -> str:
        return str(hash(self.features_ND.tobytes()))


def test_an_index_is_measured_and_kept(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    from clipdist.publish.approximate import ApproximateIndex

    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, 32))
    features_ND = centres[draw.integers(0, 40, 3000)] + 0.5 * draw.normal(size=(3000, 32))
    features_ND = (features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)).astype(np.float16)
    stored = Gallery(tmp_path, features_ND)
    made = ApproximateIndex(stored)  # type: ignore[arg-type]
    assert made.measured.recall >= 0.95
    assert 1 <= made.measured.probes <= made.measured.lists
    query_QD = features_ND[:50].astype(np.float32)
    exact = search_exact(features_ND, *coarse(features_ND), query_QD, 10)
    found = made.search(query_QD, 10)
    right = [len(np.intersect1d(a, b)) for a, b in zip(exact.rows, found.rows, strict=True)]
    assert sum(right) / 500 > 0.9
    for own, scores, query_D in zip(found.rows, found.scores, query_QD, strict=True):
        np.testing.assert_array_equal(scores, exact_scores(features_ND, own, query_D.astype(np.float64)))
    stamp = (tmp_path / "image.faiss").stat().st_mtime_ns
    again = ApproximateIndex(stored)  # type: ignore[arg-type]
    assert (tmp_path / "image.faiss").stat().st_mtime_ns == stamp, "read, not made again"
    assert again.measured == made.measured
    for a, b in zip(again.search(query_QD, 10).rows, found.rows, strict=True):
        np.testing.assert_array_equal(a, b)
    size = (tmp_path / "image.faiss").stat().st_size
    for damaged in (b"cut off", b"\0" * size):
        (tmp_path / "image.faiss").unlink()  # it is mapped
        (tmp_path / "image.faiss").write_bytes(damaged)
        ApproximateIndex(stored)  # type: ignore[arg-type]
        assert (tmp_path / "image.faiss").read_bytes() != damaged, "what cannot be read is made again"
    ApproximateIndex(Gallery(tmp_path, features_ND[::-1].copy()))  # type: ignore[arg-type]
    assert (tmp_path / "image.faiss").stat().st_mtime_ns != stamp, "of other features it is made again"
    with pytest.raises(UserError, match="below 1,000"):
        ApproximateIndex(Gallery(tmp_path, features_ND[:900]))  # type: ignore[arg-type]
