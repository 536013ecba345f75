"""A dual encoder as `open_clip.create_model_and_transforms("local-dir:…")` loads it.

Towers of CLIP become open_clip's own transformers; other image towers stay timm's, other text towers transformers', as
far as open_clip's words for them reach: it hands timm no options, and gives text towers of transformers no bias behind
them.
"""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from clipdist.errors import UserError
from clipdist.model.saved import Saved, SavedModel, plain
from clipdist.publish.export.exporting import (
    PIXELS,
    SHIPPED,
    Asked,
    Foreign,
    Own,
    missing_package,
    projection_of,
    scaling_of,
    travelling_tokenizer,
)
from clipdist.publish.export.open_clip_names import named_as_text, named_as_vision
from clipdist.publish.export.tower_folders import embeddings_of

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
RESIZE_MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
HUGGING_FACE = ("bert", "roberta", "xlm-roberta")
"""Text towers that open_clip's adapter builds without their pooling head."""
NATIVE = {"clip_text_model": {"gelu", "quick_gelu"}, "siglip_text_model": {"gelu", "gelu_pytorch_tanh"}}
"""Text towers that open_clip has, with the activations that it knows for them."""
TIMM_WORDS = {"img_size", "global_pool", "fc_norm", "patch_drop_rate", "drop_path_rate"}
"""Options of timm that open_clip sets in words of its own, or that change nothing of a finished model."""


def check(saved: Saved, asked: Asked) -> None:
    if importlib.util.find_spec("open_clip") is None:
        raise missing_package("open_clip", "open_clip_torch")
    if not isinstance(saved, SavedModel):
        raise UserError("--to open_clip: found a classifier, expected a dual encoder; use --to huggingface or onnx")
    if reasons := list(_reasons(saved)):
        raise UserError(f"--to open_clip: it cannot express {'; '.join(reasons)}; use --to huggingface")


def _reasons(saved: SavedModel) -> list[str]:
    text = saved.model.text
    kind = text.hf_config.model_type
    reasons = _reasons_of_projections(saved)
    if kind in NATIVE:
        reasons += _reasons_of_native(saved, kind)
    elif kind not in HUGGING_FACE:
        reasons.append(f"a text tower of type {kind} (it has clip, siglip, {', '.join(HUGGING_FACE)})")
    else:
        if text.pooling not in POOLERS:
            reasons.append(f"model.text.pooling={text.pooling} of a text tower of transformers (it has mean and cls)")
        if saved.model.config.text.fills:
            reasons.append("model.text.padding=max_tokens of a text tower of transformers")
        if text.hf_config.pad_token_id != saved.tokenizer.pad_id or _end(saved) == saved.tokenizer.pad_id:
            reasons.append("a tokenizer whose padding token is a token of captions, too")
    if saved.model.image.width != getattr(saved.model.image.model, "num_features", None) and not _native_vision(saved):
        reasons.append(f"{saved.model.config.image.name}, whose features are wider than the num_features of timm")
    options = set(saved.model.image.arguments) - TIMM_WORDS
    if options and _native_vision(saved) is None:
        reasons.append(f"options of timm ({', '.join(sorted(options))}) for {saved.model.config.image.name}")
    return reasons


