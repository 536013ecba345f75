"""Sets travel: other readers read what clipdist packs, and clipdist trains on what other writers wrote."""

import io
import json
import math
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from clipdist.cli import main
from clipdist.config import load_config
from clipdist.data.shards import ShardSet
from clipdist.train.loop import train
from tests.conftest import write_shapes

Recipe = Callable[..., Path]
STEPS = 7  # of an epoch: 168 training pairs in batches of 24


def contents(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """key -> image bytes and fields with the caption, read by clipdist."""
    stored = ShardSet.open(folder).split(split)
    samples = [stored.read(number) for number in range(len(stored))]
    return {sample.key: {"png": sample.image, "json": {**sample.fields, "text": sample.texts[0]}} for sample in samples}


def read_by_webdataset(sources: list[str]) -> dict[str, dict[str, Any]]:
    """The same through webdataset, with its own decoding; each image is checked against its stored bytes."""
    read = {}
    stored = webdataset.WebDataset(sources, shardshuffle=False, empty_check=False)
    decoded = webdataset.WebDataset(sources, shardshuffle=False, empty_check=False).decode("pil")
    for raw, sample in zip(stored, decoded, strict=True):
        key, image = sample["__key__"], sample["png"]
        assert key not in read, "its members were taken for two samples"
        assert image.tobytes() == Image.open(io.BytesIO(raw["png"])).convert(image.mode).tobytes()
        read[key] = {"png": raw["png"], "json": sample["json"]}
    return read


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_decodes_a_packed_set(split: str, shapes: Path) -> None:
    read = read_by_webdataset([str(path) for path in sorted(shapes.glob(f"{split}-*.tar"))])
    assert len(read) == {"train": 168, "val": 32}[split]
    assert read == contents(shapes, split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_decodes_a_compressed_set_through_a_pipe(split: str, tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("the command zstd is not there")
    packed = write_shapes(tmp_path / "shapes", zstd=True)
    shards = sorted(packed.glob(f"{split}-*.tar.zst"))
    read = read_by_webdataset([f"pipe:zstd -dc {shlex.quote(str(path))}" for path in shards])
    assert len(read) == {"train": 168, "val": 32}[split]
    assert read == contents(packed, split)


def test_tar_unpacks_a_packed_set(shapes: Path, tmp_path: Path) -> None:
    for shard in sorted(shapes.glob("*.tar")):
        subprocess.run(["tar", "-xf", shard, "-C", tmp_path], check=True)
    for key, sample in (contents(shapes, "train") | contents(shapes, "val")).items():
        assert (tmp_path / f"{key}.png").read_bytes() == sample["png"]
        assert json.loads((tmp_path / f"{key}.json").read_text(encoding="utf-8")) == sample["json"]


def written_by_tar(source: dict[str, dict[str, dict[str, Any]]], folder: Path) -> None:
    """Files in a folder, images with captions in text files, put into one tar by the command."""
    for split, samples in source.items():
        loose = folder.with_name(f"{folder.name}-{split}")
        loose.mkdir()
        for key, sample in samples.items():
            (loose / f"{key}.png").write_bytes(sample["png"])
            (loose / f"{key}.txt").write_text(sample["json"]["text"], encoding="utf-8")
        names = sorted(path.name for path in loose.iterdir())
        target = folder / f"{split}.tar"
        subprocess.run(["tar", "--create", "--file", target, "--directory", loose, *names], check=True)


def written_by_webdataset(source: dict[str, dict[str, dict[str, Any]]], folder: Path) -> None:
    """Several shards, captions beside other fields in the JSON member."""
    for split, samples in source.items():
        with webdataset.ShardWriter(str(folder / f"{split}-%04d.tar"), maxcount=60, verbose=0) as out:
            for key, sample in samples.items():
                out.write({"__key__": key, **sample})


@pytest.mark.parametrize("write", [written_by_tar, written_by_webdataset])
def test_a_set_of_another_writer_is_indexed_and_trained_on(
    write: Callable[[dict[str, dict[str, dict[str, Any]]], Path], None],
    shapes: Path,
    recipe: Recipe,
    tmp_path: Path,
    signal_handlers: None,
) -> None:
    """The tars stay as they are; each pair is found, no sample is lost, the loss falls."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    source = {split: contents(shapes, split) for split in ("train", "val")}
    write(source, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    assert before
    assert all(tarfile.is_tarfile(folder / name) for name in before)
    assert main(["index", str(folder)]) == 0
    assert train(load_config(recipe(data__set=str(folder), train__epochs=1), [])) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    for split, samples in source.items():
        found = contents(folder, split)
        assert found.keys() == samples.keys()
        for key, sample in samples.items():
            assert found[key]["png"] == sample["png"]
            assert found[key]["json"]["text"] == sample["json"]["text"]
    run = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert not (run / "bad_samples.jsonl").exists() or not (run / "bad_samples.jsonl").read_text()
    assert [record["val/gallery"] for record in records if "val/gallery" in record] == [32]
