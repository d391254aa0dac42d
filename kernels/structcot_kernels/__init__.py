"""The operations of a packed decoder with low-rank adapters. Tensors and numbers in, tensors out; nothing here knows a config or a module.

`__all__` is the list of operations; `structcot_kernels.reference` specifies each of them in plain PyTorch.
"""

from structcot_kernels.lora_linear import lora_gate_up, lora_linear, lora_qkv
from structcot_kernels.reference import Projection, attention_varlen, linear_cross_entropy, rope, swiglu
from structcot_kernels.rms_norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "attention_varlen", "linear_cross_entropy", "lora_gate_up", "lora_linear", "lora_qkv", "rms_norm", "rope", "swiglu"]
