"""Radiology reports -> what they say about the picture: their findings and impression, sentence by sentence.

Sections begin with a heading in capitals, at the beginning of a line, that ends in a colon. What a heading means, and
which text stands in when there is neither findings nor impression, follows `txt/section_parser.py` of
github.com/MIT-LCP/mimic-cxr, which made the published `mimic_cxr_sectioned.csv`; the differences are in
docs/radiology.md.
"""

import difflib
import re
from collections.abc import Sequence

from clipdist.data.captions import sentences
from clipdist.prepare.report_text import UnusableReport, items

CAPTIONS = ("findings", "impression")
LAST_PARAGRAPH = "last_paragraph"
MIN_TOKENS = 3
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ()/,&-]*?)[ \t]*:(?=\s|$)", re.MULTILINE)
# Headings of what is no finding, whatever they name: "NOTIFICATION OF CRITICAL FINDINGS" is about a telephone call.
_ASIDE = re.compile(
    r"NOTIF|COMMUNICAT|DISCUSS|CRITICAL|RECOMMEND(?!.*IMPRESSION)|WET READ|DICTAT|TRANSCRI|SIGNED|ELECTRONIC|ATTENDING"
    r"|RADIOLOGIST|RESIDENT|PHYSICIAN|PROCEDURE|(?:RADIATION )?DOSE|FINAL REPORT|PRELIMINARY REPORT|DATE|TIME"
)
_MEANINGS = (
    ("history", re.compile("^(?:CLINICAL|ADMITTING|WORKING) (?:IMPRESSION|FINDING|CONCLUSION)")),  # of who sent them
    ("impression", re.compile("IMPRESSION|CONCLUSION")),
    ("findings", re.compile("FINDING")),
    ("history", re.compile("HISTORY|INFORMATION|^PFI$")),
    ("comparison", re.compile("COMPARISON|REFERENCE")),
    ("addendum", re.compile("ADDENDUM")),
    ("indication", re.compile("INDICATION|REASON")),
    ("examination", re.compile("^EXAM|EXAM(?:INATION)?$|^TECHNIQUE")),
    # A heading that names the study ("CHEST, TWO VIEWS:") stands over what was seen there.
    ("findings", re.compile(r"CHEST|PORTABLE|\b(?:PA|AP|LATERAL|FRONTAL)\b.*\b(?:PA|AP|LAT|LATERAL|VIEWS?|UPRIGHT)\b"
                            r"|(?:FRONTAL|SEMI).UPRIGHT|\b(?:ONE|TWO) VIEWS?|BONE WINDOW|\bRIBS\b")),
)  # fmt: skip
# Organs: below findings or impression what follows belongs to them, even after an empty line.
_PART = re.compile(
    r"(?:LUNGS?|HEART|AIRWAYS?|PLEURAL?|MEDIASTIN|HIL[AU]|CARDI|BONES?|OSSEOUS|SOFT TISSUE|DIAPHRAGM|(?:UPPER )?ABDOMEN"
    r"|TUBES?|LINES?|SUPPORT|DEVICES?|HARDWARE|OTHER)[A-Z /,&-]*"
)
_BLANK = re.compile(r"_{2,}")
_TOKEN = re.compile(r"\w+|[^\w\s]")


def report_sections(text: str) -> dict[str, str]:
    """Meaning of a heading -> the text below it, in order of appearance; several of one meaning are joined.

    Meanings: findings, impression, history, comparison, addendum, indication, examination, else the heading in small
    letters. When there is neither findings nor impression, `last_paragraph` is the last section (or, without headings,
    the whole text) less its first paragraph, if there are several.
    """
    headings = _headings(text)
    found: dict[str, str] = {}
    ends = [match.start() for match, _ in headings[1:]] + [len(text)]
    for (match, meaning), end in zip(headings, ends, strict=False):
        if section := text[match.end() : end].strip():
            found[meaning] = f"{found[meaning]}\n\n{section}" if meaning in found else section
    if not any(name in found for name in CAPTIONS):
        last = text[headings[-1][0].end() :] if headings else text
        paragraphs = [one for one in re.split(r"\n[ \t]*\r?\n", last.strip()) if one.strip()]
        if len(paragraphs) > 1:
            found[LAST_PARAGRAPH] = "\n\n".join(paragraphs[1:]).strip()
    return found


def report_captions(text: str, wanted: Sequence[str] = CAPTIONS, min_tokens: int = MIN_TOKENS) -> dict[str, str]:
    """Section -> caption of one line, for those of `wanted` that the report has; `last_paragraph` where it has neither
    findings nor impression.

    Bullets and the blanks of de-identification (`___`) are left out, and so are sentences of fewer than `min_tokens`
    words and marks, which say too little to stand alone. Each sentence ends in a mark, so that `data.caption: sentence`
    finds the same ones. Raises `UnusableReport` when nothing is left.
    """
    found = report_sections(text)
    names = [LAST_PARAGRAPH] if LAST_PARAGRAPH in found else [name for name in wanted if name in found]
    if not names:
        raise UnusableReport(f"no {' or '.join(wanted)} in the report")
    captions = {name: " ".join(report_sentences(found[name], min_tokens)) for name in names}
    captions = {name: caption for name, caption in captions.items() if caption}
    if not captions:
        raise UnusableReport(f"{' and '.join(names)} without a sentence of {min_tokens} tokens")
    return captions


def report_sentences(section: str, min_tokens: int = MIN_TOKENS) -> list[str]:
    """The sentences of a section as they can stand alone; see `report_captions`."""
    kept = []
    for item in items(section, lambda *_: True):
        for sentence in sentences(" ".join(item.split())):
            words = _without_blanks(sentence).strip(" ;:,-")
            if words and words[-1] not in ".!?":
                words += "."
            if len(_TOKEN.findall(words)) >= min_tokens and re.search(r"[A-Za-z]{2}", words):
                kept.append(words)
    # Joined first: where a sentence ends in "Dr." or "type B.", training could not tell it from the next one.
    return sentences(" ".join(kept))


def _headings(text: str) -> list[tuple[re.Match[str], str]]:
    """The headings that begin a section, and what they mean."""
    found: list[tuple[re.Match[str], str]] = []
    for match in _HEADING.finditer(text):
        meaning = _meaning(match[1])
        if not (found and found[-1][1] in CAPTIONS and _goes_on(text, found[-1][0].end(), match, meaning)):
            found.append((match, meaning or match[1].lower()))
    return found


def _meaning(heading: str) -> str:
    """The meaning of a heading; none for one that only says what it stands over."""
    if _ASIDE.match(heading):
        return ""
    for meaning, pattern in _MEANINGS:
        if pattern.search(heading):
            return meaning
    near = difflib.get_close_matches(heading, [name.upper() for name in CAPTIONS], n=1, cutoff=0.85)  # misspelt
    return near[0].lower() if near else ""


def _goes_on(text: str, begin: int, match: re.Match[str], meaning: str) -> bool:
    """Whether a heading stands within the findings or impression that begin at `begin`: over an organ, or over
    anything else ("EFFUSION:") in the same paragraph or the first one."""
    if _PART.fullmatch(match[1]):
        return True
    before = text[begin : match.start()]
    same_paragraph = not before.strip() or bool(before.removesuffix("\n").rpartition("\n")[2].strip())
    return not meaning and not _ASIDE.match(match[1]) and same_paragraph


def _without_blanks(text: str) -> str:
    text = re.sub(r"[(\[]\s*[)\]]", "", _BLANK.sub("", text))
    return " ".join(re.sub(r"\s+([,.;:!?)])", r"\1", text).split())
