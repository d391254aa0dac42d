"""Numbers to charts: inline SVG that stretches with the page, under labels that do not.

A drawing lives in a box of 1000 x 300 units that is stretched to the width of the page, so strokes are told not to scale and every text is
HTML laid over the box in percent: a label keeps its size on a phone. Colours and dashes come from the style sheet by class (`s-NAME`).
A long run is drawn from few of its steps: each bucket of neighbouring steps keeps the rows with the smallest and the largest value of every
curve, so no spike disappears. What the cursor reads out is written here as finished text; the script of the page only looks it up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeGuard

BOX_WIDTH, BOX_HEIGHT = 1000, 300
NUM_BUCKETS = 240
MIN_STEPS_TO_SMOOTH = 30
MAX_POINTS_WITH_DOTS = 60
# A value beyond this says "diverged", and the arithmetic of an axis would overflow.
LARGEST_DRAWN = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: a value for each step, None where the step has none."""

    name: str
    style: str
    values: Sequence[float | None]
    is_smoothed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The markup of one chart, and what its cursor reads out: positions in percent, their names, a text per series and position."""

    key: str
    html: str
    readout: dict[str, list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values and the ticks on it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1); a logarithmic axis puts what is too small on its floor."""
        if self.is_log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Canvas:
    """Two axes, and which of the steps are drawn on them."""

    steps: Sequence[int]
    rows: Sequence[int]
    x: Axis
    y: Axis

    def left(self, step: int) -> str:
        return f"{BOX_WIDTH * self.x.share(step):.4g}"

    def top(self, value: float) -> str:
        return f"{BOX_HEIGHT * (1 - self.y.share(value)):.4g}"


