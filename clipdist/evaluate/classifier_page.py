"""What a report shows of a classifier first: two scores, what they were measured on, and what to know of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipdist.evaluate.examples import Mistake, look_uris, thumbnail_uri
from clipdist.evaluate.subgroups import shown_name

VALIDATION = "the validation that chose the model"
FROM_VALIDATION = (
    "These scores come from the split that chose the model and its temperature: no interval, and too high for images "
    "that it has not seen. An independent one: clipdist eval MODEL --data SET --split test."
)


def is_classified(body: Any) -> bool:
    """Whether this is the JSON of a classifier's scores."""
    return isinstance(body, dict) and isinstance(body.get("classification"), dict)


def bodies(
    evaluations: Sequence[tuple[str, Any]], given: Mapping[str, Any] | None, kept: Any
) -> list[tuple[str, dict[str, Any]]]:
    """(name, scores) of a classifier, the first for the headline: those just `given`, then test splits, then others;
    without any, what the model folder `kept` of the validation that chose it."""
    found = [(name, body) for name, body in evaluations if is_classified(body)]
    found.sort(key=lambda one: one[1].get("split") != "test")
    if given is not None and is_classified(given):
        same = ("data", "data_digest", "split", "model")
        found = [one for one in found if any(one[1].get(key) != given.get(key) for key in same)]
        found.insert(0, ("evaluation", dict(given)))
    validation = kept.get("val") if isinstance(kept, dict) else None
    if not found and is_classified(validation):
        found = [(VALIDATION, validation)]
    return found


def notices(name: str, body: Mapping[str, Any]) -> list[str]:
    """What a reader must know before quoting a number."""
    told = [FROM_VALIDATION] if name == VALIDATION else []
    if unread := body.get("left_out"):
        told.append(f"Images of this split that could not be read, and are in no score: {len(unread):,}.")
    if unknown := body["classification"].get("left_out"):
        told.append(
            f"Images left out, since the model has no such class or they name none: {sum(unknown.values()):,} "
            f"({', '.join(list(unknown)[:5])})."
        )
    return [*told, *leak_notices(body)]


def leak_notices(body: Mapping[str, Any]) -> list[str]:
    """What the evaluation found of its images in the training set, and what it could not compare."""
    leaks = body.get("leaks")
    if not isinstance(leaks, dict):
        return []
    notes, line = leaks.get("notes", []), str(leaks.get("line", ""))
    told = [*notes, *([line[:1].upper() + line[1:] + "."] if line and not notes else [])]
    without = (leaks.get("without") or {}).get("scores", {})
    shown = [name for name in without if name.rpartition("/")[2] in ("R@1", "top-1")]
    values = {shown_name(name): without[name]["without"]["value"] for name in shown}
    scores = [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
    images = int(leaks.get("images", 0))
    return [*told, *([f"Without the {images:,} images that training has seen: {', '.join(scores)}."] if scores else [])]


def cards(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Top-1 and balanced accuracy, and a sentence below them."""
    part = body["classification"]
    classes = [one for one in part["classes"].values() if one["rows"]]
    more = [("top-5", part.get("top-5")), ("AUROC", part.get("auroc"))]
    calibration = body.get("calibration") or {}
    after = calibration.get("scaled", {}).get("ece")
    shown = [
        {
            "label": "Top-1",
            "score": part["top-1"],
            "note": f"of {part['rows']:,} images; always naming the most frequent class: {part['majority']:.3f}",
            "rest": [(label, one) for label, one in more if one],
        },
        {
            "label": "Balanced accuracy",
            "score": part["balanced_accuracy"],
            "note": f"mean recall of {len(classes):,} classes; chance among {len(part['classes']):,} is "
            f"{1 / len(part['classes']):.2g}",
            "rest": [("calibration error", after)] if after else [],
        },
    ]
    measured = f"Measured on {_named(name, body)}"
    measured += f", with the weights of {body['model']}." if body.get("model") else "."
    if part.get("bootstrap"):
        units = f" that resample {part['units']:,} whole units ({body.get('unit')})" if part.get("units") else ""
        measured += f" Ranges are 95 % bootstrap intervals{units}."
    return {"cards": shown, "text": f"{measured} Ties count against the model."}


def _named(name: str, body: Mapping[str, Any]) -> str:
    place = ", ".join(str(part) for part in (body.get("data"), body.get("split")) if part)
    return f"{name} ({place})" if name == VALIDATION and place else place or name


def pictures(mistakes: Sequence[Mistake]) -> list[dict[str, Any]]:
    return [
        {
            "key": one.key,
            "image": thumbnail_uri(one.image, 320),
            "looks": look_uris(one.looks, 160),
            "label": one.label,
            "given": one.given,
            "probability": one.probability,
            "of_the_label": one.of_the_label,
        }
        for one in mistakes
    ]
