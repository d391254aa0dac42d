"""Where the steps of a run are told: metrics.jsonl, the trackers of `log.report_to`, and the person who watches. The first rank tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from structcot.config import Config
from structcot.console import Progress
from structcot.metrics import Metrics, MetricsFile, StepReport, Tracker, open_trackers


class StepLog:
    """The steps of a run that goes on after `last_step`; `writes` is false on the ranks that leave it to the first."""

    def __init__(self, config: Config, last_step: int, num_steps: int, *, writes: bool):
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self._progress: Progress | None = None
        if writes:
            self._file = MetricsFile(Path(config.output_dir) / "metrics.jsonl", last_step)
            self._trackers = open_trackers(config, last_step + 1) if last_step < num_steps else []
            self._progress = Progress(last_step, num_steps, config.log.logging_steps)

    def lacks(self, names: Sequence[str]) -> bool:
        """Whether the last step that was kept has not all of these values."""
        return self._file is not None and self._file.lacks(names)

    def begin(self, evaluated: Metrics) -> None:
        """Write, as step 0, and show what was measured of the base model."""
        if self._file is not None and self._progress is not None:
            self._file.append({"step": 0, "epoch": 0.0, **evaluated})
            self._progress.show_evaluation(0, evaluated)
        for track in self._trackers:
            track(0, evaluated)

    def amend(self, values: Metrics) -> None:
        """Add values to the last step that was kept."""
        if self._file is not None:
            self._file.amend(values)

    def append(self, report: StepReport) -> None:
        """Write a finished step to metrics.jsonl."""
        if self._file is not None:
            self._file.append(report.to_metrics())

    def show(self, report: StepReport) -> None:
        """Show a finished step, and tell the trackers."""
        if self._progress is not None:
            self._progress.show(report)
        for track in self._trackers:
            track(report.step, report.to_metrics())

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the file and leave the terminal clean."""
        if self._file is not None and self._progress is not None:
            self._file.close()
            self._progress.close()
