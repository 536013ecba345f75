"""Features of a tower that trains nowhere, each computed once and kept on disk: locked-image tuning (LiT, Zhai et al.
2022, arXiv 2111.07991) at the price of the other tower.

b = rows of a forward pass, C = width of the tower.

    <run>/features/text/<identity>/epoch-3-rank-0.bin

What is kept is the tower's output before its projection, bit for bit. It is found by the content of the input, so that
another caption of an image, or a changed one, has a row of its own. `identity` is that of the tower: its weights and
whatever else decides about its output; with another tower, another folder.

A run that was killed and goes on must give the bits of one that was not, and features computed in other batches differ
in their last ones. So a rank sees the rows that any rank computed in earlier epochs, and in the running epoch its own
alone: what it finds depends on the recipe, and not on which rank was faster or what a process did before it died. Steps
that are done a second time find what they wrote the first time. Of equal keys the rank's own of this epoch counts, then
that of the lowest epoch and rank. On another number of processes files are used as they are found.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
import transformers
import xxhash
from torch import Tensor, nn

from clipdist import world
from clipdist.errors import disk_errors
from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.freeze import StageConfig
from clipdist.model.tower_model import trains
from clipdist.train.checkpoint import newest_step
from clipdist.train.engine import Engine
from clipdist.train.feature_file import Index, Layout, OwnFile
from clipdist.train.flops import FlopCount
from clipdist.train.run_folder import RunFolder

if TYPE_CHECKING:
    from clipdist.config import RunConfig

logger = logging.getLogger(__name__)

TOWERS = ("image", "text")
NAME = re.compile(r"epoch-(\d+)-rank-(\d+)\.bin")


def cached_towers(config: ModelConfig) -> list[str]:
    """Of `image` and `text`, those whose features a recipe wants kept.

    A forward pass then runs such a tower on some ranks and not on others, and on other numbers of rows: an engine that
    gathers parameters within the forward pass must refuse it.
    """
    return [name for name in TOWERS if getattr(config, name).cache_features]


class FeatureCache:
    """What this rank knows of one tower's features in one epoch; a `FeatureSource` of the model."""

    def __init__(self, own: OwnFile, earlier: Index) -> None:
        self.own, self.earlier = own, earlier
        self.computed = 0
        """Rows that the tower was run on."""

    def __call__(self, tower: nn.Module, *inputs: Tensor) -> Tensor:
        """[b, C], as the tower would give it; of equal rows it sees one."""
        keys = content_keys(*inputs)
        rows_of: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            rows_of.setdefault(key, row)
        places = dict(zip(rows_of, self.earlier.find(list(rows_of)).tolist(), strict=True))
        own = [key for key in rows_of if key in self.own.offsets]
        early = [key for key in rows_of if key not in self.own.offsets and places[key] >= 0]
        new = [key for key in rows_of if key not in self.own.offsets and places[key] < 0]
        parts: list[Tensor] = []
        if own or early:
            found = [self.own.row(key) for key in own]
            found += self.earlier.rows(np.array([places[key] for key in early], np.int64)) if early else []
            layout = self.own.layout or self.earlier.layout
            assert layout is not None
            parts.append(_from_bytes(found, layout).to(inputs[0].device))
        if new:
            parts.append(self._compute(tower, inputs, new, [rows_of[key] for key in new]))
        number = {key: n for n, key in enumerate([*own, *early, *new])}
        order = torch.tensor([number[key] for key in keys], device=inputs[0].device)
        return torch.cat(parts).index_select(0, order)

    def _compute(self, tower: nn.Module, inputs: tuple[Tensor, ...], keys: list[bytes], rows: list[int]) -> Tensor:
        """[n, C] of the rows that nobody has; they are written down."""
        if len(rows) < len(inputs[0]):
            chosen = torch.tensor(rows, device=inputs[0].device)
            inputs = tuple(tensor.index_select(0, chosen) for tensor in inputs)
        features_nC: Tensor = tower(*inputs)
        self.computed += len(rows)
        values = features_nC.detach().cpu().contiguous().view(torch.uint8).numpy()
        layout = Layout(str(features_nC.dtype).removeprefix("torch."), features_nC.shape[1], values.shape[1])
        self.own.append(keys, values, layout)
        return features_nC


def _from_bytes(rows: list[bytes | memoryview], layout: Layout) -> Tensor:
    """[n, C] on the CPU."""
    values = np.empty((len(rows), layout.row_bytes), np.uint8)
    for n, row in enumerate(rows):
        values[n] = np.frombuffer(row, np.uint8)
    return torch.from_numpy(values).view(getattr(torch, layout.dtype))


def content_keys(*inputs: Tensor) -> list[bytes]:
    """The xxh3-128 of each row: of an image's pixels, or of a caption's token ids without its padding."""
    if len(inputs) == 1:
        # The order in which the loader puts them into memory, so that nothing is moved.
        pixels = inputs[0].detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
        return [xxhash.xxh3_128_digest(image) for image in pixels]
    tokens, mask = (tensor.detach().cpu().numpy() for tensor in inputs)
    return [xxhash.xxh3_128_digest(row[there].tobytes()) for row, there in zip(tokens, mask != 0, strict=True)]


