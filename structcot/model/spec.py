"""The shape of a decoder, read from a Hugging Face `config.json`: dense Llama, Qwen2 / Qwen2.5 and Qwen3.

What the decoder cannot do is an error here, before a weight is read; nothing of a config is passed over that would change the mathematics.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structcot.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: base, and how frequencies are stretched for longer contexts."""

    kind: str
    theta: float
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes are counts; `qkv_bias` (Qwen2), `o_bias` (Llama with attention_bias) and `qk_norm` (Qwen3) tell the families apart."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the seven projections of a block."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (q_size, hidden),
            "k_proj": (kv_size, hidden),
            "v_proj": (kv_size, hidden),
            "o_proj": (hidden, q_size),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @property
    def body_matmul_parameters(self) -> int:
        """Weights of all blocks that a token is multiplied with."""
        return self.num_layers * sum(outputs * inputs for outputs, inputs in self.projection_shapes.values())

    @property
    def head_matmul_parameters(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def attention_ratio(self) -> float:
        """Causal attention's cost relative to the matrix products, per token of document length (see data.plan)."""
        return self.num_layers * self.num_heads * self.head_dim / (self.body_matmul_parameters + self.head_matmul_parameters)


def read_spec(model_dir: Path) -> ModelSpec:
    """The shape of the model in `model_dir`.

    Raises:
        ModelError: if there is no config.json, or it asks for what this decoder cannot do.
    """
    path = model_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is not there; model_name_or_path must name a directory in Hugging Face format or a hub id") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    try:
        return _spec_from(values, path)
    except KeyError as error:
        raise ModelError(f"{path}: lacks {error}; this is no complete model config") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: holds a value of a wrong type: {error}; fetch the model again") from error


def _spec_from(values: dict[str, Any], path: Path) -> ModelSpec:
    family = values.get("model_type", "")
    _refuse_what_is_not_done(values, family, path)
    heads = values["num_attention_heads"]
    attention_bias = bool(values.get("attention_bias", False))
    return ModelSpec(
        family=family,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or (128 if family == "qwen3" else values["hidden_size"] // heads),
        max_positions=values.get("max_position_embeddings", 2048 if family == "llama" else 32768),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        tied_head=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(values.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        rope=_rope_spec(values, path),
    )


def _refuse_what_is_not_done(values: dict[str, Any], family: str, path: Path) -> None:
    if family not in FAMILIES:
        raise ModelError(f'{path}: model_type is "{family}"; structcot trains dense {", ".join(FAMILIES)} models')
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f'{path}: hidden_act is "{values["hidden_act"]}"; only silu is supported')
    if values.get("use_sliding_window"):
        raise ModelError(f"{path}: use_sliding_window is true; only full causal attention is supported")
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        raise ModelError(f"{path}: layer_types is {values['layer_types']}; only full_attention is supported")
    if values.get("quantization_config"):
        raise ModelError(f"{path}: the weights are quantised; give the model in bfloat16 or float32")


def _rope_spec(values: dict[str, Any], path: Path) -> RopeSpec:
    """Reads both spellings: `rope_theta` with `rope_scaling` (older files), and `rope_parameters`."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ModelError(f"{path}: rope parameters differ by {', '.join(scaling)}; only one rope for all layers is supported")
    share = scaling.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor is {share}; only whole heads are rotated")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or values.get("rope_theta") or 10000.0)
    original = scaling.get("original_max_position_embeddings") or values.get("max_position_embeddings", 0)
    if kind == "default":
        return RopeSpec(kind=kind, theta=theta)
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=scaling["factor"],
            original_positions=original,
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
        )
    if kind == "yarn":
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=scaling["factor"],
            original_positions=original,
            beta_fast=scaling.get("beta_fast") or 32.0,
            beta_slow=scaling.get("beta_slow") or 1.0,
            truncate=scaling.get("truncate", True),
            attention_factor=_yarn_attention_factor(scaling),
        )
    raise ModelError(f'{path}: rope type "{kind}" is not supported; use default, llama3 or yarn')


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """Temperature of attention under YaRN: 0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071, eq. 22), or from two m-scales."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def temperature(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1.0 else 0.1 * mscale * math.log(scale) + 1.0

    factor, mscale, mscale_all = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return temperature(factor, mscale) / temperature(factor, mscale_all)
    return temperature(factor)
