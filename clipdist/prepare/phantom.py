"""Dermoscopy phantoms: drawn skin lesions with captions, written in SkinCAP's own layout.

They let every part of the toolkit be tried, tested and measured without a download. They are synthetic, and say so
in the `source` column, in `phantom.json` and in the README.txt beside the pictures; they are of no medical use.
"""

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from clipdist.errors import UserError
from clipdist.prepare.phantom_draw import draw
from clipdist.prepare.phantom_lesion import STREAM_WORDS, Lesion, generator
from clipdist.prepare.phantom_stamp import STAMP, write_stamp
from clipdist.prepare.phantom_words import caption, caption_zh
from clipdist.prepare.png import png_bytes
from clipdist.progress import progress

__all__ = ["Lesion", "caption", "draw", "write_skincap_layout"]

logger = logging.getLogger(__name__)
Job = TypeVar("Job")
Result = TypeVar("Result")

VERSION = 1  # to be raised whenever the same seed gives other bytes
SOURCE = "synthetic-phantom"
TABLE = "skincap_v240623.csv"
SPARE = 5  # pictures in skincap/not_include/ that no row names
CHUNK = 32  # pictures that a worker draws at a time

UNUSABLE_COLUMN = "Do not consider this image"
# SKINCON's 48 concepts; the ones that no phantom shows are columns of zeros.
CONCEPTS = (
    "Vesicle", "Papule", "Macule", "Plaque", "Abscess", "Pustule", "Bulla", "Patch", "Nodule", "Ulcer", "Crust",
    "Erosion", "Excoriation", "Atrophy", "Exudate", "Purpura/Petechiae", "Fissure", "Induration", "Xerosis",
    "Telangiectasia", "Scale", "Scar", "Friable", "Sclerosis", "Pedunculated", "Exophytic/Fungating",
    "Warty/Papillomatous", "Dome-shaped", "Flat topped", "Brown(Hyperpigmentation)", "Translucent",
    "White(Hypopigmentation)", "Purple", "Yellow", "Black", "Erythema", "Comedo", "Lichenification", "Blue",
    "Umbilicated", "Poikiloderma", "Salmon", "Wheal", "Acuminate", "Burrow", "Gray", "Pigmented", "Cyst",
)  # fmt: skip
_BY_COLOUR = {
    "light brown": ("Brown(Hyperpigmentation)", "Pigmented"),
    "dark brown": ("Brown(Hyperpigmentation)", "Pigmented"),
    "black": ("Black", "Pigmented"),
    "blue-grey": ("Blue", "Gray", "Pigmented"),
    "red": ("Erythema",),
    "pink": ("Erythema", "Salmon"),
    "purple": ("Purple",),
    "white": ("White(Hypopigmentation)",),
    "yellow": ("Yellow",),
}
_BY_STRUCTURE = {
    "ulcer": ("Ulcer",),
    "crust": ("Crust", "Exudate"),
    "scale": ("Scale",),
    "regression": ("Scar", "Gray"),
    "central white patch": ("Scar",),
    "veil": ("Blue",),
    "branching vessels": ("Telangiectasia",),
    "gyri": ("Warty/Papillomatous", "Fissure"),
    "comedo openings": ("Comedo",),
    "milia": ("Cyst",),
    "halo": ("White(Hypopigmentation)",),
}

README = """SYNTHETIC DATA. The pictures in this folder were drawn by a program (clipdist, dermoscopy phantoms).
They show no person, no lesion and no disease; the diagnoses and captions describe what was drawn. They are laid out
like {layout} so that programs made for it run on them, and are of no medical use whatsoever.
"""


def write_skincap_layout(folder: Path, images: int, side: int = 224, seed: int = 0, workers: int | None = None) -> Path:
    """The table of a complete folder of `images` phantoms; draws them unless `folder` already holds exactly these.

    Writes `skincap/1.png` … `skincap/N.png`, `skincap/not_include/`, `skincap_v240623.csv` (UTF-8 with a byte-order
    mark, SkinCAP's columns and `patient_id` after them), README.txt and `phantom.json`. The bytes depend on `images`,
    `side` and `seed` alone, not on `workers` (processes; None: one per available core). The folder appears whole or
    not at all. With more than one process the calling script needs the usual `if __name__ == "__main__"` guard.

    Raises UserError for impossible sizes, and where `folder` holds anything else.
    """
    if images < 1 or side < 32 or not 0 <= seed < 2**63 or (workers is not None and workers < 1):
        found = f"images={images}, side={side}, seed={seed}, workers={workers}"
        raise UserError(f"{found}: expected images >= 1, side >= 32, 0 <= seed < 2**63 and workers >= 1; correct these")
    folder = Path(folder)
    stamp = {"what": SOURCE, "version": VERSION, "images": images, "side": side, "seed": seed}
    with new_folder(folder, stamp, README.format(layout="SkinCAP")) as partial:
        if partial:
            (partial / "skincap" / "not_include").mkdir(parents=True)
            rows = list(progress(_rows(partial, images, side, seed, workers), total=images, unit="phantom"))
            import pandas as pd  # here, because every worker imports this module and none of them needs it

            pd.DataFrame(rows).to_csv(partial / TABLE, index=False, encoding="utf-8-sig", lineterminator="\n")
    return folder / TABLE


