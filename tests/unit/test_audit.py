"""An audit names every planted fault and nothing in a sound set; a new division leaves none of it across splits."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from clipdist.cli import main
from clipdist.data.sets import survey
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import ShardSet
from tests.conftest import TrainedRun
from tests.unit.pictures import encoded, photograph

Audited = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def audited(capsys: pytest.CaptureFixture[str]) -> Audited:
    """audited(set, options …) -> exit code and what `--json` prints."""

    def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["audit", str(folder), "--json", "--workers", "1", *options])
        return code, json.loads(capsys.readouterr().out)

    return run


def keys(found: dict[str, Any], straddles: bool = True) -> set[frozenset[str]]:
    listed = [one for one in found["listed"] if one["straddles"] == straddles]
    return {frozenset(place["key"] for place in one["pictures"]) for one in listed}


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encoded(image, "JPEG", quality=quality)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 photographs in train and 10 in test; four changed copies of train's in test, one of equal bytes, one shared
    patient, a near-duplicate within train, and one picture of each fault."""
    folder = tmp_path_factory.mktemp("audit") / "planted"
    train = [photograph(320, 240, seed) for seed in range(20)]
    width, height = train[0].size
    changed = {
        "recompressed": jpeg(train[0], 30),
        "resized": jpeg(train[1].resize((160, 120))),
        "cropped": jpeg(train[2].crop((8, 3, width - 2, height - 5))),
        "brightened": jpeg(ImageEnhance.Brightness(train[3]).enhance(1.2)),
        "same bytes": jpeg(train[4]),
    }
    white = np.array(photograph(320, 240, 70))
    white[:200] = 255
    bad = {
        "blank": Image.new("RGB", (300, 200), (3, 4, 3)),
        "blurred": photograph(320, 240, 71).filter(ImageFilter.GaussianBlur(5)),
        "saturated": Image.fromarray(white),
        "dark": ImageEnhance.Brightness(photograph(320, 240, 72)).enhance(0.15),
        "tiny": photograph(60, 40, 73),
        "long": photograph(800, 150, 74),
    }
    with ShardSetWriter(folder, samples_per_shard=12) as out:
        for number, image in enumerate(train):
            fields = {"text": f"caption {number // 4}", "label": "common" if number else "rare", "unit": f"p{number}"}
            out.write("train", f"train/{number}", jpeg(image), "jpg", fields)
        out.write(
            "train", "train/again", jpeg(train[5].resize((200, 150))), "jpg", {"text": "again", "label": "common"}
        )
        for fault, image in bad.items():
            out.write("train", f"bad/{fault}", encoded(image), "png", {"text": f"a {fault} one", "label": "common"})
        for number in range(10):
            fields = {"text": "Caption  0" if number < 3 else f"test {number}", "label": "common", "unit": f"t{number}"}
            fields |= {"unit": "p7"} if number == 0 else {}
            out.write("test", f"test/{number}", jpeg(photograph(320, 240, 100 + number)), "jpg", fields)
        for name, data in changed.items():
            out.write("test", f"copy/{name}", data, "jpg", {"text": name})
        out.write("test", "broken", b"\xff\xd8\xff no jpeg", "jpg", {"text": "broken", "label": "common"})
    return folder


def test_planted_faults_are_named(planted: Path, audited: Audited) -> None:
    code, found = audited(planted)
    assert (code, found["leaks_found"]) == (1, True)
    leaks = found["leaks"]
    assert leaks["units"]["listed"] == [{"unit": "p7", "splits": {"train": 1, "test": 1}}]
    assert keys(leaks["same"]) == {frozenset({"train/4", "copy/same bytes"})}
    names = ("recompressed", "resized", "cropped", "brightened")
    assert keys(leaks["near"]) == {frozenset({f"train/{n}", f"copy/{name}"}) for n, name in enumerate(names)}
    assert keys(leaks["near"], straddles=False) == {frozenset({"train/5", "train/again"})}
    assert [one["straddles"] for one in leaks["near"]["listed"]] == [True] * 4 + [False]
    assert {fault: [place["key"] for place in one["listed"]] for fault, one in found["quality"].items()} == {
        fault: [f"bad/{fault}"] for fault in ("blank", "blurred", "saturated", "dark", "tiny", "long")
    }
    assert [one["key"] for one in found["unreadable"]["listed"]] == ["broken"]


