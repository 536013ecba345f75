"""Checkpoints whose tensors lie in parts, each written by the rank that has it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from clipdist import world
from clipdist.cli import main
from clipdist.errors import UserError
from clipdist.train.checkpoint import CheckpointConfig, CheckpointSaver, newest_sound, read_checkpoint
from tests.distributed.ranks import run_ranks
from tests.e2e.test_bad_input import largest_file

STATE = {"digest": "00ff"}


def whole() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Sizes that no number of ranks divides, one element among them, and a buffer of integers."""
    generator = torch.Generator().manual_seed(3)
    model = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    moments = {
        name: {"exp_avg": value * 2, "step": torch.tensor(4.0), "average": value + 1} for name, value in model.items()
    }
    return model | {"counts": torch.arange(5)}, moments


SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "scale": (1,), "b.weight": (2, 3, 4)}


def in_parts(world_size: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    mesh = init_device_mesh("cpu", (world_size,))

    def part(tensor: torch.Tensor) -> Any:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.is_floating_point() and tensor.ndim else tensor

    model, moments = whole()
    divided = {name: {kind: part(value) for kind, value in kept.items()} for name, kept in moments.items()}
    return {name: part(tensor) for name, tensor in model.items()}, divided


def save_steps(rank: int, world_size: int, folder: str, in_background: bool) -> list[str]:
    """Saves twice, with other numbers, which change as soon as `save_parts` has returned; as training would."""
    saver = CheckpointSaver(Path(folder), CheckpointConfig(keep=1, in_background=in_background))
    model, moments = in_parts(world_size)
    for step in (1, 2):
        saver.save_parts(step, model, moments, STATE)
        for tensor in (*model.values(), *(value for kept in moments.values() for value in kept.values())):
            tensor.mul_(0)
        model, moments = in_parts(world_size)
    saver.wait()
    world.barrier()
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize(("world_size", "in_background"), [(2, True), (3, False)])
def test_parts_are_read_back_whole(world_size: int, in_background: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for names in run_ranks(world_size, save_steps, str(folder), in_background):
        assert names == ["latest", "step-00000002"]
    path = newest_sound(folder)
    assert path is not None
    assert len(list(path.glob("shard-*.safetensors"))) == world_size
    model, moments = whole()
    saved = read_checkpoint(path)
    assert saved.state == {"step": 2, **STATE}
    assert saved.weights.keys() == model.keys()
    assert all(torch.equal(saved.weights[name], tensor) for name, tensor in model.items())
    assert all(torch.equal(saved.averages[name], moments[name]["average"]) for name in moments)
    for name, kept in moments.items():
        assert set(saved.optimizer[name]) == {"exp_avg", "step"}
        assert all(torch.equal(saved.optimizer[name][kind], kept[kind]) for kind in ("exp_avg", "step"))
    one = tmp_path / "one.safetensors"
    assert main(["consolidate", str(tmp_path / "run"), "--out", str(one), "--averaged"]) == 0
    from safetensors.torch import load_file

    found = load_file(one)
    assert all(torch.equal(found[name], moments[name]["average"]) for name in moments)
    assert torch.equal(found["counts"], model["counts"])
    assert main(["consolidate", str(path), "--out", str(one)]) == 2, "nothing is written over"


def test_a_part_that_is_missing_or_damaged_is_noticed(tmp_path: Path) -> None:
    run_ranks(2, save_steps, str(tmp_path), True)
    path = tmp_path / "step-00000002"
    part = next(path.glob("shard-00002*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        newest_sound(tmp_path)
    part.unlink()
    assert main(["consolidate", str(path), "--out", str(tmp_path / "x.safetensors")]) == 2


def save_on_a_full_disk(rank: int, world_size: int, folder: str) -> list[str]:
    """The second rank's disk takes no file of this size."""
    saver = CheckpointSaver(Path(folder), CheckpointConfig(keep=2))
    small = {"w": distribute_tensor(torch.ones(8), init_device_mesh("cpu", (world_size,)), [Shard(0)])}
    saver.save_parts(1, small, {}, STATE)
    saver.wait()
    large = {"w": distribute_tensor(torch.ones(200_000), init_device_mesh("cpu", (world_size,)), [Shard(0)])}
    with largest_file(50_000) if rank else nullcontext():
        saver.save_parts(2, large, {}, STATE)
        saver.wait()
    world.barrier()
    return [str(saver.error), *sorted(path.name for path in Path(folder).iterdir())]


def test_a_disk_that_is_full_for_one_rank_ends_the_save_on_all(tmp_path: Path) -> None:
    for told, *names in run_ranks(2, save_on_a_full_disk, str(tmp_path)):
        assert told == f"{tmp_path}: cannot be written (File too large); free some space and run it again"
        assert names == ["latest", "step-00000001"]
    sums = json.loads((tmp_path / "step-00000001" / "checksums.json").read_text())
    assert "state.json" in sums
