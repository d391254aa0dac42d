"""The training run: a file of demonstrations in, an adapter out.

`train` is the whole run, `train_step` one optimizer step; read these two first. A step sums the loss over its micro-batches, divides
once by the supervised tokens of the whole step, clips, checks that everything is finite, and only then changes the weights. Whatever ends
the run leaves through one checkpoint, and the same command goes on from it.

Run as `python -m structcot.train CONFIG [key=value ...]`, under torchrun, or as `structcot train`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from structcot.checkpoint import TrainState, complete_checkpoints, last_complete, load_latest, save_checkpoint
from structcot.config import Config
from structcot.console import Progress, say
from structcot.data.batch import MicroBatch
from structcot.data.loader import Feed, eval_batches
from structcot.device import choose_device, choose_operations, choose_recompute, device_report, need_what_is_asked, peak_memory_gib
from structcot.errors import CheckpointError, Interrupted, StoppedWithCheckpoint, TrainingDiverged
from structcot.export import export_trained
from structcot.flops import StepFlops, peak_flops_per_second, step_flops
from structcot.losses import mean_losses, need_finite
from structcot.metrics import MetricsFile, StepReport, check_trackers, open_trackers
from structcot.model.decoder import Decoder
from structcot.model.lora import adapters_of
from structcot.model.weights import build_model, weights_fingerprint
from structcot.optim import learning_rate, make_optimizer, set_learning_rate
from structcot.prepare import Prepared, prepare
from structcot.report import write_report
from structcot.rundir import locked, write_manifest
from structcot.signals import StopFlag, StopRequested
from structcot_kernels import linear_cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same from the first step to the last. `peak_flops` is the device's rate in FLOP/s."""

    config: Config
    output_dir: Path
    device: torch.device
    prepared: Prepared
    feed: Feed
    model: Decoder
    optimizer: torch.optim.Optimizer
    peak_flops: float
    stop: StopFlag


def train(config: Config) -> dict[str, str | int]:
    """Run `config` from wherever its output directory stands to the exported adapter or model; tells where everything is.

    Raises:
        StoppedWithCheckpoint: if a signal asked to stop; the same call goes on.
        StructcotError: if the input is wrong or the run fails; see structcot.errors.
    """
    output_dir = Path(config.output_dir)
    checkpoints = output_dir / "checkpoints"
    with StopFlag() as stop, locked(output_dir):
        try:
            run, state = start(config, stop)
            state = train_steps(run, state)
        except (StopRequested, Interrupted) as request:
            if complete_checkpoints(checkpoints):
                message = f"stopped by {stop.signal_name} before the next step; {last_complete(checkpoints)}, the same command goes on"
                raise StoppedWithCheckpoint(message) from request
            raise Interrupted(f"stopped by {stop.signal_name} before the first step; the same command starts again") from request
        except OSError as error:
            raise CheckpointError(
                f"{output_dir}: the run cannot go on: {error}; {last_complete(checkpoints)}; mend the cause and run the same command again"
            ) from error
        (exported,) = export_trained(run.model, run.prepared.model_dir, config, output_dir)
        report_path = write_report(output_dir)
    say(f"{state.step} steps, {state.num_tokens:,} tokens; what was exported reloads as what was trained. To serve it:")
    say(f"  {exported.serve_command}")
    return {
        "steps": state.step,
        "num_tokens": state.num_tokens,
        "report": str(report_path),
        "weights": str(exported.path),
        "metrics": str(output_dir / "metrics.jsonl"),
        "serve": exported.serve_command,
    }


def start(config: Config, stop: StopFlag) -> tuple[Run, TrainState]:
    """Check and plan the data, load the model, take up the newest checkpoint, and prove on the costliest micro-batch that a step works.

    Raises:
        StopRequested: if a signal asked to stop.
        StructcotError: if the config, data, model or checkpoint is wrong.
    """
    need_what_is_asked(config)
    check_trackers(config.log.report_to)
    prepared = prepare(config, stop.is_set)
    stop.check()
    device = choose_device()
    feed = make_feed(prepared, config, device)
    attention, operations = choose_operations(config, prepared.spec.head_dim, device)
    say(operations)
    model = build_model(prepared.model_dir, config, device)
    model.attention = attention
    model.recompute = choose_recompute(config, model.spec, feed.max_microbatch_tokens(), device)
    optimizer = make_optimizer(model.parameters(), config.train)
    weights_sha256 = weights_fingerprint(prepared.model_dir)
    fresh = TrainState(step=0, num_tokens=0, identity=prepared.identity, plan_sha256=prepared.plan.sha256, weights_sha256=weights_sha256)
    state = load_latest(Path(config.output_dir) / "checkpoints", fresh, model, optimizer)
    write_manifest(Path(config.output_dir), {**prepared.hashes, "weights": weights_sha256}, device_report(device))
    run = Run(
        config=config,
        output_dir=Path(config.output_dir),
        device=device,
        prepared=prepared,
        feed=feed,
        model=model,
        optimizer=optimizer,
        peak_flops=peak_flops_per_second(device, model.compute_dtype),
        stop=stop,
    )
    announce(run, state)
    stop.check()
    if state.step == 0:
        rehearse(run)
    return run, state


