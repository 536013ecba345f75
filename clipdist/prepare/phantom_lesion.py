"""What a dermoscopy phantom shows: invented patients, 187 diagnoses, and the attributes of each lesion.

A diagnosis is a family (nevus, melanoma, psoriasis …) and a look of its own within it, so that the label correlates
with colours, structures, site and size without being certain from any one of them. Nothing here is medical knowledge
to rely on: the odds were chosen so that the pictures are varied and the labels learnable.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")

PATIENT_BLOCK = 30  # consecutive indices are cut into patients block by block, so no index needs the ones before it
PATIENT_SIZES = (0.30, 0.22, 0.18, 0.14, 0.09, 0.07)  # share of patients with 1 … 6 images
LABEL_FROM_LOOK = 0.72  # how often a lesion takes an attribute from its diagnosis rather than from the family
UNUSABLE = 0.02  # share of pictures flagged `Do not consider this image`
STREAM_PATIENT, STREAM_LESION, STREAM_PIXELS, STREAM_WORDS, STREAM_BLOCK, STREAM_LOOK = range(1, 7)

SITES = ("face", "scalp", "chest", "back", "arm", "leg", "palm", "sole", "nail")
COLOURS = ("light brown", "dark brown", "black", "blue-grey", "red", "pink", "purple", "white", "yellow")
BORDERS = ("regular", "sharp", "fading", "notched")
LAYOUTS = ("uniform", "concentric", "eccentric", "patchy", "halves")
STRUCTURES = (
    "network", "atypical network", "globules", "dots", "streaks", "starburst", "veil", "regression",
    "central white patch", "dotted vessels", "branching vessels", "lacunae", "milia", "comedo openings", "scale",
    "crust", "ulcer", "shiny lines", "gyri", "halo", "ridges",
)  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """Everything that a caption may say of one phantom; `draw` and `caption` read the same object."""

    index: int
    patient: str
    diagnosis: str
    family: str
    nine_partition: str
    three_partition: str  # benign, malignant or non-neoplastic
    skin_tone: int  # Fitzpatrick type, 1 … 6
    site: str
    diameter_mm: float  # of the 14 mm that a picture is wide
    shape: str  # round, oval, elongated
    placing: str  # central, off-centre, cut
    relief: str  # flat, raised, nodular
    asymmetry: int  # in 0, 1 or 2 axes
    border: str
    colours: tuple[str, ...]
    layout: str
    structures: tuple[str, ...]
    hairs: str  # none, few, many
    hair_colour: str  # dark, fair, grey
    ruler: bool
    bubbles: bool
    ink: bool  # a pen mark beside the lesion
    tube: bool  # the black corners of a round field of view
    glare: bool
    light: str  # neutral, warm, cool
    unusable: bool  # out of focus and overexposed: `Do not consider this image`

    @property
    def malignant(self) -> bool:
        """True for the families that are tumours with malignant behaviour."""
        return self.three_partition == "malignant"

    @property
    def size(self) -> str:
        """One of tiny, small, medium, large, huge, by diameter."""
        limits = ((3.6, "tiny"), (5.2, "small"), (7.2, "medium"), (9.5, "large"))
        return next((word for limit, word in limits if self.diameter_mm < limit), "huge")


@dataclass(frozen=True)
class Family:
    """The attribute odds that the diagnoses of one kind share."""

    key: str
    nine_partition: str
    names: tuple[str, ...]
    palettes: tuple[tuple[str, ...], ...]
    structures: dict[str, float]
    layouts: tuple[str, ...]
    borders: tuple[str, ...]
    asymmetry: tuple[float, float, float]
    diameter_mm: tuple[float, float]
    reliefs: tuple[str, ...]
    sites: tuple[str, ...] = SITES[:6]

    @property
    def three_partition(self) -> str:
        """benign, malignant or non-neoplastic, as Fitzpatrick17k's coarse partition has it."""
        first = self.nine_partition.split()[0]
        return first if first in ("benign", "malignant") else "non-neoplastic"


_SHORT = dict(zip("ldkgrpuwy", COLOURS, strict=True))


