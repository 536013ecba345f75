"""Captions -> token ids: the text tower's own tokenizer, or a WordPiece trained on the set's captions."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from clipdist.data.shards import BadSample, Split
from clipdist.errors import UserError

UNKNOWN = "[UNK]"
SPECIAL = ["[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"]
MOST_CAPTIONS = 1_000_000


class Tokenizer:
    """A Hugging Face tokenizer with a fixed longest length. Ids are int64; padding happens per batch, not here."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, fill: bool = False) -> None:
        """`fill`: every caption gets as many tokens, by padding that counts as text."""
        self.tokenizer, self.max_tokens, self.fill = tokenizer, max_tokens, fill
        if tokenizer.pad_token_id is None:
            # Decoder-style tokenizers have none; the attention mask hides whichever id stands there.
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = int(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to `max_tokens`."""
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            padding="max_length" if self.fill else False,
            return_attention_mask=False,
        )
        return encoded["input_ids"]

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(token_ids_bT, attention_mask_bT), both int64 [b, T], T being the longest of these."""
        longest = max(map(len, ids))
        tokens = np.full((len(ids), longest), self.pad_id, np.int64)
        mask = np.zeros((len(ids), longest), np.int64)
        for row, sequence in enumerate(ids):
            tokens[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    @staticmethod
    def load(name_or_folder: str | Path, max_tokens: int, fill: bool = False) -> "Tokenizer":
        return Tokenizer(AutoTokenizer.from_pretrained(str(name_or_folder)), max_tokens, fill)


def train_wordpiece(captions: Iterable[str], vocabulary: int, max_tokens: int, fill: bool = False) -> Tokenizer:
    """A lower-casing BERT-style WordPiece with at most `vocabulary` entries, learned from the first million `captions`.

    A field's own words ("carcinoma", "telangiectasia") become whole tokens, where a general vocabulary
    breaks them into pieces. Equal captions in equal order give an equal vocabulary, in every process. Raises
    `UserError` when not even the letters fit: what is left out of a vocabulary makes its whole word unknown.
    """
    texts = list(islice(captions, MOST_CAPTIONS))
    learner = _bert_style(models.WordPiece(unk_token=UNKNOWN))
    # The trainer numbers the "##x" of single letters in the order of a hash map, which differs between processes, and
    # breaks ties between merges by those numbers (tokenizers issue 1794). Named as special tokens, they get their
    # numbers here; a fresh tokenizer around the learned vocabulary then forgets that they were special.
    parts = _parts(learner, texts)
    letters = {letter for part in parts for letter in part}
    continuing = [f"##{letter}" for letter in sorted({letter for part in parts for letter in part[1:]})]
    least = len(SPECIAL) + len(letters) + len(continuing)
    if least > vocabulary:  # the trainer would go beyond it
        raise UserError(
            f"vocabulary: found {vocabulary:,} entries, expected at least {least:,}: the captions have "
            f"{len(letters):,} letters and marks, {len(continuing):,} of them inside words; raise model.text.vocabulary"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[*SPECIAL, *continuing], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    fast = _bert_style(models.WordPiece(learner.get_vocab(), unk_token=UNKNOWN))
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, fast.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        unk_token=UNKNOWN,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_tokens,
    )
    return Tokenizer(wrapped, max_tokens, fill)


def _parts(learner: FastTokenizer, texts: Iterable[str]) -> set[str]:
    """The words, marks and single ideographs that no token spans."""
    words: set[str] = set()
    for text in texts:
        words.update(learner.normalizer.normalize_str(text).split())
    return {part for word in words for part, _ in learner.pre_tokenizer.pre_tokenize_str(word)}


def _bert_style(model: models.WordPiece) -> FastTokenizer:
    fast = FastTokenizer(model)
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return fast


def captions_of(split: Split) -> Iterator[str]:
    """Every caption of a split, in order; unreadable samples are passed over here, since the loader names them."""
    for number in range(len(split)):
        try:
            yield from split.read(number).texts
        except BadSample:
            continue
