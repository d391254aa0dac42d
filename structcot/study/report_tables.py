"""The tables of a study as plain text, for the page and for Markdown alike: a cell is text, a dash where the facts have nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from structcot.eval.report_page import percent
from structcot.report_charts import number
from structcot.study.report_order import (
    MEAN,
    Facts,
    accuracy_text,
    all_tasks,
    difference_text,
    estimate_of,
    home_of,
    in_order,
    is_same_cell,
    kind_of,
    label_of,
    paper_cell,
    paper_rows,
    settings_in,
    settled,
)

NONE = "\u2013"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells of text: the first `num_names` columns are names, the last `num_paper` the paper's; `keys` are the variants of the rows."""

    label: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1
    num_paper: int = 0
    note: str = ""


def results_table(facts: Facts, task: str) -> Table:
    """The paper's Table 2 rebuilt for one task: a row for each variant that has an accuracy, and the paper's cell of its kind beside it."""
    variants = [variant for variant in in_order(facts) if estimate_of(variant, "accuracy", task)]
    has_forced = any(estimate_of(variant, "forced", task) for variant in variants)
    cells = [paper_cell(facts, variant, task) for variant in variants]
    paper = ("Accuracy, %", "Difference, points", "Verdict") if any(cells) else ()
    heads = ("Variant", "Accuracy, %", "Difference, points", "Verdict", *(("Forced, %",) if has_forced else ()), "Runs")
    rows = []
    for variant, cell in zip(variants, cells, strict=True):
        row = [label_of(variant, facts), accuracy_text(estimate_of(variant, "accuracy", task)), *_difference(variant, task)]
        row += [accuracy_text(estimate_of(variant, "forced", task))] if has_forced else []
        row += [NONE if variant["group"] == "base" else str(len(variant["seeds"]))]
        if paper and cell:
            row += [_percents(cell.accuracy, cell.interval), *_paper_difference(cell.difference, variant)]
        rows.append((*row, *[NONE] * (len(heads) + len(paper) - len(row))))
    note = (
        f"Brackets hold 95 % intervals. Differences are from {facts['reference']}; verdicts are corrected for the number of comparisons, "
        "so one whose interval just misses 0 may still be within noise."
    )
    if has_forced:
        note += " Forced: scored with the thought made to end where it did not."
    if paper:
        benchmark = next(cell.benchmark for cell in cells if cell)
        what = "the mean of its benchmarks" if benchmark == MEAN else benchmark
        note += f" The paper's columns are {what}: another model, one run, one greedy answer to a problem; verdicts are what those carry."
    return Table(label=f"Results: {task}", heads=(*heads, *paper), rows=tuple(rows), num_paper=len(paper), note=note)


def unmatched_paper_rows(facts: Facts) -> list[str]:
    """Name the rows of the paper that no variant of this study repeats."""
    return [row["name"] for row in paper_rows(facts) if not any(is_same_cell(row, variant) for variant in facts["variants"])]


def checks_table(facts: Facts, task: str) -> Table:
    """What the perturbations did to the training data, beside what they cost."""
    rows = []
    for variant in in_order(facts):
        facts_of = variant.get("manipulation")
        if not facts_of or all(value is None for value in facts_of.values()):
            continue
        values = (facts_of.get(name) for name in ("realised_fraction", "edit_distance", "changed_records"))
        realised, distance, changed = values
        rows.append(
            (
                label_of(variant, facts),
                *_difference(variant, task),
                NONE if variant["fraction"] is None else percent(variant["fraction"]),
                percent(realised),
                _decimals(distance, 2),
                _whole(changed),
                _change(facts_of, "tokens"),
                _change(facts_of, "keywords"),
                _decimals(facts_of.get("order_tau"), 2),
            )
        )
    heads = ("Variant", "Difference, points", "Verdict", "Asked, %", "Done, %", "Edit distance", "Records changed")
    note = (
        "Done: share of the digits or steps that changed. Edit distance: words inserted, deleted or replaced, per word. "
        "Order: Kendall's tau of the steps, 1 as before, 0 as at random. A verdict says little about a kind that was hardly done."
    )
    heads = (*heads, "Tokens", "Keywords", "Order")
    return Table(label="Manipulation checks", heads=heads, rows=tuple(rows), note=note if rows else "")


