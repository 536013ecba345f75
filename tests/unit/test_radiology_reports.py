"""Sections of radiology reports, and the sentences that become captions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdist.data.captions import choose, sentences
from clipdist.prepare.radiology_reports import report_captions, report_sections, report_sentences
from clipdist.prepare.report_text import UnusableReport

# In the manner of MIMIC-CXR: every line begins with a blank, empty lines hold one.
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 \x20
 INDICATION:  ___F with cough  // pneumonia?
 \x20
 COMPARISON:  Chest radiograph ___.
 \x20
 FINDINGS: \x20
 \x20
 The heart is mildly
 enlarged. No pneumothorax. 1.2 cm nodule in the left
 upper lobe, as told to Dr.
 ___ (___) at 3:45 pm. Stable.
 \x20
 IMPRESSION: \x20
 \x20
 1. Mild cardiomegaly
 2. Nodule of 1.2 cm,
    to be followed.
 \x20
 NOTIFICATION:  Told to Dr. ___ by telephone.
"""


def test_sections_and_sentences() -> None:
    assert list(report_sections(REPORT)) == [
        "examination",
        "indication",
        "comparison",
        "findings",
        "impression",
        "notification",
    ]
    assert report_captions(REPORT) == {
        "findings": "The heart is mildly enlarged. No pneumothorax. 1.2 cm nodule in the left upper lobe, as told to "
        "Dr. at 3:45 pm.",
        "impression": "Mild cardiomegaly. Nodule of 1.2 cm, to be followed.",
    }
    assert list(report_captions(REPORT, ["impression"])) == ["impression"]
    assert "Stable." in report_captions(REPORT, min_tokens=1)["findings"]


def test_training_draws_the_same_sentences() -> None:
    captions = list(report_captions(REPORT).values())
    apart = [sentence for caption in captions for sentence in sentences(caption)]
    assert apart == [
        "The heart is mildly enlarged.",
        "No pneumothorax.",
        "1.2 cm nodule in the left upper lobe, as told to Dr. at 3:45 pm.",
        "Mild cardiomegaly.",
        "Nodule of 1.2 cm, to be followed.",
    ]
    drawn = {choose(captions, "sentence", np.random.default_rng(seed)) for seed in range(200)}
    assert drawn == set(apart)


