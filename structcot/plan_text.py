"""What `structcot plan` says: for people as Markdown, for programs as a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structcot.ledger import in_gib
from structcot.plan import Plan
from structcot.step_time import link_seconds


def text_of(plan: Plan, price: float) -> str:
    """The prediction, with everything that it assumes."""
    machine, memory, workload = plan.machine, plan.memory, plan.workload
    peak_gib, total_gib, kept_gib = memory.peak_total / 2**30, machine.memory_bytes / 2**30, machine.reserved_bytes / 2**30
    verdict = f"fits: peak {peak_gib:.1f} GiB of {total_gib:.1f}, of which CUDA and NCCL keep {kept_gib:.1f}"
    if not plan.fits:
        verdict = f"does not fit: needs {peak_gib:.1f} GiB, and {total_gib - kept_gib:.1f} are there; " + instead_of(plan)
    lines = [
        f"{plan.num_ranks} x {machine.name}: {verdict}",
        f"Documents: {workload.origin}.",
        "",
        "| memory of a GPU | at the peak, GiB | between steps, GiB |",
        "|---|---|---|",
        *memory_rows(plan),
        "",
        f"Host memory of a GPU's process beyond that: {memory.host_bytes / 2**30:.1f} GiB.",
        f"Largest micro-batch predicted: {plan.microbatch_tokens:,} tokens a GPU, recompute {plan.recompute};"
        f" as large as {plan.largest_microbatch_tokens:,} would fit.",
        "",
        "| time | |",
        "|---|---|",
        *time_rows(plan, price),
        "",
        "| sent in a micro-batch | GB a GPU | seconds on the link |",
        "|---|---|---|",
        *sending_rows(plan),
        "",
        *(f"- {assumption}" for assumption in assumptions_of(plan)),
    ]
    return "\n".join(lines)


def instead_of(plan: Plan) -> str:
    """What would fit."""
    if not plan.instead:
        return "no single change of the settings would fit; use more GPUs, or cut the documents by data.max_length"
    return "this would: " + "; ".join(plan.instead[:4])


def memory_rows(plan: Plan) -> list[str]:
    """Kinds of memory, largest first, and their sum."""
    peak, resting = in_gib(plan.memory.peak_bytes), in_gib(plan.memory.resting_bytes)
    rows = [f"| {kind} | {size:.2f} | {cell(resting, kind)} |" for kind, size in peak.items()]
    return [*rows, f"| sum | {sum(peak.values()):.2f} | {sum(resting.values()):.2f} |"]


def cell(values: Mapping[str, float], kind: str) -> str:
    """A figure, or nothing where there is none."""
    return f"{values[kind]:.2f}" if kind in values else ""


def time_rows(plan: Plan, price: float) -> list[str]:
    """Of a step and of the run."""
    workload, gpu_hours = plan.workload, plan.run_hours * plan.num_ranks
    rate = plan.tokens_per_second_per_gpu
    rows = [
        f"| one step | {plan.step_seconds:.2f} s, of which {plan.exposed_seconds:.2f} s wait for links"
        f" and {plan.optimizer_seconds:.2f} s are the optimizer's |",
        f"| tokens of a step | {workload.tokens_per_step:,.0f} |",
        f"| throughput | {rate:,.0f} tokens/s a GPU, {rate * plan.num_ranks:,.0f} in all |",
    ]
    if workload.num_steps > 1:
        rows.append(f"| {workload.num_steps} steps | {plan.run_hours:.1f} h, {gpu_hours:.0f} GPU hours |")
        if price:
            rows.append(f"| cost at {price:g} for an hour of a GPU | {price * gpu_hours:,.0f} |")
    return rows


def sending_rows(plan: Plan) -> list[str]:
    """Each kind of collective, and what it would take alone."""
    parallel = plan.config.parallel
    shards = plan.num_ranks // parallel.replicate
    names = {
        "all_gather_into_tensor": ("all-gather of weights", shards),
        "reduce_scatter": ("reduce-scatter of gradients", shards),
        "all_to_all": ("exchange of heads", parallel.sequence),
    }
    rows = []
    for name, (label, ranks) in names.items():
        size = plan.memory.collective_bytes.get(name, 0)
        if size:
            rows.append(f"| {label} | {size / 1e9:.1f} | {link_seconds(size, ranks, plan.machine):.2f} |")
    return rows or ["| nothing | | |"]


def assumptions_of(plan: Plan) -> list[str]:
    """What the figures rest on."""
    machine = plan.machine
    return [
        "Nothing here was timed. Memory is what the step's code allocates, found by running it on fake tensors; gaps of the allocator are"
        " not in it.",
        f"A GPU reaches {machine.flops / 1e12:.0f} TFLOP/s in bf16, {machine.memory_rate / 1e12:.2f} TB/s of its memory,"
        f" {machine.node_rate / 1e9:.0f} GB/s to its node, {machine.network_rate / 1e9:.0f} GB/s to other nodes and"
        f" {machine.host_rate / 1e9:.0f} GB/s to the host; a kernel takes as long as its arithmetic or its traffic, whichever is longer.",
        "Gathers, reductions and copies to the host hide behind the computation of their micro-batch but for the first; the exchange of"
        " heads hides behind nothing. Time between kernels, data loading, checkpoints and evaluation are left out.",
        "Every token has a label; in real data those of prompts have none, which saves a little of the head.",
    ]


def facts_of(plan: Plan, price: float) -> dict[str, Any]:
    """The same for programs; sizes are bytes, times seconds."""
    return {
        "device": plan.machine.name,
        "world_size": plan.num_ranks,
        "fits": plan.fits,
        "instead": list(plan.instead),
        "recompute": plan.recompute,
        "microbatch_tokens": plan.microbatch_tokens,
        "largest_microbatch_tokens": plan.largest_microbatch_tokens,
        "peak_gib": plan.memory.peak_total / 2**30,
        "memory_gib": plan.machine.memory_bytes / 2**30,
        "peak_gib_by_kind": in_gib(plan.memory.peak_bytes),
        "resting_gib_by_kind": in_gib(plan.memory.resting_bytes),
        "host_gib": plan.memory.host_bytes / 2**30,
        "collective_bytes": plan.memory.collective_bytes,
        "step_seconds": plan.step_seconds,
        "exposed_seconds": plan.exposed_seconds,
        "optimizer_seconds": plan.optimizer_seconds,
        "tokens_per_step": plan.workload.tokens_per_step,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "steps": plan.workload.num_steps,
        "finish_hours": plan.run_hours,
        "gpu_hours": plan.run_hours * plan.num_ranks,
        "cost": price * plan.run_hours * plan.num_ranks,
        "documents": plan.workload.origin,
        "assumptions": assumptions_of(plan),
    }
