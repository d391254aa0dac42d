"""The results of an evaluation as files: results.json for programs, report.md to paste, report.html to look into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from structcot.eval.golden import BESIDE, MODEL, PAPER, golden_of
from structcot.eval.report_page import (
    AVERAGE,
    comparison_lines,
    golden_average,
    golden_cell,
    interval_text,
    median_tokens,
    percent,
    render_page,
    settings_of,
)
from structcot.eval.report_samples import collect
from structcot.files import write_text


def write_reports(
    output_dir: Path,
    results: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]] = (),
    title: str = "",
) -> None:
    """Write results.json, report.md and report.html into `output_dir`, each in one piece.

    `results` are the facts of `structcot.eval.summary.summarise` and any settings beside them; `comparisons` are from `compare`; `samples`
    are the records again, read once and as they come. `title` is the name of what was evaluated, else that of the directory.

    Raises:
        OSError: if they cannot be written.
    """
    facts = {**results, "comparisons": list(comparisons)}
    title = title or output_dir.resolve().name
    _write(output_dir / "results.json", json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(output_dir / "report.md", render_markdown(facts, title))
    _write(output_dir / "report.html", render_page(facts, collect(samples), title))


def render_markdown(results: Mapping[str, Any], title: str) -> str:
    """Write the numbers of the report as Markdown: warnings, a table of the tasks, groups, comparisons, settings."""
    lines = [f"# {_plain(title)}", "", *(f"- **Warning:** {_plain(warning)}" for warning in results["warnings"])]
    lines += [""] if results["warnings"] else []
    lines += list(_task_table(results))
    for name, facts in results["tasks"].items():
        if facts["groups"]:
            split = ", ".join(
                f"{_plain(group)} {percent(one['accuracy'])} (of {one['problems']:,})" for group, one in facts["groups"].items()
            )
            lines += [f"- {_plain(name)} by group: {split}"]
    for one in results.get("comparisons", ()):
        lines += ["", f"## {_plain(one['a'])} against {_plain(one['b'])}", ""]
        lines += [f"- **{_plain(verdict)}**: {_plain(ground)}." for verdict, ground in comparison_lines(one)]
    settings = settings_of(results)
    lines += ["", "## Settings", "", *(f"- {_plain(name)}: {_plain(value)}" for name, value in settings)] if settings else []
    return "\n".join(lines) + "\n"


def _task_table(results: Mapping[str, Any]) -> Iterator[str]:
    """One row for each task, with the paper's values in columns of their own where it has any."""
    paper = BESIDE if any(golden_of(name) for name in results["tasks"]) else ()
    heads = ["Task", "Accuracy, %", "95 % interval", "Problems", "Samples", "pass@k, %", "Median tokens", "Finished, %"]
    heads += [f"Paper: {row.name}" for row in paper]
    yield _row(heads)
    yield _row(["---", *["---:"] * (len(heads) - 1)])
    for name, facts in results["tasks"].items():
        passes = ", ".join(f"{k}: {percent(value)}" for k, value in list(facts["pass_at_k"].items())[1:])
        numbers = [percent(facts["accuracy"]), interval_text(facts["interval"]), f"{facts['problems']:,}", f"{facts['samples']:,}", passes]
        numbers += [median_tokens(facts), percent(facts["endings"]["finished"]["share"])]
        yield _row([_plain(name), *numbers, *(golden_cell(row, name) for row in paper)])
    if results["average"]:
        values = [golden_average(row) for row in paper]
        average = [percent(results["average"]["accuracy"]), interval_text(results["average"]["interval"])]
        yield _row([AVERAGE, *average, *[""] * 5, *values])
    yield ""
    if paper:
        yield f"The paper's columns are {MODEL} in {PAPER}: other models, one greedy answer a problem, its own grader."
        yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Keep a name from ending a cell or a line, or from becoming markup."""
    line = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "|*_`[]<>\\#" else sign for sign in line)


def _write(path: Path, text: str) -> None:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, comes out as its escape.
    write_text(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))
