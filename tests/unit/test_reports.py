"""Diagnosis sections of pathology reports: which heading counts, where it ends, which sentences tell something."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdist.prepare.reports import (
    NoDiagnosis,
    diagnosis_section,
    diagnosis_sentences,
    entities,
    read_report,
)

# The sentence that the published system shows.
SHOWN = "INVASIVE DUCTAL CARCINOMA, DUCTAL CARCINOMA IN SITU, MICROPAPILLARY AND SOLID TYPES WITH COMEDO NECROSIS."

LINES = f"""CLINICAL HISTORY: Mass of the breast.
PRE-OPERATIVE DIAGNOSIS: Carcinoma.
GROSS DESCRIPTION:
A fresh specimen; the frozen section diagnosis was given.
FINAL DIAGNOSIS:
A. BREAST, LEFT, MASTECTOMY:
   1. {SHOWN}
   2. TUMOR MEASURES 2.5 CM IN GREATEST
      DIMENSION.
   3. Margins are negative for carcinoma.
B. LYMPH NODES: NO EVIDENCE OF METASTATIC CARCINOMA (0/12).
COMMENT:
Invasive lobular carcinoma was considered.
"""


def pdf(*pages: str) -> bytes:
    """A PDF by hand, a line of text for each line."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        lines = [line.replace("\\", "\\\\").replace("(", r"\(").replace(")", r"\)") for line in page.splitlines()]
        stream = "BT /F1 9 Tf 50 780 Td 12 TL\n" + "\n".join(f"({line}) Tj T*" for line in lines) + "\nET"
        kids.append(f"{len(objects) + 2} 0 R")
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {len(objects)} 0 R >>"
        )
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return data + f"{end}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n".encode()


def test_the_section_reaches_to_the_next_heading() -> None:
    section = diagnosis_section(LINES)
    assert section.startswith("A. BREAST, LEFT")
    assert section.endswith("(0/12).")
    assert diagnosis_sentences(section) == [SHOWN]
    assert entities([SHOWN]) == ["DCIS", "IDC"]


def test_a_scanned_report_is_one_line() -> None:
    assert diagnosis_sentences(diagnosis_section(" ".join(LINES.split()))) == [SHOWN]


@pytest.mark.parametrize(
    "heading",
    [
        "FINAL DIAGNOSIS:",
        "Final Diagnosis:",
        "FINAL PATHOLOGIC DIAGNOSIS",
        "DIAGNOSIS:",
        "Diagnosis",
        "DIAGNOSES:",
        "PATHOLOGICAL DIAGNOSIS :",
        "HISTOPATHOLOGIC DIAGNOSIS:",
        "SURGICAL PATHOLOGY DIAGNOSIS:",
        "DIAGNOSIS (AMENDED):",
        "MICROSCOPIC DIAGNOSIS:",
    ],
)
def test_headings_of_a_diagnosis(heading: str) -> None:
    text = f"SPECIMEN: breast\n{heading}\nLobular carcinoma in situ.\nGROSS DESCRIPTION: a lump with ductal carcinoma"
    assert diagnosis_section(text) == "Lobular carcinoma in situ."


def test_the_most_final_of_several_diagnoses_counts() -> None:
    text = "DIAGNOSIS: See below.\nFROZEN SECTION DIAGNOSIS: Benign.\nFINAL DIAGNOSIS: DCIS of the breast.\nNOTE: -"
    assert diagnosis_section(text) == "DCIS of the breast."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GROSS DESCRIPTION: A lump.",
        "CLINICAL DIAGNOSIS: Carcinoma.\nPREOPERATIVE DIAGNOSIS: Carcinoma.",
        "The patient was told that the diagnosis: carcinoma, is certain.",
        "FINAL DIAGNOSIS:\n\nCOMMENT: None.",
    ],
)
def test_reports_without_a_diagnosis(text: str) -> None:
    with pytest.raises(NoDiagnosis, match="no diagnosis section"):
        diagnosis_section(text)


