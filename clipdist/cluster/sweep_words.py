"""The words of a sweep, `key=…`, and the combinations of values that they mean. What can be written, and what it means,
stands in launch/sweep.py."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clipdist.errors import UserError

SEARCHES = ("log", "uniform", "choice", "range")
NOT_SEARCHED = {
    "name": "each run is named after its values; --name names the sweep",
    "runs": "all runs of a sweep lie in one folder",
    "resume": "it defines no run",
    "small": "it changes other keys",
    "evaluate.monitor": "it is what the runs are compared by",
}
JOIN = "+"
_DIGITS = 6
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Key:
    """A key and the values that it takes, as texts in YAML: one is the same for all runs, several make a grid. With
    `search`, log or uniform, a value is drawn between the numbers `ends`; with choice or range, one of `texts`.

    Several keys joined by + take their values together: each text is a list with one for each of them."""

    key: str
    texts: tuple[str, ...] = ()
    search: str = ""
    ends: tuple[float, float] = (0.0, 0.0)

    @property
    def varies(self) -> bool:
        return bool(self.search) or len(self.texts) > 1

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that are meant: one, or several together."""
        return tuple(self.key.split(JOIN))

    def words(self, text: str) -> list[str]:
        """The `key=value` words of one of its texts."""
        values = [text] if len(self.names) == 1 else _members(text, self.names, self.key)
        return [f"{name}={value}" for name, value in zip(self.names, values, strict=True)]

    def draw(self, seed: int, number: int) -> str:
        """The value of draw `number`, which depends on the key, `seed` and `number` alone."""
        share = _share(seed, number, self.key)
        if self.texts:
            return self.texts[int(share * len(self.texts))]
        low, high = self.ends
        if self.search == "log":
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        # Few digits, so that a run can be named after the whole value; rounded, it may lie beyond an end.
        return repr(min(max(float(f"{value:.{_DIGITS}g}"), low), high))


