"""What an export does when something is wrong: nothing half-made is left, and the message says what to do."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from clipdist import cli
from clipdist.data.images.pillow import to_rgb
from clipdist.data.images.resize import fit
from clipdist.errors import UserError
from clipdist.model.saved import save_model
from clipdist.model.towers import pool
from clipdist.publish.card import model_card, read_evaluations, score_rows
from clipdist.publish.export import hugging_face, onnx_folder, open_clip_folder, tower_folders
from clipdist.publish.export.exporting import Asked, Foreign, Own, compare, generated_samples, real_samples
from clipdist.publish.export.shipped.modeling_clipdist import pool as shipped_pool
from clipdist.publish.export.shipped.pixels_clipdist import square
from clipdist.publish.export.work import export
from clipdist.publish.notice import MEDICAL, RESEARCH, notice_of
from tests.unit.export_models import CLIP, classifier, encoder
from tests.unit.pictures import swapped_profile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_the_command(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = encoder()
    save_model(tmp_path / "model", saved.model, saved.tokenizer, scores=saved.scores, about=saved.about)
    words = ["export", str(tmp_path / "model"), "--to", "huggingface", "--out", str(tmp_path / "new" / "out")]
    assert cli.main([*words, "--data", str(shapes), "--notice", "Only  for\nshapes."]) == 0
    said = capsys.readouterr().out
    assert "8 images: largest difference" in said
    assert "shapes, split val" in said
    card = (tmp_path / "new" / "out" / "README.md").read_text()
    assert "> **Only for shapes.**" in card
    assert "/somewhere" not in card
    before = {path: path.read_bytes() for path in (tmp_path / "new" / "out").iterdir()}
    assert not [path for path, data in before.items() if str(tmp_path).encode() in data], "names a folder of here"
    assert cli.main(words) == 2
    assert "exists already; choose another folder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "new" / "out").iterdir()}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--to", "onnx", "--tower", "image"], "--tower goes with --to safetensors"),
        (["--to", "onnx", "--hub-name", "a/b"], "--hub-name goes with --to open_clip"),
        (["--to", "safetensors"], "pass --tower with one of image, text"),
    ],
)
def test_options_that_do_not_go_together(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = encoder()
    save_model(tmp_path / "model", saved.model, saved.tokenizer, scores={}, about={})
    assert cli.main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = encoder()
    save_model(tmp_path / "model", saved.model, saved.tokenizer, scores={}, about={})
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    assert cli.main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "damaged model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def refused(saved: Any, to: str, out: Path, message: str, **asked: Any) -> None:
    with pytest.raises(UserError, match=message):
        export(saved, to, out, generated_samples(saved), Asked(**asked))
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    refused(encoder(), "huggingface", tmp_path / "file" / "out", "cannot be written|Not a directory")


MLP = {"projection": {"kind": "mlp", "layer_norm": True}}
DISTILBERT = {
    "name": "hf:distilbert",
    "options": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 16},
}
OF_OPEN_CLIP: dict[str, tuple[Callable[[], Any], str]] = {
    "classifier": (classifier, "found a classifier, expected a dual encoder"),
    "mlp and layer norm": (
        lambda: encoder(None, **MLP),
        "layer_norm=true; an mlp projection of images with hidden=32 .it has 64.",
    ),
    "bias": (lambda: encoder(projection={"bias": True}), "biases behind a text tower"),
    "max of bert": (lambda: encoder(text={"pooling": "max"}), "pooling=max of a text tower"),
    "distilbert": (lambda: encoder(text=DISTILBERT), "a text tower of type distilbert"),
    "mean of CLIP": (lambda: encoder(CLIP, text={"pooling": "mean"}), "pooling=mean of a text tower of CLIP"),
    "options": (
        lambda: encoder(image={"options": {"depths": [1, 1, 1, 1]}}),
        "options of timm .depths. for timm:test_convnext",
    ),
    "side": (
        lambda: encoder(image={"name": "timm:test_vit", "side": 32}),
        "nothing was exported: the library cannot use",
    ),
}


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_what_open_clip_cannot_express(name: str, tmp_path: Path) -> None:
    make, message = OF_OPEN_CLIP[name]
    refused(make(), "open_clip", tmp_path / "out", message)


def test_a_tower_that_is_not_there(tmp_path: Path) -> None:
    refused(classifier(), "safetensors", tmp_path / "out", "this model has image alone", tower="text")


def test_a_classifier_with_two_heads(tmp_path: Path) -> None:
    saved = classifier(name="timm:deit_tiny_distilled_patch16_224", options={"depth": 1, "embed_dim": 24})
    refused(saved, "huggingface", tmp_path / "out", "no single linear layer .*head_dist.*; export it --to onnx")


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxruntime"), ("open_clip", "open_clip")])
def test_a_package_that_is_missing(to: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    install = r"pip install 'clipdist\[onnx\]'" if to == "onnx" else "pip install open_clip_torch"
    refused(encoder(), to, tmp_path / "out", install)


def off(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One number of one weight, by a hundredth or so."""
    key = max((key for key in state if key.endswith("weight") and "projection" in key), default="")
    assert key
    changed = state[key].clone()
    changed.view(-1)[0] += 0.02
    return {**state, key: changed}


