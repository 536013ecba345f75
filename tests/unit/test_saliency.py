"""The attention filter: equal to attention computed by hand, weights from files, slides looked at once."""

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clipdist.data.shards import checksum_file
from clipdist.errors import UserError
from clipdist.prepare.saliency import AttentionFilter, attention_of_slides
from tests.unit.pictures import picture

NAME = "test_vit"


@pytest.fixture(scope="module")
def looked() -> AttentionFilter:
    torch.manual_seed(0)
    return AttentionFilter(NAME, False, side=64)


def images(count: int = 3, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, pixels: Tensor) -> Tensor:
    """Mean over heads of softmax(q·k/√d) from the class token to the patches of the last block, [b, patches]."""
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    attention = model.blocks[-1].attn
    batch, count, width = tokens.shape
    d = width // attention.num_heads
    q, k, _ = attention.qkv(model.blocks[-1].norm1(tokens)).view(batch, count, 3, attention.num_heads, d).unbind(2)
    q, k = attention.q_norm(q), attention.k_norm(k)
    logits = torch.einsum("bhd,bthd->bht", q[:, 0], k) / d**0.5
    patches = logits.softmax(-1).mean(1)[:, model.num_prefix_tokens :]
    return patches / patches.sum(1, keepdim=True)


@torch.no_grad()
def test_attention_equals_what_is_computed_by_hand(looked: AttentionFilter) -> None:
    pixels = looked.tower.normalise(images())
    expected = by_hand(looked.tower.model, pixels)
    found = looked.attention(images())
    assert found.shape == (3, 16)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(3))


@torch.no_grad()
def test_register_tokens_are_no_patches() -> None:
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2"
    looked = AttentionFilter(name, False, side=28)
    assert looked.attention(images(2, 28)).shape == (2, 4)
    expected = by_hand(looked.tower.model, looked.tower.normalise(images(2, 28)))
    torch.testing.assert_close(looked.attention(images(2, 28)), expected, rtol=1e-5, atol=1e-7)


def test_the_share_counts_patches_above_so_many_even_shares(looked: AttentionFilter) -> None:
    attention = looked.attention(images())
    for threshold in (0.5, 0.97, 1.0, 1.03):
        looked.threshold = threshold
        expected = (attention > threshold / 16).float().mean(1)
        assert torch.equal(looked.share(images()), expected)
    looked.threshold = 1e-6
    assert looked.share(images()).tolist() == [1, 1, 1]
    looked.threshold = 17
    assert looked.share(images()).tolist() == [0, 0, 0]
    looked.threshold = 0.5


def attends_to_its_middle(looked: AttentionFilter, sharpness: float) -> None:
    """Makes the last layer's attention prefer patches by their place alone."""
    attention: Any = looked.tower.model.blocks[-1].attn  # type: ignore[union-attr,index]
    with torch.no_grad():
        attention.qkv.weight.mul_(sharpness)


def test_attention_that_gathers_on_few_patches_gives_a_small_share() -> None:
    torch.manual_seed(0)
    even, sharp = AttentionFilter(NAME, False, side=64), AttentionFilter(NAME, False, side=64)
    attends_to_its_middle(even, 0.0)
    attends_to_its_middle(sharp, 200.0)
    assert even.share(images()).tolist() == [1, 1, 1]
    assert max(sharp.share(images()).tolist()) < 0.7


@pytest.mark.parametrize("form", ["timm", "safetensors", "dino", "wrapped"])
def test_weights_come_from_files(tmp_path: Path, form: str, looked: AttentionFilter) -> None:
    torch.manual_seed(3)
    weights = timm.create_model(NAME, num_classes=0, img_size=64).state_dict()
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(weights, path)
    elif form == "dino":  # as DINO saves it: a student, too, a head, and prefixes of its wrappers
        teacher = {f"backbone.{key}": value for key, value in weights.items()}
        student = {f"module.{key}": torch.zeros_like(value) for key, value in teacher.items()}
        torch.save(
            {
                "student": student,
                "teacher": {**teacher, "head.mlp.0.weight": torch.ones(2)},
                "epoch": 3,
                # Its schedules are NumPy's, and so are the rates that its optimiser keeps.
                "optimizer": {"param_groups": [{"lr": np.linspace(0, 1, 3)[1], "weight_decay": np.float32(0.04)}]},
                "args": argparse.Namespace(arch="vit_small", output_dir=tmp_path, lr=5e-4),
            },
            path,
        )
    elif form == "wrapped":
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    else:
        torch.save(weights, path)
    loaded = AttentionFilter(NAME, str(path), side=64)
    state = loaded.tower.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert not torch.allclose(loaded.attention(images()), looked.attention(images()))


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class token that attends to patches"):
        AttentionFilter("test_convnext", False, side=64)
    with pytest.raises(UserError, match="no model 'vit_nothing'"):
        AttentionFilter("vit_nothing", False, side=64)
    with pytest.raises(UserError, match="attention: no file of weights"):
        AttentionFilter(NAME, str(tmp_path / "none.pth"), side=64)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"bad.pth cannot be read"):
        AttentionFilter(NAME, str(tmp_path / "bad.pth"), side=64)
    for name, foreign in (("namespaces", SimpleNamespace()), ("code", OrderedDict.fromkeys)):
        torch.save({"teacher": {}, "args": foreign}, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=r"holds .* besides weights") as raised:
            AttentionFilter(NAME, str(tmp_path / f"{name}.pth"), side=64)
        assert str(raised.value).isprintable()
    torch.save({"patch_embed.proj.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"do not fit timm:test_vit at side 64: \d+ missing, 1 of another shape"):
        AttentionFilter(NAME, str(tmp_path / "other.pth"), side=64)
    with pytest.raises(UserError, match="expected more than 0 even shares"):
        AttentionFilter(NAME, False, threshold=0)


def test_slides_are_looked_at_once(tmp_path: Path, looked: AttentionFilter, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        picture(number, (50, 50)).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.glob("*.png"))
    (shares,) = attention_of_slides([(tmp_path, paths)], looked)
    pixels = np.stack([np.asarray(Image.open(path).resize((64, 64), Image.Resampling.BICUBIC)) for path in paths])
    expected = looked.share(torch.from_numpy(pixels).permute(0, 3, 1, 2)).tolist()
    assert shares == dict(zip(["0.png", "1.png", "2.png"], expected, strict=True))
    assert json.loads((tmp_path / "attention.json").read_text())["shares"] == shares

    calls: list[int] = []
    once = AttentionFilter.shares
    monkeypatch.setattr(AttentionFilter, "shares", lambda self, paths: calls.append(len(paths)) or once(self, paths))
    assert list(attention_of_slides([(tmp_path, paths)], looked)) == [shares]
    assert calls == []
    picture(9, (60, 60)).save(paths[0])
    list(attention_of_slides([(tmp_path, paths)], looked))
    assert calls == [3]


def test_other_weights_under_the_same_name_are_looked_through_anew(tmp_path: Path) -> None:
    picture(0, (50, 50)).save(tmp_path / "0.png")
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        weights = timm.create_model(NAME, num_classes=0, img_size=64).state_dict()
        torch.save(weights, tmp_path / "weights.pth")
        looked = AttentionFilter(NAME, str(tmp_path / "weights.pth"), side=64, threshold=1.0)
        assert looked.source["checksum"] == checksum_file(tmp_path / "weights.pth")
        (shares,) = attention_of_slides([(tmp_path, [tmp_path / "0.png"])], looked)
        assert shares == {"0.png": looked.shares([tmp_path / "0.png"])[0]}
        found.append(shares)
    assert found[0] != found[1]