def train_steps(run: Run, state: TrainState) -> TrainState:
    """Every step from `state` on, with its checkpoints, held-out loss and reports; the state after the last one, saved.

    Raises:
        StoppedWithCheckpoint: if a signal asked to stop after a step.
        StopRequested: if it did before the first.
        TrainingDiverged: if a loss or gradient is not finite.
    """
    config, num_steps = run.config, run.prepared.plan.num_steps
    metrics_file = MetricsFile(run.output_dir / "metrics.jsonl", state.step)
    trackers = open_trackers(config, state.step + 1) if state.step < num_steps else []
    progress = Progress(state.step, num_steps, config.log.logging_steps)
    saved_step = state.step
    try:
        if state.step and is_due(state.step, config.log.eval_steps, num_steps) and metrics_file.lacks("eval/loss"):
            metrics_file.amend({"eval/loss": evaluate(run)})  # a signal came in between
        while state.step < num_steps:
            report = train_step(run, state)
            state = replace(state, step=report.step, num_tokens=report.num_tokens)
            try:
                if is_due(report.step, config.log.eval_steps, num_steps):
                    report = replace(report, eval_loss=evaluate(run))
            finally:
                metrics_file.append(report.to_metrics())
            progress.show(report)
            for track in trackers:
                track(report.step, report.to_metrics())
            if is_due(state.step, config.checkpoint.save_steps, num_steps):
                save(run, state, metrics_file)
                saved_step = state.step
    except StopRequested as request:
        if state.step == 0:
            raise
        if state.step != saved_step:
            save(run, state, metrics_file)
        raise StoppedWithCheckpoint(
            f"stopped by {run.stop.signal_name} after step {state.step} of {num_steps}; a checkpoint is saved, the same command goes on"
        ) from request
    finally:
        metrics_file.close()
        progress.close()
    return state


def train_step(run: Run, state: TrainState) -> StepReport:
    """The optimizer step after `state`.

    Raises:
        TrainingDiverged: if the loss or the gradient is not finite; the weights are as they were.
        StopRequested: if a signal asked to stop; the weights are as they were.
    """
    start_seconds = time.perf_counter()
    batches = run.feed.step_batches(state.step)
    data_seconds = time.perf_counter() - start_seconds

    num_supervised = sum(batch.num_supervised for batch in batches)
    losses: list[Tensor] = []
    run.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        run.stop.check()
        loss_sum, losses_M = linear_cross_entropy(run.model(batch), run.model.lm_head.weight, batch.labels_M)
        (loss_sum / num_supervised).backward()
        losses.append(losses_M)
    means = mean_losses(batches, losses)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(run.model.trained_parameters(), run.config.train.max_grad_norm))
    need_finite(state.step + 1, means, grad_norm, batches, losses)
    rate = learning_rate(run.config.train, state.step, run.prepared.plan.num_steps)
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()

    step_seconds = time.perf_counter() - start_seconds
    step_tokens = sum(batch.num_tokens for batch in batches)
    flops = count_flops(run, batches)
    return StepReport(
        step=state.step + 1,
        epoch=float(run.prepared.plan.epochs_K[state.step]),
        loss=means.total,
        loss_thought=means.by_kind.get("thought"),
        loss_solution=means.by_kind.get("solution"),
        loss_end=means.by_kind.get("end"),
        loss_by_source=means.by_source,
        grad_norm=grad_norm,
        learning_rate=rate,
        num_tokens=state.num_tokens + step_tokens,
        step_tokens=step_tokens,
        step_supervised_tokens=num_supervised,
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        mfu=flops.model / step_seconds / run.peak_flops,
        hfu=flops.hardware / step_seconds / run.peak_flops,
        peak_gib=peak_memory_gib(run.device),
    )


