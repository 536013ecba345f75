"""Captions that are longer than a text tower reads -> captions that fit, by a summarising model or by their own best
sentences; either way the whole caption stays beside the short one.

A summary is made once: it is kept under its text's hash, so that an interrupted run goes on, and another packing of the
same captions needs no model at all.
"""

import argparse
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from clipdist.data.captions import sentences
from clipdist.data.sets.pack import Pair
from clipdist.errors import UserError, disk_errors
from clipdist.model.towers import first_line, resolve
from clipdist.progress import progress
from clipdist.train.records import read_records
from clipdist.user_cache import user_cache

PREFIX = "summarize: "
"""What T5 was trained to read ahead of a text that is to be summarised (Raffel et al. 2020, arXiv 1910.10683)."""
LONGEST_INPUT = 512
"""Tokens; what T5 was trained on."""
WHOLE_TEXT = "whole_text"
"""The field beside a condensed caption that has all of it."""
GENERATION: dict[str, Any] = {"num_beams": 4, "do_sample": False, "no_repeat_ngram_size": 3, "early_stopping": True}
WORD = re.compile(r"\w+|[^\w\s]")
LETTERS_PER_TOKEN = 4

Count = Callable[[str], int]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Condensed:
    """`texts` in the order of the captions; `notes`, for the manifest, say by what and how many."""

    texts: list[str]
    notes: dict[str, Any]


