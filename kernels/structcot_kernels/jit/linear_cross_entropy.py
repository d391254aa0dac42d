"""Kernels of the head's cross-entropy.

For one row with logits z and label y, everything is taken relative to the label's logit, d = z - z_y, which never leaves fp32:

    others = sum over j != y of exp(d_j),   loss = log(1 + others),   gradient of z_j = exp(d_j) / (1 + others), of z_y = the rest negated

The product's epilogue writes exp(d) where the logits would go, which leaves a library product to be done and a factor 1 / (1 + others) for
each row. A row whose `others` passes a bound would leave the range of its dtype: it is written again, relative to its largest logit and
scaled to a fixed total. Which rows those are is known on the device alone; nobody waits for it.

Legend: M rows of a call, m rows of a chunk, V vocabulary, D hidden, N blocks of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structcot_kernels.launch import HOPPER, arch_of, cdiv, launch, power_of_2

GROUP = tl.constexpr(16)
"""Row blocks that share a block of the weight while it lies in the cache: 2,048 rows, 21 MB at D = 5120 in bf16."""

LOWEST = tl.constexpr(-1e30)
"""What stands for the largest of no logits: finite, so that exp(-inf - LOWEST) is 0."""

ROWS, COLUMNS = tl.constexpr(4), tl.constexpr(1024)
"""Tile of a program where no matrices are multiplied."""

REPAIRED_TOTAL = tl.constexpr(1024.0)
"""What the exponentials of a repaired row add up to: far from overflow in fp16, and a share of 1 / V keeps its digits."""

BOUNDS = {torch.float32: 2.0**16, torch.bfloat16: 2.0**80, torch.float16: 2.0**10}
"""`others` beyond which a row is repaired: the range of the dtype, and in fp32 the digits of an exponential of a rounded difference."""

MAX_PARTIALS = 8192
"""Partial sums that a program holds at a time: 8 rows of the 594 blocks of 152,064 columns."""


def tile_of(dtype: torch.dtype, num_rows: int, arch: int) -> dict[str, int]:
    """Block sizes, warps and stages of the product; wider blocks would spill registers before Hopper, or where no tensor core helps."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_V": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
    few = num_rows <= 64
    wide = 256 if arch >= HOPPER else 128
    return {"BLOCK_M": 64 if few else 128, "BLOCK_V": wide, "BLOCK_D": 64, "num_warps": 4 if few else 8, "num_stages": 3}


