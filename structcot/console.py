"""What a person sees of a run: a bar on a terminal, a line a step elsewhere. All of it goes to standard error."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm

from structcot.metrics import Metrics, StepReport, by_task


def say(text: str) -> None:
    """Print one line to standard error, on the first rank of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    return f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"


class Progress:
    """Steps done, loss, tokens a second and time left, every `logging_steps` steps."""

    def __init__(self, first_step: int, num_steps: int, logging_steps: int):
        self.first_step, self.num_steps, self.logging_steps = first_step, num_steps, logging_steps
        self._start_seconds = time.perf_counter()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def show(self, report: StepReport) -> None:
        """Show a finished step."""
        self._bar.update(1)
        self.show_evaluation(report.step, report.evaluated)
        if report.step % self.logging_steps and report.step != self.num_steps:
            return
        tokens_per_second = report.step_tokens / report.step_seconds
        loss = report.evaluated.get("eval/loss")
        evaluated = "" if loss is None else f"  held-out loss {loss:.4f}"
        self._bar.set_postfix_str(f"loss {report.loss:.4f}  {tokens_per_second:,.0f} tokens/s{evaluated}")
        if self._bar.disable:
            say(
                f"step {report.step}/{self.num_steps}  loss {report.loss:.4f}  grad norm {report.grad_norm:.3f}"
                f"  {tokens_per_second:,.0f} tokens/s  {self._time_left(report.step)} left{evaluated}"
            )

    def show_evaluation(self, step: int, evaluated: Metrics) -> None:
        """Show what the live evaluation after `step` has found, a line a task."""
        for task, found in by_task(evaluated).items():
            self._bar.write(live_line(step, task, found), file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal clean."""
        self._bar.close()

    def _time_left(self, step: int) -> str:
        elapsed_seconds = time.perf_counter() - self._start_seconds
        seconds = elapsed_seconds / max(1, step - self.first_step) * (self.num_steps - step)
        return clock(seconds)


def live_line(step: int, task: str, found: dict[str, float]) -> str:
    """What was found of one task after `step`, as a line; `found` are its metrics by name."""
    accuracy = f"{100 * found['accuracy']:.1f} % right, " if "accuracy" in found else ""
    return (
        f"{task} after step {step}: {accuracy}{found['completion_tokens']:.0f} tokens, {100 * found['truncated']:.0f} % cut off,"
        f" {100 * found['looping']:.0f} % looping, probability of ending {found['end_probability']:.3f}"
    )
