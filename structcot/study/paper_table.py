"""Table 2 of the paper, the lengths of its appendix, and what samples of that size can carry.

Source: Li et al., "LLMs Can Easily Learn to Reason from Demonstrations. Structure, not content, is what matters!", arXiv 2502.07374v2:
Table 2 and Tables 5 to 7 of Appendix D. All rows are Qwen2.5-32B-Instruct, before training or trained once on 4,618 demonstrations, one
greedy answer to each problem. Everything here is in per cent and percentage points, as printed.

The rows are compared with "Correct" one by one. The answers to single problems are not published, so the comparisons are unpaired:
independent binomials, Newcombe's interval (Statistics in Medicine 17, 1998) and the score test with the two shares pooled. Pairing would
narrow them; the noise of training, one run each, would widen them and can not be told from one run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from structcot.eval.golden import MATHS_BENCHMARKS, PAPER
from structcot.eval.statistics import Interval, mean_interval, wilson_interval
from structcot.study.statistics import NOISE, SIGNIFICANCE, holm, two_sided_p, verdict

# Problems of the benchmarks, in the order of MATHS_BENCHMARKS.
PROBLEMS = (500, 30, 40, 675)
REFERENCE = "Correct"
# Accuracy on AIME 2024 of eleven checkpoints of the one run on correct demonstrations, steps 21 to 140. Source: the outputs that the
# authors published, NovaSky-AI/SkyThought on GitHub, branch "corrupt", Qwen2.5-Math/evaluation/outputs.
CHECKPOINTS_AIME24 = (36.7, 33.3, 36.7, 26.7, 30.0, 26.7, 33.3, 33.3, 36.7, 40.0, 30.0)
# What the paper prints as the average of "Original", in Table 2.
PRINTED_AVERAGE_ORIGINAL = 56.7


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """A row of Table 2: its name, what was done to which fraction, and per cent right in the order of MATHS_BENCHMARKS."""

    name: str
    kind: str
    fraction: float
    group: str
    percent: tuple[float, ...]

    @property
    def right(self) -> tuple[int, ...]:
        """Right answers by benchmark, the nearest that the printed per cent can stand for."""
        return tuple(round(percent * number / 100) for percent, number in zip(self.percent, PROBLEMS, strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether these right answers, rounded as printed, are the printed per cent in all benchmarks."""
        counted = [round(100 * right / number, 1) for right, number in zip(self.right, PROBLEMS, strict=True)]
        return all(math.isclose(one, printed) for one, printed in zip(counted, self.percent, strict=True))


def _rows(name: str, kind: str, group: str, values: dict[float, tuple[float, ...]]) -> tuple[PaperRow, ...]:
    return tuple(
        PaperRow(name=f"{name} {100 * fraction:.0f}%", kind=kind, fraction=fraction, group=group, percent=percent)
        for fraction, percent in values.items()
    )


TABLE_2 = (
    PaperRow(name="Original", kind="base", fraction=0.0, group="base", percent=(84.8, 16.7, 67.5, 47.6)),
    PaperRow(name=REFERENCE, kind="clean", fraction=0.0, group="reference", percent=(89.2, 40.0, 77.5, 58.5)),
    PaperRow(name="Wrong answers", kind="wrong-answer", fraction=1.0, group="answer", percent=(88.6, 30.0, 77.5, 56.1)),
    *_rows(
        "Digits",
        "digits",
        "content",
        {
            1.0: (5.4, 0.0, 2.5, 2.8),
            0.7: (85.6, 30.0, 77.5, 54.8),
            0.5: (87.6, 36.7, 77.5, 55.0),
            0.2: (88.4, 30.0, 82.5, 57.2),
        },
    ),
    *_rows(
        "Keywords", "keywords", "content", {1.0: (86.6, 33.3, 77.5, 54.4), 0.5: (87.6, 36.7, 82.5, 56.7), 0.2: (87.2, 33.3, 72.5, 56.1)}
    ),
    *_rows(
        "Shuffled", "shuffle", "structure", {1.0: (81.8, 23.3, 70.0, 49.1), 0.67: (82.0, 26.7, 72.5, 47.6), 0.33: (85.6, 33.3, 75.0, 55.3)}
    ),
    *_rows(
        "Deleted", "delete", "structure", {1.0: (79.2, 13.3, 60.0, 45.4), 0.67: (84.2, 26.7, 55.0, 48.1), 0.33: (88.2, 23.3, 80.0, 57.7)}
    ),
    *_rows(
        "Inserted", "insert", "structure", {1.0: (77.0, 10.0, 50.0, 41.1), 0.67: (81.8, 20.0, 60.0, 46.0), 0.33: (86.6, 33.3, 77.5, 57.2)}
    ),
)

