"""A dual encoder as a folder of transformers.

A model that `VisionTextDualEncoderModel` can express becomes one, which loads without foreign code: its text tower is
CLIP's, pooled at the end token, its projections are linear without bias. Every other model, with a pooling or a
projection of its own, carries the code of its class: `AutoModel.from_pretrained(folder, trust_remote_code=True)`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipdist.model.saved import Saved, SavedModel, plain
from clipdist.publish.export.exporting import (
    PIXELS,
    SHIPPED,
    Asked,
    Foreign,
    Own,
    projection_of,
    scaling_of,
    travelling_tokenizer,
)
from clipdist.publish.export.tower_folders import classifier_folder, embeddings_of, load_classifier_folder
from clipdist.publish.export.tower_folders import usage as classifier_usage

MODEL_CODE = "modeling_clipdist.py"
IMAGE_CODE = ("image_processing_clipdist.py", PIXELS)
AUTO_MAP = {
    "AutoConfig": "modeling_clipdist.ClipdistConfig",
    "AutoModel": "modeling_clipdist.ClipdistModel",
    "AutoModelForZeroShotImageClassification": "modeling_clipdist.ClipdistModel",  # what the pipeline asks for
}


def check(saved: Saved, asked: Asked) -> None:
    """Every model can be expressed."""


def is_plain(saved: SavedModel) -> bool:
    """Whether `VisionTextDualEncoderModel` computes the same: its text features are the tower's own pooled output, its
    projections are linear without bias, and it has no logit bias."""
    config, text = saved.model.config, saved.model.text
    projections = [projection_of(layers) for layers in (saved.model.image_projection, saved.model.text_projection)]
    return (
        text.hf_config.model_type == "clip_text_model"
        and text.pooling == "last"
        and not config.text.fills
        and not any(one.hidden or one.layer_norm or any(one.biases) for one in projections)
        and saved.model.temperature.bias is None
        and _pools_at(text.hf_config) == _end_token(saved)
    )


def _end_token(saved: SavedModel) -> int:
    return saved.tokenizer.encode(["a"])[0][-1]


def _pools_at(config: Any) -> int:
    """The token at whose first place CLIP pools; where its end token is 2, at the largest token of all."""
    return config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id


def write(saved: Saved, folder: Path, asked: Asked) -> None:
    if not isinstance(saved, SavedModel):
        classifier_folder(saved, folder)
        return
    images, tokenizer = _image_processor(saved, folder), travelling_tokenizer(saved)
    processor: Any = transformers.VisionTextDualEncoderProcessor(images, tokenizer)
    processor.save_pretrained(folder)
    model = _made(saved)
    model.load_state_dict(_weights(saved))
    model.save_pretrained(folder)
    if not is_plain(saved):
        shutil.copyfile(SHIPPED / MODEL_CODE, folder / MODEL_CODE)
        path = folder / "config.json"
        body = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**body, "auto_map": AUTO_MAP}, indent=1) + "\n", encoding="utf-8")


def _image_processor(saved: SavedModel, folder: Path) -> Any:
    """transformers' own where it is nearly the same and nothing else asks for foreign code, or ours, with its code."""
    tower = saved.model.image
    numbers: dict[str, Any] = {"image_mean": list(tower.mean), "image_std": list(tower.std)}
    side: Any = {"height": tower.side, "width": tower.side}
    if is_plain(saved) and tower.resize == "crop":
        return transformers.CLIPImageProcessor(size={"shortest_edge": tower.side}, crop_size=side, **numbers)
    if is_plain(saved) and tower.resize == "squash":
        return transformers.ViTImageProcessor(
            size=side, resample=Image.Resampling.BICUBIC, do_convert_rgb=True, **numbers
        )
    from clipdist.publish.export.shipped.image_processing_clipdist import ClipdistImageProcessor

    for name in IMAGE_CODE:
        shutil.copyfile(SHIPPED / name, folder / name)
    processor: Any = ClipdistImageProcessor(side=tower.side, resize_mode=tower.resize, **numbers)
    processor.auto_map = {"AutoImageProcessor": "image_processing_clipdist.ClipdistImageProcessor"}
    return processor


