"""The work of the contrastive losses on tiles of logits, in PyTorch; `kernel.py` does the same in Triton.

b = rows on this rank, B = rows in the global batch, D = width; n × m = a tile of logits: n rows of one side, m of the
other.

A rank needs the logits of its own images with all texts, and of its own texts with all images. Where both are its own,
in a square of b × b, they are the same numbers, so each tile there serves both directions. Tiles live in two buffers
that are used again and again: memory that comes fresh from the system costs more than the arithmetic.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows and columns of a tile. On a CPU it and its buffer stay in a core's own cache; a GPU wants more work at a time.
TILES = {"cpu": (1024, 256), "cuda": (8192, 4096)}


class Sides(NamedTuple):
    """This rank's features and everyone's, and where its own rows lie in the global batch."""

    image_bD: Tensor
    text_bD: Tensor
    image_BD: Tensor
    text_BD: Tensor
    own: slice


class _Tile(NamedTuple):
    """Where a tile lies: `rows` among this rank's rows of one side, `columns` among all rows of the other side, and,
    when these are this rank's too, `mine` among its own."""

    image_rows: bool
    rows: slice
    columns: slice
    mine: slice | None


def tile_shape(device: torch.device, columns: int | None) -> tuple[int, int]:
    """Rows and columns of a tile; `columns` as the recipe asks for them, None for the default."""
    rows, usual = TILES.get(device.type, TILES["cuda"])
    return rows, columns or usual


def _tiles(sides: Sides, shape: tuple[int, int]) -> Iterator[_Tile]:
    """Every tile that this rank needs, each once: its images with all texts, its texts with the others' images."""
    b, own, columns_at_a_time = len(sides.image_bD), sides.own, shape[1]
    others = [*_runs(0, own.start, columns_at_a_time), *_runs(own.stop, len(sides.image_BD), columns_at_a_time)]
    mine = list(_runs(own.start, own.stop, columns_at_a_time))
    for rows in _runs(0, b, shape[0]):
        for columns in mine:
            yield _Tile(True, rows, columns, slice(columns.start - own.start, columns.stop - own.start))
        for columns in others:
            yield _Tile(True, rows, columns, None)
            yield _Tile(False, rows, columns, None)


