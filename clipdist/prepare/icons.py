"""Iconify icon sets -> captioned pictures: fetch packages, join icons on code points, draw them.

An Iconify package holds `icons.json` (SVG bodies, a default box, aliases), `chars.json` (code point sequence -> icon
name) and `info.json` (author, licence); https://iconify.design/docs/types/iconify-json.html describes the format.
Drawing needs the extra `emoji` (resvg-py); the rest does not.
"""

import functools
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clipdist.data.shards import checksum_file
from clipdist.errors import UserError

JOINER, VARIATION = "200d", "fe0f"
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
HAIR = frozenset({"1f9b0", "1f9b1", "1f9b2", "1f9b3"})
SIGNS = frozenset({"2640", "2642", "27a1"})  # woman, man, facing right
# Adults, then children, then characters whose man, woman and person have code points of their own.
SAME_BASE = {
    **dict.fromkeys(("1f468", "1f469", "1f471", "1f9d4"), "1f9d1"),  # man, woman, blond, bearded -> person
    **dict.fromkeys(("1f466", "1f467"), "1f9d2"),  # boy, girl -> child
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),  # old man, old woman -> older person
    **dict.fromkeys(("1f934", "1f478"), "1fac5"),  # prince, princess -> person with crown
    **dict.fromkeys(("1f930", "1fac3"), "1fac4"),  # pregnant woman, man -> pregnant person
    **dict.fromkeys(("1f385", "1f936"), "1f9d1-200d-1f384"),  # Santa Claus, Mrs. Claus -> Mx Claus
    **dict.fromkeys(("1f57a",), "1f483"),  # man dancing -> woman dancing
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-200d-1f91d-200d-1f9d1"),  # two people holding hands
}
PEOPLE = frozenset({"1f9d1", "1f9d2"})
FAMILY, KISS, COUPLE = "1f46a", "1f48f", "1f491"


def fetch_npm(package: str, version: str, folder: Path, *, xxh3_64: str | None = None) -> Path:
    """The tarball of `package@version` in `folder`, downloaded by `npm pack` unless it is there already.

    Nothing of the package is run or unpacked. Raises `UserError` when npm is missing or fails, and when the
    tarball's checksum is not `xxh3_64`.
    """
    path = folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        _npm_pack(f"{package}@{version}", path)
    if xxh3_64 and (found := checksum_file(path)) != xxh3_64:
        raise UserError(f"{path}: found checksum {found}, expected {xxh3_64}; delete the file and run again")
    return path


def _npm_pack(spec: str, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is not on PATH, and {path} is not there; install npm (Debian: apt-get install npm) "
            f"or put the tarball of {spec} there"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own and a rename: a download that was cut off is never taken for a whole one.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".npm-") as scratch:
        command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", scratch, spec]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        made = sorted(Path(scratch).glob("*.tgz"))
        if done.returncode or len(made) != 1:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(
                f"npm pack {spec} failed ({reason[0] if reason else f'exit code {done.returncode}'}); "
                f"check the network and npm's settings, or put the tarball at {path}"
            )
        made[0].replace(path)


def read_members(tarball: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Contents of the members `names` of a `.tgz`; nothing is written anywhere. `UserError` when one is missing."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name in names:
                    content = archive.extractfile(member)
                    assert content is not None
                    found[member.name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{tarball}: not a readable .tgz ({error}); delete it and run again") from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{tarball}: no member {missing[0]}; expected an npm package that holds it")
    return {name: found[name] for name in names}


@dataclass(frozen=True)
class Icon:
    """An SVG body and the box that it is drawn in; `turns` counts quarter turns clockwise, after the flips."""

    body: str
    left: float = 0.0
    top: float = 0.0
    width: float = 16.0
    height: float = 16.0
    turns: int = 0
    flip_x: bool = False
    flip_y: bool = False

    def svg(self, box: tuple[float, float, float] | None = None) -> str:
        """A whole SVG document with a square viewBox: `box` is (left, top, side); left out, the icon's own box
        grown to a square about its centre, so that nothing is stretched or cut."""
        x, y = self.left + self.width / 2, self.top + self.height / 2
        side = max(self.width, self.height)
        left, top, side = box or (x - side / 2, y - side / 2, side)
        transform = f"rotate({90 * (self.turns % 4)} {x:g} {y:g})" if self.turns % 4 else ""
        if self.flip_x or self.flip_y:
            sx, sy = (-1 if self.flip_x else 1), (-1 if self.flip_y else 1)
            transform += f" translate({x - sx * x:g} {y - sy * y:g}) scale({sx} {sy})"
        body = f'<g transform="{transform.strip()}">{self.body}</g>' if transform else self.body
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left:g} {top:g} {side:g} {side:g}">{body}</svg>'
        )


