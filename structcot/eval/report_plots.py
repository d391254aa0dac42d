"""The plots of an evaluation: accuracies with their intervals, accuracy within a budget of tokens, lengths of right and wrong outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from structcot.page import safe_text
from structcot.report_charts import BOX_HEIGHT, BOX_WIDTH, Axis, Chart, empty_chart, figure, nice_axis, number, tick_label

MAX_CURVES = 8
TICKS_TOKENS = tuple(factor * 10**power for power in range(7) for factor in (1, 3))
MAX_TICKS = 6
# Signs of the paper's rows, in the order in which golden.BESIDE has them.
GOLDEN_SIGNS = ("\u25cb", "\u25c7", "\u25c6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One line of the plot of accuracies: a share, its interval, and the paper's per cent by the name of the row."""

    name: str
    accuracy: float
    interval: tuple[float, float]
    golden: Mapping[str, float]


def draw_accuracies(dots: Sequence[Dot], golden_names: Sequence[str]) -> str:
    """Draw a dot with its interval for each accuracy, and the paper's values as signs of their own beside it."""
    signs = dict(zip(golden_names, GOLDEN_SIGNS, strict=False))
    used = [name for name in golden_names if any(name in dot.golden for dot in dots)]
    legend = '<span class="key"><i class="mean"></i>accuracy and its 95 % interval</span>' + "".join(
        f'<span class="key"><i class="golden">{signs[name]}</i> the paper: {safe_text(name)}</span>' for name in used
    )
    ticks = "".join(f'<span style="left:{tick}%">{tick}</span>' for tick in (0, 25, 50, 75, 100))
    rows = "".join(_dot_row(dot, signs) for dot in dots)
    return (
        '<figure class="chart" id="chart-accuracies"><figcaption><h3>Accuracy</h3><p class="note">per cent of the problems</p></figcaption>'
        f'<p class="legend">{legend}</p><ul class="dots">{rows}<li class="axis" aria-hidden="true"><b></b>'
        f'<span class="track">{ticks}</span><em></em></li></ul></figure>'
    )


def _dot_row(dot: Dot, signs: Mapping[str, str]) -> str:
    low, high = dot.interval
    marks = "".join(
        f'<i class="golden" style="left:{value:.4g}%" title="the paper, {safe_text(name)}: {value:.1f}">{signs[name]}</i>'
        for name, value in dot.golden.items()
    )
    text = f"{100 * dot.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return (
        f'<li><b>{safe_text(dot.name)}</b><span class="track" aria-hidden="true">'
        f'<i class="range" style="left:{100 * low:.4g}%;width:{100 * (high - low):.4g}%"></i>'
        f'<i class="mean" style="left:{100 * dot.accuracy:.4g}%"></i>{marks}</span><em>{text}</em></li>'
    )


