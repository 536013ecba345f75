# mypy: allow-untyped-defs
"""The work of the contrastive losses on an NVIDIA GPU, in Triton: what `tiles.py` does, with logits in registers alone.

b = rows on this rank, B = rows in the global batch, D = width, s = runs of columns that are worked on side by side.

One kernel goes over the logits of some rows of one side with all rows of the other, and is launched once per direction.
The price of that plainness: logits of a rank's own square of b × b, which serve both directions, are computed twice. On
one GPU that makes six products of B × B × D where four would do; on W GPUs six of b × B × D where 6 − 2/W would.

A sum over columns is kept by one program, or by s of them whose parts are added up in a fixed order; nothing is added
atomically, so the same shapes on the same GPU give the same bits as long as the same configuration is chosen. Triton
measures the configurations the first time that it meets a width and a dtype and keeps the choice in its cache folder;
another choice rounds differently.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from clipdist.loss.tiles import Sides

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# Probabilities are multiplied by this before they become operands of half precision: of a large batch most lie below
# fp16's smallest normal number. A power of two changes no mantissa, and 2^14 (1 + 1) stays below fp16's largest.
UNIT = tl.constexpr(2.0**14)

# Rows and columns of the part on which a new kernel's configurations are measured: a million rows would take minutes.
TRIAL = (32768, 8192)
# Columns that a program should have at least, before a second one takes some of them; and runs at most.
LEAST_COLUMNS = 32 if INTERPRETED.value else 2048
MOST_RUNS = 16


def _config(rows: int, columns: int, depth: int, out: int, warps: int, stages: int) -> triton.Config:
    """`depth`: components of the features multiplied at a time; `out`: components of a pull that a program sums up."""
    blocks = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "OUT": out}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# A program that sums up OUT components of its rows' pulls needs their logits over all D: with D > OUT, D / OUT programs
# compute the same logits, in all (1 + D / OUT) / 2 times the arithmetic of one. The sums fill the registers (ROWS × OUT
# of them, 128 of a thread's 255), so 512 is the most, at 64 rows.
HALF = [
    _config(128, 128, 64, 128, 8, 3),
    _config(128, 128, 32, 128, 8, 4),
    _config(128, 64, 64, 256, 8, 3),
    _config(128, 64, 128, 256, 8, 2),
    _config(64, 64, 64, 256, 4, 3),
    _config(64, 64, 64, 512, 8, 3),
    _config(64, 64, 512, 512, 8, 2),
    _config(128, 64, 256, 256, 8, 2),
    _config(64, 64, 32, 128, 4, 3),
]
SINGLE = [
    _config(64, 64, 32, 128, 8, 2),
    _config(64, 32, 32, 128, 4, 2),
    _config(64, 64, 16, 64, 4, 3),
    _config(32, 32, 32, 128, 4, 2),
]
# Without sums to keep, a program has room for more logits.
HALF_SUMS = [
    _config(128, 256, 64, 0, 8, 3),
    _config(256, 128, 64, 0, 8, 3),
    _config(128, 128, 64, 0, 8, 3),
    _config(128, 128, 64, 0, 4, 3),
    _config(128, 128, 32, 0, 8, 4),
    _config(64, 128, 64, 0, 4, 3),
    _config(64, 64, 32, 0, 4, 3),
]
SINGLE_SUMS = [_config(128, 64, 32, 0, 8, 2), _config(64, 64, 32, 0, 4, 2), _config(64, 64, 16, 0, 4, 3)]
# The interpreter measures nothing; small blocks, so that small tests have several.
INTERPRETER = [_config(32, 32, 32, 64, 1, 1)]


def shared_bytes(config: triton.Config, width: int, itemsize: int) -> int:
    """At most how many bytes of shared memory a kernel takes for its operands: the innermost loop's wait in stages."""
    rows, columns, depth, out = (config.kwargs[name] for name in ("ROWS", "COLUMNS", "DEPTH", "OUT"))
    if depth < width:
        elements = config.num_stages * depth * (rows + columns) + columns * out
    else:  # the rows are held, and where `out` is as wide, the same columns serve both products
        elements = rows * depth + config.num_stages * columns * (depth if out in (0, depth) else depth + out)
    # Probabilities on their way from one product's layout to the other's are float32 at most.
    return itemsize * elements + (4 * rows * columns if out else 0)


def suitable(configs: list[triton.Config], width: int, itemsize: int, shared: int) -> list[triton.Config]:
    """Those of `configs` that fit into `shared` bytes with elements of `itemsize`, and whose blocks are not far wider
    than the features; if none does, the last one, the smallest."""
    widest = max(128, triton.next_power_of_2(width))

    def fits(config: triton.Config) -> bool:
        block = max(config.kwargs["DEPTH"], config.kwargs["OUT"])
        return block <= widest and shared_bytes(config, width, itemsize) <= shared

    fitting = [config for config in configs if fits(config)]
    return fitting or configs[-1:]