# Appendix D: mean tokens and keywords of an output, by benchmark, at these fractions of perturbed steps.
LENGTH_FRACTIONS = (0.0, 0.33, 0.67, 1.0)
TOKENS = {
    "delete": {
        "math500": (3551, 2979, 2078, 482),
        "amc23": (4838, 6612, 4623, 609),
        "olympiadbench": (7234, 6802, 4978, 595),
        "aime24": (13088, 11889, 6798, 620),
    },
    "insert": {
        "math500": (3551, 4189, 3900, 5383),
        "amc23": (4838, 7089, 5464, 5137),
        "olympiadbench": (7234, 7558, 6990, 5407),
        "aime24": (13088, 12858, 12864, 5304),
    },
    "shuffle": {
        "math500": (3551, 4284, 5784, 5613),
        "amc23": (4838, 6802, 10198, 8661),
        "olympiadbench": (7234, 8942, 12154, 12167),
        "aime24": (13088, 13451, 16221, 18054),
    },
}
KEYWORDS = {
    "delete": {
        "math500": (32, 28, 20, 0.017),
        "amc23": (39, 85.6, 77.8, 0),
        "olympiadbench": (77, 70, 56, 0.009),
        "aime24": (143, 143, 90, 0),
    },
    "insert": {"math500": (32, 39, 39, 41), "amc23": (39, 98, 44, 35), "olympiadbench": (77, 76, 80, 38), "aime24": (143, 127, 165, 44)},
    "shuffle": {
        "math500": (32, 45, 61, 70),
        "amc23": (39, 65, 74, 67),
        "olympiadbench": (77, 111, 166, 137),
        "aime24": (143, 161, 201, 210),
    },
}

TITLES = {
    "mean": "the mean of the four benchmarks",
    "pooled": "all problems taken together",
    "math500": "MATH500",
    "aime24": "AIME24",
    "amc23": "AMC23",
    "olympiadbench": "OlympiadBench",
}


def paper_facts() -> dict[str, Any]:
    """Table 2 with intervals and what of it differs from "Correct": JSON values, in per cent and points.

    `rows` have per benchmark, for the unweighted mean of the four ("mean") and over all problems ("pooled") the difference to "Correct"
    with interval, p-value, Holm's p-value over the comparisons of that column, and verdict; None for "Correct" itself. `interval` is that
    of the mean. `outputs` are the lengths of Appendix D.
    """
    reference = next(row for row in TABLE_2 if row.name == REFERENCE)
    others = [row for row in TABLE_2 if row is not reference]
    columns = {column: _differences(others, reference, column) for column in TITLES}
    differences = {row.name: {column: found[place] for column, found in columns.items()} for place, row in enumerate(others)}
    rows = [_row_facts(row, differences.get(row.name)) for row in TABLE_2]
    return {"source": f"{PAPER}, Table 2", "unit": "per cent", "rows": rows, "outputs": _outputs(), "sentences": _sentences(rows)}


def _shares(row: PaperRow, column: str) -> list[tuple[float, int]]:
    """Shares of right answers with their numbers of problems, of which a column shows the mean."""
    if column == "pooled":
        return [(sum(row.right) / sum(PROBLEMS), sum(PROBLEMS))]
    named = zip(MATHS_BENCHMARKS, row.percent, PROBLEMS, strict=True)
    return [(percent / 100, number) for name, percent, number in named if column in (name, "mean")]


