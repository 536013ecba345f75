"""Slides cut into tiles: the right level, the right tiles, once and never half, and every unusable slide named."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.unit.tissue import h_and_e, ihc

pytest.importorskip("openslide", reason="openslide-python (extra: pathology) is not installed")
pytest.importorskip("imagecodecs", reason="tifffile writes JPEG with it")

from clipdist.data.shards import checksum_file
from clipdist.errors import UserError
from clipdist.prepare import slides as module
from clipdist.prepare.phantom_slides import GLASS, mirrored, write_pyramid
from clipdist.prepare.slide_jpeg import JpegLevel
from clipdist.prepare.slide_reader import BLOCK, SlideReader, UnusableSlide, otsu
from clipdist.prepare.slides import SlideFile, TilingOptions, tile_slides

OPTIONS = TilingOptions(stride=256, side=30)
SIZE = (2100, 1800)
Tissues = dict[str, Path]


@pytest.fixture(scope="module")
def tissues(tmp_path_factory: pytest.TempPathFactory) -> Tissues:
    """Pyramids of real tissue by stain; tests must not change them."""
    folder = tmp_path_factory.mktemp("slides")
    patches = {"he": mirrored(h_and_e()), "ihc": mirrored(ihc())}
    return {
        name: write_pyramid(folder / f"{name}.svs", patch, SIZE, seed=number)
        for number, (name, patch) in enumerate(patches.items())
    }


def tiled(slides: Tissues, folder: Path, options: TilingOptions = OPTIONS, **more: Any) -> module.TilingSummary:
    files = [SlideFile(name, path) for name, path in slides.items()]
    return tile_slides(files, folder, options, **{"workers": 0, "quiet": True, **more})


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files but those that hold times."""
    return {
        path.relative_to(folder).as_posix(): checksum_file(path)
        for path in sorted(folder.rglob("*.png"))
        if path.is_file()
    }


