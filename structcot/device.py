"""What machine this is, and whether it can do what the config asks for. Nothing falls back silently: what cannot be done is an error."""

from __future__ import annotations

import os
import resource

import torch

from structcot.config import Config
from structcot.errors import ConfigError
from structcot.model.spec import ModelSpec

RECOMPUTE_SHARE = 0.5
"""Activations may take this share of the free memory before `recompute = "auto"` drops them."""


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
    if config.kernels == "triton":
        raise ConfigError('kernels: got "triton"; this version has the PyTorch operations alone: use "auto" or "torch"')
    if config.attn_implementation not in ("auto", "sdpa"):
        raise ConfigError(f'attn_implementation: got "{config.attn_implementation}"; this version has "sdpa" alone: use it, or "auto"')


def should_recompute(config: Config, spec: ModelSpec, microbatch_tokens: int, device: torch.device) -> bool:
    """Whether blocks replay their forward in the backward; `auto` does so where the activations would fill half of the free memory."""
    if config.parallel.recompute != "auto":
        return config.parallel.recompute != "none"
    return microbatch_tokens * activation_bytes_per_token(spec, config) > RECOMPUTE_SHARE * free_memory_bytes(device)


def activation_bytes_per_token(spec: ModelSpec, config: Config) -> int:
    """What the PyTorch operations keep of a token for the backward when nothing is recomputed.

    A block keeps, in the compute dtype: inputs of its 7 projections and of both residual adds, q, k and v before and after the rotation
    with k and v repeated for each query head, the attention output, gate, up and their product; and in fp32 two norm inputs.
    """
    width = 2 if config.train.dtype == "bfloat16" else 4
    q_size = spec.num_heads * spec.head_dim
    kept = 6 * spec.hidden_size + 8 * q_size + 4 * spec.intermediate_size
    return spec.num_layers * (width * kept + 4 * 4 * spec.hidden_size)


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
