"""The classes of a split: which samples have which value, kept in a file; and the balance drawn from them."""

import logging
import math
import multiprocessing
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data import classes
from clipdist.data.classes import ClassSources, class_shares, class_table
from clipdist.data.config import DataConfig
from clipdist.data.labels import label_order
from clipdist.data.mixing import order_of
from clipdist.data.sets.index import index_folder
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from tests.unit.tars import PNG, plain_tar


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.floats(1, 100))
def test_temperature_flattens_shares_between_natural_and_equal(counts: list[int], temperature: float) -> None:
    sizes = np.array(counts)
    assert np.allclose(class_shares(sizes, 1), sizes / sizes.sum())
    assert np.allclose(class_shares(sizes, math.inf), 1 / len(sizes))
    found = class_shares(sizes, temperature)
    raised = sizes ** (1 / temperature)
    assert np.allclose(found, raised / raised.sum())


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["nan", "-nan", "inf", "-Infinity", "1e999", "x", ""]) | st.integers().map(str)))
def test_labels_are_in_one_order_whatever_order_they_come_in(labels: list[str]) -> None:
    found = sorted(labels, key=label_order)
    assert found == sorted([*reversed(labels)], key=label_order)
    numbers = [label for label in labels if label.removeprefix("-").isdecimal()]
    assert found == sorted(numbers, key=int) + sorted(label for label in labels if label not in numbers)


def test_a_class_called_nan_is_a_word() -> None:
    assert sorted(["2", "nan", "10", "inf", "1.5"], key=label_order) == ["1.5", "2", "10", "inf", "nan"]


def write_labelled(folder: Path, labels: Sequence[Any], per_shard: int = 7, split: str = "train", **more: Any) -> Path:
    """One sample per label, `None` being a sample without one; images that nobody decodes."""
    with ShardSetWriter(folder, samples_per_shard=per_shard, **more) as out:
        for number, label in enumerate(labels):
            fields = {"text": f"t{number}"} | ({} if label is None else {"label": label})
            out.write(split, f"k{number}", b"image", "png", fields)
    return folder


def by_label(table: classes.ClassTable) -> dict[str, list[int]]:
    every = [table.members(number, np.arange(count)).tolist() for number, count in enumerate(table.counts)]
    return dict(zip(table.names, every, strict=True))


LABELS = ["b", "a", "b", 3, "b", "é", 3, True, "a", "b", "b", "3", "a", "b", "b"]


