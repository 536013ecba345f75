"""Value and gradients of the loss on 1 to 4 real processes against one process that holds the whole batch."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from clipdist.errors import UserError
from clipdist.loss import ContrastiveLoss
from clipdist.loss.reference import infonce_reference, sigmoid_reference
from tests.distributed.ranks import run_ranks

WIDTH = 7


@dataclass(frozen=True)
class Case:
    kind: str
    groups: bool
    smoothing: float
    weight: float
    tile: int | None

    def loss(self) -> ContrastiveLoss:
        return ContrastiveLoss(self.kind, self.smoothing, self.weight, self.tile)  # type: ignore[arg-type]

    def reference(self, *tensors: torch.Tensor, group: torch.Tensor | None) -> torch.Tensor:
        image, text, scale, bias = tensors
        if self.kind == "sigmoid":
            return sigmoid_reference(image, text, scale, bias, group)
        return infonce_reference(image, text, scale, group, label_smoothing=self.smoothing, image_weight=self.weight)


CASES = [
    *(Case("infonce", *rest) for rest in itertools.product([False, True], [0.0, 0.1], [0.5, 0.75, 1.0], [None, 1, 5])),
    *(Case("sigmoid", groups, 0.0, 0.5, tile) for groups in (False, True) for tile in (None, 1, 5)),
]


def global_batch(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Features of all rows, scale and bias, and groups of which several rows share one."""
    generator = torch.Generator().manual_seed(rows)
    image, text = (F.normalize(torch.randn(rows, WIDTH, generator=generator, dtype=dtype), dim=1) for _ in range(2))
    groups = torch.randint(-(2**62), 2**62, (max(1, rows // 2),), generator=generator)
    group = groups[torch.randint(len(groups), (rows,), generator=generator)]
    return image, text, torch.tensor([14.3], dtype=dtype), torch.tensor([-3.7], dtype=dtype), group


def gradients(
    rank: int, world_size: int, cases: list[Case], rows: list[int], dtype: torch.dtype, training: bool
) -> list[list[torch.Tensor]]:
    """For each case: the loss, this rank's rows of the feature gradients, and the scale's and bias' gradients, each
    times 1/W as an average over ranks does."""
    answers = []
    start = sum(rows[:rank])
    mine = slice(start, start + rows[rank])
    for case in cases:
        image, text, scale, bias, group = global_batch(sum(rows), dtype)
        leaves = [tensor.clone().requires_grad_() for tensor in (image[mine], text[mine], scale, bias)]
        loss = case.loss().train(training)(*leaves, group_b=group[mine] if case.groups else None)
        loss.backward()
        grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        answers.append([loss.detach(), *(grad / world_size for grad in grads)])
    return answers


def check(world_size: int, rows: list[int], dtype: torch.dtype, tolerance: float, training: bool = True) -> None:
    answers = run_ranks(world_size, gradients, CASES, rows, dtype, training)
    for number, case in enumerate(CASES):
        *tensors, group = global_batch(sum(rows), dtype)
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        expected = case.reference(*leaves, group=group if case.groups else None)
        expected.backward()
        losses, images, texts, scales, biases = zip(*(answer[number] for answer in answers), strict=True)
        for loss in losses:
            close(loss, expected, tolerance, case)
        close(torch.cat(images), leaves[0].grad, tolerance, case)
        close(torch.cat(texts), leaves[1].grad, tolerance, case)
        close(sum(scales), leaves[2].grad, tolerance, case)
        if case.kind == "sigmoid":
            close(sum(biases), leaves[3].grad, tolerance, case)


def close(found: torch.Tensor, expected: torch.Tensor | None, tolerance: float, case: Case) -> None:
    assert expected is not None
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < tolerance, f"{case}: off by {error:.2e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_float64_equals_the_one_process_loss(world_size: int) -> None:
    check(world_size, [6] * world_size, torch.float64, 1e-10)


@pytest.mark.parametrize("world_size", [1, 3])
def test_float32_is_close_to_the_one_process_loss(world_size: int) -> None:
    check(world_size, [8] * world_size, torch.float32, 1e-5)


@pytest.mark.parametrize("rows", [[5, 2], [4, 1, 3]])
def test_in_evaluation_ranks_may_differ_in_rows(rows: list[int]) -> None:
    check(len(rows), rows, torch.float64, 1e-10, training=False)


def test_bfloat16_features_are_accumulated_in_float32() -> None:
    image, text, scale, _, group = global_batch(64, torch.float32)
    half = [image.bfloat16().requires_grad_(), text.bfloat16().requires_grad_()]
    loss = ContrastiveLoss(tile=16)(*half, scale, group_b=group)
    assert loss.dtype == torch.float32
    expected = infonce_reference(half[0].detach().float(), half[1].detach().float(), scale, group)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert half[0].grad is not None
    assert half[0].grad.dtype == torch.bfloat16


def test_no_tensor_has_the_size_of_the_logits() -> None:
    """The largest allocation at B = 2048 stays below one quarter of b × B."""
    rows = 2048
    image, text, scale, _, _ = global_batch(rows, torch.float32)
    leaves = [image.requires_grad_(), text.requires_grad_()]
    with torch.profiler.profile(profile_memory=True) as profile:
        ContrastiveLoss(tile=128)(*leaves, scale).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < rows * rows * 4 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clip"}, "expected infonce or sigmoid"),
        ({"label_smoothing": 1.0}, r"loss\.label_smoothing=1\.0"),
        ({"image_weight": 1.5}, r"loss\.image_weight=1\.5"),
        ({"tile": 0}, r"loss\.tile=0"),
        ({"kind": "sigmoid", "label_smoothing": 0.1}, "neither label smoothing"),
    ],
)
def test_parameters_outside_their_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ContrastiveLoss(**options)  # type: ignore[arg-type]
