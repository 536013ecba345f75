"""Diagnosis sections of pathology reports: which heading counts, where it ends, which sentences tell something."""

from pathlib import Path

import pytest

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
