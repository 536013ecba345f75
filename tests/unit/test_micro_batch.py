"""`train.micro_batch: auto` reckons what a step needs, and what does not fit ends in one line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipdist.config import load_config
from clipdist.data.text import train_wordpiece
from clipdist.errors import UserError
from clipdist.model.build import build_model
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.freeze import StageConfig, unused_parameters
from clipdist.train import micro_batch
from clipdist.train.micro_batch import (
    cgroup_free_bytes,
    choose_micro_batch,
    estimate_step,
    even_micro_batch,
    free_bytes,
    kept_bytes,
    out_of_memory,
)
from clipdist.train.trainer import Trainer

Recipe = Callable[..., Path]
TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("disc", "cross", "bar", "ring")]


def built(path: Path, words: list[str]) -> DualEncoder:
    config = load_config(path, words)
    return build_model(config.model, train_wordpiece(TEXTS * 2, 100, 16), seed=1)


def choose(model: DualEncoder, rows: int, stages: tuple[StageConfig, ...] = ()) -> int:
    unused = unused_parameters(model)
    return choose_micro_batch(model, unused, stages, rows=rows, max_tokens=16, precision=torch.float32).micro_batch


def needed(model: DualEncoder, rows: int, micro: int, stages: tuple[StageConfig, ...] = ()) -> int:
    unused = unused_parameters(model)
    return estimate_step(model, unused, stages, rows=rows, max_tokens=16, precision=torch.float32).of(micro)


def limit(monkeypatch: pytest.MonkeyPatch, usable: float) -> None:
    """As if so many bytes might be used."""
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: usable / micro_batch.SAFE_SHARE)


@pytest.mark.parametrize("image", ["timm:test_convnext", "timm:test_vit"])
def test_a_straight_line_tells_what_many_rows_keep(image: str, recipe: Recipe) -> None:
    """Measured at 2 and 4 rows, true at 40 to one per cent."""
    side = 160 if "vit" in image else 32
    model = built(recipe(), [f"model.image.name={image}", f"model.image.side={side}"])
    model.train()
    few, more, many = (kept_bytes(model, rows, 16, torch.float32).total for rows in (2, 4, 40))
    slope = (more - few) / 2
    assert slope > 0
    assert few + 38 * slope == pytest.approx(many, rel=0.01)


def test_the_count_is_that_of_a_real_step(recipe: Recipe) -> None:
    """What hooks of another kind count in a step with its loss: all memory that comes and is still there when the
    backward pass begins. To a tenth."""
    model = built(recipe(), [])
    model.train()
    rows = 32
    reckoned = kept_bytes(model, rows, 16, torch.float32)
    images = torch.zeros(rows, 3, 32, 32, dtype=torch.uint8)
    tokens = torch.ones(rows, 16, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorder:
        encoded = model(images, tokens, tokens)
    held = sum(event.self_cpu_memory_usage for event in recorder.events())
    assert encoded.image_features_bD.requires_grad
    assert reckoned.total == pytest.approx(held, rel=0.1)


MEASURE = """
import psutil, sys, torch
from pathlib import Path
from tests.unit.test_micro_batch import built, needed
torch.set_num_threads(1)
model = built(Path(sys.argv[1]), sys.argv[2:])
rows = 96
reckoned = needed(model, rows, rows)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
images = torch.zeros(rows, 3, model.image.side, model.image.side, dtype=torch.uint8)
tokens = torch.ones(rows, 16, dtype=torch.int64)
model.train()
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage's would be that of who started us
encoded = model(images, tokens, tokens)
(encoded.image_features_bD.sum() + encoded.text_features_bD.sum()).backward()
optimizer.step()
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(reckoned, peak - before)
"""


def test_the_estimate_is_what_a_process_grows_by(recipe: Recipe) -> None:
    """Peak memory of a real step in a process of its own. Never more than the safe share is made for, and not so much
    less that memory would lie idle."""
    words = ["model.image.name=timm:test_vit", "model.image.side=160"]
    command = [sys.executable, "-c", MEASURE, str(recipe()), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reckoned, grown = map(int, done.stdout.split()[-2:])
    assert grown > 50e6, "large enough to tell from the process' own ups and downs"
    assert 0.6 * reckoned < grown < reckoned / micro_batch.SAFE_SHARE


def test_the_largest_divisor_that_fits_is_chosen(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(recipe(), [])
    for micro in (48, 24, 16, 2, 1):
        limit(monkeypatch, needed(model, 48, micro) + 10)
        assert choose(model, 48) == micro
        limit(monkeypatch, needed(model, 48, micro) - 10)
        if micro > 1:
            assert choose(model, 48) == max(n for n in range(1, micro) if 48 % n == 0)
    with pytest.raises(UserError, match=r"^train\.micro_batch=auto: a step with 1 rows at a time needs about .* GiB"):
        choose(model, 48)


def test_a_frozen_tower_leaves_room_for_more_rows(recipe: Recipe) -> None:
    """Of several stages the hungriest counts."""
    model = built(recipe(), [])
    frozen, all_of_it = StageConfig(image="none"), StageConfig(from_epoch=1)
    assert needed(model, 48, 48, (frozen,)) < 0.7 * needed(model, 48, 48)
    assert needed(model, 48, 48, (frozen, all_of_it)) == needed(model, 48, 48)


def test_half_precision_keeps_less(recipe: Recipe) -> None:
    model = built(recipe(), ["model.image.name=timm:test_vit", "model.image.side=160"])
    model.train()
    whole, half = (kept_bytes(model, 16, 16, kind).total for kind in (torch.float32, torch.bfloat16))
    assert half < 0.8 * whole


def test_measuring_leaves_no_trace(recipe: Recipe) -> None:
    model = built(recipe(), ["model.image.name=timm:test_resnet", "model.projection.dropout=0.5"])
    model.image.batch_norm = "frozen"  # so that micro-batches are possible; the statistics still move in training
    unused = unused_parameters(model)
    model.text.requires_grad_(False)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    model.eval()
    choose_micro_batch(model, unused, (), rows=8, max_tokens=16, precision=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_batch_statistics_want_all_rows(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(recipe(), ["model.image.name=timm:test_resnet"])
    assert choose(model, 24) == 24
    limit(monkeypatch, needed(model, 24, 24) - 10)
    with pytest.raises(UserError, match=r"24 rows at a time .* batch normalisation .*batch_norm=frozen, or"):
        choose(model, 24)
    model.image.batch_norm = "frozen"
    limit(monkeypatch, needed(model, 24, 24) - 10)
    assert choose(model, 24) == 12


def test_a_run_measures_and_writes_down(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe(train__micro_batch="auto")
    caplog.set_level("INFO", logger="clipdist")
    trainer = Trainer(load_config(path, []))
    assert trainer.micro_batch == 24, "this machine has room for 24 small pictures"
    start = json.loads((tmp_path / "runs" / "tiny" / "environment.json").read_text())["starts"][-1]
    assert start["micro_batch"] == 24
    assert 0 < start["bytes_per_row"] < start["fixed_bytes"] < start["free_bytes"]
    assert re.search(r"train\.micro_batch=auto: 24 rows at a time, about .* GiB that are free", caplog.text)
    assert start["step"] == 0
    trainer.close()
    rows = start["fixed_bytes"] + 8 * start["bytes_per_row"]
    limit(monkeypatch, rows + 10)
    trainer = Trainer(load_config(path, ["name=small"]))
    assert trainer.micro_batch == 8
    trainer.enter_epoch(0)
    assert trainer.step(next(iter(trainer.batches())))["train/grad_norm"] > 0
    trainer.close()


def test_only_a_number_or_auto(recipe: Recipe) -> None:
    for word in ("most", "-1", "2.5"):
        with pytest.raises(UserError, match=r"train\.micro_batch"):
            load_config(recipe(), [f"train.micro_batch={word}"])


def write_group(folder: Path, values: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(value)


@pytest.mark.parametrize("inside", [True, False], ids=["own path visible", "own group is the root"])
def test_limits_of_control_groups_count(inside: bool, tmp_path: Path) -> None:
    """The tightest on the way up; version 2."""
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job_1/step_0\n")
    root = tmp_path / "v2"
    own = {"memory.max": "3000\n", "memory.current": "1000\n", "memory.stat": "anon 5\ninactive_file 400\n"}
    if inside:
        write_group(root, {"memory.stat": ""})
        write_group(root / "job_1", {"memory.max": "9000\n", "memory.current": "5000\n", "memory.stat": "x 1\n"})
        write_group(root / "job_1" / "step_0", own)
    else:
        write_group(root, own)
    assert cgroup_free_bytes(root, membership) == 2400
    write_group(root / "job_1/step_0" if inside else root, {"memory.max": "max\n"})
    assert cgroup_free_bytes(root, membership) == (4000 if inside else None)


def test_limits_of_control_groups_count_in_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n0::/\n")
    group = {"memory.limit_in_bytes": "700", "memory.usage_in_bytes": "500", "memory.stat": "total_inactive_file 50\n"}
    write_group(tmp_path / "memory" / "slurm" / "job_7", group)
    assert cgroup_free_bytes(tmp_path, membership) == 250
    assert cgroup_free_bytes(tmp_path, tmp_path / "missing") is None


def test_ranks_share_a_nodes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
    monkeypatch.setattr(micro_batch, "cgroup_free_bytes", lambda: 4000)
    assert free_bytes(torch.device("cpu")) == 1000


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            [],
            r"with 24 rows per micro-batch \(CUDA out of memory\. Tried .* 2\.00 GiB\); set train\.micro_batch=12, or",
        ),
        (["train.micro_batch=8"], r"with 8 rows .*; set train\.micro_batch=4, or train\.precision=bf16; activation"),
        (["train.micro_batch=3"], r"with 3 rows .*; set train\.micro_batch=1, or"),
        (["train.micro_batch=1"], r"with 1 rows .*; set a smaller model or model\.image\.side, or"),
    ],
)
def test_out_of_memory_is_one_line(
    words: list[str], advice: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_config(recipe(), words))

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    monkeypatch.setattr(trainer.objective, "criterion", full)
    trainer.enter_epoch(0)
    with pytest.raises(UserError, match=advice) as caught:
        trainer.step(next(iter(trainer.batches())))
    assert "\n" not in str(caught.value)
    trainer.close()


def test_bf16_is_no_advice_for_bf16() -> None:
    advice = r"set train\.micro_batch=12; activation checkpointing"
    with pytest.raises(UserError, match=advice), out_of_memory(24, 24, "bf16"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(KeyError), out_of_memory(24, 24, "bf16"):
        raise KeyError("another error stays what it is")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_micro_batches_are_few_and_even(rows: int, most: int) -> None:
    size = even_micro_batch(rows, most)
    number = -(-rows // size)
    assert 1 <= size <= most
    assert number == -(-rows // min(most, rows)), "no more of them than needed"
    assert rows - (number - 1) * size > 0
    assert size - rows // number <= 1, "the largest has at most one row more than the mean"


def test_a_number_that_does_not_divide_the_share_goes_on(recipe: Callable[..., Path]) -> None:
    assert Trainer(load_config(recipe(), ["train.micro_batch=7"])).micro_batch == 6
    assert Trainer(load_config(recipe(name="more"), ["train.micro_batch=70"])).micro_batch == 24
