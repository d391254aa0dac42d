"""The metrics of a whole data set in bounded memory, added up a trace at a time and merged across processes.

All that is kept are whole numbers: counts, sums in millionths, and histograms with fixed bins. So the facts do not depend on the order of
the traces, nor on how they were spread over processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from structcot.structure.markers import STEP_TYPES

_MICRO = 1_000_000
# One bin for each of the numbers below 64, and beyond that 32 bins from each number to its double, up to 2^30: 2.2 % wide.
COUNT_EDGES = tuple(range(64)) + tuple(sorted({round(2 ** (6 + step / 32)) for step in range(24 * 32 + 1)}))
DENSITY_EDGES = tuple(step / 10 for step in range(1001))
SHARE_EDGES = tuple(step / 100 for step in range(101))
# What a histogram of the facts shows of those bins.
_SHOWN = {
    COUNT_EDGES: (0, 1, *(2**power for power in range(1, 31))),
    DENSITY_EDGES: (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    SHARE_EDGES: tuple(step / 10 for step in range(11)),
}
DISTRIBUTIONS = {
    "steps": COUNT_EDGES,
    "characters": COUNT_EDGES,
    "words": COUNT_EDGES,
    "backtrack_density": DENSITY_EDGES,
    "verification_density": DENSITY_EDGES,
    "loop_rate": SHARE_EDGES,
    "failed_step_share": SHARE_EDGES,
    "failed_character_share": SHARE_EDGES,
    "branches": COUNT_EDGES,
    "branching_depth": COUNT_EDGES,
}
FLAGS = ("is_finished", "has_answer", "is_looping", "first_step_is_reflection")
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class Distribution:
    """Values of one kind, not negative, in bins: bin i holds edges[i] <= value < edges[i + 1], the last bin also all that is larger."""

    def __init__(self, edges: Sequence[float]):
        self.edges = tuple(edges)
        self.bins: Counter[int] = Counter()
        self.micros = 0
        self.lowest = self.highest = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        is_first = not self.bins
        self.lowest = value if is_first else min(self.lowest, value)
        self.highest = value if is_first else max(self.highest, value)
        self.bins[min(bisect_right(self.edges, value), len(self.edges) - 1) - 1] += 1
        self.micros += round(value * _MICRO)

    def merge(self, other: Distribution) -> None:
        """Count all that `other` counted, which has the same edges."""
        if other.bins:
            is_first = not self.bins
            self.lowest = other.lowest if is_first else min(self.lowest, other.lowest)
            self.highest = other.highest if is_first else max(self.highest, other.highest)
            self.bins.update(other.bins)
            self.micros += other.micros

    def quantile(self, share: float) -> float:
        """Estimate the value that `share` of the values do not exceed, to within a bin: exact for whole numbers in bins of 1."""
        rank, passed = share * self.bins.total(), 0
        for index in sorted(self.bins):
            count = self.bins[index]
            low, high = self.edges[index], self.edges[index + 1]
            if passed + count >= rank:
                is_exact = isinstance(low, int) and high - low == 1
                value = low if is_exact else low + (high - low) * (rank - passed) / count
                return min(max(value, self.lowest), self.highest)
            passed += count
        return 0.0

    def facts(self) -> dict[str, Any]:
        """Give count, mean, extremes, quantiles and a histogram of wider bins, from the first that holds something to the last."""
        count = self.bins.total()
        quantiles = {name: self.quantile(share) for name, share in QUANTILES.items()}
        return {
            "count": count,
            "mean": self.micros / _MICRO / count if count else 0.0,
            "min": self.lowest,
            **quantiles,
            "max": self.highest,
            "histogram": self._histogram(),
        }

    def _histogram(self) -> dict[str, list[float]]:
        edges = _SHOWN[self.edges]
        counts = [0] * (len(edges) - 1)
        for index, count in self.bins.items():
            counts[bisect_right(edges, self.edges[index]) - 1] += count
        filled = [place for place, count in enumerate(counts) if count] or [0]
        first, last = filled[0], filled[-1]
        return {"edges": list(edges[first : last + 2]), "counts": list(counts[first : last + 1])}


class Summary:
    """The summed metrics of traces, each as `measure` gives them.

    A trace may bring `agreement`, {pair of segmenters: the facts of an `Agreement`}, to be averaged over the traces that have it.
    """

    def __init__(self) -> None:
        self.distributions = {name: Distribution(edges) for name, edges in DISTRIBUTIONS.items()}
        self.totals: Counter[str] = Counter()
        self.step_types: Counter[str] = Counter()
        self.transitions: Counter[str] = Counter()
        self.keywords: Counter[str] = Counter()
        self.paper_keywords: Counter[str] = Counter()
        self.defects: Counter[str] = Counter()
        self.agreement: dict[str, Counter[str]] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Count one trace."""
        for name, distribution in self.distributions.items():
            distribution.add(metrics[name])
        dangling = metrics["dangling_references"]["count"]
        self.totals.update({name: int(metrics[name]) for name in (*FLAGS, "words", "steps", "characters")})
        self.totals.update({"traces": 1, "dangling_references": dangling, "has_dangling_references": int(dangling > 0)})
        self.step_types.update(metrics["step_types"])
        self.transitions.update(metrics["transitions"])
        self.keywords.update(metrics["keywords"])
        self.paper_keywords.update(metrics["paper_keywords"])
        if metrics["tags"]:
            self.defects[metrics["tags"]] += 1
        for pair, facts in metrics.get("agreement", {}).items():
            sums = self.agreement.setdefault(pair, Counter())
            sums.update({name: round(value * _MICRO) for name, value in facts.items()})
            sums["traces"] += 1

    def merge(self, other: Summary) -> None:
        """Count all that `other` counted; `other` stays as it is."""
        for name, distribution in self.distributions.items():
            distribution.merge(other.distributions[name])
        self.totals.update(other.totals)
        self.step_types.update(other.step_types)
        self.transitions.update(other.transitions)
        self.keywords.update(other.keywords)
        self.paper_keywords.update(other.paper_keywords)
        self.defects.update(other.defects)
        for pair, sums in other.agreement.items():
            self.agreement.setdefault(pair, Counter()).update(sums)

    def facts(self) -> dict[str, Any]:
        """Give everything by name, ready for JSON, the same for the same traces in any order.

        Under `transitions`, each type that something follows has a row: the share of every type among what follows it, which sum to 1.
        Means are over traces; what is "per 1,000 words" is over all words.
        """
        traces, words = self.totals["traces"], self.totals["words"]
        return {
            "traces": traces,
            "shares": {
                name.removeprefix("is_").removeprefix("has_"): self.totals[name] / traces if traces else 0.0
                for name in (*FLAGS, "has_dangling_references")
            },
            "totals": {name: self.totals[name] for name in ("steps", "characters", "words", "dangling_references")},
            "step_types": {kind: self.step_types[kind] for kind in STEP_TYPES},
            "transitions": self._transition_rows(),
            "transition_counts": dict(sorted(self.transitions.items())),
            "keywords": _per_thousand(self.keywords, words),
            "paper_keywords": _per_thousand(self.paper_keywords, words),
            "distributions": {name: distribution.facts() for name, distribution in self.distributions.items()},
            "defects": dict(sorted(self.defects.items(), key=lambda item: (-item[1], item[0]))),
            "agreement": {pair: _averages(self.agreement[pair]) for pair in sorted(self.agreement)},
        }

    def _transition_rows(self) -> dict[str, dict[str, float]]:
        rows = {}
        for before in STEP_TYPES:
            counts = [self.transitions[f"{before}>{after}"] for after in STEP_TYPES]
            if total := sum(counts):
                rows[before] = {after: count / total for after, count in zip(STEP_TYPES, counts, strict=True)}
        return rows


def _per_thousand(counts: Counter[str], words: int) -> dict[str, dict[str, float]]:
    return {name: {"total": counts[name], "per_1000_words": 1000 * counts[name] / words if words else 0.0} for name in sorted(counts)}


def _averages(sums: Counter[str]) -> dict[str, float]:
    """Divide sums in millionths by the number of traces."""
    traces = sums["traces"]
    return {"traces": traces} | {name: sums[name] / _MICRO / traces for name in sorted(sums) if name != "traces"}
