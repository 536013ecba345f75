"""Pathology reports, text or PDF -> the diagnosis section, and those of its sentences that tell what a slide shows."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipdist.errors import UserError
from clipdist.prepare.denials import report_statements
from clipdist.prepare.report_text import UnusableReport, decoded

# What stands before "diagnosis", the most final first: where a report has several, the first of this list counts.
FINALITY = tuple(map(re.compile, (r"(?i)FINAL", r"(?i)PATHOLOG", r"(?i)HISTOLOG|MICROSCOPIC|MORPHOLOGIC", "")))
# Diagnoses of somebody else, or of a time before the slides were seen.
_NOT_FINAL = re.compile(
    r"FROZEN|PRE-?\s?OP|POST-?\s?OP|INTRA-?\s?OP|OPERATIVE|CLINICAL|PROVISIONAL|PRELIMINARY|ADMI(?:TTING|SSION)|REFERR"
    r"|WORKING|DIFFERENTIAL|PREVIOUS|PRIOR|HISTORY|CYTOLOG|DIAGNOSIS|COMMENT|\bNO\b|\bSEE\b",
    re.IGNORECASE,
)
_KINDS = r"FINAL|REVISED|AMENDED|CORRECTED|SURGICAL|ANATOMIC(?:AL)?|(?:HISTO)?PATHOLOG(?:IC(?:AL)?|Y)" \
         r"|HISTOLOG(?:IC(?:AL)?|Y)|MICROSCOPIC|MORPHOLOGIC(?:AL)?"  # fmt: skip
# Before "diagnosis": these words, also in small letters or broken over lines; and any others with a capital.
_WHICH = (
    rf"(?P<which>(?:(?i:{_KINDS})[\s/&-]+|(?:(?i:PRE|POST)-?\s?(?i:OP)\.|[A-Z][A-Za-z&/-]*)[ \t]+|(?:and|of|&)[ \t]+)"
    r"{0,6})"
)
_DIAGNOSIS = rf"{_WHICH}(?i:DIAGNOS(?:IS\s?\(ES\)|[IE]S))"
OTHERS = (
    r"CLINICAL\s+(?:DIAGNOSIS\s*(?:&|AND)\s*)?(?:HISTORY|INFORMATION|DATA|DETAILS)", r"(?:PATIENT|BRIEF)\s+HISTORY",
    r"INTRAOPERATIVE\s+CONSULTATION", r"GROSS\s+(?:DESCRIPTION|EXAMINATION|PATHOLOGY)",
    r"MACROSCOPIC\s+(?:DESCRIPTION|EXAMINATION)", r"MICROSCOPIC\s+(?:DESCRIPTION|EXAMINATION|FINDINGS)",
    r"SPECIMENS?(?:\s*\(S\))?\s+(?:SUBMITTED|RECEIVED)", r"(?:SYNOPTIC|CANCER)\s+(?:REPORT|DATA|SUMMARY)",
    r"COMMENTS?(?:\s*\(S\))?", r"NOTES?", r"ADDEND(?:UM|A)", r"IMMUNOHISTOCHEMISTRY(?:\s+RESULTS)?",
    r"SPECIAL\s+(?:STAINS|PROCEDURES)", r"ELECTRONICALLY\s+SIGNED", r"SUMMARY\s+OF\s+SECTIONS", r"ICD-?\w*\s+CODES?",
    r"END\s+OF\s+REPORT",
)  # fmt: skip
# Words that diagnoses are made of, too ("MASTECTOMY SPECIMEN: ..."): headings only where a line or sentence begins.
_LOOSE = r"(?P<loose>SPECIMENS?(?:\s*\(S\))?|PROCEDURES?|HISTORY)"
# A heading stands alone on its line, or ends in a colon; the colon of scanned reports may be apart from it.
_HEADING = re.compile(
    rf"(?<![A-Za-z])(?P<name>{_DIAGNOSIS}|(?i:{'|'.join(OTHERS)}|{_LOOSE}))"
    rf"(?:\s{{0,9}}\([^()\n]{{2,60}}\))?[ \t]{{0,9}}"
    r"(?P<colon>:|(?=[*_=-]*[ \t\r]{0,9}(?:\n|$)))"
)
_CAPITALISED = re.compile(r"(?:[A-Z][\w/&.()-]*|and|of|&)(?:\s+(?:[A-Z(][\w/&.()-]*|and|of|&))*")
# What leads on to the words behind it, so that these are no heading: "see note".
_LEADS_ON = re.compile(r"(?:\b(?:SEE|REFER\s+TO|PER)(?:\s+(?:ALSO|THE|ATTACHED|BELOW|ABOVE))?[\s\"'(]*|,\s*)$", re.I)

# Guards against "non-invasive", in every way that it is written.
_INVASIVE = r"(?<!non)(?<!non[\s-])(?<!non-\s)(?:invasive|infiltrating)"
_NON_INVASIVE = r"non\s?-?\s?(?:invasive|infiltrating)"
_GRADED = r"(?:,?\s+(?:well|moderately|poorly|differentiated|high|intermediate|low|grade|mammary))*,?\s+"
# What says in which way tissue is diseased: entity -> how reports of the breast write it.
ENTITIES = {
    "DCIS": r"\bDCIS\b|\bintra-?ductal\s+carcinoma|\bduct(?:al)?\s+carcinoma,?[\s-]+in[\s-]*situ"
    rf"|in[\s-]*situ\s+duct(?:al)?\s+carcinoma|{_NON_INVASIVE}\s+duct(?:al)?\s+carcinoma",
    "LCIS": r"\bLCIS\b|lobular\s+(?:carcinoma,?[\s-]+in[\s-]*situ|neoplasia)|in[\s-]*situ\s+lobular\s+carcinoma"
    rf"|{_NON_INVASIVE}\s+lobular\s+carcinoma",
    "IDC": rf"\bIDC\b|{_INVASIVE}{_GRADED}duct(?:al)?\s+(?:adeno)?carcinoma(?!,?[\s-]+in[\s-]*situ)"
    rf"|{_INVASIVE}\s+mammary\s+(?:adeno)?carcinoma|duct(?:al)?\s+(?:adeno)?carcinoma,?\s+(?:invasive|infiltrating)"
    rf"|{_INVASIVE}\s+(?:breast\s+)?carcinoma,?\s+(?:\(?NST\b|(?:of\s+)?no\s+(?:special|specific)\s+type)",
    "ILC": rf"\bILC\b|{_INVASIVE}{_GRADED}lobular\s+carcinoma(?!,?[\s-]+in[\s-]*situ)"
    r"|lobular\s+carcinoma,?\s+(?:invasive|infiltrating)",
}
_ENTITIES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in ENTITIES.items()}
_ENTITY = re.compile("|".join(ENTITIES.values()), re.IGNORECASE)
_TELLING = re.compile(
    "|".join(ENTITIES.values()) + r"|carcinoma|hyperplasia|\bducts?\b|\bductal\b|lobul(?:es?|ar)|comedo|necrosis"
    r"|cribriform|micropapillary|papillary|mucinous|medullary|tubular|metaplastic|fibroadenoma|sclerosing",
    re.IGNORECASE,
)


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
    several the most final counts: FINAL DIAGNOSIS before PATHOLOGIC DIAGNOSIS before DIAGNOSIS. Clinical, operative,
    frozen-section and provisional diagnoses are none.
    """
    headings = list(_headings(text))
    for kind in FINALITY:
        for place, heading in enumerate(headings):
            if not _is_diagnosis(heading, kind):
                continue
            # "PROCEDURE: ..." above the first disease is a line of the diagnosis.
            stops = (
                later.start("name")
                for later in headings[place + 1 :]
                if not later["loose"] or _TELLING.search(text, heading.end(), later.start())
            )
            if section := text[heading.end() : next(stops, len(text))].lstrip(" \t\r\n.*_=-").rstrip():
                return section
    raise NoDiagnosis("no diagnosis section")


