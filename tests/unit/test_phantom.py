"""Dermoscopy phantoms: the same bytes whoever draws them, SkinCAP's layout, captions that say what was drawn."""

import dataclasses
import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipdist.errors import UserError
from clipdist.prepare.phantom import CONCEPTS, SPARE, caption, draw, png_bytes, write_skincap_layout
from clipdist.prepare.phantom_draw import paint
from clipdist.prepare.phantom_lesion import DIAGNOSES, SITES, STREAM_PIXELS, STRUCTURES, Lesion, generator, lesion_of
from clipdist.prepare.phantom_structures import PIGMENT, STRUCTURE_PAINTERS
from clipdist.prepare.phantom_words import SAID, artefacts_of, caption_zh

IMAGES, SIDE, SEED = 90, 48, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("phantom") / "skincap-like"
    assert write_skincap_layout(target, IMAGES, side=SIDE, seed=SEED, workers=1) == target / "skincap_v240623.csv"
    return target


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "skincap_v240623.csv", encoding="utf-8-sig")


@pytest.fixture(scope="module")
def lesions() -> list[Lesion]:
    return [lesion_of(0, index) for index in range(3000)]


def plain(**changes: object) -> Lesion:
    """A lesion with nothing over it, to change one attribute at a time."""
    base = dataclasses.replace(
        lesion_of(0, 0), site="back", skin_tone=2, placing="central", diameter_mm=5.0, shape="round", relief="flat",
        asymmetry=0, border="regular", colours=("light brown",), layout="uniform", structures=(), hairs="none",
        hair_colour="dark", ruler=False, bubbles=False, ink=False, tube=False, glare=False, light="neutral",
        unusable=False,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def picture(side: int = 96, **changes: object) -> np.ndarray:
    return paint(plain(**changes), generator(1, STREAM_PIXELS, 5), side).astype(np.float32)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_number_of_workers_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_skincap_layout(tmp_path / "two", IMAGES, side=SIDE, seed=SEED, workers=2)
    one = digests(folder)
    assert len(one) == IMAGES + SPARE + 3
    assert digests(tmp_path / "two") == one


def test_draw_is_a_pure_function_and_files_hold_what_it_returns(folder: Path) -> None:
    later, _ = draw(SEED, 40, SIDE)
    first, lesion = draw(SEED, 7, SIDE)
    again, same = draw(SEED, 7, SIDE)
    assert first.dtype == np.uint8
    assert first.shape == (SIDE, SIDE, 3)
    np.testing.assert_array_equal(first, again)
    assert lesion == same
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "skincap" / "8.png")), first)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "skincap" / "41.png")), later)
    assert draw(SEED + 1, 7, SIDE)[1] != lesion
    assert draw(SEED, 7, 64)[1] == lesion


def test_png_bytes_decode_to_the_picture() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(png_bytes(noise)))
    assert decoded.format == "PNG"
    np.testing.assert_array_equal(np.asarray(decoded), noise)


def test_table_has_skincap_columns_and_a_byte_order_mark(folder: Path, table: pd.DataFrame) -> None:
    assert (folder / "skincap_v240623.csv").read_bytes().startswith(b"\xef\xbb\xbfid,")
    head = [
        *("id", "skincap_file_path", "ori_file_path", "disease", "caption_zh", "caption_zh_polish"),
        *("caption_zh_polish_en", "remark", "source", "skin_tone", "malignant", "fitzpatrick_scale"),
        *("fitzpatrick_centaur", "nine_partition_label", "three_partition_label"),
    ]
    assert list(table.columns) == [*head, *CONCEPTS, "Do not consider this image", "patient_id"]
    assert len(CONCEPTS) == len(set(CONCEPTS)) == 48
    assert table["id"].tolist() == list(range(1, IMAGES + 1))
    assert table[["disease", "caption_zh", "caption_zh_polish", "caption_zh_polish_en"]].notna().all(axis=None)
    assert set(table["source"]) == {"synthetic-phantom"}
    assert set(np.unique(table[[*CONCEPTS, "Do not consider this image"]])) == {0, 1}
    # Like SkinCAP's, a row has the columns of the one source or of the other.
    ddi = table["malignant"].notna()
    assert 0 < ddi.sum() < IMAGES / 2
    assert (table["fitzpatrick_scale"].isna() == ddi).all()
    assert (table["three_partition_label"].isna() == ddi).all()
    assert (table["skin_tone"].notna() == ddi).all()


