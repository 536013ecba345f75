"""Stain normalisation: known stains are found, a reference maps onto itself, twice changes nothing more."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipdist.errors import UserError
from clipdist.prepare.phantom_tissue import draw_tissue
from clipdist.prepare.recolour import recolour_slides
from clipdist.prepare.reference_tile import choose_reference, look_at
from clipdist.prepare.slides import TiledSlide
from clipdist.prepare.stain import (
    EOSIN,
    HAEMATOXYLIN,
    Colours,
    Method,
    NoTissue,
    Picture,
    StainNormaliser,
    Stains,
    amounts_of,
    from_lab,
    macenko,
    optical_density,
    stained_pixels,
    to_lab,
    vahadane,
)
from tests.unit.tissue import h_and_e, ihc

METHODS: tuple[Method, ...] = ("macenko", "reinhard", "vahadane")
PAIRS = {
    "ruifrok": (HAEMATOXYLIN, EOSIN),
    "purple and pink": ((0.49, 0.77, 0.41), (0.09, 0.95, 0.28)),
    "haematoxylin and dab": (HAEMATOXYLIN, (0.27, 0.57, 0.78)),
}


def stained(vectors: np.ndarray, seed: int = 0, side: int = 150, strength: float = 1.0) -> Picture:
    """Pixels with much of one stain, of the other, of both or of neither; a camera's noise."""
    rng = np.random.default_rng(seed)
    count = side * side
    first = np.where(rng.random(count) < 0.4, rng.gamma(4, 0.12, count), rng.exponential(0.03, count))
    second = np.where(rng.random(count) < 0.6, rng.gamma(4, 0.1, count), rng.exponential(0.03, count))
    light = 255 * 10 ** -(strength * np.stack([first, second], 1) @ vectors) + rng.normal(0, 1.5, (count, 3))
    return np.rint(light).clip(0, 255).astype(np.uint8).reshape(side, side, 3)


def unit(vectors: object) -> np.ndarray:
    values = np.array(vectors, float)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((unit(a) * unit(b)).sum(1), -1, 1)))


@pytest.mark.parametrize("name", PAIRS)
def test_known_stains_are_found(name: str) -> None:
    true = unit(PAIRS[name])
    density = optical_density(stained_pixels([stained(true)]))
    assert degrees(macenko(density), true).max() < 1
    # The penalty draws both stains a little towards each other.
    assert degrees(vahadane(density), true).max() < 4


def test_stains_are_ordered_whatever_their_share() -> None:
    true = unit(PAIRS["ruifrok"])
    for seed, picture in enumerate((stained(true, 1), stained(true[::-1], 2))):
        found = macenko(optical_density(stained_pixels([picture])))
        assert degrees(found, true).max() < 2, seed


def test_stains_of_real_tissue_lie_near_the_published_ones() -> None:
    dab = unit([(0.27, 0.57, 0.78)])[0]
    found = macenko(optical_density(stained_pixels([ihc()])))
    if (ihc()[..., 0] > ihc()[..., 2]).mean() > 0.3:  # brown: the photograph, not drawn tissue in its place
        assert degrees(found[1:], dab[None])[0] < 12
    assert degrees(found[:1], unit([HAEMATOXYLIN]))[0] < 15


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_amounts_are_the_best_that_are_not_negative(
    densities: list[tuple[float, float, float]], sparsity: float
) -> None:
    vectors, density = unit(PAIRS["ruifrok"]), np.array(densities)

    def cost(amounts: np.ndarray) -> np.ndarray:
        return ((density - amounts @ vectors) ** 2).sum(1) / 2 + sparsity * amounts.sum(1)

    found = amounts_of(density, vectors, sparsity)
    assert (found >= 0).all()
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.05, 1.0):
        for _ in range(20):
            other = np.maximum(found + rng.normal(0, scale, found.shape), 0)
            assert (cost(other) >= cost(found) - 1e-12).all()


def test_density_of_light() -> None:
    assert optical_density(np.array([[255, 128, 0]], np.uint8))[0] == pytest.approx([0, 0.2993, 2.4065], abs=1e-4)


def test_lab_and_back() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (500, 3)).astype(np.uint8)
    assert np.abs(from_lab(to_lab(pixels)).astype(int) - pixels).max() <= 1
    # Grey has nearly no colour: Reinhard et al., section "decorrelated color space".
    assert np.abs(to_lab(np.full((1, 3), 128, np.uint8))[0, 1:]).max() < 0.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tissue", [ihc, h_and_e], ids=["ihc", "h_and_e"])
