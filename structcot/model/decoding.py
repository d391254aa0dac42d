"""Greedy decoding with the live weights: what the model says now, in the middle of training, without an export and without autograd.

Prompts are read packed, end to end, by the attention that training uses. From then on each row adds one token at a time, and its keys and
values wait in a cache that is padded on the left, so that all rows write to the same column; rows that have ended leave the cache. Every
product reads the block's own weights and adapters, rounded to the dtype of the computation as in training, by plain PyTorch operations.

Where weights are sharded, each block is gathered for its turn and freed after it, so ranks walk through the blocks together: a rank whose
rows have all ended gathers for the others until nobody has any left.

Legend: B rows, T new tokens of all rows, S columns of the cache, D hidden, H query heads, G key-value heads, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from structcot.model.decoder import Block, Decoder, RMSNorm
from structcot.model.rotary import rotary_tables
from structcot.model.shard import free_unsharded, groups_of
from structcot_kernels import attention_varlen
from structcot_kernels.reference import lora_linear, rms_norm, rope, swiglu

MIN_NEW_COLUMNS = 256
"""The cache grows by at least so many columns at a time."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What followed a prompt, with the end token if it was reached.

    `end_probability` is the probability that the model gave to ending (to all end tokens together) where the last token was chosen.
    """

    tokens: tuple[int, ...]
    ended: bool
    end_probability: float


@torch.no_grad()
def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    *,
    end_ids: Collection[int],
    max_new_tokens: int,
    go_on: Callable[[bool], bool] = bool,
) -> list[Decoded]:
    """Continue each prompt by its likeliest tokens, up to one of `end_ids`, which is kept, or to `max_new_tokens`.

    `go_on` is asked before each token, with whether rows are left here, and says whether any rank has some left. Where weights are sharded
    every rank must call this together, even without a prompt, and `go_on` must give the same everywhere. Nothing of the model changes but
    that shards are freed; no random number is drawn.

    Raises:
        ValueError: if a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("decode: a prompt is empty; give at least one token")
    written: list[list[int]] = [[] for _ in prompts]
    decoded: dict[int, Decoded] = {}
    rows, cache = list(range(len(prompts))), Cache(model, prompts, device)
    try:
        for module in (model, model.model.embed_tokens, model.lm_head):  # used for every token, so they stay whole
            if isinstance(module, FSDPModule):
                module.unshard()
        walk = Walk(model, max(map(len, prompts), default=1) + max_new_tokens, device)
        ends_E = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        while go_on(bool(rows)):
            logits_BV = walk.first(prompts, cache) if not walk.has_begun else walk.next([written[row][-1] for row in rows], cache)
            if logits_BV is None:
                continue
            chances_B = (logits_BV[:, ends_E].logsumexp(-1) - logits_BV.logsumexp(-1)).exp().tolist()
            kept = []
            for place, (row, token) in enumerate(zip(rows, logits_BV.argmax(-1).tolist(), strict=True)):
                written[row].append(token)
                if token in end_ids or len(written[row]) == max_new_tokens:
                    decoded[row] = Decoded(tokens=tuple(written[row]), ended=token in end_ids, end_probability=chances_B[place])
                else:
                    kept.append(place)
            rows = [rows[place] for place in kept]
            cache.keep(kept)
    finally:
        free_unsharded(model)
    return [decoded[row] for row in range(len(prompts))]


