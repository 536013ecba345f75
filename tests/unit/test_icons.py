"""Icon sets: safe reading, joining on code points, drawing; the emoji recipe on a tiny set of its own."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from clipdist.data.shards import ShardSet, checksum_file
from clipdist.errors import UserError
from clipdist.prepare.icons import (
    Concept,
    Icon,
    IconSet,
    base_concept,
    caption,
    concept_id,
    drawing_box,
    fetch_npm,
    join_concepts,
    read_members,
    read_openmoji,
    render,
    render_many,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)
# Four quarters of a 16 x 16 box, all of different colour, so that every flip and turn shows.
QUARTERS = (
    '<path fill="red" d="M0 0h8v8H0z"/><path fill="green" d="M8 0h8v8H8z"/>'
    '<path fill="blue" d="M0 8h8v8H0z"/><path fill="white" d="M8 8h8v8H8z"/>'
)
SQUARE = '<path fill="red" d="M0 0h16v16H0z"/>'


def tarball(path: Path, members: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def icon_package(path: Path, prefix: str, chars: dict[str, str], icons: dict[str, Any], **data: Any) -> Path:
    return tarball(
        path,
        {
            "package/package.json": {"name": f"@iconify-json/{prefix}", "version": "1.0.0"},
            "package/info.json": {
                "name": prefix.title(),
                "author": {"name": "A. Drawer"},
                "license": {"title": "MIT", "spdx": "MIT", "url": "https://example.org/licence"},
            },
            "package/chars.json": chars,
            "package/icons.json": {"prefix": prefix, "icons": icons, "width": 16, "height": 16, **data},
        },
    )


def row(hexcode: str, annotation: str, tags: str = "", skintone: str | int = "") -> dict[str, Any]:
    return {
        "hexcode": hexcode,
        "annotation": annotation,
        "tags": tags,
        "group": "objects",
        "subgroups": "tool",
        "skintone": skintone,
    }


def colours(png: bytes, *places: tuple[float, float]) -> list[tuple[int, ...]]:
    picture = Image.open(io.BytesIO(png))
    assert picture.mode == "RGB"
    found = [picture.getpixel((int(x * picture.width), int(y * picture.height))) for x, y in places]
    return [tuple(colour) for colour in found]  # type: ignore[arg-type]


CORNERS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))


@pytest.fixture
def _resvg() -> None:
    pytest.importorskip("resvg_py", reason="resvg-py, which draws SVGs (extra: emoji), is not installed")


# Reading packages


def test_members_are_read_in_the_asked_order_and_nothing_is_written(tmp_path: Path) -> None:
    path = tarball(tmp_path / "a.tgz", {"../escape": b"x", "package/b": b"2", "package/a": b"1", "/abs": b"y"})
    before = sorted(tmp_path.parent.rglob("*"))
    assert list(read_members(path, ["package/a", "package/b"]).items()) == [("package/a", b"1"), ("package/b", b"2")]
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("package/icons.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    with pytest.raises(UserError, match=r"no member package/icons\.json"):
        read_members(path, ["package/icons.json"])


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_damaged_tarball_is_named(tmp_path: Path, keep: int) -> None:
    path = tarball(tmp_path / "a.tgz", {"package/a": bytes(range(256)) * 40})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.tgz: (not a readable|no member)"):
        read_members(path, ["package/a"])


def test_another_package_is_not_an_icon_set(tmp_path: Path) -> None:
    path = icon_package(tmp_path / "a.tgz", "x", {}, {})
    assert IconSet.from_tarball(path).prefix == "x"
    broken = tarball(tmp_path / "b.tgz", {f"package/{name}.json": [] for name in ("icons", "chars", "info", "package")})
    with pytest.raises(UserError, match="not an Iconify icon set"):
        IconSet.from_tarball(broken)
    with pytest.raises(UserError, match="lacks some of"):
        read_openmoji(tarball(tmp_path / "c.tgz", {"package/data/openmoji.json": [{"hexcode": "1F600"}]}))


# Fetching


def fake_npm(folder: Path, script: str) -> str:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_a_tarball_already_there_needs_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    there = tmp_path / "scope-name-1.2.3.tgz"
    there.write_bytes(b"tarball")
    assert fetch_npm("@scope/name", "1.2.3", tmp_path, xxh3_64=checksum_file(there)) == there
    with pytest.raises(UserError, match=r"found checksum [0-9a-f]{16}, expected 0{16}; delete the file"):
        fetch_npm("@scope/name", "1.2.3", tmp_path, xxh3_64="0" * 16)


def test_without_npm_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not on PATH.*apt-get install npm"):
        fetch_npm("@scope/name", "1.2.3", tmp_path / "cache")


def test_npm_is_called_for_one_exact_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Writes its arguments into the tarball; $5 is the folder that follows --pack-destination.
    path = fake_npm(tmp_path / "bin", 'echo "$@" > "$5/scope-name-1.2.3.tgz"')
    monkeypatch.setenv("PATH", path)
    fetched = fetch_npm("@scope/name", "1.2.3", tmp_path / "cache")
    assert fetched == tmp_path / "cache" / "scope-name-1.2.3.tgz"
    assert fetched.read_text().startswith("pack --ignore-scripts")
    assert fetched.read_text().endswith(" @scope/name@1.2.3\n")
    assert list((tmp_path / "cache").iterdir()) == [fetched]


def test_a_failing_npm_leaves_nothing_and_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_npm(tmp_path / "bin", 'echo half > "$5/scope-name-1.2.3.tgz"; echo "npm error 404" >&2; exit 1')
    monkeypatch.setenv("PATH", path)
    with pytest.raises(UserError, match=r"npm pack @scope/name@1\.2\.3 failed \(npm error 404\)"):
        fetch_npm("@scope/name", "1.2.3", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# Concepts


def test_a_concept_ignores_case_and_variation_selectors() -> None:
    assert concept_id("263A-FE0F") == "263a"
    assert concept_id("1F441-FE0F-200D-1F5E8-FE0F") == "1f441-200d-1f5e8"


@pytest.mark.parametrize(
    ("variants", "base"),
    [
        (("1f468", "1f469", "1f9d1", "1f468-1f3fd", "1f469-200d-1f9b0", "1f471-200d-2640", "1f9d4"), "1f9d1"),
        (("1f468-200d-1f3a8", "1f469-1f3ff-200d-1f3a8", "1f9d1-200d-1f3a8"), "1f9d1-200d-1f3a8"),
        (("1f3c3-200d-2640-200d-27a1", "1f3c3-200d-2642", "1f3c3-1f3fb"), "1f3c3"),
        (("1f469-200d-1f9bc-200d-27a1", "1f9d1-200d-1f9bc"), "1f9d1-200d-1f9bc"),
        (("1f466", "1f467", "1f9d2"), "1f9d2"),
        (("1f934", "1f478", "1fac5"), "1fac5"),
        (("1f385", "1f936", "1f9d1-200d-1f384"), "1f9d1-200d-1f384"),
        (("1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d1-200d-1f9d2-200d-1f9d2", "1f46a"), "1f46a"),
        (("1f468-200d-2764-200d-1f468", "1f491"), "1f491"),
        (("1f469-200d-2764-200d-1f48b-200d-1f468", "1f48f"), "1f48f"),
        (("1f46b", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff"), "1f9d1-200d-1f91d-200d-1f9d1"),
    ],
)
def test_variants_share_a_base(variants: tuple[str, ...], base: str) -> None:
    assert {base_concept(variant) for variant in variants} == {base}


def test_a_sign_alone_is_its_own_concept() -> None:
    alone = ["2640", "2642", "27a1", "1f3fb", "1f9b0", "1f600", "31-20e3", "1f441-200d-1f5e8"]
    assert [base_concept(concept) for concept in alone] == alone


def test_a_caption_repeats_no_word_of_the_annotation() -> None:
    tags = ["beverage", "box", "Juice", "juice", "straw", "sweet"]
    assert caption("beverage box", tags) == "beverage box, Juice, straw, sweet"
    assert caption("beverage box", tags, most_tags=1) == "beverage box, Juice"
    assert caption("keycap: 5", ["keycap"]) == "keycap: 5"


@pytest.fixture
def two_sets(tmp_path: Path) -> list[IconSet]:
    first = icon_package(
        tmp_path / "a.tgz",
        "first",
        {"263a": "smile", "1f600": "grin", "1f44b-1f3fb": "wave-light", "1f4a9": "only-here"},
        {name: {"body": SQUARE} for name in ("smile", "grin", "wave-light", "only-here")},
    )
    second = icon_package(
        tmp_path / "b.tgz",
        "second",
        {"263a-fe0f": "face", "1f600": "face-2", "1f44b-1f3fb": "wave"},
        {name: {"body": SQUARE} for name in ("face", "face-2", "wave")},
    )
    return [IconSet.from_tarball(first), IconSet.from_tarball(second)]


def test_concepts_are_those_that_every_set_draws(two_sets: list[IconSet]) -> None:
    rows = [
        row("263A-FE0F", "smiling face", "face, happy"),
        row("1F600", "grinning face", "cheerful, grin"),
        row("1F44B-1F3FB", "waving hand: light skin tone", skintone=1),
        row("1F4A9", "pile of poo"),
        row("1F601", "beaming face"),
    ]
    concepts = join_concepts(rows, two_sets)
    assert [concept.concept for concept in concepts] == ["1f600", "263a"]
    assert [concept.text for concept in concepts] == ["grinning face, cheerful, grin", "smiling face, happy"]
    assert concepts[1].icons == {"first": "smile", "second": "face"}
    assert (concepts[0].group, concepts[0].subgroup) == ("objects", "tool")


@pytest.mark.parametrize("other", [row("1F600", "smiling face"), row("263A", "another face")])
def test_rows_that_are_not_unique_are_refused(two_sets: list[IconSet], other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected unique rows"):
        join_concepts([row("263A-FE0F", "smiling face"), other], two_sets)


# Aliases and boxes


def test_aliases_add_turns_and_flips_and_the_nearest_size_wins(tmp_path: Path) -> None:
    icons = {"base": {"body": QUARTERS, "rotate": 1, "hFlip": True, "height": 20, "left": 2}}
    aliases = {
        "turned": {"parent": "base", "rotate": 2, "hFlip": True, "width": 24},
        "twice": {"parent": "turned", "vFlip": True, "height": 32},
        "round": {"parent": "about"},
        "about": {"parent": "round"},
        "lost": {"parent": "nowhere"},
    }
    icon_set = IconSet.from_tarball(icon_package(tmp_path / "a.tgz", "x", {}, icons, aliases=aliases, top=1))
    assert icon_set.icon("base") == Icon(QUARTERS, 2, 1, 16, 20, turns=1, flip_x=True)
    assert icon_set.icon("twice") == Icon(QUARTERS, 2, 1, 24, 32, turns=3, flip_x=False, flip_y=True)
    for name, reason in (("round", "circle of aliases"), ("lost", "'nowhere'"), ("absent", "'absent'")):
        with pytest.raises(UserError, match=reason):
            icon_set.icon(name)


def test_the_box_is_squared_about_its_centre() -> None:
    assert 'viewBox="0 -4 16 16"' in Icon(SQUARE, width=16, height=8).svg()
    assert 'viewBox="-3 2 20 20"' in Icon(SQUARE, left=2, top=2, width=10, height=20).svg()


# Drawing


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [RED, GREEN, BLUE, WHITE]),
        ({"flip_x": True}, [GREEN, RED, WHITE, BLUE]),
        ({"flip_y": True}, [BLUE, WHITE, RED, GREEN]),
        ({"turns": 1}, [BLUE, RED, WHITE, GREEN]),
        ({"turns": 2}, [WHITE, BLUE, GREEN, RED]),
        ({"turns": 5}, [BLUE, RED, WHITE, GREEN]),
        ({"turns": 1, "flip_x": True}, [WHITE, GREEN, BLUE, RED]),
    ],
)
@pytest.mark.usefixtures("_resvg")
def test_flips_come_before_turns(change: dict[str, Any], expected: list[tuple[int, ...]]) -> None:
    assert colours(render(Icon(QUARTERS, **change), 32), *CORNERS) == expected


@pytest.mark.usefixtures("_resvg")
def test_a_wide_icon_is_neither_stretched_nor_cut() -> None:
    wide = Icon('<path fill="red" d="M0 0h16v8H0z"/>', width=16, height=8)
    assert colours(render(wide, 64), (0.02, 0.5), (0.98, 0.5), (0.5, 0.2), (0.5, 0.8)) == [RED, RED, WHITE, WHITE]


@pytest.mark.usefixtures("_resvg")
def test_transparency_is_composited_on_the_background() -> None:
    half = Icon('<path fill="black" fill-opacity="0.5" d="M0 0h8v16H0z"/>')
    (left, right) = colours(render(half, 32), (0.2, 0.5), (0.8, 0.5))
    assert right == WHITE
    assert all(abs(channel - 128) <= 1 for channel in left)
    assert colours(render(half, 32, background="#0000ff"), (0.8, 0.5)) == [BLUE]


@pytest.mark.usefixtures("_resvg")
def test_gradients_are_drawn() -> None:
    gradient = Icon(
        '<defs><linearGradient id="a"><stop stop-color="red"/><stop offset="1" stop-color="blue"/></linearGradient>'
        '</defs><path fill="url(#a)" d="M0 0h16v16H0z"/>'
    )
    left, middle, right = colours(render(gradient, 64), (0.02, 0.5), (0.5, 0.5), (0.98, 0.5))
    assert left[0] > 240 > 10 > left[2]
    assert right[2] > 240 > 10 > right[0]
    assert 100 < middle[0] < 155
    assert 100 < middle[2] < 155


@pytest.mark.usefixtures("_resvg")
def test_a_margin_brings_every_padding_to_one_scale() -> None:
    small = Icon('<path fill="red" d="M10 2h4v2h-4z"/>')
    assert drawing_box(small) == (10, 1, 4)
    assert drawing_box(small, margin=0.25) == (9, 0, 6)
    # Offset and size of the icon's own box make no difference.
    moved = Icon('<path fill="red" d="M110 102h4v2h-4z"/>', left=100, top=100, width=32, height=16)
    assert drawing_box(moved) == (110, 101, 4)
    assert render(small, 32, margin=0.25) == render(moved, 32, margin=0.25)
    assert colours(render(small, 32, margin=0.0), (0.02, 0.5), (0.98, 0.5), (0.5, 0.1)) == [RED, RED, WHITE]


@pytest.mark.usefixtures("_resvg")
def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(UserError, match="paints nothing"):
        drawing_box(Icon("<g></g>"))
    with pytest.raises(UserError, match="cannot be drawn"):
        render(Icon("<path"), 32)


@pytest.mark.usefixtures("_resvg")
def test_processes_draw_the_same_pictures_in_the_same_order() -> None:
    icons = [Icon(QUARTERS, turns=turn) for turn in range(40)]
    alone = list(render_many(icons, 16, workers=0))
    assert alone[0] != alone[1]
    assert alone[0] == alone[4]
    assert list(render_many(icons, 16, workers=2)) == alone


# The recipe


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "shards" / "emoji.py"
    spec = importlib.util.spec_from_file_location("emoji_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan_holds_out_drawings_and_keeps_every_concept(recipe: ModuleType) -> None:
    concepts = [Concept(f"c{i}", f"b{i // 2}", "", f"{i}", "", "", {}) for i in range(1000)]
    plan = recipe.plan(concepts)
    assert plan == recipe.plan(concepts[::-1])
    assert [(split, style) for split, style, _ in plan] == [
        *(("train", style) for style in recipe.TRAIN),
        *(("val", style) for style in recipe.TRAIN),
        ("test", "noto"),
    ]
    pairs = {split: [(style, c.concept) for s, style, cs in plan if s == split for c in cs] for split, _, _ in plan}
    every = {(style, c.concept) for style in recipe.TRAIN for c in concepts}
    assert sorted(pairs["train"] + pairs["val"]) == sorted(every)
    assert len(pairs["val"]) == 3 * recipe.VAL_PER_STYLE
    bases = [c.base for split, _, cs in plan if split == "val" for c in cs]
    assert len(set(bases)) == len(bases)
    assert {c.concept for c in plan[-1][2]} == {c.concept for c in concepts}
    assert [c.concept for c in plan[-1][2]] != sorted(c.concept for c in concepts)


@pytest.mark.usefixtures("_resvg")
def test_the_recipe_packs_one_shard_for_each_style(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    codes = [f"1f6{i:02x}" for i in range(12)]
    packages = {}
    for number, style in enumerate((*recipe.TRAIN, recipe.TEST)):
        icons = {f"icon-{code}": {"body": QUARTERS, "rotate": number} for code in codes}
        path = icon_package(
            downloads / f"iconify-json-{style}-1.tgz", style, {code: f"icon-{code}" for code in codes}, icons
        )
        packages[style] = (f"@iconify-json/{style}", "1", checksum_file(path))
    rows = [row(code.upper(), f"thing {code}", "useful") for code in codes]
    names = tarball(downloads / "openmoji-1.tgz", {"package/data/openmoji.json": rows})
    monkeypatch.setattr(recipe, "PACKAGES", packages)
    monkeypatch.setattr(recipe, "NAMES", ("openmoji", "1", checksum_file(names)))
    monkeypatch.setattr(recipe, "EXPECTED_CONCEPTS", 12)
    monkeypatch.setattr(recipe, "VAL_PER_STYLE", 2)
    out = tmp_path / "set"
    arguments = ["--out", str(out), "--download-dir", str(downloads), "--side", "16", "--workers", "0"]

    recipe.main(arguments)
    shards = ShardSet.open(out)
    manifest = shards.manifest
    assert [s.samples for s in manifest.splits["train"]] == [10, 10, 10]
    assert [s.samples for s in manifest.splits["val"]] == [2, 2, 2]
    assert [s.samples for s in manifest.splits["test"]] == [12]
    assert manifest.sources == {path.name: checksum_file(path) for path in downloads.iterdir()}
    seen = set()
    for split in manifest.splits:
        samples = shards.split(split)
        for number in range(len(samples)):
            sample = samples.read(number)
            shard = manifest.splits[split][samples.locate(number)[0]]
            assert manifest.notes["shards"][shard.file]["style"] == sample.fields["style"]
            assert manifest.notes["shards"][shard.file]["license"].startswith("MIT: ")
            assert sample.texts == [f"thing {sample.fields['label']}, useful"]
            assert Image.open(io.BytesIO(sample.image)).size == (16, 16)
            seen.add((sample.fields["style"], sample.fields["label"]))
    assert len(seen) == 4 * 12

    before = checksum_file(out / "manifest.json")
    capsys.readouterr()
    monkeypatch.setattr(recipe, "fetch_npm", None)  # would fail: the second run needs neither packages nor drawing
    recipe.main(arguments)
    assert "already there" in capsys.readouterr().out
    assert checksum_file(out / "manifest.json") == before


def test_the_recipe_exits_with_2_and_one_line_for_a_wrong_input(recipe: ModuleType, tmp_path: Path) -> None:
    name, version, _ = recipe.PACKAGES["twemoji"]
    (tmp_path / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz").write_bytes(b"not a tarball")
    command = [sys.executable, recipe.__file__, "--out", str(tmp_path / "set"), "--download-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(recipe.__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.startswith("clipdist: error: ")
    assert done.stderr.count("\n") == 1
    assert "delete the file and run again" in done.stderr
