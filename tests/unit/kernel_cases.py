"""How far the kernel is from PyTorch, case by case: run as a program, this prints it as JSON.

With TRITON_INTERPRET=1 on a CPU (`python -m tests.unit.kernel_cases cpu`), where the kernel's blocks are small; without
it on a GPU (`… cuda`).
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.loss import ContrastiveLoss, kernel, tiles
from clipdist.loss.reference import infonce_reference, sigmoid_reference

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# Of the largest component: float32's sums; the one rounding of the probabilities to half precision.
TOLERANCES = {FLOAT32: 1e-5, BFLOAT16: 2**-8, FLOAT16: 2**-11}


@dataclass(frozen=True)
class Case:
    """`rows` of each of `ranks` ranks, of which this is the one in the middle."""

    rows: int
    ranks: int
    width: int
    dtype: torch.dtype
    scale: float = 14.3
    groups: bool = False
    packed: bool = True
    """Both sides' features are columns of one tensor, as a gather leaves them."""

    def sides(self, device: str) -> tuple[tiles.Sides, Tensor | None]:
        generator = torch.Generator().manual_seed(self.rows)
        total = self.rows * self.ranks
        features = torch.randn(2, total, self.width, generator=generator)
        features[1] += features[0]  # pairs that resemble each other
        image, text = (side.to(device, self.dtype) for side in F.normalize(features, dim=2))
        if self.packed:
            # Beside them what groups would add, so that rows do not begin at multiples of 16 bytes.
            packed = torch.cat([image, text, text[:, :3]], dim=1)
            image, text = packed[:, : self.width], packed[:, self.width : 2 * self.width]
        start = self.ranks // 2 * self.rows
        own = slice(start, start + self.rows)
        group = None
        if self.groups:
            group = (torch.randint(total // 3, (total,), generator=generator) * 2**33 - 2**40).to(device)
        return tiles.Sides(image[own].clone(), text[own].clone(), image, text, own), group


CASES = {
    "uneven": Case(45, 3, 72, FLOAT32),
    "groups": Case(45, 3, 72, FLOAT32, groups=True),
    "narrow, one run": Case(40, 1, 20, FLOAT32, packed=False),
    "one row": Case(1, 1, 7, FLOAT32),
    "scale 100": Case(45, 3, 72, FLOAT32, scale=100.0),
    "bfloat16": Case(45, 3, 72, BFLOAT16),
    "bfloat16, whole blocks": Case(64, 1, 64, BFLOAT16, scale=100.0, packed=False),
    "bfloat16, groups": Case(33, 3, 130, BFLOAT16, groups=True),
    "float16": Case(45, 3, 72, FLOAT16),
    "float16, scale 100": Case(45, 3, 72, FLOAT16, scale=100.0, groups=True),
}
# Several of a GPU's blocks, and widths up to the largest.
LARGE = {
    **{
        f"{str(dtype)[6:]}, D {width}": Case(700, 3, width, dtype, groups=width == 512)
        for dtype, width in itertools.product((FLOAT32, BFLOAT16, FLOAT16), (72, 512, 768, 2048))
    },
    "one run": Case(40000, 1, 64, BFLOAT16),
}


def errors(case: Case, device: str) -> Iterator[tuple[str, float]]:
    """(quantity, its error as a multiple of what is tolerated) against the tiles in float64."""
    sides, group = case.sides(device)
    wide = tiles.Sides(*(features.double() for features in sides[:4]), sides.own)
    scale, bias = torch.tensor(case.scale, device=device), torch.tensor(-5.3, device=device)
    shape = tiles.tile_shape(scale.device, None)
    exact = TOLERANCES[FLOAT32]

    found = kernel.log_sum_exps(sides, scale, shape)
    expected = tiles.log_sum_exps(wide, scale.double(), shape)
    for name, one, other in zip(("row lse", "column lse"), found, expected, strict=True):
        yield name, _apart(one, other) / exact

    every = tiles.Sides(wide.image_BD, wide.text_BD, wide.image_BD, wide.text_BD, slice(0, len(wide.image_BD)))
    row_lse_B, column_lse_B = tiles.log_sum_exps(every, scale.double(), shape)
    found = kernel.softmax_pulls(sides, scale, row_lse_B.float(), column_lse_B.float(), 0.75, shape)
    expected = tiles.softmax_pulls(wide, scale.double(), row_lse_B, column_lse_B, 0.75, shape)
    for name, one, other, target in zip(("image", "text"), found, expected, (wide.text_bD, wide.image_bD), strict=True):
        # What matters is what is left once the target is taken off, however small. A logit of float32 is rounded, which
        # changes its probability by as much, and the target is of float32 itself.
        yield f"softmax {name}", _apart(one - target, other - target, rounding(case.scale)) / TOLERANCES[case.dtype]

    for wants_grad in (True, False):
        found_four = kernel.sigmoid_sums(sides, scale, bias, group, shape, wants_grad)
        expected_four = tiles.sigmoid_sums(wide, scale.double(), bias.double(), group, shape, wants_grad)
        names = ("sigmoid loss", "sigmoid image", "sigmoid text", "sigmoid bias")
        for name, one, other in zip(names, found_four, expected_four, strict=True):
            tolerance = TOLERANCES[case.dtype] if name in names[1:3] else exact
            yield f"{name}{'' if wants_grad else ' alone'}", _apart(one, other) / tolerance


def rounding(scale: float) -> float:
    """What float32 leaves of a logit of this size, or of a difference of two of them."""
    return 4 * torch.finfo(FLOAT32).eps * scale


def loss_errors(kind: str, groups: bool, smoothing: float, weight: float, device: str) -> Iterator[tuple[str, float]]:
    """As `errors`, for the whole loss and its gradients against the plain reference in float64."""
    sides, group = Case(45, 1, 72, FLOAT32, groups=groups).sides(device)
    scalars = torch.tensor([14.3], device=device), torch.tensor([-3.7], device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (sides.image_bD, sides.text_bD, *scalars)]
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    criterion = ContrastiveLoss(kind, smoothing, weight, backend="kernel")  # type: ignore[arg-type]
    loss = criterion(*leaves, group_b=group)
    loss.backward()
    if kind == "sigmoid":
        expected = sigmoid_reference(*truth, group)
    else:
        expected = infonce_reference(*truth[:3], group, label_smoothing=smoothing, image_weight=weight)
    expected.backward()
    yield "loss", _apart(loss, expected, rounding(14.3)) / 1e-5
    for name, leaf, true in zip(("image", "text", "scale", "bias"), leaves, truth, strict=True):
        if true.grad is not None:
            assert leaf.grad is not None
            yield name, _apart(leaf.grad, true.grad, rounding(14.3) / len(sides.image_bD)) / 2e-5


WHOLE = {
    f"{kind}, groups {groups}, smoothing {smoothing}, weight {weight}": (kind, groups, smoothing, weight)
    for kind, groups, smoothing, weight in [
        *itertools.product(["infonce"], [False, True], [0.0, 0.1], [0.5, 1.0]),
        *itertools.product(["sigmoid"], [False, True], [0.0], [0.5]),
    ]
}


def _apart(found: Tensor, expected: Tensor, rounded: float = 0.0) -> float:
    """Largest difference beyond `rounded`, as a share of the largest number expected."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    difference = max(0.0, (found.double() - expected).abs().max().item() - rounded)
    largest = expected.abs().max().item()
    return difference / largest if largest else float(difference > 0)


def main(device: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    answers = {name: dict(errors(case, device)) for name, case in (CASES if device == "cpu" else CASES | LARGE).items()}
    answers |= {name: dict(loss_errors(*options, device)) for name, options in WHOLE.items()}
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