def identity(tower: nn.Module, *told: object) -> str:
    """Of a tower's weights and buffers, and of what else is `told`: 32 hexadecimal digits."""
    hasher = xxhash.xxh3_128(repr(told).encode())
    for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


class FeatureCaches:
    """The caches of a run, none unless the recipe asks for them. All ranks construct it before the first step, and
    call `enter` together."""

    def __init__(self, config: "RunConfig", engine: Engine, folder: RunFolder) -> None:
        self.config, self.engine, self.run = config, engine, folder
        self.folder = folder.path / "features"
        self.world = world.connected()
        self.names = cached_towers(config.model)
        self.epoch: int | None = None
        self.open: dict[str, FeatureCache] = {}
        """Those in use in this epoch."""
        self._flops: dict[str, float] = {}
        self._identities: dict[str, str] = {}
        self._indexes: dict[str, Index] = {}
        if self.world.is_main and folder.checkpoint is None and self.folder.exists():
            # What an earlier start left may have been computed in other batches.
            with disk_errors(self.folder):
                shutil.rmtree(self.folder)

    def enter(self, epoch: int, stage_begins: int, steps_per_epoch: int) -> None:
        """At each step, with its epoch, the epoch in which the present stage began, and after that stage has been
        applied: at an epoch's first step, opens the files of the towers that train nowhere."""
        if not self.names or epoch == self.epoch:
            return
        self.epoch = epoch
        self.close()
        model = self.engine.model
        model.feature_sources = self.open  # the engine may have put another model there
        for name in self.names:
            tower: nn.Module = getattr(model, name)
            if trains(tower):
                self._identities.pop(name, None)
                self._indexes.pop(name, None)
            else:
                if name not in self._identities:
                    known = self._identity(name, tower) if self.world.is_main else ""
                    self._identities[name] = world.broadcast_object(known)
                self.open[name] = self._cache(name, epoch)
            if self.world.is_main:
                self._forget_others(name, stage_begins, steps_per_epoch)

    def _identity(self, name: str, tower: nn.Module) -> str:
        train = self.config.train
        settings = asdict(getattr(self.config.model, name))
        del settings["cache_features"]
        device = next(tower.parameters()).device.type
        versions = [torch.__version__, timm.__version__, transformers.__version__]
        return identity(tower, settings, train.precision, train.tf32, train.compile, device, versions)

    def _cache(self, name: str, epoch: int) -> FeatureCache:
        folder = self.folder / name / self._identities[name]
        # Names are exchanged after every rank has closed its own: a folder on another machine may not show them yet.
        names = {file for files in world.gather_objects(_files(folder)) for file in files}
        earlier = [folder / file for written, _, file in sorted(names) if written < epoch]
        index = self._indexes.get(name)
        if index is None or index.paths != earlier[: len(index.paths)]:
            index = self._indexes[name] = Index()
        index.add(earlier[len(index.paths) :])
        if self.world.is_main:
            logger.info("epoch %d: %s features on disk: %s", epoch, name, f"{len(index):,}")
        return FeatureCache(OwnFile(folder / f"epoch-{epoch}-rank-{self.world.rank}.bin"), index)

    def _forget_others(self, name: str, stage_begins: int, steps_per_epoch: int) -> None:
        """Removes the features of towers with other weights, once no start can go on from before this stage."""
        step = newest_step(self.run.checkpoints)
        if step is None or step // steps_per_epoch < stage_begins:
            return
        folder = self.folder / name
        others = (
            [path for path in folder.iterdir() if path.name != self._identities.get(name)] if folder.exists() else []
        )
        for path in others:
            logger.info("removing %s: features of a %s tower with other weights or settings", path, name)
            with disk_errors(folder):
                shutil.rmtree(path)

    def count_flops(self, count: FlopCount, stage: StageConfig, tokens: int) -> None:
        """Takes note of what one pair costs each tower in use, for `spared_flops`."""
        self._flops = {name: count.of_a_locked_tower(name, stage, tokens) for name in self.open}

    def shares(self, steps: int) -> dict[str, float]:
        """Of each tower in use, on what share of this rank's rows it was run in the `steps` since the last call."""
        rows = max(1, steps * self.config.train.global_batch // self.world.world_size)
        found = {name: cache.computed / rows for name, cache in self.open.items()}
        for cache in self.open.values():
            cache.computed = 0
        return found

    def spared_flops(self, shares: dict[str, float]) -> float:
        """Operations of a step that were not done, with such shares on all ranks."""
        spared = sum(self._flops[name] * (1 - share) for name, share in shares.items() if name in self._flops)
        return self.config.train.global_batch * spared

    def sync(self) -> None:
        """Before a checkpoint: what its steps computed must be there for a start that goes on from it."""
        for cache in self.open.values():
            cache.own.sync()

    def close(self) -> None:
        for cache in self.open.values():
            cache.own.close()
        self.open.clear()


def _files(folder: Path) -> list[tuple[int, int, str]]:
    """(epoch, rank, name)"""
    paths: Iterator[Path] = folder.iterdir() if folder.exists() else iter(())
    return [(int(match[1]), int(match[2]), match[0]) for path in paths if (match := NAME.fullmatch(path.name))]
