"""The image processor of an exported dual encoder: the pixels of its training, for transformers.

This file travels with an exported model, beside `pixels_clipdist.py`.
"""

from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from .pixels_clipdist import square


class ClipdistImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Pictures (PIL, arrays or tensors, as transformers takes them) -> `pixel_values`, float32 [b, 3, side, side]."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as the base class has it)

    def __init__(
        self,
        side: int = 224,
        resize_mode: str = "crop",
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.side, self.resize_mode = side, resize_mode
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        flat: Any = make_flat_list_of_images(images)
        pictures = [to_pil_image(image) for image in flat]
        pixels = np.stack([square(picture, self.side, self.resize_mode) for picture in pictures])
        mean, std = (np.asarray(values, np.float32) for values in (self.image_mean, self.image_std))
        normalised = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return BatchFeature({"pixel_values": normalised.transpose(0, 3, 1, 2)}, tensor_type=return_tensors)
