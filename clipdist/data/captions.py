"""Which caption a training step uses, and random changes of it; all off by default but for the choice."""

import re
from typing import Literal

import numpy as np

from clipdist.settings import Share, settings

CaptionChoice = Literal["random", "first", "sentence"]

# A full stop between digits ("3.5 mm"), after a single letter ("B. Smith"), after a digit that begins a sentence
# ("2. Edema", but not "grade 2."), or after the abbreviation of a title ("Dr. Smith") or of versus ends no sentence.
SENTENCE_END = re.compile(
    r"(?<=[.!?;])(?<!\b[^\W\d]\.)(?<!^\d\.)(?<![.!?;:]\s\d\.)(?<!\b(?:[DM]r|Ms|vs)\.)(?<!\bMrs\.)\s+(?=\S)"
)


@settings
class CaptionAugmentConfig:
    """Random changes of a training caption. A caption whose every word counts (a diagnosis) is best left alone."""

    word_dropout: Share = 0.0
    """Probability that a word is left out; at least one stays."""
    shuffle_sentences: Share = 0.0
    """Probability that a caption's sentences come in another order."""
    mixgen: Share = 0.0
    """Probability that a pair is joined with the next one of its lane: the mean of both images, both captions one
    after the other (MixGen, Hao et al. 2022, arXiv 2206.08358). Costs a second decoding."""

    @property
    def changes_text(self) -> bool:
        return bool(self.word_dropout or self.shuffle_sentences)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a text without an end mark is one sentence."""
    return [part for part in SENTENCE_END.split(text.strip()) if part]


def choose(texts: list[str], choice: CaptionChoice, draw: np.random.Generator) -> str:
    """One of a sample's captions: any, the first, or any sentence of any of them (as ConVIRT samples reports: Zhang et
    al. 2020, arXiv 2010.00747, section 4). Draws once, whatever the choice."""
    number = draw.random()
    if choice == "first":
        return texts[0]
    picked = number * len(texts)
    text = texts[int(picked)]
    if choice == "random":
        return text
    parts = sentences(text)
    return parts[int((picked % 1) * len(parts))]


def augment_caption(text: str, config: CaptionAugmentConfig, draw: np.random.Generator) -> str:
    """`text` with what `config` switches on. `draw` must be this sample's own, apart from the one for pixels."""
    if config.shuffle_sentences and draw.random() < config.shuffle_sentences:
        parts = sentences(text)
        text = " ".join(parts[number] for number in draw.permutation(len(parts)))
    if config.word_dropout:
        words = text.split()
        chances = draw.random(len(words))
        # The likeliest to stay does stay: an empty caption describes nothing.
        kept = (chances >= config.word_dropout) | (chances == chances.max())
        text = " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
    return text
