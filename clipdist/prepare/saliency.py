"""A vision transformer's attention as a filter: tiles that it looks at in many places are kept.

A network trained by DINO (Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021)
attends to what makes up a picture. In an empty or monotonous tile its attention gathers on few patches;
where tissue fills the tile, most patches get some.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from clipdist.data.shards import checksum_file, write_atomically
from clipdist.errors import UserError
from clipdist.model.towers import ImageTower, ImageTowerConfig, natural_side

BATCH = 64


class AttentionFilter:
    """Attention of the class token to the patches in a transformer's last layer, as the mean over its heads.

    `name`: a timm transformer, such as `vit_small_patch16_224.dino`. `weights`: true takes what timm names, from the
    hub; a path, a file of weights (DINO's own checkpoints too: the teacher of them); false, random ones, for tests.
    `side`: pixels along each side of its input; None: what it was made for.

    A patch is attended to when its attention exceeds `threshold` times the even share, one over the number of patches,
    after what goes to other tokens has been left out; so a threshold means the same at any size. Raises `UserError` for
    a network without class token or attention.
    """

    def __init__(
        self,
        name: str = "vit_small_patch16_224.dino",
        weights: bool | str = True,
        *,
        threshold: float = 0.5,
        side: int | None = None,
        device: str | None = None,
    ) -> None:
        if not threshold > 0:
            raise UserError(f"attention: found the threshold {threshold}, expected more than 0 even shares")
        self.threshold = threshold
        # A file's content counts, not its name: a training that goes on writes other weights to the same place.
        self.source: dict[str, Any] = {"name": name, "weights": weights}
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        plain: bool | dict[str, Any] = weights if isinstance(weights, bool) else _plain_weights(Path(weights))
        if not isinstance(weights, bool):
            self.source["checksum"] = checksum_file(Path(weights))
        self.tower, self.side = _tower(name, plain, side)
        model: Any = self.tower.model
        attention: Any = model.blocks[-1].attn if getattr(model, "blocks", None) else None
        if not isinstance(getattr(attention, "attn_drop", None), nn.Module) or not getattr(model, "has_class_token", 0):
            raise UserError(f"attention: timm:{name} has no class token that attends to patches; choose a vit_*")
        # Without the fused kernel the probabilities exist, and pass through the dropout, which is idle in evaluation.
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(self._keep)
        self.others = int(model.num_prefix_tokens)
        self.tower.eval().requires_grad_(False).to(self.device)
        self._seen: Tensor | None = None

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = output

    @torch.inference_mode()
    def attention(self, images_b3HW: Tensor) -> Tensor:
        """uint8 images -> float32 [b, patches], each row with the sum 1."""
        self.tower(images_b3HW.to(self.device))
        assert self._seen is not None
        class_bP = self._seen[:, :, 0, self.others :].mean(1).float()
        self._seen = None
        return class_bP / class_bP.sum(1, keepdim=True)

    def share(self, images_b3HW: Tensor) -> Tensor:
        """uint8 images -> float32 [b]: the share of patches that are attended to."""
        attention = self.attention(images_b3HW)
        return (attention * attention.shape[1] > self.threshold).float().mean(1)

    def shares(self, paths: Sequence[Path]) -> list[float]:
        """`share` of each picture, resized to the network's input."""
        found: list[float] = []
        for start in range(0, len(paths), BATCH):
            batch = np.stack([_pixels(path, self.side) for path in paths[start : start + BATCH]])
            found += self.share(torch.from_numpy(batch).permute(0, 3, 1, 2)).tolist()
        return found


def attention_of_slides(
    folders: Sequence[tuple[Path, Sequence[Path]]], filter: AttentionFilter
) -> Iterator[dict[str, float]]:
    """For each (folder, tiles in it) the share of each tile by its file's name; kept in the folder's `attention.json`.

    A folder that holds shares of the same tiles, network and threshold already is not looked at again.
    """
    made = {**filter.source, "threshold": filter.threshold, "side": filter.side}
    for folder, paths in folders:
        record = folder / "attention.json"
        sizes = {path.name: path.stat().st_size for path in paths}
        try:
            there = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = {}
        if there.get("made") != made or there.get("bytes") != sizes:
            shares = dict(zip(sizes, filter.shares(paths), strict=True))
            there = {"made": made, "bytes": sizes, "shares": shares}
            write_atomically(record, json.dumps(there, indent=1).encode())
        yield there["shares"]


def _tower(name: str, weights: bool | dict[str, Any], side: int | None) -> tuple[ImageTower, int]:
    side = natural_side(name) if side is None else side
    config = ImageTowerConfig(name=f"timm:{name}", pretrained=weights is True, side=side)
    try:
        tower = ImageTower(config)
    except UserError as error:
        raise UserError(str(error).replace("model.image", "attention")) from None
    if isinstance(weights, dict):
        wanted = tower.model.state_dict()
        state = {key: value for key, value in weights.items() if key in wanted}
        missing = [key for key in wanted if key not in state]
        wrong = [key for key, value in state.items() if value.shape != wanted[key].shape]
        if missing or wrong:
            raise UserError(
                f"attention: the weights do not fit timm:{name} at side {side}: {len(missing)} missing, {len(wrong)} "
                f"of another shape ({', '.join([*missing, *wrong][:3])})"
            )
        tower.model.load_state_dict(state)
    return tower, side


def _plain_weights(path: Path) -> dict[str, Any]:
    """The tensors of a file by the names that timm has; of DINO's checkpoints the teacher's."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_beside_weights()):
                state = torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"attention: no file of weights {path}") from None
    except Exception as error:  # each reader has kinds of its own
        raise UserError(f"attention: {path} cannot be read: {_told(error)}") from None
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"attention: {path} holds no dictionary of weights")
    return {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}


def _beside_weights() -> list[Any]:
    """What DINO's trainer keeps beside its weights, with the names that files of several versions have for it: its
    arguments, with paths, and numbers of NumPy's in the optimiser's state. None of these does anything when read."""
    scalar = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 keep this function in different modules
    return [
        argparse.Namespace,
        (pathlib.PosixPath, "pathlib.PosixPath"),
        (pathlib.PosixPath, "pathlib._local.PosixPath"),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    ]


def _told(error: Exception) -> str:
    """Why a file of weights was refused, in a line; PyTorch's own message has several, with colours."""
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {foreign[1]} besides weights, which is not built from a file; save its weights alone"
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"\x1b\[[0-9;]*m", "", first)


def _pixels(path: Path, side: int) -> npt.NDArray[np.uint8]:
    with Image.open(path) as picture:
        resized = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(resized)
