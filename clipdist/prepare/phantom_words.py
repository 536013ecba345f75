"""Captions of dermoscopy phantoms: English sentences in varied words, and short Chinese ones, from the same attributes.

`SAID` is their vocabulary: each value of an attribute has a few ways to be said, and no two values of one attribute
share any, so that a reader (or a text tower) can tell from the words what was drawn.
"""

from collections.abc import Sequence

import numpy as np

from clipdist.prepare.phantom_lesion import Lesion, pick

SAID: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {
        "tiny": ("tiny", "very small", "pinpoint"),
        "small": ("small", "little"),
        "medium": ("medium-sized", "moderately sized"),
        "large": ("large", "sizeable"),
        "huge": ("very large", "huge", "extensive"),
    },
    "relief": {
        "flat": ("flat macule", "flat patch", "macule"),
        "raised": ("raised plaque", "slightly raised papule", "elevated plaque"),
        "nodular": ("dome-shaped nodule", "firm nodule", "protruding nodule"),
    },
    "shape": {
        "round": ("round", "circular"),
        "oval": ("oval", "egg-shaped"),
        "elongated": ("elongated", "long and narrow"),
    },
    "asymmetry": {
        "0": ("symmetrical", "evenly built"),
        "1": ("asymmetrical in one axis", "slightly asymmetrical"),
        "2": ("asymmetrical in both axes", "markedly asymmetrical"),
    },
    "border": {
        "regular": ("a smooth regular border", "an even edge"),
        "sharp": ("a sharply demarcated border", "an abrupt edge"),
        "fading": ("a border that fades into the skin", "a blurred ill-defined edge"),
        "notched": ("a notched irregular border", "a scalloped edge"),
    },
    "skin_tone": {
        "1": ("very fair skin", "very pale skin, Fitzpatrick type I"),
        "2": ("fair skin", "light skin, Fitzpatrick type II"),
        "3": ("beige skin", "medium light skin, Fitzpatrick type III"),
        "4": ("olive skin", "moderately tanned skin, Fitzpatrick type IV"),
        "5": ("brown skin", "dark skin, Fitzpatrick type V"),
        "6": ("deeply pigmented skin", "very dark skin, Fitzpatrick type VI"),
    },
    "site": {
        "face": ("face", "cheek", "forehead"),
        "scalp": ("scalp", "hairy scalp"),
        "chest": ("chest", "front of the trunk"),
        "back": ("back", "upper back"),
        "arm": ("arm", "forearm"),
        "leg": ("leg", "shin", "thigh"),
        "palm": ("palm", "palm of the hand"),
        "sole": ("sole", "sole of the foot"),
        "nail": ("nail", "nail plate"),
    },
    "colour": {
        "light brown": ("light brown", "tan"),
        "dark brown": ("dark brown", "chocolate brown"),
        "black": ("black", "jet black"),
        "blue-grey": ("blue-grey", "slate blue"),
        "red": ("red", "bright red"),
        "pink": ("pink", "rosy"),
        "purple": ("purple", "violaceous"),
        "white": ("white", "whitish"),
        "yellow": ("yellow", "yellowish"),
    },
    "layout": {
        "concentric": ("arranged in rings", "in concentric zones"),
        "eccentric": ("with an off-centre focus of colour", "with an eccentric darker or paler area"),
        "patchy": ("mixed in patches", "scattered in blotches"),
        "halves": ("split into two halves", "each on its own side"),
    },
    "structure": {
        "network": ("a fine pigment network", "a delicate regular network"),
        "atypical network": ("an atypical network", "a broad irregular network"),
        "globules": ("brown globules", "round globules"),
        "dots": ("black dots", "scattered fine dots"),
        "streaks": ("streaks at one side", "irregular streaks and pseudopods"),
        "starburst": ("a starburst pattern", "radial spokes all around the rim"),
        "veil": ("a blue-white veil", "a bluish veil"),
        "regression": ("a scar-like regression area with peppering", "regression with grey pepper granules"),
        "central white patch": ("a central white patch", "a pale scar in the middle"),
        "dotted vessels": ("dotted vessels", "red pinpoint vessels"),
        "branching vessels": ("arborizing vessels", "branching blood vessels"),
        "lacunae": ("red lacunae", "blood-filled lagoons"),
        "milia": ("milia-like cysts", "bright milia"),
        "comedo openings": ("comedo-like openings", "dark keratin plugs"),
        "scale": ("white scale", "flaky surface scale"),
        "crust": ("a honey-coloured crust", "an orange crust"),
        "ulcer": ("an ulcer", "an ulcerated raw area"),
        "shiny lines": ("shiny white lines", "chrysalis-like white lines"),
        "gyri": ("fissures and ridges", "a cerebriform surface"),
        "halo": ("a surrounding pale halo", "a depigmented halo"),
        "ridges": ("a parallel ridge pattern", "pigment along the parallel ridges"),
    },
    "hairs": {
        "none": ("no hair", "not a single hair"),
        "few": ("a few {} hairs", "some {} hairs"),
        "many": ("many {} hairs", "dense {} hairs"),
    },
    "hair_colour": {"dark": ("dark", "black"), "fair": ("fair", "blond"), "grey": ("grey", "silver")},
    "placing": {
        "central": ("in the middle of the frame", "centred in the picture"),
        "off-centre": ("away from the centre of the frame", "off to one side of the picture"),
        "cut": ("cut off by the edge of the frame", "only partly inside the picture"),
    },
    "artefact": {
        "ruler": ("a millimetre ruler", "a measuring scale"),
        "bubbles": ("gel bubbles", "air bubbles in the gel"),
        "ink": ("a violet pen mark", "a purple ink line"),
        "tube": ("black corners", "a dark circular frame"),
        "glare": ("a glare reflection", "bright reflections"),
    },
    "light": {
        "neutral": ("neutral light", "white light"),
        "warm": ("warm yellow light", "warm light"),
        "cool": ("cool bluish light", "cold light"),
    },
}

