"""One training step of Qwen2.5-32B's shape with few layers, counted on tensors without memory: our decoder, and transformers + PEFT.

Both sides run their real code forward and backward, and every kernel is noted (structcot.counting). They share what is no difference
between them: adapters on all seven projections, no dropout, a label for every token, documents of one length, and attention, which costs
what structcot_kernels says wherever it is called. The peer is taken at its best: adapters in bf16 where its default is fp32, and documents
as the rows of a batch without padding. Legend: B documents, L tokens of each, H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from structcot.config import PROJECTIONS, TuningConfig
from structcot.counting import Kernel, SavedBytes, Tally, is_product
from structcot.data.batch import pack
from structcot.data.render import unmasked_sample
from structcot.model.decoder import Decoder
from structcot.model.lora import attach_lora
from structcot.model.spec import ModelSpec, RopeSpec
from structcot_kernels import attention_varlen
from structcot_kernels._cost import roofline_seconds
from structcot_kernels.launch import backend, use_backend

FLOPS_PER_SECOND, BYTES_PER_SECOND = 800e12, 3.0e12
"""What an H100 is taken to reach: its matrix products, and its memory."""

KINDS = ("frozen GEMM", "low-rank", "attention", "norm", "rope", "swiglu", "head", "other")
# What our operators are, by the beginning of their names.
KIND_OF_OPERATOR = {
    "low_rank": "low-rank",
    "attention": "attention",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rope": "rope",
    "swiglu": "swiglu",
    "linear_cross_entropy": "head",
}
# What modules do beside matrix products, by the end of the class's name; PEFT's own modules are found by where they come from.
KIND_OF_MODULE = {
    "RMSNorm": "norm",
    "Attention": "rope",
    "RotaryEmbedding": "rope",
    "MLP": "swiglu",
    "SiLUActivation": "swiglu",
    "ForCausalLM": "head",
    "Decoder": "other",
}

QWEN2_5_32B = ModelSpec(
    family="qwen2",
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=27648,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    max_positions=32768,
    rms_norm_eps=1e-6,
    tied_head=False,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope=RopeSpec(kind="default", theta=1e6),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A step of `tokens` tokens in documents of `document`, adapters of `rank` (0 for none).

    `recompute` is what our blocks take; the peer checkpoints each layer unless it is "none".
    """

    tokens: int
    document: int
    rank: int
    recompute: str


class Work(NamedTuple):
    """Floating-point operations, bytes through device memory, and seconds of the roofline."""

    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Forward and backward: work by kind, and bytes held between the two."""

    kinds: dict[str, Work]
    saved_bytes: float

    @property
    def total(self) -> Work:
        """Work of all kinds."""
        return Work(*map(sum, zip(*self.kinds.values(), strict=True)))


def count_ours(setting: Setting, num_layers: int) -> StepCost:
    """A step of our decoder, its kernels those of a GPU. Without adapters it is differentiated to its embedding."""
    with torch.device("meta"):
        model = Decoder(replace(QWEN2_5_32B, num_layers=num_layers), torch.bfloat16).to(torch.bfloat16)
    if setting.rank:
        attach_lora(model, TuningConfig(lora_r=setting.rank))
        model.to("meta")
    else:
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)
    model.recompute = setting.recompute
    documents = [unmasked_sample(np.zeros(setting.document), source="zeros")] * (setting.tokens // setting.document)
    batch = pack(documents, device="meta")
    chosen = backend()
    use_backend("triton")
    try:
        return count(model, lambda: model(batch)[0], setting.rank)
    finally:
        use_backend(chosen)


def count_peer(setting: Setting, num_layers: int) -> StepCost:
    """A step of transformers + PEFT. Without adapters it is differentiated to the output of its embedding, as PEFT does with them."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT calls transformers by names that were replaced
        model = peer_model(setting, num_layers)
    ids_BL = torch.empty(setting.tokens // setting.document, setting.document, dtype=torch.int64, device="meta")
    masks = {"full_attention": None}  # made masks would ask the tensors for values, which they do not have
    return count(model, lambda: model(input_ids=ids_BL, labels=ids_BL, attention_mask=masks).loss, setting.rank)


def peer_model(setting: Setting, num_layers: int) -> nn.Module:
    """transformers' model with PEFT's adapters, all in bf16 and without memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("counted", counted_attention)
    spec = QWEN2_5_32B
    config = Qwen2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="counted")
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if setting.recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.rank:
        lora = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


def counted_attention(
    module: nn.Module, q_BHLd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls for attention: our operator on the same rows, with neither copies nor repeated heads."""
    num_documents, length = q_BHLd.shape[0], q_BHLd.shape[2]
    q_THd, k_TGd, v_TGd = (heads.transpose(1, 2).flatten(0, 1) for heads in (q_BHLd, k_BGLd, v_BGLd))
    borders_B1 = torch.empty(num_documents + 1, dtype=torch.int32, device=q_BHLd.device)
    out_THd = attention_varlen(q_THd, k_TGd, v_TGd, borders_B1, length, scaling)
    return out_THd.unflatten(0, (num_documents, length)), None


def count(model: nn.Module, forward: Callable[[], Tensor], rank: int) -> StepCost:
    """Run `forward`, which gives a loss, and its backward."""
    saved = SavedBytes(model)
    with Tally(lambda *operator: kind_of(*operator, rank=rank)) as tally:
        with saved:
            loss = forward()
        loss.backward()
    kernels: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in tally.kernels:
        kernels[kernel.kind].append(kernel)
    return StepCost(kinds={kind: work_of(kernels[kind]) for kind in KINDS}, saved_bytes=saved.total)


def work_of(kernels: Sequence[Kernel]) -> Work:
    """The sum of `kernels`."""
    costs = [kernel.cost for kernel in kernels]
    seconds = roofline_seconds(costs, FLOPS_PER_SECOND, BYTES_PER_SECOND)
    return Work(sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs), seconds)


def kind_of(operator: OpOverload, tensors: Sequence[Tensor], module: nn.Module | None, rank: int) -> str:
    """One of KINDS: by the name of the operator, by sizes that only the head or the adapters have, or by the module at work."""
    name = operator._opname
    if operator.namespace == "structcot":
        return next((kind for beginning, kind in KIND_OF_OPERATOR.items() if name.startswith(beginning)), "other")
    if QWEN2_5_32B.vocab_size in {size for tensor in tensors for size in tensor.shape} and not name.startswith("embedding"):
        return "head"
    # The As of projections that share an input lie under one another, of three at most.
    has_rank = any(size in (rank, 2 * rank, 3 * rank) for tensor in tensors if tensor.ndim == 2 for size in tensor.shape if size)
    if is_product(operator):
        return "low-rank" if has_rank else "frozen GEMM"
    if module is not None and type(module).__module__.startswith("peft."):
        return "low-rank"
    ending = next((ending for ending in KIND_OF_MODULE if type(module).__name__.endswith(ending)), None)
    if ending is not None:
        return KIND_OF_MODULE[ending]
    return "low-rank" if has_rank else "other"
