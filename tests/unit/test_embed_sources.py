"""What `clipdist embed` reads: odd files are named and the rest goes on; failures that may pass stop the run."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clipdist.data.shards import BadSample, ShardSet
from clipdist.errors import DiskError, UserError
from clipdist.publish import embed as embed_module
from clipdist.publish.embed import EmbedOptions, embed
from clipdist.publish.embedding_parts import Part, join, part_path, write_part
from clipdist.publish.embedding_source import FileSource, SetSource, TableColumns, list_files
from clipdist.publish.embeddings import open_embeddings
from tests.conftest import TrainedRun, picture
from tests.unit.shard_sets import write_set

BOTH = EmbedOptions(what="both", device="cpu")
PNG = picture("red", "square", "left")


@pytest.fixture(scope="module")
def model(trained_run: TrainedRun) -> Path:
    return trained_run.folder / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good images."""
    found = tmp_path / "images"
    found.mkdir()
    for name in ("a.png", "b.png"):
        (found / name).write_bytes(PNG)
    return found


def listed(data: Path, tmp_path: Path, columns: TableColumns | None = None, *, captions: bool = False) -> FileSource:
    return list_files(str(data), tmp_path / "listing.parquet", columns or TableColumns(), captions=captions)


def test_odd_files_are_named_and_the_rest_goes_on(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "dangling.png").symlink_to("/nonexistent.png")
    (folder / "half.png").write_bytes(PNG)
    (folder / "half.json").write_text('{"text": "half \\ud83d"}', encoding="utf-8")
    (folder / "half_field.png").write_bytes(PNG)
    (folder / "half_field.json").write_text('{"text": "whole", "note": "half \\ud83d"}', encoding="utf-8")
    (folder / "deep.png").write_bytes(PNG)
    (folder / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    long = "x" * 251 + ".png"
    (folder / long).write_bytes(PNG)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xe9.png")).write_bytes(PNG)
    embed(model, str(folder), tmp_path / "out", options=BOTH, processes=1)
    stored = open_embeddings(tmp_path / "out")
    assert [stored.record(row)["image"] for row in range(stored.rows)] == ["a.png", "b.png", long]
    lines = (tmp_path / "out" / "bad.jsonl").read_text(encoding="utf-8").splitlines()
    bad = {one["image"]: one["reason"] for one in map(json.loads, lines)}
    assert bad.pop("\\udcff\\udce9.png") == "the file's name is not UTF-8; rename it"
    assert bad.pop("dangling.png") == "there is no such file"
    assert "nested too deeply" in bad.pop("deep.png")
    assert set(bad) == {"half.png", "half_field.png"}
    assert all("half a character" in reason for reason in bad.values())


def test_half_a_character_in_a_table(folder: Path, tmp_path: Path) -> None:
    rows = [
        '{"image": "a.png", "text": "whole"}',
        '{"image": "b.png", "text": "half \\ud83d"}',
        '{"image": "a.png", "text": "whole", "note": ["\\ud83d"]}',
        '{"image": "\\ud83d.png", "text": "whole"}',
        '{"image": "b.png", "text": "größer"}',
    ]
    (folder / "table.jsonl").write_text("\n".join(rows), encoding="utf-8")
    source = listed(folder / "table.jsonl", tmp_path)
    assert [source.read(number).texts for number in (0, 4)] == [["whole"], ["größer"]]
    for number in (1, 2, 3):
        with pytest.raises(BadSample, match="half a character"):
            source.read(number)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENOMEM])
def test_a_failure_that_may_pass_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = listed(folder, tmp_path)

    def fails(*_: Any) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        with pytest.raises(DiskError, match=r"a\.png: cannot be read .*try again"):
            source.read(0)
    shards = SetSource(str(write_set(tmp_path / "set")))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", fails)
        patched.setattr(os, "preadv", fails)
        with pytest.raises(DiskError, match=r"cannot be read .*try again"):
            shards.read(0)


def test_the_same_command_does_what_a_passing_failure_left(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "CHUNK", 1)
    options = EmbedOptions(micro_batch=1, device="cpu")
    read_bytes = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path.name == "b.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        with pytest.raises(DiskError, match=r"b\.png: cannot be read"):
            embed(model, str(folder), tmp_path / "out", options=options, processes=1)
    again = embed(model, str(folder), tmp_path / "out", options=options, processes=1)
    assert (again.embedded, again.info["rows"], again.info["bad"]) == (1, 2, 0)


