"""How the facts of a study are read: the order of variants, the task that speaks for all, what an interval carries, the paper's cell.

A variant is one entry of `facts["variants"]`: training data under one setting. Shares lie between 0 and 1; the paper's numbers are per
cent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structcot.eval.report_page import interval_text, percent, points
from structcot.study.statistics import BETTER, NOISE, WORSE

# The order of the paper's Table 2.
KINDS = ("base", "clean", "wrong-answer", "digits", "keywords", "shuffle", "delete", "insert")
MEAN = "mean"
# Fractions that are meant to be the same: 67 % and two thirds.
SAME_FRACTION = 0.005

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperCell:
    """What the paper has for a variant: per cent, and points less its own reference; `benchmark` is "mean" for the mean of its four."""

    benchmark: str
    accuracy: float
    interval: Sequence[float] | None
    difference: Facts | None


def headline_task(facts: Facts) -> str:
    """Name the task that speaks for all: the mean where there are several, else the only one; "" where there is none."""
    tasks = facts["tasks"]
    return MEAN if len(tasks) > 1 else tasks[0] if tasks else ""


def all_tasks(facts: Facts) -> list[str]:
    """List the mean, where there is one, and every task."""
    return [MEAN, *facts["tasks"]] if len(facts["tasks"]) > 1 else list(facts["tasks"])


def in_order(facts: Facts) -> list[Facts]:
    """Sort the variants by setting, then as the paper's table: base, reference, kind by kind, fractions upwards, the rest."""
    settings = list(facts["settings"])

    def place(variant: Facts) -> tuple[int, int, float, str]:
        kind = kind_of(variant)
        setting = settings.index(home_of(variant, facts)) if home_of(variant, facts) in settings else -1
        return setting, KINDS.index(kind) if kind in KINDS else len(KINDS), variant["fraction"] or 0.0, variant["name"]

    return sorted(facts["variants"], key=place)


def home_of(variant: Facts, facts: Facts) -> str:
    """Name the setting in which a variant is compared: its own, and the first for a base that belongs to none."""
    is_homeless = variant["group"] == "base" and variant["setting"] not in facts["settings"]
    return facts["settings"][0] if is_homeless else variant["setting"]


def settings_in(variants: Iterable[Facts], facts: Facts) -> list[str]:
    """List the settings in which some variants are compared, each once, in the order of the variants."""
    return list(dict.fromkeys(home_of(variant, facts) for variant in variants))


def kind_of(variant: Facts) -> str:
    """Give the kind of a variant; that of the reference is "clean" whatever it is called."""
    if variant["group"] == "base":
        return "base"
    return "clean" if variant["group"] == "reference" else variant["kind"]


def label_of(variant: Facts, facts: Facts) -> str:
    """Name a variant so that no other has the name: with its setting where there are several."""
    return f"{variant['name']} ({variant['setting']})" if len(facts["settings"]) > 1 and variant["setting"] else variant["name"]


def estimate_of(variant: Facts, what: str, task: str) -> Facts | None:
    """Give the estimate of "accuracy", "forced", "difference", "forced_difference" or "outputs" of a task; None where it is not there."""
    estimate = (variant.get(what) or {}).get(task)
    return estimate if estimate is not None and (what == "outputs" or estimate.get("value") is not None) else None


def reference_of(facts: Facts, setting: str) -> Facts | None:
    """Give the variant that those of a setting are compared with; None where it has not finished."""
    return next((one for one in facts["variants"] if one["group"] == "reference" and one["setting"] == setting), None)


def settled(estimate: Facts, verdict: str | None = None) -> str:
    """Say what a difference carries: "worse" or "better" where its interval excludes 0 and its verdict, if it has one, agrees.

    An interval alone is not enough: among many comparisons the adjusted verdict may be "within noise" all the same.
    """
    interval = estimate.get("interval")
    if not interval:
        return NOISE
    sign = WORSE if interval[1] < 0 else BETTER if interval[0] > 0 else NOISE
    given = verdict or estimate.get("verdict")
    return sign if given in (None, sign) else NOISE


def paper_rows(facts: Facts) -> Sequence[Facts]:
    """Give the rows of the paper's table, if the facts have them."""
    return (facts.get("paper") or {}).get("rows", ())


def is_same_cell(row: Facts, variant: Facts) -> bool:
    """Whether a row of the paper has the kind and the fraction of a variant; base and reference have no fraction."""
    kind = kind_of(variant)
    is_same_fraction = abs((row["fraction"] or 0) - (variant["fraction"] or 0)) <= SAME_FRACTION
    return row["kind"] == kind and (kind in ("base", "clean") or is_same_fraction)


def paper_cell(facts: Facts, variant: Facts, task: str) -> PaperCell | None:
    """Find the paper's cell of the same kind and fraction: of the benchmark `task` where it has it, else its mean."""
    for row in paper_rows(facts):
        if is_same_cell(row, variant):
            has_task = row["accuracy"].get(task) is not None
            accuracy = row["accuracy"][task] if has_task else row["mean"]
            difference = (row["difference"] or {}).get(task if has_task else MEAN)
            interval = None if has_task else row["interval"]
            return PaperCell(benchmark=task if has_task else MEAN, accuracy=accuracy, interval=interval, difference=difference)
    return None


def accuracy_text(estimate: Facts | None) -> str:
    """Write an accuracy with its interval: "41.0 (35.6 to 46.7)"; a dash where there is none."""
    if estimate is None:
        return "\u2013"
    interval = estimate.get("interval")
    return f"{percent(estimate['value'])} ({interval_text(interval)})" if interval else percent(estimate["value"])


def difference_text(estimate: Facts | None) -> str:
    """Write a difference in points with its interval: "\u221212.3 (\u221218.0 to \u22126.5)"; a dash where there is none."""
    if estimate is None:
        return "\u2013"
    interval = estimate.get("interval")
    return f"{points(estimate['value'])} ({' to '.join(map(points, interval))})" if interval else points(estimate["value"])
