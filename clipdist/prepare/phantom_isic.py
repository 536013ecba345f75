"""Invented patients with many tiles each, laid out as ISIC 2024's published files, with all columns of its table.

What a column says of looks is measured in the drawn picture, so captions made from it are true. Rates are as published:
one tile in a thousand is malignant, and of nearly all others no more is told than that they are benign.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from clipdist.errors import UserError
from clipdist.prepare.phantom import README, SOURCE, drawn, new_folder
from clipdist.prepare.phantom_canvas import FIELD_MM, Canvas, Plane
from clipdist.prepare.phantom_draw import paint_on
from clipdist.prepare.phantom_lesion import DIAGNOSES, STREAM_PIXELS, Lesion, generator, lesion_of, pick
from clipdist.progress import progress

VERSION = 1  # to be raised whenever the same options give other bytes
Layout = Literal["hdf5", "jpeg", "official"]
LAYOUTS = get_args(Layout)
TILES_PER_PATIENT = (20, 100)
INDETERMINATE = 0.3  # for each malignant tile
TOLD_IN_FULL = 0.0014  # share of benign tiles with a diagnosis below the first level, 561 of 400,552 in the real set
CHUNK = 64  # tiles that a worker draws at a time
STREAM_TILE = 20  # beside the streams of `phantom_lesion`

# Outcome -> family -> (share among the outcome, iddx_2, iddx_3).
KINDS: dict[str, dict[str, tuple[float, str, str]]] = {
    "Benign": {
        "nevus": (0.68, "Benign melanocytic proliferations", "Nevus"),
        "lentigo": (0.12, "Benign epidermal proliferations", "Solar or actinic lentigo"),
        "seborrheic keratosis": (0.09, "Benign epidermal proliferations", "Seborrheic keratosis"),
        "vascular": (0.06, "Benign soft tissue proliferations - Vascular", "Hemangioma"),
        "dermatofibroma": (0.03, "Benign soft tissue proliferations - Fibro-histiocytic", "Dermatofibroma"),
        "blue nevus": (0.02, "Benign melanocytic proliferations", "Blue nevus"),
    },
    "Malignant": {
        "basal cell carcinoma":
            (0.42, "Malignant adnexal epithelial proliferations - Follicular", "Basal cell carcinoma"),
        "melanoma": (0.40, "Malignant melanocytic proliferations (Melanoma)", "Melanoma"),
        "actinic": (0.18, "Malignant epidermal proliferations", "Squamous cell carcinoma"),
    },
    "Indeterminate": {
        "dysplastic nevus": (1.0, "Indeterminate melanocytic proliferations", "Atypical intraepithelial proliferation"),
    },
}  # fmt: skip
# Of the family `actinic` only what is a carcinoma; of all others every diagnosis.
CARCINOMAS = ("squamous cell carcinoma", "Bowen", "verrucous carcinoma")
SITES = {
    "face": ("head/neck", "Head & Neck", "Head & Neck"),
    "scalp": ("head/neck", "Head & Neck", "Head & Neck"),
    "chest": ("anterior torso", "Torso Front Top Half", "Torso Front"),
    "back": ("posterior torso", "Torso Back Top Third", "Torso Back"),
    "arm": ("upper extremity", "{} Arm - Upper", "{} Arm"),
    "leg": ("lower extremity", "{} Leg - Lower", "{} Leg"),
}
CLINICS = ("Clinic A (synthetic)", "Clinic B (synthetic)", "Clinic C (synthetic)")
TRAIN_ONLY = (
    "lesion_id", "iddx_full", "iddx_1", "iddx_2", "iddx_3", "iddx_4", "iddx_5", "mel_mitotic_index", "mel_thick_mm",
    "tbp_lv_dnn_lesion_confidence",
)  # fmt: skip


@dataclass(frozen=True)
class PhantomOptions:
    """`layout`: Kaggle's table beside HDF5 or JPEGs, or the official files. `malignant` is the share of the malignant,
    rounded down to whole tiles; `side` the tiles' width in pixels, 14 mm; `quality` that of the JPEGs."""

    tiles: int
    layout: str = "hdf5"
    side: int = 64
    malignant: float = 0.001
    seed: int = 0
    quality: int = 90

    def __post_init__(self) -> None:
        if self.tiles < 1 or self.side < 32 or not 0 <= self.seed < 2**63:
            raise UserError(
                f"tiles={self.tiles}, side={self.side}, seed={self.seed}: expected tiles >= 1, side >= 32 and a seed "
                f">= 0; correct these"
            )
        if self.layout not in LAYOUTS:
            raise UserError(f"layout: found {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if not 0 <= self.malignant <= 0.5:
            raise UserError(f"share of malignant tiles: found {self.malignant}, expected 0 to 0.5")


@dataclass(frozen=True)
class _Tile:
    """What is decided before anything is drawn."""

    number: int
    patient: int
    outcome: str


def write_isic_layout(folder: Path, options: PhantomOptions, workers: int | None = None) -> None:
    """Fills `folder` as ISIC 2024 is published, unless it already holds exactly this; the same for any `workers`.

    The folder appears whole or not at all. Raises UserError where it holds anything else.
    """
    stamp = {"what": f"{SOURCE}-isic", "version": VERSION, **asdict(options)}
    with new_folder(Path(folder), stamp, README.format(layout="ISIC 2024")) as partial:
        if partial is None:
            return
        tiles = _plan(options)
        jobs = [(options, tiles[start : start + CHUNK]) for start in range(0, len(tiles), CHUNK)]
        rows = []
        with _image_writer(partial, options.layout) as write:
            made = (
                tile
                for chunk in drawn(_draw_tiles, jobs, None if workers is None else max(1, workers))
                for tile in chunk
            )
            for row, image in progress(made, total=len(tiles), unit="tile"):
                write(row["isic_id"], image)
                rows.append(row)
        _write_tables(partial, options.layout, rows)


def _plan(options: PhantomOptions) -> list[_Tile]:
    rng = np.random.default_rng([options.seed, 0])
    sizes: list[int] = []
    while sum(sizes) < options.tiles:
        sizes.append(int(rng.integers(*TILES_PER_PATIENT, endpoint=True)))
    patients = np.repeat(np.arange(len(sizes)), sizes)[: options.tiles]
    # Of a float product such as 0.001 * 4000 the nearest whole number may lie a hair above.
    malignant = int(options.malignant * options.tiles + 1e-9)
    rare = rng.permutation(options.tiles)[: malignant + int(malignant * INDETERMINATE)].tolist()
    outcomes = dict.fromkeys(rare[:malignant], "Malignant") | dict.fromkeys(rare[malignant:], "Indeterminate")
    return [_Tile(n, int(patient), outcomes.get(n, "Benign")) for n, patient in enumerate(patients)]


@contextmanager
def _image_writer(folder: Path, layout: str) -> Iterator[Any]:
    if layout == "hdf5":
        try:
            import h5py
        except ImportError:
            raise UserError('writing HDF5 needs h5py; run: pip install "clipdist[isic]", or choose JPEGs') from None
        with h5py.File(folder / "train-image.hdf5", "w") as file:
            yield lambda name, image: file.create_dataset(name, data=np.bytes_(image))
        return
    images = folder / ("train-image/image" if layout == "jpeg" else "ISIC_2024_Training_Input")
    images.mkdir(parents=True)
    yield lambda name, image: (images / f"{name}.jpg").write_bytes(image)


def _write_tables(folder: Path, layout: str, rows: list[dict[str, Any]]) -> None:
    import pandas as pd  # here, because no worker needs it

    table = pd.DataFrame(rows)
    if layout != "official":
        table.to_csv(folder / "train-metadata.csv", index=False, lineterminator="\n")
        return
    stem = "ISIC_2024_Training"
    parts = {
        f"{stem}_GroundTruth.csv": table[["isic_id", "target"]].rename(columns={"target": "malignant"}),
        f"{stem}_Supplement.csv": table[["isic_id", *TRAIN_ONLY]],
        f"{stem}_Input/metadata.csv": table.drop(columns=["target", *TRAIN_ONLY]),
    }
    for name, part in parts.items():
        part.to_csv(folder / name, index=False, lineterminator="\n")


def _draw_tiles(job: tuple[PhantomOptions, list[_Tile]]) -> list[tuple[dict[str, Any], bytes]]:
    """The table's row and the JPEG of each tile."""
    options, tiles = job
    found = []
    for tile in tiles:
        rng = generator(options.seed, STREAM_TILE, tile.number)
        person = _person(options.seed, tile.patient)
        lesion, names = _lesion(options.seed, tile, person, rng)
        canvas = Canvas(lesion, generator(options.seed, STREAM_PIXELS, tile.number), options.side)
        picture = paint_on(canvas)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=options.quality)
        found.append((_row(tile, person, lesion, names, measured(picture, canvas.mask), rng), buffer.getvalue()))
    return found