def test_captions_classes_and_sizes_are_counted(planted: Path, audited: Audited) -> None:
    _, found = audited(planted)
    train = found["captions"]["splits"]["train"]
    assert (train["captions"], train["distinct"], train["duplicates"]) == (27, 12, round(15 / 27, 4))
    assert train["commonest"][0] == {"text": "caption 0", "times": 4, "share": round(4 / 27, 4)}
    shared = {(one["of"], one["also_in"]): one["share"] for one in found["captions"]["shared"]}
    assert shared == {("train", "test"): round(4 / 27, 4), ("test", "train"): round(3 / 16, 4)}
    classes = found["classes"]
    assert classes["counts"] == {"common": {"train": 26, "test": 11}, "rare": {"train": 1, "test": 0}}
    assert classes["splits"]["train"]["imbalance"] == 26
    assert (classes["splits"]["test"]["absent"], classes["splits"]["test"]["lacking"]) == (1, 5)
    assert found["sizes"]["train"]["commonest"][0] == {"size": [320, 240], "times": 23}
    assert found["sizes"]["train"]["shorter_side"]["smallest"] == 40


def test_a_sound_set_has_no_leak_and_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardSetWriter(tmp_path / "set") as out:
        for number in range(12):
            data = jpeg(photograph(256, 256, number))
            out.write("train" if number < 8 else "val", f"k{number}", data, "jpg", {"text": f"text {number}"})
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "set"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("splits are apart: no unit and no picture lies in two\n")
    assert "pictures: none blank, blurred, saturated, dark, tiny or long" in printed
    assert "classes: no sample has the field 'label'" in printed


