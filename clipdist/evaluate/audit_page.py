"""An audit as one HTML file to look at: pairs of pictures side by side, those across splits first; the worst pictures;
captions, classes, sizes, tokenizers. Opens without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import clipdist
from clipdist.data.shards import BadSample, write_atomically
from clipdist.evaluate.audit import Audit
from clipdist.evaluate.examples import thumbnail_uri

THUMBNAIL = 220
SHOWN_CLASSES = 40
KINDS = {
    "near": ("Near-duplicates", "Other bytes, the same picture: the score is how well their details correlate."),
    "same": ("Equal bytes", "The same file more than once."),
    "embedding": ("Neighbours in the model's space", "The score is the cosine of their features."),
}
FAULTS = {
    "blank": ("Blank", "grey levels"),
    "blurred": ("Blurred", "blur, 0 to 1"),
    "saturated": ("Saturated", "share of white"),
    "dark": ("Under-exposed", "brightest twentieth, grey level"),
    "tiny": ("Tiny", "shorter side, pixels"),
    "long": ("Long", "longer by shorter side"),
}


def write_page(audit: Audit, path: Path, shown: int = 24) -> Path:
    """Writes the page and returns its path; of each kind of finding `shown` are drawn. Raises `OSError`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"count": lambda value: f"{value:,}", "share": lambda value: f"{value:.1%}"}
    body = audit.body
    classes = list(body["classes"]["counts"].items())
    page = environment.get_template("audit.html.j2").render(
        body=body,
        leaks=audit.leaks,
        verdict=_verdict(body["leaks"]),
        pairs=[one for one in _pair_sections(audit, shown) if one["shown"]],
        faults=[one for one in _fault_sections(audit, shown) if one["count"]],
        classes=classes[:SHOWN_CLASSES],
        more_classes=body["classes"]["classes"] - len(classes[:SHOWN_CLASSES]),
        largest=max((max(counts.values()) for _, counts in classes), default=1),
        tokenizers=body.get("tokenizers", []),
        version=clipdist.__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def _verdict(leaks: dict[str, Any]) -> str:
    kinds = {
        "units": ("unit", ""),
        "same": ("picture", " of equal bytes"),
        "near": ("pair", " of near-duplicates"),
        "embedding": ("pair", " of neighbours by cosine"),
    }
    counts = [(leaks[kind]["straddling"], *words) for kind, words in kinds.items() if kind in leaks]
    return ", ".join(f"{count:,} {one}{'' if count == 1 else 's'}{of}" for count, one, of in counts if count)


def _pair_sections(audit: Audit, shown: int) -> Iterator[dict[str, Any]]:
    """First what lies in several splits, of every kind, then what one split holds twice."""
    for straddles in (True, False):
        for kind, (title, what) in KINDS.items():
            found = audit.body["leaks"].get(kind, {"listed": [], "straddling": 0})
            listed = [one for one in found["listed"] if one["straddles"] == straddles][:shown]
            total = found["straddling"]
            if not straddles:
                total = found.get("pairs", found.get("groups", 0)) - found["straddling"]
            yield {
                "title": f"{title} across splits" if straddles else f"{title} within a split",
                "what": what,
                "leak": straddles,
                "total": total,
                "shown": [_drawn(audit, one) for one in listed],
            }


def _drawn(audit: Audit, one: dict[str, Any]) -> dict[str, Any]:
    pictures = [_picture(audit, place) for place in one["pictures"][:4]]
    return {"score": one.get("score"), "times": one.get("times", 2), "pictures": pictures}


def _fault_sections(audit: Audit, shown: int) -> Iterator[dict[str, Any]]:
    for fault, (title, unit) in FAULTS.items():
        found = audit.body["quality"][fault]
        pictures = [_picture(audit, place) | {"value": place["value"]} for place in found["listed"][:shown]]
        splits = ", ".join(f"{name} {count:,}" for name, count in found["splits"].items() if count)
        yield {
            "title": title,
            "unit": unit,
            "limit": found["limit"],
            "count": found["count"],
            "splits": splits,
            "shown": pictures,
        }


def _picture(audit: Audit, place: dict[str, Any]) -> dict[str, Any]:
    """A thumbnail with split, key, size and the first caption; no thumbnail where it cannot be read any more."""
    sample = audit.survey.samples[place["row"]]
    size = f"{sample['width']} × {sample['height']}"
    try:
        raw = audit.survey.rows.read(place["row"])
    except BadSample:
        return place | {"uri": None, "text": "", "size": size}
    return place | {"uri": thumbnail_uri(raw.image, THUMBNAIL), "text": next(iter(raw.texts), ""), "size": size}