def _family(
    key: str, nine: str, names: str, palettes: str, structures: str, layouts: str, borders: str,
    asymmetry: tuple[float, float, float], diameter: tuple[float, float], reliefs: str, sites: str = "",
) -> Family:  # fmt: skip
    """A family from compact text: palettes as letters of `_SHORT`, structures as `name .5; name .3`."""
    pairs = (item.strip().rsplit(" ", 1) for item in structures.split(";"))
    return Family(
        key,
        nine,
        tuple(name.strip() for name in names.split(",")),
        tuple(tuple(_SHORT[letter] for letter in palette) for palette in palettes.split()),
        {name: float(odds) for name, odds in pairs},
        tuple(layouts.split()),
        tuple(borders.split()),
        asymmetry,
        diameter,
        tuple(reliefs.split()),
        tuple(sites.split()) or SITES[:6],
    )


FAMILIES = (
    _family(
        "nevus", "benign melanocyte",
        "compound nevus, junctional nevus, intradermal nevus, congenital melanocytic nevus, halo nevus, acral nevus,"
        "common nevus, combined nevus, recurrent nevus, speckled lentiginous nevus, papillomatous nevus,"
        "globular nevus, reticular nevus, eclipse nevus, cockade nevus, balloon cell nevus, Meyerson nevus,"
        "Miescher nevus, Unna nevus, Clark nevus, deep penetrating nevus, agminated nevus",
        "l ld d dl dk lp", "network .7; globules .5; dots .35; halo .06; milia .08", "uniform concentric eccentric",
        "regular fading regular sharp", (0.7, 0.25, 0.05), (2.8, 7.0), "flat raised raised"),
    _family(
        "seborrheic keratosis", "benign epidermal",
        "seborrheic keratosis, irritated seborrheic keratosis, pigmented seborrheic keratosis,"
        "reticulated seborrheic keratosis, acanthotic seborrheic keratosis, flat seborrheic keratosis,"
        "hyperkeratotic seborrheic keratosis, clonal seborrheic keratosis, inflamed seborrheic keratosis,"
        "stucco keratosis, dermatosis papulosa nigra, melanoacanthoma, lichenoid keratosis, large cell acanthoma",
        "ld dy d yl dk lw", "milia .6; comedo openings .6; gyri .55; scale .3; dotted vessels .15",
        "uniform patchy patchy", "sharp sharp notched", (0.5, 0.35, 0.15), (4.5, 11.0), "raised raised flat"),
    _family(
        "basal cell carcinoma", "malignant epidermal",
        "basal cell carcinoma, pigmented basal cell carcinoma, nodular basal cell carcinoma,"
        "superficial basal cell carcinoma, morpheaform basal cell carcinoma, infiltrative basal cell carcinoma,"
        "ulcerated basal cell carcinoma, cystic basal cell carcinoma, micronodular basal cell carcinoma,"
        "basosquamous carcinoma, fibroepithelioma of Pinkus",
        "pw pg pgd rp pwg p", "branching vessels .75; ulcer .4; shiny lines .35; crust .2; globules .2",
        "uniform patchy eccentric", "sharp fading notched", (0.25, 0.45, 0.3), (3.5, 9.5), "raised nodular flat",
        "face face scalp chest back arm"),
    _family(
        "melanoma", "malignant melanoma",
        "malignant melanoma, superficial spreading melanoma, melanoma in situ, nodular melanoma, lentigo maligna,"
        "acral lentiginous melanoma, amelanotic melanoma, lentigo maligna melanoma, invasive melanoma,"
        "hypomelanotic melanoma, desmoplastic melanoma, spitzoid melanoma, nevoid melanoma, regressing melanoma,"
        "verrucous melanoma, subungual melanoma, melanoma metastasis",
        "ldk dkg dkgw ldgr kgr ldkw", "atypical network .6; streaks .5; veil .5; regression .45; dots .4; globules .3;"
        "shiny lines .25; ulcer .1", "patchy eccentric halves", "notched notched sharp fading", (0.03, 0.27, 0.7),
        (5.5, 12.5), "flat raised nodular"),
    _family(
        "inflammatory", "inflammatory",
        "psoriasis, eczema, lichen planus, allergic contact dermatitis, guttate psoriasis, pityriasis rosea,"
        "discoid lupus erythematosus, plaque psoriasis, seborrheic dermatitis, nummular eczema, granuloma annulare,"
        "dyshidrotic eczema, lichen simplex chronicus, tinea corporis, sarcoidosis, insect bite, drug eruption,"
        "morphea, palmoplantar psoriasis, hypertrophic lichen planus, rosacea, stasis dermatitis, prurigo nodularis",
        "r p rw pw ru py", "dotted vessels .65; scale .65; crust .2; shiny lines .12; branching vessels .1",
        "uniform patchy concentric", "fading fading regular sharp", (0.4, 0.4, 0.2), (6.0, 13.5), "raised flat flat"),
    _family(
        "vascular", "benign dermal",
        "cherry angioma, pyogenic granuloma, angiokeratoma, hemangioma, spider angioma, infantile hemangioma,"
        "thrombosed angioma, venous lake, port wine stain, cavernous hemangioma, lymphangioma, glomangioma,"
        "targetoid hemosiderotic hemangioma, subungual hematoma",
        "r u ru uk rw rp", "lacunae .75; veil .12; crust .2; scale .12; branching vessels .15",
        "uniform concentric patchy", "sharp sharp regular", (0.65, 0.3, 0.05), (2.6, 7.5), "raised nodular flat"),
    _family(
        "dermatofibroma", "benign dermal",
        "dermatofibroma, keloid, neurofibroma, fibrous papule, pigmented dermatofibroma, acrochordon,"
        "hypertrophic scar, atrophic dermatofibroma, cellular dermatofibroma, hemosiderotic dermatofibroma,"
        "fibrous histiocytoma, angiofibroma",
        "lw l lp pw dlw", "central white patch .65; network .4; shiny lines .3; dotted vessels .15",
        "concentric uniform", "fading fading regular", (0.75, 0.2, 0.05), (3.5, 7.5), "raised nodular",
        "arm leg leg back"),
    _family(
        "actinic", "malignant epidermal",
        "squamous cell carcinoma, actinic keratosis, Bowen disease, keratoacanthoma, squamous cell carcinoma in situ,"
        "pigmented actinic keratosis, hypertrophic actinic keratosis, invasive squamous cell carcinoma,"
        "pigmented Bowen disease, verrucous carcinoma, bowenoid papulosis, cutaneous horn",
        "rw py pw ry ly ryw", "scale .65; dotted vessels .5; crust .4; ulcer .3; branching vessels .2",
        "patchy concentric uniform", "fading notched sharp", (0.25, 0.45, 0.3), (4.0, 11.0), "raised flat nodular",
        "face scalp arm leg face"),
    _family(
        "lentigo", "benign melanocyte",
        "solar lentigo, lentigo simplex, cafe au lait macule, melasma, ink spot lentigo, Becker nevus, ephelis,"
        "reticulated lentigo, post-inflammatory hyperpigmentation, subungual lentigo",
        "l l ld d", "network .55; dots .15; gyri .15", "uniform patchy", "sharp notched fading", (0.45, 0.4, 0.15),
        (4.0, 12.0), "flat"),
    _family(
        "dysplastic nevus", "benign melanocyte",
        "dysplastic nevus, atypical nevus, dysplastic compound nevus, dysplastic junctional nevus,"
        "mildly dysplastic nevus, severely dysplastic nevus, atypical lentiginous nevus",
        "ld ldk dlp ldw", "atypical network .55; network .4; dots .45; globules .45; regression .15; streaks .12",
        "eccentric patchy concentric", "fading notched fading", (0.15, 0.55, 0.3), (4.5, 9.5), "flat raised"),
    _family(
        "wart", "benign epidermal",
        "verruca vulgaris, plantar wart, molluscum contagiosum, epidermal nevus, verruca plana, porokeratosis,"
        "clear cell acanthoma, condyloma acuminatum, palmar wart, callus",
        "pw yw p wy rw", "dotted vessels .55; gyri .4; scale .4; central white patch .15", "uniform concentric patchy",
        "sharp regular", (0.6, 0.35, 0.05), (3.0, 8.0), "raised nodular", "arm leg sole palm face"),
    _family(
        "adnexal", "benign dermal",
        "sebaceous hyperplasia, epidermal cyst, nevus sebaceous, syringoma, trichoepithelioma, pilomatricoma,"
        "juvenile xanthogranuloma, eccrine poroma, hidrocystoma, xanthelasma, cylindroma, pilar cyst",
        "y yp yw pw gy", "branching vessels .4; milia .4; central white patch .2; comedo openings .2; globules .12",
        "uniform concentric eccentric", "sharp regular fading", (0.65, 0.3, 0.05), (3.0, 8.0), "raised nodular",
        "face face scalp chest back"),
    _family(
        "blue nevus", "benign melanocyte",
        "blue nevus, cellular blue nevus, nevus of Ota, dermal melanocytosis, sclerosing blue nevus,"
        "epithelioid blue nevus, nevus of Ito, plaque-type blue nevus",
        "g g gk gd gw", "veil .3; dots .15; central white patch .1", "uniform uniform eccentric",
        "fading regular sharp", (0.75, 0.2, 0.05), (3.0, 9.0), "raised flat nodular"),
    _family(
        "Spitz nevus", "benign melanocyte",
        "Spitz nevus, Reed nevus, pigmented Spitz nevus, pigmented spindle cell nevus, desmoplastic Spitz nevus,"
        "atypical Spitz tumor, agminated Spitz nevus",
        "dk k d pr dkg", "starburst .65; globules .5; dotted vessels .25; shiny lines .2", "concentric uniform",
        "sharp regular", (0.8, 0.18, 0.02), (3.0, 7.0), "raised flat nodular", "face leg arm leg"),
    _family(
        "hypopigmentation", "inflammatory",
        "vitiligo, idiopathic guttate hypomelanosis, pityriasis alba, lichen sclerosus, nevus depigmentosus",
        "w w wp", "scale .2; dots .2; shiny lines .15", "uniform patchy", "sharp notched fading", (0.4, 0.45, 0.15),
        (5.0, 13.0), "flat"),
    _family(
        "sarcoma", "malignant dermal",
        "Kaposi sarcoma, angiosarcoma, dermatofibrosarcoma protuberans",
        "u ur up gu", "lacunae .4; branching vessels .4; ulcer .3; shiny lines .3; veil .2", "patchy eccentric",
        "fading notched", (0.1, 0.45, 0.45), (6.0, 12.5), "nodular raised"),
)  # fmt: skip

