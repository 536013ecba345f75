"""The report of a run: complete, incomplete and damaged run directories, hostile text, and no network."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from clipdist.errors import UserError
from clipdist.evaluate import plots
from clipdist.evaluate.examples import CaptionExample, Gallery, Look, thumbnail_uri
from clipdist.evaluate.panels import retrieval_panel, thumbnail_panel
from clipdist.evaluate.report import Example, write_report
from clipdist.evaluate.retrieval import RetrievalScores, retrieval_scores
from clipdist.train.records import read_records

GALLERY = 60
LICENSE = "CC0-1.0 <made up>"
TEXTS = [
    f"Photograph {number} of a lesion on the left forearm. It is a brown, slightly raised plaque with an irregular "
    f"border and a diameter of about {number % 17 + 3} mm. The differential diagnosis includes seborrheic keratosis."
    for number in range(GALLERY)
]


def encoded(number: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 120)).save(file, format=form)
    return file.getvalue()


def metrics(steps: int = 300, per_epoch: int = 30) -> list[dict]:
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, steps + 1):
        share = step / steps
        scale = 14.3 + 20 * share
        records.append(
            {
                "step": step,
                "epoch": (step - 1) // per_epoch,
                "time": 1_790_000_000 + 2.5 * step,
                "train/loss": 5 * np.exp(-3 * share) + 0.6 + 0.2 * rng.normal(),
                "train/lr": 1e-3 * min(step / 20, 1) * (0.5 + 0.5 * np.cos(np.pi * share)),
                "train/logit_scale": scale,
                "train/temperature": 1 / scale,
                "train/grad_norm": np.exp(0.3 * rng.normal()),
                "train/grad_norm_image": 0.7 * np.exp(0.3 * rng.normal()),
                "train/grad_norm_text": 0.4 * np.exp(0.3 * rng.normal()),
                "data/digest": f"{step * 0x9E3779B97F4A7C15 % 2**64:016x}",
                "data/wait_fraction": abs(0.01 * rng.normal()) + 0.005,
                "perf/samples_per_second": 2400 + 90 * rng.normal(),
                "perf/samples_per_second_per_device": 600.0,
                "perf/memory_gib": 41.2,
            }
        )
        if step % per_epoch == 0:
            records.append(
                {
                    "step": step,
                    "epoch": (step - 1) // per_epoch,
                    "val/loss": 5 * np.exp(-2.5 * share) + 0.9,
                    "val/image_to_text/R@1": 0.4 * share,
                    "val/image_to_text/R@10": 0.7 * share,
                    "val/text_to_image/R@1": 0.38 * share,
                    "val/gallery": GALLERY,
                    "val/cosine_pos": 0.1 + 0.4 * share,
                    "val/cosine_neg": 0.1 - 0.08 * share,
                }
            )
    return records


def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(GALLERY, 16))
    return image, image + 1.1 * rng.normal(size=image.shape)


def scored() -> RetrievalScores:
    return retrieval_scores(*features(), np.arange(GALLERY), texts=TEXTS, units=np.arange(GALLERY) // 2, bootstrap=200)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with everything in it."""
    folder = tmp_path / "runs" / "dermatology"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics()))
    config = {
        "model": {"image": {"name": "timm:vit_base_patch16_224", "pretrained": True}, "text": "hf:bert-base-uncased"},
        "data": {"set": "/scratch/skin"},
        "train": {"global_batch": 1024},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "world_size": 4,
        "hosts": ["n1", "n2"],
        "gpus": ["NVIDIA H200"] * 4,
        "parameters": {"image": 86_567_656, "text": 109_482_240, "trainable": 1_300_000},
        "versions": {"clipdist": "0.1.0", "torch": "2.15.0"},
        "shard_sets": [
            {
                "path": "/scratch/skin",
                "splits": {"train": {"samples": 3600}, "val": 400},
                "license": LICENSE,
                "notes": {"synthetic": True},
            }
        ],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    body = scored().to_dict() | {"data": "/scratch/skin", "split": "test", "model": "model/"}
    (folder / "evaluation" / "test.json").write_text(json.dumps(body))
    (folder / "evaluation" / "zero_shot.json").write_text(json.dumps({"accuracy": 0.25}))
    bad = {"step": 3, "key": "s-17", "shard": "train-000.tar", "reason": "truncated file", "replaced_by": "s-18"}
    (folder / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    return folder


@pytest.fixture
def slim(run: Path) -> Path:
    """The same with few curves, which take the most time to draw."""
    kept = [{"step": record["step"], "train/loss": 1.0} for record in metrics(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return run


def gallery() -> Gallery:
    keys = [f"skin-{number:04d}" for number in range(GALLERY)]
    return Gallery(*features(), np.arange(GALLERY), scored(), TEXTS, keys, encoded)


def drawn(images: int = 20) -> tuple[list[Example], list[CaptionExample]]:
    return gallery().draw(images, captions=4)


class Page(HTMLParser):
    """Collects tags, what they refer to, and the text outside of style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text += data


def read(path: Path) -> tuple[str, Page, str]:
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    return source, page, " ".join(page.text.split())


def test_a_whole_run_is_shown_with_galleries_and_intervals(run):
    examples, caption_examples = drawn()
    path = write_report(run, examples=examples, caption_examples=caption_examples)
    assert path == run / "report.html"
    assert sorted(p.name for p in run.glob("report*")) == ["report.html"]
    _, page, text = read(path)
    recall = scored().image_to_text.recall[1]
    assert f"{recall.value:.3f} {recall.low:.3f} to {recall.high:.3f} among 60 texts; chance is 0.017" in text
    assert f"[{recall.low:.3f}, {recall.high:.3f}]" in text
    for expected in (
        "dermatology Last logged 21 September 2026",
        "timm:vit_base_patch16_224, pretrained",
        "hf:bert-base-uncased",
        "image 86.6 M, text 109.5 M",
        f"skin, train 3,600, val 400, synthetic, licence: {LICENSE}",
        "The data are synthetic",
        "307,200",
        "4 × NVIDIA H200 on 2 nodes",
        f"{300 * 0x9E3779B97F4A7C15 % 2**64:016x}",
        "with the weights of model/",
        "resample 30 whole units",
        "skin, test: image → text",
        "Samples that could not be used: 1",
        "truncated file",
        "Evaluation: zero_shot",
        "20 images drawn at random",
    ):
        assert expected in text
    assert "Not in this report" not in text
    first = sum(example.rank == 1 for example in examples)
    among = sum(example.rank <= 5 for example in examples)
    assert 0 < first < among < 20
    assert f"For {first} of them a right text is ranked first, for {among} among the first five" in text
    # Seven curves and two figures of the scores, the examples, and four rows of five thumbnails.
    assert page.tags.count("img") == 7 + 2 + 20 + 4 * 5


def test_nothing_is_fetched_and_nothing_is_executed(slim):
    examples, caption_examples = drawn(3)
    source, page, _ = read(write_report(slim, examples=examples, caption_examples=caption_examples))
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not re.search(r"https?://|@import|url\(", source)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert "default-src 'none'" in source


def test_hostile_text_stays_text(slim):
    attack = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    (slim / "config.yaml").write_text(yaml.safe_dump({"model": {"image": attack, "text": attack}}))
    example = Example(encoded(0), attack, [attack], [(0.5, attack, True)], 1)
    shown = CaptionExample(attack, attack, [(0.5, encoded(1), False)], 3)
    _, page, text = read(write_report(slim, examples=[example], caption_examples=[shown], title=attack))
    assert "script" not in page.tags
    assert text.count("alert(1)") >= 12
    assert all(reference.startswith("data:image/") for reference in page.references)


def test_an_empty_run_says_what_is_missing(tmp_path):
    _, page, text = read(write_report(tmp_path))
    for name in ("metrics.jsonl: missing", "config.yaml: missing", "environment.json: no usable", "evaluation/: no"):
        assert name in text
    assert "img" not in page.tags


@pytest.mark.parametrize(
    "absent", ["metrics.jsonl", "config.yaml", "environment.json", "evaluation", "bad_samples.jsonl"]
)
def test_each_part_may_be_missing(slim, absent):
    (slim / absent).rename(slim / f"no-{absent}")
    _, _, text = read(write_report(slim))
    assert ("Not in this report" in text) == (absent != "bad_samples.jsonl")


def test_damaged_parts_are_named(slim):
    with (slim / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "train/lo')
    (slim / "config.yaml").write_text("model: [unclosed")
    (slim / "environment.json").write_text("{")
    (slim / "evaluation" / "broken.json").write_text("not json")
    _, page, text = read(write_report(slim))
    assert "metrics.jsonl: 1 damaged lines" in text
    assert "config.yaml: not valid YAML" in text
    assert "environment.json: cannot be read" in text
    assert "evaluation/broken.json: cannot be read" in text
    assert "img" in page.tags


def test_without_an_evaluation_the_last_validation_is_the_headline(slim):
    (slim / "evaluation" / "test.json").unlink()
    (slim / "metrics.jsonl").write_text(json.dumps(metrics()[-1]) + "\n")
    _, _, text = read(write_report(slim))
    assert "Measured on last validation, step 300" in text
    assert "0.400 among 60 texts" in text
    assert "no interval, and the split may have chosen the model" in text


def test_given_scores_are_the_headline_and_listed_once(slim):
    other = retrieval_scores(np.eye(5), np.eye(5), np.arange(5), bootstrap=10).to_dict() | {
        "data": "lesions",
        "split": "new",
    }
    _, _, text = read(write_report(slim, scores=other))
    assert "Measured on lesions, new" in text
    assert "skin, test: image → text" in text
    _, _, text = read(write_report(slim, scores=scored().to_dict()))
    assert text.count("evaluation: image → text") == 1
    assert "skin, test: image → text" not in text


def test_texts_shared_between_images_are_announced(slim):
    features = np.eye(4)
    scores = retrieval_scores(features, features, np.arange(4), texts=["same"] * 4, bootstrap=0).to_dict()
    _, _, text = read(write_report(slim, scores=scores))
    assert "4 of 4 texts also belong to another image. A query for one of these cannot be ranked first" in text


def test_a_run_without_gpus_names_its_processor(slim):
    environment = json.loads((slim / "environment.json").read_text())
    environment |= {"gpus": [], "hosts": ["n1"], "cpu": {"model": "EPYC 9575F", "cores": 16}}
    (slim / "environment.json").write_text(json.dumps(environment))
    unread = {"left_out": [{"key": "a", "reason": "truncated"}], "unit": "patient"}
    _, _, text = read(write_report(slim, scores=scored().to_dict() | unread))
    assert "CPU only, EPYC 9575F, 16 cores on 1 node" in text
    assert "could not be read, and so stand in no gallery: 1." in text
    assert "resample 30 whole units (patient), not single images" in text


def test_no_run_directory_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "typo")


def test_an_image_that_cannot_be_decoded_leaves_a_note(slim):
    _, _, text = read(write_report(slim, examples=[Example(b"no image", "broken", ["a"], [(0.1, "b", False)], 9)]))
    assert "cannot be decoded" in text
    assert "rank 9" in text


def test_examples_are_a_seeded_draw_that_agrees_with_the_scores():
    examples, caption_examples = drawn()
    assert (examples, caption_examples) == drawn()
    scores = scored()
    for example in examples:
        number = int(example.key.removeprefix("skin-"))
        assert list(example.true_texts) == [TEXTS[number]]
        assert example.rank == scores.image_to_text.ranks_Q[number]
        assert example.rank > 5 or example.ranked[example.rank - 1][2]
        assert sum(right for _, _, right in example.ranked) == (example.rank <= 5)
        assert [score for score, _, _ in example.ranked] == sorted((s for s, _, _ in example.ranked), reverse=True)
    for shown in caption_examples:
        number = int(shown.key.removeprefix("skin-"))
        assert shown.text == TEXTS[number]
        assert [image == encoded(number) for _, image, _ in shown.ranked] == [right for _, _, right in shown.ranked]


def test_images_without_a_text_are_not_drawn():
    scores = retrieval_scores(np.eye(4), np.eye(4)[:2], [0, 1], bootstrap=0)
    shown = Gallery(torch.eye(4), torch.eye(4)[:2], np.array([0, 1]), scores, ["a", "b"], list("wxyz"), encoded)
    assert [example.key for example in shown.draw()[0]] == ["w", "x"]
    assert shown.worst() == []


def test_the_worst_are_those_whose_own_text_ranks_lowest():
    worst = gallery().worst(5)
    ranks = scored().image_to_text.ranks_Q
    assert [one.rank for one in worst] == sorted(ranks.tolist(), reverse=True)[:5]
    for one in worst:
        assert one.rank == ranks[int(one.key.removeprefix("skin-"))] > 1
        assert not one.ranked[0][2]
    assert all(one.rank > 1 for one in gallery().worst(GALLERY)), "what is right is no mistake"


def test_looks_and_the_worst_are_shown_and_said_to_be_picked(slim):
    look = Look("<b>its own text</b>", Image.new("RGB", (400, 400), "orange"))
    worst = [replace(one, looks=[look, look]) for one in gallery().worst(3)]
    _, page, text = read(write_report(slim, worst=worst, examples=worst[:1], relevance="Made by tests."))
    assert "Furthest from right The 3 images whose own text ranks lowest: picked for how wrong they are." in text
    assert text.count("for <b>its own text</b>") == 2 * 4
    assert text.count("Made by tests.") == 1
    assert all(reference.startswith("data:image/") for reference in page.references)
    _, _, text = read(write_report(slim, worst=worst[:0], examples=gallery().draw(2)[0]))
    assert "Furthest from right" not in text
    assert "what the tower sees" not in text


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_thumbnails_of_every_kind_of_image(mode):
    form = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    file = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.arange(300 * 200, dtype=np.uint16).reshape(200, 300)).save(file, format=form)
    else:
        Image.new(mode, (300, 200)).save(file, format=form)
    uri = thumbnail_uri(file.getvalue(), 100)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (100, 67))
        if mode == "I;16":
            assert image.getextrema()[0][1] > 240
            assert np.asarray(image).mean() == pytest.approx(115, abs=15)


def test_metrics_of_a_resumed_run_count_each_step_once_and_skip_what_is_no_number(tmp_path):
    lines = [
        '{"step": 2, "a": 1}',
        '{"step": 1, "a": 5}',
        '{"step": 2, "a": 3}',
        '{"step": 3, "a": NaN}',
        "[1]",
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    records, damaged = read_records(tmp_path / "metrics.jsonl")
    assert damaged == 2
    steps, values = plots.series(records, "a")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [5, 3])


@pytest.mark.parametrize("name", plots.CURVES)
def test_every_curve_in_both_formats_and_none_without_data(name):
    _, draw = plots.CURVES[name]
    records = metrics(40) if name != "accuracy" else [{**one, "train/top1": 0.5} for one in metrics(40)]
    ElementTree.fromstring(draw(records))
    assert draw(records, form="png").startswith(b"\x89PNG")
    assert draw([]) is None
    assert draw([{"step": 1, "other": 2.0}]) is None


def test_dark_figures_keep_no_colour_of_the_light_ones():
    light = plots.gradient_norm(metrics(40))
    assert light == plots.gradient_norm(metrics(40))
    dark = plots.dark(light)
    assert all(colour.encode() in light for colour in (plots.INK, plots.GRID, plots.BLUE, plots.GREEN))
    assert not any(colour.encode() in dark for colour in (plots.INK, plots.MUTED, plots.GRID, plots.BLUE, plots.GREEN))


def test_a_long_run_gives_a_small_figure():
    rng = np.random.default_rng(0)
    records = [{"step": step, "train/loss": value} for step, value in enumerate(rng.normal(size=30_000))]
    assert len(plots.loss(records)) < 120_000


def test_figures_of_scores():
    scores = scored().to_dict()
    for draw in (plots.recall_bars, plots.cosine_histogram):
        ElementTree.fromstring(draw(scores))
        assert draw({}) is None
    without = retrieval_scores(*features(), np.arange(GALLERY), bootstrap=0).to_dict()
    assert plots.recall_bars(without, form="png").startswith(b"\x89PNG")


def test_panels_are_images_and_mark_what_is_right():
    images = [np.full((40, 60, 3), 255, np.uint8), np.zeros((10, 5), np.uint8)]
    ranked = [(0.9, TEXTS[0] * 3, False), (0.8, "unbroken" * 60, False)]
    wrong = retrieval_panel(images, TEXTS[:2], [ranked, ranked])
    right = retrieval_panel(images, TEXTS[:2], [ranked, [(0.9, TEXTS[0] * 3, True), ranked[1]]])
    assert wrong.dtype == np.uint8
    assert wrong.shape == right.shape
    assert wrong.shape[1:] == (1000, 3)

    def green(panel: np.ndarray) -> np.ndarray:
        return (panel[..., 1].astype(int) - panel[..., 0] > 8).any(axis=1)

    assert not green(wrong).any()
    assert np.flatnonzero(green(right)).min() > len(right) // 2
    rows = thumbnail_panel(TEXTS[:1], [[(0.9, images[0], True), (0.5, images[1], False)]])
    assert green(rows).any()
    assert rows.shape[1:] == (1000, 3)
    with pytest.raises(ValueError, match="expected equal numbers"):
        retrieval_panel(images, TEXTS[:1], [ranked])
