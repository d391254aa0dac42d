"""Curves of the live evaluation: what the model said to a few fixed problems as the training went on, drawn where there was one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from structcot.report_charts import Chart, Series, draw_lines
from structcot.report_files import column

LIVE_NAME = re.compile(r"eval/([^/]+)/([^/]+)")
# Key, title and note of a chart, and the metrics that it shows.
LIVE_CHARTS = (
    ("live-accuracy", "Accuracy", "share of right answers to the problems of the live evaluation", ("accuracy",)),
    ("live-tokens", "Length of the answers", "mean tokens, with the one that ends the answer", ("completion_tokens",)),
    ("live-endings", "Answers cut off", "share that was cut off, and share that was cut off in a loop", ("truncated", "looping")),
    ("live-end-probability", "Probability of ending", "mean, at the last token of an answer", ("end_probability",)),
)
MAX_CURVES = 8


def live_charts(rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[Chart]:
    """Draw the metrics `eval/<task>/<name>` of all steps, a curve for each task; no chart where nothing was evaluated."""
    names = dict.fromkeys(chain.from_iterable(rows))
    tasks = list(dict.fromkeys(match[1] for name in names if (match := LIVE_NAME.fullmatch(name))))
    if not tasks:
        return []
    charts = []
    for key, title, note, metrics in LIVE_CHARTS:
        drawn = [(task, metric) for task in tasks for metric in metrics][:MAX_CURVES]
        curves = [
            Series(
                name=f"{task}, {metric}" if len(metrics) > 1 else task,
                style=f"s-{place}",
                values=column(rows, f"eval/{task}/{metric}"),
                is_smoothed=False,
            )
            for place, (task, metric) in enumerate(drawn)
        ]
        charts.append(draw_lines(key, title, steps, curves, scale="zero", note=note))
    return charts
