"""Tars of other tools become a shard set without being touched, or are refused with the reason."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset

from clipdist.cli import main
from clipdist.data.sets.index import index_folder, index_tar, split_name
from clipdist.data.sets.writer import UNFINISHED, ShardSetWriter
from clipdist.data.shards import BadSample, ShardSet
from clipdist.errors import UserError
from tests.unit.pictures import encoded, picture

PNG = encoded(picture(0))
JPEG = encoded(picture(1), "JPEG")
Members = list[tuple[str, bytes]]


def plain_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT, folders: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name in folders:
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(*names: str) -> Members:
    return [member for name in names for member in ((f"{name}.png", PNG), (f"{name}.txt", f"text {name}".encode()))]


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


def test_members_that_are_not_adjacent_are_refused(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", [("a.png", PNG), ("b.png", PNG), ("a.txt", b"x")])
    with pytest.raises(UserError, match=r"x\.tar: the members of sample 'a' are not adjacent; repack this shard"):
        index_tar(path)


@pytest.mark.parametrize(("one", "two"), [("a.png", "a.jpg"), ("a.png", "a.png"), ("a.json", "a.JSON")])
def test_two_members_of_one_kind_are_refused(one: str, two: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"sample of '{two}' has two (image|json) members; expected one"):
        index_tar(plain_tar(tmp_path / "x.tar", [(one, b"1"), (two, b"2")]))


def test_a_tar_that_ends_early_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", pairs("a", "b", "c"))
    whole = path.read_bytes()
    _, keys = index_tar(path)
    assert keys == ["a", "b", "c"]
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
        end = tar.offset
    for cut in [0, 100, *starts[1:], *(start + 200 for start in starts[1:]), starts[2] + 600, end]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"x\.tar: damaged tar after \d samples .*; restore or repack it"):
            index_tar(path)
    path.write_bytes(whole[: end + 512])
    assert index_tar(path)[1] == keys, "one block of zeros is an end, too"


def test_a_damaged_header_does_not_end_a_tar_unseen(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", pairs("a", "b", "c"))
    with tarfile.open(path) as tar:
        third = list(tar)[2].offset
    data = bytearray(path.read_bytes())
    data[third + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged tar after 1 samples"):
        index_tar(path)


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
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        index_folder(tmp_path)
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(UserError, match="a packing run was interrupted here"):
        index_folder(tmp_path)


def packed(folder: Path, zstd: bool) -> Path:
    with ShardSetWriter(folder, samples_per_shard=2, zstd=zstd, license_text="CC-BY-4.0", sources={"a": "b"}) as out:
        for number in range(5):
            out.write("train", f"k{number}", PNG, "png", {"text": "x"})
    return folder


def test_indexing_a_packed_set_gives_the_packers_index_and_keeps_its_licence(tmp_path: Path) -> None:
    folder = packed(tmp_path / "set", zstd=False)
    before, old = {p.name: p.read_bytes() for p in folder.glob("*.idx")}, ShardSet.open(folder).manifest
    for path in folder.glob("*.idx"):
        path.unlink()
    new = index_folder(folder)
    assert {p.name: p.read_bytes() for p in folder.glob("*.idx")} == before
    assert new.digest == old.digest
    assert (new.license, new.sources) == ("CC-BY-4.0", {"a": "b"})


def test_compressed_shards_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    folder = packed(tmp_path / "set", zstd=True)
    shutil.copy(plain_tar(tmp_path / "more-0.tar", pairs("a")), folder)
    with pytest.raises(UserError, match=r"000\.tar\.zst: a compressed tar .*; unpack it, or pack the set again"):
        index_folder(folder)
    assert ShardSet.open(folder).split("train").read(4).key == "k4"


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-000000.tar", "train"),
        ("00012.tar", "train"),
        ("cc3m-val_0001.tar", "cc3m-val"),
        ("test.tar", "test"),
        ("v2.1.tar", "v2"),
    ],
)
def test_the_split_is_what_stands_before_the_number(file: str, split: str) -> None:
    assert split_name(file) == split
