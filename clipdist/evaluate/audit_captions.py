"""What captions repeat, within splits and across them, and how tokenizers cut them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.sets.survey import Survey
from clipdist.data.shards import BadSample
from clipdist.errors import UserError

SHOWN = 10
# Enough for figures of three digits; a tokenizer takes some 10,000 a second.
TOKENIZED = 100_000
TRAINED = "captions"


def caption_figures(survey: Survey) -> dict[str, Any]:
    """Of each split: captions, how many are distinct, the share that repeats another, the commonest, words; and for two
    splits the share of captions of the one that the other has as well."""
    text, split_of_M = survey.captions["text"], survey.rows.split_of[survey.owner_M]
    figures: dict[str, Any] = {"splits": {}, "shared": []}
    distinct = {}
    for number, name in enumerate(survey.rows.splits):
        own = split_of_M == number
        distinct[name], first, counts = np.unique(text[own], return_index=True, return_counts=True)
        rows = survey.rows.split_of == number
        known = rows & survey.rows.whole
        words = survey.captions["words"][own]
        figures["splits"][name] = {
            "samples": int(rows.sum()),
            "without": int((survey.samples["captions"][known] == 0).sum()),
            "captions": int(own.sum()),
            "distinct": len(counts),
            "duplicates": round(1 - len(counts) / max(1, int(own.sum())), 4),
            "commonest": [],
            "words": _spread(words),
        }
        for place in np.lexsort((first, -counts))[:SHOWN].tolist():
            if counts[place] > 1:
                found = _text(survey, int(np.flatnonzero(own)[first[place]]))
                share = round(int(counts[place]) / int(own.sum()), 4)
                one = {"text": found, "times": int(counts[place]), "share": share}
                figures["splits"][name]["commonest"].append(one)
    names = survey.rows.splits
    for name, other in ((a, b) for a in names for b in names if a != b):
        own = text[split_of_M == names.index(name)]
        if len(own):
            share = round(float(np.isin(own, distinct[other]).mean()), 4)
            figures["shared"].append({"of": name, "also_in": other, "share": share})
    return figures


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, [5, 50, 95])
    shown = {"mean": values.mean(), "5 %": low, "median": middle, "95 %": high, "longest": values.max()}
    return {name: round(float(value), 1) for name, value in shown.items()}


def _text(survey: Survey, caption: int) -> str:
    """A caption as it is written."""
    row = int(survey.owner_M[caption])
    try:
        texts = survey.rows.read(row).texts
        return texts[caption - int(np.searchsorted(survey.owner_M, row))]
    except (BadSample, IndexError):  # exchanged while this runs
        return "(unreadable)"


def drawn_captions(survey: Survey, most: int = TOKENIZED) -> list[str]:
    """Up to `most` captions, of samples at equal distances, so that all shards take part."""
    rows = np.unique(np.linspace(0, len(survey.rows) - 1, min(most, len(survey.rows))).astype(int))
    return list(_captions(survey, rows))[:most]


def _captions(survey: Survey, rows: Sequence[int] | np.ndarray) -> Iterator[str]:
    for row in rows:
        try:
            yield from survey.rows.read(int(row)).texts
        except BadSample:  # named among the unreadable
            continue


def tokenizer_figures(
    survey: Survey, names: Sequence[str], *, max_tokens: int, vocabulary: int, train_split: str = "train"
) -> list[dict[str, Any]]:
    """How each tokenizer cuts the captions: tokens per word and share of unknown ones, special tokens aside; tokens of
    the longest caption and the share of captions that `max_tokens` would cut, special tokens included.

    `names` are as in a recipe: a folder or name that transformers loads, `package://…`, or `captions`, which trains a
    WordPiece of at most `vocabulary` entries on the captions of `train_split` (or of the first split).
    """
    texts = drawn_captions(survey)
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise UserError(f"{survey.folder}: --tokenizer: no caption can be read")
    return [
        {"tokenizer": name, **_figures(_tokenizer(survey, name, max_tokens, vocabulary, train_split), texts, words)}
        for name in names
    ]


def _tokenizer(survey: Survey, name: str, max_tokens: int, vocabulary: int, train_split: str) -> Any:
    from clipdist.data.text import Tokenizer, train_wordpiece
    from clipdist.model.towers import first_line, resolve

    if name == TRAINED:
        splits = survey.rows.splits
        number = splits.index(train_split) if train_split in splits else 0
        return train_wordpiece(
            _captions(survey, np.flatnonzero(survey.rows.split_of == number)), vocabulary, max_tokens
        )
    source = Path(name) / "tokenizer" if (Path(name) / "tokenizer").is_dir() else resolve(name.removeprefix("hf:"))
    try:
        return Tokenizer.load(source, max_tokens)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {name}: no tokenizer at {source} ({first_line(error)}); name a folder, "
            f"package://PACKAGE/PATH or {TRAINED}"
        ) from None


def _figures(tokenizer: Any, texts: list[str], words: int) -> dict[str, Any]:
    fast = tokenizer.tokenizer
    special = fast.num_special_tokens_to_add()
    lengths, unknown, pieces = [], 0, Counter[int]()
    for at in range(0, len(texts), 1000):
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        for ids in fast(texts[at : at + 1000], **options)["input_ids"]:
            lengths.append(len(ids))
            unknown += sum(one == fast.unk_token_id for one in ids) if fast.unk_token_id is not None else 0
            pieces.update(ids)
    tokens, longest = sum(lengths), np.array(lengths) + special
    return {
        "vocabulary": len(tokenizer),
        "used": len(pieces),
        "captions": len(texts),
        "tokens_per_word": round(tokens / words, 3),
        "unknown": round(unknown / max(1, tokens), 5),
        "tokens": _spread(longest),
        "max_tokens": tokenizer.max_tokens,
        "cut": round(float((longest > tokenizer.max_tokens).mean()), 4),
    }
