"""Checkpoints are whole or passed over; schedules and weight decay are those that the recipe names."""

import logging
import math
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from clipdist.errors import UserError
from clipdist.train import checkpoint
from clipdist.train.checkpoint import (
    CheckpointConfig,
    CheckpointSaver,
    checkpoint_files,
    newest_sound,
    read_checkpoint,
    save_checkpoint,
)
from clipdist.train.optim import OptimConfig, Schedule, build_optimizer

NAMES = ("weight", "bias")
STATE = {"digest": "00ff", "schedule": {"best": None, "waited": 2}, "scaler": None}


def stepped(value: float = 1.0) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A model and an AdamW that has taken a step."""
    model = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def moments(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {name: optimizer.state[getattr(model, name)] for name in NAMES}


def files_of(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint_files(model.state_dict(), moments(model, optimizer))


def save(folder: Path, step: int, keep: int = 2) -> Path:
    model, optimizer = stepped(float(step))
    return save_checkpoint(folder, step, files_of(model, optimizer), STATE, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    model, optimizer = stepped()
    path = save_checkpoint(tmp_path / "c", 12, files_of(model, optimizer), STATE, 2)
    assert path == newest_sound(tmp_path / "c") == tmp_path / "c" / "step-00000012"
    weights, optimizer_state, averages, state = read_checkpoint(path)
    assert not averages
    assert state == {"step": 12, **STATE}
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    fresh, other = stepped(7.0)
    fresh.load_state_dict(dict(weights))
    kept = {number: dict(optimizer_state[name]) for number, name in enumerate(NAMES)}
    other.load_state_dict({"state": kept, "param_groups": other.state_dict()["param_groups"]})
    for one, two in ((model, optimizer), (fresh, other)):
        one(torch.ones(1, 2)).sum().backward()
        two.step()
    assert torch.equal(model.weight, fresh.weight), "the next step is the same, moments and all"
    assert names(tmp_path / "c") == ["latest", "step-00000012"]
    assert (tmp_path / "c" / "latest").read_text() == "step-00000012\n"


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save({"call": os.system}, path / "optimizer.safetensors")
    with pytest.raises(SafetensorError):
        read_checkpoint(path)


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 100, 20, 99_999_999, 100_000_000)[:2]:
        save(tmp_path, step, keep=3)
    for step in (200, 300, 123_456_789):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["latest", "step-00000200", "step-00000300", "step-123456789"]
    assert newest_sound(tmp_path) == tmp_path / "step-123456789", "by number, not by name"
    save(tmp_path, 123_456_790, keep=1)
    assert names(tmp_path) == ["latest", "step-123456790"]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused_when_read(keep: int) -> None:
    with pytest.raises(ValueError, match="keep"):
        CheckpointConfig(keep=keep)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 3)
    damage(tmp_path / "step-00000003" / "model.safetensors")
    save(tmp_path, 3)
    assert newest_sound(tmp_path) == tmp_path / "step-00000003"


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest_sound(tmp_path / "nowhere") is None
    assert newest_sound(tmp_path) is None


def test_a_leftover_of_a_killed_save_is_neither_read_nor_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    assert newest_sound(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


@pytest.mark.parametrize(
    "fault",
    ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json", "missing", "empty", "truncated"],
)
def test_a_damaged_newest_is_passed_over_with_a_warning(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    if fault == "missing":
        (newest / "optimizer.safetensors").unlink()
    elif fault == "empty":
        (newest / "checksums.json").write_text("{}")
    elif fault == "truncated":
        os.truncate(newest / "model.safetensors", 10)
    else:
        damage(newest / fault)
    with caplog.at_level(logging.WARNING):
        assert newest_sound(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002 is damaged (" in caplog.text
    assert "trying the one before" in caplog.text


def test_when_all_are_damaged_the_user_decides(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(UserError, match=r"all 2 checkpoints are damaged; remove the folder to start anew"):
        newest_sound(tmp_path)


def test_a_damaged_newer_one_never_pushes_out_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 10, keep=1)
    save(tmp_path, 20, keep=2)
    damage(tmp_path / "step-00000020" / "model.safetensors")
    assert newest_sound(tmp_path) == tmp_path / "step-00000010"
    saved = save(tmp_path, 15, keep=1)
    assert newest_sound(tmp_path) == saved
    assert names(tmp_path) == ["latest", "step-00000015"]


# In a thread of its own


def test_what_is_saved_in_the_background_is_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights change while the thread writes; only one checkpoint is written at a time."""
    saver = CheckpointSaver(tmp_path, CheckpointConfig(keep=3))
    go_on, writing = threading.Event(), []
    begin = checkpoint._begin

    def slow(folder: Path, step: int) -> Path:
        writing.append(step)
        assert go_on.wait(20)
        return begin(folder, step)

    monkeypatch.setattr(checkpoint, "_begin", slow)
    model, optimizer = stepped(1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saver.save(1, model.state_dict(), moments(model, optimizer), STATE)
    with torch.no_grad():
        model.weight.fill_(7)
    assert newest_sound(tmp_path) is None, "nothing that is being written looks complete"
    threading.Timer(0.3, go_on.set).start()
    saver.save(2, model.state_dict(), moments(model, optimizer), STATE)
    first = newest_sound(tmp_path)
    assert first is not None
    assert first.name in ("step-00000001", "step-00000002")
    saver.wait()
    assert writing == [1, 2]
    assert torch.equal(read_checkpoint(tmp_path / "step-00000001")[0]["weight"], before["weight"])
    assert (read_checkpoint(tmp_path / "step-00000002")[0]["weight"] == 7).all()
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("ask", ["check", "wait", "save"])
def test_what_goes_wrong_in_the_background_is_told(ask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not the disk's fault, as an exception, once."""
    saver = CheckpointSaver(tmp_path, CheckpointConfig())
    model, optimizer = stepped()
    state = (model.state_dict(), moments(model, optimizer), STATE)
    saver.save(1, *state)
    saver.wait()

    def wrong(*words: Any) -> None:
        raise TypeError("not JSON")

    monkeypatch.setattr(checkpoint, "_complete", wrong)
    saver.save(2, *state)
    assert saver._pending is not None
    saver._pending[1].exception(20)
    with pytest.raises(TypeError, match="not JSON"):
        saver.save(3, *state) if ask == "save" else getattr(saver, ask)()
    saver.wait()  # told once
    assert newest_sound(tmp_path) == tmp_path / "step-00000001"


# Schedules


def rates(steps: int = 40, **options: Any) -> list[float]:
    schedule = Schedule(OptimConfig(lr=2.0, **options), steps)
    return [schedule.lr(step) for step in range(steps)]


def test_warmup_rises_in_equal_steps_to_the_full_rate() -> None:
    found = rates(warmup_steps=8, schedule="constant")
    assert found[:8] == pytest.approx([2.0 * n / 8 for n in range(1, 9)])
    assert set(found[8:]) == {2.0}


def test_the_cosine_falls_to_its_floor() -> None:
    found = rates(warmup_steps=10, min_lr_fraction=0.1)
    assert found[9] == found[10] == 2.0
    assert all(later < earlier for earlier, later in pairwise(found[10:]))
    assert found[25] == pytest.approx(0.2 + 1.8 * 0.5), "half-way"
    schedule = Schedule(OptimConfig(lr=2.0, warmup_steps=10, min_lr_fraction=0.1), 40)
    assert schedule.lr(40) == pytest.approx(0.2)
    assert schedule.lr(90) == pytest.approx(0.2), "it does not rise again"
    assert found[39] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 29 / 30)))


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.warmup_steps=40, but the run has only 40 steps"):
        rates(warmup_steps=40)