def test_every_row_has_its_picture_and_spare_ones_have_none(folder: Path, table: pd.DataFrame) -> None:
    named = set(table["skincap_file_path"])
    assert named == {path.name for path in (folder / "skincap").glob("*.png")}
    spare = {path.name for path in (folder / "skincap" / "not_include").glob("*.png")}
    assert len(spare) == SPARE
    assert not spare & named
    assert "SYNTHETIC" in (folder / "README.txt").read_text(encoding="utf-8")
    assert not list(folder.parent.glob(".*partial*"))


def test_existing_folders(folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_skincap_layout(folder, IMAGES, side=SIDE, seed=SEED) == folder / "skincap_v240623.csv"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(UserError, match="delete the folder or name another one"):
        write_skincap_layout(folder, IMAGES, side=SIDE, seed=SEED + 1)
    assert json.loads((folder / "phantom.json").read_text())["seed"] == SEED
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="other files"):
        write_skincap_layout(tmp_path / "mine", 2, side=32)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert write_skincap_layout(tmp_path / "empty", 2, side=32).is_file()
    with pytest.raises(UserError, match="images=0"):
        write_skincap_layout(tmp_path / "none", 0)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipdist.prepare.phantom.caption_zh", lambda lesion: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_skincap_layout(tmp_path / "set", 3, side=32, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_patients_share_their_skin_over_several_lesions(lesions: list[Lesion]) -> None:
    frame = pd.DataFrame([dataclasses.asdict(lesion) for lesion in lesions])
    groups = frame.groupby("patient")
    counts = groups.size()
    assert counts.min() == 1
    assert counts.max() == 6
    assert 2.0 < counts.mean() < 3.5
    for shared in ("skin_tone", "hair_colour", "light"):
        assert (groups[shared].nunique() == 1).all()
    assert (groups["diagnosis"].nunique() > 1).mean() > 0.5


def test_diagnoses_are_many_and_lopsided(lesions: list[Lesion]) -> None:
    names = [name for name, _ in DIAGNOSES]
    assert len(names) == len(set(names)) == 187
    counts = pd.Series([lesion.diagnosis for lesion in lesions]).value_counts()
    assert len(counts) > 150
    assert counts.iloc[0] > 20 * counts.iloc[-1]
    assert counts.iloc[:20].sum() > 0.35 * len(lesions)
    assert 0.01 < np.mean([lesion.unusable for lesion in lesions]) < 0.03


def test_the_diagnosis_shows_in_the_look(lesions: list[Lesion]) -> None:
    def share(test: str, family: str) -> float:
        return float(np.mean([test in lesion.structures for lesion in lesions if lesion.family == family]))

    assert share("lacunae", "vascular") > 0.4
    assert share("lacunae", "melanoma") == 0.0
    melanoma = [lesion.asymmetry for lesion in lesions if lesion.family == "melanoma"]
    nevus = [lesion.asymmetry for lesion in lesions if lesion.family == "nevus"]
    assert np.mean(melanoma) > np.mean(nevus) + 1
    assert {lesion.malignant for lesion in lesions if lesion.family == "melanoma"} == {True}


def test_values_of_an_attribute_share_no_words_and_all_values_have_some(lesions: list[Lesion]) -> None:
    for kind, values in SAID.items():
        said = [phrase for phrases in values.values() for phrase in phrases]
        assert len(said) == len(set(said)), kind
    assert set(SAID["structure"]) == set(STRUCTURES) == set(STRUCTURE_PAINTERS)
    assert set(SAID["colour"]) == set(PIGMENT)
    assert set(SAID["site"]) == set(SITES) == {lesion.site for lesion in lesions}


