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

from structcot.data.batch import MicroBatch
from structcot.model.lora import LoraPair, stable_hash
from structcot.model.rotary import rotary_tables
from structcot.model.spec import ModelSpec
from structcot_kernels import Projection, attention_block, mlp_block, rms_norm


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
    """What every block needs to know: the micro-batch, the rotary tables, and how the block is to be computed."""

    batch: MicroBatch
    cos_Pd: Tensor
    sin_Pd: Tensor
    recompute: str
    attention: str


class Attention(nn.Module):
    """Weights of causal self-attention inside each document."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.q_proj = projection(spec, "q_proj", bias=spec.qkv_bias)
        self.k_proj = projection(spec, "k_proj", bias=spec.qkv_bias)
        self.v_proj = projection(spec, "v_proj", bias=spec.qkv_bias)
        self.o_proj = projection(spec, "o_proj", bias=spec.o_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps), RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.qk_norm = spec.qk_norm

    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the norms of queries and keys, where the model has them."""
        return (self.q_norm.weight, self.k_norm.weight) if self.qk_norm else (None, None)


class MLP(nn.Module):
    """Weights of down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.gate_proj = projection(spec, "gate_proj", bias=spec.mlp_bias)
        self.up_proj = projection(spec, "up_proj", bias=spec.mlp_bias)
        self.down_proj = projection(spec, "down_proj", bias=spec.mlp_bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `adapters` maps the name of a projection to its low-rank pair."""

    def __init__(self, spec: ModelSpec, name: str):
        super().__init__()
        self.name = name
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)
        self.adapters = nn.ModuleDict()

    def forward(self, hidden_TD: Tensor, layout: Layout) -> Tensor:
        batch, attention, mlp = layout.batch, self.self_attn, self.mlp
        q_norm_d, k_norm_d = attention.head_norms()
        dropout = self.dropout()
        hidden_TD = attention_block(
            hidden_TD,
            self.input_layernorm.weight,
            q=self.adapted("q_proj", attention.q_proj),
            k=self.adapted("k_proj", attention.k_proj),
            v=self.adapted("v_proj", attention.v_proj),
            o=self.adapted("o_proj", attention.o_proj),
            positions_T=batch.positions_T,
            cos_Pd=layout.cos_Pd,
            sin_Pd=layout.sin_Pd,
            cu_seqlens_S1=batch.cu_seqlens_S1,
            max_seqlen=batch.max_seqlen,
            eps=self.input_layernorm.eps,
            q_norm_d=q_norm_d,
            k_norm_d=k_norm_d,
            dropout=dropout,
            dropout_keys_T=batch.dropout_keys_T + stable_hash(f"{self.name}.self_attn") if dropout else None,
            recompute=layout.recompute,
            implementation=layout.attention,
        )
        return mlp_block(
            hidden_TD,
            self.post_attention_layernorm.weight,
            gate=self.adapted("gate_proj", mlp.gate_proj),
            up=self.adapted("up_proj", mlp.up_proj),
            down=self.adapted("down_proj", mlp.down_proj),
            eps=self.post_attention_layernorm.eps,
            dropout=dropout,
            dropout_keys_T=batch.dropout_keys_T + stable_hash(f"{self.name}.mlp") if dropout else None,
            recompute=layout.recompute,
        )

    def adapted(self, name: str, linear: nn.Linear) -> Projection:
        """A projection with its adapter, if it has one."""
        if name not in self.adapters:
            return Projection(linear.weight, linear.bias)
        pair = self.adapters[name]
        if not isinstance(pair, LoraPair):
            raise TypeError(f"adapters[{name}]: got {type(pair).__name__}; attach_lora makes LoraPair")
        return Projection(linear.weight, linear.bias, pair.lora_A, pair.lora_B, pair.scale)

    def dropout(self) -> float:
        """Share of the adapters' inputs that are dropped: one for all of them, and none in evaluation."""
        pairs = (pair for pair in self.adapters.values() if isinstance(pair, LoraPair))
        return max((pair.dropout for pair in pairs), default=0.0) if self.training else 0.0


class Backbone(nn.Module):
    """Embedding, blocks and final norm, under the names of a Hugging Face checkpoint."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, f"model.layers.{number}") for number in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model up to its normalised hidden states; logits exist only inside the loss.

    `compute_dtype` is that of activations and matrix products; `recompute` says what the backward makes again ("none", "block" or "full",
    see structcot_kernels.attention_block and mlp_block), `attention` which implementation of attention runs.
    """

    def __init__(self, spec: ModelSpec, compute_dtype: torch.dtype):
        super().__init__()
        self.spec, self.compute_dtype = spec, compute_dtype
        self.recompute, self.attention = "none", "auto"
        self.model = Backbone(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: MicroBatch) -> Tensor:
        """Normalised hidden states (M, D) of the rows that have a label, in `batch.rows_M`'s order."""
        hidden_TD = F.embedding(batch.tokens_T, self.model.embed_tokens.weight).to(self.compute_dtype)
        layout = Layout(batch, *self._rotary_tables(batch.max_seqlen, hidden_TD.device), self.recompute, self.attention)
        for block in self.model.layers:
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
