"""A run that is stopped, killed or starved goes on as if nothing had happened, or says in one message why it cannot."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structcot import checkpoint, rundir, start, train
from structcot.checkpoint import CheckpointWriter, TrainState, load_latest, trained_tensors, write_checkpoint
from structcot.data.loader import Feed
from structcot.distributed import World
from structcot.errors import CheckpointError, TrainingDiverged
from structcot.model import decoder
from structcot.optim import Optimizer, make_optimizer
from structcot.rundir import locked
from tests.tiny_models import tiny_config
from tests.tiny_run import (
    DONE,
    FAILED,
    NUM_STEPS,
    STOPPED,
    WRONG,
    Launcher,
    Outcome,
    Site,
    adapter_of,
    checkpoints_of,
    copy_run,
    demonstration,
    files_of,
    fill_disk_at,
    finish,
    kill_at,
    metrics_of,
    read_jsonl,
    signalling,
    write_jsonl,
)

KILLED = -signal.SIGKILL
EVAL_BATCHES = Feed.eval_batches
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def assert_same_result(run_dir: Path, undisturbed: Path) -> None:
    """Bit for bit, and each step once."""
    assert metrics_of(run_dir) == metrics_of(undisturbed)
    assert adapter_of(run_dir) == adapter_of(undisturbed)
    assert json.loads((run_dir / "adapter" / "certificate.json").read_text())["passed"]


def latest_of(run_dir: Path) -> str:
    return (run_dir / "checkpoints" / "LATEST").read_text().strip()


# Stopping and going on


def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(site: Site, half_run: Path, finished_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 3, 4, 5]
    assert site.train(run_dir).status == DONE
    assert_same_result(run_dir, finished_run)
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["tuning.lora_dropout=0.3", "tuning.use_rslora=true"], "adapter/adapter_model.safetensors"),
        (["tuning.method=full", "train.learning_rate=1e-4"], "model/model.safetensors"),
    ],
    ids=["dropout", "full"],
)
def test_resume_is_exact_with_dropout_and_with_all_weights(
    overrides: list[str], weights: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*overrides, "train.max_steps=4"]
    assert site.train(tmp_path / "undisturbed", *overrides).status == DONE
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalling(train.train_step, signal.SIGTERM, call=3))
        assert site.train(tmp_path / "run", *overrides).status == STOPPED
    assert site.train(tmp_path / "run", *overrides).status == DONE
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()


def test_finished_run_changes_nothing_when_run_again(site: Site, finished_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(finished_run, tmp_path / "run")
    assert site.train(run_dir).status == DONE  # what names the directory is written anew
    before = files_of(run_dir)
    assert site.train(run_dir).status == DONE
    assert files_of(run_dir) == before
    assert_same_result(run_dir, finished_run)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_after_a_complete_checkpoint(
    number: signal.Signals, site: Site, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalling(train.train_step, number, call=4))
        outcome = site.train(tmp_path / "run")
    assert outcome.status == STOPPED
    assert f"stopped by {number.name} after step 3 of {NUM_STEPS}" in outcome.message
    assert "the same command goes on" in outcome.message
    assert checkpoints_of(tmp_path / "run") == ["step-000003"]
    assert latest_of(tmp_path / "run") == "step-000003"
    assert not (tmp_path / "run" / "adapter").exists()
    assert site.train(tmp_path / "run").status == DONE
    assert_same_result(tmp_path / "run", finished_run)


def test_signal_to_the_command_itself_stops_it_with_status_75(site: Site, tmp_path: Path) -> None:
    more = ["train.max_steps=60", "checkpoint.save_steps=50"]
    process = site.start("train", "configs/tiny.toml", *site.overrides(tmp_path / "run", *more))
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.status == STOPPED, outcome.err
    assert "stopped by SIGTERM" in outcome.message
    (name,) = checkpoints_of(tmp_path / "run")
    assert name == f"step-{len(metrics_of(tmp_path / 'run')):06d}"


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    while not (run_dir / "metrics.jsonl").exists() or len(read_jsonl(run_dir / "metrics.jsonl")) < step:
        assert process.poll() is None, finish(process)
        time.sleep(0.01)


PLACES = {
    "need_what_is_asked": start,
    "prepare": start,
    "build_model": start,
    "load_latest": start,
    "announce": start,
    "train_step": train,
    "linear_cross_entropy": decoder,
}
"""Where signals come, and the module that calls it."""


@pytest.mark.parametrize("place", [place for place in PLACES if place != "prepare"])
def test_signal_before_the_end_of_the_first_step_leaves_nothing_to_resume(
    place: str, site: Site, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PLACES[place], place, signalling(getattr(PLACES[place], place), signal.SIGTERM))
        outcome = site.train(tmp_path / "run")
    assert outcome.status == FAILED
    assert outcome.message == "stopped by SIGTERM before the first step; the same command starts again"
    assert checkpoints_of(tmp_path / "run") == []
    assert site.train(tmp_path / "run").status == DONE
    assert_same_result(tmp_path / "run", finished_run)


def test_signal_while_samples_are_rendered_leaves_nothing_to_resume(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "new.jsonl", [demonstration(number) for number in range(6)])  # in no cache yet
    monkeypatch.setattr(start, "prepare", signalling(start.prepare, signal.SIGUSR1))
    monkeypatch.setattr(start, "build_model", None)  # not reached
    outcome = site.train(tmp_path / "run", f"data.train={data}")
    assert outcome.status == FAILED
    assert outcome.message == "stopped by SIGUSR1 before the first step; the same command starts again"


@pytest.mark.parametrize("place", ["prepare", "build_model", "train_step"])
def test_signal_before_a_resumed_run_goes_on_keeps_its_checkpoints(
    place: str, site: Site, half_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    before = files_of(run_dir / "checkpoints")
    monkeypatch.setattr(PLACES[place], place, signalling(getattr(PLACES[place], place), signal.SIGTERM))
    outcome = site.train(run_dir)
    assert outcome.status == STOPPED
    assert "the same command goes on" in outcome.message
    assert files_of(run_dir / "checkpoints") == before


@pytest.mark.parametrize("evaluation", [1, 2], ids=["in between", "after the last step"])
def test_signal_during_evaluation_loses_neither_the_step_nor_its_held_out_loss(
    evaluation: int, site: Site, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = [4, NUM_STEPS][evaluation - 1]
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "eval_batches", signalling(Feed.eval_batches, signal.SIGTERM, call=evaluation))
        outcome = site.train(tmp_path / "run")
    assert outcome.status == STOPPED
    assert latest_of(tmp_path / "run") == f"step-{step:06d}"
    assert site.train(tmp_path / "run").status == DONE
    assert_same_result(tmp_path / "run", finished_run)
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "eval/loss" in line] == [4, NUM_STEPS]


def test_signal_during_the_late_evaluation_of_a_resumed_run_can_come_again(
    site: Site, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "eval_batches", signalling(EVAL_BATCHES, signal.SIGTERM))
        assert site.train(tmp_path / "run").status == STOPPED
        patch.setattr(Feed, "eval_batches", signalling(EVAL_BATCHES, signal.SIGTERM))
        assert site.train(tmp_path / "run").status == STOPPED
    assert site.train(tmp_path / "run").status == DONE
    assert_same_result(tmp_path / "run", finished_run)


def test_stop_right_after_a_checkpoint_does_not_write_it_again(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def counted(directory: Path, state: TrainState, *more: object) -> None:
        written.append(state.step)
        write_checkpoint(directory, state, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_checkpoint", counted)
    monkeypatch.setattr(train, "train_step", signalling(train.train_step, signal.SIGTERM, call=5))
    assert site.train(tmp_path / "run").status == STOPPED
    assert written == [4]


# Writing while steps go on


def writer_of(directory: Path) -> tuple[CheckpointWriter, torch.nn.Module, Optimizer]:
    """A writer, and a model after one step, whose moments are not zero."""
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(dict(model.named_parameters()), tiny_config().train)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(1e-3)
    return CheckpointWriter(directory, World(), keep=2), model, optimizer


def state_of(step: int) -> TrainState:
    return TrainState(step=step, num_tokens=10 * step, identity={}, plan_sha256="", weights_sha256="")


def test_steps_taken_while_a_checkpoint_is_written_do_not_show_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = threading.Event()

    def delayed(*arguments: Any) -> None:
        assert changed.wait(60)
        write_checkpoint(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", delayed)
    writer, model, optimizer = writer_of(tmp_path)
    before = {name: tensor.clone() for name, tensor in trained_tensors(model, optimizer).items()}
    writer.begin(state_of(1), model, optimizer)
    optimizer.step(1.0)
    writer.check()  # does not wait
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(model, optimizer).items())
    changed.set()
    writer.finish()
    assert load_latest(tmp_path, state_of(0), model, optimizer) == state_of(1)
    after = trained_tensors(model, optimizer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("call", ["check", "begin", "finish"])
def test_error_of_the_writing_comes_out_of_the_next_call_and_once(call: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no directory")
    writer, model, optimizer = writer_of(tmp_path / "checkpoints")

    def next_call() -> None:
        if call == "begin":
            writer.begin(state_of(2), model, optimizer)
        elif call == "finish":
            writer.finish()
        while call == "check":  # until it has failed
            writer.check()

    writer.begin(state_of(1), model, optimizer)
    with pytest.raises(CheckpointError, match=r"step-000001: the checkpoint cannot be written: .*there is no complete checkpoint yet"):
        next_call()
    writer.check()
    writer.finish()


def test_signal_while_a_checkpoint_is_written_stops_after_a_complete_one(
    site: Site, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def slow(*arguments: Any) -> None:
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        write_checkpoint(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_checkpoint", slow)
        outcome = site.train(tmp_path / "run")
    assert outcome.status == STOPPED
    num_steps = len(metrics_of(tmp_path / "run"))
    assert f"stopped by SIGTERM after step {num_steps} of {NUM_STEPS}" in outcome.message
    assert num_steps < NUM_STEPS
    assert checkpoints_of(tmp_path / "run")[-1] == latest_of(tmp_path / "run") == f"step-{num_steps:06d}"
    assert site.train(tmp_path / "run").status == DONE
    assert_same_result(tmp_path / "run", finished_run)


def test_a_stop_claims_no_checkpoint_where_the_one_it_waits_for_cannot_be_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        raise CheckpointError("no room")

    monkeypatch.setattr(checkpoint, "write_checkpoint", failing)
    outcome = site.train(tmp_path / "run")
    assert outcome.status == FAILED
    assert outcome.message == "no room"


def test_a_checkpoint_that_cannot_be_written_ends_the_run_before_the_next_one_is_due(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def failing(*arguments: Any) -> None:
        failed.set()
        raise CheckpointError("no room")

    real_step = train.train_step

    def following(run: train.Run, state: TrainState) -> train.StepReport:
        if state.step >= 4:
            assert failed.wait(60)
            time.sleep(0.2)
        return real_step(run, state)

    monkeypatch.setattr(checkpoint, "write_checkpoint", failing)
    monkeypatch.setattr(train, "train_step", following)
    outcome = site.train(tmp_path / "run")
    assert outcome.status == FAILED
    assert outcome.message == "no room"
    assert 4 <= len(metrics_of(tmp_path / "run")) < NUM_STEPS


def test_both_are_told_where_a_run_fails_while_its_checkpoint_cannot_be_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    def failing(*arguments: Any) -> None:
        assert failed.wait(60)
        raise CheckpointError("no room")

    real_step = train.train_step

    def diverging(run: train.Run, state: TrainState) -> train.StepReport:
        if state.step < 4:
            return real_step(run, state)
        failed.set()
        raise TrainingDiverged("not a number")

    monkeypatch.setattr(checkpoint, "write_checkpoint", failing)
    monkeypatch.setattr(train, "train_step", diverging)
    outcome = site.train(tmp_path / "run")
    assert outcome.status == FAILED
    assert outcome.message == "not a number"
    assert "no room" in caplog.text


# Killing


def test_run_killed_ten_times_ends_as_an_undisturbed_one(site: Site, launcher: Launcher, tmp_path: Path) -> None:
    more = ["train.max_steps=30", "checkpoint.save_steps=1", "log.eval_steps=10"]
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    assert launcher.train(site.overrides(undisturbed, *more)).status == DONE
    chance = random.Random(0)
    # A start changes about ten files, a step with its checkpoint about fifteen, the export eight.
    moments = [("", chance.randint(1, 10)), *(("", chance.randint(11, 50)) for _ in range(7)), ("adapter", 1), ("adapter", 8)]
    for moment in moments:
        assert launcher.train(site.overrides(run_dir, *more), kill_at, *moment).status == KILLED, moment
    assert launcher.train(site.overrides(run_dir, *more)).status == DONE
    assert_same_result(run_dir, undisturbed)
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, 31))
    assert files_of(run_dir / "checkpoints").keys() == files_of(undisturbed / "checkpoints").keys()


@pytest.mark.slow
def test_run_killed_at_each_file_operation_of_a_checkpoint_ends_as_an_undisturbed_one(
    site: Site, launcher: Launcher, half_run: Path, finished_run: Path, tmp_path: Path
) -> None:
    for operation in itertools.count(1):
        run_dir = copy_run(half_run, tmp_path / f"run-{operation}")
        outcome = launcher.train(site.overrides(run_dir), kill_at, "checkpoints", operation)
        if outcome.status == DONE:
            break
        assert outcome.status == KILLED
        assert checkpoint.complete_checkpoints(run_dir / "checkpoints")[0].name >= "step-000005", "a complete checkpoint was lost"
        assert site.train(run_dir).status == DONE
        assert_same_result(run_dir, finished_run)
        assert latest_of(run_dir) == f"step-{NUM_STEPS:06d}"
        assert not [path for path in run_dir.rglob("*") if "tmp" in path.name], "what was half written is cleared away"
    assert operation > 15


def test_latest_names_the_newest_checkpoint_after_a_kill_before_it_was_written(site: Site, launcher: Launcher, tmp_path: Path) -> None:
    overrides = site.overrides(tmp_path / "run")
    assert launcher.train(overrides, kill_at, "LATEST", 4).status == KILLED  # three for step 4, the first for step 8
    assert checkpoints_of(tmp_path / "run") == ["step-000004", f"step-{NUM_STEPS:06d}"]
    assert latest_of(tmp_path / "run") == "step-000004"
    assert site.train(tmp_path / "run").status == DONE
    assert latest_of(tmp_path / "run") == f"step-{NUM_STEPS:06d}"


@pytest.mark.slow
def test_command_killed_from_outside_goes_on_as_an_undisturbed_one(site: Site, tmp_path: Path) -> None:
    more = ["train.max_steps=40", "checkpoint.save_steps=2"]
    assert site.train(tmp_path / "undisturbed", *more).status == DONE
    process = site.start("configs/tiny.toml", *site.overrides(tmp_path / "run", *more), program=("-m", "structcot.train"))
    wait_for_step(process, tmp_path / "run", 5)
    process.kill()
    assert finish(process).status == KILLED
    assert site.train(tmp_path / "run", *more).status == DONE
    assert_same_result(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("leftover", [b'{"step": 6, "epoch": 1.', b'{"step": 6, "epoch": 1.25}\n{"st', b"\0\0\0\0\n\0\0", b"[1]\nnull\n"])
def test_lines_of_metrics_after_the_checkpoint_are_cut_away(
    leftover: bytes, site: Site, half_run: Path, finished_run: Path, tmp_path: Path
) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(leftover)
    assert site.train(run_dir).status == DONE
    assert_same_result(run_dir, finished_run)


# Damaged checkpoints


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def claim_another_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 5', '"step": 6'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("__0_0.distcp", Path.unlink),
        (".metadata", Path.unlink),
        ("__0_0.distcp", cut_off_the_end),
        ("__0_0.distcp", flip_a_byte),
        (".metadata", flip_a_byte),
        ("state.json", cut_off_the_end),
        ("state.json", claim_another_step),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_bytes(b"\xff" * 100)),
    ],
)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    file: str, damage: Callable[[Path], None], site: Site, half_run: Path, finished_run: Path, tmp_path: Path, launcher: Launcher
) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    damage(run_dir / "checkpoints" / "step-000005" / file)
    outcome = launcher.train(site.overrides(run_dir))
    assert outcome.status == DONE, outcome.err
    (warning,) = [line for line in outcome.err.splitlines() if "trying the checkpoint before it" in line]
    assert f"checkpoints/step-000005{'/' if file == 'state.json' else ': '}{file}" in warning
    assert "going on after step 4" in outcome.err
    assert_same_result(run_dir, finished_run)


def test_checkpoint_without_its_state_is_no_checkpoint(site: Site, half_run: Path, finished_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    (run_dir / "checkpoints" / "step-000005" / "state.json").unlink()
    shutil.copytree(run_dir / "checkpoints" / "step-000005", run_dir / "checkpoints" / "tmp-step-000009")
    outcome = site.train(run_dir)
    assert "going on after step 4" in outcome.err
    assert_same_result(run_dir, finished_run)
    assert checkpoints_of(run_dir) == ["step-000004", f"step-{NUM_STEPS:06d}"]


def test_run_with_nothing_but_damaged_checkpoints_stops(site: Site, half_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    for path in (run_dir / "checkpoints").glob("step-*/__0_0.distcp"):
        flip_a_byte(path)
    before = files_of(run_dir / "checkpoints")
    outcome = site.train(run_dir)
    assert outcome.status == FAILED
    assert "every checkpoint is damaged; remove them to start again" in outcome.message
    assert files_of(run_dir / "checkpoints") == before


def test_retention_never_removes_the_checkpoint_just_written(tmp_path: Path) -> None:
    _, model, optimizer = writer_of(tmp_path)
    tensors = trained_tensors(model, optimizer)
    for step in (8, 9, 3):  # a damaged checkpoint of step 9 made the run go back
        write_checkpoint(tmp_path, state_of(step), tensors, 2, World())
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["step-000009", "step-000003"]
    write_checkpoint(tmp_path, state_of(4), tensors, 1, World())
    assert load_latest(tmp_path, state_of(0), model, optimizer) == state_of(4)


# No room


@pytest.mark.parametrize(
    ("moment", "file_bytes", "words", "kept"),
    [
        (("config.toml", 1), 10, "there is no complete checkpoint yet", []),
        (("step-000008", 1), 100_000, "the last complete checkpoint is {}/checkpoints/step-000004", ["step-000004"]),
        (("state.json", 4), 1_000, "the last complete checkpoint is {}/checkpoints/step-000004", ["step-000004"]),
        (("LATEST", 1), 2_600, "the last complete checkpoint is {}/checkpoints/step-000004", ["step-000004"]),
        (("tmp-adapter", 1), 10_000, "{}/adapter: cannot be written", ["step-000004", "step-000008"]),
        (("README.md", 1), 100, "{}/adapter: cannot be written", ["step-000004", "step-000008"]),
    ],
    ids=["config", "checkpoint", "state", "metrics", "adapter", "card"],
)
def test_full_disk_stops_the_run_and_loses_nothing(
    moment: tuple[str, int],
    file_bytes: int,
    words: str,
    kept: list[str],
    site: Site,
    launcher: Launcher,
    finished_run: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    outcome = launcher.train(site.overrides(run_dir), fill_disk_at, *moment, file_bytes)
    assert outcome.status == FAILED
    assert words.format(run_dir) in outcome.message
    assert "File too large" in outcome.message
    assert checkpoints_of(run_dir) == kept
    assert not [path for path in run_dir.rglob("*tmp*") if "metrics" not in path.name]
    assert site.train(run_dir).status == DONE
    assert_same_result(run_dir, finished_run)


def test_checkpoint_is_not_begun_where_it_does_not_fit(site: Site, half_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * 2**20))
    outcome = site.train(run_dir)
    assert outcome.status == FAILED
    assert f"{run_dir}/checkpoints/step-000008: the checkpoint cannot be written: needs 0 MiB and 50 MiB are free" in outcome.message
    assert f"the last complete checkpoint is {run_dir}/checkpoints/step-000005" in outcome.message
    assert checkpoints_of(run_dir) == ["step-000004", "step-000005"]


# Another run in the same directory


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tuning.lora_r=4", "tuning.lora_r was 8 and is 4"),
        ("tuning.lora_alpha=8", "tuning.lora_alpha was 16.0 and is 8.0"),
        ('tuning.lora_target_modules=["q_proj"]', "tuning.lora_target_modules was 'all-linear' and is ['q_proj']"),
        ("seed=1", "seed was 0 and is 1"),
        ("train.learning_rate=2e-3", "train.learning_rate was 0.001 and is 0.002"),
        ("train.max_steps=9", "train.max_steps was 8 and is 9"),
        ("data.eval_fraction=0.2", "data.eval_fraction was 0.1 and is 0.2"),
    ],
)
def test_other_config_in_the_same_directory_is_refused_and_changes_nothing(
    override: str, words: str, site: Site, half_run: Path, tmp_path: Path
) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    before = files_of(run_dir)
    for command in ("train", "prepare"):
        outcome = site.run(command, "configs/tiny.toml", *site.overrides(run_dir, override))
        assert outcome.status == WRONG
        assert f"belongs to another run: {words}. Give another output_dir" in outcome.message
        assert files_of(run_dir) == before


def test_other_data_model_or_template_of_the_same_name_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Site(tmp_path / "site")
    shutil.copytree(site.directory / "model", own.model_dir)
    write_jsonl(own.data_path, read_jsonl(site.data_path))
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalling(train.train_step, signal.SIGTERM, call=2))
        assert own.train(tmp_path / "run").status == STOPPED
    before = files_of(tmp_path / "run")

    def refused(path: Path, old: bytes, new: bytes) -> str:
        content = path.read_bytes()
        assert old in content
        assert len(old) == len(new)  # so that no sample gets longer, and the plan stays as it was
        path.write_bytes(content.replace(old, new, 1))
        outcome = own.train(tmp_path / "run")
        path.write_bytes(content)
        assert outcome.status == WRONG
        assert files_of(tmp_path / "run") == before
        return outcome.message

    assert "sha256 of the data was" in refused(own.data_path, b"boxed{6}", b"boxed{7}")
    assert "sha256 of the template was" in refused(own.model_dir / "chat_template.jinja", b"{% endfor %}", b"{%  endfor%}")
    weights = own.model_dir / "model.safetensors"
    assert "the base model's weights differ" in refused(weights, weights.read_bytes()[-8:], b"\1\2\3\4\5\6\7\x08")
    assert own.train(tmp_path / "run").status == DONE


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.save_steps=3",
        "checkpoint.save_total_limit=1",
        "log.logging_steps=3",
        "kernels=torch",
        "attn_implementation=sdpa",
        "parallel.recompute=full",
        "parallel.max_tokens_per_microbatch=4096",
    ],
)
def test_what_decides_nothing_of_the_result_may_change(
    override: str, site: Site, half_run: Path, finished_run: Path, tmp_path: Path
) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    outcome = site.train(run_dir, override)
    assert outcome.status == DONE, outcome.err
    assert "going on after step 5" in outcome.err
    assert_same_result(run_dir, finished_run)


def test_second_run_in_the_same_directory_is_refused(site: Site, half_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    before = files_of(run_dir)

    def refused(*arguments: str) -> Outcome:
        with locked(run_dir):
            return site.run(*arguments)

    for arguments in (["train", "configs/tiny.toml", *site.overrides(run_dir)], ["export", str(run_dir)]):
        outcome = refused(*arguments)
        assert outcome.status == WRONG
        assert outcome.message == f"output_dir: {run_dir} is in use by another run; wait for it, or name another directory"
    assert files_of(run_dir) == before
    assert site.train(run_dir).status == DONE


def test_run_goes_on_with_a_warning_where_the_file_system_knows_no_locks(
    site: Site, half_run: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    run_dir = copy_run(half_run, tmp_path / "run")
    monkeypatch.setattr(rundir.fcntl, "flock", no_locks)
    assert site.train(run_dir).status == DONE
    assert f"{run_dir}: cannot be locked (Function not implemented); make sure that no other run writes there" in caplog.text
    assert_same_result(run_dir, finished_run)
