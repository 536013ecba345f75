"""The decoded cache of a recipe's training split: which one it is, how large it will be, what a record holds besides
pixels."""

import json
import logging
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash

from clipdist.data.config import DataConfig
from clipdist.data.images.cache import DecodedCache, cache_bytes, cached_sizes, clean
from clipdist.data.labels import Labels
from clipdist.data.shards import Split
from clipdist.data.text import Tokenizer
from clipdist.errors import disk_errors
from clipdist.user_cache import user_cache

logger = logging.getLogger(__name__)

# Raised when what a record holds, or how its pixels are made, changes.
CONTENT_VERSION = 2
PAYLOAD_MARGIN = 512  # bytes, for quotes, names and the size


def cache_side(config: DataConfig, side: int) -> int:
    """Shorter side of cached images. By default a seventh more than the tower's, so that a crop of four fifths of the
    area still has a pixel of its own for each of the tower's (8/7 · √0.8 ≈ 1.02)."""
    return config.cache_side or -(-side * 8 // 7)


def open_cache(config: DataConfig, split: Split, tells: Tokenizer | Labels, side: int) -> DecodedCache:
    """Opens, or lays out, the cache of `split`; `tells` makes token ids of captions, or classes of fields.

    Every rank calls it; the first one on a machine does the work. Raises `UserError` when the disk, or
    `data.cache_gib`, has too little room.
    """
    folder = user_cache("decoded", config.cache_folder)
    identity = identity_of(config, split, tells, side)
    sizes_hw, payload_sizes = _sizes(split, cache_side(config, side))
    with disk_errors(folder):
        clean(folder, [identity], max(0.0, config.cache_gib - cache_bytes(sizes_hw, payload_sizes) / 2**30))
    cache = DecodedCache.open(folder, identity, sizes_hw, payload_sizes, limit_gib=config.cache_gib)
    logger.info(
        "decoded cache %s: %.1f GiB, %s of %s samples stored",
        cache.folder,
        cache.layout.bytes / 2**30,
        f"{cache.stored():,}",
        f"{len(cache):,}",
    )
    return cache


def identity_of(config: DataConfig, split: Split, tells: Tokenizer | Labels, side: int) -> str:
    """Names everything that the cached content depends on: two runs share a cache exactly when it is equal."""
    depends = [
        split.digest,
        cache_side(config, side),
        config.decode,
        config.max_image_pixels,
        config.groups,
        *(_classes(tells) if isinstance(tells, Labels) else _tokens(tells)),
        CONTENT_VERSION,
        *(version(package) for package in ("simplejpeg", "pillow", "torch", "tokenizers", "transformers")),
    ]
    return f"{split.name}-{cache_side(config, side)}-{xxhash.xxh3_64_hexdigest(json.dumps(depends).encode())}"


def _classes(labels: Labels) -> list[Any]:
    return ["classes", labels.field, labels.names]


def _tokens(tokenizer: Tokenizer) -> list[Any]:
    """What decides the ids that a tokenizer gives. Not what an earlier call left behind in it: how it was cut."""
    inner = tokenizer.tokenizer
    about: list[Any] = [tokenizer.max_tokens, inner.truncation_side, type(inner).__name__, *["fill"] * tokenizer.fill]
    if inner.is_fast:
        backend = json.loads(inner.backend_tokenizer.to_str())
        return [*about, {name: value for name, value in backend.items() if name not in ("truncation", "padding")}]
    return [*about, sorted(inner.get_vocab().items()), {k: str(v) for k, v in inner.special_tokens_map.items()}]


def _sizes(split: Split, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(int [N, 2] height and width of each cached image, int [N] the most bytes that its texts can take)."""
    hw, texts = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int64)]
    for number in range(len(split.shards)):
        records = split.records(number)
        hw.append(cached_sizes(records["width"], records["height"], side).astype(np.int32))
        stored = records["json_size"].astype(np.int64) + records["text_size"]
        # A token stands for at least one byte and takes at most eight characters; then quotes, the key and the like.
        texts.append(9 * stored + 2 * records["key_size"] + PAYLOAD_MARGIN)
    return np.concatenate(hw), np.concatenate(texts)
