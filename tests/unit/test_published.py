"""A start from a published dual encoder gives what the library that it comes from gives."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

import clipdist
from clipdist.config import RunConfig, load_config, to_yaml
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError
from clipdist.model.build import build_model, build_tokenizer
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.published import describe
from clipdist.model.saved import save_model
from clipdist.train.contrastive import Contrastive
from clipdist.train.trainer import Trainer

Recipe = Callable[..., Path]
TEXTS = ["A red square at the left.", "A blue circle.", "Two bars and a triangle at the bottom.", "green"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def words() -> Tokenizer:
    return train_wordpiece([text for text in TEXTS for _ in range(2)], 120, 16)


@torch.no_grad()
def shaken(model: torch.nn.Module, by: float = 0.1) -> torch.nn.Module:
    """No bias zero and no scale one, so that each weight and each stored statistic shows."""
    torch.manual_seed(5)
    statistics = [tensor for name, tensor in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    for tensor in [*model.parameters(), *statistics]:
        tensor.add_(torch.randn_like(tensor) * by)
    return model.eval()


def write_hugging_face(folder: Path, kind: str, activation: str = "quick_gelu") -> Any:
    """The model whose folder this makes."""
    tokenizer = words()
    text = {**SMALL, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 16, "hidden_act": activation}
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "hidden_act": activation}
    if kind == "clip":
        text["eos_token_id"] = tokenizer.tokenizer.sep_token_id
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model: Any = transformers.CLIPModel(config)
        size: Any = {"shortest_edge": 32}
    else:
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)
        model = transformers.SiglipModel(config)
        size = {"height": 32, "width": 32}
    shaken(model).save_pretrained(folder)
    tokenizer.save(folder)
    body = {"image_mean": MEAN, "image_std": STD, "size": size, "do_center_crop": kind == "clip"}
    (folder / "preprocessor_config.json").write_text(json.dumps(body))
    return model


def pixels(side: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def normalised(images: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def features(output: Any) -> Tensor:
    # Since transformers 5 the method gives more than the features.
    return normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=1)


def made(recipe: Recipe, init: str, *overrides: str) -> tuple[RunConfig, Tokenizer, DualEncoder]:
    config = load_config(bare(recipe()), [f"model.init={init}", *overrides])
    tokenizer = build_tokenizer(config.model, [])
    return config, tokenizer, build_model(config.model, tokenizer, seed=0).eval()


def bare(path: Path) -> Path:
    """The recipe without its section of the model."""
    tree = yaml.safe_load(path.read_text())
    del tree["model"]
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("kind", "activation"), [("clip", "quick_gelu"), ("clip", "gelu"), ("siglip", "gelu_pytorch_tanh")]
)
@torch.no_grad()
def test_it_gives_what_transformers_gives(kind: str, activation: str, recipe: Recipe, tmp_path: Path) -> None:
    theirs = write_hugging_face(tmp_path / "published", kind, activation)
    config, tokenizer, model = made(recipe, f"hf:{tmp_path / 'published'}")
    images = pixels()
    expected = features(theirs.get_image_features(pixel_values=normalised(images)))
    assert (model.encode_image(images) - expected).abs().max() < 1e-5
    if kind == "clip":
        batch = tokenizer.tokenizer(TEXTS, padding=True, return_tensors="pt")
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    else:
        given = {"input_ids": tokenizer.tokenizer(TEXTS, padding="max_length", return_tensors="pt")["input_ids"]}
    expected = features(theirs.get_text_features(**given))
    assert (model.encode_text(*tokenizer.pad(tokenizer.encode(TEXTS))) - expected).abs().max() < 1e-5
    scale, bias = model.temperature()
    assert scale.item() == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-6)
    assert (bias is None) == (kind == "clip")
    if bias is not None:
        assert bias.item() == pytest.approx(theirs.logit_bias.item())
    assert config.model.image.resize == ("crop" if kind == "clip" else "squash")
    assert (config.model.image.mean, config.model.image.std) == (tuple(MEAN), tuple(STD))


VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 1.5}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
LIKE_SIGLIP = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
OF_TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
OPEN_CLIP: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "transformers of its own": (VISION, TEXT, {}),
    "quick gelu": (VISION, TEXT, {"quick_gelu": True}),
    "a tower of timm": (OF_TIMM, TEXT, {}),
    "SigLIP": (
        {**OF_TIMM, "timm_proj": "none"},
        {**TEXT, **LIKE_SIGLIP},
        {"init_logit_bias": -10, "custom_text": True},
    ),
}


RESIDUAL = {"image_size": 64, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}


def encoder(folder: Path, kind: str) -> dict[str, Any]:
    """The text section of a model of open_clip with an encoder of transformers, whose configuration this writes."""
    tokenizer = words()
    config = transformers.AutoConfig.for_model(
        kind,
        **SMALL,
        vocab_size=len(tokenizer) + 5,  # padded to a round number, as published ones often are
        max_position_embeddings=20,
        pad_token_id=tokenizer.pad_id,
    )
    config.save_pretrained(folder / "encoder")
    tokenizer.save(folder / "encoder")
    return {"hf_model_name": str(folder / "encoder"), "hf_model_pretrained": False, "context_length": 16}


def write_open_clip(
    folder: Path, vision: dict[str, Any], text: dict[str, Any], rest: dict[str, Any], pickled: bool
) -> Any:
    folder.mkdir(exist_ok=True)
    tokenizer = words()
    if "hf_model_name" not in text:
        text = {**text, "vocab_size": len(tokenizer)}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, **rest}
    custom = "custom_text" in rest or "timm_model_name" in vision or "hf_model_name" in text
    kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    # A residual tower, shaken as much as the others, would give numbers beyond what float32 tells apart.
    torch.manual_seed(3)
    by = 0.02 if "layers" in vision and isinstance(vision["layers"], list) else 0.1
    model = shaken(kind(**{key: value for key, value in config.items() if key != "custom_text"}), by)
    body = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    if pickled:  # as its training leaves it
        state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "epoch_3.pt")
    else:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    tokenizer.save(folder)
    return model


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "checkpoint"])
@pytest.mark.parametrize("name", OPEN_CLIP)
@torch.no_grad()
def test_it_gives_what_open_clip_gives(name: str, pickled: bool, recipe: Recipe, tmp_path: Path) -> None:
    theirs = write_open_clip(tmp_path / "published", *OPEN_CLIP[name], pickled)
    config, tokenizer, model = made(recipe, f"open_clip:{tmp_path / 'published'}")
    images = pixels(config.model.image.side)
    assert (model.encode_image(images) - theirs.encode_image(normalised(images), normalize=True)).abs().max() < 1e-5
    # open_clip looks for the largest number as the end: here, that of [SEP] is made the largest by an exchange.
    end, last = tokenizer.tokenizer.sep_token_id, len(tokenizer) - 1
    ids = [[{end: last, last: end}.get(number, number) for number in row] for row in tokenizer.encode(TEXTS)]
    if not config.model.text.fills:
        padded = torch.zeros(len(ids), 16, dtype=torch.int64)
        for row, sequence in enumerate(ids):
            padded[row, : len(sequence)] = torch.tensor(sequence)
    else:
        padded = torch.tensor(ids)
    expected = theirs.encode_text(padded, normalize=True)
    assert (model.encode_text(*tokenizer.pad(ids)) - expected).abs().max() < 1e-5
    scale, bias = model.temperature()
    assert scale.item() == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-6)
    assert (bias is None) == (name != "SigLIP")
    assert config.model.image.resize == "squash"


@pytest.mark.parametrize(
    ("vision", "kind", "pooler", "projection"),
    [
        ({**OF_TIMM, "timm_pool": ""}, "bert", "cls_last_hidden_state_pooler", "mlp"),  # BiomedCLIP's
        ({**OF_TIMM, "timm_proj": "mlp"}, "roberta", "mean_pooler", "linear"),
        (VISION, "bert", "mean_pooler", "linear"),
    ],
)
@torch.no_grad()
def test_text_towers_of_transformers_in_open_clip(
    vision: dict[str, Any], kind: str, pooler: str, projection: str, recipe: Recipe, tmp_path: Path
) -> None:
    text = {**encoder(tmp_path, kind), "hf_pooler_type": pooler, "hf_proj_type": projection}
    published = tmp_path / "published"
    theirs = write_open_clip(published, vision, text, {}, pickled=False)
    config, tokenizer, model = made(recipe, f"open_clip:{published}")
    images = pixels(config.model.image.side)
    assert (model.encode_image(images) - theirs.encode_image(normalised(images), normalize=True)).abs().max() < 1e-5
    tokens, mask = tokenizer.pad(tokenizer.encode(TEXTS))
    assert (model.encode_text(tokens, mask) - theirs.encode_text(tokens, normalize=True)).abs().max() < 1e-5
    # The text tower's configuration may lie inside the folder, where nothing is asked of a hub.
    (tmp_path / "encoder").rename(published / "encoder")
    spoil(
        published, lambda body: body["model_cfg"]["text_cfg"].update(hf_model_name="encoder"), "open_clip_config.json"
    )
    _, _, again = made(recipe, f"open_clip:{published}")
    assert torch.equal(again.encode_text(tokens, mask), model.encode_text(tokens, mask))


@torch.no_grad()
def test_the_residual_networks_of_clip(recipe: Recipe, tmp_path: Path) -> None:
    theirs = write_open_clip(tmp_path / "published", RESIDUAL, TEXT, {}, pickled=False)
    config, _, model = made(recipe, f"open_clip:{tmp_path / 'published'}")
    assert config.model.image.name == "timm:resnet50_clip"
    images = pixels(64)
    images[0], images[1] = 0, 255
    expected = theirs.encode_image(normalised(images), normalize=True)
    assert (model.encode_image(images) - expected).abs().max() < 1e-5
    assert expected.std(dim=0).max() > 1e-3, "images differ by far more than these"
    larger = made(recipe, f"open_clip:{tmp_path / 'published'}", "model.image.side=96")[2]
    assert larger.encode_image(pixels(96)).shape == (3, 64)


def test_training_starts_there_and_the_model_needs_the_source_no_more(recipe: Recipe, tmp_path: Path) -> None:
    published = tmp_path / "published"
    write_hugging_face(published, "siglip", "gelu_pytorch_tanh")
    stages = "train.stages=[{from_epoch: 0, image: 2, text: none}]"
    config = load_config(bare(recipe()), [f"model.init=hf:{published}", "loss.kind=sigmoid", stages])
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.engine.weights().items()}
    trainer.enter_epoch(0)
    trainer.step(next(iter(trainer.batches())))
    moved = {name for name, tensor in trainer.engine.weights().items() if not torch.equal(before[name], tensor)}
    assert any(name.startswith("image.model.blocks.1.") for name in moved)
    assert not any(name.startswith(("image.model.blocks.0.", "text.")) for name in moved)
    assert isinstance(trainer.objective, Contrastive)
    model, tokenizer = trainer.objective.build(), trainer.objective.tokenizer
    model.load_state_dict(trainer.engine.weights())
    save_model(tmp_path / "kept", model, tokenizer, scores={}, about={})
    texts = model.eval().encode_text(*tokenizer.pad(tokenizer.encode(TEXTS)))
    trainer.close()
    for path in published.iterdir():
        path.unlink()
    kept = clipdist.load(tmp_path / "kept", "cpu")
    np.testing.assert_allclose(kept.encode_text(TEXTS), texts.detach().numpy(), atol=1e-6)


def test_what_the_recipe_says_stands_above(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_hugging_face(tmp_path / "published", "clip")
    init = f"hf:{tmp_path / 'published'}"
    with caplog.at_level(logging.INFO):
        config, _, model = made(
            recipe,
            init,
            "model.image.side=48",
            "model.image.patch_dropout=0.25",
            "model.text.max_tokens=8",
            "model.temperature.initial=0.05",
            "model.projection.kind=mlp",
        )
    assert model.encode_image(pixels(48)).shape == (3, 24)
    assert model.temperature()[0].item() == pytest.approx(20)
    assert f"{init}: the image projection is new: the recipe asks for another one" in caplog.text
    assert config.model.image.options["embed_dim"] == 32
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert asdict(load_config(again, [])) == asdict(config)


def test_one_tower_alone(recipe: Recipe, tmp_path: Path) -> None:
    """The text tower of a CLIP, with an image tower from elsewhere."""
    theirs = write_hugging_face(tmp_path / "published", "clip")
    words = [f"model.text.name=hf:{tmp_path / 'published'}", "model.text.pretrained=true", "model.text.pooling=last"]
    words += ["model.text.tokenizer=model", "model.text.options={}", "model.text.max_tokens=16"]
    config = load_config(recipe(), words)
    tokenizer = build_tokenizer(config.model, [])
    text = build_model(config.model, tokenizer, seed=0).eval().text
    batch = tokenizer.tokenizer(TEXTS, padding=True, return_tensors="pt")
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        found = text(*tokenizer.pad(tokenizer.encode(TEXTS)))
        torch.testing.assert_close(found, theirs.text_model(**given).pooler_output, atol=1e-5, rtol=0)


def spoil(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    body = json.loads((folder / name).read_text())
    change(body)
    (folder / name).write_text(json.dumps(body))


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def lacks_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.post_layernorm.bias"]
    save_file(weights, folder / "model.safetensors")


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "another type": (lambda at: spoil(at, lambda body: body.update(model_type="bert")), "found a model of type 'bert'"),
    "no configuration": (lambda at: without(at, "config.json"), r"config\.json is missing"),
    "no weights": (lambda at: without(at, "model.safetensors"), "has no weights: expected a .safetensors"),
    "torn weights": (lambda at: (at / "model.safetensors").write_bytes(b"torn"), "cannot be read"),  # type: ignore[dict-item]
    "no preparation": (lambda at: without(at, "preprocessor_config.json"), r"processor_config\.json is missing"),
    "a weight less": (lacks_a_weight, "its image tower does not fit .* 1 weights missing"),
    "two files": (
        lambda at: save_file({"a": torch.zeros(1)}, at / "other.safetensors"),
        "has 2 files of weights",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_wrong_with_it_is_said(fault: str, recipe: Recipe, tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "published", "clip")
    change, message = SPOILT[fault]
    change(tmp_path / "published")
    with pytest.raises(UserError, match=message):
        made(recipe, f"hf:{tmp_path / 'published'}")


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("timm:vit", "expected hf:<name or folder> or open_clip:<folder>"),
        ("hf:/nowhere/at/all", "no folder /nowhere/at/all"),
        ("hf:openai/clip-vit-base-patch32", "no folder of that name, nor to be had"),
    ],
)
def test_what_is_not_there(init: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe(init)


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({**VISION, "layers": [1, 1, 1, 1]}, TEXT, r"a ResNet of \[1, 1, 1, 1\] blocks, 32 wide"),
        ({**VISION, "attentional_pool": True}, TEXT, "vision_cfg has attentional_pool, which is not understood"),
        (VISION, {**TEXT, "hf_model_name": "roberta-base"}, "text_cfg has heads, layers, width"),
        (VISION, {"hf_model_name": "roberta-base", "hf_pooler_type": "cls_pooler"}, "hf_pooler_type='cls_pooler'"),
        (VISION, {"hf_model_name": "roberta-base", "hf_proj_type": "none"}, "hf_proj_type='none'"),
        (VISION, {**TEXT, "no_causal_mask": True}, "expected CLIP's or SigLIP's"),
        ({**OF_TIMM, "timm_proj": "other"}, TEXT, "timm_proj='other', expected linear, mlp or none"),
    ],
)
def test_models_of_open_clip_of_other_kinds(
    vision: dict[str, Any], text: dict[str, Any], message: str, tmp_path: Path
) -> None:
    body = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(body))
    save_file({"logit_scale": torch.tensor(2.0)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=message):
        describe(f"open_clip:{tmp_path}")
