"""Weights averaged over steps: usually a better model than the last step's, for the price of a copy."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipdist.train.checkpoint import AVERAGE
from clipdist.train.engine import Engine, OptimizerState


class WeightAverage:
    """Exponential moving averages of all parameters, float32, on their device; buffers are taken as they are.

    The decay begins low, at min(decay, (1 + t)/(10 + t)) in step t, so that the first steps are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage). Every rank averages what it holds of the weights: all of them, or its part.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self.decay, self.steps = engine, decay, 0
        self.averages = {name: p.detach().clone().float() for name, p in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._engine.model.named_parameters()

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step that changed them."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [parameter.detach().float() for _, parameter in self._parameters()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)
        self.steps += 1

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages for weights."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(kept)

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.data.copy_(weights[name])

    def put_beside(self, optimizer: OptimizerState) -> OptimizerState:
        """The optimiser's state for a checkpoint, with each parameter's average as one more kind: in parts, as
        `Engine.state_in_parts` gives it, or whole on rank 0. All ranks call it."""
        averages = self.averages if self._engine.in_parts else self._engine.whole(self.averages)
        return {name: {**optimizer.get(name, {}), AVERAGE: average} for name, average in averages.items()}

    def go_on(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Goes on from a checkpoint's averages over `steps` steps; begins with the weights as they are where it has
        none."""
        self.steps = steps if averages else 0
        for name, parameter in self._parameters():
            if averages:
                self._engine.fill(self.averages[name], averages[name])
            else:
                self.averages[name].copy_(parameter.detach())
