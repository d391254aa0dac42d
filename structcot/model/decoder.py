"""The whole model: a pre-norm decoder with grouped-query attention, rotary positions and a gated MLP, over packed documents.

Parameter names are those of the Hugging Face checkpoint, so weights go in and out without renaming. Adapters live beside the weights of a
block, in a submodule of their own. Compute happens in one dtype; parameters kept in another (fp32 masters) are rounded where they are used.

Legend: T packed tokens, M supervised rows, D hidden, F width of the MLP, H query heads, G key-value heads, d head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from structcot.data.batch import MicroBatch
from structcot.model.lora import LoraPair, stable_hash
from structcot.model.rotary import rotary_tables
from structcot.model.spec import ModelSpec
from structcot_kernels import attention_varlen, lora_linear, rms_norm, rope, swiglu


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return rms_norm(hidden_TD, self.weight.to(hidden_TD.dtype), self.eps)


@dataclass(frozen=True, slots=True)
class Layout:
    """What every block needs to know: the micro-batch's borders, positions and dropout keys, and the rotary tables."""

    batch: MicroBatch
    cos_Pd: Tensor
    sin_Pd: Tensor

    def rotate(self, heads_THd: Tensor) -> Tensor:
        """Heads turned by their tokens' positions."""
        return rope(heads_THd, self.batch.positions_T, self.cos_Pd, self.sin_Pd)


class Attention(nn.Module):
    """Causal self-attention inside each document."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.q_proj = projection(spec, "q_proj", bias=spec.qkv_bias)
        self.k_proj = projection(spec, "k_proj", bias=spec.qkv_bias)
        self.v_proj = projection(spec, "v_proj", bias=spec.qkv_bias)
        self.o_proj = projection(spec, "o_proj", bias=spec.o_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps), RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.head_dim, self.qk_norm = spec.head_dim, spec.qk_norm

    def forward(self, x_TD: Tensor, adapters: nn.ModuleDict, layout: Layout) -> Tensor:
        q_THd = project(x_TD, self.q_proj, adapters, "q_proj", layout).unflatten(-1, (-1, self.head_dim))
        k_TGd = project(x_TD, self.k_proj, adapters, "k_proj", layout).unflatten(-1, (-1, self.head_dim))
        v_TGd = project(x_TD, self.v_proj, adapters, "v_proj", layout).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q_THd, k_TGd = self.q_norm(q_THd), self.k_norm(k_TGd)
        q_THd, k_TGd = layout.rotate(q_THd), layout.rotate(k_TGd)
        out_THd = attention_varlen(q_THd, k_TGd, v_TGd, layout.batch.cu_seqlens_S1, self.head_dim**-0.5)
        return project(out_THd.flatten(1), self.o_proj, adapters, "o_proj", layout)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.gate_proj = projection(spec, "gate_proj", bias=spec.mlp_bias)
        self.up_proj = projection(spec, "up_proj", bias=spec.mlp_bias)
        self.down_proj = projection(spec, "down_proj", bias=spec.mlp_bias)

    def forward(self, x_TD: Tensor, adapters: nn.ModuleDict, layout: Layout) -> Tensor:
        gate_TF = project(x_TD, self.gate_proj, adapters, "gate_proj", layout)
        up_TF = project(x_TD, self.up_proj, adapters, "up_proj", layout)
        return project(swiglu(gate_TF, up_TF), self.down_proj, adapters, "down_proj", layout)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `adapters` maps the name of a projection to its low-rank pair."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)
        self.adapters = nn.ModuleDict()

    def forward(self, hidden_TD: Tensor, layout: Layout) -> Tensor:
        hidden_TD = hidden_TD + self.self_attn(self.input_layernorm(hidden_TD), self.adapters, layout)
        return hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD), self.adapters, layout)


class Backbone(nn.Module):
    """Embedding, blocks and final norm, under the names of a Hugging Face checkpoint."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model up to its normalised hidden states; logits exist only inside the loss.

    `compute_dtype` is that of activations and matrix products; `recompute` drops the inside of each block in the forward and replays it in
    the backward.
    """

    def __init__(self, spec: ModelSpec, compute_dtype: torch.dtype):
        super().__init__()
        self.spec, self.compute_dtype = spec, compute_dtype
        self.recompute = False
        self.model = Backbone(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: MicroBatch) -> Tensor:
        """Normalised hidden states (M, D) of the rows that have a label, in `batch.rows_M`'s order."""
        hidden_TD = F.embedding(batch.tokens_T, self.model.embed_tokens.weight).to(self.compute_dtype)
        layout = Layout(batch, *self._rotary_tables(batch.max_seqlen, hidden_TD.device))
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden_TD = checkpoint(block, hidden_TD, layout, use_reentrant=False)
            else:
                hidden_TD = block(hidden_TD, layout)
        return self.model.norm(hidden_TD[batch.rows_M])

    def logits(self, batch: MicroBatch) -> Tensor:
        """fp32 logits (M, V) of the rows that have a label: for checks on short inputs, never in training."""
        hidden_MD = self(batch)
        return F.linear(hidden_MD, self.lm_head.weight.to(hidden_MD.dtype)).float()

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that a step changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _rotary_tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] < num_positions:
            self._tables = rotary_tables(self.spec, max(num_positions, 1024), device)
        return self._tables


def projection(spec: ModelSpec, name: str, *, bias: bool) -> nn.Linear:
    """An empty projection of the shape that `spec` says."""
    outputs, inputs = spec.projection_shapes[name]
    return nn.Linear(inputs, outputs, bias=bias)


def project(x_TK: Tensor, linear: nn.Linear, adapters: nn.ModuleDict, name: str, layout: Layout) -> Tensor:
    """One projection with its adapter, if it has one."""
    if name not in adapters:
        return lora_linear(x_TK, linear.weight, linear.bias)
    pair = adapters[name]
    if not isinstance(pair, LoraPair):
        raise TypeError(f"adapters[{name}]: got {type(pair).__name__}; attach_lora makes LoraPair")
    dropout = pair.dropout if pair.training else 0.0
    keys_T = layout.batch.dropout_keys_T + stable_hash(pair.name) if dropout else None
    return lora_linear(x_TK, linear.weight, linear.bias, pair.lora_A, pair.lora_B, pair.scale, dropout, keys_T)
