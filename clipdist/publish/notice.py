"""What has to be said wherever a model's answers are shown: on its card, on a page, by a service."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdist.model.saved import Saved

RESEARCH = (
    "For research. The model's answers can be wrong without looking so, most of all on images and words unlike those "
    "that it was trained on. Measure it on your own data first; let nothing depend on a single answer. It is not a "
    "medical device."
)
MEDICAL = (
    "Not a medical device; for research. The model has been neither approved nor clinically tested: it must not be "
    "used to diagnose, to choose a treatment, or to decide about a patient. Its answers can be wrong without looking "
    "so, and differ in quality between groups of patients, scanners and hospitals."
)
_MEDICAL_WORDS = re.compile(
    r"medic|clinic|patient|hospital|diagnos|disease|patholog|histolog|slide|biops|tumou?r|cancer|carcinoma|melanom|"
    r"na?ev(?:us|i)\b|lesion|derm|skin|isic|radiolog|radiograph|x-?ray|chest|mimic|chexpert|cxr|dicom|tcga|retina|"
    r"fundus|\bct\b|\bmri\b|ultrasound|endoscop|surg",
    re.IGNORECASE,
)


def notice_of(saved: "Saved") -> str:
    """One paragraph of plain text: `notice` in what training wrote down, else the medical notice where the data set's
    name, notes, licence or classes speak of medicine, else that for all research models, which excludes it as well."""
    own = saved.about.get("notice")
    if isinstance(own, str) and own.strip():
        return " ".join(own.split())
    # The folder's own name: those above it are of a machine, not of the data.
    name = PurePosixPath(str(saved.about.get("data", ""))).name
    said = [name, *_strings(saved.about.get("license")), *_strings(saved.about.get("notes"))]
    said += getattr(saved, "names", [])
    return MEDICAL if any(_MEDICAL_WORDS.search(text) for text in said) else RESEARCH


def _strings(value: Any) -> Iterable[str]:
    """Every text in a tree of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
