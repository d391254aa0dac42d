"""The drawings of a study as data, and as figures of the page: curves over the fraction, points over a loss, rows of intervals, a heat map.

A `Panel` has its marks and labels in shares of its box, so the page stretches it under labels of HTML and a file of its own sets it in
points (`structcot.study.report_figures`). Kinds have a colour each; a group has a dash for lines and a shape for points, and every curve
carries its name, so nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from structcot.page import safe_text
from structcot.report_charts import BOX_HEIGHT, BOX_WIDTH, Axis, figure, nice_axis, number, tick_label
from structcot.study.report_order import KINDS, Facts, estimate_of, in_order

CONTENT_GROUPS = ("answer", "content")
# Points of these groups are filled, round or square; those of others are hollow.
SOLID_GROUPS = ("content", "structure")
GROUP_WORDS = {"answer": "answers", "content": "content", "structure": "structure", "other": "other data", "base": "the base"}
PROXIES = {
    "reference_on_it": "Loss of the reference model on the variant's data",
    "it_on_reference": "Loss of the variant's model on the reference's data",
}
# Least distance of the names at the ends of curves, as a share of the height of the box.
TAG_GAP = 0.085
# Size of a number beside a point, how far from it the number lies, and on which sides it may: all in shares of the box.
TAG_SIZE, TAG_REACH = (0.034, 0.048), (0.035, 0.05)
AROUND = ((1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1))
NUM_SHADES = 4

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A shape in the box: its corners in shares from the left and from the bottom, its classes, and what a pointer reads."""

    shape: Literal["line", "band", "dot"]
    style: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A name in the box: where its left edge lies, in shares from the left and from the bottom."""

    text: str
    style: str
    at: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One drawing with two axes; `legend` are classes and words."""

    key: str
    title: str
    note: str
    x: Axis
    y: Axis
    x_unit: str
    marks: tuple[Mark, ...]
    tags: tuple[Tag, ...]
    legend: tuple[tuple[str, str], ...]


def dose_panels(facts: Facts, setting: str, task: str, key: str) -> list[Panel]:
    """Draw accuracy over the fraction: content and structure in panels of the same axes, the base as a level in both."""
    curves = [curve for curve in facts["curves"] if (curve["setting"], curve["task"]) == (setting, task) and _drawn(curve["points"])]
    ends = [end for curve in curves for point in _drawn(curve["points"]) for end in (point["value"], *(point.get("interval") or ()))]
    if not ends:
        return []
    bases = {one["setting"]: one for one in facts["variants"] if one["group"] == "base"}
    own = bases.get(setting) or bases.get("")
    base = estimate_of(own, "accuracy", task) if own else None
    ends += [base["value"]] if base else []
    y = nice_axis(100 * min(ends), 100 * max(ends), 5)
    panels = []
    for title, is_content in (("Content", True), ("Structure and other", False)):
        of_panel = [curve for curve in curves if (curve["group"] in CONTENT_GROUPS) == is_content]
        if of_panel:
            title = "Structure" if not is_content and all(curve["group"] == "structure" for curve in of_panel) else title
            panels.append(_dose_panel(f"{key}-{'content' if is_content else 'structure'}", title, of_panel, base, y))
    return panels


def proxy_panels(facts: Facts, task: str) -> list[Panel]:
    """Draw the difference of every variant over each of the two losses; points have the numbers of `proxy_numbers`."""
    levels = [_loss(variant, "reference_on_reference") for variant in facts["variants"] if variant["group"] == "reference"]
    levels = [level for level in levels if level is not None]
    panels = []
    for name, title in PROXIES.items():
        places = [
            (loss, 100 * variant["difference"][task]["value"], variant["group"], label)
            for variant, label in proxy_numbers(facts, task)
            if (loss := _loss(variant, name)) is not None
        ]
        panels += [_proxy_panel(f"proxy-{name}", title, places, levels)] if places else []
    return panels


def proxy_numbers(facts: Facts, task: str) -> list[tuple[Facts, str]]:
    """Number the variants that have a difference and a loss, in order."""
    numbered = [
        variant
        for variant in in_order(facts)
        if variant["group"] in GROUP_WORDS
        and estimate_of(variant, "difference", task)
        and any(_loss(variant, name) is not None for name in PROXIES)
    ]
    return [(variant, str(index)) for index, variant in enumerate(numbered, 1)]