@contextmanager
def new_folder(folder: Path, stamp: dict[str, object], readme: str) -> Iterator[Path | None]:
    """A folder to fill that turns into `folder` at the end, with README.txt and `phantom.json`: whole, or not at all.

    None when `folder` is already what `stamp` describes. Raises UserError where it holds anything else.
    """
    if _holds(folder, stamp):
        logger.info("%s already holds these phantoms", folder)
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
    try:
        partial.mkdir()
        yield partial
        write_stamp(partial, stamp, readme)
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process may have finished the same set in the meantime: what counts is that it is there.
            if not _holds(folder, stamp):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _holds(folder: Path, stamp: dict[str, object]) -> bool:
    """True if `folder` is the set that `stamp` describes, False if it is missing or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != stamp:
        holds = f"phantoms of {found}" if found else f"other files and no readable {STAMP}"
        raise UserError(f"{folder} holds {holds}, expected {stamp}: delete the folder or name another one")
    return True


def _rows(folder: Path, images: int, side: int, seed: int, workers: int | None) -> Iterator[dict[str, object]]:
    """Writes every picture and yields the table's rows in order."""
    jobs = [(folder / "skincap", seed, side, start, min(start + CHUNK, images)) for start in range(0, images, CHUNK)]
    with threadpool_limits(1, "blas"):
        _write_pictures((folder / "skincap" / "not_include", seed, side, images, images + SPARE))
    for rows in drawn(_write_pictures, jobs, workers):
        yield from rows


def drawn(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None) -> Iterator[Result]:
    """`work` on each job, in order, by so many processes (None: one per available core), without threads in them."""
    processes = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1, "blas"))
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes, _start_worker))
            yield from pool.imap(work, jobs)
        else:
            yield from map(work, jobs)


def _start_worker() -> None:
    threadpool_limits(1, "blas")  # threads within each of several processes would fight over the cores
    # Freeing one large block makes glibc keep blocks up to that size on its heap. Otherwise every plane of a picture
    # is mapped and unmapped anew, a fifth of the drawing time.
    np.empty(24 << 20, np.uint8)


def _write_pictures(job: tuple[Path, int, int, int, int]) -> list[dict[str, object]]:
    folder, seed, side, start, stop = job
    rows = []
    for index in range(start, stop):
        picture, lesion = draw(seed, index, side)
        (folder / f"{index + 1}.png").write_bytes(png_bytes(picture))
        rows.append(_row(lesion, generator(seed, STREAM_WORDS, index)))
    return rows


def _row(lesion: Lesion, rng: np.random.Generator) -> dict[str, object]:
    """One line of the table. A sixth of the patients carry DDI's columns, the rest Fitzpatrick17k's, as in SkinCAP."""
    ddi = int(lesion.patient[1:]) % 6 == 0
    doubt = int(rng.choice((-1, 0, 0, 0, 1)))
    text, chinese = caption(lesion, rng), caption_zh(lesion)
    concepts = _concepts(lesion)
    return {
        "id": lesion.index + 1,
        "skincap_file_path": f"{lesion.index + 1}.png",
        "ori_file_path": f"{SOURCE}/{lesion.patient}_{lesion.index + 1}.png",
        "disease": lesion.diagnosis,
        "caption_zh": chinese.split(",")[0] + "。",
        "caption_zh_polish": chinese,
        "caption_zh_polish_en": text,
        "remark": "",
        "source": SOURCE,
        "skin_tone": ("12", "34", "56")[(lesion.skin_tone - 1) // 2] if ddi else "",
        "malignant": int(lesion.malignant) if ddi else "",
        "fitzpatrick_scale": "" if ddi else lesion.skin_tone,
        "fitzpatrick_centaur": "" if ddi else min(6, max(1, lesion.skin_tone + doubt)),
        "nine_partition_label": "" if ddi else lesion.nine_partition,
        "three_partition_label": "" if ddi else lesion.three_partition,
        **{name: int(name in concepts) for name in CONCEPTS},
        UNUSABLE_COLUMN: int(lesion.unusable),
        "patient_id": lesion.patient,
    }


def _concepts(lesion: Lesion) -> set[str]:
    """The SKINCON concepts that the picture shows."""
    wide = lesion.size in ("large", "huge")
    by_relief = {
        "flat": ("Patch",) if wide else ("Macule",),
        "raised": ("Plaque", "Flat topped") if wide else ("Papule",),
        "nodular": ("Nodule", "Dome-shaped"),
    }
    found = set(by_relief[lesion.relief])
    for colour in lesion.colours:
        found.update(_BY_COLOUR[colour])
    for structure in lesion.structures:
        found.update(_BY_STRUCTURE.get(structure, ()))
    return found