@dataclass(frozen=True)
class IconSet:
    """One Iconify package. `names` maps a concept id (see `concept_id`) to an icon's name."""

    prefix: str
    source: str
    license: str
    credit: str
    names: Mapping[str, str]
    data: Mapping[str, Any]

    @staticmethod
    def from_tarball(path: Path) -> "IconSet":
        """Reads an `@iconify-json/...` package; `UserError` when it is another kind of file."""
        members = read_members(path, [f"package/{name}.json" for name in ("icons", "chars", "info", "package")])
        try:
            icons, chars, info, package = (json.loads(content) for content in members.values())
            name, version, licence = package["name"], package["version"], info["license"]
            return IconSet(
                prefix=icons["prefix"],
                source=f"{name}@{version}",
                license=licence["spdx"],
                credit=f"{info['name']} by {info['author']['name']}, {licence['title']}, {licence['url']}",
                names={concept_id(code_points): icon for code_points, icon in chars.items()},
                data=icons,
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not an Iconify icon set ({type(error).__name__}: {error}); expected an @iconify-json package"
            ) from error

    def icon(self, name: str) -> Icon:
        """Icon `name` with its aliases followed; `UserError` when there is none."""
        turns, flip_x, flip_y = 0, False, False
        overrides: dict[str, float] = {}
        seen: set[str] = set()
        entry: Mapping[str, Any] | None
        while True:
            entry = self.data["icons"].get(name) or self.data.get("aliases", {}).get(name)
            if entry is None or name in seen:
                raise UserError(f"{self.source}: no icon named {name!r}" + (" (a circle of aliases)" if seen else ""))
            seen.add(name)
            turns += int(entry.get("rotate", 0))
            flip_x ^= bool(entry.get("hFlip", False))
            flip_y ^= bool(entry.get("vFlip", False))
            overrides = {k: float(entry[k]) for k in ("left", "top", "width", "height") if k in entry} | overrides
            if "body" in entry:
                break
            name = entry["parent"]
        defaults = {k: float(self.data[k]) for k in ("left", "top", "width", "height") if k in self.data}
        return Icon(entry["body"], turns=turns, flip_x=flip_x, flip_y=flip_y, **(defaults | overrides))


def concept_id(code_points: str) -> str:
    """`263A-FE0F` -> `263a`: lower case, without the variation selector, which fonts and tables use at will."""
    return "-".join(point for point in code_points.lower().split("-") if point != VARIATION)


def base_concept(concept: str) -> str:
    """The concept without skin tone, hair, gender and direction: what must stay on one side of a split.

    man artist, woman artist -> artist (`1f9d1-200d-1f3a8`); all families -> family; all couples that kiss -> kiss.
    """
    first, *rest = concept.split("-")
    first, *joined = "-".join([first, *(point for point in rest if point not in SKIN_TONES)]).split(f"-{JOINER}-")
    # The first part is what is shown, even where it is a sign or a tone alone: it stays.
    parts = [SAME_BASE.get(part, part) for part in (first, *(part for part in joined if part not in SIGNS | HAIR))]
    if len(parts) > 1 and set(parts) <= PEOPLE:
        return FAMILY
    if parts == ["1f9d1", "2764", "1f9d1"]:
        return COUPLE
    if parts == ["1f9d1", "2764", "1f48b", "1f9d1"]:
        return KISS
    return f"-{JOINER}-".join(parts)


def caption(annotation: str, tags: Iterable[str], most_tags: int = 6) -> str:
    """`beverage box, juice, straw, sweet`: the annotation, then up to `most_tags` tags that say something new."""
    said = {annotation.lower(), *annotation.lower().replace(":", " ").split()}
    new: list[str] = []
    for tag in tags:
        if tag.lower() not in said:
            said.add(tag.lower())
            new.append(tag)
    return ", ".join([annotation, *new[:most_tags]])