@pytest.mark.parametrize("zstd", [False, True])
def test_the_classes_are_those_of_the_samples(zstd: bool, tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set", LABELS, per_shard=4, zstd=zstd)
    split = ShardSet.open(folder).split("train")
    table = class_table(split, "label")
    assert by_label(table) == {
        name: [n for n, label in enumerate(LABELS) if str(label) == name] for name in dict.fromkeys(map(str, LABELS))
    }
    assert by_label(pickle.loads(pickle.dumps(table))) == by_label(table)
    assert table.path.parent == folder
    assert not list(folder.glob("*.partial"))


def test_shards_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = ShardSet.open(write_labelled(tmp_path / "set", LABELS, per_shard=2)).split("train")
    alone = by_label(class_table(split, "label"))
    class_table(split, "label").path.unlink()
    monkeypatch.setattr(classes, "SAMPLES_FOR_PROCESSES", 1)
    monkeypatch.setattr(classes.os, "cpu_count", lambda: 2)
    assert by_label(class_table(split, "label")) == alone


def test_the_classes_are_kept_until_the_set_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_labelled(tmp_path / "set", LABELS)
    made: list[str] = []
    make = classes._make
    monkeypatch.setattr(classes, "_make", lambda *args: (made.append(args[1]), make(*args)))
    for _ in range(2):
        path = class_table(ShardSet.open(folder).split("train"), "label").path
    assert len(made) == 1
    path.write_bytes(path.read_bytes()[:-1])
    class_table(ShardSet.open(folder).split("train"), "label")
    assert len(made) == 2, "cut short"
    kept = path.read_bytes()
    shutil.rmtree(folder)
    write_labelled(folder, LABELS[::-1])
    path.write_bytes(kept)
    found = by_label(class_table(ShardSet.open(folder).split("train"), "label"))
    assert len(made) == 3, "another set"
    assert found["b"] == [n for n, label in enumerate(LABELS[::-1]) if label == "b"]


def test_a_set_that_cannot_be_written_keeps_its_classes_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_labelled(tmp_path / "set", LABELS)
    before = sorted(folder.iterdir())
    monkeypatch.setattr(classes.os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = class_table(ShardSet.open(folder).split("train"), "label")
    assert table.path.is_relative_to(tmp_path / "cache")
    assert sorted(folder.iterdir()) == before
    monkeypatch.setattr(classes, "_make", None)
    assert class_table(ShardSet.open(folder).split("train"), "label").path == table.path


def test_samples_without_the_field_are_refused(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set", ["a", None, "b", None, "c", "d", "e", "f", None])
    with pytest.raises(UserError, match=r"3 of 9 samples of split 'train', such as k1, have no field 'label'"):
        class_table(ShardSet.open(folder).split("train"), "label")
    assert not list(folder.glob("*.classes"))


def test_samples_with_unreadable_fields_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_labelled(tmp_path / "set", ["a", "b", "a", "b", "a"])
    shard = folder / "train-000000.tar"
    data = shard.read_bytes()
    at = data.rindex(b"{", 0, data.index(b'"t2"'))
    shard.write_bytes(data[:at] + b"[" + data[at + 1 :])
    with caplog.at_level(logging.WARNING):
        table = class_table(ShardSet.open(folder).split("train"), "label")
    assert by_label(table) == {"a": [0, 4], "b": [1, 3]}
    assert table.left_out == 1
    assert "1 samples without readable fields are in no class of label and left out: k2: unreadable JSON" in caplog.text


def test_half_a_character_is_no_name_of_a_class(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.json", b'{"text": "x", "label": "\\ud800"}')]
    plain_tar(tmp_path / "train-0.tar", [*members, ("b.png", PNG), ("b.json", b'{"text": "x", "label": "y"}')])
    index_folder(tmp_path)
    table = class_table(ShardSet.open(tmp_path).split("train"), "label")
    assert by_label(table) == {"y": [1]}
    assert table.left_out == 1


def _ask(folder: Path, log: Path) -> None:
    make = classes._make

    def logged(*args: Any) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write("made\n")
        make(*args)

    classes._make = logged
    class_table(ShardSet.open(folder).split("train"), "label")


def test_one_of_several_processes_makes_the_classes(tmp_path: Path) -> None:
    folder, log = write_labelled(tmp_path / "set", LABELS * 40), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    asking = [context.Process(target=_ask, args=(folder, log)) for _ in range(4)]
    for process in asking:
        process.start()
    for process in asking:
        process.join()
        assert process.exitcode == 0
    assert log.read_text(encoding="utf-8") == "made\n"


def test_a_balanced_set_of_one_in_a_thousand(tmp_path: Path) -> None:
    labels = ["rare" if number == 345 else "common" for number in range(1001)]
    split = ShardSet.open(write_labelled(tmp_path / "set", labels, per_shard=300)).split("train")
    config = DataConfig(set="x", balance="label", window=50)
    order = order_of(split, config, seed=0, global_batch=20)
    seen = np.zeros(1001, np.int64)
    for step in range(3 * order.steps_per_epoch):
        numbers, passes = order.batch(step)
        assert (numbers == 345).sum() == 10
        assert sorted(passes[numbers == 345]) == list(range(10 * step, 10 * step + 10)), "each time another crop"
        seen += np.bincount(numbers, minlength=1001)
    common = np.delete(seen, 345)
    assert np.ptp(common) == 1
    natural = order_of(split, DataConfig(set="x", balance="label", balance_temperature=1.0), seed=0, global_batch=20)
    drawn = np.concatenate([natural.batch(step).numbers for step in range(natural.steps_per_epoch)])
    assert (drawn == 345).sum() in (0, 1, 2)


def test_blocks_of_a_class_stay_few_in_a_large_set() -> None:
    table: Any = type("Table", (), {"counts": np.array([10**9, 130, 1])})()
    sources = ClassSources([table], [0])
    assert len(sources.blocks(0)) <= classes.MAX_BLOCKS
    assert sources.blocks(0).sum() == 10**9
    table.counts = np.array([130, 64, 1])
    assert [ClassSources([table], [0]).blocks(number).tolist() for number in range(3)] == [[64, 64, 2], [64], [1]]
