"""Everything before the first step: data checked and planned, model loaded and sharded, checkpoint taken up, one micro-batch rehearsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from structcot.checkpoint import CheckpointWriter, TrainState, load_latest
from structcot.config import Config
from structcot.console import say
from structcot.data.loader import Feed
from structcot.device import choose_operations, device_report, need_what_is_asked
from structcot.distributed import World
from structcot.errors import ConfigError, TrainingDiverged
from structcot.files import json_sha256
from structcot.flops import peak_flops_per_second
from structcot.live_eval import LiveEval, load_problems, make_live_eval
from structcot.memory import choose_recompute
from structcot.metrics import check_trackers
from structcot.model.decoder import Decoder
from structcot.model.lora import adapters_of
from structcot.model.parts import local_part
from structcot.model.weights import build_model, weights_fingerprint
from structcot.offload import HostMemory
from structcot.optim import Optimizer, make_optimizer
from structcot.prepare import Prepared, prepare
from structcot.rundir import need_shared, write_manifest
from structcot.signals import StopFlag
from structcot.watchdog import Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same from the first step to the last. `peak_flops` is the device's rate in FLOP/s; `live` what is asked on the way."""

    config: Config
    output_dir: Path
    device: torch.device
    world: World
    prepared: Prepared
    feed: Feed
    model: Decoder
    optimizer: Optimizer
    writer: CheckpointWriter
    peak_flops: float
    stop: StopFlag
    watchdog: Watchdog
    live: LiveEval | None = None


def start(config: Config, world: World, device: torch.device, stop: StopFlag, watchdog: Watchdog) -> tuple[Run, TrainState]:
    """The run as it stands before its next step.

    Raises:
        StopRequested: if a signal asked to stop.
        StructcotError: if the config, data, model or checkpoint is wrong.
    """
    with world.agreed():
        need_what_is_asked(config)
        check_trackers(config.log.report_to)
    watchdog.beat("reading the problems of the live evaluation, or waiting for the first rank to do so")
    problems = world.first(lambda: load_problems(config))
    watchdog.beat("preparing the data, or waiting for the first rank to do so")
    prepared = prepare_everywhere(config, world, stop)
    world.check(stop)
    with world.agreed():
        live = make_live_eval(problems, config, prepared)
    watchdog.beat("loading the model")
    feed = make_feed(prepared, config, world, device)
    with world.agreed():
        attention, operations = choose_operations(config, prepared.spec, device)
        say(operations)
        model = build_model(prepared.model_dir, config, device, world.mesh)
        optimizer = make_optimizer(model.trained_parameters(), config.train, offload=config.parallel.cpu_offload == "optimizer")
    model.attention, model.sequence_group = attention, world.sequence_group
    model.host_memory = HostMemory(device) if config.parallel.cpu_offload == "activations" else None
    model.recompute = choose_recompute(config, model.spec, feed.max_microbatch_tokens(), device, world)
    weights_sha256 = world.first(lambda: weights_fingerprint(prepared.model_dir))
    fresh = TrainState(step=0, num_tokens=0, identity=prepared.identity, plan_sha256=prepared.plan.sha256, weights_sha256=weights_sha256)
    output_dir = Path(config.output_dir)
    state = load_latest(output_dir / "checkpoints", fresh, model, optimizer, world)
    with world.agreed():
        if world.is_first:
            asked = {"live_eval": json_sha256(live.prompts)} if live is not None else {}
            write_manifest(output_dir, {**prepared.hashes, "weights": weights_sha256, **asked}, device_report(device))
    run = Run(
        config=config,
        output_dir=output_dir,
        device=device,
        world=world,
        prepared=prepared,
        feed=feed,
        model=model,
        optimizer=optimizer,
        writer=CheckpointWriter(output_dir / "checkpoints", world, config.checkpoint.save_total_limit),
        peak_flops=peak_flops_per_second(device, model.compute_dtype) * world.size,
        stop=stop,
        watchdog=watchdog,
        live=live,
    )
    announce(run, state)
    world.check(stop)
    if state.step == 0:
        rehearse(run)
    return run, state