def test_a_root_that_is_gone_stops_the_run_and_a_missing_file_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = listed(folder, tmp_path)
    (folder / "a.png").unlink()
    with pytest.raises(BadSample, match="there is no such file"):
        source.read(0)

    def refuses(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuses)
        patched.setattr(os, "access", lambda path, mode: False)
        patched.setattr(Path, "read_bytes", refuses)
        with pytest.raises(DiskError, match="Permission denied"):
            source.read(1)
    (folder / "b.png").unlink()
    with pytest.raises(DiskError, match="the folder is empty"):
        source.read(1)
    folder.rmdir()
    with pytest.raises(DiskError, match=r"images: cannot be read .*No such file"):
        source.read(1)


def test_a_folder_with_an_unfinished_of_someone_else_stays(model: Path, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "project"
    (own / "unfinished").mkdir(parents=True)
    thesis = own / "unfinished" / "thesis.txt"
    thesis.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"'unfinished' holds 'thesis\.txt'.*choose an empty folder"):
        embed(model, str(folder), own, options=BOTH, processes=1)
    assert thesis.read_text(encoding="utf-8") == "mine"
    for name in ("lock", "unfinished"):
        other = tmp_path / f"with-{name}"
        other.mkdir()
        (other / "notes.txt").touch()
        (other / name).mkdir() if name == "unfinished" else (other / name).touch()
        with pytest.raises(UserError, match=r"holds 'notes\.txt', and no embeddings"):
            embed(model, str(folder), other, options=BOTH, processes=1)
    (tmp_path / "killed" / "unfinished").mkdir(parents=True)
    (tmp_path / "killed" / "lock").touch()
    assert embed(model, str(folder), tmp_path / "killed", options=BOTH, processes=1).embedded == 2


def test_a_column_text_that_holds_no_captions_is_a_field(folder: Path, tmp_path: Path) -> None:
    (folder / "table.csv").write_text("image,text,caption\na.png,foo,bar\n", encoding="utf-8")
    sample = listed(folder / "table.csv", tmp_path, TableColumns(texts=("caption",))).read(0)
    assert (sample.texts, sample.fields) == (["bar"], {"text": "foo"})
    keyed = listed(folder / "table.csv", tmp_path, TableColumns(texts=("caption",), key="text")).read(0)
    assert (keyed.key, keyed.fields) == ("foo", {"text": "foo"})


def test_a_split_named_twice_counts_once(tmp_path: Path) -> None:
    folder = str(write_set(tmp_path / "set"))
    assert len(SetSource(folder, ["train", "train"])) == len(SetSource(folder, ["train"])) == 7


def test_groups_of_rows_stay_small(tmp_path: Path) -> None:
    rows = [
        {"key": str(n), "texts": [], "split": None, "number": None, "image": "a", "fields": {}} for n in range(1500)
    ]
    write_part(tmp_path, 0, Part(rows=rows))
    join([part_path(tmp_path, 0)], tmp_path, width=1, image=False, text=False)
    meta = pq.ParquetFile(tmp_path / "rows.parquet").metadata
    assert [meta.row_group(n).num_rows for n in range(meta.num_row_groups)] == [512, 512, 476]


def test_captions_beside_images_belong_to_the_source(folder: Path, tmp_path: Path) -> None:
    def digests() -> list[str]:
        return [listed(folder, tmp_path, captions=captions).digest for captions in (False, True)]

    images, without = digests()
    (folder / "a.txt").write_text("one", encoding="utf-8")
    same, one = digests()
    assert same == images
    assert one != without
    (folder / "a.txt").write_text("two dogs", encoding="utf-8")
    assert digests()[1] != one
    changed = digests()[1]
    os.utime(folder / "a.txt", ns=(0, 0))
    assert digests()[1] != changed


def test_an_image_of_a_set_that_has_become_smaller(model: Path, tmp_path: Path) -> None:
    large, small = write_set(tmp_path / "large", samples=7), write_set(tmp_path / "small", samples=3)
    embed(model, str(large), tmp_path / "out", splits=["train"], options=EmbedOptions(device="cpu"), processes=1)
    stored = open_embeddings(tmp_path / "out", images=small)
    assert stored.image(2) == ShardSet.open(large).split("train").read(2).image
    with pytest.raises(UserError, match="s6: the set has no sample 6 any more"):
        stored.image(6)
