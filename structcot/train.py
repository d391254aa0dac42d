"""The training run: a file of demonstrations in, an adapter out.

`train` is the whole run, `train_step` one optimizer step; read these two first. A step sums the loss over its micro-batches and ranks,
divides once by the supervised tokens of the whole step, clips, checks that everything is finite, and only then changes the weights.
Whatever ends the run leaves through one checkpoint, and the same command goes on from it, on as many ranks as there are then.

All ranks run this code and meet in its collectives. What one of them does alone stands under `world.is_first`; what may fail on one alone
is agreed on (structcot.distributed).

Run as `python -m structcot.train CONFIG [key=value ...]`, under torchrun, or as `structcot train`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from structcot.checkpoint import TrainState, complete_checkpoints, last_complete
from structcot.config import Config
from structcot.console import say
from structcot.device import choose_device
from structcot.distributed import World, connected, joined
from structcot.errors import CheckpointError, Interrupted, StoppedWithCheckpoint, StructcotError, ToldElsewhere, TrainingDiverged
from structcot.export import export_trained
from structcot.flops import StepFlops, step_flops
from structcot.live_eval import LiveEval, run_live_eval
from structcot.losses import diverged, is_finite, loss_sums, mean_losses, suspects
from structcot.memory import peak_memory_gib
from structcot.metrics import Metrics, StepReport
from structcot.model.shard import free_unsharded
from structcot.optim import clip_gradients, learning_rate
from structcot.report import write_report
from structcot.rundir import locked
from structcot.signals import StopFlag, StopRequested
from structcot.start import Run, start
from structcot.step_log import StepLog
from structcot.watchdog import watched


def train(config: Config) -> dict[str, str | int]:
    """Run `config` from wherever its output directory stands to the exported adapter or model; tells where everything is.

    Raises:
        StoppedWithCheckpoint: if a signal asked to stop; the same call goes on.
        StructcotError: if the input is wrong or the run fails; see structcot.errors.
    """
    output_dir, device = Path(config.output_dir), choose_device()
    with (
        connected(),
        joined(config.parallel, device) as world,
        StopFlag() as stop,
        held(output_dir, world),
        explained(output_dir, world, stop),
    ):
        hang_seconds = config.parallel.hang_seconds if world.size > 1 else None
        with watched(world.rank, hang_seconds, output_dir / "stacks") as watchdog:
            run, state = start(config, world, device, stop, watchdog)
            try:
                state = train_steps(run, state)
            finally:
                run.writer.close()
            watchdog.beat("exporting what was trained")
            free_unsharded(run.model)
            exported = export_trained(run.model, run.prepared.model_dir, config, output_dir, world)[0]
            with world.agreed():
                report_path = write_report(output_dir) if world.is_first else output_dir / "report.html"
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


@contextmanager
def held(output_dir: Path, world: World) -> Iterator[None]:
    """Hold the output directory, by the first rank for all."""
    with ExitStack() as stack:
        with world.agreed():
            if world.is_first:
                stack.enter_context(locked(output_dir))
        yield


@contextmanager
def explained(output_dir: Path, world: World, stop: StopFlag) -> Iterator[None]:
    """Say of what ends a run early where it stands, and what goes on from there.

    Raises:
        StoppedWithCheckpoint, Interrupted: if a signal asked to stop, with or without a checkpoint to go on from.
        CheckpointError: if something could not be written or read.
    """
    checkpoints = output_dir / "checkpoints"
    try:
        yield
    except (StopRequested, Interrupted) as request:
        name = next(filter(None, world.gather(stop.signal_name)), "a signal")  # these come on all ranks, a signal perhaps to one
        ended: StructcotError = Interrupted(f"stopped by {name} before the first step; the same command starts again")
        if complete_checkpoints(checkpoints):
            ended = StoppedWithCheckpoint(f"stopped by {name} before the next step; {last_complete(checkpoints)}, the same command goes on")
        raise ended if world.is_first else ToldElsewhere(ended.exit_status) from request
    except OSError as error:
        raise CheckpointError(
            f"{output_dir}: the run cannot go on: {error}; {last_complete(checkpoints)}; mend the cause and run the same command again"
        ) from error


def train_steps(run: Run, state: TrainState) -> TrainState:
    """Every step from `state` on, with its checkpoints, held-out loss and reports; the state after the last one, saved.

    Raises:
        StoppedWithCheckpoint: if a signal asked to stop after a step.
        StopRequested: if it did before the first.
        TrainingDiverged: if a loss or gradient is not finite.
        CheckpointError: if a checkpoint cannot be written.
    """
    world, config, num_steps = run.world, run.config, run.prepared.plan.num_steps
    with world.agreed():
        log = StepLog(config, state.step, num_steps, writes=world.is_first)
    saved_step = state.step
    try:
        if state.step == 0 and run.live is not None:
            base = evaluate_live(run, run.live, 0)
            with world.agreed():
                log.begin(base)
        if state.step and is_due(state.step, config.log.eval_steps, num_steps) and world.first(lambda: log.lacks(measured(run))):
            log.amend(evaluate_all(run, state.step))  # a signal came in between
        while state.step < num_steps:
            report = train_step(run, state)
            state = replace(state, step=report.step, num_tokens=report.num_tokens)
            try:
                if is_due(report.step, config.log.eval_steps, num_steps):
                    report = replace(report, evaluated=evaluate_all(run, report.step))
            except (StopRequested, StructcotError):  # these come on all ranks; what ends one alone finds nobody to agree with
                log.append(report)
                raise
            with world.agreed():
                log.append(report)
            log.show(report)
            if is_due(state.step, config.checkpoint.save_steps, num_steps):
                save(run, state, log)
                saved_step = state.step
            run.writer.check()
        run.writer.finish()
    except StopRequested as request:
        if state.step == 0:
            raise
        if state.step != saved_step:
            save(run, state, log)
        run.writer.finish()
        with world.agreed():
            raise StoppedWithCheckpoint(
                f"stopped by {run.stop.signal_name} after step {state.step} of {num_steps}; a checkpoint is saved, the same command goes on"
            ) from request
    finally:
        log.close()
    return state


def train_step(run: Run, state: TrainState) -> StepReport:
    """The optimizer step after `state`.

    Raises:
        TrainingDiverged: if the loss or the gradient is not finite; the weights are as they were.
        StopRequested: if a signal asked to stop; the weights are as they were.
    """
    start_seconds = time.perf_counter()
    world, parameters = run.world, run.model.trained_parameters()
    batches = run.feed.step_batches(state.step)
    data_seconds = time.perf_counter() - start_seconds

    num_supervised = run.feed.num_supervised(state.step)
    losses: list[Tensor] = []
    run.optimizer.zero_grad()
    for number, batch in enumerate(batches):
        run.watchdog.beat(f"in micro-batch {number + 1} of {len(batches)} of step {state.step + 1}")
        world.check(run.stop)
        loss_sum, losses_M = run.model(batch)
        (loss_sum / num_supervised).backward()
        losses.append(losses_M)
    run.watchdog.beat(f"finishing step {state.step + 1}")
    origins = list(dict.fromkeys(run.feed.store.origin_names))
    means = mean_losses(world.sum(loss_sums(batches, losses, origins)), origins)
    grad_norm = float(clip_gradients(parameters.values(), run.config.train.max_grad_norm))
    if not is_finite(means, grad_norm):
        found = world.gather(suspects(batches, losses))
        with world.agreed():
            raise diverged(state.step + 1, means, grad_norm, found)
    rate = learning_rate(run.config.train, state.step, run.prepared.plan.num_steps)
    run.optimizer.step(rate)

    step_seconds = time.perf_counter() - start_seconds
    flops, step_tokens = count_flops(run, state.step), sum(run.feed.step_lengths(state.step))
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
        peak_gib=world.maximum(peak_memory_gib(run.device)),
    )


def measured(run: Run) -> list[str]:
    """What an evaluation measures of each held-out set and task, one name each."""
    tasks = run.live.names if run.live is not None else ()
    return [*(["eval/loss"] if run.prepared.data.eval is not None else []), *(f"eval/{task}/completion_tokens" for task in tasks)]


def evaluate_all(run: Run, step: int) -> Metrics:
    """The metrics of an evaluation after `step`: held-out loss, and what the model says to the problems of the live evaluation.

    Raises:
        StopRequested: if a signal asked to stop.
        TrainingDiverged: if the loss is not a number.
        ConfigError: if there is not enough memory.
    """
    loss = evaluate(run)
    return {**({} if loss is None else {"eval/loss": loss}), **({} if run.live is None else evaluate_live(run, run.live, step))}


def evaluate_live(run: Run, live: LiveEval, step: int) -> Metrics:
    """The metrics of the live evaluation after `step`, whose answers go to OUTPUT/eval/; the same on every rank.

    Raises:
        StopRequested: if a signal asked to stop.
        ConfigError: if there is not enough memory.
    """

    def check(work: str) -> None:
        run.watchdog.beat(work)
        run.world.check(run.stop)

    return run_live_eval(live, run.model, run.device, run.world, check, run.output_dir / "eval" / f"step-{step:06d}.jsonl")


def evaluate(run: Run) -> float | None:
    """Mean loss over the supervised tokens of the held-out samples, by the same packed path; None where nothing is held out.

    Raises:
        StopRequested: if a signal asked to stop.
        TrainingDiverged: if it is not a number.
    """
    data, sums = run.prepared.data, torch.zeros(2, dtype=torch.float64)
    if data.eval is None:
        return None
    run.model.eval()
    with torch.no_grad():
        for batch in run.feed.eval_batches(data.eval, data.eval_indices):
            run.watchdog.beat("measuring the held-out loss")
            run.world.check(run.stop)
            loss_sum, _ = run.model(batch)
            sums += torch.tensor([float(loss_sum), batch.num_supervised], dtype=torch.float64)
    free_unsharded(run.model)
    run.model.train()
    total, num_supervised = run.world.sum(sums).tolist()
    if not math.isfinite(total):
        with run.world.agreed():
            raise TrainingDiverged(
                f"the held-out loss is {total}; lower train.learning_rate and resume from the last checkpoint, or start again"
            )
    return total / num_supervised


def save(run: Run, state: TrainState, log: StepLog) -> None:
    """Begin to write a complete checkpoint of `state`, and write the report page of what is known so far."""
    run.watchdog.beat(f"saving step {state.step}")
    with run.world.agreed():
        log.sync()
    run.writer.begin(state, run.model, run.optimizer)
    with run.world.agreed():
        if run.world.is_first:
            write_report(run.output_dir)


def is_due(step: int, interval_steps: int, num_steps: int) -> bool:
    """Whether something done every `interval_steps` steps (0: never) and after the last one is done after `step`, counted from 1."""
    return step == num_steps or (interval_steps > 0 and step % interval_steps == 0)


def count_flops(run: Run, step: int) -> StepFlops:
    """Floating-point operations of optimizer step `step`, counted from 0, over all ranks."""
    lengths, num_supervised = run.feed.step_lengths(step), run.feed.num_supervised(step)
    return step_flops(run.model.spec, lengths, num_supervised, run.config.tuning, run.model.recompute)


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("train")
