"""The contrastive loss of the global batch, computed by all ranks together in memory linear in the local batch.

b = rows on this rank, B = rows in the global batch, D = width of the joint embedding.

One gather of features and one of vectors per step. Each rank streams over tiles of logits (`tiles.py`, on a GPU
`kernel.py`), once to get the log-sum-exp of its own rows and columns, and, after the ranks have exchanged those, once
more for the gradient of its own rows: with every row's and column's log-sum-exp known, no gradient has to travel.

The targets of InfoNCE need no tile at all: Σ_ij target_ij·z_ij is linear in the features, so means over groups do.
"""

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipdist import world
from clipdist.errors import UserError
from clipdist.loss.backend import Backend, choose
from clipdist.loss.tiles import Sides, tile_shape
from clipdist.settings import settings


@settings
class LossConfig:
    kind: Literal["infonce", "sigmoid"] = "infonce"
    """infonce: softmax over the batch, both ways (CLIP, ConVIRT); sigmoid: each pair by itself (SigLIP)."""
    label_smoothing: float = 0.0
    """ε of InfoNCE's targets, at least 0 and less than 1."""
    image_weight: float = 0.5
    """λ: weight of image→text; text→image gets 1 − λ."""
    tile: int | None = None
    """Columns of logits held at a time; by default what suits the device. The GPU kernel chooses its own."""
    backend: Backend = "auto"
    """tiles: PyTorch; kernel: Triton, on an NVIDIA GPU; auto: the kernel where it can run."""


class ContrastiveLoss(nn.Module):
    """InfoNCE or pairwise sigmoid loss over the rows of all ranks: a module without parameters.

    Args:
        kind: `infonce` (CLIP, ConVIRT) or `sigmoid` (SigLIP).
        label_smoothing: ε of the InfoNCE targets, in [0, 1).
        image_weight: λ, in [0, 1].
        tile: columns of logits held at a time (None: what suits the device); without meaning to the GPU kernel.
        backend: `tiles`, `kernel`, or `auto` for the kernel where it can run.

    Memory beyond the gathered features is O(b · tile) for b rows on this rank. Raises `UserError` for parameters
    outside their range.
    """

    def __init__(
        self,
        kind: Literal["infonce", "sigmoid"] = "infonce",
        label_smoothing: float = 0.0,
        image_weight: float = 0.5,
        tile: int | None = None,
        backend: Backend = "auto",
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
        if backend not in get_args(Backend):
            raise UserError(f"loss.backend={backend!r}, expected {', '.join(get_args(Backend))}")
        if kind == "sigmoid" and (label_smoothing or image_weight != 0.5):
            raise UserError(
                "loss.kind=sigmoid has neither label smoothing nor directions; remove loss.label_smoothing and "
                "loss.image_weight, or use loss.kind=infonce"
            )
        self.kind, self.label_smoothing, self.image_weight, self.tile = kind, label_smoothing, image_weight, tile
        self.backend: Backend = backend

    def forward(
        self,
        image_features_bD: Tensor,
        text_features_bD: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        group_b: Tensor | None = None,
    ) -> Tensor:
        """The loss of the global batch, a scalar, equal on every rank; all ranks call it together.

        Float32 (float64 for float64 features), whatever the features' precision. Gradients, once averaged over ranks as
        DDP, FSDP and DeepSpeed do, equal those of one process holding the whole batch, for features, scale and bias.
        There are no second derivatives.

        In training mode every rank must have the same number of rows; in evaluation mode numbers may differ, at the
        price of one more small exchange.

        Args:
            image_features_bD: float [b, D], this rank's rows, L2-normalised.
            text_features_bD: likewise; row i belongs to row i of the images.
            logit_scale: 1/temperature, a tensor of one element.
            logit_bias: what `sigmoid` adds to each logit, a tensor of one element; `infonce` has none.
            group_b: int64 [b]; rows of an equal number, on any rank, are each other's positives, never negatives.

        Raises `UserError` for `sigmoid` without a bias, and where the kernel asked for cannot run.
        """
        assert image_features_bD.shape == text_features_bD.shape
        if self.kind == "sigmoid" and logit_bias is None:
            raise UserError("loss.kind=sigmoid needs a logit bias; set model.temperature.bias")
        # Reductions over thousands of rows need at least float32, whatever the towers' precision.
        wide = torch.promote_types(image_features_bD.dtype, torch.float32)
        scale = logit_scale.reshape(()).to(wide)
        work = choose(self.backend, image_features_bD)
        with torch.autocast(image_features_bD.device.type, enabled=False):
            if self.kind == "infonce":
                loss = _InfoNCE.apply(
                    image_features_bD,
                    text_features_bD,
                    scale,
                    group_b,
                    (work, self.label_smoothing, self.image_weight, self.tile, self.training),
                )
            else:
                assert logit_bias is not None
                bias = logit_bias.reshape(()).to(wide)
                options = (work, self.tile, self.training)
                loss = _Sigmoid.apply(image_features_bD, text_features_bD, scale, bias, group_b, options)
        assert isinstance(loss, Tensor)
        return loss


class _Gathered:
    """What a rank knows of the global batch: features of all rows, their groups, where its own rows begin."""

    def __init__(self, image_bD: Tensor, text_bD: Tensor, group_b: Tensor | None, equal: bool) -> None:
        rows, width = image_bD.shape
        packed = [image_bD, text_bD]
        if group_b is not None:
            # The 64-bit groups travel as bits beside the features: one collective instead of two.
            packed.append(group_b.contiguous().view(image_bD.dtype).view(rows, -1))
        gathered = world.gather_rows(torch.cat(packed, dim=1), equal=equal, purpose="features")
        every_image, every_text = gathered[:, :width], gathered[:, width : 2 * width]
        self.sides = Sides(image_bD, text_bD, every_image, every_text, _own_rows(rows, equal))
        self.group_B = None
        if group_b is not None:
            self.group_B = gathered[:, 2 * width :].contiguous().view(torch.int64).view(-1)
        self.rows = len(gathered)
        self.world_size = world.connected().world_size


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
        options: tuple[ModuleType, float, float, int | None, bool],
    ) -> Tensor:
        work, smoothing, weight, columns, equal = options
        every = _Gathered(image_bD, text_bD, group_b, equal)
        shape = tile_shape(image_bD.device, columns)
        row_lse_b, column_lse_b = work.log_sum_exps(every.sides, scale, shape)
        # Σ_j target_ij T_j for this rank's rows, and likewise for its columns: targets are symmetric.
        text_target_bD, image_target_bD = _targets(every, smoothing, scale.dtype)
        aligned_b = (image_bD.to(scale.dtype) * text_target_bD).sum(1)
        known_b3 = torch.stack([row_lse_b, column_lse_b, aligned_b], dim=1)
        known_B3 = world.gather_rows(known_b3, equal=equal, purpose="vectors")
        row_lse_B, column_lse_B, aligned_B = (vector.contiguous() for vector in known_B3.unbind(1))
        loss = weight * row_lse_B.mean() + (1 - weight) * column_lse_B.mean() - scale * aligned_B.mean()
        if any(ctx.needs_input_grad[:3]):  # type: ignore[attr-defined]
            image_grad, text_grad = work.softmax_pulls(every.sides, scale, row_lse_B, column_lse_B, weight, shape)
            image_grad.sub_(text_target_bD).mul_(scale / every.rows)
            text_grad.sub_(image_target_bD).mul_(scale / every.rows)
            # z = s·I·T, so s·dL/ds = Σ_ij z_ij·dL/dz_ij = Σ_i I_i·dL/dI_i; this rank's rows are its share.
            scale_grad = _dot(image_bD, image_grad) / scale
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
        options: tuple[ModuleType, int | None, bool],
    ) -> Tensor:
        work, columns, equal = options
        every = _Gathered(image_bD, text_bD, group_b, equal)
        shape = tile_shape(image_bD.device, columns)
        wants_grad = any(ctx.needs_input_grad[:4])  # type: ignore[attr-defined]
        total, image_grad, text_grad, bias_grad = work.sigmoid_sums(
            every.sides, scale, bias, every.group_B, shape, wants_grad
        )
        if wants_grad:
            image_grad.mul_(scale / every.rows)
            text_grad.mul_(scale / every.rows)
            scale_grad = _dot(image_bD, image_grad) / scale
            bias_grad = bias_grad / every.rows
            _keep_gradients(ctx, every.world_size, image_bD.dtype, image_grad, text_grad, scale_grad, bias_grad)
        return world.sum_over_ranks(total, "vectors") / every.rows

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


