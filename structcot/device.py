"""What machine this is, and whether it can do what the config asks for. Nothing falls back silently: what cannot be done is an error."""

from __future__ import annotations

import os

import torch

from structcot.config import Config
from structcot.distributed import need_shared_heads, num_processes
from structcot.errors import ConfigError
from structcot.model.spec import ModelSpec
from structcot_kernels.attention_varlen import choose_attention, describe_attention
from structcot_kernels.launch import INTERPRETED, use_backend


def choose_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def need_what_is_asked(config: Config) -> None:
    """Refuse settings that this machine cannot honour.

    Raises:
        ConfigError: naming the key and what to set instead.
    """
    if config.kernels == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise ConfigError(
            'kernels: got "triton", but there is no GPU here; use "auto" or "torch", or set TRITON_INTERPRET=1 to run the kernels'
            " interpreted, which is right and very slow"
        )


def choose_operations(config: Config, spec: ModelSpec, device: torch.device) -> tuple[str, str]:
    """Set what runs the operations of this process, and choose who computes attention: its name, and a line that says both.

    `auto` is Triton on a GPU and PyTorch on a CPU; interpreted kernels run only where the config asks for Triton.

    Raises:
        ConfigError: if the attention that the config names cannot run here, or ranks cannot share the model's heads.
    """
    need_shared_heads(config.parallel, spec.num_heads)
    backend = config.kernels if config.kernels != "auto" else "triton" if device.type == "cuda" else "torch"
    use_backend(backend)
    heads = (config.attn_implementation, device, getattr(torch, config.train.dtype), spec.head_dim)
    try:
        attention, sentence = choose_attention(*heads), describe_attention(*heads)
    except RuntimeError as error:
        raise ConfigError(f'attn_implementation: got "{config.attn_implementation}"; {error}') from error
    return attention, f"kernels: {backend}{', interpreted' if backend == 'triton' and INTERPRETED else ''}; {sentence}"


def device_report(device: torch.device) -> dict[str, object]:
    """What the manifest says of the machine."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {"type": device.type, "name": name, "processes": num_processes()}
