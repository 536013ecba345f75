"""What the launcher asks for is either trained with, or refused in one line before anything is loaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdist.config import load_config
from clipdist.errors import UserError
from clipdist.model.towers import ImageTower, ImageTowerConfig
from clipdist.train.config import check
from clipdist.train.fully_sharded import units
from clipdist.train.launched import deepspeed_config, kind, make_accelerator

Recipe = Callable[..., Path]
ROOT = Path(__file__).parents[2]
DEEPSPEED = sorted((ROOT / "launch" / "deepspeed").glob("*.json"))
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def say(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return say


def deepspeed(said: Callable[..., None], folder: Path, body: Any) -> None:
    path = folder / "ds.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    said(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path))


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        check(load_config(path, list(words)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_launcher_there_are_replicas(said: Callable[..., None]) -> None:
    assert kind() == "replicated"
    said(ACCELERATE_USE_FSDP="false")
    assert kind() == "replicated"
    said(ACCELERATE_USE_FSDP="true")
    assert kind() == "fsdp"
    said(ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(UserError, match="FSDP and DeepSpeed at once"):
        kind()


def test_accelerate_itself_is_not_told(said: Callable[..., None]) -> None:
    """It would read the engine's settings, or, without GPUs, forget them; and what it is not told is still there."""
    said(**FSDP)
    assert str(make_accelerator("fp32").distributed_type).endswith("NO")
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("FSDP_VERSION", "1", "asks for FSDP 1; set fsdp_version: 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing is not followed"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer", "fsdp_transformer_layer_cls_to_wrap is not followed"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params needs GPUs"),
    ],
)
def test_of_fsdp(variable: str, value: str, told: str, said: Callable[..., None], recipe: Recipe) -> None:
    said(**FSDP)
    check(load_config(recipe(), []))
    said(**{variable: value})
    assert told in refused(recipe())


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_our_files_are_taken_and_completed(path: Path, said: Callable[..., None], recipe: Recipe) -> None:
    said(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path), WORLD_SIZE="4")
    config = load_config(recipe(), ["train.max_grad_norm=0.5"])
    check(config)
    made = deepspeed_config(config)
    assert made["zero_optimization"]["stage"] == int(path.stem[4])
    assert (made["gradient_clipping"], made["train_micro_batch_size_per_gpu"], made["train_batch_size"]) == (0.5, 6, 24)
    assert json.loads(path.read_text())["gradient_clipping"] == "auto", "never left to DeepSpeed's 1.0"


ZERO = {"stage": 2}
LOCKED = ["model.text.cache_features=true", "train.stages=[{from_epoch: 0, text: none}]"]


@pytest.mark.parametrize(
    ("body", "words", "told"),
    [
        ("{", [], "expected JSON with zero_optimization.stage"),
        ({}, [], "expected JSON with zero_optimization.stage"),
        ({"zero_optimization": {"stage": 0}}, [], "stage=0, expected 1, 2 or 3"),
        ({"zero_optimization": ZERO, "bf16": {"enabled": True}}, [], "bf16: the recipe's optim and train.precision"),
        ({"zero_optimization": ZERO, "optimizer": {"type": "Adam"}}, [], "optimizer: the recipe's optim"),
        (
            {"zero_optimization": ZERO, "gradient_clipping": 2.0},
            [],
            "gradient_clipping=2.0, but the recipe makes it 1.0",
        ),
        ({"zero_optimization": ZERO, "train_batch_size": 7}, [], "train_batch_size=7, but the recipe makes it 24"),
        ({"zero_optimization": {**ZERO, "offload_param": {"device": "nvme"}}}, [], "offload_param.device=nvme"),
        ({"zero_optimization": {"stage": 3}}, ["train.ema=0.9"], "train.ema is not kept with ZeRO stage 3"),
        ({"zero_optimization": {"stage": 3}}, LOCKED, "model.text.cache_features needs towers that a rank can run"),
        ({"zero_optimization": ZERO}, ["train.compile=true"], "train.compile is not supported with DeepSpeed"),
    ],
)
def test_of_deepspeed(
    body: Any, words: list[str], told: str, said: Callable[..., None], recipe: Recipe, tmp_path: Path
) -> None:
    deepspeed(said, tmp_path, body)
    assert told in refused(recipe(), *words)


def test_a_deepspeed_file_that_is_not_there(said: Callable[..., None], recipe: Recipe, tmp_path: Path) -> None:
    said(ACCELERATE_USE_DEEPSPEED="true")
    assert "names no deepspeed_config_file" in refused(recipe())
    said(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "nowhere.json"))
    assert "cannot be read (No such file or directory)" in refused(recipe())


def test_a_deepspeed_that_is_not_installed(
    said: Callable[..., None], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed(said, tmp_path, {"zero_optimization": ZERO})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "DeepSpeed, which is not installed" in refused(recipe())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "resnet18"])
def test_a_block_is_a_unit(name: str) -> None:
    """Inner ones first, and no unit that is the whole tower."""
    tower = ImageTower(ImageTowerConfig(name=f"timm:{name}", side=64))
    found = units(tower)
    assert len(found) >= 2
    assert tower not in found
    assert tower.model not in found
    for number, unit in enumerate(found):
        assert not set(unit.modules()).intersection(found[number + 1 :]), "an inner one comes later"
