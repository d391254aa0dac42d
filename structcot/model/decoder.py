"""The whole model: a pre-norm decoder with grouped-query attention, rotary positions and a gated MLP, over packed documents.

Parameter names are those of the Hugging Face checkpoint, so weights go in and out without renaming. Adapters live beside the weights of a
block, in a submodule of their own. Compute happens in one dtype; parameters kept in another (fp32 masters) are rounded where they are used.

Legend: T packed tokens, M supervised rows, D hidden, F width of the MLP, H query heads, G key-value heads, d head width, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from structcot.data.batch import MicroBatch
from structcot.model.lora import LoraPair, stable_hash
from structcot.model.rotary import rotary_tables
from structcot.model.spec import ModelSpec
from structcot.offload import HostMemory, offloaded_activations
from structcot_kernels import HeadExchange, Projection, attention_block, linear_cross_entropy, mlp_block, rms_norm


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
    exchange: HeadExchange | None


class Adapters(nn.ModuleDict):
    """The low-rank pairs of a block by the name of their projection."""

    def beside(self, name: str, linear: nn.Linear) -> Projection:
        """A projection with its adapter, if it has one."""
        if name not in self:
            return Projection(linear.weight, linear.bias)
        pair = self[name]
        if not isinstance(pair, LoraPair):
            raise TypeError(f"adapters[{name}]: got {type(pair).__name__}; attach_lora makes LoraPair")
        return Projection(linear.weight, linear.bias, pair.lora_A, pair.lora_B, pair.scale)

    def dropout(self) -> float:
        """Share of the adapters' inputs that are dropped: one for all of them, and none in evaluation."""
        pairs = (pair for pair in self.values() if isinstance(pair, LoraPair))
        return max((pair.dropout for pair in pairs), default=0.0) if self.training else 0.0


class Attention(nn.Module):
    """x + attention(norm(x)), causal inside each document. The norm and the adapters are the block's."""

    def __init__(self, spec: ModelSpec, name: str):
        super().__init__()
        self.salt = stable_hash(f"{name}.self_attn")
        self.q_proj = projection(spec, "q_proj", bias=spec.qkv_bias)
        self.k_proj = projection(spec, "k_proj", bias=spec.qkv_bias)
        self.v_proj = projection(spec, "v_proj", bias=spec.qkv_bias)
        self.o_proj = projection(spec, "o_proj", bias=spec.o_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps), RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.qk_norm = spec.qk_norm

    def forward(self, hidden_TD: Tensor, norm: RMSNorm, adapters: Adapters, layout: Layout) -> Tensor:
        batch, dropout = layout.batch, adapters.dropout()
        return attention_block(
            hidden_TD,
            norm.weight,
            q=adapters.beside("q_proj", self.q_proj),
            k=adapters.beside("k_proj", self.k_proj),
            v=adapters.beside("v_proj", self.v_proj),
            o=adapters.beside("o_proj", self.o_proj),
            positions_T=batch.positions_T,
            cos_Pd=layout.cos_Pd,
            sin_Pd=layout.sin_Pd,
            cu_seqlens_S1=batch.cu_seqlens_S1,
            max_seqlen=batch.max_seqlen,
            eps=norm.eps,
            q_norm_d=self.q_norm.weight if self.qk_norm else None,
            k_norm_d=self.k_norm.weight if self.qk_norm else None,
            dropout=dropout,
            dropout_keys_T=batch.dropout_keys_T + self.salt if dropout else None,
            recompute=layout.recompute,
            implementation=layout.attention,
            exchange=layout.exchange,
        )