# Words in a diagnosis that a reader would expect to see in the picture: (part of the name, what it forces).
_SPOKEN: tuple[tuple[str, dict[str, str]], ...] = (
    ("pigmented", {"colour": "dark brown"}),
    ("amelanotic", {"palette": "pr"}),
    ("hypomelanotic", {"palette": "pl"}),
    ("halo", {"structure": "halo"}),
    ("globular", {"structure": "globules"}),
    ("reticula", {"structure": "network"}),
    ("nodular", {"relief": "nodular"}),
    ("flat", {"relief": "flat"}),
    ("in situ", {"relief": "flat"}),
    ("superficial", {"relief": "flat", "diameter": "large"}),
    ("congenital", {"diameter": "large"}),
    ("plaque", {"diameter": "large"}),
    ("guttate", {"diameter": "small"}),
    ("verruc", {"structure": "gyri"}),
    ("papillomatous", {"structure": "gyri"}),
    ("hyperkeratotic", {"structure": "scale"}),
    ("hypertrophic", {"relief": "nodular"}),
    ("ulcerated", {"structure": "ulcer"}),
    ("atrophic", {"structure": "central white patch"}),
    ("scleros", {"colour": "white"}),
    ("regressing", {"structure": "regression"}),
    ("desmoplastic", {"structure": "shiny lines"}),
    ("thrombosed", {"colour": "black"}),
    ("ink spot", {"palette": "k"}),
    ("spider", {"structure": "branching vessels"}),
    ("acral", {"site": "sole palm"}),
    ("plantar", {"site": "palm sole"}),
    ("callus", {"site": "sole"}),
    ("dyshidrotic", {"site": "palm"}),
    ("palmar", {"site": "palm"}),
    ("subungual", {"site": "nail"}),
    ("lentigo maligna", {"site": "face"}),
    ("solar", {"site": "face arm"}),
    ("melasma", {"site": "face"}),
    ("rosacea", {"site": "face"}),
    ("pilar", {"site": "scalp"}),
    ("stasis", {"site": "leg"}),
)


