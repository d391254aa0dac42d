"""Kernels that the ahead-of-time check must refuse, each for one reason, and one that it must let pass.

Run as a program it checks them as structcot_kernels.aot checks the real ones: python tests/kernels/bad_kernels.py FILE.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from structcot_kernels.aot import report
from structcot_kernels.launch import Launch


@triton.jit
def copy_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, tl.load(in_ptr + places))


@triton.jit
def spilling_kernel(in_ptr, out_ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    values = tl.load(in_ptr + places).to(tl.float32)
    along, across = tl.sum(values, axis=1, keep_dims=True), tl.sum(values, axis=0, keep_dims=True)
    tl.store(out_ptr + places, values * along + across)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, inner, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        total = tl.dot(tl.load(a_ptr + rows * stride + places[None, :]), tl.load(b_ptr + columns * stride + places[:, None]), total)
    tl.store(out_ptr + rows * BLOCK_N + columns, total.to(out_ptr.dtype.element_ty))


def launches() -> Iterator[tuple[str, str, Launch]]:
    """What is wrong with it is the use."""
    values = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")

    def dot(**meta: int) -> Launch:
        return Launch(dot_kernel, (1,), (values, values, values, 4096, 4096), meta)

    yield "bad", "right", Launch(copy_kernel, (1,), (values, values), {"BLOCK": 1024})
    yield "bad", "right once more", Launch(copy_kernel, (2,), (values[8:], values), {"BLOCK": 1024})
    yield "bad", "unaligned", Launch(copy_kernel, (1,), (values[1:], values), {"BLOCK": 1024})
    yield "bad", "no power of 2", Launch(copy_kernel, (1,), (values, values), {"BLOCK": 1000})
    yield "bad", "too few registers", Launch(spilling_kernel, (1,), (values, values, 256), {"ROWS": 128, "BLOCK": 256, "num_warps": 4})
    yield "bad", "right dot", dot(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    yield "bad", "too much shared memory", dot(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, num_warps=8, num_stages=4)
    yield "bad", "too few rows for a warp group", dot(BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)


if __name__ == "__main__":
    sys.exit(report({90: launches()}, Path(sys.argv[1])))