class MLP(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))). The norm and the adapters are the block's."""

    def __init__(self, spec: ModelSpec, name: str):
        super().__init__()
        self.salt = stable_hash(f"{name}.mlp")
        self.gate_proj = projection(spec, "gate_proj", bias=spec.mlp_bias)
        self.up_proj = projection(spec, "up_proj", bias=spec.mlp_bias)
        self.down_proj = projection(spec, "down_proj", bias=spec.mlp_bias)

    def forward(self, hidden_TD: Tensor, norm: RMSNorm, adapters: Adapters, layout: Layout) -> Tensor:
        dropout = adapters.dropout()
        return mlp_block(
            hidden_TD,
            norm.weight,
            gate=adapters.beside("gate_proj", self.gate_proj),
            up=adapters.beside("up_proj", self.up_proj),
            down=adapters.beside("down_proj", self.down_proj),
            eps=norm.eps,
            dropout=dropout,
            dropout_keys_T=layout.batch.dropout_keys_T + self.salt if dropout else None,
            recompute=layout.recompute,
        )


class Block(nn.Module):
    """Attention, then MLP. Frozen weights, norms and adapters are modules of their own, since each is sharded in its own way."""

    def __init__(self, spec: ModelSpec, name: str):
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, name)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec, name)
        self.adapters = Adapters()

    def forward(self, hidden_TD: Tensor, layout: Layout) -> Tensor:
        hidden_TD = self.self_attn(hidden_TD, self.input_layernorm, self.adapters, layout)
        return self.mlp(hidden_TD, self.post_attention_layernorm, self.adapters, layout)


class Head(nn.Module):
    """The output projection, which never hands out logits in training."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))

    def forward(self, hidden_MD: Tensor, labels_M: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        """Sum of the losses and each row's loss (M,), both fp32; without labels the fp32 logits (M, V)."""
        if labels_M is None:
            return F.linear(hidden_MD, self.weight.to(hidden_MD.dtype)).float()
        return linear_cross_entropy(hidden_MD, self.weight, labels_M)


class Backbone(nn.Module):
    """Embedding, blocks and final norm, under the names of a Hugging Face checkpoint."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, f"model.layers.{number}") for number in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model up to its loss.

    `compute_dtype` is that of activations and matrix products; `recompute` says what the backward makes again ("none", "block" or "full",
    see structcot_kernels.attention_block and mlp_block), `attention` which implementation of attention runs, and `sequence_group` which
    ranks share the tokens of a micro-batch, where more than one does. In `host_memory`, if there is one, activations wait for the backward.
    """

    def __init__(self, spec: ModelSpec, compute_dtype: torch.dtype):
        super().__init__()
        self.spec, self.compute_dtype = spec, compute_dtype
        self.recompute, self.attention = "none", "auto"
        self.sequence_group: dist.ProcessGroup | None = None
        self.host_memory: HostMemory | None = None
        self.model = Backbone(spec)
        self.lm_head = Head(spec)
        self.tie()
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: MicroBatch, *, logits: bool = False) -> tuple[Tensor, Tensor] | Tensor:
        """Sum of the losses of the rows that have a label, and the loss of each (M,) without a gradient, both fp32.

        With `logits` instead the fp32 logits (M, V) of these rows: for checks on short inputs, never in training.
        """
        hidden_TD = self.model.embed_tokens(batch.tokens_T).to(self.compute_dtype)
        exchange = HeadExchange(self.sequence_group, batch.slices_U) if self.sequence_group and batch.slices_U else None
        tables = self._rotary_tables(batch.max_seqlen, hidden_TD.device)
        layout = Layout(batch, *tables, self.recompute, self.attention, exchange)
        with offloaded_activations(self.host_memory) if self.host_memory else nullcontext():
            for block in self.model.layers:
                hidden_TD = block(hidden_TD, layout)
        return self.lm_head(self.model.norm(hidden_TD[batch.rows_M]), None if logits else batch.labels_M)

    def tie(self) -> None:
        """Make the embedding the head's weight, where the model has one for both."""
        if self.spec.tied_head:
            self.lm_head.register_parameter("weight", self.model.embed_tokens.get_parameter("weight"))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a step changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _rotary_tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] < num_positions:
            self._tables = rotary_tables(self.spec, max(num_positions, 1024), device)
        return self._tables


def projection(spec: ModelSpec, name: str, *, bias: bool) -> nn.Linear:
    """An empty projection of the shape that `spec` says."""
    outputs, inputs = spec.projection_shapes[name]
    return nn.Linear(inputs, outputs, bias=bias)
