"""The measurements after an epoch: loss, retrieval over the whole validation split, and pictures of what is found."""

from typing import Any

import numpy as np
import torch

from clipdist.data.images.pillow import open_image, to_rgb
from clipdist.data.shards import Split
from clipdist.errors import UserError
from clipdist.evaluate.embed import Embeddings
from clipdist.evaluate.examples import Gallery
from clipdist.evaluate.panels import retrieval_panel
from clipdist.evaluate.retrieval import RetrievalScores, retrieval_scores
from clipdist.loss.reference import infonce_reference, sigmoid_reference
from clipdist.train.objective import Validation


def groups_of(embeddings: Embeddings, by: str) -> np.ndarray | None:
    """int64 [N] groups of the images by `data.groups`, or None without groups.

    Raises `UserError` when a sample lacks the field that groups it.
    """
    from clipdist.data.labels import is_absent
    from clipdist.data.rows import text_hash

    if by == "none":
        return None
    if by == "caption":
        texts: list[str] = [""] * len(embeddings.keys)
        for owner, text in zip(embeddings.text_owner_M, embeddings.texts, strict=True):
            texts[owner] += f"{text}\0"
        return np.array([text_hash(text) for text in texts], np.int64)
    lacking = [key for key, fields in zip(embeddings.keys, embeddings.fields, strict=True) if is_absent(fields.get(by))]
    if lacking:  # taken for one group, they would all count as each other's right answers
        known = sorted({name for fields in embeddings.fields for name in fields})
        raise UserError(
            f"groups={by}: {len(lacking)} of {len(embeddings.keys)} samples, such as {lacking[0]}, have no field "
            f"{by!r}; expected caption, none or a field of every sample (there are: {', '.join(known) or 'no fields'})"
        )
    return np.array([text_hash(str(fields[by])) for fields in embeddings.fields], np.int64)


def validate(
    embeddings: Embeddings,
    split: Split,
    *,
    groups: str,
    kind: str,
    scale: float,
    bias: float | None,
    loss_rows: int,
    panels: int,
    max_pixels: int,
) -> Validation:
    """Scores of embedded pairs; one rank calls it.

    `val/loss` is the mean loss over consecutive batches of `loss_rows` pairs, the training batch, in a fixed order
    and without label smoothing: comparable with the training loss and with ln(loss_rows), which a model that has
    learned nothing scores. Retrieval ranks against the whole split.
    """
    group = groups_of(embeddings, groups)
    scores = retrieval_scores(
        embeddings.image_features_ND,
        embeddings.text_features_MD,
        embeddings.text_owner_M,
        group_N=group,
        bootstrap=0,
        texts=embeddings.texts,
    )
    values = {f"val/{key}": float(value) for key, value in scores.flat().items()}
    values["val/mean_R@1"] = (values["val/image_to_text/R@1"] + values["val/text_to_image/R@1"]) / 2
    values["val/loss"] = _loss(embeddings, group, kind, scale, bias, loss_rows)
    shown = {"val/retrieval": _panel(embeddings, scores, split, group, panels, max_pixels)} if panels else {}
    own_MD = embeddings.image_features_ND[embeddings.text_owner_M]
    cosines_M = (own_MD * embeddings.text_features_MD).sum(axis=1)
    return Validation(values, scores.to_dict, {"val/cosines_of_pairs": cosines_M}, shown)


def _loss(
    embeddings: Embeddings, group: np.ndarray | None, kind: str, scale: float, bias: float | None, rows: int
) -> float:
    _, first_caption = np.unique(embeddings.text_owner_M, return_index=True)
    image = torch.from_numpy(embeddings.image_features_ND)
    text = torch.from_numpy(embeddings.text_features_MD[first_caption])
    total, count = 0.0, 0
    for start in range(0, len(image), rows):
        # A short last batch would be an easier one; it counts only when there is no other.
        if start and len(image) - start < rows:
            break
        part = slice(start, start + rows)
        same = None if group is None else torch.from_numpy(group[part])
        s = torch.tensor(scale)
        if kind == "sigmoid":
            loss = sigmoid_reference(image[part], text[part], s, torch.tensor(bias), same)
        else:
            loss = infonce_reference(image[part], text[part], s, same)
        total, count = total + float(loss), count + 1
    return total / max(1, count)


def _panel(
    embeddings: Embeddings,
    scores: RetrievalScores,
    split: Split,
    group: np.ndarray | None,
    images: int,
    max_pixels: int,
) -> np.ndarray:
    shown, _ = Gallery.of(embeddings, scores, split, group).draw(images, captions=1)
    pictures: list[Any] = [np.asarray(to_rgb(open_image(example.image, max_pixels))) for example in shown]
    return retrieval_panel(
        pictures, [" ".join(example.true_texts) for example in shown], [example.ranked for example in shown]
    )
