"""Low-rank products at the shapes of o_proj in SmolLM2 and Qwen2.5-32B. Run as `python -m bench.bench_low_rank`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case, main
from structcot_kernels.low_rank import low_rank_grad, low_rank_up


def cases(device: torch.device) -> Iterator[Case]:
    """The buffer that a projection adds to, and the gradient of B."""
    shapes = [(16384, 5120, 64), (4096, 5120, 64)] if device.type == "cuda" else [(2048, 576, 16), (256, 5120, 64)]
    for num_rows, width, rank in shapes:
        sizes = ((num_rows, rank), (width, rank), (num_rows, width))
        s_TR, b_NR, rows_TN = (torch.randn(size, device=device).bfloat16() for size in sizes)
        yield Case(
            operation="low_rank_up",
            shape=f"T={num_rows} N={width} R={rank} bfloat16",
            sides={
                "structcot": lambda s=s_TR, b=b_NR, rows=rows_TN: low_rank_up(s, b, 2.0, rows),
                "torch": lambda s=s_TR, b=b_NR, rows=rows_TN: rows + 2.0 * (s @ b.T),
            },
        )
        yield Case(
            operation="low_rank_grad",
            shape=f"T={num_rows} N={width} R={rank} bfloat16",
            sides={
                "structcot": lambda s=s_TR, rows=rows_TN: low_rank_grad(s, rows, 2.0, True),
                "torch": lambda s=s_TR, rows=rows_TN: (2.0 * (rows.T @ s)).float(),
            },
        )


if __name__ == "__main__":
    main(cases)
