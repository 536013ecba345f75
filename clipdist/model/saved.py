"""A finished model as a folder: weights, configuration, tokenizer, preprocessing and scores, so that nobody who uses it
can prepare images or captions differently from training.

    model.json            configuration of the model, preprocessing, data set, labels
    model.safetensors     weights
    text_config/          the text tower's Hugging Face configuration
    tokenizer/
    scores.json           what it reached, on which data, in which gallery
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clipdist.data.images.decode import load_for_evaluation
from clipdist.data.images.pillow import to_rgb
from clipdist.data.images.resize import fit
from clipdist.data.shards import BadSample, checksum_file, fsync_folder
from clipdist.data.text import Tokenizer
from clipdist.errors import UserError, disk_errors
from clipdist.model.build import rebuild_model
from clipdist.model.dual_encoder import DualEncoder, ModelConfig
from clipdist.model.tower_model import TowerModel
from clipdist.model.towers import first_line

if TYPE_CHECKING:
    from clipdist.model.saved_classifier import SavedClassifier
    from clipdist.publish.zero_shot import ZeroShotClassifier

FORMAT = "clipdist-model"
FORMAT_VERSION = 1
MAX_IMAGE_PIXELS = 50_000_000

ImageLike = Image.Image | str | Path | bytes


def save_model(
    folder: Path,
    model: DualEncoder,
    tokenizer: Tokenizer,
    *,
    scores: dict[str, Any],
    about: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the folder whole or not at all, replacing what was there. `about` says what it was trained on; `weights`
    is the model's state when what `model` itself holds of it is only a part.

    Raises `DiskError` when the disk is full or fails, `UserError` when the folder cannot be written.
    """

    def more(partial: Path) -> None:
        model.text.hf_config.save_pretrained(partial / "text_config")
        tokenizer.save(partial / "tokenizer")

    save_folder(folder, model, {"model": asdict(model.config), "about": about}, scores, weights, more)


