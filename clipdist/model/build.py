"""From a configuration, or from a saved folder, to a model and its tokenizer."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from transformers import AutoConfig

from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError
from clipdist.model.classifier import Classifier, ClassifyConfig
from clipdist.model.dual_encoder import DualEncoder, ModelConfig
from clipdist.model.published import start_from, start_image_from
from clipdist.model.tower_model import TowerModel
from clipdist.model.towers import ImageTower, TextTower, resolve, text_source

Model = TypeVar("Model", bound=TowerModel)


def build_tokenizer(config: ModelConfig, captions: Iterable[str]) -> Tokenizer:
    """The tokenizer that the recipe names; `captions` are read only when it is to be trained on them."""
    text = config.text
    if text.tokenizer == "captions":
        return train_wordpiece(captions, text.vocabulary, text.max_tokens, text.fills)
    source = text_source(text) if text.tokenizer == "model" else str(resolve(text.tokenizer.removeprefix("hf:")))
    try:
        return Tokenizer.load(source, text.max_tokens, text.fills)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.text.tokenizer={text.tokenizer!r}: no tokenizer at {source} ({first}); "
            f"set model.text.tokenizer=captions to train one on the training captions"
        ) from None


def build_model(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> DualEncoder:
    """The model at step 0: published weights where the recipe says so, the rest drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = ImageTower(config.image)
        text = TextTower(config.text, vocabulary=len(tokenizer), pad_id=tokenizer.pad_id)
        model = DualEncoder(config, image, text)
    if config.init:
        start_from(model, config.init)
    return model


def build_classifier(config: ModelConfig, classify: ClassifyConfig, classes: int, seed: int) -> Classifier:
    """As `build_model`; of a published dual encoder it takes the image tower."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = ImageTower(config.image)
        model = Classifier(config, image, classes=classes, dropout=classify.dropout)
    if config.init:
        start_image_from(image, config.init)
    return model


def rebuild_classifier(config: ModelConfig, classify: ClassifyConfig, classes: int) -> Classifier:
    """An untrained model of the right shape for saved weights; asks no hub."""
    image = ImageTower(config.image, load_pretrained=False)
    return Classifier(config, image, classes=classes, dropout=classify.dropout)


def rebuild_model(config: ModelConfig, tokenizer: Tokenizer, text_config: Path) -> DualEncoder:
    """An untrained model of the right shape for saved weights; asks no hub."""
    stored = AutoConfig.from_pretrained(text_config)
    image = ImageTower(config.image, load_pretrained=False)
    text = TextTower(config.text, vocabulary=len(tokenizer), pad_id=tokenizer.pad_id, stored=stored)
    return DualEncoder(config, image, text)


def needs_whole_batch(model: TowerModel) -> bool:
    """Whether statistics of the batch are taken, which neither a rank's share nor a micro-batch knows."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return norms and model.image.batch_norm != "frozen"


def settle_batch_norm(model: Model, device: torch.device, ranks: int, micro_batches: int) -> Model:
    """Batch statistics over the global batch, so that the result depends neither on the number of ranks nor on how a
    rank's rows are embedded."""
    if ranks == micro_batches == 1 or not needs_whole_batch(model):
        return model
    if micro_batches > 1:
        raise UserError(
            "this image tower has batch normalisation, whose statistics are those of the whole batch, which "
            "train.micro_batch never has in memory; set model.image.batch_norm=frozen, train.micro_batch=0, or choose "
            "a tower with layer normalisation"
        )
    if device.type != "cuda":
        raise UserError(
            "this image tower has batch normalisation, whose statistics over several processes need GPUs; without: "
            "set model.image.batch_norm=frozen, launch one process, or choose a tower with layer normalisation"
        )
    model.image.model = convert_sync_batchnorm(model.image.model)
    return model


def copy_of_shape(model: Model, device: torch.device) -> Model:
    """The same modules and buffers, with parameters on `device` that are zero."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    copied: Model = copy.deepcopy(model, memo)
    return copied
