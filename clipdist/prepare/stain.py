"""Stain normalisation: a slide's tiles recoloured as if they had been stained and scanned like a reference tile.

Macenko and Vahadane find the two stains of a picture as directions in optical density, keep how much of each a pixel
has, and put the reference's stains in their place. Reinhard matches means and deviations of colour. Stains are found
per slide, over pixels of all its tiles: a tile that shows little of one stain would make up a wrong one.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009
    Vahadane et al., "Structure-preserving color normalization and sparse stain separation", IEEE TMI 35 (2016)
    Reinhard et al., "Color transfer between images", IEEE CG&A 21 (2001)

Suffixes: N pixels, 2 stains (haematoxylin first), 3 channels. Optical density is -log10(I / 255). Of the libraries at
hand torchstain has no Vahadane, tiatoolbox brings a hundred packages, and scikit-learn codes a dictionary's pixels one
by one; hence these functions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from clipdist.errors import UserError

Method = Literal["macenko", "reinhard", "vahadane"]
Picture = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

# Optical density of red, green and blue, of unit length (Ruifrok and Johnston, "Quantification of histochemical
# staining by color deconvolution", 2001, table 1).
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)

LEAST_DENSITY = 0.15  # Macenko's beta: a pixel whose density vector is shorter shows glass
PERCENTILE = 1.0  # Macenko's alpha: outliers at either end of the angles
STRONGEST = 99.0  # percentile that stands for a stain's full strength
SPARSITY = 0.1  # Vahadane's lambda, for densities in natural logarithms
ROUNDS = 60
MOST_PIXELS = 100_000  # looked at to find stains; more change an angle by less than a tenth of a degree
FEWEST_PIXELS = 500
# Degrees between two stains. A single one, with a camera's noise of three grey levels, looks like two 7 degrees apart;
# those of drawn and photographed tissue are 16 or more apart by either method.
LEAST_ANGLE = 8.0
LEAST_DEVIATION = 1e-3  # in Reinhard's space: less is rounding to whole grey levels

# Logarithms of cone responses, decorrelated: Reinhard et al., equations 4 to 8.
_RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LMS_TO_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])


class NoTissue(ValueError):
    """Too few stained pixels, or too much alike, to find two stains or a spread of colours in."""


@dataclass(frozen=True)
class Stains:
    """Two unit vectors of optical density, one row each, haematoxylin first, and the strength that counts as full."""

    vectors_23: Array
    strength_2: Array


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of tissue in Reinhard's l-alpha-beta space, float64 [3]."""

    mean_3: Array
    deviation_3: Array


@dataclass(frozen=True)
class StainNormaliser:
    """Recolours tiles to look like a reference: `make` one, `fit` it to the tiles of a slide, `apply` it to each."""

    method: Method
    target: Stains | Colours

    @staticmethod
    def make(method: Method, reference: Picture) -> "StainNormaliser":
        """`reference`: uint8 [H, W, 3]. Raises `UserError` for an unknown method, and a reference with little tissue
        or of one stain."""
        if method not in get_args(Method):
            raise UserError(f"stain: found {method!r}, expected one of {', '.join(get_args(Method))}")
        try:
            return StainNormaliser(method, _found(method, [reference]))
        except NoTissue as error:
            raise UserError(
                f"stain: the reference tile will not do: {error}; choose one full of tissue, with nuclei and stroma"
            ) from None

    def fit(self, tiles: Sequence[Picture]) -> Stains | Colours:
        """What `apply` needs to know of a slide, from some of its tiles. Raises `NoTissue`."""
        return _found(self.method, tiles)

    def apply(self, tile: Picture, found: Stains | Colours) -> Picture:
        """`tile`, uint8 [H, W, 3], in the reference's colours; `found` is what `fit` made of its slide."""
        if isinstance(found, Colours):
            assert isinstance(self.target, Colours)
            lab = to_lab(tile.reshape(-1, 3))
            ratio = self.target.deviation_3 / np.maximum(found.deviation_3, 1e-6)
            return from_lab((lab - found.mean_3) * ratio + self.target.mean_3).reshape(tile.shape)
        assert isinstance(self.target, Stains)
        density = optical_density(tile.reshape(-1, 3))
        # Without the penalty that found the stains: it would take strength from every pixel.
        amounts = amounts_of(density, found.vectors_23)
        amounts *= self.target.strength_2 / np.maximum(found.strength_2, 1e-6)
        light = 255 * 10 ** -(amounts @ self.target.vectors_23)
        return np.rint(light).clip(0, 255).astype(np.uint8).reshape(tile.shape)


def as_json(found: Stains | Colours) -> dict[str, Any]:
    """The numbers of `found`, for a record that people read."""
    return {name.rpartition("_")[0]: np.round(values, 4).tolist() for name, values in asdict(found).items()}


def optical_density(pixels_N3: Picture) -> Array:
    """float64 [N, 3]; black counts as 1 of 255, so that it stays finite."""
    table = -np.log10(np.maximum(np.arange(256), 1) / 255)
    return table[pixels_N3]


def macenko(density_N3: Array) -> Array:
    """Unit vectors [2, 3] of the two stains, haematoxylin first.

    Densities lie in a plane through the origin (from their two largest singular vectors); its extreme directions, at
    the 1st and 99th percentile of the angle, are the stains. Pixels count by the length of their
    density; asking every channel to pass would throw pure eosin away, which hardly absorbs red. Raises `NoTissue`
    where there is one stain only.
    """
    _, _, right = np.linalg.svd(density_N3.T @ density_N3)
    plane = right[:2] * np.where(right[:2].sum(1) < 0, -1, 1)[:, None]
    x, y = (density_N3 @ plane.T).T
    angles = np.percentile(np.arctan2(y, x), [PERCENTILE, 100 - PERCENTILE])
    return _ordered(np.stack([np.cos(angles), np.sin(angles)], 1) @ plane)


