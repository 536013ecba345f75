"""From a raw folder of drawn chests to a model that was measured as ConVIRT is."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from clipdist import cli

ROOT = Path(__file__).parents[2]
PROBES = ("Cardiomegaly", "Pleural Effusion", "Edema", "Pneumothorax")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_small_recipe_learns_what_radiographs_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, data, run = tmp_path / "raw", tmp_path / "set", tmp_path / "runs" / "convirt"
    recipe = runpy.run_path(str(ROOT / "shards" / "mimic_cxr.py"))["main"]
    recipe([str(raw), "--phantom", "500", "--out", str(data), "--workers", "0"])
    assert "rejected: none" in capsys.readouterr().out
    words = ["small=true", f"data.set={data}", f"runs={run.parent}", "data.workers=0", "train.epochs=10"]
    assert cli.main(["train", str(ROOT / "launch" / "recipes" / "convirt.yaml"), *words]) == 0

    files = [f"{raw}/retrieval/{kind}-retrieval" for kind in ("image", "text")]
    queries = ["--queries", *(f"{one}/query.csv" for one in files), "--candidates", f"{files[0]}/candidate.csv"]
    probes = ["--data", str(data), "--split", "test", "--probe", *PROBES, "--fractions", "0.1", "1"]
    more = ["--images", str(raw), "--bootstrap", "0", "--workers", "0"]
    assert cli.main(["eval", str(run / "model"), *probes, *queries, *more]) == 0

    def found(name: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((run / "evaluation" / f"{name}.json").read_text())
        return read

    scores = found("set-test")
    for way in ("image_to_text", "text_to_image"):
        assert scores[way]["R@10"]["value"] > 1.8 * scores[way]["R@10"]["chance"]
    assert all(probe["score"]["value"] > 0.7 for probe in scores["probe"]["scores"])
    for kind in ("image", "text"):
        precision = found(f"{kind}-retrieval-query")["query_candidates"]
        assert (precision["kind"], precision["gallery"]) == (f"{kind}-image", 400)
        assert precision["P@5"]["value"] > 2.5 * precision["P@5"]["chance"]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(words in report for words in ("Pleural Effusion", "P@50"))
