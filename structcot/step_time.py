"""The time of a training step on GPUs, by count: what the real code launches, what it sends, and the rates of the machine.

A kernel takes as long as its arithmetic or its traffic, whichever is longer (Williams et al. 2009), one kernel after the other; a
collective as long as its bytes need on the slowest link they cross. Gathers and reductions hide behind the computation of their
micro-batch, and what is longer than that shows; the exchange of heads hides behind nothing. What lies between kernels, and every imbalance
but that of the step plan, is left out: the time is a bound that good kernels come near to.

Legend: T tokens that a rank holds of a micro-batch, Q sum of the squares of its documents' lengths, each over the ranks that share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from structcot.config import Config
from structcot.counting import Tally
from structcot.data.batch import pack
from structcot.data.render import unmasked_sample
from structcot.machines import GPUS_PER_NODE, Machine
from structcot.memory import activation_bytes_per_token, trained_parameters
from structcot.model.spec import ModelSpec
from structcot.model.weights import empty_model
from structcot_kernels._cost import Cost, roofline_seconds
from structcot_kernels.launch import backend, use_backend

SAMPLES = ((8192, 1024), (16384, 1024), (16384, 4096))
"""(tokens, tokens of each document) at which a micro-batch is counted."""

ADAMW_BYTES = 28
"""AdamW in fp32 reads parameter, gradient and two moments, and writes all but the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeTime:
    """Seconds and FLOP of a micro-batch's forward and backward on one GPU, each as a + b T + c Q."""

    seconds_abc: tuple[float, float, float]
    flops_abc: tuple[float, float, float]

    def seconds(self, lengths: Sequence[int], sequence: int) -> float:
        """Seconds over documents of these lengths, shared by `sequence` ranks."""
        return _at(self.seconds_abc, lengths, sequence)

    def flops(self, lengths: Sequence[int], sequence: int) -> float:
        """Floating-point operations of one rank."""
        return _at(self.flops_abc, lengths, sequence)


def _at(abc: tuple[float, float, float], lengths: Sequence[int], sequence: int) -> float:
    fixed, per_token, per_square = abc
    return fixed + (per_token * sum(lengths) + per_square * sum(float(length) ** 2 for length in lengths)) / sequence


def count_compute(spec: ModelSpec, config: Config, recompute: str, machine: Machine) -> ComputeTime:
    """Count a few micro-batches of a model of one and of two layers, and read the line through them at all layers."""
    seconds, flops = [], []
    for tokens, document in SAMPLES:
        lengths = [document] * (tokens // document)
        one, two = (launched_costs(replace(spec, num_layers=layers), config, recompute, lengths) for layers in (1, 2))
        for values, measure in ((seconds, lambda costs: roofline_seconds(costs, machine.flops, machine.memory_rate)), (flops, total_flops)):
            values.append(measure(one) + (measure(two) - measure(one)) * (spec.num_layers - 1))
    points = np.array([[1.0, tokens, tokens * document] for tokens, document in SAMPLES])
    solve = lambda values: tuple(float(value) for value in np.linalg.solve(points, np.array(values)))  # noqa: E731
    return ComputeTime(seconds_abc=solve(seconds), flops_abc=solve(flops))  # type: ignore[arg-type]


def launched_costs(spec: ModelSpec, config: Config, recompute: str, lengths: Sequence[int]) -> list[Cost]:
    """Every kernel of a forward and backward over documents of these lengths, all tokens with a label, as a GPU runs it."""
    model = empty_model(spec, config)
    model.recompute = recompute
    batch = pack([unmasked_sample(np.zeros(length, dtype=np.int64), source="") for length in lengths], device="meta")
    if config.tuning.lora_dropout:
        batch = replace(batch, dropout_keys_T=torch.zeros(sum(lengths), dtype=torch.int64, device="meta"))
    chosen = backend()
    use_backend("triton")
    try:
        with Tally(lambda *_: "") as tally:
            loss_sum, _ = model(batch)
            loss_sum.backward()
    finally:
        use_backend(chosen)
    return [kernel.cost for kernel in tally.kernels]


def total_flops(costs: Sequence[Cost]) -> float:
    """Floating-point operations of all kernels."""
    return sum(cost.flops for cost in costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTime:
    """Seconds of a micro-batch's collectives on one rank: gathers and reductions of weights, exchanges of heads, and copies to the host."""

    weights: float
    heads: float
    host: float


def count_sending(
    spec: ModelSpec, config: Config, recompute: str, machine: Machine, num_ranks: int, collective_bytes: Mapping[str, int], tokens: int
) -> SendTime:
    """From the bytes that a micro-batch of `tokens` tokens a rank gathers, reduces and exchanges (structcot.predict)."""
    shards, sequence = num_ranks // config.parallel.replicate, config.parallel.sequence
    moved = collective_bytes.get("all_gather_into_tensor", 0) + collective_bytes.get("reduce_scatter", 0)
    weights = link_seconds(moved, shards, machine)
    if config.parallel.replicate > 1:  # what a shard's gradients are reduced to goes once around the replicas, over the network
        weights += 2 * 4 * trained_parameters(spec, config) / shards / machine.network_rate
    host_bytes = 0.0
    if config.parallel.cpu_offload == "activations":
        host_bytes = 2.0 * activation_bytes_per_token(spec, config)[recompute] * tokens
    elif config.parallel.cpu_offload == "parameters":
        host_bytes = collective_bytes.get("all_gather_into_tensor", 0) / shards
    return SendTime(
        weights=weights,
        heads=link_seconds(collective_bytes.get("all_to_all", 0), sequence, machine),
        host=host_bytes / machine.host_rate,
    )


def link_seconds(num_bytes: float, num_ranks: int, machine: Machine) -> float:
    """Time in which each of `num_ranks` consecutive ranks gets its share of `num_bytes` from each other one."""
    inside = num_bytes * (num_ranks - 1) / num_ranks / machine.node_rate
    nodes = -(-num_ranks // GPUS_PER_NODE)
    between = num_bytes * (nodes - 1) / nodes / GPUS_PER_NODE / machine.network_rate  # once into a node, by the adapters of all its GPUs
    return max(inside, between)


def optimizer_seconds(spec: ModelSpec, config: Config, machine: Machine, num_ranks: int) -> float:
    """Time of the update of what a rank holds."""
    held = trained_parameters(spec, config) / (num_ranks // config.parallel.replicate)
    if config.parallel.cpu_offload in ("optimizer", "parameters"):
        return held * (ADAMW_BYTES / machine.host_memory_rate + 8 / machine.host_rate)
    return held * ADAMW_BYTES / machine.memory_rate
