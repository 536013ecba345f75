"""A diagnosis -> its statements, without what they deny.

In doubt a disease is taken for denied: a label too few costs a pair, a label too many teaches what is not there.
"""

import re

from clipdist.prepare.report_text import items

# A value that denies what stands before it: "DCIS: absent", "DCIS - not identified".
_NOTHING = (
    r"(?:(?:is|are|was|were)\s+)?(?:not\s+(?:identified|seen|present|found|detected|applicable|evaluated|involved)"
    r"|none(?:\s+(?:identified|seen|present))?|no|nil|absent|negative|uninvolved|free|n/a|0\s*%)"
)
_NOTHING_ELSE = re.compile(rf"{_NOTHING}[\s.,;)]*", re.IGNORECASE)
# A negative value that tells of something else, and so leaves what stands before it: "DCIS: no invasion".
_SOMETHING_ELSE = (
    r"(?:no|without|negative\s+for|free\s+of)\s+(?:[\w/-]+\s+){0,3}(?:invasion|involvement|metasta\w+|necrosis"
    r"|microcalcifications?|calcifications?|margins?|nodes?)\b(?!\s*:)"
)
_VALUE = rf"(?:{_NOTHING}|not|without)(?!\w)(?!(?<=\bno)\s+(?:special|specific)\s+type)"
# Sentences end in a mark, but not in that of a number that begins one; bullets and "B)" stand in running text, too.
# A negative value stays with what it is said of.
_END = re.compile(
    rf"(?:(?<=[.;])(?<!^\w\.)(?<![.;:]\s\w\.)\s+(?!{_NOTHING}\s*(?:[.,;)]|$))"
    rf"|(?<=:)\s+(?:(?={_SOMETHING_ELSE})|(?!{_VALUE}))"
    rf"|\s+[-•*–]\s+(?!{_NOTHING}(?!\w))|\s+(?=\(?(?:[A-Z]|\d{{1,2}})\)\s))(?=\S)",
    re.IGNORECASE,
)
_MARK = re.compile(r"^\(?(?:\d{1,2}|[A-Z])[.):]\s+")

# A line that cannot be whole: the next one goes on with it, as "NO EVIDENCE OF INVASIVE | DUCTAL CARCINOMA".
_OPEN = re.compile(
    r"(?:[,/(&-]|\b(?:and|or|nor|but|of|for|with|without|no|not|the|an?|in|at|to|by|from|on|is|are|was|were|evidence|grade|type"
    r"|(?!negative|positive)\w+(?:al|ic|ive|ing|ar|ary)|(?<!carcinoma\s)(?<!carcinoma,\s)in\s+situ))$",
    re.IGNORECASE,
)
_CONTINUING = re.compile(r"[a-z(]|(?:AND|OR|NOR|BUT|WITH|WITHOUT|IN[\s-]SITU)\b")