def test_a_reference_maps_onto_itself(method: Method, tissue: object) -> None:
    assert callable(tissue)
    picture = tissue()
    normaliser = StainNormaliser.make(method, picture)
    same = normaliser.apply(picture, normaliser.fit([picture]))
    assert same.dtype == np.uint8
    # What two stains cannot explain is lost.
    assert np.abs(same.astype(int) - picture).mean() < (0.1 if method == "reinhard" else 6)


@pytest.mark.parametrize("method", METHODS)
def test_twice_changes_nothing_more(method: Method) -> None:
    normaliser = StainNormaliser.make(method, draw_tissue("idc", 1, 256))
    once = normaliser.apply(h_and_e(), normaliser.fit([h_and_e()]))
    twice = normaliser.apply(once, normaliser.fit([once]))
    # Not exactly nothing: what grew pale counts as glass the second time, and clipped colours are gone.
    assert np.abs(twice.astype(int) - once).mean() < np.abs(once.astype(int) - h_and_e()).mean() / 4


@pytest.mark.parametrize("method", METHODS)
def test_two_scanners_look_alike_afterwards(method: Method) -> None:
    """The same amounts of stain, drawn with other stains and twice as strong, come out nearly equal."""
    a = stained(unit(PAIRS["ruifrok"]), seed=5)
    b = stained(unit(PAIRS["purple and pink"]), seed=5, strength=1.6)
    normaliser = StainNormaliser.make(method, stained(unit(PAIRS["ruifrok"]), seed=6))
    before = np.abs(a.astype(int) - b).mean()
    one, two = (normaliser.apply(picture, normaliser.fit([picture])).astype(int) for picture in (a, b))
    assert np.abs(one - two).mean() < before / 2.5


def test_what_cannot_be_used_is_said() -> None:
    white = np.full((80, 80, 3), 250, np.uint8)
    with pytest.raises(UserError, match="reference tile will not do: 0 stained pixels, expected 500"):
        StainNormaliser.make("macenko", white)
    with pytest.raises(UserError, match="found 'other', expected one of macenko, reinhard, vahadane"):
        StainNormaliser.make("other", ihc())  # type: ignore[arg-type]
    with pytest.raises(NoTissue):
        StainNormaliser.make("macenko", ihc()).fit([white])
    assert isinstance(StainNormaliser.make("reinhard", ihc()).target, Colours)
    assert isinstance(StainNormaliser.make("vahadane", ihc()).target, Stains)


def one_colour(vector: tuple[float, float, float], noise: float = 1.5, side: int = 150) -> Picture:
    """Pixels with much or little of a single stain; a camera's noise."""
    rng = np.random.default_rng(0)
    count = side * side
    amount = np.where(rng.random(count) < 0.5, rng.gamma(4, 0.12, count), rng.exponential(0.03, count))
    light = 255 * 10 ** -(amount[:, None] * unit([vector])) + rng.normal(0, noise, (count, 3))
    return np.rint(light).clip(0, 255).astype(np.uint8).reshape(side, side, 3)


ONE_COLOUR = {
    "uniform": np.full((80, 80, 3), (150, 90, 160), np.uint8),
    "grey": np.random.default_rng(0).integers(20, 200, (80, 80, 1), dtype=np.uint8).repeat(3, 2),
    "black and white": np.where(np.arange(80)[:, None, None] % 2, 0, 255).astype(np.uint8).repeat(80, 1).repeat(3, 2),
    "eosin": one_colour(EOSIN),
    "haematoxylin": one_colour(HAEMATOXYLIN),
    "noisy haematoxylin": one_colour(HAEMATOXYLIN, 3),
}


@pytest.mark.parametrize("name", ONE_COLOUR)
@pytest.mark.parametrize("method", ["macenko", "vahadane"])
def test_pictures_of_one_stain_are_neither_recoloured_nor_references(method: Method, name: str) -> None:
    with pytest.raises(NoTissue, match=r"one stain only: .* degrees apart, expected 8 or more"):
        StainNormaliser.make(method, h_and_e()).fit([ONE_COLOUR[name]])
    with pytest.raises(UserError, match="reference tile will not do: one stain only"):
        StainNormaliser.make(method, ONE_COLOUR[name])


@pytest.mark.parametrize("name", ["uniform", "grey", "black and white"])
def test_reinhard_needs_colours_that_differ(name: str) -> None:
    with pytest.raises(NoTissue, match="one colour only"):
        StainNormaliser.make("reinhard", h_and_e()).fit([ONE_COLOUR[name]])
    with pytest.raises(UserError, match="reference tile will not do: one colour only"):
        StainNormaliser.make("reinhard", ONE_COLOUR[name])