def _differences(rows: Sequence[PaperRow], reference: PaperRow, column: str) -> list[dict[str, Any]]:
    """One column of the analysis: every row less the reference, with p-values adjusted over the column."""
    found = [_compare(_shares(row, column), _shares(reference, column)) for row in rows]
    adjusted = holm([p_value for _, _, p_value in found])
    return [
        {
            "value": round(100 * value, 2),
            "interval": _points(interval),
            "p": p_value,
            "p_adjusted": p_adjusted,
            "verdict": verdict(value, p_adjusted),
        }
        for (value, interval, p_value), p_adjusted in zip(found, adjusted, strict=True)
    ]


def _compare(ours: Sequence[tuple[float, int]], theirs: Sequence[tuple[float, int]]) -> tuple[float, Interval, float]:
    """Difference of two mean shares of independent binomials, its interval, and its p-value by the score test."""
    shares, intervals, variance = [], [], 0.0
    for (share, number), (other, _) in zip(ours, theirs, strict=True):
        low, high = wilson_interval(other, number)
        # The mean of a share and of another's negative is half their difference.
        shares += [share, -other]
        intervals += [wilson_interval(share, number), (-high, -low)]
        together = (share + other) / 2
        variance += 2 * together * (1 - together) / number
    low, high = mean_interval(shares, intervals)
    value = 2 * sum(shares) / len(shares)
    return value, (2 * low, 2 * high), two_sided_p(abs(value) * len(ours) / math.sqrt(variance), math.inf)


def _points(interval: Interval) -> list[float]:
    return [round(100 * end, 2) for end in interval]


def _row_facts(row: PaperRow, differences: dict[str, Any] | None) -> dict[str, Any]:
    shares = _shares(row, "mean")
    return {
        "name": row.name,
        "kind": row.kind,
        "fraction": row.fraction,
        "group": row.group,
        "accuracy": dict(zip(MATHS_BENCHMARKS, row.percent, strict=True)),
        "mean": round(sum(row.percent) / len(row.percent), 2),
        "interval": _points(mean_interval([share for share, _ in shares], [wilson_interval(*one) for one in shares])),
        "difference": differences,
    }


def _outputs() -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "fraction": fraction,
            "tokens": {name: TOKENS[kind][name][place] for name in MATHS_BENCHMARKS},
            "keywords": {name: KEYWORDS[kind][name][place] for name in MATHS_BENCHMARKS},
        }
        for kind in TOKENS
        for place, fraction in enumerate(LENGTH_FRACTIONS)
    ]


def _sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the table carries, column by column, and what its intervals leave out."""
    compared = [row for row in rows if row["difference"]]
    original = next(row for row in rows if row["group"] == "base")
    low, high = min(CHECKPOINTS_AIME24), max(CHECKPOINTS_AIME24)
    odd = [f"{row.name} ({row.percent[-1]})" for row in TABLE_2 if not row.is_whole]
    return [
        *(_sentence_of(column, compared) for column in TITLES),
        f'The paper prints {PRINTED_AVERAGE_ORIGINAL} as the average of "Original"; the mean of its four values is {original["mean"]:.2f}.',
        f"No number of right answers of {PROBLEMS[-1]} gives these printed values of OlympiadBench: {', '.join(odd)}; they fit "
        f"{PROBLEMS[-1] - 1} problems. The values are taken as printed.",
        f"The noise of training is not in these intervals: every row is one run. The checkpoints of the one run on correct demonstrations "
        f"lie between {low} and {high} on AIME24, a spread of {high - low:.1f} points without a trend; before training it is "
        f"{original['accuracy']['aime24']}.",
    ]


def _sentence_of(column: str, compared: Sequence[dict[str, Any]]) -> str:
    differ = [row for row in compared if row["difference"][column]["verdict"] != NOISE]
    noise = [row["name"] for row in compared if row["difference"][column]["verdict"] == NOISE]
    verb = "differs" if len(differ) == 1 else "differ"
    shown = ", ".join(f"{row['name']} ({row['difference'][column]['value']:+.1f})" for row in differ) or "none"
    return (
        f'On {TITLES[column]}, {len(differ)} of {len(compared)} rows {verb} from "{REFERENCE}" (family-wise {100 * SIGNIFICANCE:.0f} %): '
        f"{shown}; within noise: {', '.join(noise) or 'none'}."
    )
