"""Captions of a training step: the choice among several, sentences, and changes that are off by default."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdist.data.captions import CaptionAugmentConfig, augment_caption, choose, sentences

REPORT = "Lungs are clear. Heart of 3.5 cm, normal size! No effusion seen"


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_sentences_end_at_marks_not_at_decimal_points() -> None:
    assert sentences(REPORT) == ["Lungs are clear.", "Heart of 3.5 cm, normal size!", "No effusion seen"]
    assert sentences("Seen by B. Smith. Benign.") == ["Seen by B. Smith.", "Benign."]
    assert sentences("a lesion") == ["a lesion"]


@pytest.mark.parametrize("choice", ["random", "first", "sentence"])
def test_every_choice_draws_once(choice: str) -> None:
    generator = draw()
    choose(["a", "b", "c"], choice, generator)  # type: ignore[arg-type]
    reference = draw()
    reference.random()
    assert generator.random() == reference.random()


def test_all_captions_and_all_sentences_are_chosen_evenly() -> None:
    generator = draw()
    counts = dict.fromkeys(["one", *sentences(REPORT)], 0)
    for _ in range(3000):
        counts[choose(["one", REPORT], "sentence", generator)] += 1
    assert 1350 < counts["one"] < 1650
    assert all(400 < counts[part] < 600 for part in sentences(REPORT))


@given(st.lists(st.sampled_from(["a", "b.", "cc", "d!"]), min_size=1, max_size=12), st.integers(0, 1000))
def test_changed_captions_keep_to_their_words(words: list[str], seed: int) -> None:
    text = " ".join(words)
    shuffled = augment_caption(text, CaptionAugmentConfig(shuffle_sentences=1.0), draw(seed))
    assert sorted(shuffled.split()) == sorted(words)
    thinned = augment_caption(text, CaptionAugmentConfig(word_dropout=1.0), draw(seed)).split()
    assert len(thinned) == 1
    assert thinned[0] in words
    assert augment_caption(text, CaptionAugmentConfig(), draw(seed)) == text


def test_word_dropout_leaves_out_its_share() -> None:
    config = CaptionAugmentConfig(word_dropout=0.3)
    kept = len(augment_caption("word " * 2000, config, draw()).split())
    assert 1300 < kept < 1500
