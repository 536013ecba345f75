"""The folder of a published model, and the weights in it: safetensors or torch's own files, whole or in parts.

`init` is what the recipe says, for messages. Everything here raises `UserError` for what is missing or damaged.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdist.errors import UserError
from clipdist.model.stored import Stored
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


def open_weights(folder: Path, init: str) -> Mapping[str, Tensor]:
    """Name -> tensor on the CPU; of safetensors each is read when it is asked for."""
    paths = weight_files(folder, init)
    try:
        if paths[0].suffix == ".safetensors":
            return Stored.open(paths)
        return {name: tensor for path in paths for name, tensor in _pickled(path).items()}
    except Exception as error:  # each kind of file has its own
        named = paths[0] if len(paths) == 1 else folder
        raise UserError(f"model.init={init}: {named} cannot be read ({first_line(error)})") from None


def _pickled(path: Path) -> dict[str, Tensor]:
    """A state dict as it is, or within a checkpoint of open_clip's training."""
    state: Any = torch.load(path, "cpu", weights_only=True, mmap=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
