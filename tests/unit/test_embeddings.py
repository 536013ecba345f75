"""Galleries: what is in them, that interruptions and processes do not change them, and what is refused."""

import filecmp
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import clipdist
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.model.saved import SavedModel, load_dual_encoder
from clipdist.publish import embed as embed_module
from clipdist.publish.embed import EmbedOptions, embed
from clipdist.publish.embedding_source import TableColumns
from clipdist.publish.embeddings import StoredEmbeddings, open_embeddings
from tests.conftest import TrainedRun, picture

EXACT = EmbedOptions(what="both", exact_pixels=True, device="cpu")


@pytest.fixture(scope="module")
def model(trained_run: TrainedRun) -> Path:
    return trained_run.folder / "model"


@pytest.fixture(scope="module")
def saved(model: Path) -> SavedModel:
    return load_dual_encoder(model, "cpu")


@pytest.fixture(scope="module")
def gallery(model: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and texts of both splits; tests must not change it."""
    out = tmp_path_factory.mktemp("galleries") / "shapes"
    done = embed(model, str(shapes), out, options=EXACT, processes=1)
    assert done.embedded == done.samples == 200
    return out


@pytest.fixture
def copied(gallery: Path, tmp_path: Path) -> Path:
    return shutil.copytree(gallery, tmp_path / "copied")


def other_model(model: Path, folder: Path) -> Path:
    """The same but for its weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def same_files(a: Path, b: Path) -> None:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def test_a_gallery_holds_what_the_model_gives(gallery: Path, saved: SavedModel, shapes: Path) -> None:
    stored = clipdist.open_embeddings(gallery)
    assert isinstance(stored, StoredEmbeddings)
    splits = [ShardSet.open(shapes).split(name) for name in ("train", "val")]
    samples = [split.read(number) for split in splits for number in range(len(split))]
    assert (stored.rows, stored.width, stored.model_digest) == (200, 32, saved.digest)
    assert stored.keys == [sample.key for sample in samples]
    assert stored.features_ND.dtype == np.float16
    assert not stored.features_ND.flags.writeable
    expected_ND = saved.encode_image([sample.image for sample in samples])
    np.testing.assert_allclose(stored.features_ND, expected_ND, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(stored.features_ND.astype(np.float64), axis=1), 1, atol=2e-3)
    texts = [text for sample in samples for text in sample.texts]
    np.testing.assert_allclose(stored.features("text"), saved.encode_text(texts), atol=2e-3)
    np.testing.assert_array_equal(stored.text_owner_M, np.arange(200))
    record = stored.record(170)
    assert record == {
        "key": samples[170].key,
        "texts": samples[170].texts,
        "split": "val",
        "number": 2,
        "fields": samples[170].fields,
    }
    assert stored.image(170) == samples[170].image
    assert stored.thumbnail(170, 20).size == (20, 20)
    with pytest.raises(IndexError):
        stored.record(200)
    stored.check_model(saved)
    found = stored.search(saved.encode_text(samples[5].texts), top=200)[0]
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    assert {hit.key for hit in found} == set(stored.keys)
    best_text = stored.search(saved.encode_text(samples[5].texts), top=1, among="text")[0][0]
    assert (best_text.row, best_text.texts) == (5, samples[5].texts)
    assert best_text.score == pytest.approx(1, abs=2e-3)
    assert np.load(gallery / "image_features.npy").shape == (200, 32), "an ordinary file of NumPy"


def test_killed_anywhere_and_on_other_processes_to_the_last_byte(
    model: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undisturbed call in one process; one that is killed and goes on in two."""
    monkeypatch.setattr(embed_module, "CHUNK", 16)
    options = EmbedOptions(what="both", micro_batch=8, device="cpu")
    embed(model, str(shapes), tmp_path / "whole", options=options, processes=1)
    killed = tmp_path / "killed"
    words = {"options": options, "processes": 1}
    process = multiprocessing.get_context("fork").Process(target=embed, args=(model, str(shapes), killed), kwargs=words)
    process.start()
    parts = killed / "unfinished" / "parts"
    while process.is_alive() and len(list(parts.glob("?" * 6))) < 3:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert 3 <= len(list(parts.glob("?" * 6))) < 13, "killed before it was done"
    (parts / "000012.partial-1").mkdir()  # as a kill in the middle of a part leaves it
    with pytest.raises(UserError, match="run the same `clipdist embed` again"):
        open_embeddings(killed)
    embed(model, str(shapes), killed, options=options, processes=2)
    same_files(tmp_path / "whole", killed)


def test_a_failure_while_parts_are_joined(
    model: Path, shapes: Path, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "joined"

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clipdist.publish.embedding_parts._join_owners", fails)
        with pytest.raises(KeyboardInterrupt):
            embed(model, str(shapes), out, options=EXACT, processes=1)
    again = embed(model, str(shapes), out, options=EXACT, processes=1)
    assert again.embedded == 0, "only joined"
    same_files(gallery, out)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A table of ten images, of which three cannot be read; one has a very long text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.png").write_bytes(picture("red", "square", "left", number))
    (folder / "torn.png").write_bytes(picture("red", "square", "left")[:100])
    rows = [f"{number}.png,text {number},{number}" for number in range(6)]
    rows += ["torn.png,torn,6", "absent.png,absent,7", ",nothing,8", f"6.png,{'word ' * 200_000},9"]
    (folder / "table.csv").write_text("\n".join(["image,text,age", *rows]), encoding="utf-8")
    return folder


def test_what_cannot_be_read_is_named(model: Path, photos: Path, saved: SavedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = embed(model, str(photos / "table.csv"), out, options=EXACT, processes=1)
    stored = open_embeddings(out)
    assert (done.samples, stored.rows, stored.info["bad"]) == (10, 7, 3)
    assert stored.keys == ["0", "1", "2", "3", "4", "5", "6"]
    bad = [json.loads(line) for line in (out / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["key"], one["reason"]) for one in bad][1:] == [
        ("absent", "there is no such file"),
        ("", "no image named"),
    ]
    assert bad[0]["image"] == "torn.png"
    assert bad[0]["reason"].startswith("unreadable image")
    assert stored.record(2) == {"key": "2", "texts": ["text 2"], "image": "2.png", "fields": {"age": 2}}
    assert len(stored.record(6)["texts"][0]) > 900_000, "kept whole, though the model reads its beginning alone"
    expected = saved.encode_image([photos / f"{number}.png" for number in range(7)])
    np.testing.assert_allclose(stored.features_ND, expected, atol=2e-3)
    np.testing.assert_array_equal(stored.text_owner_M, np.arange(7))
    embed(model, str(photos / "table.csv"), tmp_path / "again", options=EXACT, processes=1, readers=4)
    same_files(out, tmp_path / "again")
    moved = photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="2: there is no such file"):
        stored.image(2)
    assert open_embeddings(out, images=moved).image(2) == (moved / "2.png").read_bytes()


def test_a_folder_with_texts_beside_some_images(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "été").mkdir(parents=True)
    for name in ("b.png", "a.png", "été/c.png", ".hidden.png"):
        (folder / name).write_bytes(picture("blue", "circle", "top"))
    (folder / "a.json").write_text('{"text": ["one", "two"], "label": "x", "place": {"x": 1}}', encoding="utf-8")
    embed(model, str(folder), tmp_path / "out", options=EXACT, processes=1)
    stored = open_embeddings(tmp_path / "out")
    assert [stored.record(row)["image"] for row in range(3)] == ["a.png", "b.png", "été/c.png"]
    assert stored.record(0)["fields"] == {"label": "x", "place": {"x": 1}}
    assert [stored.record(row)["texts"] for row in range(3)] == [["one", "two"], [], []]
    np.testing.assert_array_equal(stored.text_owner_M, [0, 0])
    assert stored.hits([np.array([1])], [np.array([0.5])], "text")[0][0].texts == ["two"]


def test_what_a_folder_of_embeddings_refuses(
    model: Path, shapes: Path, gallery: Path, copied: Path, tmp_path: Path
) -> None:
    assert embed(model, str(shapes), copied, options=EXACT, processes=1).embedded == 0, "finished before"
    same_files(gallery, copied)
    other = other_model(model, tmp_path / "other")
    with pytest.raises(UserError, match=r"by the model of digest \w{16}, asked for \w{16}"):
        embed(other, str(shapes), copied, options=EXACT, processes=1)
    with pytest.raises(UserError, match=r'another source: found .*"train".*choose another --out'):
        embed(model, str(shapes), copied, splits=["val"], options=EXACT, processes=1)
    with pytest.raises(UserError, match=r'another options: found {"what": "both"}, asked for {"what": "image"}'):
        embed(model, str(shapes), copied, options=EmbedOptions(exact_pixels=True, device="cpu"), processes=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds 'thesis\.txt', and no embeddings"):
        embed(model, str(shapes), tmp_path / "taken")
    with pytest.raises(UserError, match=r"embedded by the model of digest \w{16}.*the one given has \w{16}"):
        open_embeddings(gallery).check_model(load_dual_encoder(other, "cpu"))


def test_data_that_is_none(model: Path, shapes: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("file,text\na.png,x\n", encoding="utf-8")
    (tmp_path / "nothing.csv").write_text("image,text\nabsent.png,x\n", encoding="utf-8")
    for data, said in (
        (tmp_path / "empty", "no images in it"),
        (tmp_path / "nowhere", "there is no such shard set, folder or table"),
        (tmp_path / "table.csv", "no column 'image'"),
        (tmp_path / "nothing.csv", "none of 1 samples could be read; the first: there is no such file"),
    ):
        with pytest.raises(UserError, match=said):
            embed(model, str(data), tmp_path / f"out-{data.stem}", options=EXACT, processes=1)
        with pytest.raises(UserError, match="no finished embeddings"):
            open_embeddings(tmp_path / f"out-{data.stem}")
    with pytest.raises(UserError, match="no split 'test'"):
        embed(model, str(shapes), tmp_path / "out-split", splits=["test"])
    with pytest.raises(UserError, match="has no splits"):
        embed(model, str(photos), tmp_path / "out-split", splits=["val"])
    with pytest.raises(UserError, match="--threads: found 0"):
        embed(model, str(shapes), tmp_path / "out-threads", options=EmbedOptions(threads=0))
    named = TableColumns(image="file", root=photos)
    (photos / "a.png").write_bytes((photos / "1.png").read_bytes())
    embed(model, str(tmp_path / "table.csv"), tmp_path / "named", columns=named, options=EXACT, processes=1)
    assert open_embeddings(tmp_path / "named").keys == ["a"]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("image_features.npy", lambda data: data[:-100], "found 12,828 bytes, expected 12,928"),
        ("image_features.npy", lambda data: b"\0" * len(data), "damaged"),
        ("image_coarse.npy", lambda data: data.replace(b"|i1", b"|u1"), "found uint8"),
        ("rows.parquet", lambda data: b"\0" * len(data), "damaged"),
        ("embeddings.json", lambda data: data[:50], "damaged"),
        ("embeddings.json", lambda data: data.replace(b'"version": 1', b'"version": 9'), "version 9, expected"),
        ("embeddings.json", lambda data: b"[]", "damaged"),
        ("text_owner.npy", None, r"text_owner\.npy is missing"),
    ],
)
def test_damage_is_told(copied: Path, name: str, damage: Any, said: str) -> None:
    path = copied / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=said):
        open_embeddings(copied).search(np.ones((1, 32)), top=1)


def test_a_flipped_bit_is_found_when_asked_for(copied: Path) -> None:
    open_embeddings(copied).verify()
    data = bytearray((copied / "image_features.npy").read_bytes())
    data[1000] ^= 1
    (copied / "image_features.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"checksum \w+, expected"):
        open_embeddings(copied).verify()


def test_images_alone_have_no_texts_to_search(model: Path, shapes: Path, tmp_path: Path) -> None:
    options = EmbedOptions(device="cpu")
    embed(model, str(shapes), tmp_path / "images", splits=["val"], options=options, processes=1)
    stored = open_embeddings(tmp_path / "images")
    assert stored.rows == 32
    with pytest.raises(UserError, match="holds no text features; embed with --what text, or both"):
        stored.search(np.ones((1, 32)), among="text")
    texts = EmbedOptions(what="text", device="cpu")
    embed(model, str(shapes), tmp_path / "texts", splits=["val"], options=texts, processes=1)
    with pytest.raises(UserError, match="holds no image features"):
        _ = open_embeddings(tmp_path / "texts").features_ND
    assert len(open_embeddings(tmp_path / "texts").search(np.ones((1, 32)), among="text")[0]) == 10


def test_reduced_pixels_are_nearly_the_exact_ones(model: Path, saved: SavedModel, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(4):
        rough = Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8))
        rough.resize((300, 260), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    embed(model, str(folder), tmp_path / "out", options=EmbedOptions(device="cpu"), processes=1)
    reduced = open_embeddings(tmp_path / "out").features_ND.astype(np.float64)
    exact = saved.encode_image(sorted(folder.iterdir()))
    assert ((reduced * exact).sum(axis=1) > 0.99).all()
