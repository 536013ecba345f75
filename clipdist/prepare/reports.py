"""Pathology reports, text or PDF -> the diagnosis section, and those of its sentences that tell what a slide shows."""

import re
from collections.abc import Sequence
from pathlib import Path

from clipdist.errors import UserError
from clipdist.prepare.report_text import BULLET, UnusableReport, decoded, items

# Headings of a diagnosis, the plainest first: where a report has several, the first of this list that it has counts.
DIAGNOSIS = (
    r"FINAL\s+(?:PATHOLOG(?:IC(?:AL)?|Y)\s+)?DIAGNOS[IE]S",
    r"(?:SURGICAL\s+|ANATOMIC\s+|HISTO)?PATHOLOG(?:IC(?:AL)?|Y)\s+DIAGNOS[IE]S",
    r"(?:HISTOLOGIC(?:AL)?|MICROSCOPIC|MORPHOLOGIC(?:AL)?)\s+DIAGNOS[IE]S",
    r"DIAGNOS[IE]S",
)
OTHERS = (
    r"(?:PRE|POST)-?\s?OP(?:ERATIVE)?\.?\s+DIAGNOSIS", r"CLINICAL\s+(?:DIAGNOSIS|HISTORY|INFORMATION|DATA|DETAILS)",
    r"FROZEN\s+SECTION\s+DIAGNOSIS", r"INTRAOPERATIVE\s+(?:DIAGNOSIS|CONSULTATION)", r"(?:PATIENT|BRIEF)\s+HISTORY",
    r"GROSS\s+(?:DESCRIPTION|EXAMINATION|PATHOLOGY)", r"MACROSCOPIC\s+(?:DESCRIPTION|EXAMINATION)",
    r"MICROSCOPIC\s+(?:DESCRIPTION|EXAMINATION|FINDINGS)", r"SPECIMENS?(?:\s*\(S\))?(?:\s+(?:SUBMITTED|RECEIVED))?",
    r"(?:SYNOPTIC|CANCER)\s+(?:REPORT|DATA|SUMMARY)", r"COMMENTS?(?:\s*\(S\))?", r"NOTES?", r"ADDEND(?:UM|A)",
    r"IMMUNOHISTOCHEMISTRY(?:\s+RESULTS)?", r"SPECIAL\s+(?:STAINS|PROCEDURES)", r"PROCEDURES?",
    r"ELECTRONICALLY\s+SIGNED", r"HISTORY", r"SUMMARY\s+OF\s+SECTIONS", r"ICD-?\w*\s+CODES?", r"END\s+OF\s+REPORT",
)  # fmt: skip
# A heading stands alone on its line, or ends in a colon; the colon of scanned reports may be apart from it.
_HEADING = r"(?:(?<![A-Za-z])|(?<=\n))(?:{})(?:\s*\([A-Z ]{{3,30}}\))?[ \t]*(?::|(?=\r?\n)|$)"
_STOP = re.compile(_HEADING.format("|".join((*OTHERS, *DIAGNOSIS))), re.IGNORECASE)
_STARTS = [re.compile(_HEADING.format(pattern), re.IGNORECASE) for pattern in DIAGNOSIS]
# Not the end of "1." before what it numbers, nor a point in a number; a colon or semicolon that ends a line does.
_SENTENCE = re.compile(r"(?<=[.;:])(?<!\b\d[.])(?<!\b[A-Z][.])\s+(?=\S)")

# What says in which way tissue is diseased: entity -> how reports of the breast write it.
ENTITIES = {
    "DCIS": r"\bDCIS\b|(?:intra-?ductal|ductal)\s+carcinoma,?\s+in[\s-]*situ|intra-?ductal\s+carcinoma",
    "LCIS": r"\bLCIS\b|lobular\s+(?:carcinoma,?\s+in[\s-]*situ|neoplasia)",
    "IDC": r"\bIDC\b|(?:invasive|infiltrating)\s+(?:mammary\s+)?(?:duct(?:al)?|mammary)\s+(?:adeno)?carcinoma"
    r"|duct(?:al)?\s+(?:adeno)?carcinoma,?\s+(?:invasive|infiltrating)",
    "ILC": r"\bILC\b|(?:invasive|infiltrating)\s+lobular\s+carcinoma|lobular\s+carcinoma,?\s+(?:invasive|infiltrating)",
}
_ENTITIES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in ENTITIES.items()}
_TELLING = re.compile(
    "|".join(ENTITIES.values()) + r"|carcinoma|hyperplasia|\bducts?\b|\bductal\b|lobul(?:es?|ar)|comedo|necrosis"
    r"|cribriform|micropapillary|papillary|mucinous|medullary|tubular|metaplastic|fibroadenoma|sclerosing",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:no|not|negative|without|free\s+of|absent|uninvolved|benign\s+lymph)\b", re.IGNORECASE)


