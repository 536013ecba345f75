"""Leaks planted between a training set and an evaluated split are found, each as what it is, and nothing else is."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.evaluate import leaks as module
from clipdist.evaluate.estimates import Measured, mean_of
from clipdist.evaluate.leaks import Evaluated, Leaks, Trained, find_leaks, trained_on
from clipdist.evaluate.suite import units_of
from tests.unit.pictures import encoded, photograph

PICTURES = [photograph(96, 72, seed) for seed in range(16)]
TRAINING = 8


def write(folder: Path, *, evaluated_apart: bool, **options: Any) -> tuple[Path, Path]:
    """(training set, evaluated set), the same where not `evaluated_apart`: eight training images, and eight of which
    four leak in one way each."""
    both = (folder / "train", folder / "test") if evaluated_apart else (folder / "one", folder / "one")
    with ExitStack() as stack:
        writers = {
            place: stack.enter_context(ShardSetWriter(place, samples_per_shard=3, license_text="CC0-1.0", **options))
            for place in dict.fromkeys(both)
        }
        fill(writers[both[0]], writers[both[1]], evaluated_apart)
    return both


def fill(train: ShardSetWriter, test: ShardSetWriter, evaluated_apart: bool) -> None:
    def put(place: ShardSetWriter, split: str, key: str, picture: Any, text: str, unit: str) -> None:
        fields = {"text": text, "unit": unit}
        data = picture if isinstance(picture, bytes) else encoded(picture, "JPEG", quality=90)
        place.write(split, key, data, "jpg", fields)

    for number in range(TRAINING):
        put(train, "train", f"t{number}", PICTURES[number], f"caption {number}", f"u{number}")
    put(test, "test", "bytes", PICTURES[0], "another caption", "v0")
    put(test, "test", "unit", PICTURES[8], "of patient one", "u1")
    small = PICTURES[2].resize((80, 60))
    put(test, "test", "look", encoded(small, "JPEG", quality=70), "looks like two", "v2")
    for number in range(9, 13):
        put(test, "test", f"clean{number}", PICTURES[number], f"clean {number}", f"v{number}")
    if evaluated_apart:  # in one set a key stands once
        put(test, "test", "t3", encoded(PICTURES[3].rotate(90), "PNG"), "caption 3", "v3")
        put(test, "test", "t4", PICTURES[13], "only the number is the same", "v4")


def audit(train: Path, test: Path, level: str, split: str = "test", val: str | None = None) -> Leaks:
    shard_set = ShardSet.open(test)
    scored = shard_set.split(split)
    samples = [scored.read(number) for number in range(len(scored))]
    evaluated = Evaluated(
        shard_set, scored, np.arange(len(scored)), [s.key for s in samples], [s.fields for s in samples], "unit"
    )
    trained = [Trained(str(train), ShardSet.open(train).manifest.digest, "train")]
    return find_leaks(evaluated, trained, val, level=level, workers=0)


def named(leaks: Leaks) -> dict[str, list[str]]:
    return {kind: [one["key"] for one in listed] for kind, listed in leaks.listed.items()}


@pytest.mark.parametrize("options", [{}, {"zstd": True}], ids=["tar", "zst"])
def test_planted_leaks_between_two_sets(tmp_path: Path, options: dict[str, Any]) -> None:
    train, test = write(tmp_path, evaluated_apart=True, **options)
    leaks = audit(train, test, "index")
    assert named(leaks) == {"samples": ["t3"], "units": ["unit"], "bytes": ["bytes"]}
    assert leaks.listed["bytes"] == [{"key": "bytes", "trained": "t0"}]
    assert leaks.keys_alone == 1
    assert leaks.leaked_N.sum() == 3
    assert leaks.not_checked == {"looks": "--audit looks"}
    assert "3 of 9 images are in the 8 of train train, too: samples 1, units 1, bytes 1" in leaks.line()
    assert sum("it is another set" in note for note in leaks.notes()) == 1


def sets_of(folder: Path, rows: dict[str, list[tuple[str, Any]]]) -> Leaks:
    """Audit of numbered samples, (caption, unit) of each, in sets of their own named train and test."""
    for place, (name, samples) in enumerate(rows.items()):
        with ShardSetWriter(folder / name, samples_per_shard=9, license_text="CC0-1.0") as writer:
            for number, (text, unit) in enumerate(samples):
                data = encoded(PICTURES[8 * place + number], "PNG")
                writer.write(name, f"k{number}", data, "png", {"text": text, "unit": unit})
    return audit(folder / "train", folder / "test", "index")


def test_units_are_compared_by_one_name(tmp_path: Path) -> None:
    rows = {"train": [("a", 1.0), ("b", ""), ("c", "2")], "test": [("d", 1), ("e", ""), ("f", 2.0), ("g", 3)]}
    assert named(sets_of(tmp_path, rows))["units"] == ["k0", "k2"]
    assert units_of([{"unit": value} for value in (1.0, 1, "1", 1.5, "", None)], "unit") == [
        *("1", "1", "1", "1.5", None, None)
    ]
    assert units_of([{"unit": ""}, {}], "unit") is None
    for value, words in ((["a"], "a list"), ({"a": 1}, "an object")):
        with pytest.raises(UserError, match=f"unit field: found {words}, expected one value"):
            units_of([{"unit": value}], "unit")


def test_a_key_and_a_caption_of_many_images_are_no_leak(tmp_path: Path) -> None:
    rows = {name: [("a cat", None), ("a dog", None), ("a cat", None)] for name in ("train", "test")}
    leaks = sets_of(tmp_path, rows)
    assert named(leaks)["samples"] == ["k1"]
    assert leaks.keys_alone == 2


def test_near_duplicates_are_found_by_looks_alone(tmp_path: Path) -> None:
    train, test = write(tmp_path, evaluated_apart=True)
    leaks = audit(train, test, "looks")
    assert named(leaks) == {"samples": ["t3"], "units": ["unit"], "bytes": ["bytes"], "looks": ["look"]}
    assert leaks.listed["looks"] == [{"key": "look", "trained": "t2"}]
    assert leaks.leaked_N.sum() == 4
    assert not leaks.not_checked


def test_two_splits_of_one_set(tmp_path: Path) -> None:
    train, test = write(tmp_path, evaluated_apart=False)
    leaks = audit(train, test, "looks")
    assert {kind: int(found.sum()) for kind, found in leaks.found.items()} == {
        **{"samples": 0, "units": 1, "bytes": 1, "looks": 1}
    }
    assert not leaks.other_set
    chosen = audit(train, test, "index", val="test")
    assert chosen.chose_the_model
    assert chosen.notes()[0].startswith("This split chose the model")
    remembered = audit(train, test, "index", split="train")
    assert remembered.same_split
    assert remembered.to_dict()["images"] == TRAINING
    assert remembered.notes() == [
        "These are the images that the model was trained on: the score says how well it remembers them."
    ]


def test_what_cannot_be_compared_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = write(tmp_path, evaluated_apart=True)
    shard_set = ShardSet.open(test)
    evaluated = Evaluated(shard_set, shard_set.split("test"), np.arange(1), ["bytes"], [{}], "unit")

    def line(*trained: Trained) -> str:
        return find_leaks(evaluated, trained, None).line()

    assert line() == "leaks: not checked: the model does not say what it was trained on"
    assert "there is no such folder" in line(Trained(str(tmp_path / "gone"), "0", "train"))
    assert "another version of the set now" in line(Trained(str(train), "0", "train"))
    assert "https://host/set is behind a URL" in line(Trained("https://host/set", "0", "train"))
    assert find_leaks(evaluated, [], None, level="none").line() == "leaks: not checked (--audit none)"
    monkeypatch.setattr(module, "MOST_READ", 7)
    told = audit(train, test, "index")
    assert "8 training samples would be read" in told.not_checked["bytes"]
    assert told.found.keys() == {"samples"}
    evaluated = Evaluated(shard_set, shard_set.split("test"), np.arange(1), ["bytes"], [{}], "patient")
    digest = ShardSet.open(train).manifest.digest
    assert "has the field 'patient'" in find_leaks(evaluated, [Trained(str(train), digest, "train")], None).line()


def test_scores_without_what_leaked_are_those_of_the_other_queries() -> None:
    right_Q = np.array([1, 1, 1, 0, 1, 0, 0, 1.0])
    image_Q = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    leaks = Leaks(4, "index", found={"bytes": np.array([True, False, False, False])})
    leaks.rescore({"image_to_text": Measured({"R@1": mean_of(right_Q)}, image_Q)}, units=None, bootstrap=200)
    of_all, kept = leaks.without["image_to_text/R@1"]
    assert (of_all.value, kept.value) == (5 / 8, 3 / 6)
    assert kept.low is not None
    assert kept.low <= kept.value
    assert leaks.to_dict()["without"]["images"] == 3
    none = Leaks(4, "index", found={"bytes": np.zeros(4, bool)})
    none.rescore({"image_to_text": Measured({"R@1": mean_of(right_Q)}, image_Q)}, units=None)
    assert none.to_dict()["without"] is None


def test_a_model_says_what_it_was_trained_on(tmp_path: Path) -> None:
    about = {"data": "data/a + data/b", "data_digest": "1+2", "split": "train"}
    (tmp_path / "model").mkdir()
    assert trained_on(tmp_path / "model", about) == [Trained("data/a", "1", "train"), Trained("data/b", "2", "train")]
    (tmp_path / "environment.json").write_text('{"shard_sets": [{"digest": "2", "path": "elsewhere/b"}]}')
    assert trained_on(tmp_path / "model", about)[1] == Trained("elsewhere/b", "2", "train")
    assert trained_on(tmp_path / "model", {}) == []