def test_the_same_tiles_are_chosen_as_by_reading_everything_at_full_resolution(
    tissues: Tissues, tmp_path: Path
) -> None:
    """The published way: each tile of the grid at level 0, resized, then judged."""
    summary = tiled(tissues, tmp_path)
    for slide in summary.slides:
        with SlideReader(tissues[slide.name]) as reader:
            expected, differences = [], []
            for y in range(0, SIZE[1] // 256 * 256, 256):
                for x in range(0, SIZE[0] // 256 * 256, 256):
                    tile = reader.region(x, y, 0, 256, 256).resize((30, 30), Image.Resampling.BICUBIC)
                    tissue, white = module.judge(tile, slide.record["otsu"], 225)
                    if tissue >= OPTIONS.min_tissue and white < OPTIONS.max_white:
                        expected.append((x, y))
                        with Image.open(slide.folder / f"{x:06d}_{y:06d}.png") as stored:
                            assert stored.size == (30, 30)
                            differences.append(np.abs(np.asarray(stored, int) - np.asarray(tile, int)).mean())
        assert [(tile.x, tile.y) for tile in slide.tiles] == expected
        assert 5 < len(expected) < slide.record["places"]
        # Level 1 went through JPEG once more.
        assert np.mean(differences) < 6
        assert slide.record["level"] == 1
        assert slide.record["read"] < slide.record["places"]


def test_what_tiles_and_records_say(tissues: Tissues, tmp_path: Path) -> None:
    summary = tiled(tissues, tmp_path)
    rows = list(csv.DictReader((tmp_path / "slides.csv").open(encoding="utf-8")))
    assert [(row["slide"], int(row["tiles"])) for row in rows] == [(s.name, len(s.tiles)) for s in summary.slides]
    for slide in summary.slides:
        assert slide.mpp == 0.25
        assert all(tile.tissue >= 0.3 and tile.white < 0.5 and tile.path.is_file() for tile in slide.tiles)
        with Image.open(slide.folder / "overview.png") as picture:
            shown = np.asarray(picture.convert("RGB"))
        assert (shown == (0, 140, 60)).all(-1).any(), "kept tiles are outlined"
    assert [path.name for path in summary.sheets] == ["slides-01.png"]
    assert f"{summary.tiles} tiles of 2 slides" in str(summary)
    assert "rejected: none" in str(summary)
    assert not (tmp_path / "rejected.csv").exists()


def test_the_bytes_do_not_depend_on_the_number_of_processes(tissues: Tissues, tmp_path: Path) -> None:
    tiled(tissues, tmp_path / "one")
    tiled(tissues, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_no_tile_is_ever_enlarged_and_no_smaller_level_would_do(tissues: Tissues) -> None:
    with SlideReader(tissues["he"]) as reader:
        there = reader.downsamples
        assert [reader.level_for(value) for value in (0.5, 1, 3.9, 4.01, 15, 17, 1000)] == [0, 0, 0, 1, 1, 2, 2]
    assert len(there) == 3


def grey_levels_apart(reader: SlideReader, stride: int, side: int) -> float:
    """Mean over four places, of a tile and OpenSlide's own."""
    level = reader.level_for(stride / side)
    apart = []
    for x, y in ((1024, 700), (800, 800), (1024, 1024), (777, 901)):
        pair = [reader.tile(x, y, stride, side), reader._by_openslide(level, x, y, stride, side)]
        assert [one.size for one in pair] == [(side, side)] * 2
        apart.append(np.abs(np.asarray(pair[0], int) - np.asarray(pair[1], int)).mean())
    return float(np.mean(apart))


@pytest.mark.parametrize(
    ("stride", "side", "part"),
    [(256, 200, 1), (256, 85, 2), (256, 65, 2), (1000, 220, 1), (1000, 80, 2), (1000, 63, 2)],
)
def test_tiles_decoded_at_a_fraction_show_what_openslide_shows(
    tissues: Tissues, stride: int, side: int, part: int
) -> None:
    for path in tissues.values():
        with SlideReader(path) as reader:
            level = reader.level_for(stride / side)
            assert reader._direct[level].part_for(stride / reader.downsamples[level], side) == part
            assert grey_levels_apart(reader, stride, side) < 3
            assert reader.direct


def generic_tiff(path: Path, photometric: str, compression: str = "jpeg") -> Path:
    """A pyramid as other programs write it: tables shared by all tiles of a level, RGB or YCbCr."""
    import tifffile

    whole = np.tile(mirrored(ihc()), (2, 2, 1))
    with tifffile.TiffWriter(path) as file:
        for factor in (1, 4):
            file.write(
                np.asarray(Image.fromarray(whole).reduce(factor)),
                tile=(256, 256),
                compression=compression,
                photometric=photometric,
                subfiletype=0 if factor == 1 else 1,
            )
    return path


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_either_way_of_storing_colours(tmp_path: Path, photometric: str) -> None:
    with SlideReader(generic_tiff(tmp_path / "a.tif", photometric), assume_mpp=0.5) as reader:
        assert grey_levels_apart(reader, 256, 85) < 3
        assert reader.direct


def test_what_cannot_be_decoded_so_is_left_to_openslide(
    tissues: Tissues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SlideReader(generic_tiff(tmp_path / "deflate.tif", "rgb", "deflate"), assume_mpp=0.5) as reader:
        assert grey_levels_apart(reader, 256, 85) == 0
        assert not reader.direct
    # Colours that are taken for others are noticed by the comparison.
    decoded = JpegLevel._decoded
    monkeypatch.setattr(JpegLevel, "_decoded", lambda *given: decoded(*given)[..., [0, 2, 1]])
    with SlideReader(tissues["he"]) as reader:
        assert grey_levels_apart(reader, 256, 85) == 0
        assert not reader.direct
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with SlideReader(tissues["he"]) as reader:
        assert grey_levels_apart(reader, 256, 85) == 0
        assert not reader.direct


def test_nothing_larger_than_a_block_or_a_tile_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "a.svs", mirrored(ihc()), (5000, 2300), factors=(1, 2))
    areas: list[int] = []
    region = SlideReader.region

    def recorded(self: SlideReader, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        areas.append(width * height)
        return region(self, x, y, level, width, height)

    monkeypatch.setattr(SlideReader, "region", recorded)
    with SlideReader(path) as reader:
        whole = reader.overview(4.0)
        direct = reader.region(0, 0, 1, 2500, 1150).resize((1250, 575), Image.Resampling.BOX)
    assert len(areas) > 2
    assert max(areas[:-1]) <= (BLOCK + 2) ** 2
    difference = np.abs(np.asarray(whole, int) - np.asarray(direct, int))
    assert difference.mean() < 0.5, "blocks join without a seam"


def test_a_finished_slide_is_not_read_again(tissues: Tissues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiled(tissues, tmp_path)

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(module, "SlideReader", never)
    monkeypatch.setattr(module, "_md5", never)
    files = [SlideFile(name, path, md5="0" * 32) for name, path in tissues.items()]
    again = tile_slides(files, tmp_path, OPTIONS, workers=0, quiet=True)
    assert [slide.record for slide in again.slides] == [slide.record for slide in first.slides]
    assert "(2 there before)" in str(again)


@pytest.mark.parametrize("damage", ["record", "tile", "tile_short", "overview", "source"])
def test_an_unfinished_or_changed_slide_starts_anew(tmp_path: Path, damage: str) -> None:
    path = write_pyramid(tmp_path / "a.svs", mirrored(ihc()), (1100, 900))
    first = tiled({"a": path}, tmp_path / "out")
    before = contents(tmp_path / "out")
    folder, tile = first.slides[0].folder, first.slides[0].tiles[0].path
    if damage == "record":
        (folder / "slide.json").write_text("{")
    elif damage == "tile":
        tile.unlink()
    elif damage == "tile_short":
        tile.write_bytes(tile.read_bytes()[:-1])
    elif damage == "overview":
        (folder / "overview.png").unlink()
    else:
        os.utime(path, (1, 1))
    again = tiled({"a": path}, tmp_path / "out")
    assert not again.slides[0].resumed
    assert contents(tmp_path / "out") == before


def test_an_interruption_leaves_nothing_half(tissues: Tissues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(tile: Image.Image, path: Path) -> int:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return save(tile, path)

    save = module.save_tile
    monkeypatch.setattr(module, "save_tile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiled(tissues, tmp_path)
    monkeypatch.undo()
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["he"])
    again = tiled(tissues, tmp_path)
    assert [slide.resumed for slide in again.slides] == [bool(left), False]
    tiled(tissues, tmp_path / "fresh")
    fresh = {f"fresh/{name}": value for name, value in contents(tmp_path / "fresh").items()}
    assert {name: value for name, value in contents(tmp_path).items() if name.startswith("fresh/")} == fresh
    assert len(contents(tmp_path)) == 2 * len(fresh)


def test_what_a_killed_process_left_is_cleared_away(tissues: Tissues, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = os.uname().nodename
    (tmp_path / f".he.partial-{host}-{int(done.stdout)}").mkdir()
    alive = tmp_path / f".he.partial-{host}-{os.getppid()}"
    alive.mkdir()
    tiled({"he": tissues["he"]}, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [alive.name]


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def spoiled(path: Path) -> Path:
    """Zeros over the first third, where the tiles of level 0 lie."""
    data = bytearray(path.read_bytes())
    data[1000 : len(data) // 3] = bytes(len(data) // 3 - 1000)
    path.write_bytes(data)
    return path


def test_unusable_slides_are_named_and_the_rest_goes_on(tissues: Tissues, tmp_path: Path) -> None:
    patch = mirrored(ihc())
    small = (1100, 900)
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    white = np.full((64, 64, 3), GLASS, np.uint8)
    bad = {
        "missing": tmp_path / "none.svs",
        "text": text,
        "cut": cut(write_pyramid(tmp_path / "cut.svs", patch, small), 0.6),
        "spoiled": spoiled(write_pyramid(tmp_path / "spoiled.svs", patch, (1300, 1200))),
        "flat": write_pyramid(tmp_path / "flat.svs", patch, small, factors=(1,)),
        "scaleless": write_pyramid(tmp_path / "scaleless.svs", patch, small, mpp=None),
        "empty": write_pyramid(tmp_path / "empty.svs", white, small),
        "tiny": write_pyramid(tmp_path / "tiny.svs", patch, (250, 200), factors=(1, 2)),
    }
    expected = {
        "missing": "missing file",
        "text": "no slide format that OpenSlide knows, or cut short",
        "cut": "cut short",
        "spoiled": "damaged or cut short at x ",
        "flat": "no smaller levels: 1100 x 900 pixels in one level",
        "scaleless": "no resolution",
        "empty": "no tissue: none of 12 tiles",
        "tiny": "250 x 200 pixels: smaller than a tile of 256",
    }
    options = TilingOptions(stride=256, side=200)  # read at level 0
    summary = tiled({**bad, **tissues}, tmp_path / "out", options, max_rejected_fraction=0.9)
    assert [slide.name for slide in summary.slides] == ["he", "ihc"]
    rows = list(csv.DictReader((tmp_path / "out" / "rejected.csv").open(encoding="utf-8")))
    assert {row["key"] for row in rows} == set(expected)
    for row in rows:
        assert expected[row["key"]] in row["reason"], row
        assert row["image"] == str(bad[row["key"]])
    assert "rejected: 8 of 10" in str(summary)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name in bad or path.name.startswith(".")]

    with pytest.raises(UserError, match=r"8 of 10 slides rejected so far|rejected so far, above the limit of 5.00%"):
        tiled({**bad, **tissues}, tmp_path / "other", options)
    with pytest.raises(UserError, match="nothing could be"):
        tiled({"text": text}, tmp_path / "third", options, max_rejected_fraction=1.0)


def test_md5_resolution_and_names(tissues: Tissues, tmp_path: Path) -> None:
    slide = SlideFile("he", tissues["he"], md5="0" * 32, row=7)
    with pytest.raises(UserError, match=r"row 7 .*md5 [0-9a-f]{32}, expected 00000000"):
        tile_slides([slide], tmp_path / "a", OPTIONS, workers=0, quiet=True)
    twice = [SlideFile("he", tissues["he"]), SlideFile("he", tissues["ihc"])]
    found = tile_slides(twice, tmp_path / "b", OPTIONS, workers=0, max_rejected_fraction=0.5, quiet=True)
    assert [one.reason for one in found.rejected] == ["another slide is named he, too"]
    scaleless = write_pyramid(tmp_path / "s.svs", mirrored(ihc()), (1100, 900), mpp=None)
    known = tiled({"s": scaleless}, tmp_path / "c", TilingOptions(stride=256, side=30, assume_mpp=0.5))
    assert known.slides[0].mpp == 0.5
    for name in ("", "a/b", ".hidden", "a b"):
        with pytest.raises(UserError, match="name of a slide"):
            tiled({name: tissues["he"]}, tmp_path / "d")


def test_other_options_are_refused_by_name(tissues: Tissues, tmp_path: Path) -> None:
    one = {"he": tissues["he"]}
    tiled(one, tmp_path)
    with pytest.raises(UserError, match=r"he: tiled with other options \(side: side was 30, now 50\); delete"):
        tiled(one, tmp_path, TilingOptions(stride=256, side=50))
    for wrong in ({"stride": 10, "side": 20}, {"min_tissue": 2.0}, {"max_white": 0.0}, {"most": 0}, {"format": "gif"}):
        with pytest.raises(UserError, match="tiles"):
            TilingOptions(**wrong)  # type: ignore[arg-type]
    for mpp in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"micrometres per pixel: found .*, expected more than 0"):
            TilingOptions(assume_mpp=mpp)


def test_a_few_tiles_of_each_slide_are_the_same_each_time(tissues: Tissues, tmp_path: Path) -> None:
    whole = {slide.name: [(t.x, t.y) for t in slide.tiles] for slide in tiled(tissues, tmp_path / "all").slides}
    options = TilingOptions(stride=256, side=30, most=4, format="jpg")
    some = [tiled(tissues, tmp_path / name, options) for name in ("a", "b")]
    for first, second in zip(some[0].slides, some[1].slides, strict=True):
        places = [(tile.x, tile.y) for tile in first.tiles]
        assert len(places) == 4
        assert set(places) <= set(whole[first.name])
        assert places == [(tile.x, tile.y) for tile in second.tiles]
        assert json.loads((first.folder / "slide.json").read_text())["tiles"] == second.record["tiles"]
        assert all(tile.path.suffix == ".jpg" for tile in first.tiles)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=60))
def test_otsu_parts_with_the_largest_variance_between_the_classes(values: list[int]) -> None:
    grey = np.array(values, np.uint8)

    def between(level: int) -> float:
        low, high = grey[grey <= level], grey[grey > level]
        if not len(low) or not len(high):
            return 0.0
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    found = otsu(grey)
    assert between(found) == pytest.approx(max(between(level) for level in range(256)))


def test_otsu_of_one_grey_level_is_that_level() -> None:
    assert otsu(np.full((4, 4), GLASS, np.uint8)) == GLASS


def test_a_closed_or_broken_slide_is_an_unusable_one(tmp_path: Path) -> None:
    with pytest.raises(UnusableSlide, match="missing file"):
        SlideReader(tmp_path / "none.svs")
