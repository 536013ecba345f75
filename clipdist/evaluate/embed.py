"""Both towers' features of a whole split, computed by all ranks together."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipdist import heartbeat, world
from clipdist.data.evaluation import EvalPiece, EvalRows, evaluation_loader
from clipdist.data.loader import worker_errors
from clipdist.data.shards import Split
from clipdist.data.text import Tokenizer
from clipdist.errors import UserError
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.tower_model import TowerModel
from clipdist.progress import progress

logger = logging.getLogger(__name__)

TEXT_ROWS = 256


@dataclass
class Embeddings:
    """A split's features, in the split's order. N images, M captions, D wide; float32 unit vectors."""

    image_features_ND: np.ndarray
    text_features_MD: np.ndarray
    text_owner_M: np.ndarray  # int64: row in image_features_ND of the image that a caption belongs to
    numbers_N: np.ndarray  # int64: the images' sample numbers in the split
    keys: list[str]
    texts: list[str]
    fields: list[dict[str, Any]]
    bad: list[tuple[int, str, str]]  # number, key and reason of each unreadable sample
    tower_features_NF: np.ndarray | None = None  # float32: what the image tower gives, before its projection


@torch.no_grad()  # not inference mode: weights that a sharding engine gathers within it could not train afterwards
def embed_split(
    model: DualEncoder,
    tokenizer: Tokenizer,
    split: Split,
    *,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    max_image_pixels: int = 50_000_000,
    quiet: bool = False,
    in_step: bool = False,
    tower_features: bool = False,
) -> Embeddings:
    """Features of every readable sample exactly once, whatever the world size: ranks of equal hardware and threads
    give what one process gives, to the last bit. All ranks call it; all get the answer.

    `tower_features` asks for the image tower's own features besides, which probes are commonly fitted on.
    `in_step` says that each pass through a tower needs all ranks: those that are done take part with a blank row until
    the last is. The model is left in the mode it was in.
    """
    device = next(model.parameters()).device
    with reading(
        model,
        split,
        tokenizer,
        workers=workers,
        precision=precision,
        max_image_pixels=max_image_pixels,
        quiet=quiet,
        description=f"embedding {split.name}",
    ) as pieces:
        local = _embed_pieces(model, tokenizer, pieces, device, in_step, tower_features)
    embeddings = _join(world.gather_objects(local), model.config.width)
    warn_of_bad(split, embeddings.bad)
    return embeddings


@contextmanager
def reading(
    model: TowerModel,
    split: Split,
    tokenizer: Tokenizer | None,
    *,
    workers: int,
    precision: torch.dtype,
    max_image_pixels: int,
    quiet: bool,
    description: str,
) -> Iterator[Iterator[EvalPiece]]:
    """This rank's part of a split as the model takes it; within, the model is in evaluation mode, and computes in
    `precision`. Afterwards it is in the mode it was in."""
    who = world.connected()
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    image = model.image
    rows = EvalRows(split, side=image.side, resize=image.resize, tokenizer=tokenizer, max_image_pixels=max_image_pixels)
    loader = evaluation_loader(rows, rank=who.rank, world_size=who.world_size, workers=workers)
    shown = progress(loader, unit="batch", description=description, quiet=quiet or not who.is_main)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32), worker_errors():
        yield _sound(shown)
    model.train(was_training)


def _sound(pieces: Iterable[EvalPiece | UserError]) -> Iterator[EvalPiece]:
    for piece in pieces:
        if isinstance(piece, UserError):
            raise piece
        yield piece


def warn_of_bad(split: Split, bad: Iterable[tuple[int, str, str]]) -> None:
    """Rank 0 names what could not be read."""
    if world.connected().is_main:
        for _, key, reason in bad:
            logger.warning("%s: left out of %s: %s: %s", split.folder, split.name, key, reason)


def _embed_pieces(
    model: DualEncoder,
    tokenizer: Tokenizer,
    pieces: Iterable[EvalPiece],
    device: torch.device,
    in_step: bool,
    tower_features: bool,
) -> dict[str, Any]:
    found: dict[str, Any] = {name: [] for name in ("owners", "numbers", "samples", "bad")}
    texts: list[list[list[int]]] = []  # not across pieces, so that all world sizes pad and multiply the same rows

    def images() -> Iterator[torch.Tensor]:
        for piece in pieces:
            found["bad"] += piece.bad
            if piece.numbers:
                found["numbers"] += piece.numbers
                found["samples"] += [(sample.key, sample.texts, sample.fields) for sample in piece.samples]
                found["owners"] += piece.owners
                ids = piece.token_ids
                texts.extend(ids[start : start + TEXT_ROWS] for start in range(0, len(ids), TEXT_ROWS))
                yield piece.images_n3HW

    def encode_text(ids: list[list[int]]) -> torch.Tensor:
        tokens, mask = tokenizer.pad(ids)
        return model.encode_text(tokens.to(device), mask.to(device))

    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        features_bD = model.encode_image(pixels.to(device))
        return torch.cat([features_bD, of_tower.pop().float()], dim=1) if tower_features else features_bD

    side = model.image.side
    blank = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    of_tower: list[torch.Tensor] = []
    listener = model.image.register_forward_hook(lambda *call: of_tower.append(call[-1])) if tower_features else None
    parts = {"image": encode_all(encode_image, images(), blank, device, in_step)}
    if listener is not None:
        listener.remove()
    parts["text"] = encode_all(encode_text, iter(texts), [[tokenizer.pad_id]], device, in_step)
    for name, made in parts.items():
        found[name] = torch.cat(made).float().numpy() if made else np.zeros((0, model.config.width), np.float32)
    width = model.config.width
    found["image"], found["tower"] = found["image"][:, :width], found["image"][:, width:] if tower_features else None
    return found


def encode_all(
    encode: Callable[[Any], torch.Tensor], items: Iterator[Any], blank: Any, device: torch.device, in_step: bool
) -> list[torch.Tensor]:
    """`encode` of each item, on the CPU; `in_step` with the other ranks, which may have more items or fewer."""
    found: list[torch.Tensor] = []
    while True:
        item = next(items, None)
        more = item is not None
        if in_step:
            more = bool(world.max_over_ranks(torch.tensor([int(more)], device=device)))
        if not more:
            return found
        made = encode(blank if item is None else item)
        heartbeat.beat()
        if item is not None:
            found.append(made.cpu())


def _join(parts: list[dict[str, Any]], width: int) -> Embeddings:
    numbers = np.array([number for part in parts for number in part["numbers"]], np.int64)
    row_of = {int(number): row for row, number in enumerate(numbers)}
    samples = [sample for part in parts for sample in part["samples"]]
    towers = [part["tower"] for part in parts if part["tower"] is not None and len(part["tower"])]
    return Embeddings(
        image_features_ND=np.concatenate([part["image"] for part in parts]).reshape(-1, width),
        text_features_MD=np.concatenate([part["text"] for part in parts]).reshape(-1, width),
        text_owner_M=np.array([row_of[owner] for part in parts for owner in part["owners"]], np.int64),
        numbers_N=numbers,
        keys=[key for key, _, _ in samples],
        texts=[text for _, texts, _ in samples for text in texts],
        fields=[fields for _, _, fields in samples],
        bad=[record for part in parts for record in part["bad"]],
        tower_features_NF=np.concatenate(towers) if towers else None,
    )