def _dot(one_bD: Tensor, two_bD: Tensor) -> Tensor:
    """Σ of the products, accumulated in the precision of `two_bD`, without a third block of the same size."""
    return torch.linalg.vecdot(one_bD.to(two_bD.dtype), two_bD).sum()


def _targets(every: _Gathered, smoothing: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Σ_j target_ij·T_j, Σ_j target_ij·I_j) for this rank's rows i, [b, D] each: means over i's group, smoothed."""
    sides = every.sides
    found = []
    groups = None
    if every.group_B is not None:
        groups = torch.unique(every.group_B, return_inverse=True, return_counts=True)[1:]
    for features_bD, features_BD in ((sides.text_bD, sides.text_BD), (sides.image_bD, sides.image_BD)):
        target_bD = features_bD.to(wide)
        if groups is not None:
            inverse_B, counts_G = groups
            sums_GD = features_BD.new_zeros((len(counts_G), features_BD.shape[1]), dtype=wide)
            sums_GD.index_add_(0, inverse_B, features_BD.to(wide))
            own_b = inverse_B[sides.own]
            target_bD = sums_GD[own_b].div_(counts_G[own_b][:, None])
        if smoothing:
            target_bD = (1 - smoothing) * target_bD + smoothing * features_BD.mean(dim=0, dtype=wide)
        found.append(target_bD)
    return found[0], found[1]


def _keep_gradients(
    ctx: torch.autograd.function.FunctionCtx, world_size: int, dtype: torch.dtype, *grads: Tensor
) -> None:
    """Saves this rank's part of the gradient times the world size, so that the average over ranks is the sum."""
    features, scalars = grads[:2], grads[2:]
    ctx.save_for_backward(
        *(grad.mul_(world_size).to(dtype) for grad in features), *(grad * world_size for grad in scalars)
    )