def _reasons_of_projections(saved: SavedModel) -> list[str]:
    image, text = projection_of(saved.model.image_projection), projection_of(saved.model.text_projection)
    width, reasons = saved.model.config.width, []
    if image.layer_norm or text.layer_norm:
        reasons.append("a projection with layer_norm=true")
    if image.hidden not in (0, 2 * width):
        reasons.append(f"an mlp projection of images with hidden={image.hidden} (it has {2 * width})")
    if saved.model.text.hf_config.model_type in NATIVE:
        if text.hidden:
            reasons.append("an mlp projection behind a text tower of CLIP or SigLIP")
        return reasons
    if any(text.biases):
        reasons.append("a projection with biases behind a text tower of transformers")
    if text.hidden not in (0, (saved.model.text.width + width) // 2):
        reasons.append(
            f"an mlp projection of texts with hidden={text.hidden} (it has {(saved.model.text.width + width) // 2})"
        )
    return reasons


def _reasons_of_native(saved: SavedModel, kind: str) -> list[str]:
    text, reasons = saved.model.text, []
    activation = text.hf_config.hidden_act
    if text.pooling != "last":
        reasons.append(f"model.text.pooling={text.pooling} of a text tower of CLIP or SigLIP (it has last)")
    if activation not in NATIVE[kind]:
        reasons.append(f"the activation {activation} in a text tower of type {kind}")
    if (kind == "siglip_text_model") != saved.model.config.text.fills:
        reasons.append(f"model.text.padding={saved.model.config.text.padding} with a text tower of type {kind}")
    return reasons


def _end(saved: SavedModel) -> int:
    """The token that every caption ends with."""
    return saved.tokenizer.encode(["a"])[0][-1]


def _native_vision(saved: SavedModel) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(`vision_cfg`, weights) where open_clip's own transformer computes the same; None where it does not."""
    tower: Any = saved.model.image.model
    text = saved.model.text.hf_config
    if not isinstance(tower, VisionTransformer) or tower.global_pool != "token":
        return None
    projection = projection_of(saved.model.image_projection)
    if projection.hidden or any(projection.biases):
        return None
    block = _first_block(saved)
    quick = _is_quick(block)
    # One switch is for both of its transformers; timm's towers and transformers' do not heed it.
    wanted = text.hidden_act == "quick_gelu" if text.model_type in NATIVE else quick
    # torch's, or timm's of the same name, which has no attributes.
    plain_gelu = type(block.mlp.act).__name__ == "GELU" and getattr(block.mlp.act, "approximate", "none") == "none"
    if quick != wanted or not (quick or plain_gelu) or abs(block.norm1.eps - 1e-5) > 1e-9:
        return None
    weights = named_as_vision(tower.state_dict())
    if weights is None:
        return None
    width = weights["class_embedding"].shape[0]
    hidden = weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    shape = {
        "image_size": saved.model.image.side,
        "layers": len(tower.blocks),
        "width": width,
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": _ratio(hidden, width),
        "patch_size": weights["conv1.weight"].shape[-1],
    }
    return shape, {**weights, "proj": projection.linear[0].weight.T}


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width  # it rounds down


def _timm_vision(saved: SavedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tower, projection = saved.model.image, projection_of(saved.model.image_projection)
    last = projection.linear[-1]
    shape: dict[str, Any] = {
        "image_size": tower.side,
        "timm_model_name": saved.model.config.image.name.partition(":")[2],
        "timm_model_pretrained": False,
        "timm_pool": tower.arguments.get("global_pool", ""),
        "timm_proj": "mlp" if projection.hidden else "linear",
    }
    weights = {f"trunk.{key}": value for key, value in tower.model.state_dict().items()}
    if projection.biases[-1]:
        shape["timm_proj_bias"] = True
    elif not projection.hidden and torch.equal(last.weight, torch.eye(*last.weight.shape)):
        return {**shape, "timm_proj": "none"}, weights  # SigLIP's
    names = ["head.mlp.fc1", "head.mlp.fc2"] if projection.hidden else ["head.proj"]
    for name, layer in zip(names, projection.linear, strict=True):
        weights[f"{name}.weight"] = layer.weight
        if name == "head.mlp.fc1" or projection.biases[-1]:
            weights[f"{name}.bias"] = layer.bias
    return shape, weights


def _native_text(saved: SavedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, text = saved.model.text.hf_config, saved.model.config.text
    shape: dict[str, Any] = {
        "context_length": text.max_tokens,
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "mlp_ratio": _ratio(config.intermediate_size, config.hidden_size),
    }
    if abs(config.layer_norm_eps - 1e-5) > 1e-9:
        shape["norm_kwargs"] = {"eps": config.layer_norm_eps}
    if config.hidden_act == "gelu_pytorch_tanh":
        shape["act_kwargs"] = {"approximate": "tanh"}
    if config.model_type == "siglip_text_model":
        shape |= {"no_causal_mask": True, "pool_type": "last"}
    elif _end(saved) < len(saved.tokenizer) - 1:  # the end token is not the largest, which it would look for
        shape |= {"pool_type": "eos", "eos_id": _end(saved)}
    weights = named_as_text(saved.model.text.model.state_dict())
    weights["positional_embedding"] = weights["positional_embedding"][: text.max_tokens]
    linear: Any = saved.model.text_projection[-1]
    if linear.bias is not None:
        shape["proj_bias"] = True
        return shape, {**weights, "text_projection.weight": linear.weight, "text_projection.bias": linear.bias}
    return shape, {**weights, "text_projection": linear.weight.T}


def _hugging_face_text(saved: SavedModel, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    text, projection = saved.model.text, projection_of(saved.model.text_projection)
    shape = {
        "context_length": saved.model.config.text.max_tokens,
        "hf_model_name": str(folder.absolute()),
        "hf_model_pretrained": False,
        "hf_proj_type": "mlp" if len(projection.linear) == 2 else "linear",
        "hf_pooler_type": POOLERS[text.pooling],
    }
    # The tower's own pooling head, which nothing here reads, is left out there.
    tower = {key: value for key, value in text.model.state_dict().items() if not key.startswith("pooler.")}
    weights = {f"transformer.{key}": value for key, value in tower.items()}
    names = ["proj.0.weight", "proj.2.weight"] if len(projection.linear) == 2 else ["proj.weight"]
    return shape, weights | {name: layer.weight for name, layer in zip(names, projection.linear, strict=True)}


def write(saved: Saved, folder: Path, asked: Asked) -> None:
    assert isinstance(saved, SavedModel)
    model, config = saved.model, saved.model.text.hf_config
    native = _native_vision(saved)
    vision, visual = native or _timm_vision(saved)
    own_text = config.model_type in NATIVE
    text, textual = _native_text(saved) if own_text else _hugging_face_text(saved, folder)
    # A name must stand there, or open_clip takes CLIP's own; of a local folder it reads the folder's.
    text["hf_tokenizer_name"] = asked.hub_name or "tokenizer"
    custom = not (native and own_text and "proj_bias" not in text)
    whole: dict[str, Any] = {"embed_dim": model.config.width, "vision_cfg": vision, "text_cfg": text}
    if config.hidden_act == "quick_gelu" if own_text else native and _is_quick(_first_block(saved)):
        whole["quick_gelu"] = True
    if custom:
        whole["custom_text"] = True
    weights = {f"visual.{key}": value for key, value in visual.items()}
    weights |= {f"text.{key}" if custom else key: value for key, value in textual.items()}
    weights["logit_scale"] = model.temperature.log_scale.reshape(())
    if model.temperature.bias is not None:
        whole["init_logit_bias"] = float(model.temperature.bias.detach())
        weights["logit_bias"] = model.temperature.bias.reshape(())
    preparation = {
        "mean": list(model.image.mean),
        "std": list(model.image.std),
        "interpolation": "bicubic",
        "resize_mode": RESIZE_MODES[model.image.resize],
        "fill_color": 255,
    }
    _write_config(folder, {"model_cfg": whole, "preprocess_cfg": preparation})
    save_file({key: plain(value) for key, value in weights.items()}, folder / WEIGHTS)
    if not own_text:
        config.save_pretrained(folder)
    travelling_tokenizer(saved).save_pretrained(folder)
    shutil.copyfile(SHIPPED / PIXELS, folder / PIXELS)


def _first_block(saved: SavedModel) -> Any:
    tower: Any = saved.model.image.model
    return tower.blocks[0]


def _is_quick(block: Any) -> bool:
    return isinstance(block.mlp.act, QuickGELU)


def _write_config(folder: Path, body: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def load(saved: Saved, folder: Path, asked: Asked) -> tuple[Own, Foreign]:
    import open_clip

    assert isinstance(saved, SavedModel)
    place = f"local-dir:{folder}"
    model, prepare_one = open_clip.create_model_from_pretrained(place, precision="fp32", device="cpu")
    model.eval()
    tokenize = open_clip.get_tokenizer(place)

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([prepare_one(image) for image in images])

    temperature, bias = scaling_of(model)
    foreign = Foreign(
        'open_clip: create_model_from_pretrained("local-dir:…")',
        image=lambda images: model.encode_image(images, normalize=True),
        text=lambda texts: model.encode_text(tokenize(list(texts)), normalize=True),
        prepare=prepare,
        temperature=temperature,
        bias=bias,
        versions={"open_clip": open_clip.__version__},
        notes=_notes(saved, asked),
    )
    return embeddings_of(saved), foreign


def _notes(saved: SavedModel, asked: Asked) -> list[str]:
    if saved.model.text.hf_config.model_type in NATIVE:
        return []
    if asked.hub_name:
        return [f"the text tower's configuration is asked of the hub's {asked.hub_name}: upload the folder there"]
    return [
        "the text tower's configuration is found by the folder's absolute path: after moving it, set "
        "text_cfg.hf_model_name in open_clip_config.json; for a hub, export with --hub-name ORG/NAME"
    ]


def finish(folder: Path, out: Path, asked: Asked) -> None:
    """Names the place where the text tower's configuration will be found."""
    body = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    text = body["model_cfg"]["text_cfg"]
    if "hf_model_name" in text:
        text["hf_model_name"] = asked.hub_name or str(out.absolute())
        _write_config(folder, body)


def usage(saved: Saved, asked: Asked) -> str:
    place = f'"hf-hub:{asked.hub_name}"' if asked.hub_name else 'f"local-dir:{folder}"'
    return f"""\
import open_clip
import torch
from PIL import Image

model, prepare = open_clip.create_model_from_pretrained({place})
tokenize = open_clip.get_tokenizer({place})
with torch.inference_mode():
    images = model.encode_image(prepare(Image.open("a.jpg"))[None], normalize=True)
    texts = model.encode_text(tokenize(["one caption", "another one"]), normalize=True)
print(images @ texts.T)  # cosines"""
