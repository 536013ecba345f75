"""Relevance maps: equal to plain computations, on the thing that the text names, and without a trace in the model."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from clipdist.config import load_config
from clipdist.data.labels import Labels
from clipdist.errors import UserError
from clipdist.evaluate.relevance import (
    class_relevance,
    class_relevances,
    input_picture,
    overlay,
    relevance_map,
    relevance_maps,
)
from clipdist.evaluate.relevance_methods import _open_attention, relevance, undisturbed
from clipdist.model.classifier import Classifier
from clipdist.model.dual_encoder import DualEncoder, ModelConfig
from clipdist.model.saved import SavedModel, load_dual_encoder
from clipdist.model.saved_classifier import SavedClassifier
from clipdist.model.towers import ImageTower, ImageTowerConfig
from clipdist.train.loop import train
from tests.conftest import COLOURS, SHAPES, TrainedRun, picture, write_recipe

CPU = torch.device("cpu")
TEXT = "A red circle at the left."
RED = picture("red", "circle", "left")


def tower(name: str, side: int = 64, **options: Any) -> ImageTower:
    """With random weights; residual branches that begin near zero are opened, so that every block does something."""
    torch.manual_seed(0)
    made = ImageTower(ImageTowerConfig(name=f"timm:{name}", side=side, options=options)).eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if "gamma" in parameter_name:
                parameter.fill_(0.5)
    return made


@pytest.fixture(scope="module")
def text_side(trained_run: TrainedRun) -> SavedModel:
    return load_dual_encoder(trained_run.folder / "model", "cpu")


def with_tower(image: ImageTower, text_side: SavedModel) -> SavedModel:
    torch.manual_seed(1)
    model = DualEncoder(ModelConfig(width=32), image, text_side.model.text).eval()
    model.text_projection = text_side.model.text_projection
    return SavedModel(model, text_side.tokenizer, {}, {}, CPU)


def classifier(image: ImageTower, classes: int = 3) -> SavedClassifier:
    torch.manual_seed(1)
    model = Classifier(ModelConfig(), image, classes=classes, dropout=0.5).eval()
    names = COLOURS[:classes]
    labels = Labels("colour", tuple(names), tuple(1 for _ in names), tuple({} for _ in names))
    return SavedClassifier(model, labels, {"value": 1.0, "fitted_on": None}, {}, {}, CPU)


def enlarged(map_gg: np.ndarray, side: int) -> np.ndarray:
    """To pixels and to a maximum of 1."""
    fine = F.interpolate(torch.from_numpy(map_gg)[None, None].float(), (side, side), mode="bilinear")[0, 0].numpy()
    scaled: np.ndarray = fine / fine.max()
    return scaled


# --- equal to plain computations


def test_grad_cam_of_a_mean_and_a_linear_head_is_the_class_activation_map() -> None:
    # Then the gradient is the head's row, everywhere the same (Zhou et al. 2016), and no autograd is needed.
    saved = classifier(tower("test_resnet", 224))
    with torch.no_grad():
        pixels = saved.preprocess(RED)[None]
        model: Any = saved.model.image.model
        map_Cgg = model.forward_features(saved.model.image.normalise(pixels))[0]
        expected = torch.einsum("c,chw->hw", saved.model.head.weight[1], map_Cgg).relu().numpy()
    assert expected.shape == (7, 7)
    assert expected.max() > 0
    made = class_relevance(saved, RED, "green")
    np.testing.assert_allclose(made, enlarged(expected, 224), atol=1e-4)


def test_of_small_pictures_grad_cam_takes_an_earlier_and_finer_map(text_side: SavedModel) -> None:
    saved = with_tower(tower("test_convnext", 64), text_side)
    image: Any = saved.model.image
    map_1Cgg = image.model.stages[0](image.model.stem(image.normalise(saved.preprocess(RED)[None]))).detach()
    assert map_1Cgg.shape[2:] == (16, 16), "stage 1, 8 x 8, is the last of at least 7"
    map_1Cgg = image.model.stages[1](map_1Cgg).detach().requires_grad_()
    rest = image.model.forward_head(image.model.norm_pre(image.model.stages[3](image.model.stages[2](map_1Cgg))))
    text = torch.from_numpy(saved.encode_text([TEXT])[0])
    (F.normalize(saved.model.image_projection(rest), dim=1)[0] @ text).backward()
    assert map_1Cgg.grad is not None
    channel_C = map_1Cgg.grad[0].mean((1, 2))
    expected = (channel_C[:, None, None] * map_1Cgg[0]).sum(0).clamp(min=0).detach().numpy()
    np.testing.assert_allclose(relevance_map(saved, RED, TEXT), enlarged(expected, 64), atol=1e-4)


def watched_attention(image: ImageTower, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features and attention weights by timm's own way without fused kernels; changes the tower."""
    seen: list[Tensor] = []
    for block in image.model.blocks:  # type: ignore[union-attr]
        attention: Any = block.attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    return image(pixels), seen


