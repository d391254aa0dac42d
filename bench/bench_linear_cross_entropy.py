"""The head and its loss at the sizes of SmolLM2 and Qwen2.5-32B. Run as `python -m bench.bench_linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Side, forward_backward, main
from structcot_kernels import linear_cross_entropy


def cases(device: torch.device) -> Iterator[Case]:
    """Supervised rows, vocabulary, hidden, and whether the weight is trained too: few rows on a CPU, a micro-batch on a GPU."""
    on_gpu = device.type == "cuda"
    shapes = [(16384, 152064, 5120, False), (16384, 49152, 576, False), (16384, 49152, 576, True)] if on_gpu else [(256, 49152, 576, False)]
    for num_rows, num_columns, inner, trained in shapes:
        hidden_MD = torch.randn(num_rows, inner, device=device).bfloat16().requires_grad_()
        weight_VD = (torch.randn(num_columns, inner, device=device) * inner**-0.5).bfloat16().requires_grad_(trained)
        labels_M = torch.randint(0, num_columns, (num_rows,), device=device)
        yield Case(
            operation="linear_cross_entropy",
            shape=f"M={num_rows} V={num_columns} D={inner} bfloat16, {'trained' if trained else 'frozen'} weight",
            sides=sides(hidden_MD, weight_VD, labels_M),
        )


def sides(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> dict[str, Side]:
    """Ours, whole logits as transformers makes them, torch's own chunked operation where there is one, and Liger's."""
    losses = {
        "structcot": lambda h, w: linear_cross_entropy(h, w, labels_M)[0],
        "torch": lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels_M, reduction="sum"),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        losses["torch chunked"] = lambda h, w: F.linear_cross_entropy(h, w, labels_M, reduction="sum", options=options)
    if hidden_MD.is_cuda:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger  # pyright: ignore[reportMissingImports]

        losses["liger"] = lambda h, w: Liger.apply(h, w, labels_M, None, None, -100, 0.0, 0.0, "sum")[0]
    return {name: forward_backward(loss, hidden_MD, weight_VD) for name, loss in losses.items()}


if __name__ == "__main__":
    main(cases)