def vahadane(density_N3: Array) -> Array:
    """Unit vectors [2, 3] of the two stains, haematoxylin first: a dictionary that codes densities sparsely.

    Minimises ½‖V − H·W‖² + λ‖H‖₁ over H ≥ 0 [N, 2] and W ≥ 0 [2, 3] with rows of length at most one (Vahadane et al.,
    equation 6), in turns: H exactly, W by one pass of block-coordinate descent (Mairal et al., "Online dictionary
    learning for sparse coding", ICML 2009, algorithm 2). It begins with Macenko's answer. Raises `NoTissue` where there
    is one stain only.
    """
    values = density_N3 * np.log(10)
    stains = macenko(density_N3)
    for _ in range(ROUNDS):
        codes = amounts_of(values, stains, SPARSITY)
        gram, seen = codes.T @ codes, codes.T @ values
        before = stains.copy()
        for k in range(2):
            if gram[k, k] > 0:
                row = np.maximum(stains[k] + (seen[k] - gram[k] @ stains) / gram[k, k], 0)
                stains[k] = row / max(np.linalg.norm(row), 1e-12)
        _check_apart(stains)
        if np.abs(stains - before).max() < 1e-5:
            break
    return _ordered(stains)


def amounts_of(density_N3: Array, stains_23: Array, sparsity: float = 0.0) -> Array:
    """How much of each stain, float64 [N, 2], never negative: the minimum of ½‖v − h·W‖² + `sparsity`·‖h‖₁.

    With two stains it is one of four candidates, found without iterations: both, either alone, or none.
    """
    gram = stains_23 @ stains_23.T
    wanted = density_N3 @ stains_23.T - sparsity
    both = np.linalg.solve(gram, wanted.T).T
    first = np.stack([np.maximum(wanted[:, 0] / gram[0, 0], 0), np.zeros(len(wanted))], 1)
    second = np.stack([np.zeros(len(wanted)), np.maximum(wanted[:, 1] / gram[1, 1], 0)], 1)
    alone = np.where((_gain(first, gram, wanted) >= _gain(second, gram, wanted))[:, None], first, second)
    return np.where((both >= 0).all(1, keepdims=True), both, alone)


def to_lab(pixels_N3: Picture) -> Array:
    """Reinhard's l-alpha-beta values, float64 [N, 3]."""
    return np.log10(np.maximum(pixels_N3, 1) / 255 @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


def from_lab(lab_N3: Array) -> Picture:
    """uint8 [N, 3], clipped to what can be shown."""
    rgb = 10 ** (lab_N3 @ np.linalg.inv(_LMS_TO_LAB).T) @ np.linalg.inv(_RGB_TO_LMS).T
    return np.rint(rgb * 255).clip(0, 255).astype(np.uint8)


def stained_pixels(tiles: Sequence[Picture]) -> Picture:
    """uint8 [N, 3]: pixels of all tiles that are not glass, evenly taken, at most 100,000. Raises `NoTissue`."""
    pixels = np.concatenate([tile.reshape(-1, 3) for tile in tiles])
    pixels = pixels[:: max(1, len(pixels) // (2 * MOST_PIXELS))]
    pixels = pixels[np.linalg.norm(optical_density(pixels), axis=1) >= LEAST_DENSITY]
    if len(pixels) < FEWEST_PIXELS:
        raise NoTissue(f"{len(pixels)} stained pixels, expected {FEWEST_PIXELS} or more")
    return pixels[:: max(1, len(pixels) // MOST_PIXELS)]


def _found(method: Method, tiles: Sequence[Picture]) -> Stains | Colours:
    pixels = stained_pixels(tiles)
    if method == "reinhard":
        lab = to_lab(pixels)
        deviation_3 = lab.std(0)
        if deviation_3.min() < LEAST_DEVIATION:
            raise NoTissue(
                f"one colour only: the least deviation in Reinhard's space is {deviation_3.min():.5f}, expected "
                f"{LEAST_DEVIATION} or more"
            )
        return Colours(lab.mean(0), deviation_3)
    density = optical_density(pixels)
    vectors = macenko(density) if method == "macenko" else vahadane(density)
    return Stains(vectors, np.percentile(amounts_of(density, vectors), STRONGEST, axis=0))


def _gain(amounts: Array, gram: Array, wanted: Array) -> Array:
    """What these amounts take away from the objective at none."""
    gain: Array = (amounts * wanted).sum(1) - ((amounts @ gram) * amounts).sum(1) / 2
    return gain


def _ordered(stains_23: Array) -> Array:
    """Of unit length, without the negative parts that noise leaves; the one that absorbs more red first. `NoTissue`
    where they are one."""
    stains = np.maximum(stains_23, 0)
    stains /= np.maximum(np.linalg.norm(stains, axis=1, keepdims=True), 1e-12)
    _check_apart(stains)
    return stains[np.argsort(-stains[:, 0])]


def _check_apart(stains_23: Array) -> None:
    """`NoTissue` unless two unit vectors point to different colours; amounts of equal ones cannot be told apart."""
    sine = float(np.linalg.norm(np.cross(*stains_23)))  # 0 also where one of them has vanished
    if sine < np.sin(np.radians(LEAST_ANGLE)):
        raise NoTissue(
            f"one stain only: two that were looked for are {np.degrees(np.arcsin(sine)):.1f} degrees apart, expected "
            f"{LEAST_ANGLE:g} or more"
        )
