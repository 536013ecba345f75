"""What the doctor makes of a recipe: whether it holds together, how large its model is, whether its pairs are there.

These functions read files that may lie on a dead file system: the doctor calls them in a child process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from clipdist.cluster.doctor.findings import Finding
from clipdist.data.mixing import Mixture
from clipdist.data.shard_index import index_path
from clipdist.data.shards import MANIFEST, ShardInfo, ShardSet
from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.config import RunConfig
    from clipdist.model.dual_encoder import ModelConfig

FILES = 100
"""Of a shard set that are looked at, evenly over all."""
NAMED = 3
ASSUMED_PARAMETERS = 200_000_000
"""Of a model whose text tower is not on this machine yet: one of BERT's base size, and an image tower as large."""


class ModelSize(NamedTuple):
    parameters: int
    unknown: str
    """Why it is not known, and `ASSUMED_PARAMETERS` are taken; empty: it is counted."""


def check_recipe(config: "RunConfig", ranks: int) -> Finding:
    """Raises `UserError` for what training would refuse on so many ranks before it loads anything."""
    from clipdist.train.config import check

    if config.train.processes and config.train.processes != ranks:
        raise UserError(
            f"train.processes={config.train.processes}, but {ranks} are to be launched; launch as many, or set "
            f"train.processes=0"
        )
    check(config, processes=ranks)
    rows = config.train.global_batch // ranks
    what = "pairs" if config.objective == "contrastive" else "images"
    return Finding("recipe", "ok", f"{config.name}: {config.train.global_batch:,} {what} a step, {rows:,} a process")


def run_model_size(config: "RunConfig") -> ModelSize:
    """Of what the recipe trains. A classifier is counted without its head, since only the set knows its classes."""
    return model_size(config.model, images_alone=config.objective == "classify")


def model_size(config: "ModelConfig", images_alone: bool = False) -> ModelSize:
    """Builds the model without memory, and without asking the hub; `images_alone`: its image tower.

    Raises `UserError` for what the towers refuse: a wrong name, wrong options, weights in a package that is missing.
    """
    from clipdist.model.dual_encoder import DualEncoder
    from clipdist.model.towers import ImageTower, TextTower, resolve

    if isinstance(config.image.pretrained, str) and not resolve(config.image.pretrained).exists():
        raise UserError(f"model.image.pretrained: no file {config.image.pretrained}")
    stored, unknown = (None, "") if images_alone else _stored_text_config(config)
    if unknown:
        return ModelSize(ASSUMED_PARAMETERS, unknown)
    try:
        with torch.device("meta"):
            image = ImageTower(config.image, load_pretrained=False)
            if images_alone:
                return ModelSize(sum(parameter.numel() for parameter in image.parameters()), "")
            # A tokenizer that is trained may come out smaller than it may be.
            text = TextTower(config.text, vocabulary=config.text.vocabulary, pad_id=0, stored=stored)
            model = DualEncoder(config, image, text)
    except UserError:
        raise
    except Exception as error:  # some towers look at numbers while they are built, and here there are none
        return ModelSize(ASSUMED_PARAMETERS, f"it cannot be built without its weights ({type(error).__name__})")
    return ModelSize(sum(parameter.numel() for parameter in model.parameters()), "")


def _stored_text_config(config: "ModelConfig") -> tuple[Any, str]:
    """The configuration of a published text tower as this machine has it, None for one from scratch; and why there is
    none where there should be."""
    import transformers

    from clipdist.model.towers import text_source

    source = text_source(config.text)
    if not config.text.pretrained and source in transformers.CONFIG_MAPPING:
        return None, ""
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True, **config.text.options), ""
    except (OSError, ValueError):
        return None, f"{config.text.name} is not on this machine"


def check_model(size: ModelSize) -> Finding:
    if size.unknown:
        return Finding(
            "model",
            "warn",
            f"{size.unknown}; taken for {size.parameters / 1e6:,.0f} million parameters. Compute nodes often reach no "
            f"hub: start the run once where there is a network, such as the login node, so that it is in the cache",
        )
    return Finding("model", "ok", f"{size.parameters / 1e6:,.1f} million parameters")


def needed_bytes(config: "RunConfig", parameters: int) -> int:
    """What a run writes: `keep` checkpoints and the one under way, each of weights, AdamW's two averages and that of
    `train.ema`, all float32; and the best model, a new one beside the old."""
    copies = 3 + bool(config.train.ema)
    return 4 * parameters * ((config.checkpoint.keep + 1) * copies + 2)


def check_data(config: "RunConfig") -> Finding:
    """Raises `UserError` when the sets cannot be opened, lack the recipe's splits, or have too few samples for a batch.

    Nothing is indexed: tars without a manifest are told of, since training would index them first.
    """
    locations = [config.data.set] if config.data.set else [entry.set for entry in config.data.mix]
    for location in locations:
        if foreign := _foreign_tars(location):
            return foreign
    data = Mixture.open(config.data)
    train = data.training(config.data.train_split)
    splits = [train, *([data.validation(config.data.val_split)] if config.data.val_split else [])]
    if not config.data.balance:  # that would read every sample
        config.order(train)
    told = ", ".join(f"{split.name} {len(split):,}" for split in splits)
    shards = [(one, info) for one in data.sets for name in one.manifest.splits for info in one.manifest.splits[name]]
    if any(one.remote for one in data.sets):
        return Finding("shard set", "ok", f"{data.folder}: samples: {told}; files behind a URL are not looked at")
    some = shards if len(shards) <= FILES else [shards[n * len(shards) // FILES] for n in range(FILES)]
    if faults := _faults(some):
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise UserError(
            f"{data.folder}: of {len(some):,} shards looked at ({len(shards):,} in all), {len(faults):,} are not what "
            f"the manifest says: {'; '.join(faults[:NAMED])}{more}; copy the set again, or run: clipdist verify "
            f"{data.folder}"
        )
    looked = f"all {len(shards):,} files" if len(some) == len(shards) else f"{len(some)} of {len(shards):,} files"
    return Finding("shard set", "ok", f"{data.folder}: samples: {told}; {looked} are there in the manifest's size")


def _foreign_tars(location: str) -> Finding | None:
    from clipdist.data.sets.writer import UNFINISHED

    folder = Path(location)
    if "://" in location or not folder.is_dir() or (folder / MANIFEST).exists() or (folder / UNFINISHED).exists():
        return None
    number = sum(path.name.endswith((".tar", ".tar.zst")) for path in folder.iterdir())
    if not number:
        return None
    return Finding(
        "shard set",
        "warn",
        f"{location}: {number:,} tars without an index, which training makes first while all GPUs wait; run: clipdist "
        f"index {location}",
    )


def _faults(shards: Sequence[tuple[ShardSet, ShardInfo]]) -> list[str]:
    faults = []
    for one, info in shards:
        path = one.folder / info.file
        try:
            size = path.stat().st_size
            index_path(path).stat()
        except OSError as error:
            faults.append(f"{Path(error.filename).name}: {error.strerror}")
        else:
            if size != info.bytes:
                faults.append(f"{info.file}: {size:,} bytes where the manifest has {info.bytes:,}")
    return faults
