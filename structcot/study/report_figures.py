"""The drawings of a study as files of their own: SVG that reads by itself, with its text in it, dark on light, of a fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from structcot.eval.endings import ENDINGS
from structcot.eval.report_page import percent, points
from structcot.page import safe_text
from structcot.report_charts import nice_axis, number
from structcot.study.report_intervals import Row, rows_axis, signed
from structcot.study.report_order import NOISE, Facts, difference_text, estimate_of, in_order, label_of, settled
from structcot.study.report_plots import Panel, drawing, proxy_numbers, shade, swatch

WIDTH = 940
TITLE_HEIGHT = 44
LINE_HEIGHT = 20
PANEL_WIDTH, PANEL_HEIGHT, PANEL_LEFT, PANEL_STEP = 320, 240, 48, 475
# From the title of a drawing to the box of a panel, and from there to its legend.
PANEL_TOP, PANEL_BOTTOM = TITLE_HEIGHT + 36, 56
LABEL_WIDTH, TEXT_WIDTH = 200, 250
CELL_WIDTH, CELL_HEIGHT = 138, 24
# Pixels of a letter, on the wide side: no font is at hand that could be measured.
LETTER_WIDTH = 6.6
# The page's colours on light; a kind's has the last word over its group's.
COLOURS = {
    "g-content": "#0067b0",
    "g-structure": "#b84a00",
    "g-answer": "#a03c84",
    "g-base": "#1b1f24",
    "g-other": "#59626d",
    "k-digits": "#0067b0",
    "k-keywords": "#00795a",
    "k-wrong-answer": "#b3261e",
    "k-delete": "#b84a00",
    "k-insert": "#a03c84",
    "k-shuffle": "#1b1f24",
    "k-base": "#59626d",
    "k-other": "#59626d",
}
ENDING_COLOURS = {"finished": "#2f8f6b", "truncated": "#d9a441", "looping": "#8a5bd6", "refused": "#9aa2ab"}
SHADES = {
    "loss-1": "#fbe6d6",
    "loss-2": "#f6cfb0",
    "loss-3": "#efb287",
    "loss-4": "#e6935b",
    "gain-1": "#dcebf8",
    "gain-2": "#bcd8f0",
    "gain-3": "#97c2e6",
    "gain-4": "#6fa9da",
}
_COLOUR_RULES = "".join(f".{name}{{stroke:{colour}}}text.{name}{{fill:{colour};stroke:none}}" for name, colour in COLOURS.items())
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b1f24}.title{font-size:15px;font-weight:600}.faint{fill:#59626d}"
    ".end{text-anchor:end}.middle{text-anchor:middle}path{fill:none;stroke-width:2}.grid{stroke:#e7eaee;stroke-width:1}"
    ".zero{stroke:#59626d;stroke-width:1}.level{stroke:#59626d;stroke-width:1;stroke-dasharray:2 4}"
    + _COLOUR_RULES
    + ".line.g-content{stroke-dasharray:8 4}.line.g-answer{stroke-dasharray:2 4}.line.g-other{stroke-dasharray:10 3 2 3}"
    ".dot{stroke-width:8;stroke-linecap:round}.dot.g-structure,.dot.g-other{stroke-linecap:square;stroke-width:7}"
    ".number{font-size:11px}.dot.hole{stroke:#fff;stroke-width:4}.band{stroke:none;opacity:.14}"
    + "".join(f".band.{name}{{fill:{colour}}}" for name, colour in COLOURS.items())
    + ".range{stroke-width:7;opacity:.35}"
)


def svg_panels(title: str, panels: Sequence[Panel]) -> str:
    """Draw panels in a row, each with its title, its axes and its legend."""
    legend_height = LINE_HEIGHT * max(len(panel.legend) for panel in panels)
    height = PANEL_TOP + PANEL_HEIGHT + PANEL_BOTTOM + legend_height
    width = max(WIDTH, PANEL_STEP * len(panels)) if len(panels) > 1 else PANEL_STEP + 40
    body = "".join(_panel(panel, PANEL_LEFT + PANEL_STEP * index) for index, panel in enumerate(panels))
    return _document(title, panels[0].note, width, height, body)


def svg_proxies(facts: Facts, task: str, title: str, panels: Sequence[Panel]) -> str:
    """Draw the panels of the losses over the names that their numbers stand for."""
    names = [f"{text} {label_of(variant, facts)}" for variant, text in proxy_numbers(facts, task)]
    columns, top = 4, PANEL_TOP + PANEL_HEIGHT + PANEL_BOTTOM + LINE_HEIGHT * max(len(panel.legend) for panel in panels)
    body = "".join(_panel(panel, PANEL_LEFT + PANEL_STEP * index) for index, panel in enumerate(panels))
    for index, name in enumerate(names):
        body += _text(PANEL_LEFT + index % columns * 220, top + LINE_HEIGHT * (1 + index // columns), _cut(name, 200))
    height = top + LINE_HEIGHT * (1 + -(-len(names) // columns))
    return _document(title, panels[0].note, WIDTH, height, body)


def svg_rows(title: str, note: str, rows: Sequence[Row]) -> str:
    """Draw a dot with its interval for each row, its name before it and its numbers behind it."""
    x, left, room = rows_axis(rows), LABEL_WIDTH + 20, WIDTH - LABEL_WIDTH - TEXT_WIDTH - 40
    bottom = TITLE_HEIGHT + 14 + LINE_HEIGHT * 1.2 * len(rows)
    body = []
    for tick in x.ticks:
        at = left + room * x.share(tick)
        body.append(f'<path class="{"zero" if tick == 0 else "grid"}" d="M{at:.5g} {TITLE_HEIGHT + 6}V{bottom:.5g}"/>')
        body.append(_text(at, bottom + 16, signed(tick), "faint middle"))
    for index, row in enumerate(rows):
        y = TITLE_HEIGHT + 22 + LINE_HEIGHT * 1.2 * index
        low, high = row.estimate.get("interval") or (row.estimate["value"],) * 2
        start, middle, end = (left + room * x.share(100 * value) for value in (low, row.estimate["value"], high))
        body.append(_text(LABEL_WIDTH, y + 4, _cut(row.label, LABEL_WIDTH), "end"))
        body.append(f'<path class="range {row.style}" d="M{start:.5g} {y:.5g}H{end:.5g}"/>')
        body.append(f'<path class="dot {row.style}" d="M{middle:.5g} {y:.5g}h0"/>')
        body += [f'<path class="dot hole" d="M{middle:.5g} {y:.5g}h0"/>'] if row.verdict == NOISE else []
        body.append(_text(left + room + 16, y + 4, f"{difference_text(row.estimate)} {row.verdict}", "faint"))
    return _document(title, note, WIDTH, bottom + 30, "".join(body))


def svg_heat(title: str, facts: Facts, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Facts | None]]]) -> str:
    """Draw the differences of variants (rows) by task and setting (columns) as shaded cells with their numbers."""
    largest = max((abs(cell["value"]) for _, cells in rows for cell in cells if cell), default=0.0)
    body, top, left = [], TITLE_HEIGHT + 30, LABEL_WIDTH + 12
    for index, head in enumerate(heads):
        body.append(_text(left + CELL_WIDTH * (index + 0.5), top - 8, _cut(head, CELL_WIDTH), "faint middle"))
    for number_of_row, (label, cells) in enumerate(rows):
        y = top + CELL_HEIGHT * number_of_row
        body.append(_text(LABEL_WIDTH, y + 16, _cut(label, LABEL_WIDTH), "end"))
        for index, cell in enumerate(cells):
            fill, x = SHADES.get(shade(cell, largest), "#f5f6f8"), left + CELL_WIDTH * index
            body.append(f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{fill}"/>')
            words = f"{points(cell['value'])} {settled(cell)}" if cell else "\u2013"
            body.append(_text(x + CELL_WIDTH / 2, y + 16, words, "middle"))
    note = f"points of accuracy less {facts['reference']}"
    return _document(title, note, max(520, left + CELL_WIDTH * len(heads) + 16), top + CELL_HEIGHT * len(rows) + 14, "".join(body))


def svg_outputs(title: str, facts: Facts, task: str) -> str:
    """Draw for each variant how its outputs end, how long they are in the median and how many keywords they have."""
    variants = [variant for variant in in_order(facts) if estimate_of(variant, "outputs", task)]
    room, gap, left, top = 180, 62, LABEL_WIDTH + 12, TITLE_HEIGHT + 54
    body = []
    for index, ending in enumerate(ENDING_COLOURS):
        body.append(f'<rect x="{left + 100 * index}" y="{TITLE_HEIGHT}" width="11" height="11" fill="{ENDING_COLOURS[ending]}"/>')
        body.append(_text(left + 16 + 100 * index, TITLE_HEIGHT + 10, {"truncated": "cut off"}.get(ending, ending), "faint"))
    for index, head in enumerate(("endings, % finished", "tokens, median", "keywords an output")):
        body.append(_text(left + (room + gap) * index, top - 8, head, "faint"))
    largest = {
        name: nice_axis(0, max([variant["outputs"][task].get(name) or 0 for variant in variants], default=1) or 1).high
        for name in ("tokens_median", "keywords")
    }
    for number_of_row, variant in enumerate(variants):
        outputs, y = variant["outputs"][task], top + LINE_HEIGHT * number_of_row
        body.append(_text(LABEL_WIDTH, y + 13, _cut(label_of(variant, facts), LABEL_WIDTH), "end"))
        start = float(left)
        for ending, share in ending_shares(outputs).items():
            body.append(f'<rect x="{start:.5g}" y="{y + 3}" width="{room * share:.4g}" height="13" fill="{ENDING_COLOURS[ending]}"/>')
            start += room * share
        body.append(_text(left + room + 6, y + 14, percent(outputs.get("finished")), "faint"))
        for column, (name, limit) in enumerate(largest.items(), 1):
            value, x = outputs.get(name), left + (room + gap) * column
            width = (room - 40) * (value or 0) / limit
            body.append(f'<rect x="{x}" y="{y + 3}" width="{width:.4g}" height="13" fill="#7fa7c9"/>')
            body.append(_text(x + width + 5, y + 14, _measure(name, value), "faint"))
    return _document(title, "", WIDTH, top + LINE_HEIGHT * len(variants) + 16, "".join(body))


def _measure(name: str, value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}" if name == "keywords" else f"{value:,.0f}"


def ending_shares(outputs: Facts) -> Mapping[str, float]:
    """Shares of the outputs by ending; what is neither finished, cut off nor looping was refused."""
    shares = {name: outputs.get(name) or 0.0 for name in ENDINGS if name != "refused"}
    has_all = all(outputs.get(name) is not None for name in shares)
    return {**shares, "refused": max(0.0, 1 - sum(shares.values())) if has_all else 0.0}


def _panel(panel: Panel, left: float) -> str:
    parts = [_text(left, PANEL_TOP - 14, panel.title)]
    parts.append(f'<g transform="translate({left} {PANEL_TOP})">{drawing(panel, PANEL_WIDTH, PANEL_HEIGHT)}')
    for tick in panel.y.ticks:
        parts.append(_text(-8, PANEL_HEIGHT * (1 - panel.y.share(tick)) + 4, number(tick).replace("-", "\u2212"), "faint end"))
    for tick in panel.x.ticks:
        parts.append(_text(PANEL_WIDTH * panel.x.share(tick), PANEL_HEIGHT + 18, number(tick), "faint middle"))
    parts.append(_text(PANEL_WIDTH / 2, PANEL_HEIGHT + 36, panel.x_unit, "faint middle"))
    for tag in panel.tags:
        x, y = PANEL_WIDTH * tag.at[0], PANEL_HEIGHT * (1 - tag.at[1]) + 4
        parts.append(_text(x, y, tag.text, "number middle") if tag.style == "number" else _text(x + 8, y, tag.text, tag.style))
    for index, (style, words) in enumerate(panel.legend):
        y = PANEL_HEIGHT + PANEL_BOTTOM + 2 + LINE_HEIGHT * index
        parts += [swatch(style, y - 4), _text(32, y, words, "faint")]
    return f"{''.join(parts)}</g>"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.5g}" y="{y:.5g}"{named}>{safe_text(text)}</text>'


def _cut(text: str, width: float) -> str:
    """Cut a name to what fits."""
    limit = int(width / LETTER_WIDTH)
    return text if len(text) <= limit else f"{text[: limit - 1]}\u2026"


def _document(title: str, note: str, width: float, height: float, body: str) -> str:
    said = _text(16, 24, title, "title")
    under = _text(16, 41, note, "faint") if note else ""
    size = f'viewBox="0 0 {width:.5g} {height:.5g}" width="{width:.5g}" height="{height:.5g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{safe_text(title)}</title><style>{STYLE}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{said}{under}{body}</svg>\n'
    )
