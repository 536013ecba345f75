"""Tokenizers: whole domain words, the same vocabulary in every process, padding to the longest of a batch."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipdist.data.text import Tokenizer, train_wordpiece

CAPTIONS = [
    f"A {word} of the {site}, {extra}."
    for word in ("carcinoma", "nevus", "melanoma", "keratosis")
    for site in ("scalp", "trunk", "palm")
    for extra in ("pigmented", "ulcerated", "with telangiectasia")
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(CAPTIONS, 200, 12)


def test_domain_words_stay_whole(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokenizer.tokenize("Carcinoma with TELANGIECTASIA") == ["carcinoma", "with", "telangiectasia"]


def test_only_the_five_special_tokens_are_special(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.tokenizer.all_special_tokens) == 5
    assert tokenizer.tokenizer.tokenize("##a")[-1] == "a"


def test_every_process_learns_the_same_vocabulary() -> None:
    code = (
        "import hashlib, json; from tests.unit.test_text import CAPTIONS;"
        "from clipdist.data.text import train_wordpiece;"
        "vocabulary = train_wordpiece(CAPTIONS, 120, 12).tokenizer.get_vocab();"
        "print(hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1


def test_captions_are_cut_and_padded_to_the_longest(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["A nevus.", "word " * 50])
    assert [len(row) for row in ids] == [5, 12]
    tokens, mask = tokenizer.pad(ids[:1] * 2 + [ids[0][:3]])
    assert tokens.shape == (3, 5)
    assert mask.sum(1).tolist() == [5, 5, 3]
    assert tokens[2, 3:].tolist() == [tokenizer.pad_id] * 2


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer", 12)
    assert again.encode(CAPTIONS) == tokenizer.encode(CAPTIONS)
    assert again.pad_id == tokenizer.pad_id
