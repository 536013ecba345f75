"""Tokenizers: whole domain words, the same vocabulary in every process, padding to the longest of a batch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError

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


WORDS = st.text(st.sampled_from("abcé.,-'红斑疹한글🙂 "), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=12), st.integers(6, 60))
def test_a_vocabulary_is_as_large_as_asked_at_most(captions: list[str], vocabulary: int) -> None:
    try:
        found = train_wordpiece(captions, vocabulary, 12)
    except UserError as error:
        least = int(re.search(r"expected at least ([\d,]+)", str(error))[1].replace(",", ""))  # type: ignore[index]
        assert least > vocabulary
        vocabulary = least
        found = train_wordpiece(captions, least, 12)
        assert len(found) == least
    assert len(found) <= vocabulary
    unknown = found.tokenizer.unk_token_id
    assert all(unknown not in ids for ids in found.encode(captions or [""]))


def test_letters_of_ideographs_are_words_and_too_many_are_refused() -> None:
    captions = [f"红斑 {chr(0x4E00 + number)}{chr(0x5000 + number)}" for number in range(300)]
    whole = train_wordpiece(captions, 700, 77)
    assert len(whole) <= 700
    assert whole.tokenizer.tokenize("红斑") == ["红", "斑"]
    assert not [token for token in whole.tokenizer.get_vocab() if token.startswith("##")]
    with pytest.raises(UserError, match=r"vocabulary: found 512 entries, expected at least 60\d.* letters"):
        train_wordpiece(captions, 512, 77)