@dataclass
class Condenser:
    """Shortens captions to at most `max_tokens` tokens, special tokens included.

    `model` is a T5 or another encoder-decoder of Hugging Face, `hf:<name or folder>` or `package://<package>/<folder>`;
    empty: by sentences alone. `tokenizer` is what counts, that of the text tower; empty: the model's own. Where the
    model or the tokenizer cannot be had, sentences are chosen and tokens estimated instead; a warning and the notes
    say so. `cache` is the folder in which summaries are kept.
    """

    max_tokens: int
    model: str = "hf:t5-small"
    tokenizer: str = ""
    cache: Path | None = None
    device: str = ""
    batch: int = 16
    _lacking: list[str] = field(default_factory=list, init=False)

    def __call__(self, captions: Sequence[str], *, quiet: bool = False) -> Condensed:
        """Raises `UserError` for a limit below 8 tokens, for names that no model has, and where the cache cannot be
        written."""
        if self.max_tokens < 8:
            raise UserError(f"captions of at most {self.max_tokens} tokens: expected 8 or more")
        self._lacking.clear()
        own = self._load(AutoTokenizer, self.model) if self.model else None
        counting = self._load(AutoTokenizer, self.tokenizer) if self.tokenizer else own
        count = _counter(counting) if counting is not None else estimated_tokens
        long = list(dict.fromkeys(text for text in captions if count(text) > self.max_tokens))
        weights = _rarity(captions)
        short: dict[str, str] = {}
        if long and own is not None:
            short = self._summaries(long, own, weights, quiet)
        how: Counter[str] = Counter()
        for text in long:
            summary = short.get(text, "")
            how["summarised" if summary else "extracted"] += 1
            short[text] = extract(summary or text, self.max_tokens, count, weights)
        for lack in self._lacking:
            logger.warning("%s", lack)
        notes: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "tokens_counted_by": (self.tokenizer or self.model) if counting is not None else "estimate",
            "model": self.model if own is not None and how["summarised"] else "",
            "captions": len(captions),
            "whole": sum(text not in short for text in captions),
            "distinct_condensed": dict(how),
        }
        if self._lacking:
            notes["instead_of_a_model"] = list(self._lacking)
        return Condensed([short.get(text, text) for text in captions], notes)

    def _load(self, kind: Any, name: str, **options: Any) -> Any:
        """None where it cannot be had."""
        source = _source(name)
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            what = "tokenizer" if kind is AutoTokenizer else "model"
            instead = "tokens are estimated" if what == "tokenizer" else "sentences are chosen"
            lack = f"{name}: its {what} cannot be had ({first_line(error)}); {instead} instead"
            if lack not in self._lacking:
                self._lacking.append(lack)
            return None

    def _summaries(self, texts: list[str], tokenizer: Any, weights: dict[str, float], quiet: bool) -> dict[str, str]:
        """Text -> summary, of those that the cache has or the model can make; it may be empty, or still too long."""
        count = _counter(tokenizer)
        # What the model would not read to its end is shortened for it.
        room = LONGEST_INPUT - count(PREFIX)
        inputs = {text: extract(text, room, count, weights) for text in texts}
        folder = self.cache or user_cache("captions")
        had, keep = _kept(folder / f"{_digest(self.model, str(self.max_tokens), json.dumps(GENERATION))}.jsonl")
        keys = {text: _digest(text) for text in texts}
        missing = sorted((text for text in texts if keys[text] not in had), key=lambda text: count(inputs[text]))
        model = self._load(AutoModelForSeq2SeqLM, self.model, dtype=torch.float32) if missing else None
        if model is not None:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            model = model.eval().to(device)
            # Of about the same length side by side: padding is work, too.
            groups = [missing[first : first + self.batch] for first in range(0, len(missing), self.batch)]
            for group in progress(groups, unit="batch", description="condensing captions", quiet=quiet):
                made = _generate(model, tokenizer, [inputs[text] for text in group], self.max_tokens)
                keep({keys[text]: summary for text, summary in zip(group, made, strict=True)})
        return {text: had[keys[text]] for text in texts if keys[text] in had}


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[str]:
    inputs = tokenizer([PREFIX + text for text in texts], return_tensors="pt", padding=True).to(model.device)
    inputs.pop("token_type_ids", None)
    made = model.generate(**inputs, max_new_tokens=max_tokens, **GENERATION)
    return [" ".join(text.split()) for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def _kept(path: Path) -> tuple[dict[str, str], Callable[[dict[str, str]], None]]:
    """(what is kept there, what adds to it). One line for each, so that a kill loses the batch under way alone."""
    had = {record["key"]: record["text"] for record in read_records(path)[0] if {"key", "text"} <= record.keys()}
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)

    def keep(made: dict[str, str]) -> None:
        had.update(made)
        lines = [json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n" for key, text in made.items()]
        # One write: another process may add to the file, too. The line before may have been torn.
        with disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write("\n" + "".join(lines))

    return had, keep


def extract(text: str, max_tokens: int, count: Count, weights: dict[str, float] | None = None) -> str:
    """The sentences of `text` that say most of what it says, in their order, as far as they fit; `text` itself where it
    does. A sentence that is too long by itself is cut after a word.

    Sentences are taken by the cosine of their words with the whole text's, each word counted by its `weights` (1 where
    it has none): the centroid of Radev et al. 2004 (Information Processing & Management 40).
    """
    if count(text) <= max_tokens:
        return text
    parts = sentences(text)
    vectors = [_vector(part, weights or {}) for part in parts]
    whole = _vector(text, weights or {})
    order = sorted(range(len(parts)), key=lambda number: (-_cosine(vectors[number], whole), number))
    chosen: list[int] = []
    for number in order:
        if count(" ".join(parts[place] for place in sorted([*chosen, number]))) <= max_tokens:
            chosen.append(number)
    if chosen:
        return " ".join(parts[place] for place in sorted(chosen))
    words = parts[order[0]].split()
    low, high = 0, len(words)  # the most words that fit, by halving
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(" ".join(words[:middle])) <= max_tokens else (low, middle - 1)
    return " ".join(words[: max(low, 1)])


def estimated_tokens(text: str) -> int:
    """Of a word-piece tokenizer, about: a token for every four letters of a word, and the two special ones. Rather too
    many than too few."""
    return 2 + sum(-(-len(word) // LETTERS_PER_TOKEN) for word in WORD.findall(text))


def condense_pairs(
    pairs: Sequence[Pair], condenser: Condenser, *, quiet: bool = False
) -> tuple[list[Pair], dict[str, Any]]:
    """(the pairs with captions that fit, notes for the manifest). A caption that was condensed stays whole in the field
    `whole_text`, a list as `text` is."""
    condensed = condenser([text for pair in pairs for text in pair.text], quiet=quiet)
    texts = iter(condensed.texts)
    found = []
    for pair in pairs:
        short = [next(texts) for _ in pair.text]
        fields = pair.fields if short == pair.text else {**pair.fields, WHOLE_TEXT: pair.text}
        found.append(replace(pair, text=short, fields=fields))
    return found, condensed.notes


def add_condensing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--condense", type=int, default=0, metavar="TOKENS", help="shorten captions that are longer; default: none"
    )
    parser.add_argument("--condenser", default="hf:t5-small", help="by this model; '' by their best sentences alone")
    parser.add_argument(
        "--condense-by", default="", metavar="NAME", help="whose tokens count; default: the condenser's"
    )


def condensed_by(args: argparse.Namespace, pairs: list[Pair]) -> tuple[list[Pair], dict[str, Any]]:
    """What the arguments ask for; the pairs as they are, and no notes, where that is nothing."""
    if not args.condense:
        return pairs, {}
    found, notes = condense_pairs(pairs, Condenser(args.condense, args.condenser, args.condense_by))
    return found, {"condensed": notes}


def _source(name: str) -> str:
    kind, _, rest = name.partition(":")
    if name.startswith("package://"):
        return str(resolve(name))
    if kind != "hf" or not rest:
        raise UserError(f"{name!r}: expected hf:<name or folder> or package://<package>/<folder>")
    return rest


def _counter(tokenizer: Any) -> Count:
    return lambda text: len(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def _rarity(texts: Sequence[str]) -> dict[str, float]:
    """Of each word, the logarithm of how few of the captions have it."""
    having: Counter[str] = Counter()
    for text in texts:
        having.update(set(_words(text)))
    return {word: math.log((1 + len(texts)) / (1 + number)) + 1 for word, number in having.items()}


def _words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text) if word[0].isalnum()]


def _vector(text: str, weights: dict[str, float]) -> dict[str, float]:
    return {word: number * weights.get(word, 1.0) for word, number in Counter(_words(text)).items()}


def _cosine(one: dict[str, float], other: dict[str, float]) -> float:
    inner = sum(value * other.get(word, 0.0) for word, value in one.items())
    norms = math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in other.values()))
    return inner / norms if norms else 0.0


def _digest(*parts: str) -> str:
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())