@lru_cache(maxsize=64)
def _person(seed: int, number: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 1, number])
    warm = bool(rng.random() < 0.4)
    return {
        "patient_id": f"IP_{1_000_000 + number:07d}",
        "age_approx": int(rng.integers(4, 18)) * 5,
        "sex": str(rng.choice(("male", "female", ""), p=(0.6, 0.38, 0.02))),
        "skin_tone": 1 + int(rng.choice(4, p=(0.3, 0.38, 0.22, 0.10))),
        "hair_colour": str(rng.choice(("dark", "fair", "grey"))),
        "light": "warm" if warm else "neutral",
        "tbp_tile_type": "3D: white" if warm else "3D: XP",
        "attribution": str(rng.choice(CLINICS)),
    }


@lru_cache(maxsize=8)
def _choices(outcome: str) -> tuple[tuple[str, ...], npt.NDArray[np.float64], dict[str, list[int]]]:
    """Families of an outcome, their shares, and the places in `DIAGNOSES` of each."""
    kinds = KINDS[outcome]
    places = {
        family: [
            place
            for place, (name, of) in enumerate(DIAGNOSES)
            if of.key == family and (family != "actinic" or any(word in name for word in CARCINOMAS))
        ]
        for family in kinds
    }
    return tuple(kinds), np.array([share for share, _, _ in kinds.values()]), places


