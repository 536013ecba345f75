"""What a run says of its arithmetic, memory and time is true."""

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipdist.cli import main
from clipdist.config import load_config
from clipdist.data.text import train_wordpiece
from clipdist.model.build import build_model
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.freeze import StageConfig, unused_parameters
from clipdist.train.flops import FlopCount, loss_flops
from clipdist.train.metrics import arithmetic, peak_flops
from clipdist.train.profile import PARTS, Profile, Stopwatch, measure
from clipdist.train.profile_command import amount_of, percentages, table
from clipdist.train.trainer import Trainer

Recipe = Callable[..., Path]
TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("disc", "cross", "bar", "ring")]


@pytest.fixture(autouse=True)
def plain_logging() -> Any:
    """The command sets up logging for a process of its own."""
    root, ours = logging.getLogger(), logging.getLogger("clipdist")
    handlers, level, own = list(root.handlers), root.level, ours.level
    yield
    root.handlers, root.level = handlers, level
    ours.setLevel(own)


def counted(path: Path, words: list[str]) -> tuple[DualEncoder, FlopCount]:
    config = load_config(path, words)
    tokenizer = train_wordpiece(TEXTS * 2, 100, 16)
    model = build_model(config.model, tokenizer, seed=1)
    return model, FlopCount(model, unused_parameters(model))


def text_tower(model: DualEncoder, tokens: int) -> float:
    """Operations of a BERT's forward pass for one caption, by hand: its matrices, and twice T × T products."""
    encoder: Any = model.text.model
    matrices = sum(module.weight.numel() for module in encoder.encoder.modules() if isinstance(module, nn.Linear))
    config = encoder.config
    attention = 2 * 2 * tokens**2 * config.hidden_size * config.num_hidden_layers
    return 2.0 * tokens * matrices + attention


def test_a_towers_arithmetic_is_what_a_hand_counts(recipe: Recipe) -> None:
    """Frozen: a forward pass alone. Trained: twice as much again, and a gradient for what its projection is given."""
    model, count = counted(recipe(), [])
    frozen = StageConfig(image="none", text="none")
    difference = count.of_a_pair(frozen, 16) - count.of_a_pair(frozen, 8)
    assert difference == text_tower(model, 16) - text_tower(model, 8)
    trained = count.of_a_pair(StageConfig(image="none"), 8) - count.of_a_pair(frozen, 8)
    head = sum(module.weight.numel() for module in model.text_projection if isinstance(module, nn.Linear))
    assert trained == 2 * text_tower(model, 8) + 2 * head


def test_a_locked_tower_that_is_not_run_takes_nothing(recipe: Recipe) -> None:
    model, count = counted(recipe(), [])
    encoder: Any = model.text.model
    pooler = 2 * encoder.pooler.dense.weight.numel()  # whose output nobody looks at
    assert count.of_a_locked_tower("text", StageConfig(text="none"), 8) == text_tower(model, 8) + pooler


def test_the_loss_is_counted_by_formula(recipe: Recipe) -> None:
    _, count = counted(recipe(), [])
    assert loss_flops(1000, 32) == 3 * 2 * 1000 * 1000 * 32
    step = count.of_a_step(StageConfig(), 8, 1000)
    assert step == 1000 * count.of_a_pair(StageConfig(), 8) + loss_flops(1000, 32)


def test_what_is_computed_twice_counts_once(recipe: Recipe) -> None:
    """Activations computed again are no arithmetic of the model, and the counter leaves no trace."""
    plain, count = counted(recipe(), [])
    expected = count.of_a_pair(StageConfig(), 8)
    plain.image.model.set_grad_checkpointing(True)  # type: ignore[operator]
    plain.text.model.gradient_checkpointing_enable()  # type: ignore[operator]
    again = FlopCount(plain, unused_parameters(plain))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    state = torch.get_rng_state()
    assert again.of_a_pair(StageConfig(), 8) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert any(getattr(module, "grad_checkpointing", False) for module in plain.modules()), "it was on, and still is"


def test_micro_batches_change_nothing_in_the_count(recipe: Recipe) -> None:
    found = []
    for name, micro_batch in (("whole", 0), ("parts", 6)):
        trainer = Trainer(load_config(recipe(), [f"name={name}", f"train.micro_batch={micro_batch}"]))
        batch = next(iter(trainer.batches()))
        trainer.enter_epoch(0)
        trainer.step(batch)
        record = trainer.log({})
        assert record["perf/flops_per_step"] == trainer.step_flops
        seconds = record["perf/step_seconds"]
        assert record["perf/tflops_per_device"] == pytest.approx(record["perf/flops_per_step"] / seconds / 1e12)
        assert "perf/mfu" not in record, "nobody knows the peak of this CPU"
        found.append(record["perf/flops_per_step"])
        trainer.close()
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 67e12),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494e12),
        ("NVIDIA H100 PCIe", "fp16", False, 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312e12),
        ("NVIDIA A10G", "bf16", False, 70e12),
        ("NVIDIA A10", "bf16", False, 125e12),
        ("NVIDIA L40S", "bf16", False, 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125e12),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7e12),
        ("Tesla V100-SXM2-16GB", "bf16", False, None),
        ("Tesla T4", "bf16", False, None),
        ("NVIDIA GeForce RTX 3090", "bf16", False, None),
    ],
)
def test_a_run_is_measured_by_the_peak_of_its_own_precision(
    name: str, precision: str, tf32: bool, peak: float | None
) -> None:
    assert peak_flops(name, precision, tf32) == peak