def draw_panels(panels: Iterable[Panel]) -> str:
    """Draw panels side by side."""
    return f'<div class="charts panels">{"".join(map(_panel, panels))}</div>'


def drawing(panel: Panel, width: float, height: float) -> str:
    """Write the grid and the marks of a panel as paths in a box of a size."""
    grid = "".join(f'<path class="grid" d="M0 {height * (1 - panel.y.share(tick)):.5g}h{width}"/>' for tick in panel.y.ticks)
    return grid + "".join(_path(mark, width, height) for mark in panel.marks)


def swatch(style: str, height: float) -> str:
    """Write what a legend shows of some classes, 24 wide, its middle at a height."""
    if not style.startswith("dot"):
        return f'<path class="{style}" d="M1 {height:g}h22"/>'
    hole = f'<path class="dot hole" d="M12 {height:g}h0"/>' if style.endswith(" hollow") else ""
    return f'<path class="{style}" d="M12 {height:g}h0"/>{hole}'


def shade(estimate: Facts | None, largest: float) -> str:
    """Name the class of a cell of the heat map: "loss-1" to "loss-4", "gain-1" to "gain-4", or none."""
    if not estimate or not largest or not estimate["value"]:
        return ""
    step = min(NUM_SHADES, 1 + int(NUM_SHADES * abs(estimate["value"]) / largest))
    return f"{'loss' if estimate['value'] < 0 else 'gain'}-{step}"


def style_of(kind: str, group: str) -> str:
    """Classes of a kind, which has a colour, and of a group, which has a dash and a shape; names of others' making become no class."""
    return f"k-{kind if kind in KINDS else 'other'} g-{group if group in GROUP_WORDS else 'other'}"


def with_zero(values: Sequence[float]) -> tuple[float, float]:
    """Give the range of some values and 0."""
    return min([0.0, *values]), max([0.0, *values])


def _proxy_panel(key: str, title: str, places: Sequence[tuple[float, float, str, str]], levels: Sequence[float]) -> Panel:
    """Draw numbered points: `places` are losses, differences in points, groups and numbers."""
    losses = [*levels, *(loss for loss, _, _, _ in places)]
    x, y = nice_axis(min(losses), max(losses), 4), nice_axis(*with_zero([difference for _, difference, _, _ in places]), 5)
    marks = [Mark(shape="line", style="zero", points=((0, y.share(0)), (1, y.share(0))))]
    marks += [Mark(shape="line", style="level", points=((x.share(level), 0), (x.share(level), 1))) for level in levels]
    at = [(x.share(loss), y.share(difference)) for loss, difference, _, _ in places]
    for point, (_, _, group, _) in zip(at, places, strict=True):
        marks += _points([point], f"g-{group}")
        marks += _points([point], "hole") if group not in SOLID_GROUPS else []
    tags = [Tag(text=place[3], style="number", at=point) for point, place in zip(_beside(at), places, strict=True)]
    note = "points of accuracy over the loss" + ("; upright: the reference model on its own data" if levels else "")
    groups = dict.fromkeys(group for _, _, group, _ in places)
    legend = tuple((f"dot g-{group}{'' if group in SOLID_GROUPS else ' hollow'}", GROUP_WORDS[group]) for group in groups)
    unit = "nats per token"
    return Panel(key=key, title=title, note=note, x=x, y=y, x_unit=unit, marks=tuple(marks), tags=tuple(tags), legend=legend)


