"""From ISIC 2024's raw layout to a report: draw, pack, train the small recipe, zero-shot scores by subgroup."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h5py", reason="h5py (extra: isic) is not installed")
ROOT = Path(__file__).parents[2]


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_from_raw_tiles_to_a_report(tmp_path: Path) -> None:
    data, runs = tmp_path / "isic", tmp_path / "runs"
    draw = ("--phantom", "900", "--phantom-side", "48", "--malignant", "0.05", "--metadata")
    printed = run(sys.executable, "shards/isic.py", tmp_path / "raw", *draw, "--out", data)
    assert "rejected: none of 900" in printed
    run(
        sys.executable,
        "-m",
        "clipdist.train",
        "launch/recipes/isic.yaml",
        "small=true",
        f"data.set={data}",
        f"runs={runs}",
        "optim.warmup_steps=3",  # of ten
    )
    prompts = ("--classes", "launch/prompts/isic_classes.json", "--templates", "launch/prompts/isic_templates.txt")
    model = runs / "isic" / "model"
    run(
        Path(sys.executable).with_name("clipdist"), "eval", model, "--data", data, "--zero-shot", "label", *prompts,
        "--by", "size", "tile", "--workers", "0", "--bootstrap", "50",
    )  # fmt: skip
    scores = json.loads((runs / "isic" / "evaluation" / "isic-test.json").read_text())
    assert scores["zero_shot"]["classes"]["malignant"]["rows"] >= 2
    assert 0 <= scores["zero_shot"]["auroc"]["value"] <= 1
    assert {"size", "tile"} == {one["field"] for one in scores["subgroups"]}
    assert "synthetic" in (runs / "isic" / "report.html").read_text(encoding="utf-8")
