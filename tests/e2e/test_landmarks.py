"""From tars of drawn landmarks to a report: pack, train the small recipe, score the test split, ask the model."""

import json
import runpy
from pathlib import Path

import pytest

import clipdist
from clipdist import cli
from clipdist.data.shards import ShardSet

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_small_recipe_knows_landmarks_on_new_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "set", tmp_path / "runs" / "landmarks"
    recipe = runpy.run_path(str(ROOT / "shards" / "landmarks.py"))["main"]
    recipe([str(tmp_path / "raw"), "--phantom", "24", "--out", str(data), "--workers", "0"])
    assert "classes: 24 in train" in capsys.readouterr().out
    words = ["small=true", f"data.set={data}", f"runs={run.parent}", "data.workers=0", "evaluate.workers=0"]
    assert cli.main(["train", str(ROOT / "launch" / "recipes" / "landmarks.yaml"), *words]) == 0
    model = run / "model"
    assert cli.main(["eval", str(model), "--data", str(data), "--split", "test", "--workers", "0"]) == 0

    scores = json.loads((run / "evaluation" / "set-test.json").read_text())["classification"]
    assert scores["rows"] > 50
    assert scores["top-1"]["value"] > 6 * scores["majority"], "always the same answer"
    assert "Calibration" in (run / "report.html").read_text(encoding="utf-8")

    split = ShardSet.open(data).split("test")
    samples = [split.read(number) for number in range(len(split))]
    answers = clipdist.load(model).classify([sample.image for sample in samples], top=1)
    right = sum(answer[0][0] == sample.fields["label"] for answer, sample in zip(answers, samples, strict=True))
    assert right / len(samples) == pytest.approx(scores["top-1"]["value"], abs=1e-9)
