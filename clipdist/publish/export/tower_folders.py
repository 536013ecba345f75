"""One tower alone, under the names of the library that it comes from: timm's folder for images, transformers' for
texts. Beside an encoder's tower lies its projection into the joint embedding.

A classifier becomes a whole timm model, with its head under timm's name for it.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipdist.errors import UserError
from clipdist.model.saved import Saved, SavedModel, plain
from clipdist.model.saved_classifier import SavedClassifier
from clipdist.publish.export.exporting import PIXELS, SHIPPED, Asked, Foreign, Own, travelling_tokenizer
from clipdist.publish.export.shipped.modeling_clipdist import pool

WEIGHTS, PROJECTION = "model.safetensors", "projection.safetensors"
# timm's words for what becomes of a picture that is not square.
CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}


def check(saved: Saved, asked: Asked) -> None:
    towers = ", ".join(saved.model.towers)
    if asked.tower is None and isinstance(saved, SavedModel):
        raise UserError(f"--to safetensors writes one tower: pass --tower with one of {towers}")
    if asked.tower is not None and asked.tower not in saved.model.towers:
        raise UserError(f"--tower {asked.tower}: this model has {towers} alone")


def write(saved: Saved, folder: Path, asked: Asked) -> None:
    if asked.tower == "text":
        assert isinstance(saved, SavedModel)
        travelling_tokenizer(saved).save_pretrained(folder)
        encoder: Any = saved.model.text.model
        encoder.save_pretrained(folder)
    else:
        timm_folder(saved, folder, {}, saved.model.image.model.state_dict())
    if isinstance(saved, SavedModel):
        layers = saved.model.text_projection if asked.tower == "text" else saved.model.image_projection
        save_file({key: plain(value) for key, value in layers.state_dict().items()}, folder / PROJECTION)


def timm_folder(saved: Saved, folder: Path, more: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """What `timm.create_model("local-dir:…")` reads. `more` stands in its config.json."""
    tower = saved.model.image
    preparation = {
        "input_size": [3, tower.side, tower.side],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[tower.resize],
        "mean": list(tower.mean),
        "std": list(tower.std),
        "custom_load": False,
    }
    known = getattr(tower.model, "pretrained_cfg", None) or {}
    kept = {key: known[key] for key in ("first_conv", "classifier", "pool_size", "fixed_input_size") if known.get(key)}
    arguments = {key: value for key, value in tower.arguments.items() if key != "patch_drop_rate"}
    body = {
        "architecture": saved.model.config.image.name.partition(":")[2],
        "num_classes": 0,
        "num_features": tower.width,
        "model_args": arguments,
        "pretrained_cfg": {**kept, **preparation},
        **more,
    }
    (folder / "config.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    save_file({key: plain(value) for key, value in weights.items()}, folder / WEIGHTS)
    shutil.copyfile(SHIPPED / PIXELS, folder / PIXELS)


def classifier_folder(saved: Saved, folder: Path) -> None:
    """A timm model with the head, which timm and transformers both load. The temperature is in the head: the softmax of
    the logits is calibrated as the model's own probabilities are."""
    assert isinstance(saved, SavedClassifier)
    tower = saved.model.image
    name = _head_name(saved)
    state = dict(tower.model.state_dict())
    for key, value in saved.model.head.state_dict().items():
        state[f"{name}.{key}"] = value.detach() / saved.temperature
    labels = {"num_classes": len(saved.labels), "label_names": saved.names}
    timm_folder(saved, folder, labels, state)
    body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    body["pretrained_cfg"]["classifier"] = name
    (folder / "config.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    write_labels(saved, folder)


def write_labels(saved: SavedClassifier, folder: Path) -> None:
    """`labels.json`: names of the classes in the order of the logits, and the temperature."""
    body = {"labels": saved.names, "field": saved.labels.field, "temperature": saved.temperature}
    text = json.dumps(body, indent=1, ensure_ascii=False)
    (folder / "labels.json").write_text(text + "\n", encoding="utf-8")


def _head_name(saved: SavedClassifier) -> str:
    """Where timm keeps the last linear layer of this family; `UserError` where there is not exactly one of the head's
    shape."""
    made = _with_head(saved)
    shape = saved.model.head.weight.shape
    own = set(saved.model.image.model.state_dict())
    new = {key for key in made.state_dict() if key not in own}
    names = {key.rpartition(".")[0] for key in new}
    if len(names) != 1:
        raise UserError(
            f"{saved.model.config.image.name}: timm's classifier is no single linear layer "
            f"({', '.join(sorted(new)[:4])}); export it --to onnx, or its tower --to safetensors"
        )
    (name,) = names
    layer = made.get_submodule(name)
    if not isinstance(layer, nn.Linear) or layer.weight.shape != shape or layer.bias is None:
        raise UserError(
            f"{saved.model.config.image.name}: timm's classifier {name} is {type(layer).__name__}, expected a linear "
            f"layer of {list(shape)}; export it --to onnx, or its tower --to safetensors"
        )
    return name


def _with_head(saved: SavedClassifier) -> nn.Module:
    tower = saved.model.image
    made: nn.Module = timm.create_model(
        saved.model.config.image.name.partition(":")[2], **{**tower.arguments, "num_classes": len(saved.labels)}
    )
    return made


def embeddings_of(saved: SavedModel) -> Own:
    def text(texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(saved.encode_text(texts))

    return Own(saved.model.encode_image, text)


def load(saved: Saved, folder: Path, asked: Asked) -> tuple[Own, Foreign]:
    if asked.tower == "text":
        assert isinstance(saved, SavedModel)
        return _load_text(saved, folder)
    model = _timm_model(folder, num_classes=0)
    encode: Any = saved.model.encode_image
    own, projected = Own(encode, None, "unit vectors of the tower"), nn.Sequential()
    if isinstance(saved, SavedModel):
        own, projected = Own(encode, None), _projection(saved.model.image_projection, folder)
    foreign = Foreign(
        'timm: create_model("local-dir:…", pretrained=True, num_classes=0)',
        image=lambda images: normalize(projected(model(images)), dim=1),
        prepare=_timm_preparation(model),
        versions={"timm": timm.__version__},
        notes=_pad_note(saved),
    )
    return own, foreign


def _timm_model(folder: Path, **options: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).float().eval()


def _timm_preparation(model: Any) -> Any:
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([transform(image) for image in images])

    return prepare


def _pad_note(saved: Saved) -> list[str]:
    if saved.model.image.resize != "pad":
        return []
    return ["timm pads with the mean colour, the model was trained with white: pad pictures with white before"]


def _projection(like: nn.Sequential, folder: Path) -> nn.Sequential:
    """The projection that the folder holds, in layers of its own."""
    layers = copy.deepcopy(like).eval()
    layers.load_state_dict(load_file(folder / PROJECTION))
    return layers


def _load_text(saved: SavedModel, folder: Path) -> tuple[Own, Foreign]:
    kind = _text_class(saved)
    model: Any = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    projected = _projection(saved.model.text_projection, folder)
    padding: Any = "max_length" if saved.model.config.text.fills else True

    def text(texts: Sequence[str]) -> Tensor:
        batch = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        mask = torch.ones_like(mask) if saved.model.config.text.fills else mask
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return normalize(projected(pool(hidden, mask, saved.model.text.pooling)), dim=1)

    pooling = saved.model.text.pooling
    foreign = Foreign(
        f"transformers: {kind}.from_pretrained(folder)",
        text=text,
        versions={"transformers": transformers.__version__},
        notes=[f"the tower gives a vector for each token; the model takes {pooling} of them, then {PROJECTION}"],
    )
    return Own(None, embeddings_of(saved).text), foreign


def _text_class(saved: SavedModel) -> str:
    kind = saved.model.text.hf_config.model_type
    if kind == "siglip_text_model":
        return "SiglipTextModel"
    return type(saved.model.text.model).__name__ if "Encoder" in type(saved.model.text.model).__name__ else "AutoModel"


def load_classifier_folder(saved: Saved, folder: Path) -> tuple[Own, Foreign]:
    assert isinstance(saved, SavedClassifier)
    model = _timm_model(folder)
    other: Any = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    names = [other.config.id2label[number] for number in range(len(saved.labels))]
    if names != saved.names:
        raise UserError(f"transformers reads the classes {names[:3]} …, expected {saved.names[:3]} …")

    def image(images: Tensor) -> Tensor:
        logits, again = model(images), other(images).logits
        # Both libraries read the same files; whichever is further off decides.
        ours = saved.model.head(saved.model.image.model(images)) / saved.temperature
        return max((logits, again), key=lambda found: float((found - ours).abs().max().nan_to_num(torch.inf)))

    own = Own(lambda pixels: saved.model.logits(pixels) / saved.temperature, None, "logits divided by the temperature")
    foreign = Foreign(
        'timm: create_model("local-dir:…", pretrained=True); transformers: AutoModelForImageClassification',
        image=image,
        prepare=_timm_preparation(model),
        versions={"timm": timm.__version__, "transformers": transformers.__version__},
        notes=["the logits are divided by the fitted temperature already", *_pad_note(saved)],
    )
    return own, foreign


def finish(folder: Path, out: Path, asked: Asked) -> None:
    """Nothing in it names its place."""


def usage(saved: Saved, asked: Asked) -> str:
    if asked.tower == "text":
        assert isinstance(saved, SavedModel)
        kind = _text_class(saved)
        return f"""\
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
hidden = model(**tokenizer(["a caption"], truncation=True, return_tensors="pt")).last_hidden_state"""
    bare = ", num_classes=0" if isinstance(saved, SavedModel) or asked.tower else ""
    result = (
        "features = model(pixels)" if bare else "probabilities = model(pixels).softmax(1)  # labels.json names them"
    )
    return f"""\
import timm
from PIL import Image

model = timm.create_model(f"local-dir:{{folder}}", pretrained=True{bare}).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
pixels = transform(Image.open("a.jpg").convert("RGB"))[None]
{result}"""