def _tuned(kernel: Any, half: list[triton.Config], single: list[triton.Config]) -> Any:
    """`kernel` with the configuration that is fastest on this GPU, for elements of two and of four bytes each."""

    def prune(_: list[triton.Config], __: dict[str, Any], *, own: Tensor, D: int, **___: Any) -> list[triton.Config]:
        limits = triton.runtime.driver.active.utils.get_device_properties(own.device.index)
        configs = half if own.element_size() == 2 else single
        return suitable(configs, D, own.element_size(), limits["max_shared_mem"])

    return triton.autotune(
        INTERPRETER if INTERPRETED.value else half + single,
        key=["D"],  # and, as Triton adds them, the tensors' dtypes
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )(kernel)


@triton.jit
def _components(features, stride, index, first, D: tl.constexpr, SIZE: tl.constexpr):
    """[len(index), SIZE]: components `first` and on of the rows `index`, zeros beyond D."""
    d = first + tl.arange(0, SIZE)
    # A row's offset may exceed 2^31: a million rows of 2 × 1024 components.
    where = features + index.to(tl.int64)[:, None] * stride + d[None, :]
    if D % SIZE == 0:
        found = tl.load(where)
    else:
        found = tl.load(where, mask=(d < D)[None, :], other=0.0)
    return found


@triton.jit
def _multiply(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED:  # it would multiply the bits of bfloat16 as whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _products(
    own,
    own_stride,
    own_row,
    every,
    every_stride,
    every_row,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, COLUMNS] float32: products of rows of `own` with rows of `every`, not yet scaled."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, D, DEPTH):
        a = _components(own, own_stride, own_row, first, D, DEPTH)
        b = _components(every, every_stride, every_row, first, D, DEPTH)
        sums = _multiply(a, tl.trans(b), sums, PRECISION)
    return sums


@triton.jit
def _keep_pull(parts, pulled, row, rows, D: tl.constexpr, OUT: tl.constexpr):
    """Stores this program's run and components of the pulls into `parts` [s, rows, D]."""
    d = tl.program_id(1) * OUT + tl.arange(0, OUT)
    line = tl.program_id(2).to(tl.int64) * rows + row
    tl.store(parts + line[:, None] * D + d[None, :], pulled / UNIT, mask=(row < rows)[:, None] & (d < D)[None, :])


# In all kernels: rows beyond the last are worked on as the last one again and never stored; columns beyond the run
# are masked after the product.


