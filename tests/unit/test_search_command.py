"""`clipdist embed` and `clipdist search` as commands: what they print and write, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdist.cli import main
from clipdist.data.shards import ShardSet
from clipdist.publish.contact_sheet import Block, Cell, contact_sheet
from tests.conftest import TrainedRun, picture
from tests.unit.test_embeddings import other_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, (colour, shape) in enumerate([("red", "square"), ("green", "circle"), ("blue", "cross")]):
        (folder / f"{colour}.png").write_bytes(picture(colour, shape, "left", number))
        (folder / f"{colour}.txt").write_text(f"A {colour} {shape} at the left.", encoding="utf-8")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    return folder


@pytest.fixture(scope="module")
def gallery(trained_run: TrainedRun, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gallery") / "out"
    words = ["embed", str(trained_run.folder / "model"), "--data", str(photos), "--out", str(out), "--what", "both"]
    assert main([*words, "--device", "cpu", "--processes", "1"]) == 0
    return out


def test_what_embed_says(
    trained_run: TrainedRun, photos: Path, gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", str(trained_run.folder / "model"), "--data", str(photos), "--out", str(gallery)]
    assert main([*words, "--what", "both", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{gallery}: was finished before",
        f"{gallery}: 3 samples, 3 texts, 32 wide",
        f"could not be read: 1 of 4, see {gallery / 'bad.jsonl'}",
    ]


def test_queries_by_text_and_image(
    trained_run: TrainedRun, photos: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, image = str(trained_run.folder / "model"), photos / "green.png"
    words = ["search", str(gallery), "A red square at the left.", str(image), "--model", model, "--top", "2"]
    files = ["--json", str(tmp_path / "found.json"), "--sheet", str(tmp_path / "found.png")]
    assert main([*words, *files, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    body = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    first, second = body["queries"]
    assert [len(one["hits"]) for one in (first, second)] == [2, 2]
    assert second["hits"][0]["key"] == "green", "an image finds itself"
    assert second["hits"][0]["score"] == pytest.approx(1, abs=2e-3)
    assert second["hits"][0]["texts"] == ["A green circle at the left."]
    assert second["hits"][0]["image"] == "green.png"
    assert "   1   1.000  green" in said
    assert "3 samples: exact search" in said
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.format == "PNG"
        # The query's own picture stands above what was found, which is the same picture.
        assert sheet.width > 300
        assert sheet.height > 600


def test_images_that_moved(
    trained_run: TrainedRun, photos: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", str(gallery), "A red square.", "--model", str(trained_run.folder / "model"), "--device", "cpu"]
    sheet = ["--sheet", str(tmp_path / "found.png")]
    (tmp_path / "empty").mkdir()
    assert main([*words, *sheet, "--images", str(tmp_path / "empty")]) == 0
    said = capsys.readouterr().out
    assert "images that could not be read: 3; the first: " in said
    assert "there is no such file" in said
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert main([*words, *sheet, "--images", str(moved)]) == 0
    assert "could not be read" not in capsys.readouterr().out


def test_texts_are_found(
    trained_run: TrainedRun, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(trained_run.folder / "model"), str(tmp_path / "texts")
    words = ["--what", "text", "--split", "val", "--device", "cpu", "--processes", "1"]
    assert main(["embed", model, "--data", str(shapes), "--out", out, *words]) == 0
    text = ShardSet.open(shapes).split("val").read(3).texts[0]
    capsys.readouterr()
    search = ["search", out, text, "--model", model, "--top", "3", "--device", "cpu"]
    assert main([*search, "--among", "text"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(text)
    assert main(search) == 2
    assert "holds no image features" in capsys.readouterr().err


def test_what_search_refuses(
    trained_run: TrainedRun, gallery: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained_run.folder / "model"
    other = other_model(model, tmp_path / "other")

    def said(*words: str, by: Path = model) -> str:
        assert main(["search", str(gallery), *words, "--model", str(by), "--device", "cpu"]) == 2
        return capsys.readouterr().err

    assert "embedded by the model of digest" in said("red", by=other)
    assert "--top: found 0" in said("red", "--top", "0")
    assert "found an empty text" in said(" ")
    assert "torn.jpg: unreadable image" in said(str(photos / "torn.jpg"))
    assert "there is no folder" in said("red", "--sheet", str(tmp_path / "nowhere" / "x.png"))
    assert "below 1,000 use the exact search" in said("red", "--approximate")
    assert main(["search", str(tmp_path), "red", "--model", str(model)]) == 2
    assert "embeddings.json is missing" in capsys.readouterr().err
    long = "a red square " * 80_000  # no name of a file, however long
    assert main(["search", str(gallery), long, "--model", str(model), "--device", "cpu", "--top", "1"]) == 0
    assert len(capsys.readouterr().out) < 1000


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_sheet_shows_pictures_where_they_are(count: int) -> None:
    """Every cell holds its picture; odd shapes, long words and missing pictures do not stop it."""
    colours = [tuple(int(value) for value in np.random.default_rng(n).integers(0, 200, 3)) for n in range(count)]
    cells = [
        Cell(n + 1, 0.5, "k" * 5000, "w" * 1_000_000, Image.new("RGB", (300, 1 + 100 * n), colour))
        for n, colour in enumerate(colours)
    ]
    sheet = contact_sheet([Block("query", cells), Block("x" * 100_000, [Cell(1, -1.0, "", "", None)])])
    shown = {colour for _, colour in sheet.getcolors(1 << 24) or []}
    assert set(colours) <= shown
    assert sheet.width < 1200
