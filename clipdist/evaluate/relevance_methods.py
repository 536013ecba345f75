"""How much each part of a picture adds to a score of an image tower, found by the tower's structure alone.

C = width of a feature map, g = its cells along a side, H = heads, N = tokens, M = maps asked for.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipdist.errors import UserError
from clipdist.model.towers import ImageTower

METHODS = ("gradient", "attention", "grad-cam", "rollout")
FINE_ENOUGH = 7
"""Cells along a side that a feature map should have: what a tower of stride 32 gives for 224 pixels. Of smaller
pictures its last map is so coarse that one cell holds all there is to see, and an earlier one is taken."""

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


@dataclass
class Seen:
    """What one pass left: attention weights [1, H, queries, keys] and outputs of modules, in the order they came."""

    attention: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


class _Attention(TorchFunctionMode):
    """Keeps the weights of every attention that is computed meanwhile. Fused kernels do not give theirs, so the same
    is computed in the open; the model itself is not touched."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not kwargs.get("enable_gqa"):
            weights, made = _open_attention(*args, **kwargs)
            self._keep(weights)
            return made
        made = func(*args, **kwargs)
        if func in _SOFTMAX:
            self._keep(made)
        return made

    def _keep(self, weights: Any) -> None:
        if isinstance(weights, Tensor) and weights.dim() == 4 and weights.requires_grad:
            self.seen.attention.append(weights)