_ZH: dict[str, tuple[str, ...]] = {  # in the order of `SAID`
    "site": ("面部", "头皮", "胸部", "背部", "手臂", "腿部", "手掌", "足底", "指甲"),
    "colour": ("浅褐色", "深褐色", "黑色", "蓝灰色", "红色", "粉红色", "紫色", "白色", "黄色"),
    "border": ("规则", "清晰", "模糊", "不规则"),
    "relief": ("斑疹", "斑块", "结节"),
}


def artefacts_of(lesion: Lesion) -> tuple[str, ...]:
    """Names, among those of `SAID["artefact"]`, of what lies over the skin of this picture."""
    return tuple(name for name in SAID["artefact"] if getattr(lesion, name))


def caption(lesion: Lesion, rng: np.random.Generator) -> str:
    """Six or seven English sentences that state every attribute of `lesion`, in words and order that `rng` varies.

    About 70 words. The diagnosis is always stated, as in nearly all of SkinCAP.
    """

    def one(*options: str) -> str:
        return pick(rng, options)

    def say(kind: str, value: object) -> str:
        return pick(rng, SAID[kind][str(value)])

    size, relief, site = say("size", lesion.size), say("relief", lesion.relief), say("site", lesion.site)
    millimetres = f"{max(1, round(lesion.diameter_mm))} mm"
    shape, symmetry = say("shape", lesion.shape), say("asymmetry", lesion.asymmetry)
    border, tone = say("border", lesion.border), say("skin_tone", lesion.skin_tone)
    colours = _listed([say("colour", name) for name in lesion.colours])
    layout = f", {say('layout', lesion.layout)}" if lesion.layout != "uniform" else one(" throughout", " all over")
    structures = [say("structure", name) for name in lesion.structures]
    rng.shuffle(structures)
    found = _listed(structures) or one("no specific structures", "a structureless surface")
    sentences = [
        one(
            f"{_article(size)} {size} {relief} on the {site}, consistent with {lesion.diagnosis}.",
            f"Dermoscopy of the {site} shows {_article(size).lower()} {size} {relief}, suggesting {lesion.diagnosis}.",
            f"This {size} {relief} of the {site} is most likely {lesion.diagnosis}.",
            f"Impression: {lesion.diagnosis}, {_article(size).lower()} {size} {relief} on the {site}.",
        ),
        one(
            f"It is {shape} and {symmetry}, about {millimetres} across, with {border}.",
            f"The lesion measures {millimetres}; it is {symmetry} and {shape} and has {border}.",
            f"The outline is {shape}, {symmetry}, {millimetres} wide, with {border}.",
        ),
        one(
            f"The colour is {colours}{layout}.",
            f"It looks {colours}{layout}.",
            f"Colours seen: {colours}{layout}.",
        ),
        one(f"There is evidence of {found}.", f"It shows {found}.", f"Structures: {found}.", f"One sees {found}."),
        _surroundings(lesion, tone, rng),
        _frame(lesion, rng),
    ]
    rest = sentences[1:]
    rng.shuffle(rest)
    # The diagnosis comes first or last; what is known of the skin and the frame may come anywhere between.
    ordered = [sentences[0], *rest] if rng.random() < 0.75 else [*rest, sentences[0]]
    text = " ".join(ordered)
    return text if not lesion.unusable else f"{text} {one('The picture is out of focus.', 'The photo is blurred.')}"


def _surroundings(lesion: Lesion, tone: str, rng: np.random.Generator) -> str:
    hair = pick(rng, SAID["hairs"][lesion.hairs]).format(pick(rng, SAID["hair_colour"][lesion.hair_colour]))
    return pick(rng, (f"The background is {tone} with {hair}.", f"Around it is {tone}, with {hair}."))


def _frame(lesion: Lesion, rng: np.random.Generator) -> str:
    placing, light = pick(rng, SAID["placing"][lesion.placing]), pick(rng, SAID["light"][lesion.light])
    overlaid = [pick(rng, SAID["artefact"][name]) for name in artefacts_of(lesion)]
    rng.shuffle(overlaid)
    extra = f", with {_listed(overlaid)}" if overlaid else ""
    options = (f"It lies {placing} under {light}{extra}.", f"Taken in {light}, the lesion is {placing}{extra}.")
    return pick(rng, options)


def caption_zh(lesion: Lesion) -> str:
    """One short Chinese sentence: site, colours, border, kind and diagnosis (whose name stays English)."""

    def say(kind: str, value: str) -> str:
        return _ZH[kind][tuple(SAID[kind]).index(value)]

    colours = "、".join(say("colour", name) for name in lesion.colours)
    what = f"{say('site', lesion.site)}可见{colours}{say('relief', lesion.relief)}"
    return f"{what},边界{say('border', lesion.border)},考虑 {lesion.diagnosis}。"


def _article(word: str) -> str:
    return "An" if word[0] in "aeiou" else "A"


def _listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)
