"""The contrastive loss of the global batch, computed by all ranks together in memory linear in the local batch.

b = rows on this rank, B = rows in the global batch, D = width of the joint embedding, t = columns of a tile.

One gather of features and one of vectors per step. Each rank streams over tiles of the gathered features, once to
get the log-sum-exp of its own rows and columns, and, after the ranks have exchanged those, once more for the gradient
of its own rows: with every row's and column's log-sum-exp known, no gradient has to travel.

The targets of InfoNCE need no tile at all: Σ_ij target_ij·z_ij is linear in the features, so means over groups do.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipdist import world
from clipdist.errors import UserError
from clipdist.settings import settings

# Elements of one tile of logits, b × t: large enough for the matrix product to be efficient, small beside features.
TILE_ELEMENTS = 1 << 22
MIN_TILE = 64


@settings
class LossConfig:
    kind: Literal["infonce", "sigmoid"] = "infonce"
    label_smoothing: float = 0.0
    image_weight: float = 0.5
    """λ: weight of image→text; text→image gets 1 − λ."""
    tile: int | None = None
    """Columns of logits held at a time; by default chosen so that a tile has about four million elements."""


class ContrastiveLoss(nn.Module):
    """InfoNCE or pairwise sigmoid loss over the rows of all ranks.

    Args:
        kind: `infonce` (CLIP, ConVIRT) or `sigmoid` (SigLIP).
        label_smoothing: ε of the InfoNCE targets, in [0, 1).
        image_weight: λ, in [0, 1].
        tile: columns of logits held at a time.

    Calling it (all ranks together) with L2-normalised `image_features_bD` and `text_features_bD` of this rank, the
    multiplier `logit_scale` (1/temperature), for `sigmoid` also `logit_bias`, and optionally int64 `group_b`, returns
    the loss of the global batch as a float32 scalar (float64 for float64 features), equal on every rank. Gradients,
    once averaged over ranks as DDP, FSDP and DeepSpeed do, equal those of one process holding the whole batch, for
    features, scale and bias.

    In training mode every rank must have the same number of rows; in evaluation mode numbers may differ, at the price
    of one more small exchange.

    Raises `UserError` for parameters outside their range.
    """

    def __init__(
        self,
        kind: Literal["infonce", "sigmoid"] = "infonce",
        label_smoothing: float = 0.0,
        image_weight: float = 0.5,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("infonce", "sigmoid"):
            raise UserError(f"loss.kind={kind!r}, expected infonce or sigmoid")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"loss.label_smoothing={label_smoothing}, expected at least 0 and less than 1")
        if not 0 <= image_weight <= 1:
            raise UserError(f"loss.image_weight={image_weight}, expected 0 to 1")
        if tile is not None and tile < 1:
            raise UserError(f"loss.tile={tile}, expected at least 1")
        if kind == "sigmoid" and (label_smoothing or image_weight != 0.5):
            raise UserError(
                "loss.kind=sigmoid has neither label smoothing nor directions; remove loss.label_smoothing and "
                "loss.image_weight, or use loss.kind=infonce"
            )
        self.kind, self.label_smoothing, self.image_weight, self.tile = kind, label_smoothing, image_weight, tile

    def forward(
        self,
        image_features_bD: Tensor,
        text_features_bD: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        group_b: Tensor | None = None,
    ) -> Tensor:
        assert image_features_bD.shape == text_features_bD.shape
        if self.kind == "sigmoid" and logit_bias is None:
            raise UserError("loss.kind=sigmoid needs a logit bias; set model.temperature.bias")
        # Reductions over thousands of rows need at least float32, whatever the towers' precision.
        wide = torch.promote_types(image_features_bD.dtype, torch.float32)
        tile = self.tile or max(MIN_TILE, TILE_ELEMENTS // max(1, len(image_features_bD)))
        scale = logit_scale.reshape(()).to(wide)
        with torch.autocast(image_features_bD.device.type, enabled=False):
            if self.kind == "infonce":
                loss = _InfoNCE.apply(
                    image_features_bD,
                    text_features_bD,
                    scale,
                    group_b,
                    (self.label_smoothing, self.image_weight, tile, self.training),
                )
            else:
                assert logit_bias is not None
                bias = logit_bias.reshape(()).to(wide)
                loss = _Sigmoid.apply(image_features_bD, text_features_bD, scale, bias, group_b, (tile, self.training))
        assert isinstance(loss, Tensor)
        return loss


class _Gathered:
    """What a rank knows of the global batch: features of all rows in wide precision, where its own rows begin."""

    def __init__(self, image_bD: Tensor, text_bD: Tensor, group_b: Tensor | None, equal: bool) -> None:
        rows, width = image_bD.shape
        packed = [image_bD, text_bD]
        if group_b is not None:
            # The 64-bit groups travel as bits beside the features: one collective instead of two.
            packed.append(group_b.contiguous().view(image_bD.dtype).view(rows, -1))
        gathered = world.gather_rows(torch.cat(packed, dim=1), equal=equal)
        self.image_BD, self.text_BD = gathered[:, :width], gathered[:, width : 2 * width]
        self.group_B = None
        if group_b is not None:
            self.group_B = gathered[:, 2 * width :].contiguous().view(torch.int64).view(-1)
        self.rows = len(gathered)
        self.world_size = world.connected().world_size

    def tiles(self, features_BD: Tensor, tile: int, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.rows, tile):
            columns = slice(start, min(start + tile, self.rows))
            yield columns, features_BD[columns].to(wide)


class _InfoNCE(torch.autograd.Function):
    """Gradients are formed in the forward pass, where the gathered features are at hand, and only scaled in the
    backward pass; so nothing larger than two b × D blocks waits in between."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        image_bD: Tensor,
        text_bD: Tensor,
        scale: Tensor,
        group_b: Tensor | None,
        options: tuple[float, float, int, bool],
    ) -> Tensor:
        smoothing, weight, tile, equal = options
        every = _Gathered(image_bD, text_bD, group_b, equal)
        image, text = image_bD.to(scale.dtype), text_bD.to(scale.dtype)
        row_lse_b = _log_sum_exp(image, every.text_BD, scale, tile)
        column_lse_b = _log_sum_exp(text, every.image_BD, scale, tile)
        lse_B2 = world.gather_rows(torch.stack([row_lse_b, column_lse_b], dim=1), equal=equal)
        row_lse_B, column_lse_B = lse_B2.unbind(1)
        # Σ_j target_ij T_j for every row, and likewise for every column: targets are symmetric.
        text_target = _targets(every.text_BD.to(scale.dtype), every.group_B, smoothing)
        image_target = _targets(every.image_BD.to(scale.dtype), every.group_B, smoothing)
        aligned = (every.image_BD.to(scale.dtype) * text_target()).sum() / every.rows
        loss = weight * row_lse_B.mean() + (1 - weight) * column_lse_B.mean() - scale * aligned
        if any(ctx.needs_input_grad[:3]):  # type: ignore[attr-defined]
            own = _own_rows(len(image), equal)
            pull = _softmax_pull(image, every.text_BD, scale, row_lse_b, column_lse_B, weight, tile)
            image_grad = (pull - text_target(own)) * (scale / every.rows)
            pull = _softmax_pull(text, every.image_BD, scale, column_lse_b, row_lse_B, 1 - weight, tile)
            text_grad = (pull - image_target(own)) * (scale / every.rows)
            # z = s·I·T, so s·dL/ds = Σ_ij z_ij·dL/dz_ij = Σ_i I_i·dL/dI_i; this rank's rows are its share.
            scale_grad = (image * image_grad).sum() / scale
            _keep_gradients(ctx, every.world_size, image_bD.dtype, image_grad, text_grad, scale_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def, override]
        image_grad, text_grad, scale_grad = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return image_grad, text_grad, scale_grad, None, None


