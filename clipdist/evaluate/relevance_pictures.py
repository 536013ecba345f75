"""The relevance maps that a report shows, drawn over what the tower sees."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from clipdist.errors import UserError
from clipdist.evaluate.examples import Example, Look, Mistake
from clipdist.evaluate.relevance import class_relevances, input_picture, overlay, relevance_maps, stands_for
from clipdist.model.saved import ImageLike, Saved, SavedModel
from clipdist.model.saved_classifier import SavedClassifier

IN_WORDS = {
    "attention": "Made by attention weighted by its gradient (Chefer, Gur and Wolf 2021).",
    "grad-cam": "Made by Grad-CAM (Selvaraju et al. 2017); grey all over: nothing speaks for it.",
    "rollout": "Made by attention roll-out (Abnar and Zuidema 2020), which is the same whatever the text.",
}


class Looker:
    """Raises `UserError` for a method that the model's tower cannot have. `in_words` names the method."""

    def __init__(self, saved: Saved, method: str) -> None:
        self.saved, self.method = saved, method
        self.in_words = IN_WORDS[stands_for(saved, method)]

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """With a look for the first of the image's own texts, and one for the text ranked first where that is wrong."""
        assert isinstance(self.saved, SavedModel)
        found = []
        for one in examples:
            asked = {"its own text": one.true_texts[0]} if one.true_texts else {}
            if one.ranked and not one.ranked[0][2]:
                asked["the text ranked first"] = one.ranked[0][1]
            maps = relevance_maps(self.saved, one.image, list(asked.values()), self.method) if asked else ()
            found.append(replace(one, looks=self._looks(one.image, list(asked), maps)))
        return found

    def mistakes(self, mistakes: Sequence[Mistake]) -> list[Mistake]:
        """With a look for the class that was given, and one for the right class."""
        assert isinstance(self.saved, SavedClassifier)
        found = []
        for one in mistakes:
            names = [one.given, one.label]
            maps = class_relevances(self.saved, one.image, names, self.method)
            found.append(replace(one, looks=self._looks(one.image, names, maps)))
        return found

    def _looks(self, image: ImageLike, names: Sequence[str], maps: Any) -> list[Look]:
        picture: Image.Image = input_picture(self.saved, image)
        return [Look(name, overlay(picture, np.asarray(map_))) for name, map_ in zip(names, maps, strict=True)]


def looker_of(option: str, saved: Saved) -> Looker | None:
    """What `--relevance` asks for; None for `off`."""
    try:
        return None if option == "off" else Looker(saved, option)
    except UserError as error:
        raise UserError(f"--relevance {option}: {error}, or --relevance off") from None
