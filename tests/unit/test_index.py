"""Tars of other tools become a shard set without being touched, or are refused with the reason."""

import contextlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.cli import main
from clipdist.data.sets import index
from clipdist.data.sets.index import index_folder, open_or_index, split_name
from clipdist.data.sets.writer import UNFINISHED, ShardSetWriter
from clipdist.data.shards import BadSample, Manifest, ShardSet
from clipdist.errors import UserError
from tests.unit.tars import JPEG, PNG, pairs, plain_tar


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_any_dialect_are_read_back(format: int, tmp_path: Path) -> None:
    long = "folder/" + "é" * 40 + "x" * (10 if format == tarfile.USTAR_FORMAT else 120)
    odd = [("a.cls", b"3"), ("a.left.jpg", b"a second view"), ("README", b"no extension")]
    members = [*pairs("a"), *odd, ("b.JPG", JPEG), ("b.json", b'{"text": ["x", "y"], "label": 4}'), *pairs(long)]
    tar = plain_tar(tmp_path / "train-0.tar", members, format, folders=("folder",))
    before = tar.read_bytes()
    manifest = index_folder(tmp_path)
    assert tar.read_bytes() == before
    assert manifest.splits["train"][0].samples == 3
    split = ShardSet.open(tmp_path).split("train")
    a, b, c = (split.read(number) for number in range(3))
    assert (a.key, a.image, a.extension, a.texts, a.fields) == ("a", PNG, "png", ["text a"], {})
    assert (b.key, b.image, b.extension, b.texts, b.fields) == ("b", JPEG, "jpg", ["x", "y"], {"label": 4})
    assert (c.key, c.texts) == (long, [f"text {long}"])


def test_shards_of_webdatasets_own_writer_are_read_back(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "cc-train-%06d.tar"), maxcount=4, verbose=0) as out:
        for number in range(10):
            out.write({"__key__": f"k{number:03d}", "png": PNG, "json": {"text": f"caption {number}", "n": number}})
    assert main(["index", str(tmp_path)]) == 0
    split = ShardSet.open(tmp_path).split("cc-train")
    assert split.samples_per_shard.tolist() == [4, 4, 2]
    for number in range(10):
        sample = split.read(number)
        assert (sample.key, sample.texts, sample.fields) == (f"k{number:03d}", [f"caption {number}"], {"n": number})
        assert sample.image == PNG