@dataclass(frozen=True)
class Concept:
    """One code point sequence that every icon set draws. `icons` maps a set's prefix to the icon's name there."""

    concept: str
    base: str
    annotation: str
    text: str
    group: str
    subgroup: str
    icons: Mapping[str, str]


def read_openmoji(tarball: Path) -> list[dict[str, Any]]:
    """The rows of `data/openmoji.json` in the npm package `openmoji`: hexcode, annotation, tags, group, ..."""
    rows = json.loads(read_members(tarball, ["package/data/openmoji.json"])["package/data/openmoji.json"])
    wanted = {"hexcode", "annotation", "tags", "group", "subgroups", "skintone"}
    if not isinstance(rows, list) or not rows or not wanted <= set(rows[0]):
        raise UserError(
            f"{tarball}: data/openmoji.json lacks some of {', '.join(sorted(wanted))}; expected openmoji 17"
        )
    return rows


def join_concepts(rows: Iterable[Mapping[str, Any]], sets: Sequence[IconSet], most_tags: int = 6) -> list[Concept]:
    """Concepts that every one of `sets` draws, skin tones left out, in order of concept id.

    `UserError` when two rows are one concept, or when two concepts have one caption (a caption names its drawing).
    """
    concepts: dict[str, Concept] = {}
    texts: dict[str, str] = {}
    for row in rows:
        concept = concept_id(row["hexcode"])
        if row["skintone"] != "" or any(concept not in icons.names for icons in sets):
            continue
        text = caption(row["annotation"], (tag.strip() for tag in row["tags"].split(",") if tag.strip()), most_tags)
        if concept in concepts or text in texts:
            raise UserError(f"{row['hexcode']} {text!r}: the same as {texts.get(text, concept)}; expected unique rows")
        texts[text] = concept
        names = {icons.prefix: icons.names[concept] for icons in sets}
        concepts[concept] = Concept(
            concept, base_concept(concept), row["annotation"], text, row["group"], row["subgroups"], names
        )
    return [concepts[concept] for concept in sorted(concepts)]


def drawing_box(icon: Icon, margin: float = 0.0, raster: int = 128) -> tuple[float, float, float]:
    """(left, top, side) of the smallest square about what the icon paints, grown by `margin` of its side on each edge.

    Found on a transparent picture of `raster` pixels, so exact to 1/`raster` of the icon's own box. Sets pad their
    icons differently; this gives all of them one scale. `UserError` when the icon paints nothing.
    """
    own = max(icon.width, icon.height)
    left, top = icon.left + (icon.width - own) / 2, icon.top + (icon.height - own) / 2
    painted = Image.open(io.BytesIO(_resvg(icon.svg(), raster, None))).getchannel("A").getbbox()
    if painted is None:
        raise UserError(f"an icon paints nothing: {icon.body[:80]!r}")
    x0, y0, x1, y1 = (edge * own / raster for edge in painted)
    side = max(x1 - x0, y1 - y0)
    grown = side * (1 + 2 * margin)
    return left + (x0 + x1 - grown) / 2, top + (y0 + y1 - grown) / 2, grown


def render(icon: Icon, side: int, *, margin: float | None = None, background: str = "white") -> bytes:
    """An RGB PNG of `side` x `side` pixels, composited on `background`.

    With `margin` the picture is cut to what is painted (see `drawing_box`); without, the icon's own box is shown.
    """
    box = None if margin is None else drawing_box(icon, margin)
    picture = Image.open(io.BytesIO(_resvg(icon.svg(box), side, background))).convert("RGB")
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _resvg(svg: str, side: int, background: str | None) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise UserError("drawing icons needs resvg-py; run: pip install resvg-py") from None
    try:
        # Without system fonts: no emoji is text, and loading fonts costs more than the drawing.
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=side, height=side, background=background, skip_system_fonts=True
        )
    except ValueError as error:
        raise UserError(f"an SVG that cannot be drawn ({error}): {svg[:120]!r}") from error
    return bytes(png)


def render_many(
    icons: Sequence[Icon], side: int, *, workers: int = 2, margin: float | None = None, background: str = "white"
) -> Iterator[bytes]:
    """`render` of each icon, in order, on `workers` processes (0: in this one)."""
    draw = functools.partial(render, side=side, margin=margin, background=background)
    if workers < 1:
        yield from map(draw, icons)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(draw, icons, chunksize=32)
