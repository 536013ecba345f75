"""What reports of every kind have in common: their coding, and where an item begins and ends."""

import re

BULLET = re.compile(r"^\s*(?:(?:\(?[A-Z0-9]{1,2}[.):]|[-*•–])\s+)+")
"""What stands before an item of a list: "1.", "B)", "-"."""


class UnusableReport(ValueError):
    """A report from which no caption can be had; the message says why."""


def decoded(data: bytes) -> str:
    """Text of UTF-8, or else of Windows' Latin."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def items(section: str, ends: str = ".:;") -> list[str]:
    """Lines of one item each: a line that begins no item, and follows one without an end mark, goes on with it.

    `ends` are the end marks; without any, an item reaches to the next bullet or empty line.
    """
    lines: list[str] = []
    for line in section.splitlines():
        if not line.strip():
            lines.append("")
        elif lines and lines[-1] and not BULLET.match(line) and lines[-1].rstrip()[-1] not in ends:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return lines