def test_sentences_are_told_apart_joined_and_kept_once() -> None:
    section = """1. Infiltrating duct carcinoma, grade 2.5 of 3,
       with mucinous features.
    2) Infiltrating duct carcinoma, grade 2.5 of 3, with mucinous features
    - LCIS is present; ducts show apocrine change. The skin is tanned.
    - No lymphovascular invasion by carcinoma.
    Carcinoma."""
    assert diagnosis_sentences(section) == [
        "Infiltrating duct carcinoma, grade 2.5 of 3, with mucinous features.",
        "LCIS is present",
        "ducts show apocrine change.",
    ]
    with pytest.raises(NoDiagnosis, match="without a sentence that names a disease"):
        diagnosis_sentences("Skin with a scar. Negative for carcinoma.")


@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("Invasive mammary carcinoma", ["IDC"]),
        ("Infiltrating lobular carcinoma with LCIS", ["LCIS", "ILC"]),
        ("intraductal carcinoma, solid", ["DCIS"]),
        ("Ductal carcinoma in-situ", ["DCIS"]),
        ("Carcinoma, mucinous", []),
    ],
)
def test_entities(sentence: str, names: list[str]) -> None:
    assert entities([sentence]) == names


def named(diagnosis: str) -> list[str]:
    """The entities of a report with this final diagnosis; none where it tells nothing."""
    try:
        return entities(diagnosis_sentences(diagnosis_section(f"FINAL DIAGNOSIS:\n{diagnosis}\nCOMMENT:\nNone.")))
    except NoDiagnosis:
        return []


@pytest.mark.parametrize(
    ("sentence", "kept"),
    [
        ("Invasive ductal carcinoma, not otherwise specified, grade 3.", None),
        ("INVASIVE CARCINOMA OF NO SPECIAL TYPE (DUCTAL), GRADE 3.", None),
        ("Triple-negative invasive ductal carcinoma.", None),
        ("DCIS cannot be excluded.", None),
        ("INVASIVE DUCTAL CARCINOMA, 1.5 CM, WITHOUT LYMPHOVASCULAR INVASION.", "INVASIVE DUCTAL CARCINOMA, 1.5 CM"),
        ("DUCTAL CARCINOMA IN SITU WITH NO NECROSIS", "DUCTAL CARCINOMA IN SITU"),
        ("Invasive ductal carcinoma (DCIS not present), grade 3", "Invasive ductal carcinoma"),
        ("Invasive ductal carcinoma, lymphovascular invasion is not identified.", "Invasive ductal carcinoma"),
        ("No LCIS but DCIS is present.", "DCIS is present."),
        ("Ductal carcinoma in situ: no lymphovascular invasion", "Ductal carcinoma in situ"),
    ],
)
def test_only_what_is_denied_goes(sentence: str, kept: str | None) -> None:
    assert diagnosis_sentences(sentence) == [(kept or sentence)]


def test_each_line_of_a_list_is_judged_alone() -> None:
    lines = ["INVASIVE DUCTAL CARCINOMA, GRADE 3", "DUCTAL CARCINOMA IN SITU", "MARGINS NEGATIVE FOR CARCINOMA", "LCIS"]
    assert diagnosis_sentences("BREAST, LEFT, MASTECTOMY:\n " + "\n ".join(lines)) == [*lines[:2], "LCIS"]
    wrapped = "INVASIVE DUCTAL CARCINOMA AND\nDUCTAL CARCINOMA IN SITU\nGRADE\n2. NO"
    assert diagnosis_sentences(wrapped)[0] == "INVASIVE DUCTAL CARCINOMA AND DUCTAL CARCINOMA IN SITU"