# From common to rare: the first name of each family, then the seconds, …, so that no family is rare throughout.
DIAGNOSES: tuple[tuple[str, Family], ...] = tuple(
    (family.names[rank], family)
    for rank in range(max(len(family.names) for family in FAMILIES))
    for family in FAMILIES
    if rank < len(family.names)
)
_WEIGHTS = 1.0 / (np.arange(len(DIAGNOSES)) + 3.0)  # Zipf-like: the commonest is some sixty times the rarest
_CUMULATIVE = np.cumsum(_WEIGHTS / _WEIGHTS.sum())


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A counter-based generator keyed by its arguments alone; streams of equal seed and number are independent."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 56) | number]))


def patient_of(seed: int, index: int) -> int:
    """Number of the patient that image `index` belongs to, found from the block of `index` alone."""
    block, place = divmod(index, PATIENT_BLOCK)
    return block * PATIENT_BLOCK + _owners(seed, block)[place]


@lru_cache(maxsize=64)
def _owners(seed: int, block: int) -> list[int]:
    """For each image of a block, which of the block's patients it shows."""
    rng = generator(seed, STREAM_BLOCK, block)
    sizes = rng.choice(np.arange(1, 7), size=PATIENT_BLOCK, p=PATIENT_SIZES)
    # Cutting at the block's end shortens its last patient; the permutation spreads a patient over the block.
    owners = np.repeat(np.arange(PATIENT_BLOCK), sizes)[:PATIENT_BLOCK]
    return rng.permutation(owners).tolist()


