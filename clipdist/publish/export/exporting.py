"""What every export has in common: the sample images and texts that it is checked by, what a foreign library makes of
them, and the comparison.

b = rows, S = side of an image, D = width of what is compared.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from clipdist.data.images.decode import decode_rgb
from clipdist.data.shards import BadSample, ShardSet
from clipdist.errors import UserError
from clipdist.model.saved import MAX_IMAGE_PIXELS, Saved, SavedModel

SHIPPED = Path(__file__).parent / "shipped"
"""Code that travels with exports."""
PIXELS = "pixels_clipdist.py"
"""Of it, what makes a picture into exactly the pixels of training."""
TOLERANCE = 1e-4
SAMPLES = 8
SIZES = ((64, 48), (48, 64), (97, 97), (200, 120), (131, 257), (320, 320), (33, 30), (500, 375))
SENTENCES = (
    "A photograph of a small dog on a beach.",
    "two red squares",
    "x",
    "An image, with commas; and 12 numbers!",
)


@dataclass(frozen=True)
class Samples:
    """What an export is checked by: RGB pictures and captions, and where they come from."""

    images: list[Image.Image]
    texts: list[str]
    source: str


@dataclass(frozen=True)
class Own:
    """What the model itself gives, float32 [b, D]."""

    image: Callable[[Tensor], Tensor] | None
    """From uint8 pixels [b, 3, S, S]."""
    text: Callable[[Sequence[str]], Tensor] | None
    kind: str = "unit vectors"


@dataclass(frozen=True)
class Foreign:
    """The same by the library that the export is for, out of the files that were written."""

    library: str
    """How it was loaded, in that library's words."""
    image: Callable[[Tensor], Tensor] | None = None
    """From what `normalised` says, [b, 3, S, S]."""
    text: Callable[[Sequence[str]], Tensor] | None = None
    prepare: Callable[[Sequence[Image.Image]], Tensor] | None = None
    """The export's own preprocessing: pictures -> what `image` takes."""
    normalised: bool = True
    """Whether images are normalised float32, or uint8 pixels."""
    temperature: float | None = None
    bias: float = 0.0
    """Added to the logits, beside a temperature."""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What whoever uses it should know."""


class Format(Protocol):
    """One way of exporting: a module with these functions."""

    def check(self, saved: Saved, asked: "Asked") -> None:
        """Raises `UserError` for a package that is missing, and for a model that the format cannot express."""

    def write(self, saved: Saved, folder: Path, asked: "Asked") -> None: ...

    def load(self, saved: Saved, folder: Path, asked: "Asked") -> tuple[Own, Foreign]: ...

    def finish(self, folder: Path, out: Path, asked: "Asked") -> None:
        """The last touch, after the check: what names the folder by its final place."""

    def usage(self, saved: Saved, asked: "Asked") -> str:
        """Python that loads it, for the model card."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for beside the format."""

    tower: str | None = None
    hub_name: str = ""