def test_a_wrong_conversion_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hugging_face._weights
    monkeypatch.setattr(hugging_face, "_weights", lambda saved: off(right(saved)))
    refused(encoder(), "huggingface", tmp_path / "out", "differs from the model by .* at most 1e-04 is allowed")


def test_weights_that_are_lost_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = open_clip_folder._hugging_face_text

    def without(saved: Any, folder: Path) -> Any:
        shape, weights = right(saved, folder)
        return shape, {key: value for key, value in weights.items() if "embeddings.word" not in key}

    monkeypatch.setattr(open_clip_folder, "_hugging_face_text", without)
    refused(encoder(), "open_clip", tmp_path / "out", "nothing was exported: the library cannot use what was written")


def test_a_wrong_normalisation_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the folder's own preprocessing it is reported; where the graph normalises, it is an error."""
    saved = classifier()
    samples = generated_samples(saved)
    own = Own(saved.model.logits, None, "logits")
    shifted = Foreign(
        "none", image=lambda pixels: saved.model.logits((pixels + 3).clamp(max=255).byte()), normalised=False
    )
    with pytest.raises(UserError, match="differs from the model"):
        compare(saved, own, shifted, samples)
    nothing = Foreign("none", image=lambda pixels: saved.model.logits(pixels) * torch.nan, normalised=False)
    with pytest.raises(UserError, match="differs from the model by nan"):
        compare(saved, own, nothing, samples)
    narrow = Foreign("none", image=lambda pixels: saved.model.logits(pixels)[:, :1], normalised=False)
    with pytest.raises(UserError, match="gives"):
        compare(saved, own, narrow, samples)


def test_another_temperature_is_caught() -> None:
    saved = encoder()
    with pytest.raises(UserError, match=r"temperature is 0\.5"):
        compare(saved, Own(None, None), Foreign("none", temperature=0.5), generated_samples(saved))


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tower_folders, "save_file", full)
    refused(classifier(), "safetensors", tmp_path / "out", "No space left")
    monkeypatch.setattr(onnx_folder, "_write_graph", full)
    refused(classifier(), "onnx", tmp_path / "out", "No space left")


def test_samples_of_a_set_without_images(shapes: Path) -> None:
    with pytest.raises(UserError, match=r"no split|splits"):
        real_samples(str(shapes), "nowhere")
    assert len(real_samples(str(shapes), "val").images) == 8


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
@pytest.mark.parametrize("profile", [swapped_profile(), swapped_profile()[:300], SRGB], ids=["swapped", "torn", "sRGB"])
def test_the_shipped_pixels_follow_colour_profiles_as_training_does(mode: str, profile: bytes) -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 4), np.uint8), "RGBA").convert(mode)
    picture.info["icc_profile"] = profile
    expected = np.asarray(fit(to_rgb(picture.copy()), 24, "crop"))
    np.testing.assert_array_equal(square(picture, 24, "crop"), expected)
    if mode == "RGB" and profile == swapped_profile():
        del picture.info["icc_profile"]
        assert np.abs(square(picture, 24, "crop").astype(int) - expected).max() > 50, "the profile counts"


