"""The manipulation report: what a perturbation really did, summed over a data set of any size in memory that stays small."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from structcot.perturb.apply import Outcome, Stage
from structcot.perturb.change import kendall_tau
from structcot.perturb.edit import FOREIGN

# Histograms: name, lower edge, width and number of bins; what lies outside falls into the first or the last.
HISTOGRAMS = {
    "realised_fraction": (0.0, 0.05, 20),
    "steps_moved": (0.0, 0.05, 20),
    "kendall_tau": (-1.0, 0.1, 20),
    "tokens_after_per_token_before": (0.0, 0.1, 20),
    "edit_distance_per_word": (0.0, 0.05, 20),
    "keywords_left": (0.0, 0.05, 20),
}
STAGE_SUMS = ("units", "chosen", "changed", "steps_before", "steps_after", "steps_foreign", "steps_moved")
CHANGE_SUMS = (
    "tokens_before",
    "tokens_after",
    "words_before",
    "words_after",
    "edit_distance",
    "keywords_before",
    "keywords_after",
    "had_answer",
    "answer_kept",
)


@dataclass(kw_only=True)
class Report:
    """Sums over records; those of several parts of a data set add up by `merge`."""

    records: int = 0
    changed: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    stages: list[Counter[str]] = field(default_factory=list)
    not_applied: list[Counter[str]] = field(default_factory=list)
    histograms: dict[str, Counter[int]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> dict[str, Any]:
        """Count one record, and give what there is to say about it as a line of the file of records."""
        facts = record_facts(outcome)
        self.records += 1
        self.changed += outcome.record is not None
        if outcome.reason:
            (self.left_out if outcome.is_left_out else self.unusable)[outcome.reason] += 1
        if outcome.change is not None:
            values = asdict(outcome.change)
            self.sums.update({name: int(values[name]) for name in CHANGE_SUMS if name != "answer_kept"})
            self.sums["answer_kept"] += outcome.change.had_answer and outcome.change.answer_kept
        for index, stage in enumerate(outcome.stages):
            self._add_stage(index, stage)
        for name in HISTOGRAMS:
            self._draw(name, name, facts.get(name))
        return facts

    def merge(self, other: Report) -> None:
        """Add the sums of another part."""
        self.records += other.records
        self.changed += other.changed
        self.left_out.update(other.left_out)
        self.unusable.update(other.unusable)
        self.sums.update(other.sums)
        self._reach(len(other.stages))
        for index in range(len(other.stages)):
            self.stages[index].update(other.stages[index])
            self.not_applied[index].update(other.not_applied[index])
        for name, counts in other.histograms.items():
            self.histograms.setdefault(name, Counter()).update(counts)

    def facts(self) -> dict[str, Any]:
        """All sums, shares and histograms, ready for JSON."""
        sums = {name: self.sums[name] for name in CHANGE_SUMS}
        return {
            "records": self.records,
            "changed": self.changed,
            "unchanged": self.records - self.changed - self.left_out.total(),
            "left_out": dict(sorted(self.left_out.items())),
            "unusable": dict(sorted(self.unusable.items())),
            **sums,
            "tokens_after_per_token_before": share(sums["tokens_after"], sums["tokens_before"]),
            "edit_distance_per_word": share(sums["edit_distance"], max(sums["words_before"], sums["words_after"])),
            "keywords_left": share(sums["keywords_after"], sums["keywords_before"]),
            "answers_kept": share(sums["answer_kept"], sums["had_answer"]),
            "stages": [self._stage_facts(index) for index in range(len(self.stages))],
            "histograms": {name: self._histogram(name, name) for name in HISTOGRAMS if name in self.histograms},
        }

    def _add_stage(self, index: int, stage: Stage) -> None:
        self._reach(index + 1)
        if stage.reason:
            self.not_applied[index][stage.reason] += 1
        counts = self.stages[index]
        counts.update({"units": stage.units, "chosen": stage.chosen, "changed": stage.changed, "records": stage.chosen > 0})
        counts["able"] += not stage.reason
        self._draw(f"realised_fraction {index}", "realised_fraction", share(stage.changed, stage.units))
        if stage.order is not None:
            moved, foreign = steps_moved(stage.order), sum(step == FOREIGN for step in stage.order)
            counts.update(
                {"steps_before": stage.num_steps, "steps_after": len(stage.order), "steps_foreign": foreign, "steps_moved": moved}
            )
            tau = kendall_tau(stage.order)
            if tau is not None:
                # Whole millionths add up to the same sum in any order.
                counts.update({"tau_millionths": round(tau * 1e6), "taus": 1})

    def _stage_facts(self, index: int) -> dict[str, Any]:
        counts = self.stages[index]
        return {
            "records_changed": counts["records"],
            "record_fraction": share(counts["records"], counts["able"]),
            **{name: counts[name] for name in STAGE_SUMS},
            "realised_fraction": share(counts["changed"], counts["units"]),
            "chosen_fraction": share(counts["chosen"], counts["units"]),
            "kendall_tau": counts["tau_millionths"] / 1e6 / counts["taus"] if counts["taus"] else None,
            "not_applied": dict(sorted(self.not_applied[index].items())),
            "histogram": self._histogram("realised_fraction", f"realised_fraction {index}"),
        }

    def _draw(self, key: str, name: str, value: float | None) -> None:
        """Put a value into the bins of `name`, kept under `key`."""
        if value is not None:
            self.histograms.setdefault(key, Counter())[_bin(name, value)] += 1

    def _histogram(self, name: str, key: str) -> dict[str, Any]:
        low, width, bins = HISTOGRAMS[name]
        counts = self.histograms.get(key, Counter())
        return {"edges": [round(low + width * index, 6) for index in range(bins + 1)], "counts": [counts[index] for index in range(bins)]}

    def _reach(self, num_stages: int) -> None:
        while len(self.stages) < num_stages:
            self.stages.append(Counter())
            self.not_applied.append(Counter())


def record_facts(outcome: Outcome) -> dict[str, Any]:
    """What became of one record: a line of the file of records. A measure that has no meaning for it is None."""
    facts: dict[str, Any] = {"source": outcome.source, "changed": outcome.record is not None}
    if outcome.reason:
        return {**facts, "left_out": outcome.is_left_out, "reason": outcome.reason}
    reasons = [f"{stage.kind}: {stage.reason}" for stage in outcome.stages if stage.reason]
    orders = [stage.order for stage in outcome.stages if stage.order is not None]
    change = outcome.change
    if reasons:
        facts["reason"] = "; ".join(reasons)
    facts["stages"] = [
        {"kind": stage.kind, "units": stage.units, "chosen": stage.chosen, "changed": stage.changed} for stage in outcome.stages
    ]
    # Of a chain, the last perturbation that touched the steps speaks of their order; most chains have one.
    facts["kendall_tau"] = kendall_tau(orders[-1]) if orders else None
    facts["steps_moved"] = share(steps_moved(orders[-1]), len(orders[-1])) if orders else None
    if change is not None:
        facts |= asdict(change) | {
            "tokens_after_per_token_before": share(change.tokens_after, change.tokens_before),
            "edit_distance_per_word": share(change.edit_distance, max(change.words_before, change.words_after)),
            "keywords_left": share(change.keywords_after, change.keywords_before),
        }
    return facts


def steps_moved(order: Sequence[int]) -> int:
    """How many of the steps that are still there stand at another rank among them than before."""
    still = [step for step in order if step != FOREIGN]
    return sum(step != ranked for step, ranked in zip(still, sorted(still), strict=True))


def share(part: float, whole: float) -> float | None:
    """A share, rounded to what is meant; None of nothing."""
    return round(part / whole, 6) if whole else None


def json_lines(facts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Facts of records as lines of JSON."""
    return (json.dumps(one, ensure_ascii=True) + "\n" for one in facts)


def _bin(name: str, value: float) -> int:
    low, width, bins = HISTOGRAMS[name]
    # The edges are decimal fractions, the quotient is not: 0.15 / 0.05 is a hair below 3.
    return min(bins - 1, max(0, math.floor((value - low) / width + 1e-9)))