def _lesion(
    seed: int, tile: _Tile, person: dict[str, Any], rng: np.random.Generator
) -> tuple[Lesion, tuple[str, str, str]]:
    """A lesion in the middle of its tile, as a camera across the room sees it, and iddx_2 to iddx_4."""
    families, shares, places = _choices(tile.outcome)
    family = families[int(rng.choice(len(families), p=shares / shares.sum()))]
    drawn_lesion = lesion_of(seed, tile.number, pick(rng, tuple(places[family])))
    lesion = replace(
        drawn_lesion,
        index=tile.number,
        patient=person["patient_id"],
        skin_tone=person["skin_tone"],
        site=drawn_lesion.site if drawn_lesion.site in SITES else "back",
        structures=tuple(name for name in drawn_lesion.structures if name != "ridges"),
        hairs="few" if drawn_lesion.hairs == "many" else drawn_lesion.hairs,
        hair_colour=person["hair_colour"],
        placing="central",
        light=person["light"],
        ruler=False,
        bubbles=False,
        ink=False,
        tube=False,
        glare=False,
        unusable=False,
    )
    _, category, diagnosis = KINDS[tile.outcome][family]
    return lesion, (category, diagnosis, f"{lesion.diagnosis[0].upper()}{lesion.diagnosis[1:]}")


@lru_cache(maxsize=1)
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def measured(picture: npt.NDArray[np.uint8], mask: Plane) -> dict[str, float]:
    """The columns `tbp_lv_*` of looks and size, and `clin_size_long_diam_mm`.

    `picture`: uint8 [side, side, 3] sRGB; `mask`: the lesion's opacity, 0 … 1, [side, side]. Colours are CIELAB (D50),
    lengths mm. The perimeter is the integral of the mask's gradient, the mean length of its level lines.
    """
    converted = ImageCms.applyTransform(Image.fromarray(picture), _lab_transform())
    assert converted is not None
    lab = np.asarray(converted)
    planes = {
        "L": lab[..., 0].astype(np.float64) * (100 / 255),
        "A": lab[..., 1].view(np.int8).astype(np.float64),
        "B": lab[..., 2].view(np.int8).astype(np.float64),
    }
    pixel = FIELD_MM / len(mask)
    inside, outside = mask > 0.5, mask < 0.05
    outside = outside if outside.any() else ~inside
    area, perimeter = float(mask.sum()) * pixel**2, float(np.hypot(*np.gradient(mask)).sum()) * pixel
    found: dict[str, float] = {}
    for name, plane in planes.items():
        found |= {name: plane[inside].mean(), f"{name}ext": plane[outside].mean()}
    for tail, a, b in (("", found["A"], found["B"]), ("ext", found["Aext"], found["Bext"])):
        found |= {f"C{tail}": float(np.hypot(a, b)), f"H{tail}": float(np.degrees(np.arctan2(b, a)))}
    spread = {name: float(plane[inside].std()) for name, plane in planes.items()}
    delta = {name: found[name] - found[f"{name}ext"] for name in planes}
    found |= {f"delta{name}": value for name, value in delta.items()}
    found |= {
        "areaMM2": area,
        "perimeterMM": perimeter,
        "area_perim_ratio": perimeter**2 / area,
        "color_std_mean": float(np.mean(list(spread.values()))),
        "deltaLB": float(np.hypot(delta["L"], delta["B"])),
        "deltaLBnorm": float(np.hypot(delta["L"], delta["B"])) / 2,
        "norm_color": min(10.0, float(np.linalg.norm(list(spread.values()))) / 2.5),
        "norm_border": 10 * max(0.0, 1 - 4 * np.pi * area / perimeter**2),
        "stdL": spread["L"],
        "stdLExt": float(planes["L"][outside].std()),
        **_shape(inside, pixel, planes),
    }
    length = found.pop("length")
    return {f"tbp_lv_{name}": round(float(value), 5) for name, value in found.items()} | {
        "clin_size_long_diam_mm": round(length, 2)
    }