def repair_tile(tile: dict[str, int]) -> dict[str, int]:
    """Half as wide, for the registers of a longer epilogue; a repair hardly ever has anything to do."""
    return {**tile, "BLOCK_V": tile["BLOCK_V"] // 2}


def exponentials(
    hidden_mD: Tensor, weight_VD: Tensor, labels_m: Tensor, exp_mV: Tensor | None, losses_m: Tensor, scale_m: Tensor | None
) -> None:
    """Write the losses of a chunk, and, where a gradient is wanted, `exp_mV` and `scale_m`, whose product is the gradient of the logits.

    A label outside [0, V) reads nothing; its row becomes nan.
    """
    num_rows, num_columns = hidden_mD.shape[0], weight_VD.shape[0]
    tile = tile_of(hidden_mD.dtype, num_rows, arch_of(hidden_mD))
    target_m = target_logits(hidden_mD, weight_VD, labels_m)
    operands = (hidden_mD, weight_VD, labels_m, target_m)
    exp_stride = 0 if exp_mV is None else exp_mV.stride(0)
    sizes = (num_rows, num_columns, hidden_mD.shape[1], hidden_mD.stride(0), weight_VD.stride(0), exp_stride)
    row_blocks, num_blocks = cdiv(num_rows, tile["BLOCK_M"]), cdiv(num_columns, tile["BLOCK_V"])
    partial_2Nm = target_m.new_empty((2, num_blocks, num_rows))
    repair_2m = None if exp_mV is None else target_m.new_empty((2, num_rows))
    launch(exp_kernel, (row_blocks * num_blocks,), *operands, exp_mV, partial_2Nm, *sizes, HAS_GRAD=exp_mV is not None, **tile)
    reduce_rows(partial_2Nm, labels_m, target_m, exp_mV, losses_m, scale_m, repair_2m, num_columns)
    if exp_mV is not None:
        tile = repair_tile(tile)
        grid = (row_blocks * cdiv(num_columns, tile["BLOCK_V"]),)
        launch(repair_kernel, grid, hidden_mD, weight_VD, labels_m, repair_2m, exp_mV, *sizes, **tile)


def target_logits(hidden_mD: Tensor, weight_VD: Tensor, labels_m: Tensor) -> Tensor:
    """Logit of each row's label (m,), in fp32."""
    target_m = hidden_mD.new_empty(hidden_mD.shape[0], dtype=torch.float32)
    sizes = (*hidden_mD.shape, weight_VD.shape[0], hidden_mD.stride(0), weight_VD.stride(0))
    grid = (cdiv(hidden_mD.shape[0], ROWS.value),)
    launch(target_kernel, grid, hidden_mD, weight_VD, labels_m, target_m, *sizes)
    return target_m


def reduce_rows(
    partial_2Nm: Tensor,
    labels_m: Tensor,
    target_m: Tensor,
    exp_mV: Tensor | None,
    losses_m: Tensor,
    scale_m: Tensor | None,
    repair_2m: Tensor | None,
    num_columns: int,
) -> None:
    """Add up the blocks of every row, and write what follows from the sum."""
    _, num_blocks, num_rows = partial_2Nm.shape
    block_N = power_of_2(num_blocks)
    block_M = max(1, MAX_PARTIALS // block_N)
    tensors = (partial_2Nm, labels_m, target_m, exp_mV, losses_m, scale_m, repair_2m)
    exp_stride, bound = (0, 0.0) if exp_mV is None else (exp_mV.stride(0), BOUNDS[exp_mV.dtype])
    meta = {"BOUND": bound, "HAS_GRAD": exp_mV is not None, "BLOCK_M": block_M, "BLOCK_N": block_N, "num_warps": 16}
    launch(row_kernel, (cdiv(num_rows, block_M),), *tensors, num_rows, num_columns, num_blocks, exp_stride, **meta)


def scale_rows(rows_MD: Tensor, scale_M: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`rows_MD` times `scale_M` (M,), times `factor` (), both fp32 and either may be missing, rounded once to `dtype`."""
    num_rows, num_columns = rows_MD.shape
    out_MD = rows_MD.new_empty(rows_MD.shape, dtype=dtype)
    grid = (cdiv(num_rows, ROWS.value), cdiv(num_columns, COLUMNS.value))
    tensors, sizes = (rows_MD, scale_M, factor, out_MD), (num_rows, num_columns, rows_MD.stride(0))
    launch(scale_kernel, grid, *tensors, *sizes, HAS_SCALE=scale_M is not None, HAS_FACTOR=factor is not None)
    return out_MD


@triton.jit
def target_kernel(hidden_ptr, weight_ptr, labels_ptr, target_ptr, num_rows, inner, num_columns, hidden_stride, weight_stride):
    """One program for ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    labels = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
    valid = (labels >= 0) & (labels < num_columns)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = valid[:, None] & (columns < inner)[None, :]
        hidden = tl.load(hidden_ptr + rows[:, None] * hidden_stride + columns[None, :], mask=inside, other=0.0)
        weight = tl.load(weight_ptr + labels[:, None] * weight_stride + columns[None, :], mask=inside, other=0.0)
        total += hidden.to(tl.float32) * weight.to(tl.float32)
    target = tl.where(valid, tl.sum(total, axis=1), float("nan"))
    tl.store(target_ptr + rows, target, mask=rows < num_rows)


@triton.jit
def block_of_program(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """Row block and column block of this program: GROUP row blocks go through the vocabulary side by side."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_V)
    first = program // (GROUP * column_blocks) * GROUP
    together = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return first + within % together, within // together


@triton.jit
def block_logits(hidden_ptr, weight_ptr, rows, columns, num_rows, num_columns, inner, hidden_stride, weight_stride, BLOCK_D: tl.constexpr):
    """Logits (BLOCK_M, BLOCK_V) in fp32."""
    steps = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows[:, None] * hidden_stride + steps[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * weight_stride + steps[:, None]
    logits = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, inner, BLOCK_D):
        left = steps < inner - start
        hidden = tl.load(hidden_ptrs, mask=(rows < num_rows)[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=(columns < num_columns)[None, :] & left[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return logits


@triton.jit
def exp_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    target_ptr,
    exp_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    inner,
    hidden_stride,
    weight_stride,
    exp_stride,
    HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for a block: its largest logit, the sum of exponentials relative to that, then those relative to the label's logit."""
    row_block, column_block = block_of_program(num_rows, num_columns, BLOCK_M, BLOCK_V)
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = block_logits(hidden_ptr, weight_ptr, rows, columns, num_rows, num_columns, inner, hidden_stride, weight_stride, BLOCK_D)
    labels = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
    is_other = (columns < num_columns)[None, :] & (columns.to(tl.int32)[None, :] != labels.to(tl.int32)[:, None])
    logits = tl.where(is_other, logits, float("-inf"))
    largest = tl.maximum(tl.max(logits, axis=1), LOWEST)
    exponentials = tl.exp(logits - largest[:, None])
    partial_ptrs = partial_ptr + column_block * num_rows + rows
    tl.store(partial_ptrs, largest, mask=rows < num_rows)
    tl.store(partial_ptrs + tl.cdiv(num_columns, BLOCK_V) * num_rows, tl.sum(exponentials, axis=1), mask=rows < num_rows)
    if HAS_GRAD:
        # The label's own column is 0 for now, and what is too large will be written again.
        exponentials *= tl.exp(largest - tl.load(target_ptr + rows, mask=rows < num_rows, other=0.0))[:, None]
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        exp_ptrs = exp_ptr + rows[:, None] * exp_stride + columns[None, :]
        tl.store(exp_ptrs, exponentials.to(exp_ptr.dtype.element_ty), mask=inside)


@triton.jit
def log1p_small(x):
    """log(1 + x) for x in [0, 1], right to the last bits: 2 artanh(x / (2 + x)) by its series, of which seven terms leave 2e-9."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 1.0 / 15.0
    for index in tl.static_range(6, -1, -1):  # type: ignore[misc]
        series = series * square + 1.0 / (2 * index + 1)
    return 2.0 * ratio * series


@triton.jit
def row_kernel(
    partial_ptr,
    labels_ptr,
    target_ptr,
    exp_ptr,
    losses_ptr,
    scale_ptr,
    repair_ptr,
    num_rows,
    num_columns,
    num_blocks,
    exp_stride,
    BOUND: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for BLOCK_M rows: loss, scale, the label's entry, and of a repair the largest logit and the factor (0: none)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.arange(0, BLOCK_N)[:, None]
    inside = (blocks < num_blocks) & (rows < num_rows)[None, :]
    partial_ptrs = partial_ptr + blocks * num_rows + rows[None, :]
    peaks = tl.load(partial_ptrs, mask=inside, other=LOWEST)
    sums = tl.load(partial_ptrs + num_blocks * num_rows, mask=inside, other=0.0)
    largest = tl.max(peaks, axis=0)
    total = tl.sum(sums * tl.exp(peaks - largest[None, :]), axis=0)  # type: ignore[index]
    top = largest - tl.load(target_ptr + rows, mask=rows < num_rows, other=0.0)
    others = total * tl.exp(top)  # infinite for a hopeless row, of which `top` and `total` say enough
    many = others > 1.0  # type: ignore[operator]
    ratio = tl.where(many, 1.0 / tl.maximum(others, 1.0), others)
    losses = tl.where(many, top + tl.log(tl.maximum(total, 1.0)), 0.0) + log1p_small(ratio)
    tl.store(losses_ptr + rows, losses, mask=rows < num_rows)
    if HAS_GRAD:
        far = others > BOUND
        whole = tl.where(far, REPAIRED_TOTAL, 1.0 + others)  # type: ignore[operator]
        # The entry is the label's probability less 1 times the row's total; taken as the others' share of it, nothing cancels.
        entry = whole * tl.where(many, 1.0, ratio) / (1.0 + ratio)
        labels = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
        valid = (labels >= 0) & (labels < num_columns)
        tl.store(exp_ptr + rows * exp_stride + labels, (-entry).to(exp_ptr.dtype.element_ty), mask=valid)
        tl.store(scale_ptr + rows, 1.0 / whole, mask=rows < num_rows)
        tl.store(repair_ptr + rows, largest, mask=rows < num_rows)
        tl.store(repair_ptr + num_rows + rows, tl.where(far, entry / tl.maximum(total, 1.0), 0.0), mask=rows < num_rows)


@triton.jit
def repair_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    repair_ptr,
    exp_ptr,
    num_rows,
    num_columns,
    inner,
    hidden_stride,
    weight_stride,
    exp_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for a block: nothing, unless some of its rows have a factor; those are written again."""
    row_block, column_block = block_of_program(num_rows, num_columns, BLOCK_M, BLOCK_V)
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    factor = tl.load(repair_ptr + num_rows + rows, mask=rows < num_rows, other=0.0)
    if tl.max(factor, axis=0) > 0.0:  # type: ignore[operator]
        logits = block_logits(hidden_ptr, weight_ptr, rows, columns, num_rows, num_columns, inner, hidden_stride, weight_stride, BLOCK_D)
        largest = tl.load(repair_ptr + rows, mask=rows < num_rows, other=0.0)
        labels = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
        is_label = columns.to(tl.int32)[None, :] == labels.to(tl.int32)[:, None]
        out = tl.exp(logits - largest[:, None]) * factor[:, None] - tl.where(is_label, REPAIRED_TOTAL, 0.0)
        exp_ptrs = exp_ptr + rows[:, None] * exp_stride + columns[None, :]
        tl.store(exp_ptrs, out.to(exp_ptr.dtype.element_ty), mask=(factor > 0.0)[:, None] & (columns < num_columns)[None, :])


@triton.jit
def scale_kernel(
    rows_ptr, scale_ptr, factor_ptr, out_ptr, num_rows, num_columns, rows_stride, HAS_SCALE: tl.constexpr, HAS_FACTOR: tl.constexpr
):
    """One program for ROWS rows of COLUMNS columns."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    out = tl.load(rows_ptr + rows * rows_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)
        out *= scale * tl.load(factor_ptr) if HAS_FACTOR else scale
    else:
        out *= tl.load(factor_ptr)
    tl.store(out_ptr + rows * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
