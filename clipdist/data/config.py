"""What a recipe says about its data."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from clipdist.data.captions import CaptionAugmentConfig, CaptionChoice
from clipdist.data.images.augment import AugmentConfig
from clipdist.data.mixing import MixEntry
from clipdist.data.remote import RemoteConfig
from clipdist.data.shards import Check
from clipdist.settings import Share, field, settings


@settings
class DataConfig:
    set: str = ""
    """Folder of the shard set; either this or `mix`."""
    mix: tuple[MixEntry, ...] = ()
    """Several shard sets and their shares of each batch, instead of `set`."""
    balance: str = ""
    """Field, such as `label`, whose values are drawn by `balance_temperature`; empty: each sample once per epoch."""
    balance_temperature: Annotated[float, Field(ge=1)] = math.inf
    """T: a value that n samples have gets a share proportional to n^(1/T). 1: as the set is; .inf: equal shares."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split evaluated after each epoch; empty: none."""
    lanes: NonNegativeInt = field(default=0)
    """Lanes of the sample order; 0 chooses by the set's size."""
    window: NonNegativeInt = field(default=0)
    """Samples shuffled together within a lane; 0 chooses by the shards' size."""
    caption: CaptionChoice = "random"
    """Which caption of several a training step uses; sentence: any sentence of any of them."""
    caption_augment: CaptionAugmentConfig = field(default_factory=CaptionAugmentConfig)
    groups: str = "caption"
    """Pairs that are each other's positives: equal `caption`, equal value of a named field (`label`), or `none`."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    decode: Literal["fast", "exact"] = "fast"
    """How training pixels are decoded. fast: a JPEG at the smallest fraction of its size that suffices, a mean of less
    than 2 grey levels of 255 away from exact; exact: in full, by Pillow. Evaluation is always exact."""
    max_image_pixels: PositiveInt = 50_000_000
    """Width times height; larger images are refused before they are decoded, and count as unreadable."""
    max_bad_fraction: Share = 0.01
    """Share of an epoch's samples that may be unreadable before the run stops."""
    max_bad_in_a_row: NonNegativeInt = 100
    """Unreadable samples one after the other, before the run stops."""
    checksums: Check = "sample"
    """What is compared with its checksum while reading. none: nothing; sample: each sample, each time; shard: besides,
    each whole file once per machine, before its first read."""
    cache: Literal["none", "decoded"] = "none"
    """decoded: keeps each image, decoded and scaled down, in a file on local disk, so that from the second epoch on
    nothing is decoded any more. For sets that fit; the first epoch fills it."""
    cache_side: NonNegativeInt = 0
    """Shorter side of cached images, pixels; 0: a seventh more than the image tower's."""
    cache_folder: str = ""
    """Folder on local disk for decoded images; by default $CLIPDIST_CACHE, else $XDG_CACHE_HOME/clipdist, else
    ~/.cache/clipdist."""
    cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    """What decoded images may take there, GiB; those of other sets, used longest ago, make room."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """For sets behind a URL: how they are fetched, and the cache on local disk."""
    workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: PositiveInt = 4
    """Pieces of work that each worker keeps ready."""