def draw_budgets(budgets: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Chart:
    """Draw the accuracy of each task if every output longer than a budget of tokens were wrong."""
    title = "Accuracy within a budget of tokens"
    if not budgets or not curves:
        return empty_chart("budget", title, "No output has a token.")
    named = list(curves.items())[:MAX_CURVES]
    x = _token_axis(budgets[0], budgets[-1])
    y = nice_axis(0, 100 * max(max(values) for _, values in named) or 1, 5)
    drawing = [f'<path class="grid" d="M0 {_top(y, tick)}H{BOX_WIDTH}"/>' for tick in y.ticks]
    for index, (_, values) in enumerate(named):
        # A longer budget lets in whole outputs only, so the curve is a staircase.
        start, *rest = [(f"{BOX_WIDTH * x.share(at):.5g}", _top(y, 100 * value)) for at, value in zip(budgets, values, strict=True)]
        path = f"M{start[0]} {start[1]}" + "".join(f"H{left}V{top}" for left, top in rest) + f"H{BOX_WIDTH}"
        drawing.append(f'<path class="line s-{index}" d="{path}"/>')
    readout = {
        "x": [round(100 * x.share(at), 2) for at in budgets],
        "at": [f"{at:,} tokens" for at in budgets],
        "texts": [[f"{100 * value:.1f}" for value in values] for _, values in named],
    }
    swatches = "".join(
        f'<span class="key"><svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="line s-{index}" d="M1 4h22"/></svg>'
        f"{safe_text(name)} <b>{readout['texts'][index][-1]}</b></span>"
        for index, (name, _) in enumerate(named)
    )
    legend = f'<span class="at">{readout["at"][-1]}</span>{swatches}'
    left_out = f"; the first {MAX_CURVES} of {len(curves):,} tasks" if len(curves) > MAX_CURVES else ""
    note = f"per cent, if longer outputs were wrong; logarithmic scale{left_out}"
    html = figure("budget", title, note, legend, "".join(drawing), _y_labels(y) + _token_labels(x))
    return Chart(key="budget", html=html, readout=readout)


def draw_lengths(key: str, task: str, histogram: Mapping[str, Any]) -> Chart:
    """Draw how many outputs have which length, right ones upwards and the others downwards from the same line."""
    edges, right, wrong = histogram["edges"], histogram["right"], histogram["wrong"]
    above, below = nice_axis(0, max([*right, 1]), 3), nice_axis(0, max([*wrong, 1]), 3)
    unit = BOX_HEIGHT / (above.high + below.high)
    zero = unit * above.high
    width = BOX_WIDTH / len(right)
    bars = []
    for style, counts, sign in (("bar-right", right, -1), ("bar-wrong", wrong, 1)):
        shapes = [
            f"M{(index + 0.06) * width:.5g} {zero:.5g}v{sign * unit * count:.4g}h{0.88 * width:.4g}V{zero:.5g}z"
            for index, count in enumerate(counts)
            if count
        ]
        bars.append(f'<path class="{style}" d="{"".join(shapes)}"/>')
    drawing = f'{"".join(bars)}<path class="axis-line" d="M0 {zero:.5g}H{BOX_WIDTH}"/>'
    labels = "".join(
        tick_label("y", "top", place, f"{count:,.0f}")
        for place, count in ((0, above.high), (zero / BOX_HEIGHT, 0), (1, below.high))
        if count or place
    )
    stride = math.ceil(len(right) / 4)
    labels += "".join(tick_label("x", "left", index / len(right), f"{edges[index]:,}") for index in range(0, len(edges), stride))
    readout = {
        "x": [round(100 * (index + 0.5) / len(right), 2) for index in range(len(right))],
        "at": [f"{low:,} to {high:,} tokens" for low, high in pairwise(edges)],
        "texts": [[f"{count:,}" for count in right], [f"{count:,}" for count in wrong]],
    }
    legend = (
        f'<span class="at">all</span><span class="key"><i class="square right"></i>right, upwards <b>{sum(right):,}</b></span>'
        f'<span class="key"><i class="square wrong"></i>not right, downwards <b>{sum(wrong):,}</b></span>'
    )
    return Chart(key=key, html=figure(key, task, "outputs by tokens", legend, drawing, labels), readout=readout)


def _token_axis(low: int, high: int) -> Axis:
    """A logarithmic axis that begins and ends with the data, ticked at 1, 3, 10, 30 and so on."""
    high = max(2, high)
    low = max(1, min(low, high // 2))
    ticks = [tick for tick in TICKS_TOKENS if low <= tick <= high]
    while len(ticks) > MAX_TICKS:
        ticks = ticks[1::2]
    return Axis(low=low, high=high, ticks=tuple(ticks), is_log=True)


def _token_labels(x: Axis) -> str:
    return "".join(tick_label("x", "left", x.share(tick), f"{tick:,.0f}") for tick in x.ticks)


def _y_labels(y: Axis) -> str:
    return "".join(tick_label("y", "top", 1 - y.share(tick), number(tick)) for tick in y.ticks)


def _top(y: Axis, value: float) -> str:
    return f"{BOX_HEIGHT * (1 - y.share(value)):.5g}"