def _open_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` without dropout, as its documentation defines it -> (weights, result)."""
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if hidden else logits + attn_mask
    weights = logits.softmax(dim=-1)
    return weights, weights @ value


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and gradients within, without recomputing activations; afterwards each module is as before."""
    modes = {module: module.training for module in model.modules()}
    recomputed = [module for module in model.modules() if getattr(module, "grad_checkpointing", False) is True]
    try:
        for module in modes:
            module.training = False
        for module in recomputed:
            module.grad_checkpointing = False  # type: ignore[assignment]
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in recomputed:
            module.grad_checkpointing = True  # type: ignore[assignment]


def relevance(
    tower: ImageTower, pixels_3HW: Tensor, scores: Callable[[Tensor], Tensor], method: str
) -> tuple[Tensor, str]:
    """float32 [M, g, g], 0 or more: for each of the scores [M] that are made of the tower's features [1, C], what each
    cell adds; and the method that "gradient" stands for.

    Call it within `undisturbed`. Raises `UserError` for a method that the tower cannot have.
    """
    if method not in METHODS:
        raise UserError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    name = type(tower.model).__name__
    for modules in _watched(tower.model):
        seen = Seen()
        features_1C = _watch(tower, modules, pixels_3HW, seen)
        maps = [one for one in seen.features if _cells(one, tower)]
        if hasattr(tower.model, "reroll"):  # Hiera, whose tokens lie in rows only behind the last stage
            maps = maps[-1:]
        if maps:
            break
    else:
        raise UserError(f"relevance: the image tower ({name}) has no feature map with places, so there is none to show")
    tokens = _Tokens.of(seen, tower)
    if method == "gradient":
        method = "attention" if tokens else "grad-cam"
    scores_M = scores(features_1C)
    if method == "grad-cam":
        return _grad_cam(scores_M, maps, tower), method
    if tokens is None:
        raise UserError(
            f"method {method!r}: found an image tower ({name}) whose blocks do not all attend from each token to each "
            f"other; expected gradient or grad-cam for it"
        )
    return tokens.rollout(scores_M) if method == "rollout" else tokens.gradient(scores_M), method


def _watched(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Where feature maps are looked for: the stages or blocks that timm names, and if that does not help, anywhere."""
    modules, info = dict(model.named_modules()), getattr(model, "feature_info", None)
    named = [one.get("module") for one in info if isinstance(one, dict)] if isinstance(info, list) else []
    yield [modules[name] for name in named if name in modules]
    yield list(modules.values())


def _watch(tower: ImageTower, modules: Sequence[nn.Module], pixels_3HW: Tensor, seen: Seen) -> Tensor:
    """The tower's features [1, C], differentiable whether its parameters are or not."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, list | tuple) else [output]
        seen.features.extend(one for one in outputs if isinstance(one, Tensor) and one.requires_grad)

    pixels_13HW = pixels_3HW[None].float().requires_grad_()
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        with _Attention(seen):
            return tower.forward(pixels_13HW)  # not the call, which may be a compiled one


def _cells(map_: Tensor, tower: ImageTower) -> int:
    """Cells along a side of a feature map, [1, C, g, g], [1, g, g, C] or [1, N, C]; 0 where it has no places."""
    if map_.dim() not in (3, 4) or len(map_) != 1:
        return 0
    laid = _laid_out(map_, tower)
    return 0 if laid is None or laid.shape[1] < 2 else laid.shape[1]


def _laid_out(map_: Tensor, tower: ImageTower) -> Tensor | None:
    """The same as [C, g, g]; pictures are squares, so places are too, and which axis is which shows."""
    _, *shape = map_.shape
    if len(shape) == 2:
        first, g = _grid(shape[0], tower)
        return map_[0, first:].T.reshape(-1, g, g)
    nhwc = getattr(tower.model, "output_fmt", "NCHW") == "NHWC"
    if shape[0] == shape[1] and (nhwc or shape[1] != shape[2]):
        return map_[0].permute(2, 0, 1)
    return map_[0] if shape[1] == shape[2] else None


def _grid(tokens: int, tower: ImageTower) -> tuple[int, int]:
    """Tokens before those of places, such as a class token, and cells along a side."""
    known = int(getattr(tower.model, "num_prefix_tokens", 0) or 0)
    for first in (known, 0):
        g = math.isqrt(max(0, tokens - first))
        if g * g == tokens - first:
            return first, g
    g = math.isqrt(tokens)
    return tokens - g * g, g


def _grad_cam(scores_M: Tensor, maps: Sequence[Tensor], tower: ImageTower) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): ReLU(Σ_c mean(∂score/∂F_c) · F_c) of one feature map F, the
    last that is fine enough and that the score depends on by its places."""
    found = []
    for score in scores_M:
        gradients = torch.autograd.grad(score, list(maps), retain_graph=True, allow_unused=True)
        laid = [
            (map_, slope)
            for one, gradient in zip(maps, gradients, strict=True)
            if gradient is not None
            and (slope := _laid_out(gradient, tower)) is not None
            and (map_ := _laid_out(one, tower)) is not None
            and slope.any()
        ]
        if not laid:
            found.append(torch.zeros(2, 2, device=score.device))
            continue
        fine = [pair for pair in laid if pair[0].shape[1] >= FINE_ENOUGH]
        finest = max(pair[0].shape[1] for pair in laid)
        map_Cgg, slope_Cgg = (fine or [pair for pair in laid if pair[0].shape[1] == finest])[-1]
        found.append(torch.einsum("c,chw->hw", slope_Cgg.mean((1, 2)), map_Cgg).relu().detach())
    g = max(len(one) for one in found)
    return torch.stack([one if len(one) == g else one.new_zeros(g, g) for one in found])


@dataclass(frozen=True)
class _Tokens:
    """A transformer that keeps its tokens: every block attends from all N to all N. `pooling` [1, H, queries, N] are
    the weights of an attention that reads the last tokens, where there is one."""

    blocks: list[Tensor]
    pooling: Tensor | None
    last_1NC: Tensor
    first: int
    g: int

    @staticmethod
    def of(seen: Seen, tower: ImageTower) -> "_Tokens | None":
        sequences = [one for one in seen.features if one.dim() == 3 and _cells(one, tower)]
        if not sequences or not seen.attention or any(one.dim() == 4 for one in seen.features):
            return None
        last_1NC = sequences[-1]
        N = last_1NC.shape[1]
        blocks = [one for one in seen.attention if one.shape[2:] == (N, N)]
        others = [one for one in seen.attention if one.shape[2:] != (N, N)]
        poolings = [one for one in others if one.shape[2] < N and one.shape[3] == N]
        # One attention that is neither means tokens that were merged, or channels that attend to each other.
        if not blocks or len(others) > len(poolings) or len(poolings) > 1 or any(len(one) != 1 for one in blocks):
            return None
        return _Tokens(blocks, poolings[0] if poolings else None, last_1NC, *_grid(N, tower))

    def gradient(self, scores_M: Tensor) -> Tensor:
        """Chefer, Gur and Wolf 2021 (arXiv 2103.15679): R = 1; block by block R ← R + E_h[(∂score/∂A ⊙ A)⁺] R."""
        weights = [*self.blocks, *([self.pooling] if self.pooling is not None else [])]
        found = []
        for score in scores_M:
            *slopes, of_last = torch.autograd.grad(score, [*weights, self.last_1NC], retain_graph=True)
            steps = [(s * a).clamp(min=0).mean(1)[0].detach() for s, a in zip(slopes, weights, strict=True)]
            R_NN = torch.eye(self.last_1NC.shape[1], device=score.device)
            for step_NN in steps[: len(self.blocks)]:
                R_NN = R_NN + step_NN @ R_NN
            found.append(self._read(R_NN, of_last, steps[-1] if self.pooling is not None else None))
        return torch.stack(found)

    def rollout(self, scores_M: Tensor) -> Tensor:
        """Abnar and Zuidema 2020 (arXiv 2005.00928): the product over blocks of ½(mean over heads of A) + ½. Nothing
        of the scores is in it but which tokens they are read from, so all maps are the same."""
        (of_last,) = torch.autograd.grad(scores_M.sum(), self.last_1NC)
        R_NN = torch.eye(self.last_1NC.shape[1], device=scores_M.device)
        for block in self.blocks:
            mean_NN = block.detach().mean(1)[0]
            R_NN = (mean_NN + torch.eye(len(mean_NN), device=mean_NN.device)) / 2 @ R_NN
        pooling = None if self.pooling is None else self.pooling.detach().mean(1)[0]
        return self._read(R_NN, of_last, pooling).expand(len(scores_M), -1, -1)

    def _read(self, R_NN: Tensor, of_last_1NC: Tensor, pooling: Tensor | None) -> Tensor:
        """[g, g]: the row of what the score is read from. That is the pooling attention, or the mean of the tokens
        whose gradient is not zero: a class token alone, or all that are averaged."""
        if pooling is None:
            reads_N = of_last_1NC[0].detach().abs().sum(1) > 0
            if not reads_N.any():
                return R_NN.new_zeros(self.g, self.g)
            row_N = R_NN[reads_N].mean(0)
        else:
            row_N = pooling.mean(0) @ R_NN
        row_N = row_N[self.first :]
        return (row_N - row_N.min()).reshape(self.g, self.g)