@pytest.mark.parametrize(("name", "pooled"), [("test_vit", [0]), ("test_vit2", list(range(1, 17)))])
def test_roll_out_is_the_product_of_the_blocks(name: str, pooled: list[int], text_side: SavedModel) -> None:
    saved = with_tower(tower(name), text_side)
    made = relevance_map(saved, RED, TEXT, "rollout")
    np.testing.assert_array_equal(made, relevance_map(saved, RED, "Anything else.", "rollout"))
    _, weights = watched_attention(saved.model.image, saved.preprocess(RED)[None])
    product = np.eye(weights[0].shape[-1])
    for one in weights:
        mixed = one[0].detach().double().numpy().mean(axis=0) + np.eye(len(product))
        product = mixed / mixed.sum(axis=1, keepdims=True) @ product
    first = len(product) - 16
    row = product[pooled if first == 1 else slice(first, None)].mean(axis=0)[first:]
    np.testing.assert_allclose(made, enlarged((row - row.min()).reshape(4, 4), 64), atol=2e-3)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_attention_is_weighted_by_its_gradient_block_by_block(name: str, text_side: SavedModel) -> None:
    saved = with_tower(tower(name), text_side)
    np.testing.assert_array_equal(relevance_map(saved, RED, TEXT), relevance_map(saved, RED, TEXT, "attention"))
    image, text = saved.model.image, torch.from_numpy(saved.encode_text([TEXT])[0])

    def score(features_1C: Tensor) -> Tensor:
        # Large, so that what passes through several blocks weighs as much as what passes through one.
        return 3000 * (F.normalize(saved.model.image_projection(features_1C), dim=1) @ text)

    with undisturbed(image):
        made, method = relevance(image, saved.preprocess(RED), score, "gradient")
    assert method == "attention"
    features, weights = watched_attention(image, saved.preprocess(RED)[None])
    total = once = np.eye(weights[0].shape[-1])
    for one, slope in zip(weights, torch.autograd.grad(score(features), weights), strict=True):
        step = (one * slope).clamp(min=0)[0].detach().double().numpy().mean(axis=0)
        total, once = total + step @ total, once + step
    first = len(total) - 16

    def read(matrix: np.ndarray) -> np.ndarray:
        row = (matrix[0] if name == "test_vit" else matrix[first:].mean(axis=0))[first:]
        return (row - row.min()).reshape(4, 4)

    assert np.abs(read(once) - read(total)).max() > 0.1 * read(total).max(), "else nothing is known of the products"
    np.testing.assert_allclose(made[0].numpy(), read(total), rtol=1e-2, atol=1e-3 * read(total).max())


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(["none", "causal", "hidden", "added"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_attention_in_the_open_is_what_the_fused_kernel_gives(queries: int, keys: int, mask: str, scaled: bool) -> None:
    rng = torch.Generator().manual_seed(queries * 10 + keys)
    query, key = torch.randn(1, 2, queries, 4, generator=rng), torch.randn(1, 2, keys, 4, generator=rng)
    value = torch.randn(1, 2, keys, 3, generator=rng)
    hidden = torch.rand(queries, keys, generator=rng) > 0.4
    hidden[:, 0] = True  # a query that sees nothing has no answer
    more: dict[str, Any] = {"scale": 0.7} if scaled else {}
    more |= {"none": {}, "causal": {"is_causal": True}, "hidden": {"attn_mask": hidden}}.get(
        mask, {"attn_mask": torch.randn(queries, keys, generator=rng)}
    )
    weights, made = _open_attention(query, key, value, **more)
    torch.testing.assert_close(made, F.scaled_dot_product_attention(query, key, value, **more))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, queries))


# --- any tower


