"""A run that learns nothing is told from one that needs patience."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clipdist.config import load_config
from clipdist.loss import ContrastiveLoss
from clipdist.train.collapse import CollapseWatch
from clipdist.train.loop import train

B, STEPS = 16, 5
CHANCE = math.log(B)


def watch(
    image_BD: Tensor,
    text_BD: Tensor,
    loss: float,
    group_B: Tensor | None = None,
    criterion: ContrastiveLoss | None = None,
) -> tuple[dict[str, float], str | None]:
    """What it measures, and what it says, after an epoch of such steps."""
    watched = CollapseWatch(criterion or ContrastiveLoss(), len(image_BD), STEPS)
    sums_2D = torch.stack([normalize(features.double()).sum(0) for features in (image_BD, text_BD)])
    for _ in range(STEPS):
        watched.note(loss, sums_2D, group_B)
    values = watched.measure()
    return values, watched.judge(values)


@given(st.integers(2, 20), st.integers(1, 8), st.floats(0, 3), st.integers(0, 99))
def test_spread_is_the_mean_cosine_distance_of_two_rows(rows: int, width: int, shift: float, seed: int) -> None:
    features_BD = normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double() + shift)
    values, _ = watch(features_BD, features_BD, 1.0)
    cosines_BB = features_BD @ features_BD.T
    expected = 1 - (cosines_BB.sum() - cosines_BB.trace()) / (rows * (rows - 1))
    assert values["train/text_spread"] == pytest.approx(float(expected), abs=1e-9)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=16), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_floor_is_what_the_best_logits_score(groups: list[int], smoothing: float) -> None:
    """Where features are free, logits equal to the logarithm of the targets are the best there are."""
    group_B = torch.tensor(groups)
    same_BB = (group_B[:, None] == group_B[None, :]).double()
    target_BB = (1 - smoothing) * same_BB / same_BB.sum(1) + smoothing / len(groups)
    best = -(target_BB * target_BB.clamp(min=1e-300).log()).sum(1).mean()
    features = torch.eye(len(groups))
    values, _ = watch(features, features, 1.0, group_B, ContrastiveLoss(label_smoothing=smoothing))
    assert values["train/loss_floor"] == pytest.approx(float(best), abs=1e-9)


def test_a_tower_that_says_the_same_of_everything_is_named() -> None:
    torch.manual_seed(0)
    spread, alike = torch.randn(B, 8), torch.ones(B, 8) + 0.01 * torch.randn(B, 8)
    _, said = watch(spread, alike, CHANCE)
    assert said is not None
    assert "collapsed: the text tower gives every input" in said
    assert "ln 16 = 2.77 is chance" in said
    _, said = watch(alike, alike, CHANCE)
    assert "the image and text towers give" in str(said)
    assert watch(spread, alike, CHANCE - 0.3)[1] is None, "it learns all the same"
    assert watch(spread, spread, CHANCE)[1] is None, "early, or too hard, but not collapsed"
    _, said = watch(spread, alike, 0.7, criterion=ContrastiveLoss("sigmoid"))
    assert "collapsed" in str(said)
    assert "chance" not in str(said), "no such level is known there"


def test_captions_that_are_all_the_same_are_told_from_a_collapse() -> None:
    torch.manual_seed(0)
    group_B = torch.zeros(B, dtype=torch.int64)
    values, said = watch(torch.randn(B, 8), torch.ones(B, 8), CHANCE, group_B)
    assert values["train/loss_floor"] == pytest.approx(CHANCE)
    assert said is not None
    assert "there is nothing to learn" in said
    group_B[0] = 1
    assert "nothing to learn" not in str(watch(torch.randn(B, 8), torch.randn(B, 8), CHANCE, group_B)[1])


def test_it_is_said_once_and_not_before_an_epoch() -> None:
    watched = CollapseWatch(ContrastiveLoss(), B, STEPS)
    said = []
    for _ in range(3 * STEPS):
        watched.note(CHANCE, torch.full((2, 4), B / 2.0), None)
        said.append(watched.judge(watched.measure()))
    assert [number for number, words in enumerate(said) if words] == [STEPS - 1]


def test_a_run_says_it_within_an_epoch(recipe: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """With a text tower that has no variance."""
    caplog.set_level(logging.WARNING)
    config = load_config(recipe(optim__lr=1e-12, train__epochs=1), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipdist.model.towers.pool", lambda hidden, mask, pooling: hidden[:, 0] * 0 + 1.0)
        train(config)
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert all(line["train/text_spread"] < 1e-6 < line["train/image_spread"] for line in trained)
    assert len([record for record in caplog.records if "collapsed: the text tower" in record.message]) == 1
