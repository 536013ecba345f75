"""The model card of an exported model: what it is, how to load it, what it reached on which data, and what it is not
for."""

import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import yaml

from clipdist.errors import UserError
from clipdist.model.saved import Saved, SavedModel
from clipdist.model.saved_classifier import SavedClassifier
from clipdist.publish.notice import notice_of

LIBRARIES = {"huggingface": "transformers", "open_clip": "open_clip", "onnx": "onnx", "safetensors": "timm"}
RESIZING = {
    "crop": "its middle is cut out",
    "squash": "it is distorted to a square",
    "pad": "it is filled up with white to a square",
}
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_KINDS = {*DIRECTIONS, "classification"}
CLASSIFICATION = ("top-1", "top-5", "balanced_accuracy", "auroc")


@dataclass(frozen=True)
class Said:
    """What the user adds to a card."""

    notice: str = ""
    """Stands in the place of what `notice_of` says."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """What `clipdist eval` wrote."""


def read_evaluations(paths: Sequence[Path], model: Path, digest: str | None = None) -> list[dict[str, Any]]:
    """The JSON of `clipdist eval`; `digest` is that of the model's weights. Raises `UserError` for other files, and for
    scores of another model."""
    found = []
    for path in paths:
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--scores {path}: cannot be read ({error}); expected JSON of clipdist eval") from None
        if not (isinstance(body, dict) and "split" in body and _KINDS & body.keys()):
            raise UserError(f"--scores {path}: found no scores of a split, expected JSON of clipdist eval")
        if digest is not None and body.get("model_digest", digest) != digest:
            raise UserError(
                f"--scores {path}: they are scores of a model of digest {body['model_digest']}, expected those of "
                f"{model}, {digest}"
            )
        scored = Path(str(body.get("model", model)))
        if scored.exists() and scored.resolve() != model.resolve():
            raise UserError(f"--scores {path}: they are scores of {scored}, expected those of {model}")
        found.append(body)
    return found


def model_card(saved: Saved, to: str, usage: str, report: Mapping[str, Any], said: Said | None = None) -> str:
    """Markdown with a YAML front matter, as model hubs read it."""
    said = said or Said()
    template = importlib.resources.files("clipdist.publish").joinpath("model_card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    about, tower = saved.about, saved.model.image
    data = _name(about.get("data"))
    encoder = isinstance(saved, SavedModel)
    return environment.from_string(template).render(
        front=yaml.safe_dump(_front_matter(saved, to, report), sort_keys=False, allow_unicode=True).strip(),
        title=f"{'A dual encoder' if encoder else 'A classifier'}{f' trained on {data}' if data else ''}",
        notice=" ".join(said.notice.split()) or notice_of(saved),
        usage=usage,
        encoder=encoder,
        image=saved.model.config.image.name,
        text=_tower(saved.model.config.text.name) if encoder else "",
        text_type=saved.model.text.hf_config.model_type if isinstance(saved, SavedModel) else "",
        max_tokens=saved.model.config.text.max_tokens,
        width=saved.width,  # type: ignore[attr-defined]
        classes=saved.names if isinstance(saved, SavedClassifier) else [],
        temperature=saved.temperature,  # type: ignore[attr-defined]
        about=about,
        data=data,
        notes=json.dumps(about["notes"], ensure_ascii=False) if about.get("notes") else "",
        license=_plain(about.get("license")),
        rows=list(score_rows(saved, said.evaluations)),
        side=tower.side,
        resizing=RESIZING[tower.resize],
        mean=[round(value, 4) for value in tower.mean],
        std=[round(value, 4) for value in tower.std],
        report=report,
        digest=saved.digest,
    )


def _tower(name: str) -> str:
    """`hf:/a/folder/of/bert` -> `hf:bert`; names of hubs and packages as they are."""
    kind, _, place = name.partition(":")
    return f"{kind}:{PurePosixPath(place).name}" if kind == "hf" and place.startswith(("/", ".", "~")) else name


def _name(place: Any) -> str:
    """Of a data set, without the folders above it, which are of a machine."""
    return _plain(PurePosixPath(str(place or "")).name)


def _plain(value: Any) -> str:
    """One line that is no Markdown table's end."""
    return " ".join(str(value or "").split()).replace("|", "\\|")


def _front_matter(saved: Saved, to: str, report: Mapping[str, Any]) -> dict[str, Any]:
    encoder = isinstance(saved, SavedModel)
    task = "zero-shot-image-classification" if encoder else "image-classification"
    library = LIBRARIES[to]
    if report.get("tower"):
        task = "image-feature-extraction" if report["tower"] == "image" else "feature-extraction"
        library = "timm" if report["tower"] == "image" else "transformers"
    elif not encoder and to == "huggingface":
        library = "timm"  # transformers reads it as well
    return {
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["clipdist", *(["clip"] if encoder else [])],
        "license": "other",
        "license_name": "not-stated",
    }


def score_rows(saved: Saved, evaluations: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, str]]:
    """Of each evaluation, and each split in the model's scores: what was measured, its value and interval, chance, and
    among how many."""
    parts = [(f"{_name(one.get('data'))} {one['split']}".strip(), one) for one in evaluations]
    evaluated = {split for split, _ in parts}
    for part, found in saved.scores.items():
        if isinstance(found, dict):
            split = saved.about.get("val_split", part) if part == "val" else part
            name = f"{_name(saved.about.get('data'))} {split}".strip()
            parts += [(name, found)] if name not in evaluated else []  # measured anew, with intervals
    for split, found in parts:
        for direction, name in DIRECTIONS.items():
            measured = found.get(direction)
            if isinstance(measured, dict):
                among = f"gallery {measured['gallery']}, {measured['queries']} queries"
                for score in (key for key in measured if key.startswith("R@")):
                    yield _row(split, f"{name} {score}", measured[score], among)
        classified = found.get("classification")
        if isinstance(classified, dict):
            among = f"{classified['rows']} images, {len(classified['classes'])} classes"
            for score in (key for key in CLASSIFICATION if isinstance(classified.get(key), dict)):
                majority = {"chance": classified.get("majority")} if score == "top-1" else {}
                yield _row(split, score.replace("_", " "), {**classified[score], **majority}, among)


def _row(split: str, what: str, score: Mapping[str, Any], among: str) -> dict[str, str]:
    low, high, chance = score.get("low"), score.get("high"), score.get("chance")
    return {
        "split": split,
        "what": what,
        "value": _number(score["value"]),
        "interval": "not measured" if low is None or high is None else f"{_number(low)} – {_number(high)}",
        "chance": "" if chance is None else _number(chance),
        "among": among,
    }


def _number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.3f}"
