"""From the command's arguments to a service that is ready to answer."""

import argparse
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from clipdist.errors import UserError
from clipdist.evaluate.zero_shot import read_classes, read_templates
from clipdist.model.saved import SavedModel, load
from clipdist.publish.notice import notice_of
from clipdist.publish.serve.engine import Engine
from clipdist.publish.serve.gallery import Gallery, open_gallery
from clipdist.publish.serve.limits import Limits
from clipdist.publish.serve.service import Service

logger = logging.getLogger(__name__)

MOST_WAIT_MS = 60_000
MOST_CAPTIONS = 20_000
"""Of a gallery's own texts, which are embedded when the service starts."""

SCORES = {
    ("image_to_text", "R@1"): "R@1 image → text",
    ("image_to_text", "R@5"): "R@5 image → text",
    ("text_to_image", "R@1"): "R@1 text → image",
    ("text_to_image", "R@5"): "R@5 text → image",
    ("zero_shot", "top-1"): "zero-shot top-1",
    ("zero_shot", "balanced_accuracy"): "zero-shot balanced accuracy",
    ("zero_shot", "auroc"): "zero-shot AUROC",
    ("classification", "top-1"): "top-1",
    ("classification", "balanced_accuracy"): "balanced accuracy",
    ("classification", "auroc"): "AUROC",
}


@dataclass(frozen=True)
class Calibration:
    """What `clipdist eval --zero-shot FIELD --calibrate SPLIT` wrote down."""

    temperature: float
    fitted_on: str
    prompts: list[list[str]]
    templates: list[str]
    body: Mapping[str, Any] = field(repr=False)


def prepare(args: argparse.Namespace, limits: Limits) -> Service:
    """Loads all that was asked for, and sends one blank image through the model. Raises `UserError`."""
    for name in ("max_batch", "decoders", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected 1 or more")
    if not 0 <= args.max_wait_ms <= MOST_WAIT_MS:
        raise UserError(f"--max-wait-ms: found {args.max_wait_ms}, expected 0 to {MOST_WAIT_MS:,}")
    named = read_classes(args.classes) if args.classes else {}
    templates = read_templates(args.templates) if args.templates else []
    captions = read_captions(args.captions) if args.captions else []
    saved = load(args.model, args.device)
    calibration = read_calibration(args.calibration, saved) if args.calibration else None
    if calibration is not None:
        if named and list(named.values()) != calibration.prompts:
            raise UserError(
                f"--calibration {args.calibration}: its temperature was fitted on other classes than those of "
                f"{args.classes}; leave --classes away, or evaluate again with them"
            )
        if templates and templates != calibration.templates:
            raise UserError(
                f"--calibration {args.calibration}: its temperature was fitted with other templates than those of "
                f"{args.templates}; leave --templates away, or evaluate again with them"
            )
        named = named or {some[0]: some for some in calibration.prompts}
        templates = templates or calibration.templates
    gallery = open_gallery(args.gallery, saved) if args.gallery else None
    if gallery is not None and not captions and isinstance(saved, SavedModel):
        captions = captions_of(gallery)
    engine = Engine(
        saved,
        prompts=list(named.values()),
        templates=templates,
        temperature=calibration.temperature if calibration else args.temperature,
        captions=captions,
        gallery=gallery,
    )
    if isinstance(saved, SavedModel):
        classes = [(value, names[0]) for value, names in named.items()]
        fitted_on = calibration.fitted_on if calibration else None
    else:
        classes = [(name, name) for name in saved.names]
        fitted_on = saved.fitted_on if args.temperature is None and not saved.at_bound else None
    about = {
        "name": args.name or name_of(args.model),
        "calibrated_on": fitted_on,
        "scores": scores_of(calibration.body if calibration else saved.scores.get("val", {})),
        "notice": args.notice or notice_of(saved),
    }
    service = Service(
        engine,
        limits,
        about=about,
        classes=classes,
        max_batch=args.max_batch,
        max_wait_seconds=args.max_wait_ms / 1000,
        threads=args.threads or len(os.sched_getaffinity(0)),
        decoders=args.decoders,
    )
    blank = torch.zeros(1, 3, engine.side, engine.side, dtype=torch.uint8, device=saved.device)
    with torch.inference_mode():
        saved.model.encode_image(blank)
    return service


def name_of(model: Path) -> str:
    """The run's name, or the folder's; never a path."""
    folder = model.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def read_captions(path: Path) -> list[str]:
    """One a line, each once; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a text file in UTF-8") from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise UserError(f"{path}: no caption; expected one a line")
    return found


def captions_of(gallery: Gallery) -> list[str]:
    """The gallery's distinct texts; none, and a warning, where they are more than can be embedded at the start."""
    found: dict[str, None] = {}
    for row in range(gallery.rows):
        found |= dict.fromkeys(gallery.record(row)["texts"])
        if len(found) > MOST_CAPTIONS:
            logger.warning(
                "no captions are ranked: the gallery has more than %s different texts; name some with --captions FILE",
                f"{MOST_CAPTIONS:,}",
            )
            return []
    return list(found)


def read_calibration(path: Path, saved: Any) -> Calibration:
    """Raises `UserError` for a file without a calibration, of another model, or whose fit found no temperature."""
    if not isinstance(saved, SavedModel):
        raise UserError("--calibration: found a classifier, whose temperature came with it; leave the option away")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        part, of = body["calibration"], body["zero_shot"]
        temperature, scale = float(part["temperature"]), float(of["scale"])
        prompts = TypeAdapter(list[list[str]]).validate_python(of["prompts"])
        found = Calibration(temperature, str(part["fitted_on"]), prompts, list(of["templates"]), body)
        at_bound = bool(part["at_bound"])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no calibration in it ({type(error).__name__}: {error}); expected what "
            f"clipdist eval --zero-shot FIELD --calibrate SPLIT writes"
        ) from None
    if (of_model := body.get("model_digest", saved.digest)) != saved.digest:
        raise UserError(
            f"{path}: it was measured on the model of digest {of_model}, and this one has {saved.digest}; expected an "
            f"evaluation of this model"
        )
    if not math.isclose(scale * saved.temperature, 1, rel_tol=1e-3):
        raise UserError(
            f"{path}: it was measured at a temperature of {1 / scale:.4g}, and this model has {saved.temperature:.4g}; "
            f"expected an evaluation of this model"
        )
    if at_bound:
        raise UserError(f"{path}: no temperature could be fitted there; expected a calibration on more or other images")
    return found


def scores_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is known of the model, for the page: title, value and interval, and the gallery of a rank."""
    split = f", {body['split']}" if body.get("split") else ""
    found = []
    for (part, name), title in SCORES.items():
        scores = body.get(part) or (body if part == "classification" else {})
        one = scores.get(name)
        if isinstance(one, Mapping) and one.get("value") is not None:
            interval: Sequence[Any] = (one.get("low"), one.get("high"))
            found.append(
                {
                    "title": title + split,
                    "value": one["value"],
                    "low": interval[0],
                    "high": interval[1],
                    "gallery": scores.get("gallery"),
                }
            )
    return found