@triton.jit
def log_sum_exp_kernel(
    own,
    every,
    scale,
    parts,
    own_stride,
    every_stride,
    rows,
    columns,
    run,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """parts[s, i]: log Σ_j exp(scale·own_i·every_j) over the j of run s, −∞ for an empty run."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(2) * run
    end = tl.minimum(begin + run, columns)
    per_product = tl.load(scale) * LOG2E
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own_row = tl.minimum(row, rows - 1)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        every_row = tl.minimum(column, columns - 1)
        z = _products(own, own_stride, own_row, every, every_stride, every_row, D, PRECISION, ROWS, COLUMNS, DEPTH)
        z = tl.where((column < end)[None, :], z * per_product, float("-inf"))
        now = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp2(largest - now) + tl.sum(tl.exp2(z - now[:, None]), 1)
        largest = now
    line = tl.program_id(2).to(tl.int64) * rows + row
    tl.store(parts + line, (largest + tl.log2(total)) * LN2, mask=row < rows)


@triton.jit
def softmax_pull_kernel(
    own,
    every,
    scale,
    own_lse,
    every_lse,
    parts,
    own_stride,
    every_stride,
    rows,
    columns,
    start,
    run,
    weight,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """parts[s, i]: Σ_j (p_ij − [j is i itself])·every_j over the j of run s; `start`: where `own` begins in `every`.

    The caller adds the own pair's 1: near it bfloat16 has steps of 1/256, and of a row that the model is sure of, the
    whole gradient is not larger.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(2) * run
    end = tl.minimum(begin + run, columns)
    per_product = tl.load(scale) * LOG2E
    own_row = tl.minimum(row, rows - 1)
    own_level = tl.load(own_lse + start + own_row) * LOG2E
    pulled = tl.zeros((ROWS, OUT), tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        every_row = tl.minimum(column, columns - 1)
        z = _products(own, own_stride, own_row, every, every_stride, every_row, D, PRECISION, ROWS, COLUMNS, DEPTH)
        z *= per_product
        level = tl.load(every_lse + every_row) * LOG2E
        p = weight * tl.exp2(z - own_level[:, None]) + (1 - weight) * tl.exp2(z - level[None, :])
        p = tl.where(column[None, :] == (start + row)[:, None], p - 1, p) * UNIT
        p = tl.where((column < end)[None, :], p, 0.0)
        values = _components(every, every_stride, every_row, tl.program_id(1) * OUT if D > OUT else 0, D, OUT)
        pulled = _multiply(p.to(values.dtype), values, pulled, PRECISION)
    _keep_pull(parts, pulled, row, rows, D, OUT)


@triton.jit
def sigmoid_kernel(
    own,
    every,
    scale,
    bias,
    group,
    losses,
    sums,
    parts,
    own_stride,
    every_stride,
    rows,
    columns,
    start,
    run,
    D: tl.constexpr,
    LOSS: tl.constexpr,
    PULL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """Over the j of run s: with LOSS losses[s, i] = −Σ_j log σ(y_ij·z_ij) and sums[s, i] = Σ_j q_ij, with PULL
    parts[s, i] = Σ_j q_ij·every_j; z, y and q as in `tiles.sigmoid_sums`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(2) * run
    end = tl.minimum(begin + run, columns)
    scaled, shift = tl.load(scale), tl.load(bias)
    own_row = tl.minimum(row, rows - 1)
    identity = start + own_row
    if group is not None:
        identity = tl.load(group + identity)
    loss = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if PULL:
        pulled = tl.zeros((ROWS, OUT), tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        every_row = tl.minimum(column, columns - 1)
        z = _products(own, own_stride, own_row, every, every_stride, every_row, D, PRECISION, ROWS, COLUMNS, DEPTH)
        z = z * scaled + shift
        other = every_row
        if group is not None:
            other = tl.load(group + every_row)
        same = identity[:, None] == other[None, :]
        inside = (column < end)[None, :]
        signed = tl.where(same, z, -z)
        small = tl.exp2(-tl.abs(signed) * LOG2E)
        grown = 1 + small
        if LOSS:
            # log(1 + small) to the last bit: the rounding of 1 + small cancels in the quotient.
            spread = tl.where(grown == 1, small, tl.log(grown) * (small / (grown - 1)))
            loss += tl.sum(tl.where(inside, tl.maximum(-signed, 0.0) + spread, 0.0), 1)
        q = tl.where(signed >= 0, small, 1.0) / grown
        q = tl.where(inside, tl.where(same, -q, q), 0.0)
        if LOSS:
            total += tl.sum(q, 1)
        if PULL:
            values = _components(every, every_stride, every_row, tl.program_id(1) * OUT if D > OUT else 0, D, OUT)
            pulled = _multiply((q * UNIT).to(values.dtype), values, pulled, PRECISION)
    if LOSS:  # noqa: SIM102  (known when it is compiled, unlike the next)
        if tl.program_id(1) == 0:  # programs for other components have the same sums
            line = tl.program_id(2).to(tl.int64) * rows + row
            tl.store(losses + line, loss, mask=row < rows)
            tl.store(sums + line, total, mask=row < rows)
    if PULL:
        _keep_pull(parts, pulled, row, rows, D, OUT)


_log_sum_exp = _tuned(log_sum_exp_kernel, HALF_SUMS, SINGLE_SUMS)
_softmax_pull = _tuned(softmax_pull_kernel, HALF, SINGLE)
_sigmoid_loss = _tuned(sigmoid_kernel, HALF_SUMS, SINGLE_SUMS)
_sigmoid_pull = _tuned(sigmoid_kernel, HALF, SINGLE)
_measured: set[tuple[Any, ...]] = set()


class _Direction(NamedTuple):
    """Logits of `own_bD` with all of the other side, `every_BD`; `own` begins at row `start` of the global batch."""

    own_bD: Tensor
    every_BD: Tensor
    start: int
    run: int
    """Columns of a run."""

    @property
    def runs(self) -> int:
        return triton.cdiv(len(self.every_BD), self.run)

    def parts(self, *width: int) -> Tensor:
        """[s, b, *width] float32, not initialised."""
        return self.own_bD.new_empty((self.runs, len(self.own_bD), *width), dtype=torch.float32)


def _directions(sides: Sides) -> tuple[_Direction, _Direction]:
    """Images with texts, texts with images. Few rows on many multiprocessors: several runs of columns side by side, at
    the price of a part of the result for each."""
    device = sides.image_bD.device
    blocks = max(1, triton.cdiv(len(sides.image_bD), 128))
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    columns = len(sides.image_BD)
    runs = max(1, min(triton.cdiv(2 * processors, blocks), columns // LEAST_COLUMNS, MOST_RUNS))
    run = triton.cdiv(columns, runs)
    return (
        _Direction(_with_unit_stride(sides.image_bD), _with_unit_stride(sides.text_BD), sides.own.start, run),
        _Direction(_with_unit_stride(sides.text_bD), _with_unit_stride(sides.image_BD), sides.own.start, run),
    )


def _with_unit_stride(features: Tensor) -> Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def _launch(kernel: Any, direction: _Direction, pulls: bool, **arguments: Any) -> None:
    """Runs `kernel` over all rows and runs of columns, with `pulls` for every block of components; the first time that
    it meets a width and a dtype, before that on a part of the rows and columns, whose results the rest overwrites."""
    own, every, *_ = direction
    rows, width = own.shape
    if not rows:
        return
    sizes = [(rows, len(every), direction.run)]
    met = (kernel, width, own.dtype, *(getattr(argument, "dtype", None) for argument in arguments.values()))
    if met not in _measured:
        _measured.add(met)
        columns = min(TRIAL[1], len(every))
        sizes.insert(0, (min(TRIAL[0], rows), columns, triton.cdiv(columns, direction.runs)))
    for some_rows, some_columns, run in sizes:

        def grid(config: dict[str, int], some_rows: int = some_rows) -> tuple[int, int, int]:
            blocks = triton.cdiv(width, config["OUT"]) if pulls else 1
            return triton.cdiv(some_rows, config["ROWS"]), blocks, direction.runs

        with torch.cuda.device_of(own):
            kernel[grid](
                own=own,
                every=every,
                own_stride=own.stride(0),
                every_stride=every.stride(0),
                rows=some_rows,
                columns=some_columns,
                run=run,
                D=width,
                PRECISION=_precision(own.dtype),
                **arguments,
            )


def _precision(dtype: torch.dtype) -> str:
    """Whether products of float32 may be made of TF32's ten bits: as for every other product in PyTorch."""
    matmul = torch.backends.cuda.matmul
    # torch before 2.9 knows only `allow_tf32`; from then on the two ways must not be mixed.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def log_sum_exps(sides: Sides, scale: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As `tiles.log_sum_exps`, for features of float32, bfloat16 or float16; `shape` is of no meaning here."""
    found = []
    for direction in _directions(sides):
        parts = direction.parts()
        _launch(_log_sum_exp, direction, pulls=False, scale=scale, parts=parts)
        found.append(parts[0] if direction.runs == 1 else parts.logsumexp(0))
    return found[0], found[1]


def softmax_pulls(
    sides: Sides, scale: Tensor, row_lse_B: Tensor, column_lse_B: Tensor, weight: float, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """As `tiles.softmax_pulls`, for features of float32, bfloat16 or float16; `shape` is of no meaning here."""
    images, texts = _directions(sides)
    width = sides.image_bD.shape[1]
    found = []
    for direction, counterpart_bD, own_lse_B, every_lse_B, own_weight in (
        (images, sides.text_bD, row_lse_B, column_lse_B, weight),
        (texts, sides.image_bD, column_lse_B, row_lse_B, 1 - weight),
    ):
        parts = direction.parts(width)
        lse = {"own_lse": own_lse_B.contiguous(), "every_lse": every_lse_B.contiguous()}
        placed = {"start": direction.start, "weight": float(own_weight)}
        _launch(_softmax_pull, direction, pulls=True, scale=scale, parts=parts, **lse, **placed)
        found.append(_sum(parts).add_(counterpart_bD))
    return found[0], found[1]


def sigmoid_sums(
    sides: Sides, scale: Tensor, bias: Tensor, group_B: Tensor | None, shape: tuple[int, int], wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tiles.sigmoid_sums`, for features of float32, bfloat16 or float16; `shape` is of no meaning here."""
    images, texts = _directions(sides)
    width = sides.image_bD.shape[1]
    kernel = _sigmoid_pull if wants_grad else _sigmoid_loss
    losses, sums = images.parts(), images.parts()
    pulls = []
    for direction in (images, texts):
        is_image = direction is images
        # Without a gradient nothing is stored here, and of the texts no sums.
        parts = direction.parts(width) if wants_grad else losses
        if is_image or wants_grad:
            group = None if group_B is None else group_B.contiguous()
            outputs = {"losses": losses, "sums": sums, "parts": parts}
            flags = {"LOSS": is_image, "PULL": wants_grad, "start": direction.start}
            _launch(kernel, direction, wants_grad, scale=scale, bias=bias, group=group, **outputs, **flags)
        pulls.append(_sum(parts) if wants_grad else torch.zeros_like(sides.image_bD, dtype=scale.dtype))
    bias_grad = sums.sum() if wants_grad else scale.new_zeros(())
    return losses.sum(), pulls[0], pulls[1], bias_grad


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)