@dataclass(frozen=True)
class _Patient:
    """What the images of one patient share: skin, hair and the habits of the clinic that took them."""

    skin_tone: int
    hairiness: float
    hair_colour: str
    light: str
    ruler: float
    bubbles: float
    tube: float


@lru_cache(maxsize=256)
def _patient(seed: int, number: int) -> _Patient:
    rng = generator(seed, STREAM_PATIENT, number)
    tone = 1 + int(rng.choice(6, p=(0.17, 0.24, 0.21, 0.15, 0.13, 0.10)))
    fair = 0.55 if tone <= 2 else 0.05
    return _Patient(
        skin_tone=tone,
        hairiness=float(rng.beta(0.7, 1.1)),
        hair_colour=str(rng.choice(("fair", "grey", "dark"), p=(fair, 0.12, 0.88 - fair))),
        light=str(rng.choice(("neutral", "warm", "cool"), p=(0.5, 0.25, 0.25))),
        ruler=float(rng.choice((0.06, 0.75), p=(0.75, 0.25))),
        bubbles=float(rng.choice((0.06, 0.7), p=(0.78, 0.22))),
        tube=float(rng.choice((0.03, 0.9), p=(0.85, 0.15))),
    )


@dataclass(frozen=True)
class _Look:
    """The attributes that lesions of one diagnosis tend to share."""

    palette: tuple[str, ...]
    structures: tuple[str, ...]
    layout: str
    border: str
    relief: str
    diameter_mm: tuple[float, float]
    site: str


@lru_cache(maxsize=len(DIAGNOSES))
def _look(label: int) -> _Look:
    """The look of diagnosis number `label`: drawn once from its family, then bent by the words of its name."""
    name, family = DIAGNOSES[label]
    rng = generator(0, STREAM_LOOK, label)
    spoken: dict[str, str] = {}
    for part, forced in _SPOKEN:
        if part in name:
            spoken |= forced
    palette = tuple(_SHORT[c] for c in spoken["palette"]) if "palette" in spoken else pick(rng, family.palettes)
    if "colour" in spoken:
        palette = (*palette, spoken["colour"]) if spoken["colour"] not in palette else palette
    keys = list(family.structures)
    odds = np.array([family.structures[key] for key in keys])
    chosen = rng.choice(len(keys), size=min(2, len(keys)), replace=False, p=odds / odds.sum())
    structures = tuple(keys[i] for i in chosen)
    if "structure" in spoken:
        structures = (spoken["structure"], *structures[:1])
    low, high = family.diameter_mm
    third = (high - low) / 3
    start = {"small": low, "large": high - third}.get(spoken.get("diameter", ""), rng.uniform(low, high - third))
    return _Look(
        palette=palette,
        structures=structures,
        layout=pick(rng, family.layouts),
        border=pick(rng, family.borders),
        relief=spoken.get("relief", pick(rng, family.reliefs)),
        diameter_mm=(float(start), float(start + third)),
        site=pick(rng, tuple(spoken["site"].split()) if "site" in spoken else family.sites),
    )


