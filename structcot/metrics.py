"""What is known of a step, and the places where it is written: metrics.jsonl always, trackers where `log.report_to` names them.

metrics.jsonl is append-only, one object a step; at a resume the lines after the checkpoint are cut away, so each step stands there once.
Where the base model was evaluated before the first step, its figures are step 0.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structcot.config import Config
from structcot.errors import ConfigError
from structcot.files import write_text

Metrics = dict[str, float | int | None]
Tracker = Callable[[int, Metrics], None]

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step: losses are means over supervised tokens of the whole step, None where a part has none; tokens are real ones.

    `evaluated` are the metrics of the evaluation after the step, by their names, where there was one.
    """

    step: int
    epoch: float
    loss: float
    loss_thought: float | None
    loss_solution: float | None
    loss_end: float | None
    loss_by_source: dict[str, float]
    grad_norm: float
    learning_rate: float
    num_tokens: int
    step_tokens: int
    step_supervised_tokens: int
    step_seconds: float
    data_seconds: float
    mfu: float
    hfu: float
    peak_gib: float
    evaluated: Metrics = field(default_factory=dict)

    def to_metrics(self) -> Metrics:
        """The object of metrics.jsonl."""
        metrics: Metrics = {
            "step": self.step,
            "epoch": self.epoch,
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            "train/learning_rate": self.learning_rate,
            "train/num_tokens": self.num_tokens,
            "data/step_tokens": self.step_tokens,
            "data/step_supervised_tokens": self.step_supervised_tokens,
            "loss/thought": self.loss_thought,
            "loss/solution": self.loss_solution,
            "loss/end": self.loss_end,
            "perf/tokens_per_second": self.step_tokens / self.step_seconds,
            "perf/supervised_tokens_per_second": self.step_supervised_tokens / self.step_seconds,
            "perf/mfu_4n": self.mfu,
            "perf/hfu": self.hfu,
            "memory/peak_gib": self.peak_gib,
            "time/step_seconds": self.step_seconds,
            "time/data_seconds": self.data_seconds,
        }
        metrics |= {f"loss/source/{name}": loss for name, loss in self.loss_by_source.items()}
        return metrics | self.evaluated


class MetricsFile:
    """metrics.jsonl of a run, opened to go on after step `last_step`; a run that starts keeps nothing of what lies there."""

    def __init__(self, path: Path, last_step: int):
        self._path = path
        self._kept = [metrics for line in _whole_lines(path) if (metrics := _parse(line)) and metrics["step"] <= last_step > 0]
        self._write_kept()

    def lacks(self, names: Sequence[str]) -> bool:
        """Whether the last line that was kept has not all of these values; false where none was kept."""
        return bool(self._kept) and any(name not in self._kept[-1] for name in names)

    def amend(self, values: Metrics) -> None:
        """Add values to the last line that was kept."""
        self.close()
        self._kept[-1] |= {name: value for name, value in values.items() if value is not None}
        self._write_kept()

    def append(self, metrics: Metrics) -> None:
        """Write one step; a reader sees whole lines only."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was appended survive a power cut; called before a checkpoint counts as complete."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write_kept(self) -> None:
        write_text(self._path, "".join(json.dumps(metrics) + "\n" for metrics in self._kept))
        self._file = self._path.open("a", encoding="utf-8")


def by_task(metrics: Metrics) -> dict[str, dict[str, float]]:
    """The metrics of a live evaluation, `eval/<task>/<name>`, by task and name."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "eval" and value is not None:
            found.setdefault(parts[1], {})[parts[2]] = value
    return found


def read_metrics(path: Path) -> list[Metrics]:
    """Every whole line of a metrics.jsonl; a line that is being written is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def open_trackers(config: Config, next_step: int = 1) -> list[Tracker]:
    """A function for each name in `log.report_to` that takes a step's number and metrics, from `next_step` on.

    Raises:
        ConfigError: if a tracker's package is not installed.
    """
    openers = {"tensorboard": lambda config: _tensorboard(config, next_step), "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
    return [openers[name](config) for name in config.log.report_to]


def check_trackers(names: Sequence[str]) -> None:
    """Find out before training that a tracker is missing.

    Raises:
        ConfigError: naming the package to install.
    """
    for name in names:
        package = TRACKER_PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f'log.report_to: "{name}" needs the package {package}; run pip install {package}, or remove it from the list')


def _tensorboard(config: Config, next_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier process has shown of this step and later ones is hidden.
    writer = SummaryWriter(str(Path(config.output_dir) / "tensorboard"), purge_step=next_step)

    def track(step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if value is not None and name != "step":
                writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(config: Config) -> Tracker:
    wandb = importlib.import_module("wandb")
    identifier = hashlib.sha256(os.path.abspath(config.output_dir).encode()).hexdigest()[:16]  # a resumed run goes on in the same place
    name = Path(config.output_dir).name
    run = wandb.init(project="structcot", id=identifier, name=name, config=_values(config), dir=config.output_dir, resume="allow")
    return lambda step, metrics: run.log(_present(metrics), step=step)


def _trackio(config: Config) -> Tracker:
    trackio = importlib.import_module("trackio")
    run = trackio.init(project="structcot", name=Path(config.output_dir).name, config=_values(config), resume="allow")
    return lambda step, metrics: run.log(_present(metrics), step=step)


def _mlflow(config: Config) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment("structcot")
    mlflow.start_run(run_name=Path(config.output_dir).name)
    mlflow.log_dict(_values(config), "config.json")
    return lambda step, metrics: mlflow.log_metrics(_present(metrics), step=step)


def _values(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _present(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _parse(line: str) -> dict[str, Any]:
    """One line of metrics.jsonl; empty where it is none: lines after the last checkpoint may be anything after a power cut."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1]  # what follows the last newline is empty, or half a line of a run that was killed
