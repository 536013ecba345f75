"""ISIC 2024: both layouts, captions and what they must not say, damage, units, shares of the malignant, the recipe."""

import io
import json
import runpy
import shutil
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipdist.data.sets.pack import Pair
from clipdist.data.sets.tables import split_pairs
from clipdist.data.shards import ShardSet, checksum_file
from clipdist.errors import UserError
from clipdist.prepare.isic import IsicPairs, _units, read_isic
from clipdist.prepare.isic_captions import GRADED, Grades, diagnosis_sentences, looks_sentence, person_sentence
from clipdist.prepare.phantom_isic import TRAIN_ONLY, PhantomOptions, write_isic_layout

h5py = pytest.importorskip("h5py", reason="h5py (extra: isic) is not installed")
ROOT = Path(__file__).parents[2]
TILES, TABLE = 150, "train-metadata.csv"
OFFICIAL = "ISIC_2024_Training"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiles in each layout; tests must not change them (`copied` makes another)."""
    folder = tmp_path_factory.mktemp("isic")
    for layout in ("hdf5", "jpeg", "official"):
        write_isic_layout(folder / layout, PhantomOptions(TILES, layout, 32, 0.06, seed=3), workers=1)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copied(layouts: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(layouts["jpeg"], tmp_path / "raw")
    return tmp_path / "raw"


def table_of(raw: Path) -> pd.DataFrame:
    return pd.read_csv(raw / TABLE, dtype=str, keep_default_na=False)


def reread(raw: Path, table: pd.DataFrame, **options: bool) -> IsicPairs:
    table.to_csv(raw / TABLE, index=False)
    return read_isic(raw, **options)


def reasons(found: IsicPairs) -> list[tuple[int | None, str, str]]:
    return [(one.row, one.key, one.reason) for one in found.rejected]


def recipe(*arguments: object) -> None:
    runpy.run_path(str(ROOT / "shards" / "isic.py"))["main"]([str(argument) for argument in arguments])


@pytest.mark.parametrize("metadata", [False, True])
def test_all_layouts_give_the_same_pairs(layouts: dict[str, Path], metadata: bool) -> None:
    found = {layout: read_isic(raw, metadata=metadata) for layout, raw in layouts.items()}
    described = {
        layout: [(pair.key, pair.text, pair.fields, pair.row, pair.image.read_bytes()) for pair in pairs.pairs]  # type: ignore[arg-type]
        for layout, pairs in found.items()
    }
    assert len(described["hdf5"]) == TILES
    assert described["hdf5"] == described["jpeg"] == described["official"]
    assert not any(pairs.rejected for pairs in found.values())
    assert found["official"].notes["target_column"] == "malignant"
    assert found["hdf5"].notes["images"] == "train-image.hdf5"
    assert found["official"].sources.keys() == {
        f"{OFFICIAL}_GroundTruth.csv",
        f"{OFFICIAL}_Supplement.csv",
        "metadata.csv",
    }
    assert found["jpeg"].sources == {TABLE: checksum_file(layouts["jpeg"] / TABLE)}


def test_labels_units_and_fields(layouts: dict[str, Path]) -> None:
    table, found = table_of(layouts["jpeg"]), read_isic(layouts["jpeg"])
    assert found.notes["labels"] == {"benign": 139, "malignant": 9, "indeterminate": 2}
    assert found.notes["units"] == {"patient_id": TILES}
    for pair, row in zip(found.pairs, table.to_dict("records"), strict=True):
        assert pair.fields["label"] == row["iddx_1"].lower()
        assert pair.fields["unit"] == row["patient_id"]
        assert pair.fields.get("sex", "") == row["sex"]
        assert (pair.fields["age"], pair.fields["site"]) == (int(row["age_approx"]), row["anatom_site_general"])
        assert pair.fields["size_mm"] == float(row["clin_size_long_diam_mm"])
        assert (pair.fields["license"], pair.fields["attribution"]) == (row["copyright_license"], row["attribution"])
    malignant = next(pair for pair in found.pairs if pair.fields["label"] == "malignant")
    assert malignant.fields["diagnosis"] == table["iddx_4"][malignant.row - 1]


def test_images_unzipped_into_a_folder_of_their_own_name(layouts: dict[str, Path], tmp_path: Path) -> None:
    raw, name = tmp_path / "raw", f"{OFFICIAL}_Input"
    shutil.copytree(layouts["official"], raw)
    (raw / name).rename(raw / "inner")
    (raw / name).mkdir()
    (raw / "inner").rename(raw / name / name)
    assert len(read_isic(raw).pairs) == TILES
    (raw / name / name / "metadata.csv").rename(raw / name / "metadata.csv")
    assert len(read_isic(raw).pairs) == TILES
    for path in list(raw.glob(f"{OFFICIAL}*")):
        path.rename(raw / path.name.replace("2024", "2024_Permissive"))
    (raw / f"ISIC_2024_Permissive_Training_Input/{name}").rename(
        raw / "ISIC_2024_Permissive_Training_Input/ISIC_2024_Permissive_Training_Input"
    )
    assert len(read_isic(raw).pairs) == TILES


@pytest.mark.parametrize("inner", ["train-image/image", "train-image/train-image/image/image", "train-image", ""])
def test_kaggles_images_unzipped_into_a_folder_of_their_own_name(copied: Path, inner: str) -> None:
    (copied / "train-image" / "image").rename(copied / "tiles")
    (copied / "train-image" / inner).parent.mkdir(parents=True, exist_ok=True)
    if not inner:
        (copied / "train-image").rmdir()
    (copied / "tiles").rename(copied / "train-image" / inner)
    assert len(read_isic(copied).pairs) == TILES


def test_the_official_files_have_no_hdf5(layouts: dict[str, Path]) -> None:
    assert len(read_isic(layouts["official"], images="jpeg").pairs) == TILES
    with pytest.raises(UserError, match=r"found 'hdf5', but the official files are JPEGs"):
        read_isic(layouts["official"], images="hdf5")


def test_plain_captions_state_the_levels_that_are_present(layouts: dict[str, Path]) -> None:
    table, found = table_of(layouts["jpeg"]), read_isic(layouts["jpeg"])
    texts = Counter(pair.text[0] for pair in found.pairs)
    assert texts.most_common(1) == [("A benign skin lesion.", int((table["iddx_1"] == "Benign").sum()))]
    told = diagnosis_sentences("malignant", ["Malignant epidermal proliferations", None, "Bowen disease", ""])
    assert told == "A malignant skin lesion. Category: Malignant epidermal proliferations. Class: Bowen disease."


def test_captions_with_metadata() -> None:
    assert (
        person_sentence(3.24, "lower extremity", "female", 60)
        == "A lesion of 3.2 mm on the lower extremity of a woman aged 60."
    )
    assert person_sentence(None, "head/neck", None, 45) == "A lesion on the head or neck of a person aged 45."
    assert person_sentence(None, None, "male", None) == "A lesion of a man."
    assert person_sentence(None, None, "unknown", None) == ""
    grades = Grades.of({"tbp_lv_norm_color": np.arange(101.0), "tbp_lv_norm_border": np.array([np.nan, 1.0])})
    looks = {"tbp_lv_L": 40.0, "tbp_lv_Lext": 50.0, "tbp_lv_A": 16.0, "tbp_lv_Aext": 10.0, "tbp_lv_eccentricity": 0.9}
    assert looks_sentence(looks | {"tbp_lv_norm_color": 80.0}, grades) == (
        "Darker than the skin around it, redder, colour uneven, elongated."
    )
    assert looks_sentence({"tbp_lv_L": 40.0, "tbp_lv_norm_color": np.nan}, grades) == ""
    assert [grades.word("tbp_lv_norm_color", value) for value in (0, 25, 26, 98)] == [
        "colour even", "colour even", "colour slightly uneven", "colour very uneven",
    ]  # fmt: skip


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_larger_value_never_gets_a_weaker_word(values: list[float], one: float, other: float) -> None:
    for column, words in GRADED.items():
        grades = Grades.of({column: np.array(values)})
        low, high = (words.index(grades.word(column, value)) for value in sorted((one, other)))
        assert low <= high


def test_what_only_the_training_table_knows_is_in_no_caption_and_no_field(copied: Path) -> None:
    """Whatever such a column says, captions and fields stay as they are; the diagnosis is the label and is said."""
    before = read_isic(copied, metadata=True)
    table = table_of(copied)
    hidden = [
        *(name for name in TRAIN_ONLY if not name.startswith("iddx_") or name == "iddx_full"),
        "tbp_lv_nevi_confidence",
    ]
    for column in hidden:
        table[column] = [f"{number}" for number in range(len(table))]
    after = reread(copied, table, metadata=True)
    assert [(pair.text, pair.fields) for pair in before.pairs] == [(pair.text, pair.fields) for pair in after.pairs]


def test_metadata_captions_are_true_to_what_is_drawn(layouts: dict[str, Path]) -> None:
    """Measured again in the stored JPEG, lesions said to be much darker are so, and the elongated are."""
    found = read_isic(layouts["jpeg"], metadata=True)
    assert len({pair.text[0] for pair in found.pairs}) > 0.9 * TILES
    darkness: dict[str, list[float]] = {}
    for pair in found.pairs:
        grey = np.asarray(Image.open(io.BytesIO(pair.image.read_bytes())).convert("L"), float)  # type: ignore[arg-type]
        middle = grey[14:18, 14:18].mean() - np.concatenate([grey[:2].ravel(), grey[-2:].ravel()]).mean()
        word = next(
            (word for word in ("Much darker", "Darker", "Slightly", "Paler", "As light") if word in pair.text[0]), ""
        )
        darkness.setdefault(word, []).append(middle)
    assert np.mean(darkness["Much darker"]) < np.mean(darkness["Darker"]) - 10
    assert "" not in darkness


def test_each_kind_of_damage_is_named_and_the_rest_goes_on(copied: Path) -> None:
    table, images = table_of(copied), copied / "train-image" / "image"
    keys = table["isic_id"].tolist()
    table.loc[3, "target"] = "2"
    table.loc[4, "target"] = ""
    table.loc[5, ["target", "iddx_1"]] = ["1", "Benign"]
    table.loc[6, "iddx_1"] = "Harmless"
    table.loc[7, "isic_id"] = keys[0]
    table.loc[8, "isic_id"] = " "
    table.loc[9, "age_approx"] = "old"
    (images / f"{keys[2]}.jpg").unlink()
    (images / "ISIC_9999999.jpg").write_bytes((images / f"{keys[0]}.jpg").read_bytes())
    found = reread(copied, table)
    assert reasons(found) == [
        (3, keys[2], "no image of it in image/"),
        (4, keys[3], "target '2', expected 0 or 1"),
        (5, keys[4], "target None, expected 0 or 1"),
        (6, keys[5], "target 1 contradicts iddx_1 'Benign'"),
        (7, keys[6], "iddx_1 'Harmless', expected one of benign, malignant, indeterminate"),
        (8, keys[0], "isic_id again"),
        (9, "", "no isic_id"),
        (None, keys[7], "image without a row in the table"),
        (None, keys[8], "image without a row in the table"),
        (None, "ISIC_9999999", "image without a row in the table"),
    ]
    assert len(found.pairs) == TILES - 7
    assert found.notes["not_numbers"] == {"age_approx": 1}


def test_numbers_that_are_not_finite_are_not_given(copied: Path) -> None:
    table = table_of(copied)
    for row, cell in enumerate(["inf", "-Infinity", "1e400", "nan"]):
        table.loc[row, "age_approx"] = table.loc[row + 4, "clin_size_long_diam_mm"] = cell
        table.loc[row + 8, "tbp_lv_norm_color"] = cell
    found = reread(copied, table, metadata=True)
    assert found.rejected == []
    assert found.notes["not_numbers"] == dict.fromkeys(("age_approx", "clin_size_long_diam_mm", "tbp_lv_norm_color"), 4)
    for pair in found.pairs[:4]:
        assert "age" not in pair.fields
        assert "aged" not in pair.text[0]
    for pair in found.pairs[4:8]:
        assert not {"size", "size_mm"} & pair.fields.keys()
        assert " mm" not in pair.text[0]
    json.dumps([pair.fields for pair in found.pairs] + [found.notes], allow_nan=False)


def test_rows_of_one_tile_that_contradict_each_other_are_all_rejected(copied: Path) -> None:
    table = table_of(copied)
    keys = table["isic_id"].tolist()
    benign = table.index[table["iddx_1"] == "Benign"].tolist()
    a, b, c, d, e, f = benign[:6]
    again = table.loc[[a, b, c, d, e, f]].copy()
    again.loc[a, ["target", "iddx_1"]] = ["1", "Malignant"]
    again.loc[b, "iddx_1"] = "Indeterminate"
    again.loc[c, "patient_id"] = "IP_9999999"
    again.loc[d, "target"] = "0.0"  # the same, written otherwise
    again.loc[e, "target"] = "2"  # of no use, so it contradicts nothing
    table.loc[f, "target"] = ""  # nor does this, and the other row stands
    found = reread(copied, pd.concat([table, again], ignore_index=True))
    told = {(one.row, one.key): one.reason for one in found.rejected}
    assert told == {
        (a + 1, keys[a]): "isic_id again with another target and iddx_1",
        (TILES + 1, keys[a]): "isic_id again with another target and iddx_1",
        (b + 1, keys[b]): "isic_id again with another iddx_1",
        (TILES + 2, keys[b]): "isic_id again with another iddx_1",
        (c + 1, keys[c]): "isic_id again with another patient_id",
        (TILES + 3, keys[c]): "isic_id again with another patient_id",
        (TILES + 4, keys[d]): "isic_id again",
        (TILES + 5, keys[e]): "target '2', expected 0 or 1",
        (f + 1, keys[f]): "target None, expected 0 or 1",
    }
    packed = [pair.key for pair in found.pairs]
    assert sorted(packed) == sorted({*keys} - {keys[a], keys[b], keys[c]})


def test_contradicting_rows_beside_the_first_table_are_rejected(layouts: dict[str, Path], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(layouts["official"], raw)
    for path, column, cell in (
        (raw / f"{OFFICIAL}_Supplement.csv", "iddx_1", "Indeterminate"),
        (raw / f"{OFFICIAL}_Input" / "metadata.csv", "patient_id", "IP_9999999"),
    ):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        row = {"iddx_1": 3, "patient_id": 6}[column]
        again = table.loc[[row, 9]].copy()
        again.loc[row, column] = cell
        pd.concat([table, again], ignore_index=True).to_csv(path, index=False)
    found = read_isic(raw)
    keys = [pair.key for pair in found.pairs]
    assert len(keys) == TILES - 2
    assert [one for one in reasons(found) if one[0] is not None] == [
        (4, "ISIC_0000004", f"{OFFICIAL}_Supplement.csv has it again with another iddx_1"),
        (7, "ISIC_0000007", "metadata.csv has it again with another patient_id"),
    ]
    assert (None, "ISIC_0000010", "row 152 of metadata.csv: isic_id again") in reasons(found)
    assert "ISIC_0000010" in keys


def test_tables_beside_the_first_that_lack_or_repeat_a_row(layouts: dict[str, Path], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(layouts["official"], raw)
    path = raw / f"{OFFICIAL}_Supplement.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], *lines[6:], lines[1]]) + "\n")
    found = read_isic(raw)
    assert reasons(found) == [
        (None, "ISIC_0000001", f"row 150 of {path.name}: isic_id again"),
        (5, "ISIC_0000005", f"no row in {path.name}"),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["image_name", "patient_id", "sex", "age_approx", "benign_malignant", "target"], "the columns of ISIC 2020"),
        (["image", "MEL", "NV", "BCC"], "the columns of ISIC 2018 or 2019"),
        (["image_id", "melanoma", "seborrheic_keratosis"], "the columns of ISIC 2016 or 2017"),
        (["isic_id", "target", "iddx_2"], "no column 'iddx_1'; nearest: 'iddx_2'"),
        (["isic_id", "iddx_1"], "no column 'target'"),
        (["isic", "target", "iddx_1"], "no column 'isic_id'; nearest: 'isic'"),
    ],
)
def test_other_columns_are_one_line(copied: Path, columns: list[str], message: str) -> None:
    table = pd.DataFrame([["x"] * len(columns)], columns=columns)
    with pytest.raises(UserError, match=message) as caught:
        reread(copied, table)
    assert "\n" not in str(caught.value)


def test_missing_files_are_one_line(layouts: dict[str, Path], copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        read_isic(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"found no table; expected train-metadata.csv or ISIC_2024"):
        read_isic(tmp_path / "empty")
    pd.DataFrame({"image": ["a"], "MEL": ["1"]}).to_csv(tmp_path / "empty" / "ISIC_2019_Training_GroundTruth.csv")
    with pytest.raises(UserError, match="the columns of ISIC 2018 or 2019"):
        read_isic(tmp_path / "empty")
    with pytest.raises(UserError, match=r"but not its images; expected train-image.hdf5"):
        read_isic(copied, images="hdf5")
    shutil.rmtree(copied / "train-image")
    with pytest.raises(UserError, match="but not its images"):
        read_isic(copied)
    official = tmp_path / "official"
    shutil.copytree(layouts["official"], official)
    (official / f"{OFFICIAL}_Supplement.csv").unlink()
    with pytest.raises(UserError, match=r"Supplement.csv: there is no such table"):
        read_isic(official)


def test_where_no_patient_is_given_the_lesion_is_kept_together(copied: Path) -> None:
    table = table_of(copied)
    table["patient_id"] = ["p1", "", "", "", *[""] * (TILES - 4)]
    table["lesion_id"] = ["l1", "l1", "l2", "l2", *[""] * (TILES - 4)]
    found = reread(copied, table)
    assert found.notes["units"] == {"patient_id": 2, "lesion_id": 2, "none": TILES - 4}
    assert [pair.fields["unit"] for pair in found.pairs[:5]] == ["p1", "p1", "l2", "l2", "ISIC_0000005"]
    without = reread(copied, table.drop(columns=["patient_id", "lesion_id"]))
    assert without.notes["units"] == {"none": TILES}
    assert without.notes["columns_absent"] == ["patient_id", "lesion_id"]


def test_a_lesion_of_two_patients_keeps_both_together(copied: Path) -> None:
    table = table_of(copied)
    table["patient_id"] = ["p1", "p2", "", "p2", "p3", "", *[""] * (TILES - 6)]
    table["lesion_id"] = ["l1", "l1", "l1", "l2", "l3", "l4", *[""] * (TILES - 6)]
    found = reread(copied, table)
    assert [pair.fields["unit"] for pair in found.pairs[:7]] == ["p1", "p1", "p1", "p1", "p3", "l4", "ISIC_0000007"]
    assert found.notes["units"] == {"patient_id": 5, "lesion_id": 1, "none": TILES - 6}
    assert found.notes["lesions_of_several_patients"] == 1
    assert "lesions_of_several_patients" in reread(copied, table.drop(columns="lesion_id")).notes


rows_of_units = st.lists(st.tuples(st.sampled_from(["", *"abcd"]), st.sampled_from(["", *"vwxyz"])), max_size=12)


@given(rows_of_units)
def test_rows_of_one_patient_or_one_lesion_are_of_one_unit(rows: list[tuple[str, str]]) -> None:
    keys = [f"k{number}" for number in range(len(rows))]
    units, known_by, several = _units(keys, *([row[place] or None for row in rows] for place in (0, 1)))
    for place in (0, 1):
        for name in {row[place] for row in rows} - {""}:
            assert len({unit for unit, row in zip(units, rows, strict=True) if row[place] == name}) == 1
    # Nothing is joined without a chain of such rows.
    graph = networkx.Graph((f"row {n}", f"{place}{row[place]}") for n, row in enumerate(rows) for place in (0, 1))
    graph.remove_nodes_from([name for name in ("0", "1") if name in graph])
    assert len(set(units)) == networkx.number_connected_components(graph)
    assert several == sum(len({p for p, held in rows if held == name} - {""}) > 1 for name in "vwxyz")
    for unit, how, key in zip(units, known_by, keys, strict=True):
        assert unit in {"patient_id": "abcd", "lesion_id": "vwxyz", "none": key}[how]


def test_metadata_captions_without_metadata_are_refused(copied: Path) -> None:
    table = table_of(copied)[["isic_id", "target", "iddx_1"]]
    assert len(reread(copied, table).pairs) == TILES
    with pytest.raises(UserError, match="no column that metadata captions are made of"):
        read_isic(copied, metadata=True)


def test_every_split_gets_its_share_of_the_malignant() -> None:
    """393 of 401,059 tiles among 1,042 patients, scaled down twenty times in tiles per patient."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(1042), rng.integers(5, 35, 1042))
    risk = rng.gamma(0.3, 1.0, 1042)[unit]
    malignant = set(rng.choice(len(unit), 393, replace=False, p=risk / risk.sum()).tolist())
    pairs = [
        Pair(str(n), b"", [""], {"label": "malignant" if n in malignant else "benign", "unit": f"P{u}"}, n + 1)
        for n, u in enumerate(unit.tolist())
    ]
    fractions = {"train": 0.8, "val": 0.1, "test": 0.1}
    splits = split_pairs(pairs, fractions, 0, IsicPairs(pairs, [], {}, {}).strata())
    for name, chosen in splits.items():
        held = sum(pair.fields["label"] == "malignant" for pair in chosen)
        assert held / 393 == pytest.approx(fractions[name], rel=0.2)
        assert len(chosen) / len(pairs) == pytest.approx(fractions[name], rel=0.1)
    patients = [{pair.fields["unit"] for pair in chosen} for chosen in splits.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))


