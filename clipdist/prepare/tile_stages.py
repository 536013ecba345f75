"""From slides to the tiles that are packed: cut, recoloured, filtered by attention; each stage kept on disk."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipdist.data.sets.pack import Refused, Rejected
from clipdist.errors import UserError, disk_errors
from clipdist.prepare.recolour import recolour_slides
from clipdist.prepare.reference_tile import choose_reference
from clipdist.prepare.slides import SlideFile, TiledSlide, TilingOptions, TilingSummary, tile_slides
from clipdist.prepare.stain import Method
from clipdist.progress import progress


@dataclass(frozen=True)
class StainOptions:
    """How tiles are recoloured. `reference`: a picture; None: the most ordinary mixed tile (see `choose_reference`)."""

    method: Method
    reference: Path | None = None


@dataclass(frozen=True)
class AttentionOptions:
    """Which tiles pass: at least `least_share` of the patches exceed `threshold` (see `AttentionFilter`)."""

    name: str = "vit_small_patch16_224.dino"
    weights: bool | str = True
    threshold: float = 0.5
    least_share: float = 0.7


@dataclass(frozen=True)
class ChosenTiles:
    """Slides with the tiles that all stages kept, the slides that fell out, and notes for a manifest."""

    slides: list[TiledSlide]
    rejected: list[Rejected]
    notes: dict[str, Any]
    tiling: TilingSummary

    def __str__(self) -> str:
        lines = [self.tiling.told(self.rejected)]
        if "stain" in self.notes:
            lines.append(f"stains: {self.notes['stain']['method']}, after {self.notes['stain']['reference']}")
        if "attention" in self.notes:
            lines.append("attention: {kept:,} of {given:,} tiles kept".format(**self.notes["attention"]))
        return "\n".join(lines)


def choose_tiles(
    slides: Sequence[SlideFile],
    folder: Path,
    tiling: TilingOptions,
    *,
    stain: StainOptions | None = None,
    attention: AttentionOptions | None = None,
    workers: int | None = None,
    rejected: Sequence[Rejected] = (),
    max_rejected_fraction: float = 0.05,
    quiet: bool = False,
) -> ChosenTiles:
    """Runs `tile_slides`, then `recolour_slides` and the attention filter where asked for, below `folder`.

    Tiles go to `folder/tiles-<stride>-<side>`, recoloured ones to `folder/tiles-<stride>-<side>-<method>`; nothing that
    is there already is made again. Slides that a later stage rejects join `rejected.csv` beside the tiles. Raises
    `UserError` as `tile_slides` does, when all stages until then have rejected more than `max_rejected_fraction`, and
    when the attention filter passes no tile.
    """
    place = folder / f"tiles-{tiling.stride}-{tiling.side}"
    summary = tile_slides(
        slides,
        place,
        tiling,
        rejected=rejected,
        max_rejected_fraction=max_rejected_fraction,
        workers=workers,
        quiet=quiet,
    )
    chosen = summary.slides
    refused = Refused(place, list(summary.rejected), max_rejected_fraction, "slides")
    refused.total = len(rejected) + len(slides)
    notes: dict[str, Any] = {"tiling": asdict(tiling), "tiles": summary.tiles}
    if stain:
        reference = stain.reference
        notes["stain"] = {"method": stain.method, "reference": str(reference)}
        if reference is None:
            reference, terms = choose_reference([tile.path for slide in chosen for tile in slide.tiles])
            notes["stain"].update(reference=f"{reference.parent.name}/{reference.name}", chosen_by=terms)
        elif not reference.is_file():
            raise UserError(f"reference tile {reference}: there is no such file")
        target = folder / f"{place.name}-{stain.method}"
        chosen, colourless = recolour_slides(chosen, target, stain.method, reference, workers=workers, quiet=quiet)
        _refuse(refused, colourless)
    if attention:
        given = sum(len(slide.record["tiles"]) for slide in chosen)
        chosen, overlooked, source = _attended(chosen, attention, quiet)
        kept = sum(len(slide.record["tiles"]) for slide in chosen)
        notes["attention"] = {**asdict(attention), **source, "given": given, "kept": kept}
        _refuse(refused, overlooked)
    return ChosenTiles(chosen, refused.found, notes, summary)


def _refuse(refused: Refused, more: Sequence[Rejected]) -> None:
    refused.found.extend(more)
    with disk_errors(refused.folder):
        refused.check()
        refused.save()


def _attended(
    slides: Sequence[TiledSlide], options: AttentionOptions, quiet: bool
) -> tuple[list[TiledSlide], list[Rejected], dict[str, Any]]:
    """Slides with the tiles that pass, slides without any, and which weights looked."""
    from clipdist.prepare.saliency import AttentionFilter, attention_of_slides  # brings torch, which takes seconds

    if not 0 <= options.least_share <= 1:
        raise UserError(f"attention: found the least share {options.least_share}, expected 0 to 1")
    looked = AttentionFilter(options.name, options.weights, threshold=options.threshold)
    shares = attention_of_slides([(slide.folder, [tile.path for tile in slide.tiles]) for slide in slides], looked)
    kept, rejected = [], []
    for slide, found in zip(progress(slides, unit="slide", description="attention", quiet=quiet), shares, strict=True):
        tiles = [tile for tile in slide.record["tiles"] if found[tile["file"]] >= options.least_share]
        if tiles:
            kept.append(replace(slide, record={**slide.record, "tiles": tiles}))
        else:
            reason = f"no tile passes the attention filter; the highest share is {max(found.values()):.2f}"
            rejected.append(Rejected(None, slide.name, str(slide.folder), reason))
    if not kept:
        raise UserError(
            f"attention: no tile of {len(slides)} slides has {options.least_share:g} of its patches above "
            f"{options.threshold:g} even shares; lower one of these, or check the weights"
        )
    return kept, rejected, looked.source
