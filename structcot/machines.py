"""What GPUs and their networks can do, for predictions: memory, arithmetic and the links between them.

Sizes and peaks are the makers' data sheets'. The share of a peak that long products, copies and collectives reach is an assumption, which
every plan prints.
"""

from __future__ import annotations

from dataclasses import dataclass

from structcot.config import nearest
from structcot.errors import ConfigError

GPUS_PER_NODE = 8
"""GPUs that NVLink connects to one another; nodes are connected by one network adapter for each GPU."""

HOST_MEMORY_RATE = 40e9
"""Bytes/s of the host's memory for each GPU: two sockets of DDR5 for eight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One GPU in a node of eight. `memory_bytes` is what PyTorch sees, `reserved_bytes` what CUDA and NCCL take of it.

    Rates are what is assumed to be reached, in FLOP/s (dense bf16) and bytes/s: of device memory, of the links inside a node and between
    nodes (one direction, for each GPU), between GPU and host, and of the host's memory for each GPU.
    """

    name: str
    memory_bytes: float
    reserved_bytes: float
    flops: float
    memory_rate: float
    node_rate: float
    network_rate: float
    host_rate: float
    host_memory_rate: float


def _machine(
    name: str, gib: float, peak_flops: float, memory_rate: float, node_rate: float, network_rate: float, host_rate: float
) -> Machine:
    """A machine from its data sheet: products reach 81 % of the peak, memory 90 %, links 80 %."""
    return Machine(
        name=name,
        memory_bytes=gib * 2**30,
        reserved_bytes=2.0 * 2**30,
        flops=0.81 * peak_flops,
        memory_rate=0.9 * memory_rate,
        node_rate=0.8 * node_rate,
        network_rate=0.8 * network_rate,
        host_rate=0.8 * host_rate,
        host_memory_rate=HOST_MEMORY_RATE,
    )


MACHINES = {
    machine.name: machine
    for machine in (
        _machine("h100-80gb", 79.1, 989e12, 3.35e12, 450e9, 50e9, 64e9),
        _machine("h200-141gb", 139.8, 989e12, 4.8e12, 450e9, 50e9, 64e9),
        _machine("b200-180gb", 178.0, 2250e12, 8.0e12, 900e9, 50e9, 64e9),
        _machine("a100-80gb", 79.1, 312e12, 2.04e12, 300e9, 25e9, 32e9),
    )
}


def find_machine(name: str) -> Machine:
    """The machine of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in MACHINES:
        raise ConfigError(f'--device: got "{name}"{nearest(name, list(MACHINES))}; known are {", ".join(MACHINES)}')
    return MACHINES[name]
