"""The path of `make quickstart`, smaller: draw, pack, train with two processes, evaluate, report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path: Path) -> None:
    data, runs = tmp_path / "phantom", tmp_path / "runs"
    draw = (sys.executable, "shards/phantom.py", "--out", data, "--images", "200", "--side", "64")
    assert "rejected: none" in run(*draw)
    assert "already there" in run(*draw)
    launch = (BIN / "accelerate", "launch", "--config_file", "launch/accelerate/cpu.yaml", "--main_process_port", "0")
    changes = (f"data.set={data}", f"runs={runs}", "train.global_batch=48", "optim.warmup_steps=2")
    train = (*launch, "--num_processes", "2", "-m", "clipdist.train", "launch/recipes/phantom.yaml", "small=true")
    run(*train, *changes)
    table = run(BIN / "clipdist", "eval", runs / "phantom" / "model", "--data", data, "--split", "test")
    assert "gallery" in table
    scores = json.loads((runs / "phantom" / "evaluation" / "phantom-test.json").read_text())
    held_out = json.loads((data / "manifest.json").read_text())["splits"]["test"]["samples"]
    assert scores["image_to_text"]["gallery"] == scores["text_to_image"]["gallery"] == held_out
    assert scores["image_to_text"]["R@1"]["low"] is not None
    assert scores["units"] > 1, "intervals are resampled by patient"
    report = (runs / "phantom" / "report.html").read_text(encoding="utf-8")
    assert "synthetic" in report
    assert report.count("data:image/svg+xml") >= 3, "curves are there"
