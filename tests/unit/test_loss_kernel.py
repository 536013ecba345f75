"""The kernel against PyTorch's tiles: its logic through Triton's interpreter, its compilation for GPUs that are not
here, and, where there is one, on a GPU."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.errors import UserError
from clipdist.loss import ContrastiveLoss, backend, tiles

pytest.importorskip("triton", reason="the kernel needs Triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipdist.loss import kernel
from tests.unit.kernel_cases import CASES, LARGE, WHOLE

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(kernel.INTERPRETED.value, reason="TRITON_INTERPRET is set: nothing is compiled")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

Answers = dict[str, dict[str, float]]


def answers(device: str, **environment: str) -> Answers:
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernel_cases", device],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def interpreted() -> Answers:
    return answers("cpu", TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *WHOLE])
def test_the_interpreted_kernel_agrees_with_the_tiles(case: str, interpreted: Answers) -> None:
    apart = {quantity: error for quantity, error in interpreted[case].items() if not error <= 1}
    assert not apart, "errors as multiples of what is tolerated"


@pytest.fixture(scope="module")
def on_a_gpu() -> Answers:
    return answers("cuda")


@needs_gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE, *WHOLE])
def test_the_kernel_on_a_gpu_agrees_with_the_tiles(case: str, on_a_gpu: Answers) -> None:
    apart = {quantity: error for quantity, error in on_a_gpu[case].items() if not error <= 1}
    assert not apart, "errors as multiples of what is tolerated"


@needs_gpu
def test_the_kernel_gives_the_same_bits_every_time() -> None:
    sides, _ = LARGE["bfloat16, D 512"].sides("cuda")
    scale = torch.tensor(50.0, device="cuda")
    rows, columns = kernel.log_sum_exps(sides, scale, (0, 0))
    lse_B = torch.cat([rows, columns, rows])  # of no meaning, but fixed
    once, again = (kernel.softmax_pulls(sides, scale, lse_B, lse_B, 0.5, (0, 0)) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


# Bytes of shared memory that one program may have: A100, H100.
SHARED = {80: 166912, 90: 232448}
KERNELS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "lse": (kernel.log_sum_exp_kernel, {}, False),
    "softmax": (kernel.softmax_pull_kernel, {}, True),
    "sigmoid": (kernel.sigmoid_kernel, {"LOSS": True, "PULL": True}, True),
    "sigmoid loss": (kernel.sigmoid_kernel, {"LOSS": True, "PULL": False}, False),
}
POINTERS = {"own": "half", "every": "half", "group": "*i64"}
NUMBERS = {"own_stride", "every_stride", "rows", "columns", "start", "run"}


def compiled(name: str, config: triton.Config, architecture: int, width: int, half: str) -> Any:
    """What Triton and ptxas make of a kernel for a GPU that need not be here."""
    function, flags, _ = KERNELS[name]
    constants = {"D": width, "PRECISION": "ieee", **flags, **config.kwargs}
    signature, attributes = {}, {}
    for number, argument in enumerate(function.arg_names):
        kind = POINTERS.get(argument, "*fp32").replace("half", f"*{half}")
        if argument in constants:
            kind = "constexpr"
        elif argument in NUMBERS:
            kind = "i32"
        elif argument == "weight":
            kind = "fp32"
        signature[argument] = kind
        if kind.startswith("*") or argument.endswith("stride"):
            attributes[number,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options)


@needs_compiler
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_a_gpu_that_is_not_here(
    name: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = kernel.suitable(kernel.HALF if KERNELS[name][2] else kernel.HALF_SUMS, 512, 2, SHARED[architecture])[0]
    made = compiled(name, config, architecture, 512, "bf16")
    assert made.asm["cubin"]
    assert 0 < made.metadata.shared <= SHARED[architecture]
    assert {80: "mma.sync", 90: "wgmma"}[architecture] in made.asm["ptx"], "products go to the tensor cores"
    assert not re.search(r"\batom\.", made.asm["ptx"])
    assert not re.search(r"\bred\.", made.asm["ptx"]), "nothing is added in an order that may change"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_every_configuration_fits_as_estimated(
    name: str, architecture: int, element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pulls, itemsize = KERNELS[name][2], 4 if element == "fp32" else 2
    configs = {(True, 2): kernel.HALF, (True, 4): kernel.SINGLE, (False, 2): kernel.HALF_SUMS}
    for config in kernel.suitable(
        configs.get((pulls, itemsize), kernel.SINGLE_SUMS), 768, itemsize, SHARED[architecture]
    ):
        made = compiled(name, config, architecture, 768, element)
        assert made.metadata.shared <= kernel.shared_bytes(config, 768, itemsize) <= SHARED[architecture], str(config)


def test_where_the_kernel_cannot_run_it_says_why() -> None:
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    with pytest.raises(UserError, match=r"loss\.backend=kernel cannot run here: .* device cpu, expected an NVIDIA GPU"):
        ContrastiveLoss(backend="kernel")(features, features, torch.tensor(10.0))
    with pytest.raises(UserError, match=r"the features are float64, expected one of float32, bfloat16, float16"):
        ContrastiveLoss(backend="kernel")(features.double(), features.double(), torch.tensor(10.0))
    with pytest.raises(UserError, match=r"loss\.backend='triton', expected auto, tiles, kernel"):
        ContrastiveLoss(backend="triton")  # type: ignore[arg-type]


class OnGPU:
    """Features as the choice sees them on a GPU of compute capability 7.5."""

    device, dtype, is_cuda = torch.device("cuda", 0), torch.float16, True


def test_a_gpu_without_the_kernel_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    backend._obstacle.cache_clear()
    backend._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "clipdist.loss.backend"):
        chosen = [backend.choose("auto", OnGPU()) for _ in range(3)]  # type: ignore[arg-type]
    backend._obstacle.cache_clear()
    assert chosen == [tiles] * 3
    (record,) = caplog.records
    assert "compute capability 7.5, expected at least 8.0" in record.getMessage()


def test_a_cpu_has_the_tiles_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert backend.choose("auto", torch.zeros(2, 3)) is tiles
    assert not caplog.records
