"""How much memory a step takes, by formula, and what blocks must recompute for it to fit.

Beside weights, gradients and optimizer, which do not depend on the step, a micro-batch keeps activations of every block for the backward,
and one block at a time works. `structcot plan` counts the same by running the code; these formulas decide in a moment, on all ranks alike.
"""

from __future__ import annotations

import os
import resource

import torch

from structcot.config import Config
from structcot.distributed import World
from structcot.model.spec import ModelSpec

USABLE_SHARES = {"cuda": 0.95, "cpu": 0.5}
"""Of the free memory: the allocator of a GPU loses some to gaps, and a computer has other work to do."""

HEAD_BYTES = 1.3e9
"""What the loss works in: its block of logits."""


def choose_recompute(config: Config, spec: ModelSpec, microbatch_tokens: int, device: torch.device, world: World) -> str:
    """What blocks make again in the backward; `auto` is the least that fits into the memory that every rank has left."""
    if config.parallel.recompute != "auto":
        return config.parallel.recompute
    usable_bytes = -world.maximum(-USABLE_SHARES[device.type] * free_memory_bytes(device))
    return least_recompute(config, spec, microbatch_tokens, usable_bytes, world.size)


def least_recompute(config: Config, spec: ModelSpec, microbatch_tokens: int, usable_bytes: float, num_ranks: int) -> str:
    """The first rung of the ladder that fits into `usable_bytes`, which weights and optimizer have left; else "full"."""
    room_bytes = usable_bytes - gradient_bytes(spec, config, num_ranks) - working_bytes(spec, config, microbatch_tokens, num_ranks)
    if config.parallel.cpu_offload == "activations":
        return "block"  # more would be on its way to the host and back than a block's computation hides
    kept_bytes = activation_bytes_per_token(spec, config)
    return next((rung for rung, size in kept_bytes.items() if microbatch_tokens * size <= room_bytes), "full")


def activation_bytes_per_token(spec: ModelSpec, config: Config) -> dict[str, int]:
    """What all blocks keep of a token for the backward, by what they recompute.

    Always the inputs of both halves and the adapters' low-rank inputs; up to "block" the attention's output and log-sum-exp; with "none"
    also both norms' outputs, q, k, v (before and after their norms, where heads are normed), gate and up.
    """
    width = compute_width(config)
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ranks = config.tuning.lora_r * len(config.tuning.target_modules) if config.tuning.method == "lora" else 0
    full = width * (2 * spec.hidden_size + ranks)
    block = full + width * q_size + 4 * spec.num_heads
    heads = q_size + 2 * kv_size + (q_size + kv_size if spec.qk_norm else 0)
    none = block + width * (2 * spec.hidden_size + heads + 2 * spec.intermediate_size)
    return {rung: spec.num_layers * size for rung, size in (("none", none), ("block", block), ("full", full))}


def working_bytes(spec: ModelSpec, config: Config, microbatch_tokens: int, num_ranks: int) -> float:
    """What one block works in at most, in the backward of its MLP, or the head if that is more; and weights that are gathered for it.

    Gate, up, their gradients and the activation's, and half a dozen rows of the hidden size.
    """
    block = compute_width(config) * microbatch_tokens * (5 * spec.intermediate_size + 6 * spec.hidden_size)
    gathered = 0.0
    if num_ranks > 1:
        # The MLP of one block, that of the next on its way, and the buffer that it arrives in; the head stays from forward to backward.
        gathered = compute_width(config) * (3 * 3 * spec.intermediate_size * spec.hidden_size + spec.head_matmul_parameters)
    return max(float(block), HEAD_BYTES if spec.vocab_size > 2**15 else 0.0) + gathered


def gradient_bytes(spec: ModelSpec, config: Config, num_ranks: int) -> float:
    """Gradients in fp32 of what a rank holds of the trained weights."""
    shards = max(1, num_ranks // config.parallel.replicate)
    return 4.0 * trained_parameters(spec, config) / shards


def trained_parameters(spec: ModelSpec, config: Config) -> int:
    """Weights that a step changes, norms and biases left out."""
    if config.tuning.method == "full":
        return spec.body_matmul_parameters + spec.head_matmul_parameters * (1 if spec.tied_head else 2)
    sizes = (sum(spec.projection_shapes[name]) for name in config.tuning.target_modules)
    return spec.num_layers * config.tuning.lora_r * sum(sizes)


def compute_width(config: Config) -> int:
    """Bytes of a number in the dtype of the computation."""
    return 2 if config.train.dtype == "bfloat16" else 4


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be claimed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