class Cache:
    """Keys and values (B, G, S, d) of every layer, of which columns `starts_B` to `end` are filled, in the dtype of the computation."""

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], device: torch.device):
        spec, lengths = model.spec, [len(prompt) for prompt in prompts]
        self.end = max(lengths, default=0)
        self.starts_B = torch.tensor([self.end - length for length in lengths], device=device, dtype=torch.int64)
        shape = (len(prompts), spec.num_kv_heads, self.end + MIN_NEW_COLUMNS, spec.head_dim)
        # Zeros and not whatever lies there: what is masked still is multiplied by nought, which is no number times what is none.
        self._layers = [torch.zeros((2, *shape), dtype=model.compute_dtype, device=device) for _ in range(spec.num_layers)]

    @property
    def positions_B(self) -> Tensor:
        """The position of the next token of each row."""
        return self.end - self.starts_B

    def fill(self, layer: int, rows_T: Tensor, columns_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Put the keys and values of the prompts in their places."""
        for cached_BGSd, new_TGd in zip(self._layers[layer], (k_TGd, v_TGd), strict=True):
            cached_BGSd[rows_T, :, columns_T] = new_TGd

    def filled(self) -> Tensor:
        """Mask (B, 1, 1, S) of the columns that a row has filled once it has written the column `end`."""
        columns_S = torch.arange(self.end + 1, device=self.starts_B.device)
        return (columns_S >= self.starts_B.unsqueeze(1))[:, None, None]

    def attend(self, mask_B11S: Tensor, layer: int, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor) -> Tensor:
        """Write one key and value a row into the column `end`, and attend to all of the row: (B, H, d). Heads of a group ask together."""
        if self.end == self._layers[layer].shape[3]:
            self._layers[layer] = F.pad(self._layers[layer], (0, 0, 0, max(MIN_NEW_COLUMNS, self.end // 2)))
        keys_BGSd, values_BGSd = self._layers[layer]
        keys_BGSd[:, :, self.end], values_BGSd[:, :, self.end] = k_BGd, v_BGd
        seen = slice(0, self.end + 1)
        q_BGRd = q_BHd.unflatten(1, (k_BGd.shape[1], -1))
        return F.scaled_dot_product_attention(q_BGRd, keys_BGSd[:, :, seen], values_BGSd[:, :, seen], attn_mask=mask_B11S).flatten(1, 2)

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these."""
        if len(places) == len(self.starts_B):
            return
        index_B = torch.tensor(places, dtype=torch.int64, device=self.starts_B.device)
        self.starts_B = self.starts_B[index_B]
        self._layers = [layer.index_select(1, index_B) for layer in self._layers]


class Walk:
    """The way of new tokens through all blocks to the logits of each row's next token; sharded blocks are gathered one after the other."""

    def __init__(self, model: Decoder, num_positions: int, device: torch.device):
        self.has_begun = False
        self._model, self._device = model, device
        self._blocks = [(block, groups_of(block)) for block in model.model.layers if isinstance(block, Block)]
        self._tables = rotary_tables(model.spec, num_positions, device)  # not the model's own, which training goes on with

    def first(self, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor | None:
        """Logits (B, V), fp32, after the prompts; None without rows."""
        self.has_begun = True
        lengths = [len(prompt) for prompt in prompts]
        lengths_B = torch.tensor(lengths, device=self._device, dtype=torch.int64)
        borders_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
        rows_T = torch.repeat_interleave(lengths_B)
        positions_T = torch.arange(len(rows_T), device=self._device) - borders_B1[rows_T]
        columns_T = positions_T + cache.starts_B[rows_T] if prompts else positions_T

        def attend(layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
            cache.fill(layer, rows_T, columns_T, k_TGd, v_TGd)
            scale = self._model.spec.head_dim**-0.5
            return attention_varlen(q_THd, k_TGd, v_TGd, borders_B1.int(), max(lengths), scale, self._model.attention)

        tokens = [token for prompt in prompts for token in prompt]
        return self._through(tokens, positions_T, attend, borders_B1[1:] - 1)

    def next(self, tokens: Sequence[int], cache: Cache) -> Tensor | None:
        """Logits (B, V), fp32, after one more token a row; None without rows."""
        logits_BV = self._through(tokens, cache.positions_B, partial(cache.attend, cache.filled()), slice(None))
        cache.end += 1
        return logits_BV

    def _through(self, tokens: Sequence[int], positions_T: Tensor, attend: Attend, last: Tensor | slice) -> Tensor | None:
        model, hidden_TD = self._model, None
        if tokens:
            tokens_T = torch.tensor(tokens, device=self._device, dtype=torch.int64)
            hidden_TD = F.embedding(tokens_T, model.model.embed_tokens.weight).to(model.compute_dtype)
        for layer, (block, groups) in enumerate(self._blocks):
            for group in groups:
                group.unshard()
            if hidden_TD is not None:
                hidden_TD = through_block(block, hidden_TD, positions_T, self._tables, lambda *heads, layer=layer: attend(layer, *heads))
            for group in groups:
                group.reshard()
        if hidden_TD is None:
            return None
        hidden_BD = normed(model.model.norm, hidden_TD[last])
        return F.linear(hidden_BD, model.lm_head.weight.to(hidden_BD.dtype)).float()


def through_block(
    block: Block, hidden_TD: Tensor, positions_T: Tensor, tables: tuple[Tensor, Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """What a block makes of new tokens, whose attention to all earlier ones is `attend(q_THd, k_TGd, v_TGd)`: the formulas of training."""
    attention, mlp, adapters = block.self_attn, block.mlp, block.adapters
    x_TD = normed(block.input_layernorm, hidden_TD)
    q_THd, k_TGd, v_TGd = (
        lora_linear(x_TD, *adapters.beside(name, getattr(attention, name))).unflatten(-1, (-1, tables[0].shape[1]))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if attention.qk_norm:
        q_THd, k_TGd = normed(attention.q_norm, q_THd), normed(attention.k_norm, k_TGd)
    out_THd = attend(rope(q_THd, positions_T, *tables), rope(k_TGd, positions_T, *tables), v_TGd)
    hidden_TD = hidden_TD + lora_linear(out_THd.flatten(1), *adapters.beside("o_proj", attention.o_proj))
    x_TD = normed(block.post_attention_layernorm, hidden_TD)
    gate_TF, up_TF = (lora_linear(x_TD, *adapters.beside(name, getattr(mlp, name))) for name in ("gate_proj", "up_proj"))
    return hidden_TD + lora_linear(swiglu(gate_TF, up_TF), *adapters.beside("down_proj", mlp.down_proj))


def normed(norm: RMSNorm, hidden_TD: Tensor) -> Tensor:
    """Root-mean-square norm by the module `norm`."""
    return rms_norm(hidden_TD, norm.weight.to(hidden_TD.dtype), norm.eps)