def outputs_table(facts: Facts, task: str) -> Table:
    """What the trained models write: how it ends, how long it is, how often it reflects."""
    rows = []
    for variant in outputs_of(facts, task):
        outputs = variant["outputs"][task]
        rows.append(
            (
                label_of(variant, facts),
                *(percent(outputs.get(name)) for name in ("finished", "truncated", "looping")),
                _whole(outputs.get("tokens_median")),
                _whole(outputs.get("tokens_mean")),
                _decimals(outputs.get("keywords"), 1),
                percent(outputs.get("first_reflects")),
            )
        )
    ends = ("Finished, %", "Cut off, %", "Looping, %")
    heads = ("Variant", *ends, "Tokens, median", "Tokens, mean", "Keywords", "Starts by reflecting, %")
    note = "Looping: cut off while repeating itself. Keywords: words of reflection in an output, in the mean."
    return Table(label=f"Outputs: {task}", heads=heads, rows=tuple(rows), note=note)


def outputs_of(facts: Facts, task: str) -> list[Facts]:
    """List the variants whose outputs on a task are described, in order."""
    return [variant for variant in in_order(facts) if estimate_of(variant, "outputs", task)]


def losses_table(facts: Facts, task: str) -> Table:
    """The losses that cost no sampling: of the reference model on a variant's data, and of a variant's model on the reference's."""
    rows = []
    for variant in in_order(facts):
        losses = variant.get("losses") or {}
        values = [losses.get(name) for name in ("reference_on_it", "it_on_reference")]
        if any(value is not None for value in values):
            rows.append((label_of(variant, facts), *_difference(variant, task), *(_decimals(value, 3) for value in values)))
    heads = ("Variant", "Difference, points", "Verdict", "Reference model on its data", "Its model on reference data")
    return Table(label="Losses", heads=heads, rows=tuple(rows), note="Mean loss per token on held-out demonstrations, in nats.")


def matched_table(facts: Facts) -> Table:
    """Structure less content at the same edit distance."""
    rows = [
        (
            f"{pair['structure']} less {pair['content']}",
            *((pair["setting"] or NONE,) if len(facts["settings"]) > 1 else ()),
            *((pair["task"],) if len(facts["tasks"]) > 1 else ()),
            _decimals(pair.get("edit_distance"), 2),
            difference_text(pair.get("difference")),
            settled(pair["difference"], pair.get("verdict")) if pair.get("difference") else NONE,
        )
        for pair in facts["matched"]
    ]
    names = (*(("Setting",) if len(facts["settings"]) > 1 else ()), *(("Task",) if len(facts["tasks"]) > 1 else ()))
    heads = ("Pair", *names, "Edit distance", "Difference, points", "Verdict of structure")
    return Table(label="Structure against content", heads=heads, rows=tuple(rows), num_names=1 + len(names))


def curves_table(curves: Sequence[Facts], label: str) -> Table:
    """The points of some curves: a row for each kind, a column for each fraction."""
    fractions = sorted({point["fraction"] for curve in curves for point in curve["points"]})
    has_trend = any(curve.get("trend") for curve in curves)
    rows = []
    for curve in curves:
        at = {point["fraction"]: point for point in curve["points"] if point.get("value") is not None}
        trend = (difference_text(curve.get("trend")),) if has_trend else ()
        rows.append((curve["kind"], curve["group"], *(accuracy_text(at.get(fraction)) for fraction in fractions), *trend))
    heads = ("Kind", "Group", *(f"{100 * fraction:g} %" for fraction in fractions), *(("Slope, points per 10 %",) if has_trend else ()))
    note = "Accuracy in per cent by how much was changed."
    return Table(label=label, heads=heads, rows=tuple(rows), num_names=2, note=note)


