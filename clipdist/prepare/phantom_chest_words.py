"""Reports on invented chests in the manner of MIMIC-CXR's, and the labels that CheXpert's labeller would give them."""

import textwrap
from collections.abc import Sequence

import numpy as np

from clipdist.prepare.phantom_chest_findings import Finding, Study, invent_finding

ORGANS = (
    ("Cardiomegaly", "Enlarged Cardiomediastinum"),
    ("Pneumonia", "Consolidation", "Edema", "Atelectasis", "Lung Lesion"),
    ("Pleural Effusion", "Pneumothorax"),
    ("Fracture",),
    ("Support Devices",),
)
"""In the order in which reports speak of them."""
_PRESENT: dict[str, tuple[str, ...]] = {
    "Pleural Effusion": (
        "There is a {size} {side} pleural effusion.",
        "{Size} {side} pleural effusion is present.",
        "Blunting of the {side} costophrenic angle represents a {size} pleural effusion.",
    ),
    "Cardiomegaly": (
        "The heart is {gradely} enlarged.",
        "The cardiac silhouette is {gradely} enlarged.",
        "{Grade} cardiomegaly is present.",
    ),
    "Enlarged Cardiomediastinum": (
        "The mediastinum is widened.",
        "The upper mediastinal contours are abnormally wide.",
    ),
    "Edema": (
        "{Grade} pulmonary edema is present.",
        "There is {grade} interstitial pulmonary edema.",
        "Hazy perihilar opacities represent {grade} pulmonary edema.",
    ),
    "Pneumonia": (
        "Patchy opacity in the {side} {zone} lung represents pneumonia.",
        "There is pneumonia in the {side} {zone} lung.",
        "A fluffy {side} {zone} lung opacity is consistent with pneumonia.",
    ),
    "Consolidation": (
        "There is a dense consolidation in the {side} {zone} lung.",
        "Consolidation with air bronchograms is seen in the {side} {zone} lung.",
    ),
    "Atelectasis": (
        "There is plate-like atelectasis at the {side} lung base.",
        "Linear opacities at the {side} base represent atelectasis.",
        "{Side} basilar atelectasis with volume loss is seen.",
    ),
    "Pneumothorax": (
        "There is a {size} {side} apical pneumothorax.",
        "A {size} {side} pneumothorax is seen.",
        "A {side} pleural line indicates a {size} pneumothorax.",
    ),
    "Lung Lesion": (
        "A {cm} cm nodule is seen in the {side} {zone} lung.",
        "There is a {cm} cm rounded nodule in the {side} {zone} lung.",
    ),
    "Fracture": (
        "There are displaced fractures of the {side} {ribs} ribs.",
        "Displaced {side} rib fractures are seen.",
    ),
}
_DEVICES = {
    "pacemaker": ("A left-sided pacemaker is in place with leads in the right ventricle.",
                  "Left pectoral pacemaker with its leads in standard position."),
    "tube": ("The endotracheal tube ends {cm} cm above the carina.", "An endotracheal tube is in place."),
    "line": ("A right-sided central venous line ends in the lower SVC.",
             "Right subclavian catheter terminates in the superior vena cava."),
    "wires": ("Median sternotomy wires are intact.", "The patient is status post median sternotomy."),
}  # fmt: skip
_DOUBTED: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": ("The heart may be mildly enlarged.",),
    "Enlarged Cardiomediastinum": ("The mediastinum may be widened, which could be due to position.",),
    "Edema": ("Mild pulmonary edema cannot be excluded.",),
    "Pneumonia": ("A faint {side} {zone} lung opacity could represent pneumonia.",),
    "Consolidation": ("A developing consolidation in the {side} {zone} lung is possible.",),
    "Fracture": ("A {side} rib fracture is possible.",),
}
_DOUBT = "A {side} {what} cannot be excluded."
_ABSENT: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": ("The heart is normal in size.", "The cardiac silhouette is not enlarged."),
    "Enlarged Cardiomediastinum": ("The mediastinal contours are normal.",),
    "Pleural Effusion": ("No pleural effusion is seen.", "There is no pleural effusion."),
    "Pneumothorax": ("No pneumothorax.", "There is no pneumothorax."),
    "Pneumonia": ("There is no evidence of pneumonia.",),
    "Consolidation": ("No focal consolidation is seen.",),
    "Edema": ("There is no pulmonary edema.", "No pulmonary vascular congestion or edema."),
    "Fracture": ("No displaced rib fractures are seen.",),
}
_NORMAL = (
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "No radiographic abnormalities of the chest.",
    "The lungs are clear and the heart is normal.",
)
_SUMMED = {
    "Pleural Effusion": "{Size} {side} pleural effusion.",
    "Cardiomegaly": "{Grade} cardiomegaly.",
    "Enlarged Cardiomediastinum": "Widened mediastinum.",
    "Edema": "{Grade} pulmonary edema.",
    "Pneumonia": "{Side} {zone} lung pneumonia.",
    "Consolidation": "{Side} {zone} lung consolidation.",
    "Atelectasis": "{Side} basilar atelectasis.",
    "Pneumothorax": "{Size} {side} pneumothorax.",
    "Lung Lesion": "{Side} {zone} lung nodule of {cm} cm, further evaluation with CT is advised.",
    "Fracture": "Displaced {side} rib fractures.",
}
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