def _runs(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


class _Logits:
    """Computes tiles of scaled logits in `sides`, in a buffer that the next tile overwrites."""

    def __init__(self, sides: Sides, scale: Tensor, shape: tuple[int, int]) -> None:
        self.sides, self.wide = sides, scale.dtype
        self.scaled = {True: sides.image_bD.to(self.wide) * scale, False: sides.text_bD.to(self.wide) * scale}
        size = min(shape[0], len(sides.image_bD)) * min(shape[1], len(sides.image_BD))
        self._buffers = sides.image_bD.new_empty((2, size), dtype=self.wide)

    def others(self, tile: _Tile) -> Tensor:
        """[m, D]: the features that the tile's columns stand for."""
        return (self.sides.text_BD if tile.image_rows else self.sides.image_BD)[tile.columns].to(self.wide)

    def __call__(self, tile: _Tile, others_mD: Tensor) -> Tensor:
        rows_nD = self.scaled[tile.image_rows][tile.rows]
        return torch.mm(rows_nD, others_mD.T, out=self._buffer(0, len(rows_nD), len(others_mD)))

    def spare(self, like_nm: Tensor) -> Tensor:
        """A second buffer of a tile's shape; what it holds is of no meaning."""
        return self._buffer(1, *like_nm.shape)

    def _buffer(self, number: int, rows: int, columns: int) -> Tensor:
        return self._buffers[number, : rows * columns].view(rows, columns)


class _Running:
    """Log-sum-exps that grow tile by tile: the largest logit so far, and the sum relative to it."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.largest = like.new_full((rows,), -torch.inf)
        self.total = like.new_zeros(rows)

    def add(self, where: slice, logits_nm: Tensor, buffer_nm: Tensor, dim: int) -> None:
        """Takes in a tile; `dim` is the one that is summed over."""
        largest, total = self.largest[where], self.total[where]
        now = torch.maximum(largest, logits_nm.amax(dim))
        shifted = torch.sub(logits_nm, now.unsqueeze(dim), out=buffer_nm).exp_()
        total.mul_(largest.sub_(now).exp_()).add_(shifted.sum(dim))
        largest.copy_(now)

    def result(self) -> Tensor:
        return self.total.log() + self.largest


def log_sum_exps(sides: Sides, scale: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(log Σ_j exp(s·I_i·T_j), log Σ_j exp(s·T_i·I_j)) for this rank's rows i and all j, [b] each, dtype of `scale`."""
    logits, b = _Logits(sides, scale, shape), len(sides.image_bD)
    rows, columns = _Running(b, scale), _Running(b, scale)
    for place in _tiles(sides, shape):
        z_nm = logits(place, logits.others(place))
        (rows if place.image_rows else columns).add(place.rows, z_nm, logits.spare(z_nm), 1)
        if place.mine is not None:
            columns.add(place.mine, z_nm, logits.spare(z_nm), 0)
    return rows.result(), columns.result()


def softmax_pulls(
    sides: Sides, scale: Tensor, row_lse_B: Tensor, column_lse_B: Tensor, weight: float, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(Σ_j p_ij·T_j, Σ_j p_ji·I_j) for this rank's rows i, [b, D] each, where
    p_ij = w·exp(s·I_i·T_j − row_lse_i) + (1 − w)·exp(s·I_i·T_j − column_lse_j)."""
    logits = _Logits(sides, scale, shape)
    pulls = {True: torch.zeros_like(logits.scaled[True]), False: torch.zeros_like(logits.scaled[False])}
    for place in _tiles(sides, shape):
        others_mD = logits.others(place)
        own_lse_B, other_lse_B = (row_lse_B, column_lse_B) if place.image_rows else (column_lse_B, row_lse_B)
        own_weight = weight if place.image_rows else 1 - weight
        z_nm = logits(place, others_mD)
        own_lse_n1 = own_lse_B[sides.own][place.rows][:, None]
        p_nm = torch.sub(z_nm, own_lse_n1, out=logits.spare(z_nm)).exp_().mul_(own_weight)
        p_nm.add_(z_nm.sub_(other_lse_B[place.columns]).exp_(), alpha=1 - own_weight)
        _pull(pulls, sides, place, p_nm, others_mD)
    return pulls[True], pulls[False]


def sigmoid_sums(
    sides: Sides, scale: Tensor, bias: Tensor, group_B: Tensor | None, shape: tuple[int, int], wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over this rank's images i and all texts j, with y_ij = ±1, z_ij = s·I_i·T_j + bias and
    q_ij = −y_ij·σ(−y_ij·z_ij): (−Σ log σ(y_ij·z_ij), Σ_j q_ij·T_j [b, D], for this rank's texts i Σ_j q_ji·I_j
    [b, D], Σ_ij q_ij). Without `wants_grad` only the first is computed."""
    logits = _Logits(sides, scale, shape)
    pulls = {True: torch.zeros_like(logits.scaled[True]), False: torch.zeros_like(logits.scaled[False])}
    total, bias_grad = scale.new_zeros(()), scale.new_zeros(())
    identity_B = torch.arange(len(sides.image_BD), device=scale.device) if group_B is None else group_B
    for place in _tiles(sides, shape):
        if not wants_grad and not place.image_rows:
            continue
        others_mD = logits.others(place)
        z_nm = logits(place, others_mD).add_(bias)
        same_nm = identity_B[sides.own][place.rows][:, None] == identity_B[place.columns]
        signed_nm = torch.where(same_nm, z_nm, -z_nm)
        if place.image_rows:
            total -= F.logsigmoid(signed_nm).sum()
        if wants_grad:
            q_nm = torch.sigmoid(-signed_nm)
            q_nm = torch.where(same_nm, -q_nm, q_nm)
            _pull(pulls, sides, place, q_nm, others_mD)
            if place.image_rows:
                bias_grad += q_nm.sum()
    return total, pulls[True], pulls[False], bias_grad


def _pull(pulls: dict[bool, Tensor], sides: Sides, place: _Tile, p_nm: Tensor, others_mD: Tensor) -> None:
    """Adds p·others to the tile's rows and, where its columns are this rank's too, pᵀ·rows to those."""
    pulls[place.image_rows][place.rows].addmm_(p_nm, others_mD)
    if place.mine is not None:
        rows_nD = sides.image_bD[place.rows].to(p_nm.dtype)
        pulls[False][place.mine].addmm_(p_nm.T, rows_nD)