def test_captions_say_what_was_drawn(lesions: list[Lesion]) -> None:
    rng = np.random.default_rng(0)
    for lesion in lesions[:400]:
        text = caption(lesion, rng)
        assert lesion.diagnosis in text
        assert f"{round(lesion.diameter_mm)} mm" in text
        for kind in ("size", "relief", "shape", "border", "skin_tone", "site", "placing", "light"):
            assert any(phrase in text for phrase in SAID[kind][str(getattr(lesion, kind))]), (kind, text)
        for kind, shown in (("structure", lesion.structures), ("artefact", artefacts_of(lesion))):
            for value, phrases in SAID[kind].items():
                assert any(phrase in text for phrase in phrases) == (value in shown), (value, text)
        for colour in lesion.colours:
            assert any(phrase in text for phrase in SAID["colour"][colour]), (colour, text)
        hairs = "hairs" in text and any(f"{word} hairs" in text for word in SAID["hair_colour"][lesion.hair_colour])
        assert hairs == (lesion.hairs != "none"), text
        assert ("out of focus" in text or "blurred." in text) == lesion.unusable
        assert 40 <= len(text.split()) <= 110
        assert lesion.diagnosis in caption_zh(lesion)


def test_captions_vary_in_words_and_order_and_tell_lesions_apart(lesions: list[Lesion]) -> None:
    rng = np.random.default_rng(1)
    texts = {caption(lesions[0], rng) for _ in range(20)}
    assert len(texts) == 20
    assert len({text.split()[0] for text in texts}) > 3
    facts = [dataclasses.replace(lesion, index=0, patient="") for lesion in lesions[:500]]
    assert len(set(facts)) > 495


def test_different_lesions_give_different_pictures() -> None:
    seen = np.stack([draw(0, index, 48)[0].reshape(-1) for index in range(40)]).astype(np.float32)
    distance = np.abs(seen[:, None] - seen[None]).mean(axis=2)
    assert distance[~np.eye(len(seen), dtype=bool)].min() > 4


def test_skin_tone_orders_brightness() -> None:
    brightness = [picture(skin_tone=tone).mean() for tone in range(1, 7)]
    assert all(lighter > darker + 8 for lighter, darker in itertools.pairwise(brightness))


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"hairs": "few"}, 0.005),
        ({"hairs": "many"}, 0.04),
        ({"ruler": True}, 0.08),
        ({"bubbles": True}, 0.005),
        ({"ink": True}, 0.003),
        ({"tube": True}, 0.10),
        ({"glare": True}, 0.01),
        ({"light": "warm"}, 0.3),
        ({"relief": "nodular"}, 0.01),
        ({"site": "sole"}, 0.05),
        ({"diameter_mm": 9.0}, 0.08),
        ({"unusable": True}, 0.5),
        *[({"structures": (name,)}, 0.002) for name in STRUCTURES if name != "ridges"],
        ({"structures": ("ridges",), "site": "palm"}, 0.05),
    ],
    ids=str,
)
def test_each_attribute_changes_the_picture(changes: dict[str, object], changed: float) -> None:
    difference = np.abs(picture(**changes) - picture()).max(axis=2)
    assert (difference > 12).mean() > changed


def test_colours_and_shapes_are_those_named() -> None:
    middle = slice(40, 56)
    tints = {name: picture(colours=(name,))[middle, middle].mean(axis=(0, 1)) for name in PIGMENT}
    assert tints["black"].mean() < tints["dark brown"].mean() < tints["light brown"].mean() < tints["white"].mean()
    assert tints["red"][0] > tints["red"][1] + 60
    assert tints["blue-grey"][2] >= tints["blue-grey"][0]
    assert tints["yellow"][2] < tints["yellow"][1] - 20

    def extent(**changes: object) -> tuple[int, int]:
        dark = picture(colours=("black",), **changes).mean(axis=2) < 90
        return int(dark.any(axis=0).sum()), int(dark.any(axis=1).sum())

    small, large = extent(diameter_mm=3.0), extent(diameter_mm=9.0)
    assert min(large) > 2 * max(small)
    assert abs(np.mean(large) / 96 * 14 - 9.0) < 1.5
    round_area = (picture(colours=("black",), diameter_mm=6.0).mean(axis=2) < 90).sum()
    long_area = (picture(colours=("black",), diameter_mm=6.0, shape="elongated").mean(axis=2) < 90).sum()
    assert long_area == pytest.approx(round_area, rel=0.15)