def number(value: float) -> str:
    """Write about four digits: 0.6123, 1,234.5, 12,345, 9.8e-5."""
    size = abs(value)
    if not math.isfinite(value) or size >= 1e15:
        return f"{value:.4g}"
    if size >= 1e3:
        return f"{value:,.0f}" if size >= 1e4 else f"{value:,.1f}".removesuffix(".0")
    if size >= 1e-3 or value == 0:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def nice_axis(low: float, high: float, num_ticks: int = 5) -> Axis:
    """Choose the smallest range around [low, high] whose ticks are multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * abs(low) or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / (num_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
    # A hair of slack: 0.3 / 0.1 is 2.9999999999999996 and must not add a tick.
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    ticks = tuple(index * gap for index in range(first, max(last, first + 1) + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks)


def log_axis(low: float, high: float) -> Axis:
    """Choose whole decades around the positive range [low, high], ticked every decade, or every few where there are many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stride = max(1, math.ceil((last - first) / 6))
    num_gaps = max(1, math.ceil((last - first) / stride))
    ticks = tuple(10.0 ** (first + stride * index) for index in range(num_gaps + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks, is_log=True)


def smooth(values: Sequence[float | None], span_steps: int, rows: Sequence[int]) -> list[float | None]:
    """Average the values around each of `rows`: half of `span_steps` on either side, less near both ends, as many before as after.

    A trailing mean would run behind a falling loss; this one does not. A step without a value gets no mean and weighs nothing.
    """
    totals = list(accumulate((value if _is_drawn(value) else 0.0 for value in values), initial=0.0))
    counts = list(accumulate(map(_is_drawn, values), initial=0))
    means: list[float | None] = []
    for row in rows:
        reach = min(span_steps // 2, row, len(values) - 1 - row)
        start, stop = row - reach, row + reach + 1
        means.append((totals[stop] - totals[start]) / (counts[stop] - counts[start]) if _is_drawn(values[row]) else None)
    return means


def rows_to_draw(series: Sequence[Series], num_rows: int) -> list[int]:
    """Choose rows that keep the shape of every curve: the extremes of each bucket, a value that is not finite, both ends."""
    if num_rows <= 2 * NUM_BUCKETS:
        return list(range(num_rows))
    chosen = {0, num_rows - 1}
    for bucket in range(NUM_BUCKETS):
        rows = range(bucket * num_rows // NUM_BUCKETS, (bucket + 1) * num_rows // NUM_BUCKETS)
        for values in (one.values for one in series):
            drawn = [(value, row) for row in rows if _is_drawn(value := values[row])]
            if drawn:
                chosen.update((min(drawn)[1], max(drawn)[1]))
            if len(drawn) < len(rows):
                chosen.update([row for row in rows if _is_odd(values[row])][:1])
    return sorted(chosen)


def draw_lines(
    key: str,
    title: str,
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    scale: Literal["fit", "zero", "log-if-wide"] = "fit",
    marks: Sequence[int] = (),
    note: str = "",
) -> Chart:
    """Draw curves over the optimizer steps, with a vertical line at each step of `marks`.

    `scale` says where the vertical axis begins: at the data, at zero, or logarithmic where the data spans more than two decades.
    """
    series = [one for one in series if any(value is not None for value in one.values)]
    values = [value for one in series for value in one.values if _is_drawn(value)]
    if not values:
        return empty_chart(key, title, "No value of this is finite." if series else "No step has written this yet.")
    canvas = _Canvas(steps=steps, rows=rows_to_draw(series, len(steps)), x=_step_axis(steps), y=_value_axis(values, scale))
    odd_rows = [row for row in canvas.rows if any(_is_odd(one.values[row]) for one in series)]
    drawing = [
        *(f'<path class="grid" d="M0 {canvas.top(tick)}H{BOX_WIDTH}"/>' for tick in canvas.y.ticks),
        *(f'<path class="mark" d="M{canvas.left(step)} 0V{BOX_HEIGHT}"/>' for step in marks if steps[0] < step < steps[-1]),
        *(_curve(canvas, one) for one in series),
        *(f'<path class="odd" d="M{canvas.left(steps[row])} 0v14"/>' for row in odd_rows),
    ]
    notes = [note, _smoothing_note(len(steps)) if any(_is_smooth(one) for one in series) else ""]
    notes += ["logarithmic scale" if canvas.y.is_log else "", "red ticks at the top: values that are not finite" if odd_rows else ""]
    labels = [tick_label("y", "top", 1 - canvas.y.share(tick), number(tick)) for tick in canvas.y.ticks]
    labels += [tick_label("x", "left", canvas.x.share(tick), f"{tick:,.0f}") for tick in canvas.x.ticks]
    readout = {
        "x": [round(100 * canvas.x.share(steps[row]), 2) for row in canvas.rows],
        "at": [f"step {steps[row]:,}" for row in canvas.rows],
        "texts": [_texts(canvas, one) for one in series],
    }
    html = figure(key, title, "; ".join(filter(None, notes)), _legend(series, readout), "".join(drawing), "".join(labels))
    return Chart(key=key, html=html, readout=readout)


def draw_bars(key: str, title: str, edges: Sequence[float], counts: Sequence[float], unit: str, note: str = "") -> Chart:
    """Draw a histogram: bin k holds `counts[k]` samples from `edges[k]` to `edges[k + 1]`; bins are equally wide on the page."""
    total = sum(counts)
    if len(edges) != len(counts) + 1 or not total:
        return empty_chart(key, title, "There is nothing to count.")
    y = nice_axis(0, max(counts), 4)
    width = BOX_WIDTH / len(counts)
    tops = [BOX_HEIGHT * (1 - y.share(count)) for count in counts]
    drawing = [f'<path class="grid" d="M0 {BOX_HEIGHT * (1 - y.share(tick)):.4g}H{BOX_WIDTH}"/>' for tick in y.ticks]
    drawing += [
        f'<path class="bar" d="M{index * width + 0.06 * width:.5g} {BOX_HEIGHT}V{top:.4g}h{0.88 * width:.4g}V{BOX_HEIGHT}z"/>'
        for index, top in enumerate(tops)
    ]
    stride = math.ceil(len(counts) / 6)
    labels = [tick_label("y", "top", 1 - y.share(tick), number(tick)) for tick in y.ticks if tick == int(tick)]
    labels += [tick_label("x", "left", index / len(counts), number(edges[index])) for index in range(0, len(edges), stride)]
    readout = {
        "x": [round(100 * (index + 0.5) / len(counts), 2) for index in range(len(counts))],
        "at": [f"{number(low)} to {number(high)} {unit}" for low, high in pairwise(edges)],
        "texts": [[f"{count:,} ({100 * count / total:.3g} %)" for count in counts]],
    }
    legend = f'<span class="at">all</span><span class="key">samples <b>{total:,}</b></span>'
    return Chart(key=key, html=figure(key, title, note, legend, "".join(drawing), "".join(labels)), readout=readout)


def _is_drawn(value: float | None) -> TypeGuard[float]:
    return value is not None and -LARGEST_DRAWN < value < LARGEST_DRAWN


def _is_odd(value: float | None) -> bool:
    return value is not None and not _is_drawn(value)


def _is_smooth(one: Series) -> bool:
    return one.is_smoothed and len(one.values) >= MIN_STEPS_TO_SMOOTH


def _span_steps(num_steps: int) -> int:
    return 2 * max(1, round(num_steps / 80)) + 1


def _smoothing_note(num_steps: int) -> str:
    return f"thin: each step, thick: mean of {_span_steps(num_steps):,} steps around"


def _step_axis(steps: Sequence[int]) -> Axis:
    """Choose nice ticks between the first step and the last, which are the ends: curves fill the width."""
    low, high = steps[0], steps[-1]
    if low == high:
        return Axis(low=low - 1, high=high + 1, ticks=(low,))
    ticks = tuple(tick for tick in nice_axis(low, high, 6).ticks if low <= tick <= high and tick == int(tick))
    return Axis(low=low, high=high, ticks=ticks)


def _value_axis(values: Sequence[float], scale: str) -> Axis:
    low, high = min(values), max(values)
    positive = [value for value in values if value > 0]
    if scale == "log-if-wide" and positive and high > 100 * min(positive):
        return log_axis(min(positive), high)
    return nice_axis(min(0.0, low), max(0.0, high)) if scale == "zero" else nice_axis(low, high)


def _curve(canvas: _Canvas, one: Series) -> str:
    """Draw one series: a thin curve with a thick mean over it, or a thick curve alone; dots where its points are few."""
    rows = [row for row in canvas.rows if one.values[row] is not None]
    values = [one.values[row] for row in rows]
    raw = _path(canvas, rows, values)
    parts = [f'<path class="line {one.style}" d="{raw}"/>']
    if _is_smooth(one):
        # The mean is smooth by now, so every few of the drawn rows carry it.
        few_rows = sorted({*rows[:: max(1, len(rows) // NUM_BUCKETS)], *rows[-1:]})
        mean = _path(canvas, few_rows, smooth(one.values, _span_steps(len(one.values)), few_rows))
        parts = [f'<path class="raw {one.style}" d="{raw}"/>', f'<path class="line {one.style}" d="{mean}"/>']
    if len(rows) <= MAX_POINTS_WITH_DOTS:
        dots = _path(canvas, rows, values, is_pen_up=True)
        parts.append(f'<path class="dot {one.style}" d="{dots}"/>')
    return "".join(parts)


def _path(canvas: _Canvas, rows: Sequence[int], values: Sequence[float | None], *, is_pen_up: bool = False) -> str:
    """Join a value per row to a line, or to dots with the pen up; a value that is not finite breaks the line."""
    parts, is_joined = [], False
    for row, value in zip(rows, values, strict=True):
        if _is_drawn(value):
            point = f"{canvas.left(canvas.steps[row])} {canvas.top(value)}"
            parts.append(f"M{point}h0" if is_pen_up else f"{'L' if is_joined else 'M'}{point}")
        is_joined = _is_drawn(value)
    return "".join(parts)


def _texts(canvas: _Canvas, one: Series) -> list[str]:
    """Write what the cursor says at each drawn step: the value there, else the last one before it and its step."""
    texts, latest = [], "-"
    for row in canvas.rows:
        value = one.values[row]
        if value is not None:
            latest = f"{number(value)} at {canvas.steps[row]:,}"
        texts.append(latest if value is None else number(value))
    return texts


def _legend(series: Sequence[Series], readout: dict[str, list[Any]]) -> str:
    entries = [f'<span class="at">{readout["at"][-1]}</span>']
    for one, texts in zip(series, readout["texts"], strict=True):
        swatch = f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="line {one.style}" d="M1 4h22"/></svg>'
        entries.append(f'<span class="key">{swatch}{escape(one.name)} <b>{escape(texts[-1])}</b></span>')
    return "".join(entries)


def tick_label(axis: str, side: str, share: float, text: str) -> str:
    """Write the label of a tick on axis "x" or "y", `share` of the way from `side` ("left" or "top")."""
    return f'<span class="tick {axis}" style="{side}:{100 * share:.4g}%">{escape(text)}</span>'


def figure(key: str, title: str, note: str, legend: str, drawing: str, labels: str) -> str:
    """Put a drawing in the box, its labels over it, and a title, a note and a legend above; all but title and note are markup."""
    name, note = escape(title), escape(note)
    return (
        f'<figure class="chart" id="chart-{escape(key)}"><figcaption><h3>{name}</h3><p class="note">{note}</p></figcaption>'
        f'<p class="legend">{legend}</p><div class="plot" data-chart="{escape(key)}" aria-label="{name}" role="group">'
        f'<svg viewBox="0 0 {BOX_WIDTH} {BOX_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{name}">{drawing}</svg>'
        f'{labels}<span class="cross" hidden></span></div></figure>'
    )


def empty_chart(key: str, title: str, reason: str) -> Chart:
    """Say in place of a chart why there is none."""
    caption = f"<figcaption><h3>{escape(title)}</h3></figcaption>"
    html = f'<figure class="chart" id="chart-{escape(key)}">{caption}<p class="empty">{escape(reason)}</p></figure>'
    return Chart(key=key, html=html, readout={"x": [], "at": [], "texts": []})