def slide_of(folder: Path, name: str, pictures: list[Picture]) -> TiledSlide:
    (folder / name).mkdir(parents=True)
    tiles = []
    for number, picture in enumerate(pictures):
        path = folder / name / f"{number:06d}_000000.png"
        Image.fromarray(picture).save(path)
        size = path.stat().st_size
        tiles.append({"file": path.name, "x": number, "y": 0, "tissue": 1.0, "white": 0.0, "bytes": size})
    return TiledSlide(name, folder / name, {"mpp": 0.25, "options": {"stride": 256}, "tiles": tiles})


def test_slides_are_recoloured_once(tmp_path: Path) -> None:
    white = np.full((80, 80, 3), 250, np.uint8)
    tissue = draw_tissue("dcis", 0, 256)
    slides = [slide_of(tmp_path / "in", "a", [tissue, h_and_e()]), slide_of(tmp_path / "in", "b", [white])]
    Image.fromarray(ihc()).save(tmp_path / "reference.png")

    def recoloured(method: Method = "macenko") -> tuple[list[TiledSlide], list[str]]:
        done, rejected = recolour_slides(
            slides, tmp_path / "out", method, tmp_path / "reference.png", workers=0, quiet=True
        )
        return done, [f"{one.key}: {one.reason}" for one in rejected]

    done, rejected = recoloured()
    assert rejected == ["b: no stains: 0 stained pixels, expected 500 or more"]
    (slide,) = done
    assert [tile.path.parent.parent.name for tile in slide.tiles] == ["out", "out"]
    assert len(slide.record["stains"]["vectors"]) == 2
    assert json.loads((slide.folder / "slide.json").read_text())["recoloured"]["method"] == "macenko"
    before = slide.tiles[0].path.read_bytes()
    assert before != slides[0].tiles[0].path.read_bytes()

    assert recoloured()[0][0].resumed
    slide.tiles[0].path.write_bytes(b"")
    (again,), _ = recoloured()
    assert not again.resumed
    assert again.tiles[0].path.read_bytes() == before
    (other,), _ = recoloured("vahadane")
    assert not other.resumed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_one_colour_damage_and_what_is_no_picture_are_named(tmp_path: Path) -> None:
    slides = [slide_of(tmp_path / "in", name, [ONE_COLOUR[name]]) for name in ("grey", "eosin")]
    slides.append(slide_of(tmp_path / "in", "tissue", [h_and_e()]))
    Image.fromarray(h_and_e()).save(tmp_path / "reference.png")
    options = {"workers": 0, "quiet": True}
    done, rejected = recolour_slides(slides, tmp_path / "out", "macenko", tmp_path / "reference.png", **options)
    assert [slide.name for slide in done] == ["tissue"]
    assert [one.key for one in rejected] == ["grey", "eosin"]
    assert all("one stain only" in one.reason for one in rejected)
    assert not (tmp_path / "out" / "grey").exists()

    (tmp_path / "text.png").write_text("no picture")
    for reference in (tmp_path / "text.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match=r"reference tile .*: cannot be read as a picture"):
            recolour_slides(slides, tmp_path / "other", "macenko", reference, **options)
    path = slides[2].tiles[0].path
    path.write_bytes(path.read_bytes()[:2000] + bytes(path.stat().st_size - 2000))
    with pytest.raises(UserError, match=r"000000_000000.png: damaged tile \(.*\); delete the folder .*tissue and run"):
        recolour_slides(slides[2:], tmp_path / "third", "macenko", tmp_path / "reference.png", **options)


def test_the_reference_is_a_full_ordinary_tile_with_gland_and_stroma(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stroma = draw_tissue("ilc", 0, 256)
    paths = []
    for number in range(9):
        Image.fromarray(draw_tissue("dcis", number, 256)).save(tmp_path / f"dcis-{number}.png")
        paths.append(tmp_path / f"dcis-{number}.png")
    odd = {
        "half_empty": np.where(np.arange(256)[None, :, None] < 150, np.uint8(245), stroma),
        "dark": (stroma * 0.4).astype(np.uint8),
        "green": stroma[..., [1, 0, 2]],
        "noise": rng.integers(0, 255, (256, 256, 3)).astype(np.uint8),
    }
    for name, picture in odd.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        paths.append(tmp_path / f"{name}.png")
    chosen, terms = choose_reference(paths)
    assert chosen.name.startswith("dcis")
    assert terms["glass"] < 0.05
    assert choose_reference(paths) == (chosen, terms)
    with Image.open(tmp_path / "half_empty.png") as picture:
        assert look_at(picture).glass == pytest.approx(150 / 256, abs=0.03)
    with pytest.raises(UserError, match="no tiles to choose from"):
        choose_reference([])