class NoDiagnosis(UnusableReport):
    """A report from which no diagnosis can be had; the message says why."""


def read_report(path: Path) -> str:
    """The text of a `.txt` (UTF-8, or else Windows' Latin) or a `.pdf`, page after page.

    Raises `NoDiagnosis` for a file that is missing, damaged, locked, or a scan without a layer of text. PDFs need pypdf
    (extra: pathology).
    """
    try:
        if path.suffix.lower() != ".pdf":
            return decoded(path.read_bytes())
        text = _pdf_text(path)
    except FileNotFoundError:
        raise NoDiagnosis("missing report") from None
    except OSError as error:
        raise NoDiagnosis(f"unreadable report: {error.strerror}") from None
    if not text.strip():
        raise NoDiagnosis("a PDF without text, most likely a scan; read it with OCR first, or use TCGA-Reports' table")
    return text


def diagnosis_section(text: str) -> str:
    """The diagnosis of a report, without its heading, up to the next heading. Raises `NoDiagnosis` when there is none.

    Headings end in a colon or stand on a line of their own; so scanned reports that have become one line work, too. Of
    several the most final counts: FINAL DIAGNOSIS before PATHOLOGIC DIAGNOSIS before DIAGNOSIS. Clinical, pre-operative
    and frozen-section diagnoses are none.
    """
    headings = list(_headings(text))
    for start in _STARTS:
        for place, (begin, end) in enumerate(headings):
            if start.fullmatch(text[begin:end].strip()):
                stop = headings[place + 1][0] if place + 1 < len(headings) else len(text)
                if section := text[end:stop].strip():
                    return section
    raise NoDiagnosis("no diagnosis section")


def diagnosis_sentences(section: str) -> list[str]:
    """The sentences of a section that name a disease or a structure, bullets and repetitions left out, in order.

    What a sentence denies ("negative for carcinoma") is left out too: no tile shows it. Raises `NoDiagnosis` for none.
    """
    found: dict[str, str] = {}
    for line in items(section):
        for part in _SENTENCE.split(line):
            sentence = " ".join(BULLET.sub("", part).split()).strip(" ;:-")
            if _TELLING.search(sentence) and not _DENIED.search(sentence) and len(sentence.split()) > 1:
                found.setdefault(sentence.rstrip(".").lower(), sentence)
    if not found:
        raise NoDiagnosis("a diagnosis section without a sentence that names a disease of the breast")
    return list(found.values())


def entities(sentences: Sequence[str]) -> list[str]:
    """Which of `ENTITIES` the sentences name, in that order."""
    return [name for name, pattern in _ENTITIES.items() if any(pattern.search(sentence) for sentence in sentences)]


def _headings(text: str) -> list[tuple[int, int]]:
    """Where headings begin and end. In running text only capitals make one: "the diagnosis: ..." is a sentence."""
    found = []
    for match in _STOP.finditer(text):
        word = match[0].rstrip(": \t")
        own_line = not text[: match.start()].rpartition("\n")[2].strip()
        if word.isupper() or own_line:
            found.append((match.start(), match.end()))
    return found


def _pdf_text(path: Path) -> str:
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError:
        raise UserError('PDF reports need pypdf; run: pip install "clipdist[pathology]"') from None
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise NoDiagnosis("a PDF locked by a password")
        return "\n".join(page.extract_text() for page in reader.pages)
    except (NoDiagnosis, OSError):
        raise
    except PyPdfError as error:
        raise NoDiagnosis(f"damaged PDF: {error}") from None
    except Exception as error:  # damaged files make parsers raise nearly anything
        raise NoDiagnosis(f"damaged PDF: {type(error).__name__}: {error}") from None
