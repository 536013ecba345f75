"""Each export, loaded here by the library that it is for, gives what the model gives."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch.nn.functional import normalize

from clipdist.errors import UserError
from clipdist.model.build import build_model, build_tokenizer
from clipdist.model.dual_encoder import ModelConfig, ProjectionConfig, projection
from clipdist.model.published import describe, start_from
from clipdist.model.saved import SavedModel
from clipdist.publish.export import onnx_folder
from clipdist.publish.export.exporting import SHIPPED, Asked, generated_samples
from clipdist.publish.export.work import export
from tests.unit.export_models import CLIP, SIGLIP, TEXTS, classifier, encoder, files, pictures
from tests.unit.test_published import OPEN_CLIP as OPEN_CLIP_SOURCES
from tests.unit.test_published import write_open_clip

AWKWARD: dict[str, Any] = {
    "image": {"resize": "pad", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
    "text": {"pooling": "max"},
    "projection": {"kind": "mlp", "hidden": 20, "layer_norm": True},
    "temperature": {"initial": 0.1, "bias": -3.0},
}
NATIVE_TIMM = {"name": "timm:test_convnext", "side": 48}


def out_of(saved: Any, to: str, folder: Path, **asked: Any) -> tuple[Path, dict[str, Any]]:
    report = export(saved, to, folder / to, generated_samples(saved), Asked(**asked))
    assert json.loads((folder / to / "export.json").read_text()) == report
    assert not (folder / f"{to}.partial").exists()
    return folder / to, report


def close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=0)


SWIN = {
    "name": "timm:swin_tiny_patch4_window7_224",
    "side": 64,
    "options": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
}
ROTARY = {
    "name": "timm:eva02_tiny_patch14_224",
    "side": 56,
    "patch_dropout": 0.5,
    "options": {"depth": 2, "embed_dim": 48, "num_heads": 3},
}
T5 = {"name": "hf:t5", "options": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}}
GPT2 = {
    "name": "hf:gpt2",
    "pooling": "last",
    "options": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 3},
}


def run_the_card(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's own example leaves behind, run beside a picture of the name that it uses."""
    pictures(1)[0].save(place / "a.jpg")
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    with monkeypatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", list(sys.path))
        left: dict[str, Any] = {}
        exec(code.replace('folder = "…"', f"folder = {str(folder)!r}"), left)
    return left