ATTEND = ["test_vit", "test_vit2", "test_vit3", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"]
OTHERS = ["test_convnext", "test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet", "test_mambaout"]
ODD = ["swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "mvitv2_tiny"]  # NHWC; channels attend; unnamed stages
SMALLER: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    "eva02_tiny_patch14_224": {"depth": 2, "patch_size": 16},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "xcit_nano_12_p16_224": {"depth": 2},
}


@pytest.mark.parametrize("name", [*ATTEND, *OTHERS, *ODD])
def test_any_tower_has_maps(name: str, text_side: SavedModel) -> None:
    saved = with_tower(tower(name, **SMALLER.get(name, {})), text_side)
    maps = relevance_maps(saved, RED, [TEXT, "A blue bar at the top."])
    assert maps.dtype == np.float32
    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert ((maps.max(axis=(1, 2)) == 1) | (maps.max(axis=(1, 2)) == 0)).all()
    np.testing.assert_allclose(maps[1], relevance_map(saved, RED, "A blue bar at the top."), atol=1e-4)
    assert relevance_map(saved, RED, TEXT, "grad-cam").shape == (64, 64)
    if name in ATTEND:
        assert maps.max() == 1
        assert relevance_map(saved, RED, TEXT, "rollout").max() == 1
    else:
        for method in ("attention", "rollout"):
            with pytest.raises(UserError, match=rf"method '{method}'.*do not all attend.*gradient or grad-cam"):
                relevance_map(saved, RED, TEXT, method)


def test_a_classifier_is_asked_by_the_names_of_its_classes() -> None:
    saved = classifier(tower("test_vit"))
    maps = class_relevances(saved, RED, ["blue", "red"])
    np.testing.assert_allclose(maps[1], class_relevance(saved, RED, "red"), atol=1e-4)
    assert np.abs(maps[0] - maps[1]).max() > 0.05
    with pytest.raises(UserError, match="found 'rot', which the model does not know; near: red"):
        class_relevance(saved, RED, "rot")


def test_what_cannot_be_asked_is_refused(text_side: SavedModel) -> None:
    with pytest.raises(UserError, match="found 'magic', expected one of gradient, attention, grad-cam, rollout"):
        relevance_map(text_side, RED, TEXT, "magic")
    for nothing in (TEXT, [], [3]):
        with pytest.raises(UserError, match="expected one text or more in a list"):
            relevance_maps(text_side, RED, nothing)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected one class or more in a list"):
        class_relevances(classifier(tower("test_resnet")), RED, [])
    with pytest.raises(UserError, match=r"missing\.png"):
        relevance_map(text_side, "missing.png", TEXT)


# --- no trace


def state(model: nn.Module) -> list[Any]:
    """All that a look could leave behind."""
    modules = [
        (name, one.training, len(one._forward_hooks), len(one._forward_pre_hooks), getattr(one, "fused_attn", None))
        for name, one in model.named_modules()
    ]
    recomputed = [getattr(one, "grad_checkpointing", None) for one in model.modules()]
    weights = [(name, one.requires_grad, one.grad, one._version) for name, one in model.named_parameters()]
    buffers = [(name, one.clone().tolist()) for name, one in model.named_buffers()]
    return [*modules, *recomputed, *weights, *buffers]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(name: str, training: bool, text_side: SavedModel) -> None:
    image = tower(name)
    image.model.set_grad_checkpointing(True)  # type: ignore[operator]
    saved = with_tower(image, text_side)
    expected = relevance_map(saved, RED, TEXT)
    saved.model.requires_grad_(not training)
    saved.model.train(training)
    before, generator = state(saved.model), torch.random.get_rng_state()
    for grads in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grads():
            np.testing.assert_array_equal(relevance_map(saved, RED, TEXT), expected)
    with pytest.raises(UserError):
        relevance_map(saved, RED, TEXT, "rollout" if name == "test_resnet" else "magic")
    assert state(saved.model) == before
    assert torch.equal(torch.random.get_rng_state(), generator)


# --- what the map is over


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_the_input_picture_is_what_the_tower_sees(resize: Any) -> None:
    saved = classifier(ImageTower(ImageTowerConfig(name="timm:test_resnet", side=48, resize=resize)))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    shown = input_picture(saved, wide)
    assert shown.size == (48, 48)
    np.testing.assert_array_equal(np.asarray(shown).transpose(2, 0, 1), saved.preprocess(wide).numpy())


def test_an_overlay_colours_what_is_relevant_and_nothing_else() -> None:
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    relevant = np.zeros((20, 20), np.float32)
    relevant[5:9, 3:7] = 1
    made = np.asarray(overlay(shown, relevant)).astype(int)
    coloured = np.ptp(made, axis=2) > 0
    np.testing.assert_array_equal(coloured, relevant > 0)
    np.testing.assert_array_equal(made[~coloured][:, 0], np.asarray(shown.convert("L"))[~coloured])
    with pytest.raises(UserError, match=r"20 x 20 and a map of shape \(10, 10\).*input_picture"):
        overlay(shown, relevant[:10, :10])


# --- what it means


@pytest.fixture(scope="module")
def see_shapes(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    """Small transformers that have learned colours, shapes and places, from different weights: what a map shows of one
    alone says as much of how its training went as of the map."""
    image = {"name": "timm:test_vit", "side": 40, "options": {"patch_size": 5, "depth": 4}}
    trained = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("looking")
        path = write_recipe(folder, shapes, train__epochs=14, optim__lr=4e-3, model__image=image)
        assert train(load_config(path, ["evaluate.every_epochs=14", f"seed={seed}"])) == 0
        trained.append(load_dual_encoder(folder / "runs" / "tiny" / "model", "cpu"))
    return trained


def two_shapes(seed: int) -> tuple[Image.Image, list[str]]:
    """Two shapes of different colours, left and right, and the text of each."""
    rng = np.random.default_rng(seed)
    colours, kinds = rng.choice(COLOURS, 2, replace=False), rng.choice(SHAPES, 2, replace=False)
    halves = [
        np.asarray(Image.open(io.BytesIO(picture(str(colour), str(kind), place, seed))))
        for colour, kind, place in zip(colours, kinds, ("left", "right"), strict=True)
    ]
    both = Image.fromarray(np.concatenate([halves[0][:, :20], halves[1][:, 20:]], axis=1))
    return both, [f"A {c} {k} at the {place}." for c, k, place in zip(colours, kinds, ("left", "right"), strict=True)]


def moves_with_the_text(saved: SavedModel, pictures: int = 24) -> float:
    """Share of pictures of two shapes in which more of the map lies on the left for the text of the left one than for
    that of the right one; ½ is chance."""
    right = []
    for seed in range(pictures):
        image, texts = two_shapes(seed)
        maps = relevance_maps(saved, image, texts)
        left = maps[:, :, :20].sum(axis=(1, 2)) / np.maximum(maps.sum(axis=(1, 2)), 1e-9)
        right.append(left[0] > left[1])
    return float(np.mean(right))


def on_the_shape(saved: SavedModel) -> tuple[float, float]:
    """Share of the map within a box around the shape, and of the picture that the box is."""
    centres = {"left": (9, 20), "right": (31, 20), "top": (20, 9), "bottom": (20, 31)}
    shares, box_area = [], 17 * 17 / 1600
    for number, (place, (x, y)) in enumerate(centres.items()):
        for colour, shape in zip(COLOURS, SHAPES, strict=False):
            relevant = relevance_map(
                saved, picture(colour, shape, place, number), f"A {colour} {shape} at the {place}."
            )
            shares.append(relevant[y - 8 : y + 9, x - 8 : x + 9].sum() / max(relevant.sum(), 1e-9))
    return float(np.mean(shares)), box_area


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_relevance_lies_on_what_the_text_names(see_shapes: list[SavedModel]) -> None:
    shares, areas = zip(*map(on_the_shape, see_shapes), strict=True)
    assert np.mean(shares) > 3 * areas[0]
    assert min(shares) > 1.5 * areas[0]
    follows = [moves_with_the_text(one) for one in see_shapes]
    assert np.mean(follows) > 0.7, "of 72 pictures: by chance once in a thousand"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_maps_change_when_weights_are_randomised(see_shapes: list[SavedModel]) -> None:
    # Adebayo et al. 2018: a map that stays the same shows edges of the picture, not what the model has learned.
    randoms = []
    for seed, one in enumerate(see_shapes):
        torch.manual_seed(seed)
        image = ImageTower(one.model.config.image)
        model = DualEncoder(one.model.config, image, one.model.text).eval()
        randoms.append(SavedModel(model, one.tokenizer, {}, {}, CPU))
    means = [np.mean([on_the_shape(one)[0] for one in some]) for some in (randoms, see_shapes)]
    assert means[0] < 0.6 * means[1]
    assert np.mean([moves_with_the_text(one) for one in randoms]) <= 0.75
    alike = []
    for learned, random in zip(see_shapes, randoms, strict=True):
        for seed in range(8):
            both, texts = two_shapes(seed)
            pair = [relevance_maps(saved, both, texts)[0].ravel() for saved in (learned, random)]
            alike.append(np.corrcoef(*pair)[0, 1])
    assert np.mean(alike) < 0.5


def test_hiera_keeps_its_tokens_in_rows_behind_the_last_stage_alone() -> None:
    """Before, they lie in the order in which they will be pooled: a map of them would be scrambled."""
    options = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
    tower = ImageTower(ImageTowerConfig(name="timm:hiera_tiny_224", side=128, options=options)).eval()
    pixels = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    with undisturbed(tower):
        found, method = relevance(tower, pixels, lambda features_1C: features_1C.sum(1), "grad-cam")
    assert method == "grad-cam"
    assert found.shape == (1, 4, 4), "32 pixels to a cell"
