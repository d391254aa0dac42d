"""What a person sees of a run: a bar on a terminal, a line a step elsewhere. All of it goes to standard error."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm

from structcot.metrics import StepReport


def say(text: str) -> None:
    """Print one line to standard error, on the first rank of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Steps done, loss, tokens a second and time left, every `logging_steps` steps."""

    def __init__(self, first_step: int, num_steps: int, logging_steps: int):
        self.first_step, self.num_steps, self.logging_steps = first_step, num_steps, logging_steps
        self._start_seconds = time.perf_counter()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def show(self, report: StepReport) -> None:
        """Show a finished step."""
        self._bar.update(1)
        if report.step % self.logging_steps and report.step != self.num_steps:
            return
        tokens_per_second = report.step_tokens / report.step_seconds
        evaluated = "" if report.eval_loss is None else f"  held-out loss {report.eval_loss:.4f}"
        self._bar.set_postfix_str(f"loss {report.loss:.4f}  {tokens_per_second:,.0f} tokens/s{evaluated}")
        if self._bar.disable:
            say(
                f"step {report.step}/{self.num_steps}  loss {report.loss:.4f}  grad norm {report.grad_norm:.3f}"
                f"  {tokens_per_second:,.0f} tokens/s  {self._time_left(report.step)} left{evaluated}"
            )

    def close(self) -> None:
        """Leave the terminal clean."""
        self._bar.close()

    def _time_left(self, step: int) -> str:
        elapsed_seconds = time.perf_counter() - self._start_seconds
        seconds = elapsed_seconds / max(1, step - self.first_step) * (self.num_steps - step)
        return f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"
