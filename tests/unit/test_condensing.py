"""Long captions made short: by a model, once, through a kill; by their own sentences where there is none."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from clipdist.data.sets.pack import Pair
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.prepare import captions as module
from clipdist.prepare.captions import Condenser, condense_pairs, estimated_tokens, extract
from tests.unit.test_skincap import CSV, ROOT, write_layout

LONG = [
    f"Lesion {number} is a red plaque with scales. It was seen {number} days ago, at noon. The patient likes tea. "
    f"The red plaque has a sharp border and silver scales, and it itches at night."
    for number in range(12)
]
SHORT = "A red plaque."


@pytest.fixture(scope="session")
def summariser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with random weights, which summarises by nonsense, and a tokenizer of these captions."""
    folder = tmp_path_factory.mktemp("t5")
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator([*LONG, module.PREFIX], trainer)
    trained.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=len(tokenizer), **sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def condenser(summariser: Path, cache: Path, **options: Any) -> Condenser:
    return Condenser(**{"max_tokens": 24, "model": f"hf:{summariser}", "cache": cache, **options})


def made_alone(summariser: Path, text: str, max_tokens: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(summariser)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(summariser)
    ids = model.generate(
        **tokenizer(f"summarize: {text}", return_tensors="pt"),
        max_new_tokens=max_tokens,
        num_beams=4,
        no_repeat_ngram_size=3,
        early_stopping=True,
    )
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def test_what_is_long_is_summarised_and_what_is_short_stays(summariser: Path, tmp_path: Path) -> None:
    count = len(transformers.AutoTokenizer.from_pretrained(summariser)(SHORT)["input_ids"])
    assert count <= 24
    found = condenser(summariser, tmp_path)([SHORT, *LONG[:3], LONG[0]], quiet=True)
    assert found.texts[0] == SHORT
    assert found.texts[1] == found.texts[4]
    for text, short in zip(LONG[:3], found.texts[1:], strict=False):
        alone = made_alone(summariser, text, 24)
        assert short == extract(alone, 24, lambda text: len(tokens(summariser, text)))
    assert found.notes["distinct_condensed"] == {"summarised": 3}
    assert (found.notes["captions"], found.notes["whole"]) == (5, 1)
    assert "instead_of_a_model" not in found.notes


def tokens(folder: Path, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_a_kill_loses_one_batch_and_a_torn_line_nothing_more(
    summariser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = condenser(summariser, tmp_path / "whole", batch=5)(LONG, quiet=True)
    real, calls = module._generate, []

    def killed(*args: Any) -> list[str]:
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        condenser(summariser, tmp_path / "kept", batch=5)(LONG, quiet=True)
    (path,) = (tmp_path / "kept").glob("*.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "to')
    assert condenser(summariser, tmp_path / "kept", batch=5)(LONG, quiet=True) == whole
    assert calls == [5, 5, 2, 2]
    monkeypatch.setattr(module, "AutoModelForSeq2SeqLM", None)
    assert condenser(summariser, tmp_path / "kept", batch=5)(LONG, quiet=True) == whole, "without any model"


def test_another_limit_makes_other_summaries(summariser: Path, tmp_path: Path) -> None:
    condenser(summariser, tmp_path)(LONG[:2], quiet=True)
    condenser(summariser, tmp_path, max_tokens=20)(LONG[:2], quiet=True)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


@pytest.mark.parametrize("model", ["hf:/nowhere/t5", ""])
def test_without_weights_sentences_are_chosen_and_that_is_said(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pairs = [Pair(str(number), b"", [text, SHORT]) for number, text in enumerate(LONG)]
    found, notes = condense_pairs(pairs, Condenser(40, model, cache=tmp_path), quiet=True)
    for pair, before in zip(found, LONG, strict=True):
        assert pair.text[1] == SHORT
        assert all(sentence in before for sentence in pair.text[0].split(". "))
        assert estimated_tokens(pair.text[0]) <= 40
        assert pair.fields == {"whole_text": [before, SHORT]}
    assert notes["tokens_counted_by"] == "estimate"
    assert notes["distinct_condensed"] == {"extracted": 12}
    assert ("instead_of_a_model" in notes) == bool(model)
    assert bool(caplog.records) == bool(model)


def test_the_sentences_that_say_most_are_taken() -> None:
    """What a word tells follows from how few captions have it."""
    tea, plaque, itch = "The patient likes tea.", "A red plaque with red scales.", "The red plaque itches."
    text = f"{tea} {plaque} {itch}"

    def count(text: str) -> int:
        return len(text.split())

    assert extract(text, 10, count) == f"{plaque} {itch}"
    assert extract(text, 6, count) == itch
    rare = {"tea": 30.0, "likes": 30.0}
    assert extract(text, 6, count, rare) == tea
    assert extract("One sentence that is long, and has no end", 4, count) == "One sentence that is"


@given(st.text(), st.integers(8, 40))
def test_an_extract_fits_and_makes_nothing_up(text: str, limit: int) -> None:
    def count(text: str) -> int:
        return len(text.split())

    short = extract(text, limit, count)
    assert count(short) <= limit
    words = iter(text.split())
    assert all(word in words for word in short.split()), "its words, in their order"
    if count(text) <= limit:
        assert short == text


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 4 tokens: expected 8 or more"):
        Condenser(4)([SHORT])
    with pytest.raises(UserError, match="'t5-small': expected hf:"):
        Condenser(40, "t5-small", cache=tmp_path)(LONG)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="package 'nowhere' is not installed"):
        Condenser(40, "package://nowhere/t5", cache=tmp_path)(LONG)


def test_skincap_condensed(summariser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_layout(tmp_path / "raw")
    table["caption_zh_polish_en"] = [LONG[number % 12] for number in range(len(table))]
    table.to_csv(tmp_path / "raw" / CSV, index=False, encoding="utf-8-sig")
    monkeypatch.setenv("CLIPDIST_CACHE", str(tmp_path / "cache"))
    words = ["--condense", "24", "--condenser", f"hf:{summariser}", "--workers", "0"]
    script = [sys.executable, "shards/skincap.py", str(tmp_path / "raw"), "--out", str(tmp_path / "set"), *words]
    subprocess.run(script, cwd=ROOT, check=True, capture_output=True, timeout=240)
    assert list((tmp_path / "cache").rglob("*.jsonl"))
    packed = ShardSet.open(tmp_path / "set")
    notes = json.loads((tmp_path / "set" / "manifest.json").read_text())["notes"]["condensed"]
    assert notes["distinct_condensed"] == {"summarised": 12}
    split = packed.split("train")
    sample = split.read(0)
    assert sample.fields["whole_text"][0] in LONG
    assert sample.texts != sample.fields["whole_text"]
