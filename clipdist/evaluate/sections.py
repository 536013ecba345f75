"""What a report shows of an evaluation beside recall: sections of sentences, tables and figures, from its JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipdist.evaluate import plots, score_plots
from clipdist.evaluate.calibration import at_bound
from clipdist.evaluate.subgroups import LEADING, shown_name

# kind in the names of files: (title, draw(evaluation, form=...) -> bytes | None)
FIGURES: dict[str, tuple[str, Callable[..., bytes | None]]] = {
    "recall": ("Recall", plots.recall_bars),
    "cosines": ("Cosines of all pairs", plots.cosine_histogram),
    "confusion": ("What each class was taken for", score_plots.confusion),
    "reliability": ("Accuracy and confidence", score_plots.reliability),
    "probes": ("Probes", score_plots.probes),
    "queries": ("Precision of queries", score_plots.queries),
    "subgroups": ("Subgroups", score_plots.subgroups),
}
_MOST_ROWS = 60
_MOST_NAMED = 30


@dataclass(frozen=True)
class Section:
    """`rows` of cells: text, or an estimate as a mapping with value, low and high. `figures` names `FIGURES`."""

    title: str
    text: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figures: Sequence[str] = ()


def sections(body: Mapping[str, Any]) -> Iterator[Section]:
    """The parts that an evaluation has, in the order in which they are shown.

    Raises KeyError, TypeError and the like for JSON that `clipdist eval` has not written.
    """
    if "image_to_text" in body and "text_to_image" in body:
        yield from _several(body)
    for name, make in _PARTS.items():
        part = body.get(name)
        if part:
            yield from make(part)


def _several(body: Mapping[str, Any]) -> Iterator[Section]:
    """Precision, for queries that have several right answers; `body` is that of both directions."""
    rows, ks = [], [name for name in body["image_to_text"] if name.startswith("P@")]
    for way, label in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
        one = body[way]
        if one.get("mAP") and (one.get("positives") or 0) > 1:
            rows.append([label, f"{one['positives']:,.1f}", f"{one['gallery']:,}", one["mAP"], *(one[k] for k in ks)])
    if rows:
        yield Section(
            "Several right answers",
            "Mean average precision and Precision@k over the full gallery: how many of the right answers come first.",
            ["", "Right answers", "Gallery", "mAP", *ks],
            rows,
        )


def _in_batch(part: Mapping[str, Any]) -> Iterator[Section]:
    k = part["batch"]
    names = [name for name in part["image_to_text"] if name.startswith("R@")]
    rows = [
        [label, f"{part['queries']:,}", f"{k:,}", *(part[way][name] for name in names), part["loss"]]
        for way, label in (("image_to_text", "image → text"), ("text_to_image", "text → image"))
    ]
    rows.append(["by chance", "", "", *(f"{part['image_to_text'][name]['chance']:.2g}" for name in names), ""])
    yield Section(
        f"In batches of {k}",
        f"Each pair against the {k} of its batch, over {part['batches']:,} shuffled batches. A gallery of {k} is "
        f"easier than the full one: compare with scores of the same {k} alone. A model that knows nothing has the loss "
        f"ln {k} = {part['unknowing_loss']:.4f}.",
        ["", "Queries", "Gallery", *names, "Loss"],
        rows,
    )


def _pool(part: Mapping[str, Any]) -> Iterator[Section]:
    names = [name for name in part if name.startswith("top-")]
    k = part["pool"]
    yield Section(
        f"One image against {k} captions",
        f"Its own caption and {k - 1} others of another text and group, drawn {part['repeats']} times.",
        ["", "Queries", "Gallery", *names],
        [
            ["image → text", f"{part['queries']:,}", f"{k:,}", *(part[name] for name in names)],
            ["by chance", "", "", *(f"{part[name]['chance']:.2g}" for name in names)],
        ],
    )


def _zero_shot(part: Mapping[str, Any]) -> Iterator[Section]:
    text = (
        f"Classes of the field {part['field']}, named in {len(part['templates'])} prompts such as "
        f"“{part['templates'][0].replace('{}', part['prompts'][0][0])}”. Always naming the most frequent class would "
        f"be right for {part['majority']:.3f}. {_absent(part)}{_left_out(part)}"
    )
    yield from _classes(part, "Zero-shot classification", text)


def _classification(part: Mapping[str, Any]) -> Iterator[Section]:
    number = len(part["classes"])
    few = len(part.get("confusion", {}).get("classes", ())) > score_plots.MOST_CLASSES
    text = (
        f"{number:,} classes of the field {part['field']}. Always naming the most frequent class would be right for "
        f"{part['majority']:.3f}. {_absent(part)}{_left_out(part)}"
    )
    text += f" The figure has the {score_plots.FEW_CLASSES} classes that are confused most." if few else ""
    yield from _classes(part, "Classification", text)
    confused = [
        [one["class"], one["taken_for"], f"{one['rows']:,}", f"{one['of']:,}", f"{one['rows'] / one['of']:.3f}"]
        for one in part["confused"]
    ]
    if confused:
        head = ["Class", "Taken for", "Images", "of", "Share"]
        yield Section("Classes confused most", "By the number of images.", head, confused)


def _classes(part: Mapping[str, Any], title: str, text: str) -> Iterator[Section]:
    titles = {"top-1": "Top-1", "top-5": "Top-5", "balanced_accuracy": "Balanced accuracy", "auroc": "AUROC"}
    names = [name for name in titles if name in part]
    head = ["", "Images", *(titles[name] for name in names)]
    rows: list[list[Any]] = [["all", f"{part['rows']:,}", *(part[name] for name in names)]]
    yield Section(title, text, head, rows, ["confusion"])
    each = [
        [name, f"{one['rows']:,}", one["recall"], one.get("auroc", "–")]
        for name, one in part["classes"].items()
        if one["rows"]
    ]
    more = f"The first {_MOST_ROWS} of {len(each)} classes; all are in the JSON." if len(each) > _MOST_ROWS else ""
    yield Section("Each class", more, ["Class", "Images", "Recall", "AUROC"], each[:_MOST_ROWS])


def _calibration(part: Mapping[str, Any]) -> Iterator[Section]:
    rows = [
        [label, f"{part[key]['rows']:,}", *(part[key][name] for name in ("ece", "nll", "brier"))]
        for key, label in (("as_trained", "as trained"), ("scaled", f"divided by {part['divided_by']:.3g}"))
    ]
    split = part["fitted_on"]
    fitted = f"the temperature was fitted on the split {split}" if split else "no temperature was fitted"
    yield Section(
        "Calibration",
        f"Are probabilities right as often as they say: {fitted}. "
        "ECE (15 bins) is too high on average in small sets; its interval leans upwards."
        + (f" Here {at_bound(part['divided_by'])}." if part["at_bound"] else ""),
        ["Probabilities", "Images", "ECE", "NLL", "Brier"],
        rows,
        ["reliability"],
    )


def _probe(part: Mapping[str, Any]) -> Iterator[Section]:
    kinds = {"linear": "linear probe", "knn": "nearest neighbours"}
    rows = [
        [f"{kinds[one['kind']]}, {one['fraction']:.3g} of the labels", f"{one['rows']:,}", one["score"]]
        for one in part["scores"]
    ]
    metric = part["metric"]
    source = "the image tower's features" if part["features"] == "tower" else "the joint embedding"
    yield Section(
        "Probes",
        f"{metric[0].upper()}{metric[1:]} of {', '.join(part['fields'])} from {source}, fitted on the split "
        f"{part['fitted_on']}; regularisation was chosen on rows held out of that. {_left_out(part)}",
        ["", "Training images", part["metric"]],
        rows,
        ["probes"],
    )
    most = max(one["fraction"] for one in part["scores"])
    labels = [one.get("labels") for one in part["scores"] if one["fraction"] == most]
    if all(labels):
        each = [[name, *(one.get(name, "–") for one in labels)] for name in labels[0]]
        yield Section("Each label", f"AUROC at {most:.3g} of the labels.", ["Label", *kinds.values()], each)


def _queries(part: Mapping[str, Any]) -> Iterator[Section]:
    names = [name for name in part if name.startswith("P@")]
    rows: list[list[Any]] = [["all", f"{part['queries']:,}", "", *(part[name] for name in names)]]
    rows.append(["by chance", "", "", *(f"{part[name]['chance']:.3f}" for name in names)])
    for name, one in part["classes"].items():
        rows.append([name, f"{one['queries']:,}", f"{one['right']:,}", *(one[key] for key in names)])
    shared = part.get("queries_among_candidates")
    yield Section(
        f"Queries against {part['gallery']:,} candidates, {part['kind'].replace('-', ' → ')}",
        "Precision@k: the share of the first k that have the query's class."
        + (f" {shared:,} images are both query and candidate, and find themselves." if shared else ""),
        ["Class", "Queries", "Right candidates", *names],
        rows,
        ["queries"],
    )


def _subgroups(part: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    for place, one in enumerate(part):
        names = [name for name in one["overall"] if name.rpartition("/")[2] in LEADING]
        rows: list[list[Any]] = [["all", f"{one['images']:,}", "", *(one["overall"][name] for name in names)]]
        for value in one["values"]:
            cells = [{**value["scores"][name], "mark": "*" if name in value["flagged"] else ""} for name in names]
            rows.append([value["value"], f"{value['images']:,}", f"{value['units']:,}", *cells])
        figure = "" if place else " In the figure a filled dot marks such a gap, the dotted line is the score of all."
        few = "".join(f" {name}: {count} images, too few to score." for name, count in one["few"].items())
        text = f"The gallery and the classes stay whole. {one['note']}.{few}{figure}"

        head = [one["field"], "Images", "Units", *map(shown_name, names)]
        yield Section(f"By {one['field']}", text, head, rows, ["subgroups"] if not place else [])


def _absent(part: Mapping[str, Any]) -> str:
    names = part["absent"]
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return f"Without an image, and so in no mean: {', '.join(names[:_MOST_NAMED])}{more}. " if names else ""


def _left_out(part: Mapping[str, Any]) -> str:
    counts = part.get("left_out") or {}
    return f"Left out, without a class of these: {sum(counts.values()):,} images." if counts else ""


_PARTS: dict[str, Callable[..., Iterator[Section]]] = {
    "in_batch": _in_batch,
    "pool": _pool,
    "zero_shot": _zero_shot,
    "classification": _classification,
    "calibration": _calibration,
    "probe": _probe,
    "query_candidates": _queries,
    "subgroups": _subgroups,
}