@pytest.mark.parametrize(
    "denied",
    [
        "ABSENT: DUCTAL CARCINOMA IN SITU",
        "DCIS, LCIS - NOT IDENTIFIED",
        "NO EVIDENCE OF:\n1. DCIS\n2. LCIS",
        "Ductal carcinoma in situ: Not identified.",
        "Ductal carcinoma in situ: Absent",
        "Ductal carcinoma in situ:\n  Not identified",
        "DCIS - NOT IDENTIFIED",
        "DCIS: No",
        "DCIS: No DCIS is seen",
        "DCIS: 0%",
        "DUCTAL CARCINOMA IN SITU       ABSENT",
        "DUCTAL CARCINOMA IN SITU\nIS NOT IDENTIFIED.",
        "DUCTAL CARCINOMA, IN SITU, IS NOT IDENTIFIED.",
        "NO EVIDENCE OF ATYPIA, DUCTAL CARCINOMA IN SITU, OR INVASIVE DUCTAL CARCINOMA.",
        "NEGATIVE FOR INVASIVE AND\nIN SITU DUCTAL CARCINOMA",
        "NO RESIDUAL\nINVASIVE DUCTAL CARCINOMA",
        "NEGATIVE FOR:\n- DUCTAL CARCINOMA IN SITU",
        "DCIS, LCIS AND LYMPHOVASCULAR INVASION ARE NOT IDENTIFIED.",
        "MARGINS FREE OF DCIS.",
        "Ductal carcinoma in situ: No Lymphovascular invasion: No",
    ],
)
def test_a_denied_disease_is_no_label(denied: str) -> None:
    assert named(denied) == []
    assert named(f"INVASIVE LOBULAR CARCINOMA, GRADE 2.\n{denied}") == ["ILC"]


@given(st.sampled_from(["DCIS", "Lobular carcinoma in situ", "INVASIVE DUCTAL CARCINOMA"]), st.data())
def test_denials_in_any_wording(disease: str, data: st.DataObject) -> None:
    after = [": {}", " - {}", " {}", " IS {}", "\n{}", ":\n{}", ": {} INVASION: PRESENT", " ({})"]
    said = data.draw(st.sampled_from(after)).format(
        data.draw(st.sampled_from(["NOT IDENTIFIED", "ABSENT", "negative"]))
    )
    before = data.draw(st.sampled_from(["No ", "NEGATIVE FOR ", "no evidence of ", "Without ", "SKIN, FREE OF "]))
    lead = data.draw(st.sampled_from(["", "A. ", "- ", "Skin and nipple: ", "B) "]))
    assert named(lead + disease + said) == []
    assert named(lead + before + disease) == []
    assert named(lead + disease) != []


@pytest.mark.parametrize(
    ("diagnosis", "names"),
    [
        ("A. LEFT BREAST: INVASIVE DUCTAL CARCINOMA, SEE NOTE\nB. RIGHT: INVASIVE LOBULAR CARCINOMA.", ["IDC", "ILC"]),
        ("A. LEFT: INVASIVE DUCTAL CARCINOMA. SEE COMMENT\nB. RIGHT: INVASIVE LOBULAR CARCINOMA.", ["IDC", "ILC"]),
        ("A. LEFT: INVASIVE DUCTAL CARCINOMA, SEE\nNOTE\nB. RIGHT: INVASIVE LOBULAR CARCINOMA.", ["IDC", "ILC"]),
        ("A. LEFT BREAST, MASTECTOMY SPECIMEN:\nINVASIVE DUCTAL CARCINOMA.", ["IDC"]),
        ("SPECIMEN: Left breast\nPROCEDURE: Mastectomy\nHISTOLOGIC TYPE: Invasive ductal carcinoma", ["IDC"]),
        ("BREAST: DCIS\nPROCEDURE: excision of lobular carcinoma in situ", ["DCIS"]),
    ],
)
def test_words_of_a_diagnosis_are_no_headings(diagnosis: str, names: list[str]) -> None:
    assert named(diagnosis) == names