def read_words(words: Sequence[str]) -> list[Key]:
    """Each word as what it means, in their order. Raises `UserError` for one that means nothing."""
    keys = [_read_word(word) for word in words]
    names = [name for key in keys for name in key.names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: given twice; write all values in one word, such as {twice[0]}=1,2")
    return keys


def count(keys: Sequence[Key], draws: int) -> int:
    """How many combinations there are at most: draws may coincide."""
    return max(1, draws) * math.prod(len(key.texts) for key in keys if not key.search)


def combinations(keys: Sequence[Key], draws: int, seed: int) -> Iterator[list[str]]:
    """The `key=value` words of each run, in the order of `keys`. All combinations of the grids, the last key varying
    fastest, with the first draw of the searches, then all with the second, and so on."""
    for number in range(max(1, draws)):
        texts = [(key.draw(seed, number),) if key.search else key.texts for key in keys]
        for combination in itertools.product(*texts):
            yield [word for key, text in zip(keys, combination, strict=True) for word in key.words(text)]


def run_name(values: dict[str, Any]) -> str:
    """Of the run with these values: readable, safe as the name of a folder, and the same whatever other runs the sweep
    has. The digits at its end tell apart what looks alike when it is shortened."""
    stem = "_".join(f"{short(key)}={_slug(value)}" for key, value in sorted(values.items()))
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{stem[:100]}_{digest}"


def short(key: str) -> str:
    """The last two parts of a dotted key: `name` alone would not say whose."""
    return ".".join(key.split(".")[-2:])


def shown(value: Any) -> str:
    """A value as short as it can be told from others: numbers without needless digits, towers without their library."""
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    if isinstance(value, str):
        return re.split(r"[:/]", value.rstrip("/"))[-1] or value
    return json.dumps(value, ensure_ascii=False)


def in_a_cell(value: Any) -> Any:
    """As a CSV holds it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _slug(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", shown(value)).strip("-" if isinstance(value, str) else "")[:32]


def _read_word(word: str) -> Key:
    key, equals, value = word.partition("=")
    value = value.strip()
    if not equals or not key:
        raise UserError(f"{word!r}: expected key=value, such as optim.lr=1e-4,3e-4")
    if not value:
        raise UserError(f"{word!r}: no value; expected some, such as {key}=1,2 (null is none)")
    texts = _split(value, word)
    called = [re.fullmatch(r"([A-Za-z_]+)\((.*)\)", text, re.DOTALL) for text in texts]
    if not any(called):
        found = Key(key, tuple(texts))
    elif len(texts) > 1:
        raise UserError(f"{word!r}: {', '.join(SEARCHES)} stand alone, not among other values; quote what is a text")
    else:
        (call,) = called
        assert call
        found = _read_search(key, call[1], call[2], word)
    for name in found.names:
        if found.varies and (why := NOT_SEARCHED.get(name)):
            raise UserError(f"{word!r}: {name} cannot be searched over: {why}")
        if name == "name":
            raise UserError(f"{word!r}: {NOT_SEARCHED[name]}")
    if len(found.names) > 1:
        if found.search not in ("", "choice"):
            raise UserError(f"{word!r}: keys together take lists of values, not numbers of {found.search}")
        for text in found.texts:
            _members(text, found.names, word)
    return found


def _members(text: str, names: Sequence[str], word: str) -> list[str]:
    """The values in a list, one for each name."""
    inside = text.strip()
    parts = _split(inside[1:-1], word) if inside.startswith("[") and inside.endswith("]") else []
    if len(parts) != len(names) or not all(names):
        raise UserError(
            f"{word!r}: found {text}, expected a list with a value for each of {', '.join(names)}, such as "
            f"[{','.join('…' for _ in names)}]"
        )
    return parts


def _read_search(key: str, kind: str, inside: str, word: str) -> Key:
    if kind not in SEARCHES:
        raise UserError(f"{word!r}: no function {kind}; one of: {', '.join(SEARCHES)}; quote what is a text")
    texts = _split(inside, word) if inside.strip() else []
    if kind == "choice":
        if not texts:
            raise UserError(f"{word!r}: nothing to choose from; expected values, such as choice(256,512)")
        return Key(key, tuple(texts), kind)
    expected = 3 if kind == "range" else 2
    form = "range(first,last,step)" if kind == "range" else f"{kind}(low,high)"
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != expected or not all(map(math.isfinite, numbers)):
        raise UserError(f"{word!r}: expected {form} with {expected} numbers")
    if kind == "range":
        return Key(key, _range(texts, numbers, word), kind)
    low, high = numbers
    if low >= high or (kind == "log" and low <= 0):
        raise UserError(f"{word!r}: expected {'0 < ' if kind == 'log' else ''}low < high, found {low:g} and {high:g}")
    return Key(key, (), kind, (low, high))


def _range(texts: list[str], numbers: list[float], word: str) -> tuple[str, ...]:
    first, last, step = numbers
    if not step or (last - first) / step < 0:
        raise UserError(f"{word!r}: no step of {step:g} leads from {first:g} to {last:g}")
    steps = int((last - first) / step + 1e-9) + 1
    if steps > 1_000_000:
        raise UserError(f"{word!r}: {steps:,} values; use uniform or log")
    if all(re.fullmatch(r"[-+]?\d+", text) for text in texts):
        return tuple(str(int(first) + number * int(step)) for number in range(steps))
    return tuple(repr(float(f"{first + number * step:.12g}")) for number in range(steps))


def _split(text: str, word: str) -> list[str]:
    """The parts between the commas that stand in no brackets and no quotes. As in YAML, a quotation mark is one at the
    beginning of a text alone."""
    parts, closers, quote, before = [""], "", "", ","
    characters = iter(range(len(text)))
    for place in characters:
        letter = text[place]
        if quote:
            escaped = letter == "\\" if quote == '"' else text[place : place + 2] == "''"
            if escaped:
                parts[-1] += letter + text[place + 1 : place + 2]
                next(characters, None)
                continue
            quote = "" if letter == quote else quote
        elif letter in "'\"" and before in ",:" + _OPEN:
            quote = letter
        elif letter in _OPEN:
            closers += _CLOSE[_OPEN.index(letter)]
        elif letter in _CLOSE:
            if not closers.endswith(letter):
                raise UserError(f"{word!r}: {letter} closes nothing; quote what is a text")
            closers = closers[:-1]
        before = before if letter.isspace() else letter
        if letter == "," and not closers and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if quote or closers:
        raise UserError(f"{word!r}: {quote or closers[-1]} is missing; quote what is a text")
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise UserError(f"{word!r}: a value is missing beside a comma (null is none, '' an empty text)")
    return parts


def _share(seed: int, number: int, key: str) -> float:
    """In [0, 1), evenly."""
    digest = hashlib.blake2b(f"{seed} {number} {key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
