"""The report of a study as files: a page to look into, Markdown to commit, and the drawings as SVG for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from structcot.files import write_text
from structcot.study.report_figures import svg_heat, svg_outputs, svg_panels, svg_proxies, svg_rows
from structcot.study.report_intervals import difference_rows, matched_rows
from structcot.study.report_markdown import render_markdown
from structcot.study.report_order import Facts, all_tasks, headline_task, in_order, settings_in
from structcot.study.report_page import INTERVAL_NOTE, render_page
from structcot.study.report_plots import dose_panels, proxy_panels
from structcot.study.report_tables import heat_grid, outputs_of


def write_report(output_dir: Path, facts: dict[str, Any]) -> None:
    """Write report.html, report.md and figures/*.svg into `output_dir` from the facts of a study, each file in one piece.

    The same facts make the same bytes. A drawing that the facts do not carry is not written, and one of earlier facts is removed.

    Raises:
        OSError: if they cannot be written.
    """
    figures_dir = output_dir / "figures"
    figures_dir.mkdir(parents=True, exist_ok=True)
    listed = []
    for name, title, svg in _figures(facts):
        _write(figures_dir / f"{name}.svg", svg)
        listed.append((title, f"figures/{name}.svg"))
    for old in set(figures_dir.glob("*.svg")) - {output_dir / path for _, path in listed}:
        old.unlink()
    _write(output_dir / "report.md", render_markdown(facts, listed))
    _write(output_dir / "report.html", render_page(facts))


def _figures(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """Give a file name, a title and the SVG of every drawing."""
    taken: set[str] = set()
    task = headline_task(facts)
    settings = settings_in(in_order(facts), facts)
    for setting in settings:
        if rows := difference_rows(facts, setting, task):
            title = _title("Differences from the reference", setting, task)
            yield _name(taken, "differences", setting), title, svg_rows(title, INTERVAL_NOTE, rows)
    for setting in settings:
        for one in all_tasks(facts):
            if panels := dose_panels(facts, setting, one, "dose"):
                title = _title("Accuracy by how much is changed", setting, one)
                yield _name(taken, "dose", setting, one), title, svg_panels(title, panels)
    heads, rows = heat_grid(facts)
    if len(heads) > 1:
        title = "All differences from the reference"
        yield _name(taken, "heat"), title, svg_heat(title, facts, heads, rows)
    if rows := matched_rows(facts, task):
        title = _title("Structure less content at the same edit distance", "", task)
        yield _name(taken, "matched"), title, svg_rows(title, INTERVAL_NOTE, rows)
    for one in facts["tasks"]:
        if outputs_of(facts, one):
            title = _title("What the models write", "", one)
            yield _name(taken, "outputs", one), title, svg_outputs(title, facts, one)
    if panels := proxy_panels(facts, task):
        title = _title("Accuracy differences by loss", "", task)
        yield _name(taken, "losses"), title, svg_proxies(facts, task, title, panels)


def _title(what: str, setting: str, task: str) -> str:
    return f"{what}: {', '.join(filter(None, (setting, task)))}"


def _name(taken: set[str], *parts: str) -> str:
    """Make a file name of letters, digits and hyphens that no other drawing has."""
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, parts)).lower()).strip("-")[:60]
    number = 1
    unique = name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    taken.add(unique)
    return unique


def _write(path: Path, text: str) -> None:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, comes out as its escape.
    write_text(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))