class Report:
    """`text`, laid out as in MIMIC-CXR, and `labels`: 1, 0 or −1 (uncertain); those that nothing is said of are not
    there."""

    def __init__(self, study: Study, rng: np.random.Generator) -> None:
        self.rng, self.labels = rng, dict[str, int]()
        findings = self._findings(study)
        impression = self._impression(study)
        if not any(value == 1 for label, value in self.labels.items() if label != "Support Devices"):
            self.labels["No Finding"] = 1
        self.text = self._laid_out(study, findings, impression)

    def _findings(self, study: Study) -> list[str]:
        present = {one.label: one for one in study.findings}
        said = []
        if not study.first and self.rng.random() < 0.3:
            said.append("As compared to the previous radiograph of ___, the patient has been imaged anew.")
        for organ in ORGANS:
            there = [present[label] for label in organ if label in present]
            said += [self._say(one) for one in there]
            if organ[0] == "Pneumonia" and not there and self.rng.random() < 0.6:
                said.append(self._pick(("The lungs are clear.", "The lungs are well expanded and clear.")))
            for label in organ:
                if label in _ABSENT and label not in present and self.rng.random() < 0.45:
                    said.append(self._pick(_ABSENT[label]))
                    self.labels[label] = 0
        return said or [self._pick(_NORMAL)]

    def _say(self, finding: Finding) -> str:
        self.labels[finding.label] = 1 if finding.certain else -1
        if finding.label == "Support Devices":
            self.labels[finding.label] = 1
            return _worded(self._pick(_DEVICES[finding.device]), finding)
        if not finding.certain:
            what = {"Lung Lesion": "lung nodule", "Atelectasis": "basilar atelectasis"}
            doubt = _DOUBT.replace("{what}", what.get(finding.label, finding.label.lower()))
            return _worded(self._pick(_DOUBTED.get(finding.label, (doubt,))), finding)
        sentence = _worded(self._pick(_PRESENT[finding.label]), finding)
        if "opacit" in sentence:
            self.labels["Lung Opacity"] = 1
        return sentence

    def _impression(self, study: Study) -> list[str]:
        certain = [one for one in study.findings if one.certain and one.label in _SUMMED]
        said = [_worded(_SUMMED[one.label], one) for one in certain]
        if not any(one.label in _SUMMED for one in study.findings):
            said = [self._pick(_NORMAL)]
        elif not said:
            said = ["No definite acute process, a follow-up study is advised."]
        if self.rng.random() < 0.12:
            said.append("Findings were discussed with Dr. ___ at ___ on ___.")
        return [f"{number}. {one}" for number, one in enumerate(said, 1)] if len(said) > 1 else said

    def _laid_out(self, study: Study, findings: Sequence[str], impression: Sequence[str]) -> str:
        views = "PA AND LAT" if study.lateral else f"PORTABLE {study.view}" if study.view == "AP" else "PA"
        complaint = self._pick(("cough", "shortness of breath", "chest pain", "fever", "a fall"))
        parts = [
            f"EXAMINATION:  CHEST ({views})",
            f"INDICATION:  ___ year old {self._pick(('man', 'woman'))} with {complaint}  // evaluate",
            f"COMPARISON:  {'None.' if study.first else 'Chest radiograph ___.'}",
        ]
        kind = self.rng.random()
        wrapped = textwrap.fill(" ".join(findings), 78, initial_indent=" ", subsequent_indent=" ")
        listed = "\n".join(f" {line}" for line in impression)
        if kind < 0.04:  # neither heading: the published parser takes the last paragraph
            body = [f" {parts[1]}", wrapped]
        elif kind < 0.12:
            body = [*(f" {part}" for part in parts), f" IMPRESSION: \n \n{listed}"]
        elif kind < 0.20:
            body = [*(f" {part}" for part in parts), f" FINDINGS: \n \n{wrapped}"]
        else:
            body = [*(f" {part}" for part in parts), f" FINDINGS: \n \n{wrapped}", f" IMPRESSION: \n \n{listed}"]
        return f"{'FINAL REPORT':>45}\n" + "\n \n".join(body) + "\n"

    def _pick(self, choices: Sequence[str]) -> str:
        return choices[int(self.rng.integers(len(choices)))]


def query_sentences(label: str, rng: np.random.Generator, count: int) -> list[str]:
    """Up to `count` different sentences that say that the finding is there, as a reader would ask for it."""
    if label == "No Finding":
        return list(_NORMAL[:count])
    found: dict[str, None] = {}
    for number in range(8 * count):
        choices = _PRESENT[label]
        found.setdefault(_worded(choices[number % len(choices)], invent_finding(label, rng, doubtful=0.0)))
    return list(found)[:count]


def _worded(sentence: str, finding: Finding) -> str:
    words = {
        "side": finding.side,
        "zone": finding.zone,
        "size": finding.size,
        "grade": finding.grade,
        "gradely": {"mild": "mildly", "moderate": "moderately", "severe": "severely"}[finding.grade],
        "cm": f"{finding.centimetres:.1f}",
        "ribs": f"{_ORDINALS[finding.rib - 2]} to {_ORDINALS[finding.rib]}",
    }
    words |= {name.capitalize(): value.capitalize() for name, value in list(words.items())}
    if finding.side == "bilateral":  # "a bilateral effusion" is two
        for one, two in _PLURALS:
            sentence = sentence.replace(one, two)
    return sentence.format(**words)


_PLURALS = (
    ("There is a {size} {side} pleural effusion", "There are {size} {side} pleural effusions"),
    ("pleural effusion is present", "pleural effusions are present"),
    ("Blunting of the {side} costophrenic angle represents a {size} pleural effusion",
     "Blunting of the costophrenic angles represents {size} {side} pleural effusions"),
    ("{side} pleural effusion.", "{side} pleural effusions."),
    ("the {side} {zone} lung", "both {zone} lungs"),
    ("at the {side} lung base", "at both lung bases"),
    ("at the {side} base", "at both bases"),
)  # fmt: skip
