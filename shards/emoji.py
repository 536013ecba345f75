"""Emoji in four independent drawings with names and tags -> a shard set: 6,376 pairs, 1,594 concepts.

    pip install "clipdist[emoji]"          # resvg-py, which draws the SVGs; npm must be on PATH for the download
    python shards/emoji.py --out data/emoji

Three drawings of every concept train, the fourth tests: does a model know an umbrella in a hand that it never saw?

    train   twemoji, openmoji, fluent-emoji-flat: one shard for each drawing style, 1,515 pairs each
    val     237 pairs (5 % of the three styles), to choose a checkpoint by: for 237 concepts of different base
            concepts, the drawing of one style. Train has the concept in the two other styles, not this drawing
    test    noto, all 1,594 concepts: gallery 1,594, chance 0.0006; nothing of noto is in train or val

Fields: `text` (annotation and up to six tags, all different), `label` (code points), `style`, `unit` (the concept
without gender, hair and direction), `group_name` and `subgroup` (of OpenMoji), `source`, `license`.

By design units do not separate these splits; drawing styles do. To hold out whole concepts, split by `unit`.
Each style keeps its own licence, which the manifest gives for every shard. About 40 seconds on two cores.
"""

import argparse
import json
from pathlib import Path

import xxhash

from clipdist.cli import run_script
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import MANIFEST, checksum_file
from clipdist.prepare.icons import Concept, IconSet, fetch_npm, join_concepts, read_openmoji, render_many
from clipdist.progress import progress

TRAIN, TEST = ("twemoji", "openmoji", "fluent-emoji-flat"), "noto"
# Published tarballs never change, so their checksums are known beforehand.
PACKAGES = {
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "88b7293b473f58c8"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "dccc5fa605d92675"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "fdb8c7d1649e98b9"),
    "noto": ("@iconify-json/noto", "1.2.9", "8fd18f75b4ac6a4f"),
}
NAMES = ("openmoji", "17.0.0", "2ec46a3de969a57b")
NAMES_LICENSE = "Names, tags and groups: openmoji@17.0.0, OpenMoji, CC BY-SA 4.0 (annotations from Unicode CLDR)"
EXPECTED_CONCEPTS = 1594
VAL_PER_STYLE = 79
# Styles pad their icons differently: each is cut to what it paints, and given this much of its side on each edge.
MARGIN = 0.04


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    settings = {
        "recipe": "emoji",
        "side": options.side,
        "margin": MARGIN,
        "val_per_style": VAL_PER_STYLE,
        "packages": [f"{name}@{version}" for name, version, _ in (*PACKAGES.values(), NAMES)],
    }
    if not options.overwrite and already_made(options.out, settings):
        print(f"{options.out}: already there, made with the same settings")
        return
    downloads = options.download_dir or options.out.parent / "downloads"
    tarballs = {
        style: fetch_npm(*PACKAGES[style][:2], downloads, xxh3_64=PACKAGES[style][2]) for style in (*TRAIN, TEST)
    }
    names = fetch_npm(*NAMES[:2], downloads, xxh3_64=NAMES[2])
    sets = {style: IconSet.from_tarball(path) for style, path in tarballs.items()}
    concepts = join_concepts(read_openmoji(names), list(sets.values()))
    print(f"{len(concepts):,} concepts in all {len(sets)} drawings (expected {EXPECTED_CONCEPTS:,})")
    if len(concepts) != EXPECTED_CONCEPTS:
        print("warning: another number of concepts than expected: scores compare only within one gallery", flush=True)
    sources = {path.name: checksum_file(path) for path in (*tarballs.values(), names)}
    pack(options, settings, sets, plan(concepts), sources)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packs emoji in four drawing styles into a shard set.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shard set, such as data/emoji")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture's side (default 128)")
    parser.add_argument(
        "--download-dir", type=Path, help="where npm tarballs are kept (default: downloads beside --out)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default 2; 0: in this one)")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that is already there")
    return parser.parse_args(arguments)


def already_made(folder: Path, settings: dict[str, object]) -> bool:
    """Whether `folder` holds a finished set of these settings; other settings are left to the writer to refuse."""
    path = folder / MANIFEST
    if not path.exists():
        return False
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["notes"]["settings"] == settings)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def plan(concepts: list[Concept]) -> list[tuple[str, str, list[Concept]]]:
    """One entry for each shard: (split, style, its concepts in a fixed shuffled order)."""

    def drawn(name: str) -> str:
        return xxhash.xxh3_64_hexdigest(f"emoji\0{name}".encode())

    shuffled = sorted(concepts, key=lambda concept: drawn(concept.concept))
    first_of_base: dict[str, Concept] = {}
    for concept in shuffled:
        first_of_base.setdefault(concept.base, concept)
    candidates = sorted(first_of_base.values(), key=lambda concept: drawn(f"val\0{concept.base}"))
    held_out = {
        style: {concept.concept for concept in candidates[number :: len(TRAIN)][:VAL_PER_STYLE]}
        for number, style in enumerate(TRAIN)
    }
    train = [("train", style, [c for c in shuffled if c.concept not in held_out[style]]) for style in TRAIN]
    val = [("val", style, [c for c in shuffled if c.concept in held_out[style]]) for style in TRAIN]
    return [*train, *val, ("test", TEST, shuffled)]


def pack(
    options: argparse.Namespace,
    settings: dict[str, object],
    sets: dict[str, IconSet],
    shards: list[tuple[str, str, list[Concept]]],
    sources: dict[str, str],
) -> None:
    pairs = [(split, style, concept) for split, style, concepts in shards for concept in concepts]
    pictures = render_many(
        [sets[style].icon(concept.icons[style]) for _, style, concept in pairs],
        options.side,
        workers=options.workers,
        margin=MARGIN,
    )
    pictures = progress(pictures, total=len(pairs), unit="picture", description="drawing")
    licenses = {style: f"{icons.license}: {icons.credit} ({icons.source})" for style, icons in sets.items()}
    counts = {split: sum(s == split for s, _, _ in shards) for split, _, _ in shards}
    order = [f"{split}-{number:06d}.tar" for split in counts for number in range(counts[split])]
    by_shard = {
        name: {"style": style, "license": licenses[style]} for name, (_, style, _) in zip(order, shards, strict=True)
    }
    writer = ShardSetWriter(
        options.out,
        samples_per_shard=max(len(concepts) for _, _, concepts in shards),
        license_text="\n".join([*licenses.values(), NAMES_LICENSE]),
        sources=sources,
        notes={"settings": settings, "licenses": {**licenses, "text": NAMES_LICENSE}, "shards": by_shard},
        overwrite=options.overwrite,
    )
    open_style = ""
    with writer:
        for (split, style, concept), picture in zip(pairs, pictures, strict=True):
            if style != open_style:
                writer.close_shard(split)
            open_style = style
            fields = {
                "text": concept.text,
                "label": concept.concept,
                "style": style,
                "unit": concept.base,
                "group_name": concept.group,
                "subgroup": concept.subgroup,
                "source": sets[style].source,
                "license": sets[style].license,
            }
            writer.write(split, f"{style}-{concept.concept}", picture, "png", fields)
    for split, shard_list in writer.manifest.splits.items():
        pairs_here, files = sum(shard.samples for shard in shard_list), len(shard_list)
        print(f"{split}: {pairs_here:,} pairs in {files} shard{'s' if files > 1 else ''}")
    print(f"{options.out}: done")


if __name__ == "__main__":
    run_script(main)
