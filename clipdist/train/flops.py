"""How many floating-point operations the maths of a step takes, whatever computes it.

b = rows on this rank, B = rows in the global batch, D = width of the joint embedding, T = tokens.

Counted once, on a copy of the model on the CPU, so that nothing of how the run computes gets into the number: neither
what activation checkpointing or a step in micro-batches computes a second time, nor what a compiled, sharded or fused
model hides from the counter. That is what a model's FLOP/s and its share of the peak (MFU, Chowdhery et al. 2022,
arXiv 2204.02311) are defined by. The copy has the real shapes and no weights: the numbers do not matter.

Towers: torch's counter over the forward and backward pass of two rows (batch statistics need two), with what trains in
the present stage; operations grow linearly with rows. A rule of three times the forward pass would be wrong where a
tower, or part of it, is frozen. Loss: by formula. B × B logits of D products, and two such products again for the
gradients of both sides, are 3 · 2·B²·D; over W ranks each does 6·b·B·D. The tiles compute logits twice and those
between ranks on both of them (8 to 12 instead of 6), which by the same token does not count.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipdist.model.build import copy_of_shape
from clipdist.model.freeze import StageConfig, apply_stage
from clipdist.model.tower_model import TowerModel, total_of

ROWS = 2
# How timm and transformers remember, in any module, that activations are to be computed again.
CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")


class FlopCount:
    """Made of the model before an engine or the compiler changes it; costs no memory for weights."""

    def __init__(self, model: TowerModel, unused: frozenset[str]) -> None:
        """`unused` names the parameters that never reach the output."""
        self._model, self._unused = copy_of_shape(model, torch.device("meta")), unused

    def of_a_step(self, stage: StageConfig, tokens: int, global_batch: int) -> float:
        """Operations of one step over the global batch, whose captions are padded to `tokens`; a multiplication and
        an addition count as two. Leaves random states as they were."""
        return global_batch * self.of_a_pair(stage, tokens) + loss_flops(global_batch, self._model.joint_width)

    def of_a_locked_tower(self, name: str, stage: StageConfig, tokens: int) -> float:
        """Of `of_a_pair`, what the tower `name` has, which trains nowhere in this stage."""
        return self.of_a_pair(stage, tokens) - self.of_a_pair(stage, tokens, without=name)

    def of_a_pair(self, stage: StageConfig, tokens: int, without: str = "") -> float:
        """Operations of the model, forward and backward, for one pair; `without` names a locked tower that is not
        run."""
        model = copy_of_shape(self._model, torch.device("cpu"))
        if without:
            model.feature_sources = {without: lambda tower, *inputs: torch.zeros(ROWS, tower.width)}
        apply_stage(model, stage, self._unused)
        model.train()
        for module in model.modules():
            for name in CHECKPOINTING:
                if getattr(module, name, False) is True:
                    setattr(module, name, False)
        # Fused attention computes scores a second time in its backward pass, and the counter would count them.
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.random.fork_rng(devices=[]), plain, FlopCounterMode(display=False) as counter:
            total = total_of(model(*model.example(ROWS, tokens)))
            if total.requires_grad:
                total.backward()
        return float(counter.get_total_flops()) / ROWS


def loss_flops(global_batch: int, width: int) -> float:
    """Operations of the contrastive loss and its gradients over the global batch, by formula: 6·B²·D."""
    return 6.0 * global_batch**2 * width
