"""Which parts of a picture speak for a text, or for a class: a map over the very pixels that the tower sees.

A map shows what the score of this model reacts to, not why the picture is what it is; methods disagree, and none is the
truth. Check that maps change when the weights are randomised (Adebayo et al. 2018, arXiv 1810.03292) before you believe
a kind of map.
"""

import difflib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipdist.errors import UserError
from clipdist.evaluate.relevance_methods import relevance, undisturbed
from clipdist.model.saved import ImageLike, Saved, SavedModel
from clipdist.model.saved_classifier import SavedClassifier


def relevance_map(saved: SavedModel, image: ImageLike, text: str, method: str = "gradient") -> np.ndarray:
    """float32 [side, side] in 0..1 over `input_picture`: what each place adds to the cosine of image and text.

    `gradient` takes what suits the tower. It is `attention` for transformers whose blocks attend from all tokens to
    all (Chefer, Gur and Wolf 2021): 0 is the least relevant place and 1 the most. It is `grad-cam` for all others
    (Selvaraju et al. 2017): 0 is a place that speaks for nothing or against the text, and a map of zeros says that
    nothing speaks for it. `rollout` (Abnar and Zuidema 2020) shows where attention goes, whatever the text.

    The model is left as it was. Raises `UserError` for a method that its tower cannot have, and for images that cannot
    be read.
    """
    return relevance_maps(saved, image, [text], method)[0]


def relevance_maps(saved: SavedModel, image: ImageLike, texts: Sequence[str], method: str = "gradient") -> np.ndarray:
    """float32 [texts, side, side]: `relevance_map` of each text, by one forward pass."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"relevance: found {texts!r}, expected one text or more in a list")
    model = saved.model
    with undisturbed(model):
        text_features_MD = torch.from_numpy(saved.encode_text(texts)).to(saved.device)

        def cosines(features_1C: Tensor) -> Tensor:
            image_features_1D = F.normalize(model.image_projection(features_1C).float(), dim=1)
            return text_features_MD @ image_features_1D[0]

        return _maps(saved, image, cosines, method)


def class_relevance(saved: SavedClassifier, image: ImageLike, name: str, method: str = "gradient") -> np.ndarray:
    """The same for a classifier: what each place adds to the logit of the class of that name."""
    return class_relevances(saved, image, [name], method)[0]


def class_relevances(
    saved: SavedClassifier, image: ImageLike, names: Sequence[str], method: str = "gradient"
) -> np.ndarray:
    """float32 [names, side, side]: `class_relevance` of each class, by one forward pass."""
    if isinstance(names, str) or not names:
        raise UserError(f"relevance: found {names!r}, expected one class or more in a list")
    for name in names:
        if name not in saved.names:
            near = difflib.get_close_matches(str(name), saved.names, n=5, cutoff=0) or saved.names[:5]
            raise UserError(f"class: found {name!r}, which the model does not know; near: {', '.join(near)}")
    chosen, model = [saved.names.index(name) for name in names], saved.model
    with undisturbed(model):
        return _maps(saved, image, lambda features_1C: model.head(features_1C.float())[0, chosen], method)


def stands_for(saved: Saved, method: str) -> str:
    """`attention`, `grad-cam` or `rollout`: what the method is for this model's tower.

    Raises `UserError` when its tower cannot have it.
    """
    tower = saved.model.image
    blank_3HW = torch.zeros(3, tower.side, tower.side, dtype=torch.uint8, device=saved.device)
    with undisturbed(saved.model):
        return relevance(tower, blank_3HW, lambda features_1C: features_1C[0, :1], method)[1]


def _maps(saved: Saved, image: ImageLike, scores: Callable[[Tensor], Tensor], method: str) -> np.ndarray:
    tower = saved.model.image
    found_Mgg, _ = relevance(tower, saved.preprocess(image).to(saved.device), scores, method)
    fine_MSS = F.interpolate(found_Mgg[:, None], size=(tower.side, tower.side), mode="bilinear", align_corners=False)
    most_M11 = fine_MSS.amax((2, 3), keepdim=True)
    whole_MSS = torch.where(most_M11 > 0, fine_MSS / most_M11.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    made: np.ndarray = whole_MSS[:, 0].clamp(0, 1).cpu().numpy()
    return made


def input_picture(saved: Saved, image: ImageLike) -> Image.Image:
    """The square that the tower sees: decoded, cropped or padded, and resized as in training."""
    return Image.fromarray(saved.preprocess(image).permute(1, 2, 0).numpy())


def overlay(image: Image.Image, relevance_SS: np.ndarray) -> Image.Image:
    """The picture in grey, coloured by a map of its own size: the brighter and yellower, the more relevant.

    Raises `UserError` when the sizes differ: take `input_picture`, not the file.
    """
    import matplotlib

    if relevance_SS.shape != (image.height, image.width):
        raise UserError(
            f"overlay: found a picture of {image.width} x {image.height} and a map of shape {relevance_SS.shape}, "
            f"expected equal sizes; take input_picture(saved, image)"
        )
    strength_SS1 = np.clip(relevance_SS, 0, 1)[:, :, None].astype(np.float32)
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32)
    colour = matplotlib.colormaps["plasma"](strength_SS1[:, :, 0])[:, :, :3] * 255
    share = 0.85 * strength_SS1
    return Image.fromarray((grey * (1 - share) + colour * share).round().astype(np.uint8))