def _dose_panel(key: str, title: str, curves: Sequence[Facts], base: Facts | None, y: Axis) -> Panel:
    x = Axis(low=0.0, high=100.0, ticks=(0.0, 25.0, 50.0, 75.0, 100.0))
    bands, lines, ends = [], [], []
    for curve in curves:
        style, points = style_of(curve["kind"], curve["group"]), sorted(_drawn(curve["points"]), key=lambda point: point["fraction"])
        at = [(x.share(100 * point["fraction"]), y.share(100 * point["value"])) for point in points]
        wide = [point for point in points if point.get("interval")]
        upper = [(x.share(100 * point["fraction"]), y.share(100 * point["interval"][1])) for point in wide]
        lower = [(x.share(100 * point["fraction"]), y.share(100 * point["interval"][0])) for point in wide]
        bands.append(Mark(shape="band", style=f"band {style}", points=(*upper, *reversed(lower))))
        lines += [Mark(shape="line", style=f"line {style}", points=tuple(at)), *_points(at, style)]
        ends.append((curve["kind"], style, at[-1]))
    marks = [*bands, *lines]
    if base:
        level = y.share(100 * base["value"])
        marks.insert(0, Mark(shape="line", style="level", points=((0, level), (1, level))))
        ends.append(("base", "k-base", (1.0, level)))
    legend = tuple(
        (f"line {style_of(curve['kind'], curve['group'])}", f"{curve['kind']} ({GROUP_WORDS.get(curve['group'], 'other data')})")
        for curve in curves
    )
    note = "accuracy in per cent over the per cent changed; bands are 95 % intervals"
    return Panel(key=key, title=title, note=note, x=x, y=y, x_unit="% changed", marks=tuple(marks), tags=_end_tags(ends), legend=legend)


def _end_tags(ends: Sequence[tuple[str, str, Point]]) -> tuple[Tag, ...]:
    """Write the names of curves at their ends, pushed apart where ends meet: from the top down, and up again from the bottom."""
    ordered = sorted(ends, key=lambda end: -end[2][1])
    heights = [end[2][1] for end in ordered]
    for index in range(1, len(heights)):
        heights[index] = min(heights[index], heights[index - 1] - TAG_GAP)
    lowest = 0.03
    for index in reversed(range(len(heights))):
        heights[index] = max(heights[index], lowest)
        lowest = heights[index] + TAG_GAP
    return tuple(Tag(text=text, style=style, at=(1.0, height)) for (text, style, _), height in zip(ordered, heights, strict=True))


def _beside(points: Sequence[Point]) -> list[Point]:
    """Find a free place for the number of each point, near it and off the other points and numbers; the nearest where none is free."""
    chosen: list[Point] = []
    for left, up in points:
        near = [
            (left + across * reach * TAG_REACH[0], up + along * reach * TAG_REACH[1]) for reach in (1, 2, 3) for across, along in AROUND
        ]
        taken = [*points, *chosen]
        free = (one for one in near if all(abs(one[0] - at[0]) >= TAG_SIZE[0] or abs(one[1] - at[1]) >= TAG_SIZE[1] for at in taken))
        chosen.append(next(free, near[0]))
    return chosen


def _points(points: Iterable[Point], style: str) -> list[Mark]:
    return [Mark(shape="dot", style=f"dot {style}", points=(point,)) for point in points]


def _loss(variant: Facts, name: str) -> float | None:
    return (variant.get("losses") or {}).get(name)


def _drawn(points: Iterable[Facts]) -> list[Facts]:
    return [point for point in points if point.get("value") is not None]


def _path(mark: Mark, width: float, height: float) -> str:
    at = [f"{width * left:.5g} {height * (1 - up):.5g}" for left, up in mark.points]
    if not at:
        return ""
    # A line of no length with round or square ends is a dot that no stretching deforms.
    shape = {"dot": f"M{at[0]}h0", "line": f"M{'L'.join(at)}", "band": f"M{'L'.join(at)}z"}[mark.shape]
    return f'<path class="{mark.style}" d="{shape}"/>'


def _panel(panel: Panel) -> str:
    labels = "".join(tick_label("y", "top", 1 - panel.y.share(tick), number(tick).replace("-", "\u2212")) for tick in panel.y.ticks)
    labels += "".join(tick_label("x", "left", panel.x.share(tick), number(tick)) for tick in panel.x.ticks)
    labels += "".join(
        f'<span class="tag {tag.style}" style="left:{100 * tag.at[0]:.4g}%;top:{100 * (1 - tag.at[1]):.4g}%">{safe_text(tag.text)}</span>'
        for tag in panel.tags
    )
    legend = "".join(
        f'<span class="key"><svg class="swatch" viewBox="0 0 24 8" aria-hidden="true">{swatch(style, 4)}</svg>{safe_text(words)}</span>'
        for style, words in panel.legend
    )
    return figure(panel.key, panel.title, panel.note, legend, drawing(panel, BOX_WIDTH, BOX_HEIGHT), labels)