def test_the_plateau_halves_after_its_patience_and_remembers(tmp_path: Path) -> None:
    config = OptimConfig(lr=2.0, schedule="plateau", plateau_patience=1, min_lr_fraction=0.2)
    schedule = Schedule(config, 100)
    seen = []
    for loss in (3.0, 2.0, 2.5, 2.5, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        schedule.observe(loss, higher_is_better=False)
        seen.append(schedule.lr(5))
        # A run that stops and goes on after each validation.
        state, schedule = schedule.state_dict(), Schedule(config, 100)
        schedule.load_state_dict(state)
    assert seen == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.4, 0.4, 0.4]


def test_higher_may_be_better_and_other_schedules_do_not_listen() -> None:
    plateau = Schedule(OptimConfig(lr=1.0, schedule="plateau", plateau_patience=0), 10)
    for score in (0.1, 0.2, 0.3):
        plateau.observe(score, higher_is_better=True)
    assert plateau.lr(0) == 1.0
    plateau.observe(0.3, higher_is_better=True)
    assert plateau.lr(0) == 0.5
    constant = Schedule(OptimConfig(lr=1.0, schedule="constant", plateau_patience=0), 10)
    for score in (0.3, 0.2, 0.1):
        constant.observe(score, higher_is_better=True)
    assert constant.lr(0) == 1.0


class Small(torch.nn.Module):
    """The names that a dual encoder's parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
        self.text = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4))
        self.image_projection = torch.nn.Linear(4, 2)
        self.temperature = torch.nn.Module()
        self.temperature.log_scale = torch.nn.Parameter(torch.zeros(1))


def test_matrices_decay_and_vectors_do_not() -> None:
    model: Any = Small()
    config = OptimConfig(lr=1.0, weight_decay=0.3, image_lr_scale=0.1, text_lr_scale=0.2)
    optimizer = build_optimizer(model, config)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        name_of[id(parameter)]: (group["part"], group["weight_decay"], group["lr_scale"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert groups == {
        "image.0.weight": ("image", 0.3, 0.1),
        **dict.fromkeys(("image.0.bias", "image.1.weight", "image.1.bias"), ("image", 0.0, 0.1)),
        "text.0.weight": ("text", 0.3, 0.2),
        **dict.fromkeys(("text.1.weight", "text.1.bias"), ("text", 0.0, 0.2)),
        "image_projection.weight": ("head", 0.3, 1.0),
        **dict.fromkeys(("image_projection.bias", "temperature.log_scale"), ("head", 0.0, 1.0)),
    }
    assert Schedule(config, 10).apply(optimizer.param_groups, 0) == 1.0
    assert {(group["part"], group["lr"]) for group in optimizer.param_groups} == {
        ("image", 0.1),
        ("text", 0.2),
        ("head", 1.0),
    }