def save_folder(
    folder: Path,
    model: TowerModel,
    body: dict[str, Any],
    scores: dict[str, Any],
    weights: dict[str, torch.Tensor] | None,
    more: Callable[[Path], None],
) -> None:
    """What `save_model` promises, for any model: `body` is what `model.json` says besides, `more` writes what else
    belongs there."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # a call that failed between its two renames
        os.replace(old, folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    weights = model.state_dict() if weights is None else weights
    with disk_errors(folder):
        try:
            _write(partial, model, body, scores, weights, more)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs its space back
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    partial: Path,
    model: TowerModel,
    body: dict[str, Any],
    scores: dict[str, Any],
    weights: dict[str, torch.Tensor],
    more: Callable[[Path], None],
) -> None:
    partial.mkdir(parents=True)
    preprocessing = {
        "side": model.image.side,
        "resize": model.image.resize,
        "interpolation": "bicubic, antialiased",
        "mean": model.image.mean,
        "std": model.image.std,
    }
    whole = {"format": FORMAT, "version": FORMAT_VERSION, "preprocessing": preprocessing, **body}
    (partial / "model.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (partial / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    save_file({name: plain(tensor) for name, tensor in weights.items()}, partial / "model.safetensors")
    more(partial)
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU in the ordinary layout: safetensors refuses shared and rearranged memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def load(folder: str | Path, device: str | torch.device | None = None) -> "SavedModel | SavedClassifier":
    """The model in `folder` (`runs/NAME/model`), ready to use: a `SavedModel`, or a `SavedClassifier` where a
    classifier was trained; in evaluation mode, float32, on the GPU when there is one unless `device` says otherwise.

    Everything it needs lies in the folder: nothing is fetched. Called by one process by itself. Where only one of them
    will do, `load_dual_encoder` and `load_classifier` give that, or say what was found.

    Raises `UserError` when the folder is missing, half-written, damaged or of another format version.
    """
    folder = Path(folder)
    path = folder / "model.json"
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: cannot be used ({first_line(error)}); expected cpu or cuda") from None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.get("format") != FORMAT or body.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: found {body.get('format')!r} version {body.get('version')!r}, "
                f"expected {FORMAT!r} version {FORMAT_VERSION}"
            )
        # As trained, not as the installed timm has it: its defaults change between versions.
        stated = ("side", "resize", "mean", "std")
        body["model"]["image"] |= {name: body["preprocessing"][name] for name in stated}
        about, weights = body["about"], folder / "model.safetensors"
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        if body.get("objective", "contrastive") == "classify":
            from clipdist.model.saved_classifier import rebuild_saved

            return rebuild_saved(folder, body, scores, device, checksum_file(weights))
        config = TypeAdapter(ModelConfig).validate_python(body["model"])
        tokenizer = Tokenizer.load(folder / "tokenizer", config.text.max_tokens, config.text.fills)
        model = rebuild_model(config, tokenizer, folder / "text_config")
        model.load_state_dict(load_file(weights))
        digest = checksum_file(weights)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a finished model: {Path(error.filename or 'a file').name} is missing") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged model ({type(error).__name__}: {first_line(error)})") from None
    return SavedModel(model.to(device).eval(), tokenizer, about, scores, device, digest)


def load_dual_encoder(folder: str | Path, device: str | torch.device | None = None) -> "SavedModel":
    """As `load`; raises `UserError` for a classifier, which has no text tower."""
    saved = load(folder, device)
    if not isinstance(saved, SavedModel):
        raise UserError(f"{folder}: found a classifier, which knows no texts; expected a dual encoder")
    return saved


def load_classifier(folder: str | Path, device: str | torch.device | None = None) -> "SavedClassifier":
    """As `load`; raises `UserError` for a dual encoder, which knows no classes of its own."""
    saved = load(folder, device)
    if isinstance(saved, SavedModel):
        raise UserError(f"{folder}: found a dual encoder, expected a classifier; its zero_shot(names) makes one of it")
    return saved


class Saved:
    """A trained model with its own preprocessing. `scores` and `about` are what training wrote down; `digest` is the
    xxh3-64 of its weights' file, by which what was made with it is known again. `model` is the torch module."""

    def __init__(
        self,
        model: TowerModel,
        about: dict[str, Any],
        scores: dict[str, Any],
        device: torch.device,
        digest: str = "",
    ) -> None:
        self.model, self.about, self.scores, self.device, self.digest = model, about, scores, device, digest

    def preprocess(self, image: ImageLike) -> torch.Tensor:
        """One image -> uint8 [3, side, side] on the CPU, RGB, exactly as in evaluation during training.

        Takes a PIL image, encoded bytes, or a path. The towers normalise; their input is this. Raises `UserError` for
        what cannot be read, or has more than 50 million pixels and is not decoded yet.
        """
        tower = self.model.image
        try:
            if isinstance(image, Image.Image):
                pixels = np.asarray(fit(to_rgb(image), tower.side, tower.resize))
                return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            pixels = load_for_evaluation(data, tower.side, tower.resize, MAX_IMAGE_PIXELS)
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except (BadSample, OSError) as error:
            name = "image" if isinstance(image, bytes | Image.Image) else image
            raise UserError(f"{name}: {error}") from None

    @torch.inference_mode()
    def _each(
        self, apply: Callable[[torch.Tensor], torch.Tensor], images: Iterable[ImageLike], micro_batch: int, width: int
    ) -> np.ndarray:
        """float32 [N, width]: what a method of the model, in evaluation mode, makes of the images' pixels."""
        if isinstance(images, str | Path | bytes | Image.Image):
            raise UserError("images: found a single one, expected a list of them")
        self.model.eval()
        parts = [
            apply(torch.stack([self.preprocess(image) for image in some]).to(self.device)).cpu()
            for some in _in_batches(images, micro_batch)
        ]
        return torch.cat(parts).numpy() if parts else np.zeros((0, width), np.float32)