# Words that turn a sentence from what it denies to what it does not.
_TURN = re.compile(r";|\b(?:but|however|although|though|whereas|except)\b|,\s+(?=with\b(?!\s+no\b))", re.IGNORECASE)
# "Not otherwise specified", "no special type" and "ER-negative" deny no disease.
_DENIAL = re.compile(
    r"\b(?:no(?!\s+(?:special|specific)\s+(?:histologic\w*\s+)?type)"
    r"|not(?!\s+(?:otherwise|further)\s+(?:specified|classified|characteri[sz]ed))"
    r"|cannot(?!\s+be\s+(?:excluded|ruled\s+out))"
    r"|none|nor|neither|without|absen(?:t|ce)|lack(?:s|ing)?|free\s+(?:of|from)|uninvolved|(?<!cannot\sbe\s)ruled\s+out"
    r"|(?<!triple[\s-])(?<!receptor[\s-])(?<!\bER[\s-])(?<!\bPR[\s-])(?<!\bHER2[\s-])negative|nil|n/a)\b"
    r"|(?<![\d.])0\s*%",
    re.IGNORECASE,
)
# Denials of what follows them, so that what stands before remains: "carcinoma, without invasion", "DCIS with no ...".
_OF_WHAT_FOLLOWS = re.compile(
    r"(?:(?:without|free\s+(?:of|from)|lack\w*(?:\s+of)?|absence\s+of|negative\s+for|uninvolved\s+by"
    r"|not\s+(?:involv|extend|invad|infiltrat|reach)\w*)|(?P<no>no|neither|nor))\s+\w",
    re.IGNORECASE,
)
_BEFORE_NO = re.compile(r"(?:^|[,.(-]|\b(?:with|and|but|shows?|showing|has|ha[sd]|there\s+(?:is|was)))\s*$", re.I)
# Over what is denied, up to the next such line: "NEGATIVE FOR:".
_LIST_OF_DENIED = re.compile(
    r"\b(?:negative(?:\s+for)?|absent|no(?:\s+evidence\s+of)?|free\s+of|without|not\s+identified):$", re.IGNORECASE
)
# What a denial at the end of a sentence may be said of, rather than of the disease before the comma.
_SUBJECT = re.compile(
    r"invasion|involvement|extension|margins?|nodes?|metasta|necrosis|calcif|skin|nipple|muscle|receptor|\b[EP]R\b|HER-?2"
    r"|carcinoma|DCIS|LCIS|neoplasia|tumou?r|resection",
    re.IGNORECASE,
)
_LOOSE_END = re.compile(r"(?:(?:\b(?:with|and|but|or|shows?|showing|has|is|are|there)\b|[\s,;:(-])+)$", re.IGNORECASE)


def report_statements(section: str) -> list[str]:
    """What a section says, statement by statement, without bullets and what is denied."""
    found, denying = [], False
    for item in items(section, _goes_on):
        for sentence in _END.split(" ".join(item.split())):
            if sentence.endswith(":"):
                denying = _LIST_OF_DENIED.search(sentence) is not None
            statement = affirmed(_MARK.sub("", sentence).strip(" ;-")).strip(" ;:-")
            if statement and not denying:
                found.append(statement)
    return found


def affirmed(sentence: str) -> str:
    """What is left of a sentence without what it denies."""
    if not _DENIAL.search(sentence):
        return sentence
    return _LOOSE_END.sub("", " ".join(filter(None, map(_affirmed, _TURN.split(sentence)))))


def _affirmed(part: str) -> str:
    """A denial takes all that follows it, as in "no DCIS, LCIS or invasion", and of what precedes it its subject."""
    denial = _DENIAL.search(part)
    if not denial:
        return part.strip()
    before = part[: denial.start()]
    follows = _OF_WHAT_FOLLOWS.match(part, denial.start())
    if before.rstrip().endswith(":"):  # a value that denies what it stands for
        kept = ""
    elif follows and (not follows["no"] or _BEFORE_NO.search(before)):
        kept = before
    elif before.rstrip().endswith("-"):
        kept = ""
    else:
        comma = max(before.rfind(","), before.rfind("("))
        subject = before[comma + 1 :]
        # "DCIS, LCIS and invasion are absent" denies all three; margins and nodes are negative on their own.
        several = re.search(r"\b(?:and|or|nor)\b", subject, re.IGNORECASE) and denial[0].lower() not in (
            "negative",
            "uninvolved",
        )
        kept = before[: comma + 1] if comma >= 0 and _SUBJECT.search(subject) and not several else ""
    return _LOOSE_END.sub("", kept).strip()


def _goes_on(item: str, line: str) -> bool:
    """Whether a line of a diagnosis goes on with the one before: each is an item unless it is plainly cut in two."""
    if _NOTHING_ELSE.fullmatch(line):
        return True
    return item[-1] not in ".;:" and bool(_OPEN.search(item) or _CONTINUING.match(line))
