"""Rows of intervals: the differences of a study as dots over an axis of points, with their numbers in words beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structcot.page import safe_text
from structcot.report_charts import Axis, nice_axis, number
from structcot.study.report_order import NOISE, Facts, difference_text, estimate_of, home_of, in_order, kind_of, settled
from structcot.study.report_plots import style_of, with_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a plot of differences: a name, what is known, and the classes of its kind."""

    label: str
    estimate: Facts
    verdict: str
    style: str


def difference_rows(facts: Facts, setting: str, task: str) -> list[Row]:
    """Rows of the differences of one setting, in order."""
    rows = []
    for variant in in_order(facts):
        estimate = estimate_of(variant, "difference", task)
        if estimate and home_of(variant, facts) == setting:
            style = style_of(kind_of(variant), variant["group"])
            rows.append(Row(label=variant["name"], estimate=estimate, verdict=settled(estimate), style=style))
    return rows


def matched_rows(facts: Facts, task: str) -> list[Row]:
    """Rows of structure less content at the same edit distance on one task."""
    rows = []
    for pair in facts["matched"]:
        estimate = pair.get("difference")
        if not estimate or estimate.get("value") is None or pair["task"] != task:
            continue
        where = [pair["setting"]] if len(facts["settings"]) > 1 and pair["setting"] else []
        where += [] if pair.get("edit_distance") is None else [f"at {pair['edit_distance']:.2f}"]
        label = (
            f"{pair['structure']} less {pair['content']}, {', '.join(where)}" if where else f"{pair['structure']} less {pair['content']}"
        )
        verdict = pair.get("verdict")
        known = verdict if verdict in ("worse", "better", NOISE) else None
        rows.append(Row(label=label, estimate=estimate, verdict=settled(estimate, known), style=style_of(pair["structure"], "structure")))
    return rows


def rows_axis(rows: Sequence[Row]) -> Axis:
    """The range of points that all rows share; 0 lies in it."""
    ends = [100 * end for row in rows for end in (row.estimate["value"], *(row.estimate.get("interval") or ()))]
    return nice_axis(*with_zero(ends), 5)


def draw_rows(key: str, title: str, note: str, rows: Sequence[Row]) -> str:
    """Draw a dot with its interval for each row and say it in words; a difference that is not settled has a hollow dot."""
    x = rows_axis(rows)
    ticks = "".join(f'<span style="left:{100 * x.share(tick):.4g}%">{safe_text(signed(tick))}</span>' for tick in x.ticks)
    lines = "".join(f'<i class="{"zero" if tick == 0 else "tick-line"}" style="left:{100 * x.share(tick):.4g}%"></i>' for tick in x.ticks)
    body = "".join(_row(row, x, lines) for row in rows)
    axis = f'<li class="axis" aria-hidden="true"><b></b><span class="track">{ticks}</span><em></em></li>'
    caption = f'<figcaption><h3>{title}</h3><p class="note">{note}</p></figcaption>'
    return f'<figure class="chart" id="chart-{key}">{caption}<ul class="dots forest">{body}{axis}</ul></figure>'


def signed(value: float) -> str:
    """Write a tick of an axis of differences, which are in points."""
    return ("\u2212" if value < 0 else "+" if value > 0 else "") + number(abs(value))


def _row(row: Row, x: Axis, lines: str) -> str:
    value, interval = 100 * row.estimate["value"], row.estimate.get("interval")
    low, high = (x.share(100 * end) for end in interval) if interval else (x.share(value),) * 2
    hollow = " hollow" if row.verdict == NOISE else ""
    return (
        f'<li class="{row.style}"><b>{safe_text(row.label)}</b><span class="track" aria-hidden="true">{lines}'
        f'<i class="range" style="left:{100 * low:.4g}%;width:{100 * (high - low):.4g}%"></i>'
        f'<i class="mean{hollow}" style="left:{100 * x.share(value):.4g}%"></i></span>'
        f"<em>{difference_text(row.estimate)} {row.verdict}</em></li>"
    )
