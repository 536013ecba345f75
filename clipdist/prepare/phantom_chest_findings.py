"""Invented patients: a chest, and what a study of it shows."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SIDES = ("right", "left", "bilateral")
ZONES = ("upper", "mid", "lower")
SIZES = ("small", "moderate", "large")
GRADES = ("mild", "moderate", "severe")
DEVICES = ("pacemaker", "tube", "line", "wires")
# What can be drawn -> how often a study that shows anything shows it.
ODDS = {
    "Pleural Effusion": 0.20,
    "Cardiomegaly": 0.18,
    "Atelectasis": 0.14,
    "Pneumonia": 0.13,
    "Edema": 0.12,
    "Support Devices": 0.12,
    "Lung Lesion": 0.09,
    "Pneumothorax": 0.09,
    "Fracture": 0.08,
    "Consolidation": 0.07,
    "Enlarged Cardiomediastinum": 0.05,
}
NORMAL, DOUBTFUL, STAYS = 0.28, 0.10, 0.6
"""Shares: of studies without findings, of findings that are doubtful, of findings that are there in the next study."""


@dataclass(frozen=True)
class Anatomy:
    """Factors about 1 of a patient's chest, the phase of the vertebrae, and the seed of the vessels."""

    width: float
    height: float
    heart: float
    zoom: float
    phase: float
    vessels: int


@dataclass(frozen=True)
class Finding:
    """One finding. A doubtful one (`certain` False) is faint, or not there at all (`visible` False). What does not
    apply to its label has a value all the same, which nothing reads."""

    label: str
    certain: bool
    visible: bool
    side: str
    zone: str
    size: str
    grade: str
    centimetres: float
    rib: int
    place: float
    device: str


@dataclass(frozen=True)
class Study:
    """A chest on one day. `view` is that of its frontal picture; `lateral` whether there is another one."""

    anatomy: Anatomy
    findings: tuple[Finding, ...] = ()
    view: str = "PA"
    lateral: bool = False
    first: bool = field(default=True)

    def finding(self, label: str) -> Finding | None:
        """The finding of this label that can be seen, if any."""
        return next((one for one in self.shown() if one.label == label), None)

    def shown(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.visible)

    @property
    def views(self) -> tuple[str, ...]:
        return (self.view, "LATERAL") if self.lateral else (self.view,)


def invent_anatomy(rng: np.random.Generator) -> Anatomy:
    width, height, heart, zoom = np.clip(rng.normal(1, (0.05, 0.05, 0.06, 0.03)), 0.88, 1.12).tolist()
    return Anatomy(width, height, heart, 1.1 * zoom, rng.uniform(0, 6.3), int(rng.integers(1 << 31)))


def invent_finding(label: str, rng: np.random.Generator, *, doubtful: float = DOUBTFUL) -> Finding:
    """A finding of this label; `doubtful` is the chance that it is."""
    both = 0.0 if label in ("Fracture", "Pneumothorax", "Lung Lesion") else 0.2
    certain = bool(rng.random() >= doubtful)
    return Finding(
        label=label,
        certain=certain,
        visible=certain or bool(rng.random() < 0.5),
        side=_one(rng, SIDES, ((1 - both) / 2, (1 - both) / 2, both)),
        zone=_one(rng, ZONES),
        size=_one(rng, SIZES, (0.4, 0.35, 0.25)),
        grade=_one(rng, GRADES),
        centimetres=round(float(rng.uniform(0.8, 3.2)), 1),
        rib=int(rng.integers(3, 8)),
        place=float(rng.uniform(0.42, 0.6)),
        device=_one(rng, DEVICES),
    )


def invent_studies(rng: np.random.Generator) -> list[Study]:
    """One to four studies of one patient; what one shows may still be there in the next."""
    anatomy = invent_anatomy(rng)
    studies: list[Study] = []
    for number in range(1 + int(rng.choice(4, p=(0.4, 0.3, 0.2, 0.1)))):
        kept = [one for one in (studies[-1].findings if studies else ()) if rng.random() < STAYS]
        new = invent_findings(rng) if not kept or rng.random() < 0.5 else ()
        findings = {one.label: one for one in (*new, *kept)}
        if "Pneumonia" in findings and "Consolidation" in findings:
            del findings["Consolidation"]
        view = "PA" if rng.random() < 0.5 else "AP"
        lateral = bool(rng.random() < (0.8 if view == "PA" else 0.05))
        ordered = tuple(findings[label] for label in ODDS if label in findings)
        studies.append(Study(anatomy, ordered, view, lateral, first=number == 0))
    return studies


def invent_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """None, or one to three of different labels."""
    if rng.random() < NORMAL:
        return ()
    odds = np.array(list(ODDS.values()))
    count = 1 + int(rng.choice(3, p=(0.5, 0.35, 0.15)))
    labels = rng.choice(list(ODDS), size=count, replace=False, p=odds / odds.sum()).tolist()
    return tuple(invent_finding(label, rng) for label in labels)


def study_with(label: str, rng: np.random.Generator) -> Study:
    """A frontal study of a patient of its own that shows this finding, without a doubt, and no other; nothing at all
    for `No Finding`."""
    findings = () if label == "No Finding" else (invent_finding(label, rng, doubtful=0.0),)
    return Study(invent_anatomy(rng), findings, "PA" if rng.random() < 0.5 else "AP")


def _one(rng: np.random.Generator, values: tuple[str, ...], odds: Any = None) -> str:
    return values[int(rng.choice(len(values), p=odds))]