def test_share_of_the_peak_is_per_device() -> None:
    found = arithmetic(8e12, step_seconds=2.0, devices=4, peak=10e12)
    assert found == {"perf/flops_per_step": 8e12, "perf/tflops_per_device": 1.0, "perf/mfu": 0.1}


def test_a_stopwatch_counts_each_moment_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.running = True
    began = time.perf_counter()
    with watch.part("other"):
        time.sleep(0.02)
        with watch.part("loss"):
            time.sleep(0.03)
        watch.timed("backward", time.sleep)(0.04)
    whole = time.perf_counter() - began
    assert sum(watch.seconds.values()) == pytest.approx(whole, abs=0.005)
    least = {"other": 0.02, "loss": 0.03, "backward": 0.04}  # a busy machine wakes up late
    assert all(watch.seconds[part] >= seconds for part, seconds in least.items())


def test_a_slow_tower_is_found(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty milliseconds more in one place appear in that place, and the parts add up to the step."""
    trainer = Trainer(load_config(recipe(), []))
    image: Any = trainer.model.image
    given = image.normalise

    def slow(images: torch.Tensor) -> Any:
        time.sleep(0.02)
        return given(images)

    monkeypatch.setattr(image, "normalise", slow)
    (profile,) = measure(trainer, steps=3)
    assert tuple(profile.parts) == PARTS
    assert sum(profile.parts.values()) == pytest.approx(profile.step_seconds)
    assert profile.parts["image tower"] > 0.02
    for part in ("text tower", "loss", "backward", "optimiser", "other", "data wait"):
        assert 0 < profile.parts[part] < profile.step_seconds / 2, part
    assert profile.parts["gather"] == profile.parts["gradient exchange"] == 0, "there is nobody to talk to"
    assert profile.pairs_per_second == pytest.approx(24 / profile.plain_seconds)
    assert "encode_image" not in vars(trainer.model), "the trainer is as it was"
    assert trainer.objective.criterion.kind == "infonce"
    trainer.close()


def test_the_command_prints_a_table_and_leaves_the_run_alone(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], signal_handlers: None
) -> None:
    path, trace = recipe(), tmp_path / "out" / "trace.json"
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "mine.txt").write_text("kept")
    assert main(["profile", str(path), "--steps", "2", "train.micro_batch=8", "--trace", str(trace)]) == 0
    said = capsys.readouterr().out
    shares = {name: float(share) for name, share in re.findall(r"^([a-z ]+?) +[\d.]+ +([\d.]+)%", said, re.M)}
    assert set(PARTS) < shares.keys()
    assert shares.pop("a step") == 100.0
    assert sum(shares.values()) == pytest.approx(100.0)
    for words in ("24 pairs each, 8 at a time", "pairs/s", "cost of timing", "TFLOP a step", "GiB", str(trace)):
        assert words in said
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert names.count("step") == 3
    assert {"image tower", "text tower", "loss", "backward", "optimiser", "data wait"} <= set(names)
    assert names.count("image tower") == 3 * (2 * 3 - 1), "three micro-batches, all but the last twice a step"
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["tiny"], "its own folder is gone"
    assert [entry.name for entry in run.iterdir()] == ["mine.txt"]


def test_the_command_refuses_what_it_cannot_do(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["profile", str(recipe()), "--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
    assert main(["profile", str(recipe()), "train.micro_batch=-1"]) == 2
    assert "train.micro_batch=-1" in capsys.readouterr().err


def test_percentages_add_up() -> None:
    assert percentages([1 / 3, 1 / 3, 1 / 3]) in ([33.4, 33.3, 33.3], [33.3, 33.4, 33.3], [33.3, 33.3, 33.4])
    for shares in ([0.1234, 0.5, 0.3766], [1.0], [0.99996, 0.00004], [1 / 7] * 7):
        assert sum(round(10 * share) for share in percentages(shares)) == 1000
    assert [amount_of(n) for n in (24, 1_500, 2_500_000, 7e12)] == ["24 bytes", "1.5 kB", "2.5 MB", "7,000.0 GB"]


def test_the_table_tells_of_the_slowest_rank() -> None:
    def profile(loss: float) -> Profile:
        parts = dict.fromkeys(PARTS, 0.01) | {"loss": loss}
        figures = {"perf/memory_gib": 1.0, "perf/bytes_sent_features": 2e6, "perf/seconds_features": 0.002}
        return Profile(5, parts, sum(parts.values()), 0.1, 240.0, what="pairs", figures=figures)

    said = table("heading", [profile(0.02), profile(0.04)])
    assert re.search(r"^loss +30\.00 .* 40\.00 \(rank 1\)", said, re.M)
    assert "features: 2.0 MB in 2.00 ms" in said


OF_A_CHILD = """
import torch
from clipdist.train.metrics import memory
print(memory(torch.device("cpu"))["perf/memory_gib"])
"""
OF_A_PARENT = """
import subprocess, sys
held = b"1" * 1_500_000_000
del held
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


def test_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    """A launcher or a notebook may have held much more."""
    done = subprocess.run([sys.executable, "-c", OF_A_PARENT, OF_A_CHILD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.05 < float(done.stdout) < 1.2
