"""Zero-shot classification: class names in prompts, embedded as texts, against images.

Suffixes of names: N images, C classes, D feature width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.labels import label_of, label_order
from clipdist.errors import UserError
from clipdist.evaluate.classification import ClassificationScores, classification_scores
from clipdist.evaluate.cosines import TIE_TOLERANCE, Array, full_float32, same_width, unit_rows

TEMPLATES = ("{}", "a photo of {}.", "an image of {}.")
_ROWS_AT_ONCE = 8192


def class_features(
    encode_text: Callable[[list[str]], Array], names: Sequence[Sequence[str]], templates: Sequence[str] = TEMPLATES
) -> np.ndarray:
    """float32 [C, D] unit vectors: for each class the mean of its prompts' unit vectors, made a unit vector again.

    A class may have several names; each is put into each template's `{}` (the prompt ensemble of CLIP, Radford et al.
    2021, section 3.1.4). `encode_text` maps sentences to features [n, D]. Raises `UserError` for a template without
    exactly one `{}`.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"template {template!r}: expected exactly one {{}}, where the name of a class goes")
    if not templates or not all(names):
        raise UserError("zero-shot classification needs a template, and a name for every class")
    prompts = [[template.replace("{}", name) for name in some for template in templates] for some in names]
    features = unit_rows(encode_text([prompt for some in prompts for prompt in some]), "prompt").cpu()
    means = [rows.double().mean(dim=0, keepdim=True) for rows in features.split([len(some) for some in prompts])]
    return np.concatenate([unit_rows(mean, "class").numpy() for mean in means])


def class_logits(image_features_ND: Array, class_features_CD: Array, scale: float) -> np.ndarray:
    """float32 [N, C]: `scale` (1/temperature) times the cosine of each image and each class."""
    image_ND, class_CD = unit_rows(image_features_ND, "image"), unit_rows(class_features_CD, "class")
    same_width(image_ND, class_CD, ("image", "class"))
    class_CD = class_CD.to(image_ND.device)
    with full_float32(image_ND.device.type):
        return np.concatenate([(scale * rows @ class_CD.T).cpu().numpy() for rows in image_ND.split(_ROWS_AT_ONCE)])


def zero_shot_scores(
    image_features_ND: Array,
    class_features_CD: Array,
    label_N: np.ndarray | Sequence[int],
    classes: Sequence[str],
    *,
    scale: float,
    units: Sequence[Any] | np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> ClassificationScores:
    """Each image gets the class whose features are nearest; scores as `classification_scores` defines them.

    `label_N`: the row in `class_features_CD` of each image's class, negative for an image without one. `scale` is
    1/temperature: of more than two classes, AUROC depends on it through the softmax.
    """
    logits_NC = class_logits(image_features_ND, class_features_CD, scale)
    return classification_scores(
        logits_NC, label_N, classes, tolerance=scale * TIE_TOLERANCE, units=units, bootstrap=bootstrap, seed=seed
    )


def read_classes(path: Path) -> dict[str, list[str]]:
    """Value of the label field -> the names that stand in its prompts, in the file's order.

    A `.json` file holds an object of value -> name or list of names; any other one value a line, followed by a tab and
    its name (several: more tabs) where that differs. Raises `UserError` for anything else.
    """
    text = _text(path)
    found: dict[str, list[str]] = {}
    if path.suffix.lower() == ".json":
        try:
            body = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: no valid JSON ({error})") from None
        if not isinstance(body, dict):
            raise UserError(f"{path}: found {type(body).__name__}, expected an object of value: name or list of names")
        for value, names in body.items():
            found[value] = [names] if isinstance(names, str) else names
        wrong = [value for value, names in found.items() if not (isinstance(names, list) and names and all(names))]
        if wrong or not all(isinstance(name, str) for names in found.values() for name in names):
            raise UserError(f"{path}: {wrong or 'a value'}: expected a name or a list of names")
    else:
        for line in text.splitlines():
            value, *names = (part.strip() for part in line.split("\t"))
            if value in found:
                raise UserError(f"{path}: {value!r} stands in it twice; expected each value once, its names after tabs")
            if value:
                found[value] = [name for name in names if name] or [value]
    if len(found) < 2:
        raise UserError(f"{path}: found {len(found)} classes, expected two or more, one a line")
    return found


def read_templates(path: Path) -> list[str]:
    """One prompt template a line, with `{}` for the name of a class; empty lines are left out."""
    found = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path}: no template; expected one a line, such as: a photo of {{}}.")
    return found


def labels_of(
    fields: Sequence[Mapping[str, Any]], by: str, values: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str], dict[str, int]]:
    """(int64 [N] class of each sample, -1 for none; the values that the classes stand for; what was left out).

    The class is the value of the field `by`, as a string. Without `values` all that occur are classes, in order. Left
    out, with their counts, are samples without the field and those whose value is none of `values`. Raises `UserError`
    when fewer than two classes occur, or a value is a list or an object.
    """
    found = [label_of(one, by) for one in fields]
    occurring = {value for value in found if value is not None}
    classes = list(values) if values is not None else sorted(occurring, key=label_order)
    number = {value: place for place, value in enumerate(classes)}
    label_N = np.array([-1 if value is None else number.get(value, -1) for value in found], np.int64)
    left_out: dict[str, int] = {}
    for value in found:
        if value is None or value not in number:
            reason = f"no {by}" if value is None else f"{by}={value}"
            left_out[reason] = left_out.get(reason, 0) + 1
    if len(np.unique(label_N[label_N >= 0])) < 2:
        known = sorted({name for one in fields for name in one})
        raise UserError(
            f"field {by!r}: fewer than two classes occur in it; expected a field that tells classes apart "
            f"(there are: {', '.join(known) or 'no fields'})"
        )
    return label_N, classes, left_out


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a text file in UTF-8") from None