def diagnosis_sentences(section: str) -> list[str]:
    """The sentences of a section that name a disease or a structure, bullets and repetitions left out, in order.

    What a sentence denies ("without invasion", "DCIS: absent") is cut out: no tile shows it. Raises `NoDiagnosis` for
    none.
    """
    found: dict[str, str] = {}
    for sentence in report_statements(section):
        if _TELLING.search(sentence) and (len(sentence.split()) > 1 or _ENTITY.search(sentence)):
            found.setdefault(sentence.rstrip(".").lower(), sentence)
    if not found:
        raise NoDiagnosis("a diagnosis section without a sentence that names a disease of the breast")
    return list(found.values())


def entities(sentences: Sequence[str]) -> list[str]:
    """Which of `ENTITIES` the sentences name, in that order."""
    return [name for name, pattern in _ENTITIES.items() if any(pattern.search(sentence) for sentence in sentences)]


def _is_diagnosis(heading: re.Match[str], kind: re.Pattern[str]) -> bool:
    which = heading["which"]
    return which is not None and not _NOT_FINAL.search(which) and kind.search(which) is not None


def _headings(text: str) -> Iterator[re.Match[str]]:
    """The headings of a text. Within a line they need capitals and a colon: "the diagnosis: ..." is a sentence."""
    for match in _HEADING.finditer(text):
        before = text[: match.start()]
        if _LEADS_ON.search(before[-40:]):
            continue
        begins_line = not re.search(r"[A-Za-z]", before.rpartition("\n")[2])
        begins_sentence = before.rstrip()[-1:] in (".", ":", ";", "!", "?", "")
        capitals = _CAPITALISED.fullmatch(match["name"]) or (begins_sentence and match["name"][0].isupper())
        if begins_line or (match["colon"] and capitals and (begins_sentence or not match["loose"])):
            yield match


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