@pytest.mark.parametrize(
    "heading",
    [
        "FROZEN DIAGNOSIS", "Frozen Section Diagnosis", "PREOPERATIVE DIAGNOSES", "PRE-OP. DIAGNOSIS",
        "PROVISIONAL DIAGNOSIS", "CLINICAL HISTORY AND DIAGNOSIS", "PRELIMINARY DIAGNOSIS", "ADMITTING DIAGNOSIS",
        "INTRAOPERATIVE DIAGNOSIS", "CYTOLOGIC DIAGNOSIS",
    ],
)  # fmt: skip
@pytest.mark.parametrize("apart", ["\n", " "])
def test_other_diagnoses_do_not_count(heading: str, apart: str) -> None:
    text = f"{heading}:{apart}Suspicious for ductal carcinoma in situ.{apart}"
    with pytest.raises(NoDiagnosis, match="no diagnosis section"):
        diagnosis_section(text)
    assert diagnosis_section(f"{text}DIAGNOSIS:{apart}Invasive lobular carcinoma.") == "Invasive lobular carcinoma."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Specimen: breast. Final Diagnosis: Breast, left: Invasive ductal carcinoma, grade 2. "
            "Gross Description: 5 cm.",
            ["Invasive ductal carcinoma, grade 2."],
        ),
        (
            "DIAGNOSIS: BREAST - INVASIVE DUCTAL CARCINOMA, NOS TYPE. Gross Description: received fresh, ducts grossly "
            "dilated with comedo necrosis. Summary of Sections: A1 duct margin",
            ["INVASIVE DUCTAL CARCINOMA, NOS TYPE."],
        ),
        (
            "Diagnosis:. A: Breast, excision:. - Ductal carcinoma in situ. B: Margin:. - Negative for carcinoma.",
            ["Ductal carcinoma in situ."],
        ),
    ],
)
def test_one_line_with_headings_in_mixed_case(text: str, expected: list[str]) -> None:
    assert diagnosis_sentences(diagnosis_section(text)) == expected


@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("Non-invasive ductal carcinoma, cribriform type", ["DCIS"]),
        ("NONINVASIVE LOBULAR CARCINOMA", ["LCIS"]),
        ("Invasive, poorly differentiated ductal carcinoma", ["IDC"]),
        ("Invasive carcinoma of no special type", ["IDC"]),
        ("Infiltrating duct carcinoma in situ", ["DCIS"]),
    ],
)
def test_how_diseases_are_written(sentence: str, names: list[str]) -> None:
    assert entities([sentence]) == names


@pytest.mark.parametrize("text", ["INVASIVE DUCTAL AND ", "DIAGNOSIS ", "no not , (", " ", "A. 1. "])
def test_long_texts_take_no_time(text: str) -> None:
    began = time.process_time()
    for start in ("FINAL DIAGNOSIS: DCIS ", "FINAL DIAGNOSIS"):
        named(start + text * 2000 + "x")
    assert time.process_time() - began < 5


def test_text_files_of_either_coding(tmp_path: Path) -> None:
    for name, coding in (("a.txt", "utf-8-sig"), ("b.txt", "cp1252")):
        (tmp_path / name).write_bytes("DIAGNOSIS: naïve ducts".encode(coding))
        assert read_report(tmp_path / name) == "DIAGNOSIS: naïve ducts"
    with pytest.raises(NoDiagnosis, match="missing report"):
        read_report(tmp_path / "none.txt")


def test_pdf_reports(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf (extra: pathology) is not installed")
    middle = LINES.index("   2. TUMOR")
    path = tmp_path / "report.PDF"
    path.write_bytes(pdf(LINES[:middle], LINES[middle:]))
    assert diagnosis_sentences(diagnosis_section(read_report(path))) == [SHOWN]

    path.write_bytes(pdf("", ""))
    with pytest.raises(NoDiagnosis, match="a PDF without text, most likely a scan"):
        read_report(path)
    for damaged in (b"", b"%PDF-1.4\n", b"no PDF at all", pdf(LINES)[:200]):
        path.write_bytes(damaged)
        with pytest.raises(NoDiagnosis, match=r"damaged PDF|without text"):
            read_report(path)

    path.write_bytes(pdf(LINES))
    writer = pypdf.PdfWriter(clone_from=path)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(path)
    with pytest.raises(NoDiagnosis, match="locked by a password"):
        read_report(path)
