"""The gradient of one global batch: at once, or in micro-batches when the batch is larger than memory.

b = rows on this rank, n = rows of a micro-batch, D = width of the joint embedding.

A contrastive loss does not add up over micro-batches: every row is contrasted with the whole global batch. So the
features of all micro-batches are computed first, without a graph but for the last; one loss gives the gradient of every
feature; then the others are computed again, each with its graph, and its features' gradients are propagated (GradCache,
Gao et al. 2021, arXiv 2101.06983). Random states are the same both times, the gradient of temperature and bias is taken
once, and ranks exchange gradients once, in the last backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipdist.model.dual_encoder import Encoded
from clipdist.train.engine import Engine, Inputs

Criterion = Callable[..., Tensor]


class Gradient(NamedTuple):
    """What a step knows after its backward pass, equal on all ranks where nothing else is said."""

    loss: float
    logit_scale: float
    feature_sums_2D: Tensor
    """Of the image and of the text features of this rank's rows; theirs alone."""


def compute_gradient(
    engine: Engine,
    criterion: Criterion,
    inputs: Inputs,
    group_b: Tensor | None,
    micro_batch: int,
    seed: Callable[[int], None],
) -> Gradient:
    """Leaves the gradient of the global batch's loss in the engine. All ranks call it together.

    Args:
        inputs: this rank's b rows.
        micro_batch: rows embedded at a time; all ranks have equally many rows, and so equally many micro-batches.
        seed: called with the number of a micro-batch before each of its passes; sets the random state that it has.
    """
    if len(inputs.images_n3HW) <= micro_batch:
        seed(0)
        with engine.accumulating(last=True):
            encoded = engine.forward(inputs)
            loss = criterion(*encoded, group_b=group_b)
            engine.backward(loss)
        return _gradient(loss, encoded)
    parts = inputs.split(micro_batch)
    kept, leaves = _embed(engine, parts, seed)
    loss = criterion(*leaves, group_b=group_b)
    loss.backward()
    rows = len(inputs.images_n3HW) - len(parts[-1].images_n3HW)
    with engine.accumulating(last=False):
        engine.backward(_surrogate(kept, leaves, slice(rows, None), last=False))
    for number, part in enumerate(parts[:-1]):
        last = number == len(parts) - 2
        seed(number)
        with engine.accumulating(last):
            here = slice(number * micro_batch, (number + 1) * micro_batch)
            engine.backward(_surrogate(engine.forward(part), leaves, here, last))
    return _gradient(loss, leaves)


def _gradient(loss: Tensor, encoded: Encoded) -> Gradient:
    features = (encoded.image_features_bD, encoded.text_features_bD)
    sums_2D = torch.stack([feature_bD.detach().float().sum(0) for feature_bD in features])
    return Gradient(float(loss.detach()), float(encoded.logit_scale.detach()), sums_2D)


def _embed(engine: Engine, parts: list[Inputs], seed: Callable[[int], None]) -> tuple[Encoded, Encoded]:
    """The last micro-batch with its graph, which need not be computed again, and all rows' features, scale and bias as
    leaves of a graph of their own."""
    found = []
    for number, part in enumerate(parts[:-1]):
        seed(number)
        with torch.no_grad():
            found.append(engine.forward(part))
    seed(len(parts) - 1)
    with engine.accumulating(last=False):
        kept = engine.forward(parts[-1])
    images, texts, _, _ = zip(*found, kept, strict=True)
    bias = kept.logit_bias
    leaves = Encoded(
        torch.cat(images).detach(),
        torch.cat(texts).detach(),
        kept.logit_scale.detach().clone(),
        None if bias is None else bias.detach().clone(),
    )
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    return kept, leaves


def _surrogate(encoded: Encoded, leaves: Encoded, rows: slice, last: bool) -> Tensor:
    """A number whose gradient is the loss's: each output times the gradient that the loss has with respect to it. Scale
    and bias count once, with the last micro-batch."""
    total = _dot(encoded.image_features_bD, leaves.image_features_bD, rows)
    total = total + _dot(encoded.text_features_bD, leaves.text_features_bD, rows)
    total = total + _dot(encoded.logit_scale, leaves.logit_scale) * float(last)
    if encoded.logit_bias is not None and leaves.logit_bias is not None:
        total = total + _dot(encoded.logit_bias, leaves.logit_bias) * float(last)
    return total


def _dot(output: Tensor, leaf: Tensor, rows: slice = slice(None)) -> Tensor:
    assert leaf.grad is not None
    return (output * leaf.grad[rows].to(output.dtype)).sum()