@pytest.mark.parametrize("layout", ["hdf5", "jpeg"])
def test_the_recipe_packs_bytes_as_they_are_and_names_what_is_damaged(
    layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(layouts[layout], raw)
    if layout == "hdf5":
        with h5py.File(raw / "train-image.hdf5", "a") as file:
            whole = bytes(file["ISIC_0000002"][()])
            del file["ISIC_0000002"], file["ISIC_0000003"]
            file["ISIC_0000002"] = np.bytes_(whole[:-40])
    else:
        path = raw / "train-image/image/ISIC_0000002.jpg"
        path.write_bytes(path.read_bytes()[:-40])
        (raw / "train-image/image/ISIC_0000003.jpg").unlink()
    recipe(raw, "--out", tmp_path / "out", "--metadata", "--workers", 0, "--check", "header")
    printed = capsys.readouterr().out
    assert "train-metadata.csv, " in printed
    assert printed.splitlines()[-1].startswith(f"rejected: 2 of {TILES}")
    refused = pd.read_csv(tmp_path / "out" / "rejected.csv")
    assert refused["key"].tolist() == ["ISIC_0000002", "ISIC_0000003"]
    assert "cut short" in refused["reason"][0]
    assert "no image of it" in refused["reason"][1]
    packed = ShardSet.open(tmp_path / "out")
    images = layouts["jpeg"] / "train-image" / "image"
    for name in packed.manifest.splits:
        split = packed.split(name)
        for sample in map(split.read, range(len(split))):
            assert sample.image == (images / f"{sample.key}.jpg").read_bytes()
            assert {"label", "unit", "age", "site", "size", "size_mm"} <= sample.fields.keys()
    notes = packed.manifest.notes
    assert notes["isic"]["limits"].keys() == GRADED.keys()
    assert sum(notes["split"]["labels"][name].get("malignant", 0) for name in packed.manifest.splits) == 9
    with pytest.raises(UserError, match=r"above the limit of 1.00%"):
        recipe(raw, "--out", tmp_path / "strict", "--max-rejected", 0.01, "--check", "header")


@pytest.mark.parametrize("drawn", [True, False])
def test_the_recipe_asks_the_folder_whether_its_tiles_are_drawn(copied: Path, tmp_path: Path, drawn: bool) -> None:
    if not drawn:
        (copied / "phantom.json").unlink()
    recipe(copied, "--out", tmp_path / "out", "--workers", 0, "--check", "none")
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest.notes["synthetic"] is drawn
    assert ("CC-BY-NC" in manifest.license, "Synthetic" in manifest.license) == (not drawn, drawn)


def test_phantoms_have_the_published_columns_and_rates(tmp_path: Path) -> None:
    options = PhantomOptions(700, "jpeg", 32, 0.003, seed=1)
    write_isic_layout(tmp_path / "raw", options, workers=2)
    table = table_of(tmp_path / "raw")
    assert len(table.columns) == 55
    assert int((table["target"] == "1").sum()) == 2
    assert (table["iddx_2"] == "").mean() > 0.99
    assert table.groupby("patient_id").size().between(1, 100).all()
    assert table["patient_id"].nunique() > 7
    assert (table.groupby("patient_id")["age_approx"].nunique() == 1).all()
    before = (tmp_path / "raw" / TABLE).stat().st_mtime_ns
    write_isic_layout(tmp_path / "raw", options)
    assert (tmp_path / "raw" / TABLE).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="delete the folder or name another one"):
        write_isic_layout(tmp_path / "raw", PhantomOptions(701, "jpeg", 32))


@pytest.mark.parametrize(
    ("tiles", "layout", "side", "malignant"),
    [(0, "hdf5", 64, 0.1), (9, "zip", 64, 0.1), (9, "hdf5", 8, 0.1), (9, "hdf5", 64, 0.9)],
)
def test_impossible_phantoms_are_refused(tiles: int, layout: str, side: int, malignant: float) -> None:
    with pytest.raises(UserError):
        PhantomOptions(tiles, layout, side, malignant)
