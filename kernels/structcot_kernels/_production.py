"""Every way in which a training run launches a kernel: the launching functions, called at the shapes of two models without any memory.

`structcot_kernels.aot` compiles what is launched here. Legend: T tokens, D hidden, F MLP width, H query heads, G key-value heads, d head
width, V vocabulary, R rank, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from structcot_kernels.jit import linear_cross_entropy, low_rank, rms_norm, rope, swiglu, swiglu_low_rank
from structcot_kernels.launch import Launch, recorded_launches
from structcot_kernels.linear_cross_entropy import forward_in_chunks

NUM_TOKENS = 16384
EPS = 1e-6
DROPOUT = 0.1

Case = tuple[str, Callable[[], object]]
"""What is run, in words, and the call that launches it."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """One model as its kernels see it, and the adapters' ranks that it is compiled for."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    has_bias: bool
    ranks: tuple[int, ...]


MODELS = (
    Shapes("Qwen2.5-32B", 5120, 27648, 40, 8, 128, 152064, True, (16, 64, 128, 256)),
    Shapes("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, False, (16,)),
)


def production_launches(arch: int, only: str | None = None) -> Iterator[tuple[str, str, Launch]]:
    """Operation, what it is launched for, and the launch on a GPU of compute capability `arch`: of every operation or `only` of one."""
    for operation, cases in OPERATIONS.items():
        if only in (None, operation):
            for model in MODELS:
                for words, call in cases(model):
                    with recorded_launches(arch) as launches:
                        call()
                    yield from ((operation, f"{model.name} {words}", launch) for launch in launches)


def rms_norm_cases(model: Shapes) -> Iterator[Case]:
    """The norm before each block, with and without the residual add; the weight is trained only in full fine-tuning."""
    rows_TD, weight_D, rstd_T = empty(NUM_TOKENS, model.hidden), empty(model.hidden), empty(NUM_TOKENS, dtype=torch.float32)
    yield "forward", partial(rms_norm.forward, rows_TD, None, weight_D, EPS)
    yield "forward after add", partial(rms_norm.forward, rows_TD, rows_TD, weight_D, EPS)
    yield "backward", partial(rms_norm.backward, rows_TD, rows_TD, weight_D, rstd_T, None)
    yield "backward with residual", partial(rms_norm.backward, rows_TD, rows_TD, weight_D, rstd_T, rows_TD)
    yield "weight gradient", partial(rms_norm.weight_grad, rows_TD, rows_TD, rstd_T)


def low_rank_cases(model: Shapes) -> Iterator[Case]:
    """The adapters' own products. Projections of one input have their As under one another and their Ss side by side."""
    keys_T = empty(NUM_TOKENS, dtype=torch.int64)
    for group, (inner, outputs, has_bias, has_residual) in groups(model).items():
        x_TK = empty(NUM_TOKENS, inner)
        for rank in model.ranks:
            words, ranks = f"{group} r={rank}", rank * len(outputs)
            a_RK, s_TR = empty(ranks, inner), empty(NUM_TOKENS, ranks)
            yield f"{words} S with dropout", partial(low_rank.down, x_TK, a_RK, DROPOUT, keys_T)
            for dropout, keys in ((0.0, None), (DROPOUT, keys_T)):
                kind = "" if keys is None else " with dropout"
                yield f"{words} dx{kind}", partial(low_rank.up, s_TR, a_RK.T, 1.0, None, None, dropout, keys)
                yield f"{words} dA{kind}", partial(low_rank.grad, s_TR, x_TK, 1.0, dropout, keys, False)
            for output, part_TR in zip(outputs, s_TR.split(rank, dim=1), strict=True):
                y_TN, bias_N = empty(NUM_TOKENS, output), empty(output) if has_bias else None
                start_TN = y_TN if has_residual else None
                yield f"{words} y", partial(low_rank.up, part_TR, empty(output, rank), 2.0, start_TN, bias_N, 0.0, None)
                yield f"{words} dB", partial(low_rank.grad, part_TR, y_TN, 2.0, 0.0, None, True)


def rope_cases(model: Shapes) -> Iterator[Case]:
    """Queries and keys, turned forward and, in the backward, back."""
    positions_T, table_Pd = empty(NUM_TOKENS, dtype=torch.int64), empty(NUM_TOKENS, model.head_dim, dtype=torch.float32)
    for words, num_heads in (("q", model.num_heads), ("k", model.num_kv_heads)):
        heads_THd = empty(NUM_TOKENS, num_heads, model.head_dim)
        for inverse in (False, True):
            yield f"{words}{' back' if inverse else ''}", partial(rope.forward, heads_THd, positions_T, table_Pd, table_Pd, inverse)


def swiglu_cases(model: Shapes) -> Iterator[Case]:
    """The gate of the MLP, no low-rank product inside; its backward makes the activation again only for the adapter of down."""
    rows_TF = empty(NUM_TOKENS, model.intermediate)
    yield "forward", partial(swiglu.forward, rows_TF, rows_TF)
    for need_act in (False, True):
        yield f"backward{' with activation' if need_act else ''}", partial(swiglu.backward, rows_TF, rows_TF, rows_TF, need_act)


def swiglu_low_rank_cases(model: Shapes) -> Iterator[Case]:
    """The gate of the MLP with the adapters' products inside, for the ranks that it holds."""
    rows_TF = empty(NUM_TOKENS, model.intermediate)
    for rank in model.ranks:
        if rank <= swiglu_low_rank.MAX_RANK:
            b_FR, a_RF = empty(model.intermediate, rank), empty(rank, model.intermediate)
            operands = (rows_TF, rows_TF, empty(NUM_TOKENS, 2 * rank), b_FR, b_FR, 2.0)
            yield f"r={rank} forward", partial(swiglu_low_rank.forward, *operands, a_RF)
            yield f"r={rank} backward", partial(swiglu_low_rank.backward, rows_TF, *operands, empty(NUM_TOKENS, rank), a_RF)


def linear_cross_entropy_cases(model: Shapes) -> Iterator[Case]:
    """The head in training, with an unfrozen weight, in evaluation, and for few rows."""
    weight_VD, grad_sum = empty(model.vocabulary, model.hidden), empty(dtype=torch.float32)
    for words, num_rows, need_hidden in (("training", NUM_TOKENS, True), ("evaluation", NUM_TOKENS, False), ("few rows", 48, True)):
        rows_MD, labels_M = empty(num_rows, model.hidden), empty(num_rows, dtype=torch.int64)
        yield words, partial(forward_in_chunks, rows_MD, weight_VD, labels_M, need_hidden, False)
    rows_MD, scale_M = empty(NUM_TOKENS, model.hidden), empty(NUM_TOKENS, dtype=torch.float32)
    grad_weight_VD = empty(model.vocabulary, model.hidden, dtype=torch.float32)
    yield "rows for weight gradient", partial(linear_cross_entropy.scale_rows, rows_MD, scale_M, None, rows_MD.dtype)
    yield "hidden gradient", partial(linear_cross_entropy.scale_rows, rows_MD, scale_M, grad_sum, rows_MD.dtype)
    yield "weight gradient", partial(linear_cross_entropy.scale_rows, grad_weight_VD, None, grad_sum, rows_MD.dtype)


def groups(model: Shapes) -> dict[str, tuple[int, list[int], bool, bool]]:
    """Inputs, outputs of each projection of the same input, and whether bias or residual are added, by the name of the group."""
    attention, keys_or_values = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": (model.hidden, [attention, keys_or_values, keys_or_values], model.has_bias, False),
        "o": (attention, [model.hidden], False, True),
        "gate_up": (model.hidden, [model.intermediate] * 2, False, False),
        "down": (model.intermediate, [model.hidden], False, True),
    }


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


OPERATIONS: dict[str, Callable[[Shapes], Iterator[Case]]] = {
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "swiglu": swiglu_cases,
    "swiglu_low_rank": swiglu_low_rank_cases,
    "low_rank": low_rank_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
"""The calls of each operation, by the name of its file in `structcot_kernels.jit`."""