def test_the_command_names_splits_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain_tar(tmp_path / "train-000.tar", pairs("a", "b"))
    plain_tar(tmp_path / "train-001.tar", pairs("c"))
    plain_tar(tmp_path / "val.tar", pairs("d"))
    assert main(["index", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["train: 3 samples in 2 shards", "val: 1 samples in 1 shards"]
    assert main(["index", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_samples_without_image_or_caption_are_found_when_read(tmp_path: Path) -> None:
    plain_tar(tmp_path / "train-0.tar", [("a.txt", b"x"), ("b.png", PNG), ("c.png", b""), ("c.txt", b"x")])
    index_folder(tmp_path)
    split = ShardSet.open(tmp_path).split("train")
    assert split.read(1).texts == []
    for number in (0, 2):
        with pytest.raises(BadSample, match="no image, or an empty one"):
            split.read(number)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"PK\3\4" + b"a zip file, really" * 100)
    with pytest.raises(UserError, match="damaged tar after 0 samples"):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_an_empty_tar_is_an_empty_shard(tmp_path: Path) -> None:
    plain_tar(tmp_path / "train-0.tar", [])
    plain_tar(tmp_path / "train-1.tar", pairs("a"))
    index_folder(tmp_path)
    split = ShardSet.open(tmp_path).split("train")
    assert len(split) == 1
    assert split.read(0).key == "a"


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        index_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \.tar or \.tar\.zst file"):
        index_folder(tmp_path)
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(UserError, match="a packing run was interrupted here"):
        index_folder(tmp_path)


def packed(folder: Path, zstd: bool) -> Path:
    options: dict[str, Any] = {"license_text": "CC-BY-4.0", "sources": {"a": "b"}}
    with ShardSetWriter(folder, samples_per_shard=2, zstd=zstd, notes={"view": "x"}, **options) as out:
        for number in range(5):
            out.write("train", f"k{number}", PNG, "png", {"text": "x"})
    return folder


@pytest.mark.parametrize("zstd", [False, True])
def test_indexing_a_packed_set_gives_the_packers_index_and_keeps_its_licence(zstd: bool, tmp_path: Path) -> None:
    folder = packed(tmp_path / "set", zstd=zstd)
    before, old = {p.name: p.read_bytes() for p in folder.glob("*.idx")}, ShardSet.open(folder).manifest
    for path in folder.glob("*.idx"):
        path.unlink()
    new = index_folder(folder)
    assert {p.name: p.read_bytes() for p in folder.glob("*.idx")} == before
    assert (new.digest, new.splits) == (old.digest, old.splits)
    assert (new.license, new.sources, new.made_by) == ("CC-BY-4.0", {"a": "b"}, old.made_by)
    assert new.notes.keys() == {"view", "indexed"}
    assert Manifest.load(folder) == new


def test_a_damaged_manifest_is_made_anew(tmp_path: Path) -> None:
    folder = packed(tmp_path / "set", zstd=False)
    digest = Manifest.load(folder).digest
    (folder / "manifest.json").write_text("{")
    assert index_folder(folder).digest == digest == Manifest.load(folder).digest


def test_plain_and_compressed_tars_may_stand_side_by_side(tmp_path: Path) -> None:
    folder = packed(tmp_path / "set", zstd=True)
    shutil.copy(plain_tar(tmp_path / "more-0.tar", pairs("a")), folder)
    index_folder(folder)
    assert ShardSet.open(folder).split("train").read(4).key == "k4"
    assert ShardSet.open(folder).split("more").read(0).key == "a"
    plain_tar(folder / "train-000000.tar", pairs("b"))
    with pytest.raises(UserError, match=r"train-000000\.tar and train-000000\.tar\.zst would share one index"):
        index_folder(folder)


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-000000.tar", "train"),
        ("00012.tar", "train"),
        ("cc3m-val_0001.tar", "cc3m-val"),
        ("test.tar", "test"),
        ("v2.1.tar", "v2"),
        ("val-000001.tar.zst", "val"),
    ],
)
def test_the_split_is_what_stands_before_the_number(file: str, split: str) -> None:
    assert split_name(file) == split


# Quick again


def test_only_what_changed_is_indexed_again(tmp_path: Path) -> None:
    done: list[str] = []

    def shown(infos: Iterable[Any], total: int) -> Iterator[Any]:
        done.clear()
        for info in infos:
            done.append(info.file)
            yield info
        assert len(done) == total

    def states() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    for number in range(3):
        plain_tar(tmp_path / f"train-{number}.tar", pairs(f"k{number}"))
    first = index_folder(tmp_path, shown=shown)
    assert len(done) == 3
    before = states()
    assert index_folder(tmp_path, shown=shown) == first
    assert (done, states()) == ([], before)
    plain_tar(tmp_path / "train-1.tar", pairs("other"))
    os.utime(tmp_path / "train-1.tar", ns=(before["train-1.idx"] + 1,) * 2)
    second = index_folder(tmp_path, shown=shown)
    assert done == ["train-1.tar"]
    assert second.digest != first.digest
    assert ShardSet.open(tmp_path).split("train").read(1).key == "other"
    (tmp_path / "train-2.idx").unlink()
    index_folder(tmp_path, shown=shown)
    assert done == ["train-2.tar"]
    old = tmp_path / "train-0.idx"
    old.write_bytes(b"CDINDEX1" + old.read_bytes()[8:])
    index_folder(tmp_path, shown=shown)
    assert done == ["train-0.tar"]
    index_folder(tmp_path, shown=shown, force=True)
    assert len(done) == 3
    (tmp_path / "train-0.tar").unlink()
    assert [info.file for info in index_folder(tmp_path, shown=shown).splits["train"]] == ["train-1.tar", "train-2.tar"]
    assert not done


def test_the_manifest_is_written_last_and_an_old_one_stands_when_a_tar_is_damaged(
    tmp_path: Path, appeared: list[str]
) -> None:
    plain_tar(tmp_path / "train-0.tar", pairs("a"))
    plain_tar(tmp_path / "train-1.tar", pairs("b"))
    index_folder(tmp_path)
    assert appeared == ["train-0.idx", "train-1.idx", "manifest.json"]
    (tmp_path / "train-2.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"train-2\.tar: damaged tar"):
        index_folder(tmp_path)
    assert len(ShardSet.open(tmp_path).split("train")) == 2


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    for number in range(4):
        plain_tar(tmp_path / f"train-{number}.tar", pairs(f"k{number}"))
    one = index_folder(tmp_path, workers=0)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")}
    assert index_folder(tmp_path, workers=2, force=True).splits == one.splits
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")} == before


def test_a_damaged_tar_is_named_by_any_process(tmp_path: Path) -> None:
    plain_tar(tmp_path / "train-0.tar", pairs("a"))
    for number in (1, 2):
        (tmp_path / f"train-{number}.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"train-1\.tar: damaged tar"):
        index_folder(tmp_path, workers=2)


def test_a_tar_that_grows_while_it_is_indexed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain_tar(tmp_path / "train-0.tar", pairs("a"))
    real = index.index_tar

    def slow(tar: Path) -> Any:
        found = real(tar)
        path.write_bytes(path.read_bytes() + bytes(512))
        return found

    monkeypatch.setattr(index, "index_tar", slow)
    with pytest.raises(UserError, match=r"train-0\.tar: changed while it was indexed"):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_a_foreign_tar_is_refused_or_indexed_soundly(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    path = plain_tar(folder / "train-0.tar", pairs("a", "é" * 60))
    damaged = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        keys = index_folder(folder, force=True).splits["train"][0].samples
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017  (an index that can be made is no failure)
        return
    split = ShardSet.open(folder).split("train")
    for number in range(keys):
        with contextlib.suppress(BadSample):
            split.read(number)


# Training on what was never indexed


def test_training_indexes_first_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain_tar(tmp_path / "train-0.tar", pairs("a"))
    assert open_or_index(tmp_path, check="none").split("train").read(0).key == "a"
    assert "holds 1 tars without an index; indexing them first" in caplog.text
    caplog.clear()
    assert open_or_index(str(tmp_path)).split("train").check == "sample"
    assert not caplog.text


def test_training_says_why_it_cannot_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        open_or_index(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_or_index(tmp_path)
    path = plain_tar(tmp_path / "train-0.tar", [("/a.png", PNG)])
    with pytest.raises(UserError, match="points outside the archive"):
        open_or_index(tmp_path)
    plain_tar(path, pairs("a"))
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(UserError, match="holds 1 tars without an index, and cannot be written; run clipdist index"):
        open_or_index(tmp_path)
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(UserError, match="so it is unfinished"):
        open_or_index(tmp_path)