class _Sigmoid(torch.autograd.Function):
    """As `_InfoNCE`; every pair stands for itself, so no vector has to be exchanged but the ranks' sums."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        image_bD: Tensor,
        text_bD: Tensor,
        scale: Tensor,
        bias: Tensor,
        group_b: Tensor | None,
        options: tuple[int, bool],
    ) -> Tensor:
        tile, equal = options
        every = _Gathered(image_bD, text_bD, group_b, equal)
        own = _own_rows(len(image_bD), equal)
        identity = every.group_B if every.group_B is not None else torch.arange(every.rows, device=image_bD.device)
        image, text = image_bD.to(scale.dtype), text_bD.to(scale.dtype)
        wants_grad = any(ctx.needs_input_grad[:4])  # type: ignore[attr-defined]
        total = image.new_zeros(())
        bias_grad = image.new_zeros(())
        image_grad, text_grad = torch.zeros_like(image), torch.zeros_like(text)
        for columns, text_tD in every.tiles(every.text_BD, tile, scale.dtype):
            sign_bt, signed_bt = _signed(image, text_tD, scale, bias, identity[own], identity[columns])
            total -= F.logsigmoid(signed_bt).sum()
            if wants_grad:
                weight_bt = -sign_bt * torch.sigmoid(-signed_bt) / every.rows
                image_grad += weight_bt @ text_tD
                bias_grad += weight_bt.sum()
        if wants_grad:
            for columns, image_tD in every.tiles(every.image_BD, tile, scale.dtype):
                sign_bt, signed_bt = _signed(text, image_tD, scale, bias, identity[own], identity[columns])
                text_grad += (-sign_bt * torch.sigmoid(-signed_bt) / every.rows) @ image_tD
            image_grad, text_grad = image_grad * scale, text_grad * scale
            scale_grad = (image * image_grad).sum() / scale
            _keep_gradients(ctx, every.world_size, image_bD.dtype, image_grad, text_grad, scale_grad, bias_grad)
        return world.sum_over_ranks(total) / every.rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def, override]
        grads = [grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads, None, None)


def _own_rows(rows: int, equal: bool) -> slice:
    """Where this rank's rows lie in the global batch."""
    rank = world.connected().rank
    if equal:
        return slice(rank * rows, (rank + 1) * rows)
    counts = [int(count) for count in world.gather_objects(rows)]
    return slice(sum(counts[:rank]), sum(counts[:rank]) + rows)


