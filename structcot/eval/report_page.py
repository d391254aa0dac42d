"""The report of an evaluation as a page of its own; what models wrote is shown as text and is nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from structcot.eval.endings import ENDINGS
from structcot.eval.golden import BENCHMARKS, BESIDE, GOLDEN, MATHS_BENCHMARKS, MODEL, PAPER, GoldenRow, golden_of
from structcot.eval.report_plots import Dot, draw_accuracies, draw_budgets, draw_lengths
from structcot.eval.report_samples import MAX_FAILURES, TaskSamples, failure_entry, failures_of, legend, matrix
from structcot.page import json_for_script, page_asset, page_head, safe_text

MAX_LENGTH_CHARTS = 12
AVERAGE = "mean of four"
# What summarise gives; everything else in the results says how they came about.
FACTS = ("samples", "tasks", "average", "warnings", "budget_tokens", "comparisons")
VERDICT_WORDS = {"no_answer": "no answer", "timeout": "grader timeout", "error": "grader error"}


def render_page(results: Mapping[str, Any], samples: Mapping[str, TaskSamples], title: str) -> str:
    """Lay out the whole page as text.

    `results` are the facts of `summarise`, with `comparisons` as a list of what `compare` gives, and any settings beside them.
    """
    tasks = results["tasks"]
    budgets = draw_budgets(results["budget_tokens"], {name: facts["budget_accuracy"] for name, facts in tasks.items()})
    listed = list(tasks.items())[:MAX_LENGTH_CHARTS]
    lengths = [draw_lengths(f"lengths-{index}", name, facts["tokens"]["histogram"]) for index, (name, facts) in enumerate(listed)]
    readouts = {chart.key: chart.readout for chart in [budgets, *lengths] if chart.readout["x"]}
    style, script = page_asset("report.css") + page_asset("eval/report.css"), page_asset("report.js")
    plots = f'<div class="charts">{draw_accuracies(_dots(results), [row.name for row in BESIDE])}{budgets.html}</div>'
    sections = [
        _section("summary", "Results", _summary(results)),
        _section("comparisons", "Comparisons", _comparisons(results.get("comparisons", ()))),
        _section("accuracy", "Accuracy", plots if tasks else ""),
        _section("several", "Several samples a problem", _several(tasks)),
        _section("groups", "Accuracy by group", _groups(tasks)),
        _section("endings", "How outputs end and how they are graded", _endings(tasks)),
        _section("lengths", "Lengths of outputs", f'<div class="charts">{"".join(chart.html for chart in lengths)}</div>' if tasks else ""),
        _section("failures", "Failures", _failures(samples)),
        _section("problems", "Problems", _problems(samples)),
        _section("paper", "The paper's numbers", _paper()),
        _section("settings", "Settings", _settings(results)),
    ]
    data = json_for_script(readouts)
    return (
        page_head(f"{title} - structcot evaluation", style, script)
        + f"<body><header><h1>{safe_text(title)}</h1></header><main>\n"
        + "\n".join(filter(None, sections))
        + f'\n</main><script type="application/json" id="chart-data">{data}</script><script>{script}</script></body></html>\n'
    )


def percent(share: float | None) -> str:
    """Write a share as per cent without the sign: "56.7"; a dash where there is none."""
    return "\u2013" if share is None else f"{100 * share:.1f}"


def interval_text(interval: Sequence[float]) -> str:
    """Write an interval of shares as per cent: "39.2 to 72.6"."""
    return f"{percent(interval[0])} to {percent(interval[1])}"


def median_tokens(facts: Mapping[str, Any]) -> str:
    """Write the median length of the outputs of a task; a dash where none was begun."""
    lengths = facts["tokens"]["all"]
    return f"{lengths['median']:,.0f}" if lengths else "\u2013"


def points(share: float) -> str:
    """Write a difference of shares in points of per cent, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def comparison_lines(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say how two models compare: for each task, and for the mean of mathematics, a verdict and what it rests on."""
    for task, facts in one["tasks"].items():
        low, high = map(points, facts["interval"])
        accuracies = f"{percent(facts['accuracy_a'])} against {percent(facts['accuracy_b'])}"
        split = f"{one['a']} does better on {facts['only_a']:,} of {facts['problems']:,} problems and worse on {facts['only_b']:,}"
        yield (
            f"{task}: {facts['verdict']}",
            f"{accuracies}, {points(facts['difference'])} points ({low} to {high}); {split}; by {facts['test']}",
        )
    if one["average"]:
        low, high = map(points, one["average"]["interval"])
        yield f"{AVERAGE}: {one['average']['verdict']}", f"{points(one['average']['difference'])} points ({low} to {high})"


def golden_cell(row: GoldenRow, task: str) -> str:
    """Write a value of the paper; one that it only draws is marked as approximate."""
    value = row.value(task)
    return "\u2013" if value is None else f"\u2248\u2009{value:.1f}" if task in row.drawn else f"{value:.1f}"


def golden_average(row: GoldenRow) -> str:
    """Write the mean of a row of the paper over mathematics; 54.15, which no binary fraction is, is rounded up as on paper."""
    return "\u2013" if row.average is None else f"{row.average + 1e-9:.1f}"


def settings_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List how the results came about, as names and values."""
    return list(_flatten({name: value for name, value in results.items() if name not in FACTS}))


def _summary(results: Mapping[str, Any]) -> str:
    warnings = "".join(f"<li>{safe_text(warning)}</li>" for warning in results["warnings"])
    notes = f'<ul class="notes">{warnings}</ul>' if warnings else ""
    if not results["tasks"]:
        return f'{notes}<p class="empty">There are no samples yet.</p>'
    has_golden = any(golden_of(name) for name in results["tasks"])
    rows = [_summary_row(name, facts, has_golden) for name, facts in results["tasks"].items()]
    rows += [_average_row(results["average"], has_golden)] if results["average"] else []
    heads = ["Task", "Accuracy, %", "95 % interval", "Problems", "Tokens", "Finished, %"]
    paper = [f"{row.name}" for row in BESIDE] if has_golden else []
    over = (
        f'<tr><td colspan="{len(heads)}"></td><th colspan="3" scope="colgroup" class="paper">The paper: {MODEL}, %</th></tr>'
        if paper
        else ""
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    head += "".join(f'<th scope="col" class="paper">{safe_text(text)}</th>' for text in paper)
    note = "Intervals are over problems: Wilson's, at the effective number of samples. Tokens are the median of an output."
    note += f" The {AVERAGE} is the unweighted one of {', '.join(MATHS_BENCHMARKS)}." if results["average"] else ""
    note += f" The paper's columns are other models, from {PAPER}: one greedy answer a problem, its own grader." if paper else ""
    table = f'<table class="results"><thead>{over}<tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'{notes}{_scroll("Results by task", table)}<p class="note">{note}</p>'


def _summary_row(name: str, facts: Mapping[str, Any], has_golden: bool) -> str:
    per_problem = facts["samples_per_problem"]
    times = f" \u00d7 {per_problem['most']:,}" if per_problem["most"] > 1 else ""
    cells = [
        f"<strong>{percent(facts['accuracy'])}</strong>",
        interval_text(facts["interval"]),
        f"{facts['problems']:,}{times}",
        median_tokens(facts),
        percent(facts["endings"]["finished"]["share"]),
    ]
    paper = "".join(f'<td class="paper">{golden_cell(row, name)}</td>' for row in BESIDE) if has_golden else ""
    return f'<tr><th scope="row">{safe_text(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}{paper}</tr>'


def _average_row(average: Mapping[str, Any], has_golden: bool) -> str:
    """The paper's "Avg.": the unweighted mean of its four benchmarks of mathematics."""
    cells = [
        f"<strong>{percent(average['accuracy'])}</strong>",
        interval_text(average["interval"]),
        "",
        "",
        "",
    ]
    values = [golden_average(row) for row in BESIDE] if has_golden else []
    row = "".join(f"<td>{cell}</td>" for cell in cells) + "".join(f'<td class="paper">{value}</td>' for value in values)
    return f'<tr class="average"><th scope="row">{AVERAGE}</th>{row}</tr>'


def _dots(results: Mapping[str, Any]) -> list[Dot]:
    dots = [
        Dot(name=name, accuracy=facts["accuracy"], interval=facts["interval"], golden=golden_of(name))
        for name, facts in results["tasks"].items()
    ]
    if results["average"]:
        golden = {row.name: row.average for row in BESIDE if row.average is not None}
        dots.append(Dot(name=AVERAGE, accuracy=results["average"]["accuracy"], interval=results["average"]["interval"], golden=golden))
    return dots


def _comparisons(comparisons: Iterable[Mapping[str, Any]]) -> str:
    blocks = []
    for one in comparisons:
        lines = [f"<li><b>{safe_text(verdict)}</b>: {safe_text(ground)}.</li>" for verdict, ground in comparison_lines(one)]
        items = "".join(lines) or "<li>They have no problem in common.</li>"
        blocks.append(f"<h3>{safe_text(one['a'])} against {safe_text(one['b'])}</h3><ul>{items}</ul>")
    note = "Both were given the same problems; intervals are 95 %. Of 20 comparisons of equally good models about one has p &lt; 0.05."
    return "".join(blocks) + f'<p class="note">{note}</p>' if blocks else ""


def _several(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What several samples of a problem are good for: one right among k of them, and a vote."""
    several = {name: facts for name, facts in tasks.items() if facts["samples_per_problem"]["most"] > 1}
    ks = sorted({int(k) for facts in several.values() for k in facts["pass_at_k"]})
    rows = [
        (safe_text(name), *(percent(facts["pass_at_k"].get(str(k))) for k in ks), percent(facts["majority_vote"]))
        for name, facts in several.items()
    ]
    return _table("Several samples", ("Task", *(f"pass@{k}, %" for k in ks), "majority vote, %"), rows, 1) if rows else ""


def _groups(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            safe_text(name),
            safe_text(group) or "<i>none</i>",
            percent(one["accuracy"]),
            interval_text(one["interval"]),
            f"{one['problems']:,}",
        )
        for name, facts in tasks.items()
        for group, one in facts["groups"].items()
    ]
    return _table("Accuracy by group", ("Task", "Group", "Accuracy, %", "95 % interval", "Problems"), rows, 2) if rows else ""


def _endings(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Two tables: what became of the outputs, with the accuracy in each case, and what the graders said."""
    if not tasks:
        return ""
    rows, verdicts = [], []
    for name, facts in tasks.items():
        widths = "".join(f'<i class="{ending}" style="width:{100 * facts["endings"][ending]["share"]:.4g}%"></i>' for ending in ENDINGS)
        cells = [_ending_cell(facts["endings"][ending]) for ending in ENDINGS]
        rows.append((safe_text(name), f'<span class="stack" aria-hidden="true">{widths}</span>', *cells))
        paper = facts["paper_grader_accuracy"]
        verdicts.append((safe_text(name), *(f"{count:,}" for count in facts["verdicts"].values()), percent(paper)))
    heads = ("Task", "", *(f'<i class="square {ending}"></i>{ending}' for ending in ENDINGS))
    words = [str(VERDICT_WORDS.get(verdict, verdict)) for verdict in next(iter(tasks.values()))["verdicts"]]
    return (
        _table("Endings", heads, rows, 2)
        + '<p class="note">Share of the outputs, and of them the share that is right, in per cent.</p>'
        + _table("Verdicts", ("Task", *words, "right by the paper's grader, %"), verdicts, 1)
    )


def _ending_cell(ending: Mapping[str, Any]) -> str:
    if not ending["samples"]:
        return "\u2013"
    return f"{percent(ending['share'])} <small>({percent(ending['accuracy'])} right)</small>"


def _failures(samples: Mapping[str, TaskSamples]) -> str:
    blocks, left = [], MAX_FAILURES
    for name, task in samples.items():
        shown = failures_of(task)[:left]
        left -= len(shown)
        total = task.counts.total() - task.counts["right"]
        if shown:
            is_open = " open" if task.counts["error"] or task.counts["timeout"] else ""
            summary = f"<summary><b>{safe_text(name)}</b>: {len(shown):,} of {total:,} outputs that are not right</summary>"
            blocks.append(f'<details class="failures"{is_open}>{summary}{"".join(map(failure_entry, shown))}</details>')
    return "".join(blocks)


def _problems(samples: Mapping[str, TaskSamples]) -> str:
    return "".join(f"<h3>{safe_text(name)}</h3>{legend(task)}{matrix(task)}" for name, task in samples.items())


def _paper() -> str:
    rows = [(safe_text(row.name), *(golden_cell(row, task) for task in BENCHMARKS), golden_average(row), row.place) for row in GOLDEN]
    table = _table("The paper's numbers", ("Model", *BENCHMARKS, AVERAGE, "from"), rows, 1)
    note = (
        f"Per cent, from {PAPER}; all but the teacher are {MODEL}. \u2248 marks what it draws and does not print. The means are computed."
    )
    return f'{table}<p class="note">{note}</p>'


def _settings(results: Mapping[str, Any]) -> str:
    rows = "".join(f'<tr><th scope="row">{safe_text(name)}</th><td>{safe_text(value)}</td></tr>' for name, value in settings_of(results))
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], num_names: int) -> str:
    """Write a table of cells that are markup already; the first `num_names` columns are names and the rest numbers."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in map(list, rows)
    )
    return _scroll(label, f'<table class="results names-{num_names}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def _scroll(label: str, table: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _section(key: str, title: str, body: str) -> str:
    """Wrap a section; nothing where it has no body."""
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>' if body else ""
