"""The operations of a packed decoder with low-rank adapters. Tensors and numbers in, tensors out; nothing here knows a config or a module.

`__all__` is the list of operations; `structcot_kernels.reference` specifies each of them in plain PyTorch.
"""

from structcot_kernels._head_exchange import HeadExchange as HeadExchange
from structcot_kernels.attention_block import attention_block
from structcot_kernels.attention_varlen import attention_varlen
from structcot_kernels.linear_cross_entropy import linear_cross_entropy
from structcot_kernels.lora_linear import lora_gate_up, lora_linear, lora_qkv
from structcot_kernels.mlp_block import mlp_block
from structcot_kernels.reference import Projection as Projection
from structcot_kernels.rms_norm import add_rms_norm, rms_norm
from structcot_kernels.rope import rope
from structcot_kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention_block",
    "attention_varlen",
    "linear_cross_entropy",
    "lora_gate_up",
    "lora_linear",
    "lora_qkv",
    "mlp_block",
    "rms_norm",
    "rope",
    "swiglu",
]