def test_the_shipped_pixels_refuse_greys_of_more_bits() -> None:
    with pytest.raises(ValueError, match="expected 8 bits"):
        square(Image.fromarray(np.full((8, 8), 1000, np.uint16)), 8, "crop")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from(["crop", "squash", "pad"]),
    st.sampled_from(["RGB", "L", "RGBA", "P"]),
)
def test_the_shipped_pixels_are_those_of_training(width: int, height: int, side: int, resize: Any, mode: str) -> None:
    rng = np.random.default_rng(width * 91 + height)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA").convert(mode)
    np.testing.assert_array_equal(square(picture, side, resize), np.asarray(fit(to_rgb(picture), side, resize)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from(["mean", "cls", "last", "max"]),
)
def test_the_shipped_pooling_is_that_of_the_tower(lengths: list[int], more: int, how: Any) -> None:
    longest = max(lengths) + more
    hidden = torch.randn(len(lengths), longest, 3, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    torch.testing.assert_close(shipped_pool(hidden, mask, how), pool(hidden, mask, how))


def test_the_notice() -> None:
    saved = encoder()
    assert notice_of(saved) == RESEARCH
    assert "not a medical device" in RESEARCH
    for about in (
        {"data": "/mnt/skincap"},
        {"notes": {"of": ["a chest radiograph"]}},
        {"license": "for clinical research"},
    ):
        saved.about = about
        assert notice_of(saved) == MEDICAL
    saved.about = {"data": "/medical/pets"}
    assert notice_of(saved) == RESEARCH, "folders above the set say nothing of it"
    saved.about = {"data": "/mnt/skincap", "notice": " For\nme. "}
    assert notice_of(saved) == "For me."


def test_the_card_says_what_was_measured() -> None:
    saved = encoder()
    checked = {"library": "a library", "samples": "generated", "compared": "unit vectors"}
    report = {"checked": checked, "notes": ["a note"], "versions": {"x": "1"}, "tower": None}
    card = model_card(saved, "huggingface", "print(1)", report)
    row = "| shapes val | image → text R@1 | 0.125 | 0.050 – 0.220 | 0.031 | gallery 32, 32 queries |"
    assert row in card
    assert "CC0-1.0, drawn by the tests" in card
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\n")
    saved.scores = {}
    object.__setattr__(saved.model.config.text, "name", "hf:/home/someone/bert-of-skin")
    assert "someone" not in (card := model_card(saved, "onnx", "print(1)", report))
    assert "text tower `hf:bert-of-skin`" in card
    assert "None were stored" in model_card(saved, "huggingface", "print(1)", report)
    assert not list(score_rows(saved))
    other = classifier()
    other.scores = {
        "val": {"classification": {"rows": 4, "classes": {"a": {}}, "top-1": {"value": 0.5}, "majority": 0.4}}
    }
    assert "| shapes val | top-1 | 0.500 | not measured | 0.400 | 4 images, 1 classes |" in model_card(
        other, "onnx", "print(1)", report
    )


def test_scores_of_an_evaluation_stand_on_the_card(tmp_path: Path) -> None:
    saved = encoder()
    direction = {"R@1": {"value": 0.25, "low": 0.125, "high": 0.375, "chance": 0.01}, "queries": 50, "gallery": 100}
    path = tmp_path / "shapes-test.json"
    body = {"data": "/x/shapes", "split": "test", "model": "elsewhere/model", "text_to_image": direction}
    path.write_text(json.dumps(body))
    rows = [row["split"] for row in score_rows(saved, read_evaluations([path], tmp_path))]
    assert rows == ["shapes test", "shapes val"]
    path.write_text(json.dumps({**body, "split": "val"}))
    rows = [row["value"] for row in score_rows(saved, read_evaluations([path], tmp_path))]
    assert rows == ["0.250"], "an evaluation replaces what was stored of the same split"
    path.write_text(json.dumps({**body, "model": str(Path(__file__).parent)}))
    with pytest.raises(UserError, match="expected those of"):
        read_evaluations([path], tmp_path)
    for wrong in ("{}", "torn", "[]"):
        path.write_text(wrong)
        with pytest.raises(UserError, match="expected JSON of clipdist eval"):
            read_evaluations([path], tmp_path)


def test_nothing_of_the_report_is_no_json(tmp_path: Path) -> None:
    saved = classifier()
    report = export(saved, "safetensors", tmp_path / "out", generated_samples(saved), Asked())
    body = json.loads((tmp_path / "out" / "export.json").read_text())
    assert body == report
    assert body["model"] == saved.digest
    assert {"clipdist", "torch", "timm", "python"} <= body["versions"].keys()


def test_a_wrong_bias_is_no_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved = encoder(temperature={"bias": -9.9})
    weights = hugging_face._weights

    def wrong(*words: Any) -> dict[str, torch.Tensor]:
        return {**weights(*words), "logit_bias": torch.tensor(123.0)}

    monkeypatch.setattr(hugging_face, "_weights", wrong)
    with pytest.raises(UserError, match=r"logit bias is 123\.0"):
        export(saved, "huggingface", tmp_path / "out", generated_samples(saved), Asked())
    assert not (tmp_path / "out").exists()
