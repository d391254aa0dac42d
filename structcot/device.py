"""What machine this is, and whether it can do what the config asks for. Nothing falls back silently: what cannot be done is an error."""

from __future__ import annotations

import os
import resource

import torch

from structcot.config import Config
from structcot.errors import ConfigError
from structcot.model.spec import ModelSpec
from structcot_kernels.attention_varlen import choose_attention, describe_attention
from structcot_kernels.launch import INTERPRETED, use_backend

RECOMPUTE_SHARE = 0.5
"""Activations may take this share of the free memory before `recompute = "auto"` drops some of them."""


def choose_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def need_what_is_asked(config: Config) -> None:
    """Refuse settings that this version or this machine cannot honour.

    Raises:
        ConfigError: naming the key and what to set instead.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = config.parallel
    if num_processes != 1 or parallel.shard not in (-1, 1) or parallel.replicate != 1 or parallel.sequence != 1:
        raise ConfigError(
            f"parallel: got {num_processes} processes, shard = {parallel.shard}, replicate = {parallel.replicate},"
            f" sequence = {parallel.sequence};"
            " this version trains in one process: start one, and leave these keys out"
        )
    if parallel.cpu_offload != "none":
        raise ConfigError(f'parallel.cpu_offload: got "{parallel.cpu_offload}"; this version keeps everything on one device: use "none"')
    if config.kernels == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise ConfigError(
            'kernels: got "triton", but there is no GPU here; use "auto" or "torch", or set TRITON_INTERPRET=1 to run the kernels'
            " interpreted, which is right and very slow"
        )


def choose_operations(config: Config, head_dim: int, device: torch.device) -> tuple[str, str]:
    """Set what runs the operations of this process, and choose who computes attention: its name, and a line that says both.

    `auto` is Triton on a GPU and PyTorch on a CPU; interpreted kernels run only where the config asks for Triton.

    Raises:
        ConfigError: if the attention that the config names cannot run here.
    """
    backend = config.kernels if config.kernels != "auto" else "triton" if device.type == "cuda" else "torch"
    use_backend(backend)
    heads = (config.attn_implementation, device, getattr(torch, config.train.dtype), head_dim)
    try:
        attention, sentence = choose_attention(*heads), describe_attention(*heads)
    except RuntimeError as error:
        raise ConfigError(f'attn_implementation: got "{config.attn_implementation}"; {error}') from error
    return attention, f"kernels: {backend}{', interpreted' if backend == 'triton' and INTERPRETED else ''}; {sentence}"


def choose_recompute(config: Config, spec: ModelSpec, microbatch_tokens: int, device: torch.device) -> str:
    """What blocks make again in the backward; `auto` is the least that lets activations fit into half of the free memory."""
    if config.parallel.recompute != "auto":
        return config.parallel.recompute
    room_bytes = RECOMPUTE_SHARE * free_memory_bytes(device)
    kept_bytes = activation_bytes_per_token(spec, config)
    return next((rung for rung, size in kept_bytes.items() if microbatch_tokens * size <= room_bytes), "full")


def activation_bytes_per_token(spec: ModelSpec, config: Config) -> dict[str, int]:
    """What all blocks keep of a token for the backward, by what they recompute.

    Always the inputs of both halves and the adapters' low-rank inputs; up to "block" the attention's output and log-sum-exp; with "none"
    also both norms' outputs, q, k, v (before and after their norms, where heads are normed), gate and up.
    """
    width = 2 if config.train.dtype == "bfloat16" else 4
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ranks = config.tuning.lora_r * len(config.tuning.target_modules) if config.tuning.method == "lora" else 0
    full = width * (2 * spec.hidden_size + ranks)
    block = full + width * q_size + 4 * spec.num_heads
    heads = q_size + 2 * kv_size + (q_size + kv_size if spec.qk_norm else 0)
    none = block + width * (2 * spec.hidden_size + heads + 2 * spec.intermediate_size)
    return {rung: spec.num_layers * size for rung, size in (("none", none), ("block", block), ("full", full))}


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


def device_report(device: torch.device) -> dict[str, object]:
    """What the manifest says of the machine."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {"type": device.type, "name": name, "processes": int(os.environ.get("WORLD_SIZE", "1"))}