def prepare_everywhere(config: Config, world: World, stop: StopFlag) -> Prepared:
    """The data as all ranks read it: prepared by the first, which writes what is written, then found in the cache by the others.

    Raises:
        StructcotError: if the data or the model is wrong, or the output directory is not the same on all machines.
    """
    prepared = None
    for turn in (True, False):
        with world.agreed():
            if world.is_first == turn:
                prepared = prepare(config, stop.is_set, writes=turn)
                need_shared(config)
    if prepared is None:
        raise RuntimeError("a rank is the first or not")
    return prepared


def make_feed(prepared: Prepared, config: Config, world: World, device: torch.device) -> Feed:
    """The training samples as this rank reads them."""
    dropout = config.tuning.method == "lora" and config.tuning.lora_dropout > 0.0
    return Feed(
        store=prepared.data.train,
        indices_S=prepared.data.train_indices,
        plan=prepared.plan,
        max_tokens=config.parallel.max_tokens_per_microbatch,
        attention_ratio=prepared.spec.attention_ratio,
        device=device,
        dropout_seed=config.seed if dropout else None,
        rank=world.data_rank,
        num_ranks=world.num_data_ranks,
        share=(world.sequence_rank, world.sequence),
    )


def rehearse(run: Run) -> None:
    """Forward and backward of each rank's costliest micro-batch, without an update: what does not fit, or would not learn, shows now.

    Raises:
        ConfigError: if it does not fit into memory.
        TrainingDiverged: if a gradient is missing, not finite, or zero in a whole adapter.
    """
    run.watchdog.beat("rehearsing the costliest micro-batch")
    batch = run.feed.costliest_batch()
    try:
        loss_sum, _ = run.model(batch)
        loss_sum.backward()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"parallel: the costliest micro-batch, {batch.num_tokens} tokens with recompute {run.model.recompute}, does not fit into the"
            f" memory of rank {run.world.rank}: {error}; structcot plan tells what would, or lower parallel.max_tokens_per_microbatch"
        ) from error
    run.watchdog.beat("looking at the rehearsal's gradients")
    where = f"before step 1, on {', '.join(batch.sources_S[:8]) or 'no record'}"
    with run.world.agreed():
        for name, parameter in run.model.trained_parameters().items():
            if parameter.grad is None or not local_part(parameter.grad).isfinite().all():
                raise TrainingDiverged(
                    f"{where}: the gradient of {name} is missing or not finite; look at these records and at the base model"
                )
    pairs = list(adapters_of(run.model))
    learning = run.world.sum(torch.tensor([local_part(pair.lora_B.grad).any() for _, pair in pairs], dtype=torch.float64))  # type: ignore[arg-type]
    with run.world.agreed():
        for (name, _), learns in zip(pairs, learning.tolist(), strict=True):
            if not learns:
                raise TrainingDiverged(f"{where}: the gradient of {name}.lora_B is zero everywhere, so this adapter would never learn")
    run.optimizer.zero_grad()


def announce(run: Run, state: TrainState) -> None:
    """Say what is about to run, on what."""
    plan, config, world = run.prepared.plan, run.config, run.world
    trained = sum(parameter.numel() for parameter in run.model.trained_parameters().values())
    total = sum(parameter.numel() for parameter in run.model.parameters())
    ranks = f"{world.size} ranks ({world.num_data_ranks} x {world.sequence}) of " if world.size > 1 else ""
    say(
        f"{config.model_name_or_path}: {total / 1e6:.1f} M weights, {trained / 1e6:.2f} M trained ({config.tuning.method}),"
        f" {config.train.dtype} on {ranks}{device_report(run.device)['name']}, recompute {run.model.recompute}\n"
        f"{len(plan.lengths_S)} samples, {plan.lengths_S.sum():,} tokens, {plan.steps_per_epoch} steps an epoch, {plan.num_steps} in all;"
        + (f" going on after step {state.step}" if state.step else " starting")
    )
