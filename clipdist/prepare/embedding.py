"""What an image tower makes of image files that are in no shard set yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdist.data.images.decode import load_for_evaluation
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.sets.pack import available_cores, in_order
from clipdist.data.sets.recode import ImageSource
from clipdist.data.sets.survey import MAX_IMAGE_PIXELS
from clipdist.data.shards import BadSample
from clipdist.errors import UserError
from clipdist.progress import progress

BATCH = 64
RANDOM = "random"


@dataclass
class ImageEmbedder:
    """`encode` maps uint8 [b, 3, side, side] to unit vectors [b, width]; `source` says what it is, for a manifest."""

    encode: Callable[[Tensor], Tensor]
    side: int
    resize: ResizeMode
    width: int
    source: dict[str, Any]
    device: torch.device

    @staticmethod
    def named(name: str, device: str | None = None) -> "ImageEmbedder":
        """`NAME[:WEIGHTS]`, or the folder of a model that clipdist trained, which gives its joint features.

        NAME is any timm model, whose pooled features are taken at the side that it was made for. WEIGHTS is a file or
        `package://<python package>/<path>`; by default those that timm names, from the hub; `random` is for tests.
        Raises `UserError` when it cannot be had.
        """
        # Here, because the processes that decode import this module.
        from clipdist.model.saved import load
        from clipdist.model.towers import ImageTower, ImageTowerConfig, natural_side

        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if (Path(name) / "model.json").is_file():
            saved = load(name, where)
            image = saved.model.image
            return ImageEmbedder(
                saved.model.encode_image, image.side, image.resize, saved.width, {"model": name}, saved.device
            )
        model, _, weights = name.removeprefix("timm:").partition(":")
        pretrained: bool | str = weights != RANDOM and (weights or True)
        try:
            tower = ImageTower(ImageTowerConfig(name=f"timm:{model}", pretrained=pretrained, side=natural_side(model)))
        except UserError as error:
            raise UserError(f"--embed {name}: {str(error).replace('model.image.', '')}") from None
        tower.eval().requires_grad_(False).to(where)

        def encode(images_b3HW: Tensor) -> Tensor:
            return nn.functional.normalize(tower(images_b3HW).float(), dim=1)

        source = {"model": f"timm:{model}", "weights": weights or "pretrained"}
        return ImageEmbedder(encode, tower.side, tower.resize, tower.width, source, where)

    @torch.inference_mode()
    def features(
        self,
        images: Sequence[ImageSource],
        *,
        workers: int | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
        quiet: bool = False,
    ) -> np.ndarray:
        """float32 [N, width]: unit vectors; zeros for an image that cannot be read. `workers`: processes that decode,
        None for one on each core, 0 for none but this."""
        workers = available_cores() if workers is None else workers
        decoded = in_order(
            partial(_pixels_of_all, side=self.side, resize=self.resize, max_pixels=max_pixels), images, workers
        )
        found = np.zeros((len(images), self.width), np.float32)
        waiting: list[np.ndarray] = []
        rows: list[int] = []
        shown = progress(decoded, total=len(images), unit="image", description="features", quiet=quiet)
        for row, pixels in enumerate(shown):
            if pixels is not None:
                waiting.append(pixels)
                rows.append(row)
            if waiting and (len(waiting) == BATCH or row == len(images) - 1):
                batch_b3HW = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).to(self.device)
                found[rows] = self.encode(batch_b3HW).float().cpu().numpy()
                waiting, rows = [], []
        return found


def _pixels_of_all(
    images: list[ImageSource], side: int, resize: ResizeMode, max_pixels: int
) -> list[np.ndarray | None]:
    return [_pixels(image, side, resize, max_pixels) for image in images]


def _pixels(image: ImageSource, side: int, resize: ResizeMode, max_pixels: int) -> np.ndarray | None:
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
        return load_for_evaluation(data, side, resize, max_pixels, exact=False)
    except (BadSample, OSError):
        return None