HUGGING_FACE = {
    "CLIP": (CLIP, {}, False),
    "SigLIP": (SIGLIP, {}, True),
    "mean of bert": (None, {}, True),
    "mlp, bias, max, padded pictures": (None, AWKWARD, True),
    "CLIP, padded pictures": (CLIP, {"image": {"resize": "pad"}}, False),
    "windows, positions that are no weights, t5": (None, {"image": SWIN, "text": T5}, True),
    "rotary positions, patches left out in training, gpt2": (None, {"image": ROTARY, "text": GPT2}, True),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
@torch.inference_mode()
def test_transformers(name: str, tmp_path: Path) -> None:
    base, changes, own_code = HUGGING_FACE[name]
    saved = encoder(base, **changes)
    folder, report = out_of(saved, "huggingface", tmp_path)
    assert ("modeling_clipdist.py" in files(folder)) == own_code
    kind: Any = transformers.AutoModel if own_code else transformers.VisionTextDualEncoderModel
    model = kind.from_pretrained(folder, trust_remote_code=own_code).eval()
    own_pictures = own_code or saved.model.image.resize == "pad"
    processor: Any = transformers.VisionTextDualEncoderProcessor.from_pretrained(folder, trust_remote_code=own_pictures)
    padding: Any = "max_length" if saved.model.config.text.fills else True
    long = [*TEXTS, " ".join(TEXTS)]
    batch = processor(images=pictures(), text=long, padding=padding, truncation=True, return_tensors="pt")
    found = model(**batch)
    close(found.text_embeds, saved.encode_text(long))
    checked = report["checked"]
    if own_pictures:
        close(found.image_embeds, saved.encode_image(pictures()))
        assert checked["preprocessing"]["grey_levels_max"] < 0.01
    own = saved.model.image.normalise(torch.stack([saved.preprocess(one) for one in pictures()]))
    close(normalize(model.get_image_features(pixel_values=own).pooler_output, dim=1), saved.encode_image(pictures()))
    scale, bias = saved.model.temperature()
    cosines = found.image_embeds @ found.text_embeds.T
    close(found.logits_per_image, scale * cosines + (0 if bias is None else bias), 1e-4)
    assert checked["image_max_difference"] < 1e-5
    assert checked["text_max_difference"] < 1e-5


@pytest.mark.parametrize("base", [CLIP, SIGLIP], ids=["plain", "own code"])
def test_the_pipeline_of_transformers(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = encoder(base, image={"resize": "squash"})
    folder, _ = out_of(saved, "huggingface", tmp_path)
    assert run_the_card(folder, tmp_path, monkeypatch)["batch"]["pixel_values"].shape[0] == 1
    classify = transformers.pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
    picture = pictures(1)[0].resize((160, 160))
    found = {one["label"]: one["score"] for one in classify(picture, ["red", "blue"], hypothesis_template="A {}.")}
    cosines = torch.from_numpy(saved.encode_image([picture]) @ saved.encode_text(["A red.", "A blue."]).T)
    close([found["red"], found["blue"]], (cosines / saved.temperature).softmax(1)[0], 2e-3)


@torch.inference_mode()
def test_squashed_pictures_of_a_clip_are_those_of_training(tmp_path: Path) -> None:
    saved = encoder(CLIP, image={"resize": "squash"})
    _, report = out_of(saved, "huggingface", tmp_path)
    assert report["checked"]["preprocessing"]["grey_levels_max"] < 2, "torch and Pillow round differently"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.py")), ids=lambda path: path.name)
def test_code_that_travels_needs_nothing_of_ours(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert packages <= {"torch", "timm", "transformers", "numpy", "PIL"}
    beside = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    assert beside <= {other.stem for other in SHIPPED.glob("*_clipdist.py")}


@pytest.mark.slow
def test_transformers_without_clipdist(tmp_path: Path) -> None:
    saved = encoder()
    folder, _ = out_of(saved, "huggingface", tmp_path)
    pictures(1)[0].save(tmp_path / "a.png")
    code = f"""
import sys
sys.modules["clipdist"] = None
import numpy, torch
from PIL import Image
from transformers import AutoModel, VisionTextDualEncoderProcessor
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
processor = VisionTextDualEncoderProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
image = Image.open({str(tmp_path / "a.png")!r})
batch = processor(images=image, text={TEXTS!r}, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    found = model(**batch)
numpy.savez({str(tmp_path / "found.npz")!r}, images=found.image_embeds, texts=found.text_embeds)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    close(found["images"], saved.encode_image(pictures(1)))
    close(found["texts"], saved.encode_text(TEXTS))


OPEN_CLIP = {
    "CLIP": (CLIP, {}, set()),
    "SigLIP": (SIGLIP, {}, {"custom_text"}),
    "timm and bert": (None, {"text": {"pooling": "cls"}}, {"custom_text"}),
    "timm and bert, padded pictures": (None, {"image": {"resize": "pad"}}, {"custom_text"}),
    "timm and CLIP": (CLIP, {"image": {**NATIVE_TIMM, "options": {}}}, {"custom_text"}),
    "CLIP's picture tower and bert": ({"image": CLIP["image"]}, {}, {"custom_text"}),
}


@pytest.mark.parametrize("name", OPEN_CLIP)
@torch.inference_mode()
def test_open_clip(name: str, tmp_path: Path) -> None:
    base, changes, words = OPEN_CLIP[name]
    saved = encoder(base, **changes)
    folder, _ = out_of(saved, "open_clip", tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    assert words <= config.keys()
    assert ("custom_text" in config) == ("custom_text" in words)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    own = saved.model.image.normalise(torch.stack([saved.preprocess(one) for one in pictures()]))
    close(model.encode_image(own, normalize=True), saved.encode_image(pictures()))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([*TEXTS, " ".join(TEXTS)])
    close(model.encode_text(tokens, normalize=True), saved.encode_text([*TEXTS, " ".join(TEXTS)]))
    scale, bias = saved.model.temperature()
    assert model.logit_scale.exp().item() == pytest.approx(scale.item())
    assert (model.logit_bias is None) == (bias is None)
    square = pictures(1)[0].resize((64, 64))
    grey = (prepare(square) - saved.model.image.normalise(saved.preprocess(square)[None])[0]).abs().max()
    assert grey < 0.02, "a square picture is prepared alike"


def test_the_cards_of_open_clip_and_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = encoder()
    folder, _ = out_of(saved, "open_clip", tmp_path)
    left = run_the_card(folder, tmp_path, monkeypatch)
    close(left["texts"], saved.encode_text(["one caption", "another one"]))
    folder, _ = out_of(saved, "safetensors", tmp_path / "image", tower="image")
    assert run_the_card(folder, tmp_path, monkeypatch)["features"].shape == (1, saved.model.image.width)
    folder, _ = out_of(saved, "safetensors", tmp_path / "text", tower="text")
    assert run_the_card(folder, tmp_path, monkeypatch)["hidden"].shape[2] == saved.model.text.width
    folder, _ = out_of(classifier(), "huggingface", tmp_path)
    assert run_the_card(folder, tmp_path, monkeypatch)["probabilities"].sum().item() == pytest.approx(1)


def test_open_clip_by_its_name_on_a_hub(tmp_path: Path) -> None:
    folder, report = out_of(encoder(), "open_clip", tmp_path, hub_name="someone/shapes")
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["hf_model_name"], text["hf_tokenizer_name"]) == ("someone/shapes", "someone/shapes")
    assert "hf-hub:someone/shapes" in (folder / "README.md").read_text()
    assert report["notes"]


def run(path: Path, **arrays: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)


@pytest.mark.parametrize("name", ["bert", pytest.param("SigLIP", marks=pytest.mark.slow)])
def test_onnx(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = encoder(SIGLIP if name == "SigLIP" else None)
    folder, _ = out_of(saved, "onnx", tmp_path)
    pixels = torch.stack([saved.preprocess(one) for one in pictures()]).numpy()
    for rows in (1, 5):
        found = run(folder / "image.onnx", pixels=pixels[:rows])[0]
        assert b"site-packages" not in (folder / "image.onnx").read_bytes(), "paths of the machine that made it"
        close(found, saved.encode_image(pictures(rows)))
        close(np.linalg.norm(found, axis=1), np.ones(rows))
    for texts in (TEXTS[3:], TEXTS, [" ".join(TEXTS)]):
        ids, mask = saved.tokenizer.pad(saved.tokenizer.encode(texts))
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        known = {one.name for one in onnx.load(str(folder / "text.onnx")).graph.input}
        close(run(folder / "text.onnx", **{key: given[key] for key in known})[0], saved.encode_text(texts))
    left = run_the_card(folder, tmp_path, monkeypatch)
    with Image.open(tmp_path / "a.jpg") as picture:
        close(left["images"], saved.encode_image([picture]))
    close(left["texts"], saved.encode_text(["a caption"]))
    graph = onnx.load(str(folder / "image.onnx"))
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 18
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert float(metadata["clipdist.temperature"]) == pytest.approx(saved.temperature)
    how = json.loads((folder / "preprocessing.json").read_text())
    assert (how["image"]["side"], how["image"]["resize"]) == (saved.model.image.side, saved.model.image.resize)


def test_onnx_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = classifier()
    folder, _ = out_of(saved, "onnx", tmp_path)
    pixels = torch.stack([saved.preprocess(one) for one in pictures()])
    logits, probabilities = run(folder / "image.onnx", pixels=pixels.numpy())
    close(logits, saved.model.logits(pixels).detach(), 1e-4)
    close(probabilities, saved.predict_proba(pictures()))
    assert json.loads((folder / "labels.json").read_text())["labels"] == saved.names
    assert run_the_card(folder, tmp_path, monkeypatch)["probabilities"].shape == (1, 3)
    saved._temperature = {"value": 0.5}
    with pytest.raises(UserError, match="other probabilities"):
        onnx_folder.load(saved, folder, Asked())


@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_vit"])
@torch.inference_mode()
def test_a_classifier_for_timm_and_transformers(name: str, tmp_path: Path) -> None:
    saved = classifier(name=name, side=160)
    folder, _ = out_of(saved, "huggingface", tmp_path)
    own = saved.model.image.normalise(torch.stack([saved.preprocess(one) for one in pictures()]))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    close(model(own).softmax(1), saved.predict_proba(pictures()))
    other: Any = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    close(other(own).logits.softmax(1), saved.predict_proba(pictures()))
    assert [other.config.id2label[k] for k in range(3)] == saved.names


@torch.inference_mode()
def test_one_tower(tmp_path: Path) -> None:
    saved = encoder(None, **AWKWARD)
    folder, _ = out_of(saved, "safetensors", tmp_path / "image", tower="image")
    tower = timm.create_model("test_convnext", num_classes=0)
    tower.load_state_dict(load_file(folder / "model.safetensors"))
    own = torch.stack([saved.preprocess(one) for one in pictures()])
    close(tower.eval()(saved.model.image.normalise(own)), saved.model.image(own))
    folder, _ = out_of(saved, "safetensors", tmp_path / "text", tower="text")
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    ids, mask = saved.tokenizer.pad(saved.tokenizer.encode(TEXTS))
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    close(hidden, saved.model.text.model(input_ids=ids, attention_mask=mask).last_hidden_state)
    projection = load_file(folder / "projection.safetensors")
    assert projection.keys() == saved.model.text_projection.state_dict().keys()


def test_the_tower_of_a_classifier(tmp_path: Path) -> None:
    saved = classifier()
    folder, _ = out_of(saved, "safetensors", tmp_path)
    tower = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    pixels = torch.stack([saved.preprocess(one) for one in pictures()])
    with torch.inference_mode():
        close(normalize(tower(saved.model.image.normalise(pixels)), dim=1), saved.encode_image(pictures()))


@torch.no_grad()
@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_projections_that_differ(to: str, tmp_path: Path) -> None:
    """Both are as open_clip has them; the comparison is that of the export itself."""
    saved = encoder()
    width_in, width = saved.model.image.width, saved.model.config.width
    saved.model.image_projection = projection(ProjectionConfig(kind="mlp", hidden=2 * width), width_in, width)
    between = (saved.model.text.width + width) // 2
    saved.model.text_projection = projection(
        ProjectionConfig(kind="mlp", hidden=between), saved.model.text.width, width
    )
    for layer in saved.model.text_projection:
        if isinstance(layer, torch.nn.Linear):
            layer.bias.zero_()
    folder, report = out_of(saved, to, tmp_path)
    assert report["checked"]["image_max_difference"] < 1e-5
    if to == "open_clip":
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        assert (config["vision_cfg"]["timm_proj"], config["text_cfg"]["hf_proj_type"]) == ("mlp", "mlp")
    saved.model.text_projection = projection(ProjectionConfig(kind="linear"), saved.model.text.width, width)
    out_of(saved, to, tmp_path / "again")


@pytest.mark.parametrize("name", OPEN_CLIP_SOURCES)
def test_a_model_of_open_clip_goes_back_as_it_came(name: str, tmp_path: Path) -> None:
    published = tmp_path / "published"
    write_open_clip(published, *OPEN_CLIP_SOURCES[name], False)
    config = TypeAdapter(ModelConfig).validate_python(describe(f"open_clip:{published}"))
    tokenizer = build_tokenizer(config, [])
    model = build_model(config, tokenizer, seed=1).eval()
    start_from(model, f"open_clip:{published}")
    saved = SavedModel(model, tokenizer, {}, {}, torch.device("cpu"))
    folder, _ = out_of(saved, "open_clip", tmp_path)
    before = load_file(published / "open_clip_model.safetensors")
    after = load_file(folder / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=0, msg=key)