class SavedModel(Saved):
    """A trained dual encoder, as `clipdist.load` gives it.

    `scores` (what it reached, on which data) and `about` (what it was trained on) are what training wrote down;
    `digest` is the xxh3-64 of its weights' file; `model` is the torch module, `tokenizer` its tokenizer, `device` where
    it computes. Suffixes of shapes: N images or texts, D = `width`.
    """

    model: DualEncoder

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: Tokenizer,
        about: dict[str, Any],
        scores: dict[str, Any],
        device: torch.device,
        digest: str = "",
    ) -> None:
        super().__init__(model, about, scores, device, digest)
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Width of the joint embedding."""
        return self.model.config.width

    @property
    def temperature(self) -> float:
        """What cosines are divided by to become logits, as training left it."""
        return float(1 / self.model.temperature()[0].detach())

    def encode_image(self, images: Iterable[ImageLike], micro_batch: int = 64) -> np.ndarray:
        """float32 [N, D] unit vectors, one row per image, in order.

        `images` may mix paths, PIL images and encoded bytes, and may be an iterator, of which `micro_batch` are held at
        a time: a matter of memory and speed. No images give [0, D]. Raises `UserError` for the first image that cannot
        be read, with its path, and for a single image in place of a list.
        """
        return self._each(self.model.encode_image, images, micro_batch, self.width)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], micro_batch: int = 256) -> np.ndarray:
        """float32 [N, D] unit vectors, one row per caption, in order; no captions give [0, D].

        A caption longer than the text tower reads (`model.text.max_tokens`) is cut there, as in training. `micro_batch`
        are embedded at a time. Raises `UserError` for a single string in place of a list, and for what is no text.
        """
        if isinstance(texts, str):
            raise UserError("encode_text takes a list of captions; found a single string")
        for number, text in enumerate(texts):
            if not isinstance(text, str) or text != text.encode(errors="ignore").decode():
                raise UserError(f"caption {number}: found {text!r}, expected Unicode text")
        parts = []
        for some in _in_batches(texts, micro_batch):
            tokens, mask = self.tokenizer.pad(self.tokenizer.encode(some))
            parts.append(self.model.encode_text(tokens.to(self.device), mask.to(self.device)))
        return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, self.width), np.float32)

    def zero_shot(
        self,
        classes: Sequence[str] | Mapping[str, str | Sequence[str]],
        templates: Sequence[str] = (),
        temperature: float | None = None,
    ) -> "ZeroShotClassifier":
        """A classifier of images by names of classes: a list, or class -> the name or names that stand in prompts.

        `templates` hold one `{}` each, CLIP's plainest three unless given; `temperature` is the model's unless given,
        such as one that `clipdist eval --calibrate` fitted. Raises `UserError` for fewer than two classes.
        """
        from clipdist.publish.zero_shot import ZeroShotClassifier

        return ZeroShotClassifier(self, classes, templates, temperature)


def likeliest(probability_NK: np.ndarray, names: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """For each row its `top` likeliest classes, (name, probability), the likeliest first; ties in order.

    >>> likeliest(np.array([[0.25, 0.5, 0.25]]), ["nevus", "melanoma", "keratosis"], top=2)
    [[('melanoma', 0.5), ('nevus', 0.25)]]
    """
    if top < 1:
        raise UserError(f"top: found {top}, expected 1 or more")
    order_NK = np.argsort(-probability_NK, axis=1, kind="stable")[:, :top]
    return [
        [(names[k], float(row[k])) for k in best] for row, best in zip(probability_NK, order_NK.tolist(), strict=True)
    ]


def _in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    if size < 1:
        raise UserError(f"micro_batch: found {size}, expected 1 or more")
    source = iter(items)
    while some := list(islice(source, size)):
        yield some
