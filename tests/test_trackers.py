"""Trackers beside metrics.jsonl: each is told every step once, under its number, and no value that is missing."""

from __future__ import annotations

import importlib.machinery
import math
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from structcot import start, train
from structcot.errors import TrainingDiverged
from structcot.metrics import open_trackers
from tests.tiny_models import tiny_config
from tests.tiny_run import DONE, FAILED, STOPPED, WRONG, Site, read_jsonl, signalling

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Notes every call of every method, and returns itself."""

    def __init__(self, name: str, calls: list[Call]) -> None:
        self._name, self._calls = name, calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Recorder:
            self._calls.append((f"{self._name}.{name}", arguments, named))
            return Recorder(f"{self._name}.run", self._calls)

        return call


def pretend(package: str, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Put a package in place that notes what is asked of it."""
    calls: list[Call] = []
    module = ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    module.__getattr__ = getattr_of(Recorder(package, calls))  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, package, module)
    return calls


def getattr_of(recorder: Recorder) -> Any:
    return lambda name: getattr(recorder, name)


def logged(calls: list[Call], method: str) -> dict[int, dict[str, float]]:
    """Metrics by step."""
    found: dict[int, dict[str, float]] = {}
    for name, arguments, named in calls:
        if name == method:
            assert named["step"] not in found, "a step was logged twice"
            (found[named["step"]],) = arguments
    return found


METHODS = {"wandb": "wandb.run.log", "trackio": "trackio.run.log", "mlflow": "mlflow.log_metrics"}


@pytest.mark.parametrize("name", METHODS)
def test_tracker_is_told_what_metrics_jsonl_holds(name: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(name, monkeypatch)
    outcome = site.train(tmp_path / "run", f'log.report_to=["{name}"]', "train.max_steps=4")
    assert outcome.status == DONE, outcome.err
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert logged(calls, METHODS[name]) == {line["step"]: line for line in lines}
    assert "eval/loss" in logged(calls, METHODS[name])[4]


def test_wandb_and_trackio_know_the_run_and_its_config(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        calls = pretend(name, monkeypatch)
        config = site.config(tmp_path / "my-run", f'log.report_to=["{name}"]')
        open_trackers(config)
        ((method, _, named),) = calls
        assert method == f"{name}.init"
        assert (named["project"], named["name"]) == ("structcot", "my-run")
        assert named["config"]["tuning"]["lora_r"] == 8


def test_mlflow_knows_the_run_and_its_config(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend("mlflow", monkeypatch)
    open_trackers(site.config(tmp_path / "my-run", 'log.report_to=["mlflow"]'))
    assert [method for method, _, _ in calls] == ["mlflow.set_experiment", "mlflow.start_run", "mlflow.log_dict"]
    assert calls[1][2]["run_name"] == "my-run"
    assert calls[2][1][0]["tuning"]["lora_r"] == 8


@pytest.mark.parametrize("name", METHODS)
def test_values_that_are_missing_or_no_numbers_are_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(name, monkeypatch)
    (track,) = open_trackers(tiny_config(output_dir=tmp_path, log={"report_to": [name]}))
    track(3, {"step": 3, "train/loss": 1.5, "loss/thought": None, "loss/end": math.nan, "eval/loss": math.inf})
    assert logged(calls, METHODS[name]) == {3: {"step": 3, "train/loss": 1.5}}


def test_resumed_run_tells_only_the_steps_that_are_new(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend("wandb", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalling(train.train_step, signal.SIGTERM, call=3))
        assert site.train(tmp_path / "run", 'log.report_to=["wandb"]').status == STOPPED
    assert list(logged(calls, METHODS["wandb"])) == [1, 2]
    calls.clear()
    assert site.train(tmp_path / "run", 'log.report_to=["wandb"]').status == DONE
    assert list(logged(calls, METHODS["wandb"])) == [3, 4, 5, 6, 7, 8]
    calls.clear()
    assert site.train(tmp_path / "run", 'log.report_to=["wandb"]').status == DONE  # a finished run has nothing to tell
    assert calls == []


def test_several_trackers_are_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = [pretend(name, monkeypatch) for name in ("wandb", "mlflow")]
    for track in open_trackers(tiny_config(output_dir=tmp_path, log={"report_to": ["wandb", "mlflow"]})):
        track(1, {"train/loss": 2.0})
    assert [logged(calls, method) for calls, method in zip(recorded, (METHODS["wandb"], METHODS["mlflow"]), strict=True)] == [
        {1: {"train/loss": 2.0}},
        {1: {"train/loss": 2.0}},
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_tracker_that_is_not_installed_is_found_before_training(
    name: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(start, "prepare", None)  # not reached
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda package: None)
        outcome = site.train(tmp_path / "run", f'log.report_to=["{name}"]')
    assert outcome.status == WRONG
    assert outcome.message == f'log.report_to: "{name}" needs the package {name}; run pip install {name}, or remove it from the list'


def scalars_of(directory: Path) -> dict[str, dict[int, float]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert all(len(values) == len(events.Scalars(name)) for name, values in found.items()), "a step is shown twice"
    return found


def test_tensorboard_shows_what_metrics_jsonl_holds(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    outcome = site.train(tmp_path / "run", 'log.report_to=["tensorboard"]', "train.max_steps=4")
    assert outcome.status == DONE, outcome.err
    assert_tensorboard_shows_metrics(tmp_path / "run")


def test_tensorboard_hides_what_a_crash_has_left_after_the_last_checkpoint(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    more = ['log.report_to=["tensorboard"]', "train.max_steps=5", "checkpoint.save_steps=2"]
    calls = 0

    def crash_in_step_4(*arguments: Any) -> train.StepReport:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise TrainingDiverged("here")
        return step(*arguments)

    step = train.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", crash_in_step_4)
        assert site.train(tmp_path / "run", *more).status == FAILED
    assert site.train(tmp_path / "run", *more).status == DONE
    assert_tensorboard_shows_metrics(tmp_path / "run")


def assert_tensorboard_shows_metrics(run_dir: Path) -> None:
    shown = scalars_of(run_dir / "tensorboard")
    lines = read_jsonl(run_dir / "metrics.jsonl")
    assert set(shown) == {key for line in lines for key in line} - {"step"}
    for name, values in shown.items():
        assert values == {line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines if name in line}