def lesion_of(seed: int, index: int, diagnosis: int | None = None) -> Lesion:
    """The attributes of phantom `index` of the collection `seed`: a pure function of its arguments. `diagnosis`, a
    place in `DIAGNOSES`, is drawn unless given."""
    number = patient_of(seed, index)
    patient = _patient(seed, number)
    rng = generator(seed, STREAM_LESION, index)
    label = int(np.searchsorted(_CUMULATIVE, rng.random(), side="right").clip(0, len(DIAGNOSES) - 1))
    label = label if diagnosis is None else diagnosis
    name, family = DIAGNOSES[label]
    look = _look(label)

    def tends(own: T, shared: tuple[T, ...]) -> T:
        return own if rng.random() < LABEL_FROM_LOOK else pick(rng, shared)

    site = tends(look.site, family.sites)
    colours = tends(look.palette, family.palettes)
    layout = tends(look.layout, family.layouts)
    if (layout == "uniform") != (len(colours) == 1):  # one colour cannot be laid out, several cannot be uniform
        layout = "uniform" if len(colours) == 1 else "patchy" if family.asymmetry[2] > 0.1 else "concentric"
    hairs = _hairs(rng, patient.hairiness, site)
    asymmetry = int(rng.choice(3, p=family.asymmetry))
    low, high = look.diameter_mm if rng.random() < LABEL_FROM_LOOK else family.diameter_mm
    shape = pick(rng, ("round", "oval", "elongated") if asymmetry else ("round", "round", "oval"))
    diameter = round(float(rng.uniform(low, high)), 1)
    placing = pick(rng, ("central", "central", "off-centre", "off-centre", "cut"))
    if placing == "cut" and diameter < 5.0:  # too little of it would be left
        placing = "off-centre"
    return Lesion(
        index=index,
        patient=f"P{number + 1:06d}",
        diagnosis=name,
        family=family.key,
        nine_partition=family.nine_partition,
        three_partition=family.three_partition,
        skin_tone=patient.skin_tone,
        site=site,
        diameter_mm=diameter,
        shape="elongated" if site == "nail" else shape,
        placing="central" if site == "nail" else placing,
        relief="flat" if site == "nail" else tends(look.relief, family.reliefs),
        asymmetry=asymmetry,
        border=tends(look.border, family.borders),
        colours=colours,
        layout=layout,
        structures=_structures(rng, family, look.structures, site),
        hairs=hairs,
        hair_colour=patient.hair_colour,
        ruler=bool(rng.random() < patient.ruler),
        bubbles=bool(rng.random() < patient.bubbles),
        ink=bool(rng.random() < 0.09),
        tube=bool(rng.random() < patient.tube),
        glare=bool(rng.random() < 0.15),
        light=patient.light,
        unusable=bool(rng.random() < UNUSABLE),
    )


def _structures(rng: np.random.Generator, family: Family, own: tuple[str, ...], site: str) -> tuple[str, ...]:
    """Structures in the order of `STRUCTURES`: mostly the diagnosis's own, now and then another of the family."""
    found = {key for key in own if rng.random() < 0.85}
    found |= {key for key, odds in family.structures.items() if rng.random() < 0.3 * odds}
    pigmented = found & {"network", "atypical network"}
    if site in ("palm", "sole") and pigmented:  # ridged skin shows pigment along its ridges instead of a net
        found = (found - pigmented) | {"ridges"}
    if site == "nail":  # the plate hides everything but colour and the finest detail
        found &= {"dots", "globules", "lacunae", "scale", "ulcer"}
    if {"network", "atypical network"} <= found:
        found.discard("network")
    return tuple(key for key in STRUCTURES if key in found)


def _hairs(rng: np.random.Generator, hairiness: float, site: str) -> str:
    if site in ("palm", "sole", "nail"):
        return "none"
    amount = hairiness + {"scalp": 0.5, "leg": 0.12, "arm": 0.1, "face": -0.15}.get(site, 0.0) + rng.normal(0.0, 0.12)
    return "none" if amount < 0.38 else "few" if amount < 0.78 else "many"


def pick(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    """One of `options`, each as likely; many times quicker than `rng.choice`, which first builds an array."""
    return options[int(rng.integers(len(options)))]