@pytest.mark.parametrize(
    ("heading", "meaning"),
    [
        ("FINDINGS", "findings"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("CONCLUSION", "impression"),
        ("IMPRESSON", "impression"),
        ("FINDNGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PORTABLE AP CHEST RADIOGRAPH", "findings"),
        ("PA AND LATERAL VIEWS", "findings"),
        ("INDICATION", "indication"),
        ("REASON FOR EXAM", "indication"),
        ("CLINICAL INFORMATION", "history"),
        ("COMPARISON FILM", "comparison"),
        ("RECOMMENDATION(S)", "recommendation(s)"),
        ("WET READ", "wet read"),
    ],
)
def test_what_headings_mean(heading: str, meaning: str) -> None:
    found = report_sections(f" FINAL REPORT\n {heading}:  The lungs are clear.\n")
    assert {name: text for name, text in found.items() if name != "last_paragraph"} == {meaning: "The lungs are clear."}


def test_headings_of_organs_belong_to_the_findings() -> None:
    text = " FINDINGS:\n LUNGS: They are clear.\n HEART AND MEDIASTINUM:  Normal in size.\n RECOMMENDATION: Come again."
    assert report_captions(text) == {"findings": "LUNGS: They are clear. HEART AND MEDIASTINUM: Normal in size."}
    assert report_sections(" LUNGS: clear\n HISTORY: none\n HEART: normal") == {
        "lungs": "clear",
        "history": "none",
        "heart": "normal",
    }


def test_any_heading_below_the_findings_goes_on_with_them() -> None:
    text = (
        " FINDINGS:\n \n PULMONARY VASCULATURE:  Engorged.\n SPINE:  Old fracture of T8 seen.\n EFFUSION:  Large on "
        "the right side.\n \n HEART:  It is large.\n \n DISPOSITION:  She was sent home.\n \n "
        "IMPRESSION:  Pneumonia is seen.\n"
    )
    assert report_captions(text) == {
        "findings": "PULMONARY VASCULATURE: Engorged. SPINE: Old fracture of T8 seen. EFFUSION: Large on the right "
        "side. HEART: It is large.",
        "impression": "Pneumonia is seen.",
    }


@pytest.mark.parametrize(
    "heading", ["NOTIFICATION OF CRITICAL FINDINGS", "CLINICAL IMPRESSION", "WET READ", "RECOMMENDATION(S)"]
)
def test_headings_that_name_findings_but_hold_none(heading: str) -> None:
    aside = f" {heading}:  Told at once by telephone.\n"
    assert report_captions(f" FINDINGS:  The lungs are clear.\n{aside}") == {"findings": "The lungs are clear."}
    with pytest.raises(UnusableReport, match="no findings or impression"):
        report_captions(aside)


def test_the_end_of_a_wrapped_sentence_is_no_bullet() -> None:
    text = (
        " FINDINGS:  A nodule could be better evaluated with\n CT.  Fracture of grade\n 2.  Heart size is normal.\n"
        " IMPRESSION:  Compression fracture of\n L1.  No pneumothorax.\n"
    )
    assert report_captions(text) == {
        "findings": "A nodule could be better evaluated with CT. Fracture of grade 2. Heart size is normal.",
        "impression": "Compression fracture of L1. No pneumothorax.",
    }


@pytest.mark.parametrize("end", ["segment 6", "hepatitis B", "told to Dr", "seen by J. Smith", "the film of 12"])
def test_packing_and_training_find_the_same_sentences(end: str) -> None:
    section = f"1. A nodule, {end}.\n2. No pleural effusion.\n4. No fracture."
    found = report_sentences(section)
    assert sentences(report_captions(f" IMPRESSION: {section}")["impression"]) == found
    assert " ".join(found) == f"A nodule, {end}. No pleural effusion. No fracture."


def test_the_last_paragraph_stands_in() -> None:
    text = " FINAL REPORT\n HISTORY:  Cough.\n \n The lungs are clear.\n \n The heart is normal.\n"
    assert report_captions(text) == {"last_paragraph": "The lungs are clear. The heart is normal."}
    assert report_captions(" FINAL REPORT\n \n The lungs are clear.\n") == {"last_paragraph": "The lungs are clear."}
    # A title without text of its own is no section of findings.
    titled = report_sections(" CHEST, PA LATERAL:\n \n INDICATION:  Cough.\n \n Lungs are clear.\n")
    assert titled == {"indication": "Cough.\n \n Lungs are clear.", "last_paragraph": "Lungs are clear."}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no findings or impression"),
        (" FINAL REPORT\n", "no findings or impression"),
        (" HISTORY: Cough.\n", "no findings or impression"),
        (" FINDINGS:\n IMPRESSION:\n", "no findings or impression"),
        (" IMPRESSION: ___.\n", "impression without a sentence of 3 tokens"),
        (" IMPRESSION: Normal.\n", "impression without a sentence of 3 tokens"),
    ],
)
def test_reports_that_say_nothing(text: str, why: str) -> None:
    with pytest.raises(UnusableReport, match=why):
        report_captions(text)


def test_a_section_that_was_not_asked_for_is_no_caption() -> None:
    with pytest.raises(UnusableReport, match="no findings in the report"):
        report_captions(" IMPRESSION: The lungs are clear.", ["findings"])


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("1. Small effusion. 2. No pneumothorax.", ["Small effusion.", "No pneumothorax."]),
        ("- Small effusion\n- Large heart is seen", ["Small effusion.", "Large heart is seen."]),
        ("Seen by ___ , M.D. at ___ . Clear lungs!", ["Seen by, M.D. at.", "Clear lungs!"]),
        ("The tube (___) ends 3.5 cm above.", ["The tube ends 3.5 cm above."]),
        ("Heart is large\n\nNo effusion is seen", ["Heart is large.", "No effusion is seen."]),
        ("10. 3.5. ___ -- ;", []),
    ],
)
def test_sentences(section: str, expected: list[str]) -> None:
    assert report_sentences(section) == expected


@given(st.text(alphabet=st.sampled_from("aB1 .:;_()-\n"), max_size=80))
def test_no_text_breaks_it(text: str) -> None:
    for sentence in report_sentences(text):
        assert sentence == " ".join(sentence.split())
        assert "__" not in sentence
        assert sentence[-1] in ".!?"
    try:
        captions = report_captions(text)
    except UnusableReport:
        return
    for name, caption in captions.items():
        assert sentences(caption) == report_sentences(report_sections(text)[name])
