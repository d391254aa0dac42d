"""Plan: what a run needs on GPUs and how long it takes, predicted on any machine, without a GPU and without the model's weights.

Memory is found by running the real code of a step on fake tensors (structcot.predict), time by counting what it launches and sends
(structcot.step_time), both over the step plan of the real data, or over documents of an assumed length.

Run as `python -m structcot.plan CONFIG --world-size 8 --device h100-80gb`, or `structcot plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from structcot.config import Config
from structcot.config_file import parse_config
from structcot.data.plan import StepPlan, spread
from structcot.data.render import load_tokenizer
from structcot.data.samples import prepare_samples
from structcot.distributed import need_layout, need_shared_heads
from structcot.errors import ConfigError
from structcot.fetch import resolve_shape
from structcot.machines import Machine
from structcot.memory import USABLE_SHARES, least_recompute
from structcot.model.spec import ModelSpec, read_spec
from structcot.predict import StepMemory, predict_memory
from structcot.prepare import plan_steps
from structcot.step_time import ComputeTime, SendTime, count_compute, count_sending, optimizer_seconds

MEASURED_STEPS = 64
"""Steps of the run that are timed, evenly spaced."""

GRAIN_TOKENS = 1024
"""The largest micro-batch is told in steps of so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Documents as ranks get them: `steps` holds lengths by [step][micro-batch][rank], some steps of `num_steps`; tokens are of all ranks.

    `worst` is the micro-batch of most tokens, `longest` the tokens of the longest document. Where ranks share documents a rank here is a
    group of them.
    """

    steps: list[list[list[tuple[int, ...]]]]
    worst: tuple[int, ...]
    longest: int
    num_steps: int
    tokens_per_step: float
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was predicted. `fits` says whether the peak leaves the machine what it reserves; `instead` are settings that would fit."""

    config: Config
    machine: Machine
    num_ranks: int
    recompute: str
    microbatch_tokens: int
    memory: StepMemory
    fits: bool
    largest_microbatch_tokens: int
    instead: tuple[str, ...]
    workload: Workload
    step_seconds: float
    exposed_seconds: float
    optimizer_seconds: float

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of the data, on each GPU."""
        return self.workload.tokens_per_step / self.step_seconds / self.num_ranks

    @property
    def run_hours(self) -> float:
        """From the first step to the last."""
        return self.workload.num_steps * self.step_seconds / 3600


def plan_run(config: Config, num_ranks: int, machine: Machine, document_tokens: int | None = None) -> Plan:
    """Predict the run of `config`; with `document_tokens` over micro-batches full of documents of that length instead of its data.

    Raises:
        ConfigError: if the layout does not fit the number of GPUs.
        StructcotError: if the config, the data or the model's shape cannot be read.
    """
    need_layout(config.parallel, num_ranks)
    model_dir = resolve_shape(config.model_name_or_path, config.revision)
    spec = read_spec(model_dir)
    need_shared_heads(config.parallel, spec.num_heads)
    if document_tokens is None:
        data = prepare_samples(config, load_tokenizer(model_dir), model_dir, lambda: False)
        workload = of_data(plan_steps(config, data), config, spec, num_ranks)
    else:
        workload = of_documents(document_tokens, config, num_ranks)
    return predict(spec, config, num_ranks, machine, workload)


def predict(spec: ModelSpec, config: Config, num_ranks: int, machine: Machine, workload: Workload) -> Plan:
    """The prediction of one workload."""
    sequence = config.parallel.sequence
    tokens = -(-sum(workload.worst) // sequence)
    recompute = recompute_on(machine, spec, config, tokens, num_ranks)
    memory = predict_memory(spec, config, workload.worst, num_ranks=num_ranks, recompute=recompute, triton=True)
    room_bytes = machine.memory_bytes - machine.reserved_bytes
    fits = memory.peak_total <= room_bytes
    largest = largest_microbatch(spec, config, num_ranks, room_bytes)
    compute = count_compute(spec, config, recompute, machine)
    sending = count_sending(spec, config, recompute, machine, num_ranks, memory.collective_bytes, tokens)
    updating = optimizer_seconds(spec, config, machine, num_ranks)
    steps = np.array([step_time(step, compute, sending, sequence, spec.num_layers) for step in workload.steps])
    step_seconds, exposed_seconds = steps.mean(axis=0)
    return Plan(
        config=config,
        machine=machine,
        num_ranks=num_ranks,
        recompute=recompute,
        microbatch_tokens=tokens,
        memory=memory,
        fits=fits,
        largest_microbatch_tokens=largest,
        instead=() if fits else tuple(alternatives(spec, config, num_ranks, machine, workload, largest)),
        workload=workload,
        step_seconds=step_seconds + updating,
        exposed_seconds=exposed_seconds,
        optimizer_seconds=updating,
    )


def step_time(
    microbatches: Sequence[Sequence[Sequence[int]]], compute: ComputeTime, sending: SendTime, sequence: int, num_layers: int
) -> tuple[float, float]:
    """Seconds of the micro-batches of a step, and how many of them wait for a link; all ranks wait for the slowest."""
    total = exposed = 0.0
    for ranks in microbatches:
        working = max(compute.seconds(lengths, sequence) for lengths in ranks)
        # Nothing hides the first gather of a forward and of a backward; the links of GPUs and of the host work side by side.
        hidden = max(sending.weights, sending.host)
        waiting = sending.heads + max(hidden / num_layers, hidden - working)
        total, exposed = total + working + waiting, exposed + waiting
    return total, exposed


# The documents


def of_data(plan: StepPlan, config: Config, spec: ModelSpec, num_ranks: int) -> Workload:
    """The step plan of the data, laid over the ranks."""
    sequence, max_tokens = config.parallel.sequence, config.parallel.max_tokens_per_microbatch * config.parallel.sequence
    chosen = np.unique(np.linspace(0, plan.num_steps - 1, min(plan.num_steps, MEASURED_STEPS)).astype(int))
    steps = []
    for step in chosen:
        samples = plan.samples_of(step)
        bins = spread(
            samples,
            plan.lengths_S[samples],
            num_ranks=num_ranks // sequence,
            max_tokens=max_tokens,
            attention_ratio=spec.attention_ratio,
        )
        steps.append([[tuple(plan.lengths_S[list(one)].tolist()) for one in microbatch] for microbatch in zip(*bins, strict=True)])
    worst = max((lengths for step in steps for microbatch in step for lengths in microbatch), key=sum)
    tokens = plan.lengths_S[plan.order_N].sum() / plan.num_steps
    origin = f"{len(plan.lengths_S):,} samples of the data, {plan.lengths_S.sum():,} tokens, the longest {plan.lengths_S.max():,}"
    return Workload(
        steps=steps,
        worst=worst,
        longest=int(plan.lengths_S.max()),
        num_steps=plan.num_steps,
        tokens_per_step=float(tokens),
        origin=origin,
    )


def of_documents(document_tokens: int, config: Config, num_ranks: int) -> Workload:
    """One step in which every rank's micro-batch is full of documents of one length.

    Raises:
        ConfigError: if not even one fits.
    """
    sequence = config.parallel.sequence
    number = config.parallel.max_tokens_per_microbatch * sequence // document_tokens
    if number == 0:
        raise ConfigError(
            f"--document-tokens: got {document_tokens}, but a micro-batch holds"
            f" {config.parallel.max_tokens_per_microbatch * sequence} tokens; raise parallel.max_tokens_per_microbatch or parallel.sequence"
        )
    lengths = (document_tokens,) * number
    ranks = num_ranks // sequence
    origin = f"assumed documents of {document_tokens:,} tokens, every micro-batch full, one step"
    return Workload(
        steps=[[[lengths] * ranks]],
        worst=lengths,
        longest=document_tokens,
        num_steps=1,
        tokens_per_step=float(sum(lengths) * ranks),
        origin=origin,
    )


# What fits


def recompute_on(machine: Machine, spec: ModelSpec, config: Config, tokens: int, num_ranks: int) -> str:
    """What the run will choose: it asks for free memory when weights and optimizer are in place."""
    if config.parallel.recompute != "auto":
        return config.parallel.recompute
    resting = quick_memory(spec, config, [GRAIN_TOKENS], num_ranks, "full", lambda memory: sum(memory.resting_bytes.values()))
    free_bytes = machine.memory_bytes - machine.reserved_bytes - resting
    return least_recompute(config, spec, tokens, USABLE_SHARES["cuda"] * free_bytes, num_ranks)


def quick_memory(
    spec: ModelSpec, config: Config, lengths: Sequence[int], num_ranks: int, recompute: str, measure: Callable[[StepMemory], int]
) -> float:
    """A figure of the whole model, on the line through those of two and of four layers."""
    few, more = (
        measure(predict_memory(replace(spec, num_layers=layers), config, lengths, num_ranks=num_ranks, recompute=recompute, triton=True))
        for layers in (2, 4)
    )
    return few + (more - few) / 2 * (spec.num_layers - 2)


def quick_peak(spec: ModelSpec, config: Config, lengths: Sequence[int], num_ranks: int, recompute: str) -> float:
    """The peak of the whole model, read off small ones."""
    return quick_memory(spec, config, lengths, num_ranks, recompute, lambda memory: memory.peak_total)


def largest_microbatch(spec: ModelSpec, config: Config, num_ranks: int, room_bytes: float) -> int:
    """Most tokens a rank of one micro-batch that fits, with everything recomputed unless the config says otherwise."""
    recompute = "full" if config.parallel.recompute == "auto" else config.parallel.recompute
    if config.parallel.cpu_offload == "activations" and config.parallel.recompute == "auto":
        recompute = "block"
    sequence, few, more = config.parallel.sequence, 16 * GRAIN_TOKENS, 32 * GRAIN_TOKENS
    low, high = (quick_peak(spec, config, [tokens * sequence], num_ranks, recompute) for tokens in (few, more))
    tokens = few + (room_bytes - low) / (high - low) * (more - few)
    return max(0, int(tokens // GRAIN_TOKENS) * GRAIN_TOKENS)


def alternatives(spec: ModelSpec, config: Config, num_ranks: int, machine: Machine, workload: Workload, largest: int) -> list[str]:
    """Single changes, nearest first, with which the run fits; a micro-batch cannot be smaller than the longest document."""
    room_bytes = machine.memory_bytes - machine.reserved_bytes
    longest, found = workload.longest, []
    for changes, ranks in possible_changes(config, num_ranks, longest, largest):
        changed = with_changes(config, changes)
        sequence = changed.parallel.sequence
        if spec.num_heads % sequence or ranks % (changed.parallel.replicate * sequence):
            continue
        tokens = min(-(-sum(workload.worst) // config.parallel.sequence), changed.parallel.max_tokens_per_microbatch)
        lengths = [longest] if longest >= tokens * sequence else [tokens * sequence]
        recompute = recompute_on(machine, spec, changed, tokens, ranks)
        peak = quick_peak(spec, changed, lengths, ranks, recompute)
        if peak <= room_bytes:
            words = " and ".join(
                [*(f"{key} = {value}" for key, value in changes.items()), *([f"{ranks} GPUs"] if ranks != num_ranks else [])]
            )
            found.append(f"{words} ({peak / 2**30:.1f} GiB)")
    return found


def possible_changes(config: Config, num_ranks: int, longest: int, largest: int) -> list[tuple[dict[str, str | int], int]]:
    """(changed keys, GPUs), what changes the run least first."""
    changes: list[tuple[dict[str, str | int], int]] = []
    parallel = config.parallel
    if parallel.recompute != "full" and parallel.recompute != "auto":
        changes.append(({"parallel.recompute": "full"}, num_ranks))
    if longest <= largest * parallel.sequence < parallel.max_tokens_per_microbatch * parallel.sequence:
        changes.append(({"parallel.max_tokens_per_microbatch": largest}, num_ranks))
    for degree in (2, 4, 8):
        if degree > parallel.sequence:
            smaller = -(-parallel.max_tokens_per_microbatch * parallel.sequence // degree)
            changes.append(({"parallel.sequence": degree, "parallel.max_tokens_per_microbatch": smaller}, num_ranks))
    if config.tuning.method == "full" and config.train.optimizer == "adamw":
        changes.append(({"train.optimizer": "adamw-8bit"}, num_ranks))
        changes.append(({"parallel.cpu_offload": "optimizer"}, num_ranks))
    if parallel.cpu_offload == "none":
        changes.append(({"parallel.cpu_offload": "activations"}, num_ranks))
        changes.append(({"parallel.cpu_offload": "parameters"}, num_ranks))
    return [*changes, *(({}, factor * num_ranks) for factor in (2, 4, 8))]


def with_changes(config: Config, changes: dict[str, str | int]) -> Config:
    """The config with some dotted keys set anew."""
    values = config.model_dump(mode="json", exclude_none=True)
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return parse_config(values, "plan")


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("plan")