def _log_sum_exp(rows_bD: Tensor, others_BD: Tensor, scale: Tensor, tile: int) -> Tensor:
    """[b]: log Σ_j exp(s·row·other_j), streamed over tiles of the others."""
    running_b = rows_bD.new_full((len(rows_bD),), -torch.inf)
    scaled_bD = rows_bD * scale
    for start in range(0, len(others_BD), tile):
        logits_bt = scaled_bD @ others_BD[start : start + tile].to(rows_bD.dtype).T
        running_b = torch.logaddexp(running_b, torch.logsumexp(logits_bt, dim=1))
    return running_b


def _softmax_pull(
    rows_bD: Tensor, others_BD: Tensor, scale: Tensor, own_lse_b: Tensor, other_lse_B: Tensor, weight: float, tile: int
) -> Tensor:
    """[b, D]: Σ_j (w·exp(z_ij − own_lse_i) + (1 − w)·exp(z_ij − other_lse_j))·other_j, streamed over tiles."""
    pulled_bD = torch.zeros_like(rows_bD)
    scaled_bD = rows_bD * scale
    for start in range(0, len(others_BD), tile):
        others_tD = others_BD[start : start + tile].to(rows_bD.dtype)
        logits_bt = scaled_bD @ others_tD.T
        weights_bt = (logits_bt - own_lse_b[:, None]).exp_().mul_(weight)
        weights_bt += logits_bt.sub_(other_lse_B[start : start + tile]).exp_().mul_(1 - weight)
        pulled_bD += weights_bt @ others_tD
    return pulled_bD


class _targets:
    """Σ_j target_ij·feature_j for rows i of the global batch: the mean over the row's group, smoothed."""

    def __init__(self, features_BD: Tensor, group_B: Tensor | None, smoothing: float) -> None:
        self.features_BD, self.smoothing = features_BD, smoothing
        self.mean_D = features_BD.mean(dim=0) if smoothing else None
        self.inverse_B: Tensor | None = None
        if group_B is not None:
            _, self.inverse_B, counts_G = torch.unique(group_B, return_inverse=True, return_counts=True)
            sums_GD = features_BD.new_zeros((len(counts_G), features_BD.shape[1]))
            sums_GD.index_add_(0, self.inverse_B, features_BD)
            self.means_GD = sums_GD / counts_G[:, None]

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        found = self.features_BD[rows] if self.inverse_B is None else self.means_GD[self.inverse_B[rows]]
        if self.mean_D is None:
            return found
        return (1 - self.smoothing) * found + self.smoothing * self.mean_D


def _signed(
    rows_bD: Tensor, others_tD: Tensor, scale: Tensor, bias: Tensor, group_b: Tensor, group_t: Tensor
) -> tuple[Tensor, Tensor]:
    """(y_bt, y·(s·rows·others + bias)): +1 for positives, −1 for negatives."""
    sign_bt = (group_b[:, None] == group_t[None, :]).to(rows_bD.dtype).mul_(2).sub_(1)
    return sign_bt, ((rows_bD * scale) @ others_tD.T + bias) * sign_bt


def _keep_gradients(
    ctx: torch.autograd.function.FunctionCtx, world_size: int, dtype: torch.dtype, *grads: Tensor
) -> None:
    """Saves this rank's part of the gradient times the world size, so that the average over ranks is the sum."""
    features, scalars = grads[:2], grads[2:]
    ctx.save_for_backward(
        *((grad * world_size).to(dtype) for grad in features), *(grad * world_size for grad in scalars)
    )
