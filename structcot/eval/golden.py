"""What the paper reports, as data to stand beside one's own results: other models, other graders, one greedy sample a problem.

Source: Li et al., "LLMs Can Easily Learn to Reason from Demonstrations. Structure, not content, is what matters!", arXiv 2502.07374v2.
All rows but that of the teacher are of Qwen2.5-32B-Instruct, before training or trained on long chains of thought. Values are per cent, as
printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PAPER = "arXiv 2502.07374"
MODEL = "Qwen2.5-32B-Instruct"
# The paper's "Avg." is the unweighted mean of these four.
MATHS_BENCHMARKS = ("math500", "aime24", "amc23", "olympiadbench")
BENCHMARKS = (*MATHS_BENCHMARKS, "livecodebench")


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRow:
    """One model of the paper: a short name, where the paper reports it, and per cent by benchmark.

    `drawn` holds values that the paper shows as bars only and prints nowhere in its text; they are less certain.
    """

    name: str
    place: str
    percent: Mapping[str, float]
    drawn: Mapping[str, float] = field(default_factory=dict)

    def value(self, task: str) -> float | None:
        """The printed or drawn per cent of a benchmark; None where the paper gives none that is certain."""
        return self.percent.get(task, self.drawn.get(task))

    @property
    def average(self) -> float | None:
        """The unweighted mean over the four benchmarks of mathematics, computed here; None where one of them is missing."""
        if not all(task in self.percent for task in MATHS_BENCHMARKS):
            return None
        return sum(self.percent[task] for task in MATHS_BENCHMARKS) / len(MATHS_BENCHMARKS)


def _row(name: str, place: str, values: tuple[float, ...]) -> GoldenRow:
    return GoldenRow(name=name, place=place, percent=dict(zip(BENCHMARKS, values, strict=True)))


BEFORE = _row("before training", "Table 1", (84.8, 16.7, 67.5, 47.6, 48.9))
AFTER_QWQ = _row("17k of QwQ, LoRA", "Table 1", (86.6, 33.3, 90.0, 56.0, 56.2))
# The text states the two gains of the abstract; the rest is read from bars.
AFTER_R1 = GoldenRow(
    name="17k of R1",
    place="abstract, Figure 1",
    percent={"aime24": 56.7, "livecodebench": 57.0},
    drawn={"math500": 90.8, "amc23": 85.0, "olympiadbench": 60.3},
)
# These stand beside one's own results; the rest of the table follows below them.
BESIDE = (BEFORE, AFTER_QWQ, AFTER_R1)
GOLDEN = (
    *BESIDE,
    _row("17k of QwQ, all weights", "Table 1", (87.8, 33.3, 70.0, 56.7, 57.9)),
    _row("7k of QwQ, LoRA", "Table 1", (86.6, 40.0, 77.5, 57.2, 56.6)),
    _row("7k of QwQ, all weights", "Table 1", (87.8, 33.3, 77.5, 57.3, 57.5)),
    _row("QwQ-32B-Preview, the teacher", "Table 1", (90.4, 33.3, 75.0, 58.1, 59.1)),
)


def golden_of(task: str) -> dict[str, float]:
    """Per cent of the rows that stand beside one's own, by name; empty for a task that the paper does not have."""
    return {row.name: value for row in BESIDE if (value := row.value(task)) is not None}