def test_a_second_audit_looks_at_no_shard_that_is_as_it_was(
    planted: Path, audited: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ("--state", str(tmp_path))
    first = audited(planted, *state)
    asked: list[str] = []
    look = survey.survey_shard

    def noted(folder: Path, split: str, info: Any) -> Any:
        asked.append(info.file)
        return look(folder, split, info)

    monkeypatch.setattr(survey, "survey_shard", noted)
    assert audited(planted, *state) == first
    assert asked == []
    torn = tmp_path / "test-000000.tar.npz"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert audited(planted, *state) == first
    assert asked == ["test-000000.tar"]
    audited(planted, *state, "--again")
    assert len(asked) == 1 + 5


def test_copies_of_a_near_duplicate_tell_of_the_other_split(tmp_path: Path, audited: Audited) -> None:
    picture = photograph(256, 256, 1)
    with ShardSetWriter(tmp_path / "set") as out:
        out.write("train", "a", jpeg(picture), "jpg", {"text": "a"})
        out.write("train", "b", jpeg(picture, 40), "jpg", {"text": "b"})
        out.write("val", "copy of b", jpeg(picture, 40), "jpg", {"text": "c"})
    _, found = audited(tmp_path / "set")
    assert keys(found["leaks"]["same"]) == {frozenset({"b", "copy of b"})}
    assert keys(found["leaks"]["near"]) == {frozenset({"a", "copy of b"})}
    assert found["leaks"]["near"]["largest_group"] == 3


def test_the_page_shows_pairs_across_splits_first(planted: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "audit.html"
    assert main(["audit", str(planted), "--report", str(page), "--workers", "1"]) == 1
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:4] == [
        "Units in several splits",
        "Near-duplicates across splits: 4",
        "Equal bytes across splits: 1",
        "Near-duplicates within a split: 1",
    ]
    assert [title for title in titles if title.endswith(": 1")][2:] == [
        f"{fault}: 1" for fault in ("Blank", "Blurred", "Saturated", "Under-exposed", "Tiny", "Long")
    ]
    assert text.count('<img src="data:image/jpeg') == 2 * (4 + 1 + 1) + 6
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_what_samples_say_is_no_markup(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as out:
        for split in ("train", "val"):
            fields = {"text": "<script>alert(1)</script>", "label": "<b>", "unit": "<i>one</i>"}
            out.write(split, f"k{split}", jpeg(photograph(200, 200, 1)), "jpg", fields)
    main(["audit", str(tmp_path / "set"), "--report", str(tmp_path / "page.html"), "--workers", "1"])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text
    assert not re.search(r"<script|<i>one", text)


# Features of a model


def test_features_made_elsewhere_find_neighbours(planted: Path, tmp_path: Path, audited: Audited) -> None:
    vectors = np.eye(4)
    vectors[3] = 5 * vectors[0] + 0.1
    np.savez(tmp_path / "f.npz", keys=["train/9", "train/10", "test/3", "test/4"], image_features=vectors)
    _, found = audited(planted, "--embeddings", str(tmp_path / "f.npz"), "--cosine", "0.9")
    assert keys(found["leaks"]["embedding"]) == {frozenset({"train/9", "test/4"})}
    assert found["leaks"]["embedding"]["pairs"] == 1


def test_a_models_features_find_equal_pictures(trained_run: TrainedRun, planted: Path, audited: Audited) -> None:
    model = str(trained_run.folder / "model")
    _, found = audited(planted, "--model", model, "--device", "cpu", "--cosine", "0.99999")
    assert found["leaks"]["embedding"]["pictures"] == 42
    assert frozenset({"train/4", "copy/same bytes"}) in keys(found["leaks"]["embedding"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embeddings", "missing.npz"], "--embeddings missing.npz: .*expected an .npz of `keys`"),
        (["--model", "m", "--embeddings", "e"], "--model and --embeddings exclude each other"),
        (["--cosine", "1.5"], "--cosine: found 1.5, expected above 0 and at most 1"),
        (["--bits", "40"], "--bits: found 40, expected 0 to 16"),
        (["--workers", "0"], "--workers: found 0, expected at least 1"),
        (["--tokenizer", "no/such"], "--tokenizer no/such: no tokenizer at no/such"),
        (["--blurred", "-1"], "--blurred: found -1"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], message: str, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(planted), *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_embeddings_that_cannot_be_are_one_line(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ones = np.eye(2, 4, dtype=np.float32)
    np.save(tmp_path / "array.npy", ones)
    np.savez(tmp_path / "whole.npz", keys=["train/1", "train/2"], image_features=ones)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "damaged.npz").write_bytes(data.replace(ones.tobytes(), ones[::-1].tobytes()))
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "names.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    np.savez(tmp_path / "twice.npz", keys=["train/1", "train/2", "train/1"], image_features=np.eye(3))
    np.savez(tmp_path / "nan.npz", keys=["train/1", "train/2"], image_features=ones * np.nan)
    np.savez(tmp_path / "numbers.npz", keys=[1, 2], image_features=ones)
    np.savez(tmp_path / "single.npz", keys="train/1", image_features=ones[:1])
    expected = "expected an .npz of `keys`, strings, and `image_features`"
    for name, message in {
        "array.npy": expected,
        "cut.npz": expected,
        "damaged.npz": expected,
        "empty.npz": expected,
        "names.npz": expected,
        "numbers.npz": expected,
        "single.npz": expected,
        "twice.npz": "1 keys, such as 'train/1', come more than once; expected each once",
        "nan.npz": "2 of 2 features, such as that of 'train/1', are not finite",
    }.items():
        capsys.readouterr()
        assert main(["audit", str(planted), "--embeddings", str(tmp_path / name), "--workers", "1"]) == 2, name
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"clipdist: error: --embeddings {tmp_path / name}: ")
        assert message in told


# Damage


@pytest.mark.parametrize("damage", ["tar missing", "index missing", "tar cut", "index cut", "other count"])
def test_a_shard_that_cannot_be_opened_does_not_stop_an_audit(
    planted: Path,
    tmp_path: Path,
    damage: str,
    audited: Audited,
    capsys: pytest.CaptureFixture[str],
    trained_run: TrainedRun,
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(planted, folder, ignore=shutil.ignore_patterns(".audit"))
    tar = folder / "train-000001.tar"
    index = tar.with_suffix(".idx")
    if "missing" in damage:
        (tar if damage == "tar missing" else index).unlink()
    elif "cut" in damage:
        path = tar if damage == "tar cut" else index
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        assert text.count('"train-000001.tar", "samples": 12') == 1
        (folder / "manifest.json").write_text(
            text.replace('"train-000001.tar", "samples": 12', '"train-000001.tar", "samples": 13')
        )
    lost = 13 if damage == "other count" else 12
    for _ in range(2):  # the second time from what was kept
        code, found = audited(folder)
        assert code == 1
        assert found["samples"] == 43 + lost - 12
        assert found["unreadable"]["count"] == lost + 1
        (shard,) = found["unreadable"]["shards"]
        assert (shard["shard"], shard["samples"]) == ("train-000001.tar", lost)
        listed = [one["key"] for one in found["unreadable"]["listed"]]
        assert listed == ["broken", *(f"train-000001.tar, sample {n}" for n in range(1, lost + 1))]
    # What the other shards hold is told as before; samples that cannot be read are not without captions.
    assert found["captions"]["splits"]["train"]["without"] == 0
    assert sum(found["classes"]["counts"]["common"].values()) == 37 - 12
    assert keys(found["leaks"]["same"]) == {frozenset({"train/4", "copy/same bytes"})}
    np.savez(tmp_path / "f.npz", keys=["train/1", "test/3"], image_features=np.ones((2, 3)))
    _, found = audited(folder, "--embeddings", str(tmp_path / "f.npz"))
    assert found["leaks"]["embedding"]["pairs"] == 1
    if damage == "tar cut":
        _, found = audited(folder, "--model", str(trained_run.folder / "model"), "--device", "cpu")
        assert found["leaks"]["embedding"]["pictures"] == 30
        page = str(tmp_path / "page.html")
        assert main(["audit", str(folder), "--workers", "1", "--report", page, "--tokenizer", "captions"]) == 1
        printed = capsys.readouterr().out
        assert "unreadable: 13 (clipdist verify tells more)" in printed
        assert re.search(r"\n    train-000001.tar: all 12: .*: found \d+ bytes where its index expects", printed)
        assert "train-000001.tar" in Path(page).read_text(encoding="utf-8")


def test_a_division_leaves_out_the_whole_of_a_shard_that_cannot_be_opened(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(planted, tmp_path / "set", ignore=shutil.ignore_patterns(".audit"))
    (tmp_path / "set" / "train-000001.tar").unlink()
    words = ["split", str(tmp_path / "set"), "--fractions", "train=0.6", "test=0.4", "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "a.csv")]) == 0
    assert "left out: 13 samples that cannot be read" in capsys.readouterr().out
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        named = {row["key"] for row in csv.DictReader(file)}
    held = ShardSet.open(planted)
    whole = [held.split(name).key(n) for name in ("train", "test") for n in range(len(held.split(name)))]
    assert named == {*whole[:12], *whole[24:]} - {"broken"}


# Tokenizers


def test_a_tokenizer_of_the_captions_needs_fewer_tokens(tmp_path: Path, audited: Audited) -> None:
    from clipdist.data.text import train_wordpiece
    from tests.unit.test_text import CAPTIONS

    with ShardSetWriter(tmp_path / "set") as out:
        for number, caption in enumerate([*CAPTIONS, "nevus " * 30]):
            out.write("train", f"k{number}", jpeg(photograph(64, 64, number)), "jpg", {"text": caption})
    general = ["a small house of stone, with the windows and a garden."] * 3 + ["people, rivers; trees"] * 3
    train_wordpiece(general, 200, 16).save(tmp_path / "general")
    options = ("--tokenizer", str(tmp_path / "general"), "--tokenizer", "captions", "--max-tokens", "16")
    _, found = audited(tmp_path / "set", *options)
    first, own = found["tokenizers"]
    assert first["tokenizer"] == str(tmp_path / "general")
    assert own["tokens_per_word"] < first["tokens_per_word"]
    assert (own["unknown"], own["captions"]) == (0, len(CAPTIONS) + 1)
    assert first["unknown"] > 0
    assert own["tokens"]["longest"] == 32  # thirty words, a token each, and two special ones
    assert own["cut"] == round(1 / (len(CAPTIONS) + 1), 4)


# A new division


def test_a_new_division_leaves_nothing_across_splits(
    planted: Path, tmp_path: Path, audited: Audited, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["split", str(planted), "--fractions", "train=0.6", "test=0.4", "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "a.csv"), "--repack", str(tmp_path / "divided")]) == 0
    printed = capsys.readouterr().out
    assert "duplicates joined 6 with others" in printed
    assert "left out: 1 samples that cannot be read" in printed
    code, found = audited(tmp_path / "divided")
    assert code == 0
    assert found["samples"] == 42
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        table = {row["key"]: row["split"] for row in csv.DictReader(file)}
    assert len(table) == 42
    assert table["train/2"] == table["copy/cropped"]
    assert table["train/7"] == table["test/0"]
    for name in ("train", "test"):
        split = ShardSet.open(tmp_path / "divided").split(name)
        assert {split.key(row) for row in range(len(split))} == {key for key, where in table.items() if where == name}
    assert main([*words, "--out", str(tmp_path / "b.csv")]) == 0
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert main([*words, "--out", str(tmp_path / "c.csv"), "--seed", "1"]) == 0
    assert (tmp_path / "c.csv").read_bytes() != (tmp_path / "a.csv").read_bytes()


def test_without_duplicates_units_alone_count(planted: Path, tmp_path: Path) -> None:
    words = ["split", str(planted), "--fractions", "train=0.6", "test=0.4", "--workers", "1", "--no-duplicates"]
    assert main([*words, "--out", str(tmp_path / "a.csv")]) == 0
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        units = {row["key"]: row["unit"] for row in csv.DictReader(file)}
    assert units["train/2"] != units["copy/cropped"]
    assert units["train/7"] == units["test/0"]


def test_a_division_tells_of_a_search_that_was_cut_short(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["split", str(planted), "--fractions", "train=0.6", "test=0.4", "--seed", "3", "--workers", "1"]
    assert main([*words, "--repack", str(tmp_path / "whole")]) == 0
    assert "not all pairs were compared" not in capsys.readouterr().out
    told = {"fractions": {"train": 0.6, "test": 0.4}, "stratify_by": "label", "seed": 3}
    notes = ShardSet.open(tmp_path / "whole").manifest.notes["division"]
    assert notes == {**told, "duplicates_joined": 6, "cut_short": 0}
    monkeypatch.setattr("clipdist.data.sets.duplicates.MOST_NEIGHBOURS", 0)
    assert main([*words, "--repack", str(tmp_path / "cut")]) == 0
    (count,) = re.findall(
        r"warning: (\d+) pictures look like so many others that not all pairs were compared", capsys.readouterr().out
    )
    assert ShardSet.open(tmp_path / "cut").manifest.notes["division"]["cut_short"] == int(count) > 0
    assert main([*words, "--repack", str(tmp_path / "units"), "--no-duplicates"]) == 0
    assert ShardSet.open(tmp_path / "units").manifest.notes["division"] == {**told, "duplicates_joined": None}


@pytest.mark.parametrize("bits", ["-1", "17"])
def test_a_division_refuses_bits_that_find_nothing(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str
) -> None:
    words = ["split", str(planted), "--fractions", "train=0.6", "test=0.4", "--out", str(tmp_path / "a.csv")]
    assert main([*words, "--bits", bits]) == 2
    assert f"--bits: found {bits}, expected 0 to 16" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_a_division_needs_somewhere_to_go(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(planted), "--fractions", "train=0.6", "test=0.4"]) == 2
    assert "expected --out FILE.csv, --repack DST, or both" in capsys.readouterr().err
