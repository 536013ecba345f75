"""`clipdist serve`: what it starts with, what it refuses to start with, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

import clipdist
from clipdist.cli import main
from clipdist.cluster.board_command import user
from clipdist.errors import UserError
from clipdist.model.saved import save_model
from clipdist.publish.serve import server, setup
from clipdist.publish.serve_command import LIMITS, announce, listen
from tests.conftest import SHAPES, picture
from tests.unit.serving import FakeGallery, classifier, dual_encoder, make_service
from tests.unit.test_board import listening

RED = picture("red", "square", "left")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model."""
    saved, folder = dual_encoder(), tmp_path_factory.mktemp("runs") / "tiny" / "model"
    scores = {"val": {"image_to_text": {"R@1": {"value": 0.125, "low": None, "high": None}, "gallery": 32}}}
    scores["val"]["split"] = "val"  # type: ignore[assignment]
    save_model(folder, saved.model, saved.tokenizer, scores=scores, about={"data": str(folder)})
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("".join(f"s{k}\t{shape}\t{shape} shape\n" for k, shape in enumerate(SHAPES)), encoding="utf-8")
    return path


def test_it_serves_until_it_is_told_to_stop(model: Path, classes: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("A red square at the left.\n\nA blue bar.\nA blue bar.\n", encoding="utf-8")
    options = ["--classes", str(classes), "--captions", str(captions), "--temperature", "0.5", "--max-queue", "7"]
    command = [sys.executable, "-m", "clipdist.cli", "serve", str(model), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said: list[str] = []
        while not (said and said[-1].startswith("then open ")):
            line = process.stdout.readline()
            assert line, process.communicate(timeout=20)
            said.append(line.rstrip("\n"))
        assert said[0] == "tiny: dual encoder, 5 classes, 2 captions. From another machine:"
        url = said[-1].split()[2]
        port = url.rstrip("/").rpartition(":")[2]
        assert f"  ssh -N -L {port}:127.0.0.1:{port} {user()}@{os.uname().nodename}" in said
        assert listening(int(port)) == {"127.0.0.1"}
        about = httpx.get(f"{url}api/about").json()
        assert (about["name"], about["temperature"], about["limits"]["max_queue"]) == ("tiny", 0.5, 7)
        assert about["calibrated_on"] is None
        assert {k: about["scores"][0][k] for k in ("title", "gallery")} == {
            "title": "R@1 image → text, val",
            "gallery": 32,
        }
        assert str(model.parent) not in json.dumps(about)
        answer = httpx.post(f"{url}api/image", files={"image": RED}).json()
        truth = clipdist.load(model).zero_shot({f"s{k}": [s, f"{s} shape"] for k, s in enumerate(SHAPES)}, (), 0.5)
        assert [(one["name"], one["probability"]) for one in answer["classes"]] == [
            (name, pytest.approx(p, abs=1e-5)) for name, p in truth.classify([RED])[0]
        ]
        assert {one["text"] for one in answer["captions"]} == {"A red square at the left.", "A blue bar."}
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "server_of", lambda app: pytest.fail(f"it serves with {words}"))
        assert main(["serve", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_a_model_that_is_none_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a finished model: model.json is missing" in refused(capsys, tmp_path)
    half = shutil.copytree(model, tmp_path / "half")
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "damaged model" in refused(capsys, half)
    (half / "model.safetensors").unlink()
    assert "not a finished model" in refused(capsys, half)
    body = json.loads((half / "model.json").read_text(encoding="utf-8"))
    (half / "model.json").write_text(json.dumps(body | {"version": 99}), encoding="utf-8")
    assert "version 99, expected 'clipdist-model' version 1" in refused(capsys, half)


def test_options_that_make_no_sense_are_refused(
    model: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--max-queue", "0"), ("--max-batch", "0"), ("--max-wait-ms", "-1"), ("--threads", "0")):
        assert f"{option}: found" in refused(capsys, model, option, value)
    assert "--temperature: found -1" in refused(capsys, model, "--temperature", "-1").replace(
        "temperature", "--temperature", 1
    )
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in refused(capsys, model, "--port", port)
    assert "--host" in refused(capsys, model, "--host", "256.1.2.3")
    assert "--port 70000" in refused(capsys, model, "--port", "70000")
    missing = tmp_path / "missing.txt"
    for option in ("--classes", "--templates", "--captions"):
        assert "cannot be read" in refused(capsys, model, option, missing)
    missing.write_text("\n", encoding="utf-8")
    assert "no caption" in refused(capsys, model, "--captions", missing)
    (tmp_path / "templates.txt").write_text("no braces\n", encoding="utf-8")
    assert "expected exactly one {}" in refused(
        capsys, model, "--classes", classes, "--templates", tmp_path / "templates.txt"
    )


def calibrated(model: Path, path: Path, **changes: Any) -> Path:
    """What `clipdist eval --zero-shot FIELD --calibrate SPLIT` writes, as far as it is read."""
    scale = 1 / clipdist.load(model).temperature
    body = {
        "split": "test",
        "calibration": {"temperature": 0.25, "fitted_on": "val", "divided_by": 0.25 * scale, "at_bound": False},
        "zero_shot": {
            "scale": scale,
            "prompts": [[shape, f"{shape} shape"] for shape in SHAPES],
            "templates": ["{}"],
            "top-1": {"value": 0.5, "low": 0.4, "high": 0.6},
        },
    }
    for name, value in changes.items():
        part, _, key = name.partition("__")
        body[part] = body[part] | {key: value}  # type: ignore[operator]
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def test_a_calibration_brings_temperature_and_classes(model: Path, classes: Path, tmp_path: Path) -> None:
    saved = clipdist.load(model)
    found = setup.read_calibration(calibrated(model, tmp_path / "evaluation.json"), saved)
    assert (found.temperature, found.fitted_on, found.templates) == (0.25, "val", ["{}"])
    assert found.prompts == [[shape, f"{shape} shape"] for shape in SHAPES]
    assert setup.scores_of(found.body) == [
        {"title": "zero-shot top-1, test", "value": 0.5, "low": 0.4, "high": 0.6, "gallery": None}
    ]
    for changes, words in (
        ({"zero_shot__scale": 3.0}, "expected an evaluation of this model"),
        ({"calibration__at_bound": True}, "no temperature could be fitted"),
        ({"calibration__temperature": "x"}, "no calibration in it"),
        ({"zero_shot__prompts": None}, "no calibration in it"),
    ):
        with pytest.raises(UserError, match=words):
            setup.read_calibration(calibrated(model, tmp_path / "evaluation.json", **changes), saved)
    (tmp_path / "evaluation.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="no calibration in it"):
        setup.read_calibration(tmp_path / "evaluation.json", saved)
    with pytest.raises(UserError, match="classifier"):
        setup.read_calibration(tmp_path / "evaluation.json", classifier())


def test_a_calibration_of_other_weights_or_templates_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = calibrated(model, tmp_path / "evaluation.json")
    (tmp_path / "templates.txt").write_text("a drawing of {}\n", encoding="utf-8")
    told = refused(capsys, model, "--calibration", path, "--templates", tmp_path / "templates.txt")
    assert "fitted with other templates" in told
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_digest": "f" * 16}), encoding="utf-8")
    assert f"of digest {'f' * 16}" in refused(capsys, model, "--calibration", path)


@pytest.mark.parametrize("wait", ["inf", "1e20", "nan", "-1"])
def test_a_wait_that_never_ends_is_refused(wait: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected 0 to 60,000" in refused(capsys, model, f"--max-wait-ms={wait}")


def test_a_calibration_of_other_classes_is_refused(
    model: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = calibrated(model, tmp_path / "evaluation.json", zero_shot__prompts=[["a"], ["b"]])
    assert "fitted on other classes" in refused(capsys, model, "--calibration", path, "--classes", classes)


def test_a_gallery_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipdist, "open_embeddings", lambda folder: FakeGallery(dual_encoder()), raising=False)
    assert "another model" in refused(capsys, model, "--gallery", tmp_path)


def test_an_address_that_others_reach_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    service = make_service()
    with listen("0.0.0.0", 0) as everywhere, listen("127.0.0.1", 0) as here:
        announce(everywhere, service, local=False)
        said = capsys.readouterr()
        assert "can be reached from other machines; there is no password and no encryption" in said.err
        assert "ssh" not in said.out
        announce(here, service, local=True)
        said = capsys.readouterr()
        assert said.err == ""
        assert f"ssh -N -L {here.getsockname()[1]}:127.0.0.1:" in said.out
    service.close()


def test_captions_come_from_the_gallery(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gallery = FakeGallery(dual_encoder())
    found = setup.captions_of(gallery)
    assert len(found) == gallery.rows
    assert found[3] == gallery.record(3)["texts"][0]
    assert not caplog.records
    monkeypatch.setattr(setup, "MOST_CAPTIONS", 10)
    assert setup.captions_of(gallery) == []
    assert "more than 10 different texts; name some with --captions FILE" in caplog.text


def test_scores_of_a_classifier_and_of_nothing() -> None:
    assert setup.scores_of({}) == []
    body = {"top-1": {"value": 0.5, "low": None, "high": None}, "auroc": {"value": None}, "split": "val"}
    assert [one["title"] for one in setup.scores_of(body)] == ["top-1, val"]
    assert setup.name_of(Path("/x/runs/mine/model")) == "mine"
    assert setup.name_of(Path("/x/mine")) == "mine"


def test_every_limit_has_an_option_and_a_default() -> None:
    from clipdist.publish.serve.limits import Limits

    assert set(vars(Limits())) == set(LIMITS)
    for name, words in LIMITS.items():
        default = getattr(Limits(), name)
        said = words.rpartition("(")[2].rstrip(")")
        assert said == "16 MiB" if name == "max_upload_bytes" else float(said.replace(",", "")) == default, name
    assert np.isfinite(Limits().timeout_seconds)
