"""What reports of every kind have in common: their coding, and where an item begins and ends."""

import re
from collections.abc import Callable

_BULLET = re.compile(r"^\s*(?:[-*•–](?:\s+|$))+")
# "1.", "(2)", "B:" where a line or a sentence begins. "CT.", "L1." and "Dr. A. Smith" number nothing.
_NUMBER = re.compile(
    r"(?:^[ \t]*(?:[-*•–][ \t]+)*|(?<=[.;:!?])(?<![DM]r\.)(?<!vs\.)[ \t]+)\(?(\d{1,2}|[A-Z])[.):](?=\s)", re.MULTILINE
)
_SKIPPED = 1  # numbers that a reading of a printed page may have lost in a row


class UnusableReport(ValueError):
    """A report from which no caption can be had; the message says why."""


def decoded(data: bytes) -> str:
    """Text of UTF-8, or else of Windows' Latin."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def items(section: str, goes_on: Callable[[str, str], bool]) -> list[str]:
    """The items of a section without their bullets and numbers, one line each.

    An item begins at a bullet, after an empty line, and where `goes_on(item so far, line)` is false. A number begins
    one only where it is the first of a list or follows the last: "2." alone may be the end of "grade 2.".
    """
    found: list[str] = []
    ended = True
    for line in _bulleted(section).splitlines():
        text = _BULLET.sub("", line).strip()
        if ended or not text or text != line.strip() or not goes_on(found[-1], text):
            found.append(text)
        else:
            found[-1] += " " + text
        ended = not text
    return [item for item in found if item]


def _bulleted(section: str) -> str:
    """The section with a bullet on a line of its own wherever a number begins an item."""
    last = {True: 0, False: ord("A") - 1}  # whether digits -> the last number of such a list

    def bullet(match: re.Match[str]) -> str:
        digits = match[1].isdigit()
        number = int(match[1]) if digits else ord(match[1])
        first = number == (1 if digits else ord("A"))
        running = last[digits] >= (1 if digits else ord("A"))
        if not first and not (running and last[digits] < number <= last[digits] + 1 + _SKIPPED):
            return match[0]
        last[digits] = number
        return "\n•"

    return _NUMBER.sub(bullet, section)
