"""Captions of ISIC 2024's tiles: a sentence for each level of the diagnosis; age, sex, site, size and looks in words.

The diagnosis (`iddx_1` to `iddx_5`) is the label itself: captions state it, as the published description does, so that
a model learns to tell it. Nothing else that only the training table knows, and no other program's opinion, is said:
neither `iddx_full`, `mel_mitotic_index`, `mel_thick_mm`, `lesion_id`, nor `tbp_lv_dnn_lesion_confidence` and
`tbp_lv_nevi_confidence`.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OUTCOMES = {
    "benign": "A benign skin lesion.",
    "malignant": "A malignant skin lesion.",
    "indeterminate": "A skin lesion of indeterminate nature.",
}
DEEPER = ("Category: {}.", "Diagnosis: {}.", "Class: {}.", "Findings: {}.")

# Shares of all tiles below which a word ends. The last is rare on purpose: what is malignant is rare.
GRADES = (0.25, 0.75, 0.97)
GRADED = {
    "tbp_lv_norm_color": ("colour even", "colour slightly uneven", "colour uneven", "colour very uneven"),
    "tbp_lv_norm_border": ("border regular", "border slightly irregular", "border irregular", "border very irregular"),
    "tbp_lv_symm_2axis": ("symmetrical", "nearly symmetrical", "asymmetrical", "very asymmetrical"),
}
# Limits in units of CIELAB, lesion less surrounding skin: a difference of 2 is just noticed (ISO/CIE 11664-4).
DARKNESS = (
    (-20.0, "much darker than the skin around it"),
    (-8.0, "darker than the skin around it"),
    (-2.0, "slightly darker than the skin around it"),
    (2.0, "as light as the skin around it"),
    (np.inf, "paler than the skin around it"),
)
REDDER, BLUER = 5.0, -5.0
# Eccentricity of the fitted ellipse: axes of 1 to 0.8, and of 1 to 0.53.
SHAPES = ((0.6, "round"), (0.85, "oval"), (np.inf, "elongated"))
LOOKS = (
    *GRADED,
    "tbp_lv_L",
    "tbp_lv_Lext",
    "tbp_lv_A",
    "tbp_lv_Aext",
    "tbp_lv_B",
    "tbp_lv_Bext",
    "tbp_lv_eccentricity",
)  # columns that `looks_sentence` reads
PEOPLE = {"female": "a woman", "male": "a man"}


@dataclass(frozen=True)
class Grades:
    """Where the words of each graded column end: for a column, its `GRADES` quantiles."""

    limits: dict[str, tuple[float, ...]]

    @staticmethod
    def of(columns: Mapping[str, np.ndarray]) -> "Grades":
        """From float columns (NaN: not given); those without a value get no words."""
        found = {}
        for name in GRADED:
            values = columns[name][np.isfinite(columns[name])] if name in columns else np.zeros(0)
            if len(values):
                found[name] = tuple(float(value) for value in np.quantile(values, GRADES))
        return Grades(found)

    def word(self, column: str, value: float) -> str:
        """The word of `value`; empty where there is none."""
        if column not in self.limits or not math.isfinite(value):
            return ""
        return GRADED[column][bisect_left(self.limits[column], value)]


def diagnosis_sentences(outcome: str, deeper: Sequence[str | None] = ()) -> str:
    """A sentence for the outcome (a key of `OUTCOMES`) and one for each deeper level that is present."""
    levels = [form.format(level) for form, level in zip(DEEPER, deeper, strict=False) if level]
    return " ".join([OUTCOMES[outcome], *levels])


def person_sentence(size_mm: float | None, site: str | None, sex: str | None, age: float | None) -> str:
    """`A lesion of 3.2 mm on the lower extremity of a woman aged 60.`, without what is not known; empty for nothing."""
    if size_mm is None and site is None and sex not in PEOPLE and age is None:
        return ""
    size = "" if size_mm is None else f" of {size_mm:.1f} mm"
    where = "" if site is None else f" on the {site.replace('/', ' or ')}"
    aged = "" if age is None else f" aged {age:g}"
    who = f" of {PEOPLE.get(sex or '', 'a person')}{aged}" if sex in PEOPLE or aged else ""
    return f"A lesion{size}{where}{who}."


def looks_sentence(values: Mapping[str, float], grades: Grades) -> str:
    """`Darker than the skin around it, colour uneven, border irregular.` out of a tile's `LOOKS`; NaN: not given."""
    inside = {name: values.get(f"tbp_lv_{name}", np.nan) - values.get(f"tbp_lv_{name}ext", np.nan) for name in "LAB"}
    words = [_first_above(DARKNESS, inside["L"])]
    # Comparisons with NaN are false.
    words += ["redder"] * (inside["A"] >= REDDER) + ["bluer"] * (inside["B"] <= BLUER)
    words += [grades.word(column, values.get(column, np.nan)) for column in GRADED]
    words.append(_first_above(SHAPES, values.get("tbp_lv_eccentricity", np.nan)))
    said = ", ".join(word for word in words if word)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _first_above(limits: Sequence[tuple[float, str]], value: float) -> str:
    """The word of the first limit above `value`; empty for NaN."""
    return "" if math.isnan(value) else next(word for limit, word in limits if value < limit or limit == np.inf)
