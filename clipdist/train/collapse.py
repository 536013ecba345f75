"""Does a run learn at all? A tower that gives every input the same vector leaves the loss at ln B for ever, as does a
batch whose captions are all each other's positives; either looks like patience is needed.

B = rows in the global batch, D = width of the joint embedding.
"""

import math
from collections import deque

import torch
from torch import Tensor

from clipdist import world
from clipdist.loss import ContrastiveLoss

WINDOW = 200
"""Steps, or an epoch where that has fewer, over which the loss is averaged."""
AT_CHANCE = 0.99
"""Of what can be gained on chance, the share that a run which learns nothing has still to gain."""
ALIKE = 0.005
"""Mean cosine distance of two rows of a batch below which a tower gives all of them the same vector."""


class CollapseWatch:
    """What the features of a step's whole batch, and the loss over many steps, tell. All ranks construct it, and call
    its methods together.

    `image_spread` and `text_spread` are the mean cosine distances between two different rows of the batch, from the
    sums of their unit vectors: B/(B − 1)·(1 − |Σ/B|²). 0: all are the same; about 1: they point everywhere.
    """

    def __init__(self, loss: ContrastiveLoss, global_batch: int, steps_per_epoch: int) -> None:
        self.kind, self.label_smoothing, self.global_batch = loss.kind, loss.label_smoothing, global_batch
        self._losses: deque[float] = deque(maxlen=min(WINDOW, steps_per_epoch))
        self._sums_2D: Tensor | None = None
        self._group_b: Tensor | None = None
        self._told: set[str] = set()

    def note(self, loss: float, sums_2D: Tensor, group_b: Tensor | None) -> None:
        """Of each step: its loss, the sums of this rank's image and text features, and its rows' groups."""
        self._losses.append(loss)
        self._sums_2D, self._group_b = sums_2D, group_b

    def measure(self) -> dict[str, float]:
        """`train/image_spread`, `train/text_spread`, and, where InfoNCE cannot fall to 0, `train/loss_floor`: the mean
        entropy of its targets, by the groups of this batch and the label smoothing. Of the latest step."""
        if self._sums_2D is None:
            return {}
        number = self.global_batch
        norms_2 = (world.sum_over_ranks(self._sums_2D.double(), "other") / number).square().sum(1)
        image, text = (number / (number - 1) * (1 - norms_2)).clamp(min=0).tolist()
        values = {"train/image_spread": image, "train/text_spread": text}
        if self.kind == "infonce" and (self._group_b is not None or self.label_smoothing):
            sizes = torch.ones(number, dtype=torch.float64)
            if self._group_b is not None:
                sizes = world.gather_rows(self._group_b).unique(return_counts=True)[1].double().cpu()
            values["train/loss_floor"] = self._entropy(sizes)
        return values

    def _entropy(self, sizes: Tensor) -> float:
        """Of the targets of rows in groups of these sizes, averaged over rows."""
        total, elsewhere = self.global_batch, self.label_smoothing / self.global_batch
        own = (1 - self.label_smoothing) / sizes + elsewhere
        entropy = -sizes * own * own.log()
        if elsewhere:
            entropy -= (total - sizes) * elsewhere * math.log(elsewhere)
        return float((sizes * entropy).sum() / total)

    def judge(self, values: dict[str, float]) -> str | None:
        """What is wrong, in words, once for each kind of fault; None while nothing is, or it is too early to tell."""
        if len(self._losses) < (self._losses.maxlen or 0) or not values:
            return None
        loss, chance = sum(self._losses) / len(self._losses), math.log(self.global_batch)
        floor = values.get("train/loss_floor", 0.0)
        at = f"the loss of the last {len(self._losses):,} steps is {loss:.2f}"
        at += f", ln {self.global_batch:,} = {chance:.2f} is chance" if self.kind == "infonce" else ""
        alike = [name for name in ("image", "text") if values[f"train/{name}_spread"] < ALIKE]
        if self.kind == "infonce" and chance - floor < (1 - AT_CHANCE) * chance:
            return self._once(
                "groups",
                f"there is nothing to learn: nearly all pairs of a batch are each other's positives (its groups allow "
                f"no loss below {floor:.2f}; {at}). Sample classes evenly (data.balance), or group by a finer field",
            )
        learns = self.kind == "infonce" and chance - loss > (1 - AT_CHANCE) * (chance - floor)
        if learns or not alike:
            return None
        towers = f"{' and '.join(alike)} tower{'s give' if len(alike) > 1 else ' gives'}"
        return self._once(
            "towers",
            f"collapsed: the {towers} every input of a batch nearly the same vector (mean cosine distance "
            + ", ".join(f"{values[f'train/{name}_spread']:.4f}" for name in alike)
            + f"); {at}. Start anew with optim.warmup_steps or a lower optim.lr, with towers frozen in the first "
            f"epochs (train.stages), with model.text.pooling=mean or model.projection.layer_norm=true",
        )

    def _once(self, what: str, words: str) -> str | None:
        if what in self._told:
            return None
        self._told.add(what)
        return words