def trained_table(facts: Facts, task: str) -> Table:
    """What every variant was trained on, and how its runs came out one by one."""
    rows = []
    for variant in in_order(facts):
        trained = variant.get("trained")
        if trained:
            values = (_whole(trained.get(name)) for name in ("records", "tokens", "steps"))
            by_seed = (estimate_of(variant, "accuracy", task) or {}).get("by_seed") or ()
            each = ", ".join(percent(value) for value in by_seed) or NONE
            rows.append((label_of(variant, facts), *values, _decimals(trained.get("final_loss"), 3), each))
    return Table(label="Training", heads=("Variant", "Records", "Tokens", "Steps", "Last loss", "Accuracy by run, %"), rows=tuple(rows))


def missing_table(facts: Facts) -> Table:
    """Cells that failed or have not run."""
    rows = tuple((one["cell"], " ".join(str(one["error"]).split()) or "has not run") for one in facts["missing"])
    return Table(label="Missing cells", heads=("Cell", "Why"), rows=rows, num_names=2)


def heat_grid(facts: Facts) -> tuple[list[str], list[tuple[str, list[Facts | None]]]]:
    """Give heads and rows of the map of differences: a row for each variant but the reference, a column for each setting and task."""
    compared = [variant for variant in in_order(facts) if variant.get("difference")]
    columns = [(setting, task) for setting in settings_in(compared, facts) for task in compared_tasks(facts)]
    has_settings, has_tasks = len({setting for setting, _ in columns}) > 1, len({task for _, task in columns}) > 1
    parts = [((setting or "no setting",) if has_settings else ()) + ((task,) if has_tasks else ()) for setting, task in columns]
    cells = {
        (variant["name"], home_of(variant, facts), task): estimate_of(variant, "difference", task)
        for variant in compared
        for task in compared_tasks(facts)
    }
    names = dict.fromkeys(variant["name"] for variant in compared)
    rows = [(name, [cells.get((name, *column)) for column in columns]) for name in names]
    return [", ".join(part) for part in parts], rows


def setting_rows(facts: Facts) -> list[tuple[str, str]]:
    """List what the study is: names and values."""
    rows = [("model", facts["model"]), ("reference", facts["reference"]), ("budget", f"the same number of {facts['budget']}")]
    rows += [("seeds", ", ".join(map(str, facts["seeds"]))), ("tasks", ", ".join(facts["tasks"]))]
    return rows + ([("settings", ", ".join(facts["settings"]))] if len(facts["settings"]) > 1 else [])


def compared_tasks(facts: Facts) -> list[str]:
    """List the tasks on which some variant has a difference, the mean first."""
    return [task for task in all_tasks(facts) if any(estimate_of(variant, "difference", task) for variant in facts["variants"])]


def _difference(variant: Facts, task: str) -> tuple[str, str]:
    """A difference and its verdict."""
    if kind_of(variant) == "clean":
        return NONE, "reference"
    estimate = estimate_of(variant, "difference", task)
    return difference_text(estimate), settled(estimate) if estimate else NONE


def _paper_difference(difference: Facts | None, variant: Facts) -> tuple[str, str]:
    """The same of the paper, whose differences are in points already."""
    if kind_of(variant) == "clean":
        return NONE, "reference"
    if not difference or difference.get("value") is None:
        return NONE, NONE
    ends = difference.get("interval")
    shares = {"value": difference["value"] / 100, "interval": [end / 100 for end in ends] if ends else None}
    return difference_text(shares), settled(difference)


def _percents(value: float | None, interval: Iterable[float] | None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f} ({' to '.join(f'{end:.1f}' for end in interval)})" if interval else f"{value:.1f}"


def _change(facts: Facts, name: str) -> str:
    before, after = facts.get(f"{name}_before"), facts.get(f"{name}_after")
    return NONE if before is None and after is None else f"{_whole(before)} \u2192 {_whole(after)}"


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}" if value == int(value) or value >= 10 else number(value)


def _decimals(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