def _shape(inside: npt.NDArray[np.bool_], pixel: float, planes: dict[str, Plane]) -> dict[str, float]:
    """Axes of the ellipse of equal second moments, how much of the lesion lies on itself when mirrored in its axes,
    and how much colour differs between thirds of its radius."""
    points = np.argwhere(inside) - np.argwhere(inside).mean(0)
    values, vectors = np.linalg.eigh(np.cov(points.T) + np.eye(2) / 12)  # a pixel itself has a variance of 1/12
    minor, major = 4 * np.sqrt(values) * pixel
    centre = np.argwhere(inside).mean(0)
    outside_of_mirror = []
    for axis in vectors.T:
        mirrored = np.rint(points - 2 * np.outer(points @ axis, axis) + centre).astype(int).clip(0, len(inside) - 1)
        outside_of_mirror.append(1 - float(inside[mirrored[:, 0], mirrored[:, 1]].mean()))
    radius = np.linalg.norm(points @ vectors / np.sqrt(values), axis=1)
    third = np.digitize(radius, np.quantile(radius, (1 / 3, 2 / 3)))
    rings = [[plane[inside][third == ring].mean() for ring in range(3)] for plane in planes.values()]
    return {
        "length": float(major),
        "minorAxisMM": float(minor),
        "eccentricity": float(np.sqrt(1 - values[0] / values[1])),
        "symm_2axis": max(outside_of_mirror),
        "symm_2axis_angle": float(np.degrees(np.arctan2(vectors[0, 1], vectors[1, 1])) % 180 // 5 * 5),
        "radial_color_std_max": float(np.max(np.std(rings, axis=1))),
    }


def _row(
    tile: _Tile,
    person: dict[str, Any],
    lesion: Lesion,
    names: tuple[str, str, str],
    looks: dict[str, float],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One line of the table, in the order of Kaggle's columns."""
    site, location, simple = (word.format(pick(rng, ("Left", "Right"))) for word in SITES[lesion.site])
    malignant, told = tile.outcome == "Malignant", tile.outcome != "Benign" or rng.random() < TOLD_IN_FULL
    levels = [tile.outcome, *(names if told else ("", "", "")), ""]
    nevus = rng.normal(85, 12) if "nevus" in lesion.family else rng.normal(30, 20)
    invented = {
        "tbp_lv_location": location,
        "tbp_lv_location_simple": simple,
        "tbp_lv_nevi_confidence": round(float(np.clip(nevus, 0, 100)), 4),
        **{f"tbp_lv_{axis}": round(float(rng.normal(0, 300)), 3) for axis in "xyz"},
    }
    measures = {**looks, **invented}
    size = measures.pop("clin_size_long_diam_mm")
    return {
        "isic_id": f"ISIC_{tile.number + 1:07d}",
        "target": int(malignant),
        **{name: person[name] for name in ("patient_id", "age_approx", "sex")},
        "anatom_site_general": site,
        "clin_size_long_diam_mm": size,
        "image_type": "TBP tile: close-up",
        "tbp_tile_type": person["tbp_tile_type"],
        **{name: measures[name] for name in sorted(measures, key=str.lower)},
        "attribution": person["attribution"],
        "copyright_license": "CC-BY",
        "lesion_id": f"IL_{tile.number + 1:07d}" if told else "",
        "iddx_full": "::".join(level for level in levels if level),
        **{f"iddx_{number}": level for number, level in enumerate(levels, start=1)},
        "mel_mitotic_index": "",
        "mel_thick_mm": round(float(rng.gamma(1.5, 0.4)), 2) if lesion.family == "melanoma" and malignant else "",
        "tbp_lv_dnn_lesion_confidence": round(float(np.clip(100 - rng.gamma(1, 2), 0, 100)), 4),
    }
