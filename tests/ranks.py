"""Real processes that are the ranks of a run on this machine, connected by gloo; and steps of a small model on them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structcot import start, train
from structcot.config import Config
from structcot.data.render import RenderedSample
from structcot.distributed import World, joined
from structcot.model.decoder import Decoder
from structcot.model.parts import local_part, local_rows, whole_on_cpu
from structcot.model.weights import build_model
from structcot.train import train_step
from structcot_kernels.launch import use_backend
from tests.one_step import ALONE, make_run
from tests.tiny_run import Outcome, Site, train_apart

CPU = torch.device("cpu")
FAULT_SECONDS = 60.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks", "transformers", "peft"])


def on_ranks(num_ranks: int, work: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
    """What `work(*arguments)` returns on each rank; fails with the traceback of the first rank that failed."""
    port, readers, processes = free_port(), [], []
    for rank in range(num_ranks):
        reader, writer = CONTEXT.Pipe(duplex=False)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        process = CONTEXT.Process(target=_work_apart, args=({key: str(value) for key, value in places.items()}, writer, work, arguments))
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    results = []
    for reader in readers:
        assert reader.poll(seconds), "a rank did not answer"
        results.append(pickle.loads(reader.recv_bytes()))
    for process in processes:
        process.join(timeout=seconds)
    failures = [text for ended_well, text in results if not ended_well]
    assert not failures, failures[0]
    return [result for _, result in results]


def free_port() -> int:
    """Find a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _work_apart(environment: dict[str, str], output: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    use_backend("torch")  # kernels that are interpreted are slow
    faulthandler.dump_traceback_later(FAULT_SECONDS, exit=True)
    try:
        result = (True, work(*arguments))
    except BaseException:
        result = (False, traceback.format_exc())
    output.send_bytes(pickle.dumps(result))  # whole tensors, which the connection's own pickling would leave with this process


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What some optimizer steps gave: mean loss and gradient norm of each, gradients of the first, trained parameters after the last."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    num_microbatches: int
    held_shares: list[float]


def run_steps(model_dir: Path, samples: Sequence[RenderedSample], config: Config, num_steps: int, world: World = ALONE) -> Steps:
    """Train on this rank and all others."""
    model = build_model(model_dir, config, CPU, world.mesh)
    model.sequence_group, model.recompute = world.sequence_group, config.parallel.recompute
    fill_adapters(model)
    run, state = make_run(model, samples, config, world)
    losses, norms, gradients = [], [], {}
    for _ in range(num_steps):
        report = train_step(run, state)
        state = replace(state, step=report.step, num_tokens=report.num_tokens)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        gradients = gradients or {name: whole_on_cpu(parameter.grad) for name, parameter in model.trained_parameters().items()}
    return Steps(
        losses=losses,
        grad_norms=norms,
        gradients=gradients,
        parameters={name: whole_on_cpu(parameter).clone() for name, parameter in model.trained_parameters().items()},
        num_microbatches=len(run.feed.step_batches(0)),
        held_shares=[local_part(parameter.data).numel() / parameter.numel() for parameter in model.parameters()],
    )


def run_steps_of(model_dir: Path, samples: Sequence[RenderedSample], configs: Sequence[Config], num_steps: int) -> list[Steps]:
    """Train by each config, which lay ranks out alike, in the same processes."""
    with joined(configs[0].parallel, CPU) as world:
        return [run_steps(model_dir, samples, config, num_steps, world) for config in configs]


def fill_adapters(model: Decoder) -> None:
    """Draw every lora_B, as tests.tiny_models.randomise_adapters does, each rank its own rows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            local_part(parameter.data).copy_((0.1 * torch.randn(parameter.shape, generator=generator))[local_rows(parameter)])


def train_on_ranks(
    site: Site, num_ranks: int, overrides: Sequence[str], trouble: Mapping[int, tuple[Any, ...]] | None = None, seconds: float = 60.0
) -> list[Outcome]:
    """`structcot train configs/tiny.toml OVERRIDES` on so many ranks, without torchrun: nobody ends a rank but itself.

    `trouble` maps a rank to a function of this module or of tests.tiny_run and its arguments, called there before the run.
    """
    port, readers, processes = free_port(), [], []
    for rank in range(num_ranks):
        reader, writer = CONTEXT.Pipe(duplex=False)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**site.environment, **{key: str(value) for key, value in places.items()}}
        action, *about = (trouble or {}).get(rank, (None,))
        process = CONTEXT.Process(target=train_apart, args=(environment, writer, list(overrides), action, about))
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    errors = [read_to_end(reader) for reader in readers]
    for process in processes:
        process.join(timeout=seconds)
        assert process.exitcode is not None, "a rank waits for ever"
    return [Outcome(status=process.exitcode or 0, out="", err=err) for process, err in zip(processes, errors, strict=True)]


def read_to_end(reader: Connection) -> str:
    return b"".join(iter(lambda: os.read(reader.fileno(), 65536), b"")).decode()


def hang_in_step(step: int) -> None:
    """Hold this rank for ever when its turn comes to take optimizer step `step`, counted from 1."""

    def hanging(run: Any, state: Any) -> Any:
        if state.step + 1 == step:
            time.sleep(3600)
        return train_step(run, state)

    train.train_step = hanging


def kill_in_step(step: int, number: int = signal.SIGKILL) -> None:
    """Send this rank a signal in the middle of optimizer step `step`: before the backward of its first micro-batch."""
    before_backward(step, lambda _: os.kill(os.getpid(), number))


def nan_in_step(step: int) -> None:
    """Make this rank's loss no number in optimizer step `step`."""
    before_backward(step, lambda losses: losses[0].mul_(float("nan")) if losses[0].numel() else None)


def before_backward(step: int, action: Callable[[Any], Any]) -> None:
    seen = 0
    forward = Decoder.forward

    def watched(model: Decoder, batch: Any, **how: Any) -> Any:
        nonlocal seen
        result = forward(model, batch, **how)
        if model.training and torch.is_grad_enabled():
            seen += 1
            if seen == step + 1:  # the rehearsal is the first
                loss_sum, losses_M = result
                action((losses_M,))
                return loss_sum + losses_M.sum() - losses_M.sum(), losses_M
        return result

    Decoder.forward = watched


def fail_in_evaluation() -> None:
    """Raise on this rank alone what nothing catches, as a GPU without memory does, when it measures the held-out loss."""
    forward = Decoder.forward

    def failing(model: Decoder, batch: Any, **how: Any) -> Any:
        if not model.training and not how:
            raise RuntimeError("out of memory")
        return forward(model, batch, **how)

    Decoder.forward = failing


def signal_in_prepare(number: int) -> None:
    """Send this rank a signal before it reads the data."""
    prepare = start.prepare

    def signalled(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        return prepare(*arguments, **named)

    start.prepare = signalled
