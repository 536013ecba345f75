"""The folder of a published model, and the weights in it: safetensors or torch's own files, whole or in parts.

`init` is what the recipe says, for messages. Everything here raises `UserError` for what is missing or damaged.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipdist.errors import UserError
from clipdist.model.towers import first_line, resolve


def find_folder(init: str, place: str) -> Path:
    """The folder, or what a hub has under this name, fetched."""
    path = resolve(place)
    if path.is_dir():
        return path
    if path.is_absolute() or place.startswith((".", "~", "package:")) or place.count("/") > 1:
        raise UserError(f"model.init={init}: no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        texts = ["*.json", "*.txt", "*.model"]
        folder = Path(snapshot_download(place, allow_patterns=[*texts, "*model*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(place, allow_patterns=[*texts, "*pytorch_model*.bin"]))
    except Exception as error:  # network, permission, name: each has kinds of its own
        raise UserError(f"model.init={init}: no folder of that name, nor to be had ({first_line(error)})") from None
    return folder


def read_json(path: Path, init: str) -> dict[str, Any]:
    try:
        body: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.init={init}: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.init={init}: {path} cannot be read ({first_line(error)})") from None
    if not isinstance(body, dict):
        raise UserError(f"model.init={init}: {path}: expected keys and values")
    return body


def weight_files(folder: Path, init: str) -> list[Path]:
    """One file, or the parts of one; safetensors where there are both."""
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        found = sorted(folder.glob(pattern))
        parts = [path for path in found if re.search(r"-\d+-of-\d+\.", path.name)]
        if parts or len(found) == 1:
            return parts or found
        if found:
            raise UserError(
                f"model.init={init}: {folder} has {len(found)} files of weights ({found[0].name}, {found[1].name}, …); "
                f"leave one"
            )
    raise UserError(f"model.init={init}: {folder} has no weights: expected a .safetensors, .bin or .pt file")


def tensor_names(path: Path, init: str) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_pickled(path, init))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.init={init}: {path} cannot be read ({first_line(error)})") from None


def read_tensors(folder: Path, init: str, only: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of all, or of these that are there."""
    for path in weight_files(folder, init):
        if path.suffix != ".safetensors":
            for name, tensor in _pickled(path, init).items():
                if isinstance(tensor, Tensor) and (not only or name in only):
                    yield name, tensor.float()
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 — it is no mapping
                    if not only or name in only:
                        yield name, file.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.init={init}: {path} cannot be read ({first_line(error)})") from None


def _pickled(path: Path, init: str) -> dict[str, Tensor]:
    """A state dict as it is, or within a checkpoint of open_clip's training."""
    try:
        state: Any = torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # each kind of file has its own
        raise UserError(f"model.init={init}: {path} cannot be read ({first_line(error)})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read_scalars(folder: Path, init: str) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in read_tensors(folder, init, ("logit_scale", "logit_bias"))}