def generated_samples(saved: Saved) -> Samples:
    """Smooth noise in several shapes, and texts of several lengths out of the model's own vocabulary."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in SIZES[:SAMPLES]:
        coarse = rng.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        images.append(smooth.filter(ImageFilter.GaussianBlur(1)))
    texts = list(SENTENCES)
    if isinstance(saved, SavedModel):
        tokenizer = saved.tokenizer
        for length in (1, 3, tokenizer.max_tokens // 2, 2 * tokenizer.max_tokens):
            ids = rng.integers(0, len(tokenizer), max(1, length)).tolist()
            words = tokenizer.tokenizer.decode(ids, skip_special_tokens=True)
            texts.append(" ".join(str(words).split()) or "word")
    return Samples(images, texts, "generated")


def real_samples(place: str, split: str) -> Samples:
    """The first readable pairs of a split. Raises `UserError` when there is none."""
    pairs = ShardSet.open(place).split(split)
    images: list[Image.Image] = []
    texts: list[str] = []
    for number in range(len(pairs)):
        try:
            sample = pairs.read(number)
            pixels = decode_rgb(sample.image, MAX_IMAGE_PIXELS, exact=True)
        except BadSample:
            continue  # `clipdist verify` is for these
        images.append(Image.fromarray(pixels))
        texts += sample.texts[:1]
        if len(images) == SAMPLES:
            break
    if not images:
        raise UserError(f"{place}: no readable image in split {split!r}; choose another with --split")
    return Samples(images, texts or list(SENTENCES), f"{Path(place).name}, split {split}")


@torch.inference_mode()
def compare(saved: Saved, own: Own, foreign: Foreign, samples: Samples) -> dict[str, Any]:
    """The largest differences between what the model and its export give. Raises `UserError` above `TOLERANCE`, of 1 or
    of the largest number that the model gives."""
    report: dict[str, Any] = {"library": foreign.library, "samples": samples.source, "compared": own.kind}
    if own.image and foreign.image:
        pixels = torch.stack([saved.preprocess(image) for image in samples.images])
        given = saved.model.image.normalise(pixels) if foreign.normalised else pixels
        expected = own.image(pixels)
        report["images"] = len(pixels)
        report["image_max_difference"] = _difference("images", expected, foreign.image(given))
        if foreign.prepare:
            prepared = foreign.prepare(samples.images)
            report["preprocessing"] = {
                **_grey_levels(given, prepared, saved.model.image.std if foreign.normalised else None),
                "max_difference": float((foreign.image(prepared) - expected).abs().max()),
            }
    if own.text and foreign.text:
        expected = own.text(samples.texts)
        report["texts"] = len(samples.texts)
        report["text_max_difference"] = _difference("texts", expected, foreign.text(samples.texts))
    if foreign.temperature is not None:
        mine = float(saved.temperature)  # type: ignore[attr-defined]
        if abs(foreign.temperature / mine - 1) > TOLERANCE:
            raise UserError(f"the export's temperature is {foreign.temperature:.6f}, the model's {mine:.6f}")
        report["temperature"] = mine
        bias = saved.model.temperature.bias if isinstance(saved, SavedModel) else None
        own_bias = 0.0 if bias is None else float(bias.detach())
        if abs(foreign.bias - own_bias) > TOLERANCE * max(1.0, abs(own_bias)):
            raise UserError(f"the export's logit bias is {foreign.bias:.6f}, the model's {own_bias:.6f}")
    return report


def scaling_of(model: Any) -> tuple[float, float]:
    """The temperature of another library's model, and its `logit_bias`, 0 where it has none."""
    bias = getattr(model, "logit_bias", None)
    return float(1 / model.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach())


def _difference(what: str, expected: Tensor, found: Tensor) -> float:
    found = found.detach().cpu().float()
    if found.shape != expected.shape:
        raise UserError(f"the export gives {list(found.shape)} for {what}, the model {list(expected.shape)}")
    difference = float((found - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:  # also when it is not a number
        raise UserError(
            f"the export differs from the model by {difference:.2e} for {what}, at most {limit:.0e} is allowed"
        )
    return difference


def _grey_levels(expected: Tensor, found: Tensor, std: Sequence[float] | None) -> dict[str, float]:
    """How far the pixels are apart, in grey levels of 255."""
    scale = torch.ones(3) if std is None else torch.tensor(std) * 255
    levels = (found.float() - expected.float()).abs() * scale.view(1, 3, 1, 1)
    return {"grey_levels_mean": float(levels.mean()), "grey_levels_max": float(levels.max())}


@dataclass(frozen=True)
class Projection:
    """What stands between a tower and the joint embedding, read off its layers."""

    linear: list[nn.Linear]
    """One, or two with a GELU between them."""
    layer_norm: bool

    @property
    def biases(self) -> list[bool]:
        """Which of the linear layers add anything."""
        return [layer.bias is not None and bool(layer.bias.any()) for layer in self.linear]

    @property
    def hidden(self) -> int:
        """Width between two layers; 0 of a single one."""
        return self.linear[0].out_features if len(self.linear) == 2 else 0

    @property
    def words(self) -> dict[str, Any]:
        """As `ClipdistConfig` has it."""
        kind, bias = ("mlp" if self.hidden else "linear"), self.linear[-1].bias is not None
        return {"kind": kind, "hidden": self.hidden, "layer_norm": self.layer_norm, "bias": bias}


def projection_of(layers: nn.Sequential) -> Projection:
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert 1 <= len(linear) <= 2
    return Projection(linear, any(isinstance(layer, nn.LayerNorm) for layer in layers))


def travelling_tokenizer(saved: SavedModel) -> Any:
    """The tokenizer, told what the model knew beside it: the longest length, and that padding stands on the right."""
    tokenizer: Any = copy.deepcopy(saved.tokenizer.tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = saved.tokenizer.max_tokens
    return tokenizer


def missing_package(package: str, install: str) -> UserError:
    return UserError(f"this export needs the package {package}, which is not installed; pip install {install}")