def evaluate(run: Run) -> float | None:
    """Mean loss over the supervised tokens of the held-out samples, by the same packed path; None where nothing is held out.

    Raises:
        StopRequested: if a signal asked to stop.
        TrainingDiverged: if it is not a number.
    """
    data, total, num_supervised = run.prepared.data, 0.0, 0
    if data.eval is None:
        return None
    run.model.eval()
    with torch.no_grad():
        for batch in eval_batches(data.eval, data.eval_indices, run.feed.max_tokens, run.device):
            run.stop.check()
            loss_sum, _ = linear_cross_entropy(run.model(batch), run.model.lm_head.weight, batch.labels_M)
            total, num_supervised = total + float(loss_sum), num_supervised + batch.num_supervised
    run.model.train()
    if not math.isfinite(total):
        raise TrainingDiverged(
            f"the held-out loss is {total}; lower train.learning_rate and resume from the last checkpoint, or start again"
        )
    return total / num_supervised


def rehearse(run: Run) -> None:
    """Forward and backward of the costliest micro-batch of the run, without an update: what does not fit, or would not learn, shows now.

    Raises:
        TrainingDiverged: if a gradient is missing, not finite, or zero in a whole adapter.
    """
    batch = run.feed.costliest_batch()
    loss_sum, _ = linear_cross_entropy(run.model(batch), run.model.lm_head.weight, batch.labels_M)
    loss_sum.backward()
    where = f"before step 1, on {', '.join(batch.sources_S[:8])}"
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise TrainingDiverged(f"{where}: the gradient of {name} is missing or not finite; look at these records and at the base model")
    for name, pair in adapters_of(run.model):
        if pair.lora_B.grad is None or not pair.lora_B.grad.any():
            raise TrainingDiverged(f"{where}: the gradient of {name}.lora_B is zero everywhere, so this adapter would never learn")
    run.optimizer.zero_grad(set_to_none=True)


def save(run: Run, state: TrainState, metrics_file: MetricsFile) -> None:
    """Write a complete checkpoint of `state`, and the report page of what is known so far."""
    metrics_file.sync()
    save_checkpoint(run.output_dir / "checkpoints", state, run.model, run.optimizer, run.config.checkpoint.save_total_limit)
    write_report(run.output_dir)


def make_feed(prepared: Prepared, config: Config, device: torch.device) -> Feed:
    """The training samples as this process reads them."""
    dropout = config.tuning.method == "lora" and config.tuning.lora_dropout > 0.0
    return Feed(
        store=prepared.data.train,
        indices_S=prepared.data.train_indices,
        plan=prepared.plan,
        max_tokens=config.parallel.max_tokens_per_microbatch,
        attention_ratio=prepared.spec.attention_ratio,
        device=device,
        dropout_seed=config.seed if dropout else None,
    )


def is_due(step: int, interval_steps: int, num_steps: int) -> bool:
    """Whether something done every `interval_steps` steps (0: never) and after the last one is done after `step`, counted from 1."""
    return step == num_steps or (interval_steps > 0 and step % interval_steps == 0)


def count_flops(run: Run, batches: list[MicroBatch]) -> StepFlops:
    """Floating-point operations of a step over `batches`."""
    lengths = [length for batch in batches for length in batch.lengths_S]
    num_supervised = sum(batch.num_supervised for batch in batches)
    return step_flops(run.model.spec, lengths, num_supervised, run.config.tuning, run.model.recompute)


def announce(run: Run, state: TrainState) -> None:
    """Say what is about to run, on what."""
    plan, config = run.prepared.plan, run.config
    trained = sum(parameter.numel() for parameter in run.model.trained_parameters())
    total = sum(parameter.numel() for parameter in run.model.parameters())
    say(
        f"{config.model_name_or_path}: {total / 1e6:.1f} M weights, {trained / 1e6:.2f} M trained ({config.tuning.method}),"
        f" {config.train.dtype} on {device_report(run.device)['name']}, recompute {run.model.recompute}\n"
        f"{len(plan.lengths_S)} samples, {plan.lengths_S.sum():,} tokens, {plan.steps_per_epoch} steps an epoch, {plan.num_steps} in all;"
        + (f" going on after step {state.step}" if state.step else " starting")
    )


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("train")