def _made(saved: SavedModel) -> Any:
    """An untrained model of the class that `is_plain` decides for."""
    config, image, text = saved.model.config, saved.model.image, saved.model.text
    name = config.image.name.partition(":")[2]
    arguments = {key: value for key, value in image.arguments.items() if key != "patch_drop_rate"}
    more: dict[str, Any] = {"hidden_size": image.width}  # which the class does not know, and keeps
    vision = transformers.TimmWrapperConfig(architecture=name, model_args=arguments, **more)
    shape = text.hf_config.to_dict()
    shape.pop("_name_or_path", None)  # a folder of this machine
    scale = float(saved.model.temperature.log_scale.detach())
    if is_plain(saved):
        whole = transformers.VisionTextDualEncoderConfig(
            vision_config=vision.to_dict(),
            text_config=shape,
            projection_dim=config.width,
            logit_scale_init_value=scale,
        )
        return transformers.VisionTextDualEncoderModel(whole)
    from clipdist.publish.export.shipped.modeling_clipdist import ClipdistConfig, ClipdistModel

    own = ClipdistConfig(
        vision_config=vision.to_dict(),
        text_config=shape,
        projection_dim=config.width,
        projection=projection_of(saved.model.image_projection).words,
        text_projection=projection_of(saved.model.text_projection).words,
        pooling=text.pooling,
        max_tokens=config.text.max_tokens,
        fills=config.text.fills,
        biased=saved.model.temperature.bias is not None,
        logit_scale_init_value=scale,
    )
    return ClipdistModel(own)


def _weights(saved: SavedModel) -> dict[str, Tensor]:
    model = saved.model
    found = {
        **{f"vision_model.timm_model.{key}": value for key, value in model.image.model.state_dict().items()},
        **{f"text_model.{key}": value for key, value in model.text.model.state_dict().items()},
        "logit_scale": model.temperature.log_scale.reshape(()),
    }
    for name, layers in (("visual", model.image_projection), ("text", model.text_projection)):
        state = {"weight": layers[-1].weight} if is_plain(saved) else layers.state_dict()
        found |= {f"{name}_projection.{key}": value for key, value in state.items()}
    if model.temperature.bias is not None:
        found["logit_bias"] = model.temperature.bias.reshape(())
    return {key: plain(value) for key, value in found.items()}


def load(saved: Saved, folder: Path, asked: Asked) -> tuple[Own, Foreign]:
    if not isinstance(saved, SavedModel):
        return load_classifier_folder(saved, folder)
    own_code = (folder / MODEL_CODE).exists()
    foreign_code = own_code or (folder / IMAGE_CODE[0]).exists()
    kind = transformers.AutoModel if own_code else transformers.VisionTextDualEncoderModel
    model: Any = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own_code).eval()
    processor: Any = transformers.VisionTextDualEncoderProcessor.from_pretrained(folder, trust_remote_code=foreign_code)
    padding: Any = "max_length" if saved.model.config.text.fills else True

    def text(texts: Sequence[str]) -> Tensor:
        batch = processor.tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        return normalize(_pooled(model.get_text_features(**batch)), dim=1)

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        return processor.image_processor(list(images), return_tensors="pt")["pixel_values"]

    how = f"{kind.__name__}.from_pretrained(folder{', trust_remote_code=True' if own_code else ''})"
    temperature, bias = scaling_of(model)
    foreign = Foreign(
        f"transformers: {how}",
        image=lambda images: normalize(_pooled(model.get_image_features(pixel_values=images)), dim=1),
        text=text,
        prepare=prepare,
        temperature=temperature,
        bias=bias,
        versions={"transformers": transformers.__version__},
        notes=_notes(own_code, foreign_code),
    )
    return embeddings_of(saved), foreign


def _notes(own_code: bool, foreign_code: bool) -> list[str]:
    if own_code:
        return [
            "needs trust_remote_code=True: no class of transformers has this model's pooling or projection; the code "
            "is in the folder"
        ]
    return ["its image processor needs trust_remote_code=True: transformers has none that pads"] if foreign_code else []


def _pooled(output: Any) -> Tensor:
    # Before transformers 5 the method gave the features alone.
    return output if isinstance(output, Tensor) else output.pooler_output


def finish(folder: Path, out: Path, asked: Asked) -> None:
    """Nothing in it names its place."""


def usage(saved: Saved, asked: Asked) -> str:
    if not isinstance(saved, SavedModel):
        return classifier_usage(saved, asked)
    trust = "" if is_plain(saved) else ", trust_remote_code=True"
    trust_images = ", trust_remote_code=True" if trust or saved.model.image.resize == "pad" else ""
    kind = "AutoModel" if trust else "VisionTextDualEncoderModel"
    padding = '"max_length"' if saved.model.config.text.fills else "True"
    return f"""\
import torch
from PIL import Image
from transformers import {kind}, VisionTextDualEncoderProcessor

model = {kind}.from_pretrained(folder{trust}).eval()
processor = VisionTextDualEncoderProcessor.from_pretrained(folder{trust_images})
texts = ["one caption", "another one"]
batch = processor(images=Image.open("a.jpg"), text=texts, padding={padding}, truncation=True, return_tensors="pt")
with torch.inference_mode():
    print(model(**batch).logits_per_image.softmax(1))"""
