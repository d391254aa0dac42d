"""Every way in which a training run launches a kernel: the launching functions, called at the shapes of two models on tensors without memory.

`structcot_kernels.aot` compiles what is launched here. Legend: T tokens, D hidden, F MLP width, H query heads, G key-value heads, d head
width, V vocabulary, R rank, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from structcot_kernels.jit import low_rank, rms_norm
from structcot_kernels.launch import Launch, recorded_launches

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
    ranks: tuple[int, ...]


MODELS = (
    Shapes("Qwen2.5-32B", 5120, 27648, 40, 8, 128, 152064, (16, 64, 128, 256)),
    Shapes("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, (16,)),
)


def production_launches(only: str | None = None) -> Iterator[tuple[str, str, Launch]]:
    """Operation, what it is launched for, and the launch: of every operation or `only` of one."""
    for operation, cases in OPERATIONS.items():
        if only in (None, operation):
            for model in MODELS:
                for words, call in cases(model):
                    with recorded_launches() as launches:
                        call()
                    yield from ((operation, f"{model.name} {words}", launch) for launch in launches)


def rms_norm_cases(model: Shapes) -> Iterator[Case]:
    """The norm before each block, with and without the residual add; the weight is trained only in full fine-tuning."""
    rows_TD, weight_D, rstd_T = empty(NUM_TOKENS, model.hidden), empty(model.hidden), scales()
    yield "forward", partial(rms_norm.forward, rows_TD, None, weight_D, EPS)
    yield "forward after add", partial(rms_norm.forward, rows_TD, rows_TD, weight_D, EPS)
    yield "backward", partial(rms_norm.backward, rows_TD, rows_TD, weight_D, rstd_T, None)
    yield "backward with residual", partial(rms_norm.backward, rows_TD, rows_TD, weight_D, rstd_T, rows_TD)
    yield "weight gradient", partial(rms_norm.weight_grad, rows_TD, rows_TD, rstd_T)


def low_rank_cases(model: Shapes) -> Iterator[Case]:
    """The adapters of every projection. Those that share an input share S, so that one adapter's S is a part of wider rows."""
    keys_T = empty(NUM_TOKENS, dtype=torch.int64)
    for inner, outputs in sorted(projections(model)):
        x_TK, y_TN, bias_N = empty(NUM_TOKENS, inner), empty(NUM_TOKENS, outputs), empty(outputs)
        for rank in model.ranks:
            words = f"{inner} to {outputs}, rank {rank}"
            a_RK, b_NR, s_TR, part_TR = empty(rank, inner), empty(outputs, rank), empty(NUM_TOKENS, rank), empty(NUM_TOKENS, 3 * rank)[:, rank:][:, :rank]
            yield f"{words}: S with dropout", partial(low_rank.down, x_TK, a_RK, DROPOUT, keys_T)
            for s, start, bias in ((s_TR, None, None), (part_TR, None, bias_N), (s_TR, y_TN, None)):
                yield f"{words}: forward", partial(low_rank.up, s, b_NR, 2.0, start, bias, 0.0, None)
