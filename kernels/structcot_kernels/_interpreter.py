"""Triton's interpreter, made right for bfloat16.

As it comes, the interpreter keeps a bf16 value as its 16 bits and does arithmetic on those, so that products are garbage, and it rounds
fp32 to bf16 by cutting bits off. Here operands of bf16 are widened to fp32 first, results rounded to nearest, ties to even, as on a GPU.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PLAIN = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op")}


def make_bfloat16_right() -> None:
    """Patch the interpreter of this process; doing it twice changes nothing."""
    for name, method in (
        ("cast_impl", cast),
        ("create_fp_to_fp", cast_rounding),
        ("create_dot", dot),
        ("binary_op", binary),
        ("unary_op", unary),
    ):
        setattr(InterpreterBuilder, name, method)


def widen(handle: TensorHandle) -> TensorHandle:
    """A bf16 value as fp32; others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((np.asarray(handle.data).astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def narrow(values: np.ndarray) -> TensorHandle:
    """Round to nearest, ties to even: add half a unit less one, plus the last bit that stays, and cut."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def cast(self, src, dst_type):
    """Between bf16 and other types, by way of fp32."""
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target != tl.bfloat16:
        wide = widen(src)
        return wide if target == tl.float32 else PLAIN["cast_impl"](self, wide, dst_type)
    if target == tl.bfloat16 and source != tl.bfloat16:
        return narrow(src.data.astype(np.float32))
    return PLAIN["cast_impl"](self, src, dst_type)


def cast_rounding(self, src, dst_type, rounding_mode):
    """The same where a rounding mode is given: to nearest is the only one here."""
    if {src.dtype.scalar, dst_type.scalar} == {tl.float32, tl.bfloat16}:
        return cast(self, src, dst_type)
    return PLAIN["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Products of widened operands."""
    return PLAIN["create_dot"](self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)


def binary(self, lhs, rhs, operation):
    """Arithmetic in fp32, rounded once; comparisons stay what they are."""
    if lhs.dtype.scalar != tl.bfloat16:
        return PLAIN["binary_op"](self, lhs, rhs, operation)
    result = PLAIN["binary_op"](self, widen(lhs), widen(rhs), operation)
    return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else narrow(result.data)


def unary(self, arg, operation):
    """The same with one operand."""
    if arg.dtype.scalar != tl.bfloat16:
        return PLAIN["unary_op"](self, arg, operation)
    return narrow(operation(widen(arg).data))
