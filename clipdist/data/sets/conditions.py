"""`--where` of `clipdist repack`: small conditions on a sample's fields, parsed, never evaluated as code."""

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clipdist.errors import UserError

EXPRESSION = re.compile(r"\s*([\w./:-]+?)\s*(==|!=|<=|>=|<|>|\s(?:not\s+)?in\s)\s*(.+?)\s*", re.S)
ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """`field operator value`; `holds` tells whether a sample's fields meet it."""

    field: str
    operator: str
    value: Any

    def __str__(self) -> str:
        return f"{self.field} {self.operator} {json.dumps(self.value, ensure_ascii=False)}"

    def holds(self, fields: dict[str, Any]) -> bool:
        """A field that is a list meets a condition when one of its items does, and `!=` when none is equal.

        A missing field meets `!=` and `not in` alone. Order holds between two numbers, or two strings.
        """
        found = fields.get(self.field)
        items = found if isinstance(found, list) else [] if found is None else [found]
        if self.operator in ("!=", "not in"):
            return not any(self._is_equal(item) for item in items)
        if self.operator in ("==", "in"):
            return any(self._is_equal(item) for item in items)
        return any(_comparable(item, self.value) and ORDER[self.operator](item, self.value) for item in items)

    def _is_equal(self, item: Any) -> bool:
        wanted = self.value if self.operator.endswith("in") else [self.value]
        # 7 and "7" are equal: whether a column was stored as numbers shows in no command line.
        return any(item == value or _written(item) == _written(value) for value in wanted)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _comparable(item: Any, value: Any) -> bool:
    return (_is_number(item) and _is_number(value)) or (isinstance(item, str) and isinstance(value, str))


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse_condition(text: str) -> Condition:
    """`age >= 18`, `label == nevus`, `source in a,b`, `label in ["a", "b"]` -> a condition; `UserError` for other text.

    A value that is JSON is that value (a number, a quoted string, true, a list), anything else the text as it stands.
    """
    match = EXPRESSION.fullmatch(text)
    if not match:
        raise UserError(
            f"--where: found {text!r}, expected FIELD OPERATOR VALUE with one of == != < <= > >= in, 'not in', "
            f"such as 'age >= 18'"
        )
    name, sign, written = match[1], " ".join(match[2].split()), match[3]
    try:
        value = json.loads(written)
    except ValueError:
        value = [_value(part.strip()) for part in written.split(",")] if sign.endswith("in") else written
    if sign.endswith("in") and not isinstance(value, list):
        value = [value]
    if sign in ORDER and not (_is_number(value) or isinstance(value, str)):
        raise UserError(f"--where {text!r}: {sign} compares with a number or a text, found {written}")
    return Condition(name, sign, value)


def _value(written: str) -> Any:
    try:
        return json.loads(written)
    except ValueError:
        return written
