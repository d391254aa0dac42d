"""From graded samples to the facts of an evaluation: per task, per group of problems, over the four benchmarks of mathematics.

Accuracy is the mean over problems of the share of right samples. What a grader could not judge counts as not right and is never hidden: the
verdicts are counted apart, and a warning says what they may cost. Shape legend: P problems, S samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from structcot.errors import DataError
from structcot.eval.endings import ENDINGS
from structcot.eval.golden import MATHS_BENCHMARKS
from structcot.eval.statistics import (
    Interval,
    accuracy_interval,
    accuracy_within,
    bootstrap_interval,
    budget_grid,
    compare_paired,
    effective_samples,
    majority_share,
    mean_interval,
    pass_at_k,
    powers_of_two,
)
from structcot.grading.case import VERDICTS

NEEDED = ("task", "problem_id", "sample", "completion_tokens", "gold", "group", "extracted", "verdict", "correct", "ending")
# In the order of difficulty where the groups are difficulties, else by name.
DIFFICULTIES = ("easy", "medium", "hard")
NUM_LENGTH_BINS = 24
SIGNIFICANCE = 0.05


@dataclass(slots=True)
class _Table:
    """The columns of one task, filled sample by sample; `problem_S` numbers the problem of each sample."""

    problems: dict[str, int] = field(default_factory=dict)
    group_P: list[str] = field(default_factory=list)
    problem_S: list[int] = field(default_factory=list)
    right_S: list[bool] = field(default_factory=list)
    tokens_S: list[int] = field(default_factory=list)
    verdict_S: list[str] = field(default_factory=list)
    ending_S: list[str] = field(default_factory=list)
    answer_S: list[str] = field(default_factory=list)
    paper_S: list[bool | None] = field(default_factory=list)
    forced_S: list[bool | None] = field(default_factory=list)
    seen: set[tuple[str, int]] = field(default_factory=set)
    has_gold: bool = False

    def add(self, sample: Mapping[str, Any]) -> None:
        """Append one sample.

        Raises:
            DataError: if the same sample was added before.
        """
        identity = (sample["problem_id"], sample["sample"])
        if identity in self.seen:
            raise DataError(f'samples: {sample["task"]}: sample {identity[1]} of problem "{identity[0]}" is there twice; keep one of them')
        self.seen.add(identity)
        if sample["problem_id"] not in self.problems:
            self.problems[sample["problem_id"]] = len(self.problems)
            self.group_P.append(str(sample["group"]))
        self.problem_S.append(self.problems[sample["problem_id"]])
        self.right_S.append(bool(sample["correct"]))
        self.tokens_S.append(int(sample["completion_tokens"]))
        self.verdict_S.append(sample["verdict"])
        self.ending_S.append(sample["ending"])
        self.answer_S.append(sample["extracted"])
        self.paper_S.append(sample.get("paper_correct"))
        self.forced_S.append(sample.get("forced_correct"))
        self.has_gold = self.has_gold or bool(sample["gold"])

    def count_P(self) -> np.ndarray:
        """Samples of each problem."""
        return np.bincount(self.problem_S, minlength=len(self.problems))

    def right_P(self) -> np.ndarray:
        """Right samples of each problem."""
        return np.bincount(self.problem_S, weights=self.right_S, minlength=len(self.problems)).astype(int)


def summarise(samples: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Sum a finished evaluation up as facts that JSON can hold; `samples` are the records of samples.jsonl and are read once.

    The facts are `tasks` by name, `average` over the paper's four benchmarks of mathematics (None unless all are there), `warnings`, and
    `samples`, their number. Every accuracy is a share between 0 and 1 with its 95 % `interval`. Lengths are in tokens, of the outputs that
    were begun; `tokens.all` is None where there is none. The `budget_accuracy` of a task is its accuracy if outputs longer than each of
    `budget_tokens` were wrong.
    `forced` is the accuracy that counts answers after a forced end of the thought, None where that was not asked for.
    `groups` splits a task by difficulty, level or subject; the accuracy of the task is over all its problems, so larger groups weigh more.

    Raises:
        DataError: if a sample lacks a field, has an unknown verdict or ending, or is there twice.
    """
    tables = _read(samples)
    budgets = budget_grid(max((max(table.tokens_S) for table in tables.values()), default=0))
    tasks = {name: _task_facts(table, budgets, seed) for name, table in tables.items()}
    return {
        "samples": sum(len(table.right_S) for table in tables.values()),
        "budget_tokens": budgets,
        "tasks": tasks,
        "average": _average(tasks),
        "warnings": [warning for name, facts in tasks.items() for warning in _warnings(name, facts)],
    }


def compare(
    samples_a: Iterable[Mapping[str, Any]], samples_b: Iterable[Mapping[str, Any]], name_a: str, name_b: str, seed: int = 0
) -> dict[str, Any]:
    """Compare two evaluations on the problems that both were given, task by task: `difference` is A's accuracy less B's.

    The verdict in words names the better model, or says that the difference is within noise: no less likely than 1 in 20 between models
    that are equally good.

    Raises:
        DataError: as `summarise`.
    """
    tables_a, tables_b = _read(samples_a), _read(samples_b)
    tasks = {name: _compare_tables(tables_a[name], tables_b[name], (name_a, name_b), seed) for name in tables_a if name in tables_b}
    tasks = {name: facts for name, facts in tasks.items() if facts}
    average = None
    if all(name in tasks for name in MATHS_BENCHMARKS):
        differences = [tasks[name]["difference"] for name in MATHS_BENCHMARKS]
        low, high = mean_interval(differences, [tasks[name]["interval"] for name in MATHS_BENCHMARKS])
        better = name_a if low > 0 else name_b if high < 0 else ""
        verdict = f"{better} is better (the interval excludes 0)" if better else "within noise (the interval includes 0)"
        average = {"difference": sum(differences) / len(differences), "interval": [low, high], "verdict": verdict}
    return {"a": name_a, "b": name_b, "tasks": tasks, "average": average}


def p_text(p_value: float) -> str:
    """Write a p-value: "p = 0.034", "p < 0.0001"."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def _read(samples: Iterable[Mapping[str, Any]]) -> dict[str, _Table]:
    tables: dict[str, _Table] = {}
    for number, sample in enumerate(samples, 1):
        missing = [key for key in NEEDED if key not in sample]
        if missing:
            raise DataError(f'samples: sample {number} has no "{missing[0]}"; give records as structcot eval writes them')
        for key, known in (("verdict", VERDICTS), ("ending", ENDINGS)):
            if sample[key] not in known:
                raise DataError(f'samples: sample {number}: {key} must be one of {", ".join(known)}, got "{sample[key]}"')
        tables.setdefault(str(sample["task"]), _Table()).add(sample)
    return tables


def _task_facts(table: _Table, budgets: Sequence[int], seed: int) -> dict[str, Any]:
    count_P, right_P = table.count_P(), table.right_P()
    means_P = right_P / count_P
    right_S, tokens_S, problem_S = np.array(table.right_S), np.array(table.tokens_S), np.array(table.problem_S)
    begun_S = np.array(table.ending_S) != "refused"
    weight_S = 1.0 / (count_P[problem_S] * len(count_P))
    return {
        "problems": len(count_P),
        "samples": len(right_S),
        "samples_per_problem": {"fewest": int(count_P.min()), "most": int(count_P.max())},
        **_accuracy(means_P, count_P),
        "effective_samples": effective_samples(means_P, count_P),
        "bootstrap_interval": list(bootstrap_interval(means_P, seed)),
        "pass_at_k": {str(k): float(pass_at_k(count_P, right_P, k).mean()) for k in powers_of_two(int(count_P.min()))},
        "paper_grader_accuracy": float(_shares_P(table, table.paper_S).mean()) if None not in table.paper_S else None,
        "forced": _accuracy(_shares_P(table, table.forced_S), count_P) if None not in table.forced_S else None,
        "majority_vote": _majority(table) if count_P.max() > 1 and table.has_gold else None,
        "groups": _groups(table, means_P, count_P),
        "verdicts": {verdict: table.verdict_S.count(verdict) for verdict in VERDICTS},
        "endings": _endings(table),
        "tokens": {
            "all": _lengths(tokens_S[begun_S]),
            "right": _lengths(tokens_S[begun_S & right_S]),
            "wrong": _lengths(tokens_S[begun_S & ~right_S]),
            "histogram": _histogram(tokens_S[begun_S], right_S[begun_S]),
        },
        "budget_accuracy": accuracy_within(budgets, tokens_S, right_S, weight_S),
    }


def _accuracy(means_P: np.ndarray, count_P: np.ndarray) -> dict[str, Any]:
    return {"accuracy": float(means_P.mean()), "interval": list(accuracy_interval(means_P, count_P))}


def _shares_P(table: _Table, values_S: Sequence[bool | None]) -> np.ndarray:
    """The share of samples of each problem for which something holds."""
    sums_P = np.bincount(table.problem_S, weights=np.array(values_S, dtype=float), minlength=len(table.problems))
    return sums_P / table.count_P()


def _majority(table: _Table) -> float:
    votes: list[list[int]] = [[] for _ in table.problems]
    for index, problem in enumerate(table.problem_S):
        votes[problem].append(index)
    shares = [majority_share([table.answer_S[i] for i in one], [table.right_S[i] for i in one]) for one in votes]
    return sum(shares) / len(shares)


def _groups(table: _Table, means_P: np.ndarray, count_P: np.ndarray) -> dict[str, Any]:
    """Split by group; empty where all problems are of one."""
    group_P = np.array(table.group_P, dtype=object)
    names = sorted(set(table.group_P), key=lambda name: (DIFFICULTIES.index(name) if name in DIFFICULTIES else len(DIFFICULTIES), name))
    if len(names) < 2:
        return {}
    return {
        name: {"problems": int((group_P == name).sum()), **_accuracy(means_P[group_P == name], count_P[group_P == name])} for name in names
    }


def _endings(table: _Table) -> dict[str, Any]:
    """Count each ending, with its share of all samples and the share of right ones in it (None of none)."""
    counts = Counter(table.ending_S)
    right = Counter(ending for ending, is_right in zip(table.ending_S, table.right_S, strict=True) if is_right)
    total = len(table.ending_S)
    return {
        ending: {
            "samples": counts[ending],
            "share": counts[ending] / total,
            "accuracy": right[ending] / counts[ending] if counts[ending] else None,
        }
        for ending in ENDINGS
    }


def _lengths(tokens_S: np.ndarray) -> dict[str, Any] | None:
    if not len(tokens_S):
        return None
    median, p90 = np.quantile(tokens_S, [0.5, 0.9])
    return {
        "samples": len(tokens_S),
        "mean": float(tokens_S.mean()),
        "median": float(median),
        "p90": float(p90),
        "max": int(tokens_S.max()),
    }


def _histogram(tokens_S: np.ndarray, right_S: np.ndarray) -> dict[str, Any]:
    """Count right and wrong outputs by length, in bins that are evenly wide on a logarithmic scale; the last one holds its upper edge."""
    low, high = max(1, int(tokens_S.min(initial=2**62))), max(2, int(tokens_S.max(initial=0)))
    edges = np.unique(np.geomspace(min(low, high - 1), high, NUM_LENGTH_BINS + 1).round().astype(int))
    counts = [np.histogram(np.maximum(tokens_S[chosen], edges[0]), edges)[0].tolist() for chosen in (right_S, ~right_S)]
    return {"edges": edges.tolist(), "right": counts[0], "wrong": counts[1]}


def _average(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    if not all(name in tasks for name in MATHS_BENCHMARKS):
        return None
    means = [tasks[name]["accuracy"] for name in MATHS_BENCHMARKS]
    intervals: list[Interval] = [tuple(tasks[name]["interval"]) for name in MATHS_BENCHMARKS]
    return {"tasks": list(MATHS_BENCHMARKS), "accuracy": sum(means) / len(means), "interval": list(mean_interval(means, intervals))}


def _warnings(name: str, facts: Mapping[str, Any]) -> list[str]:
    total, per_problem = facts["samples"], facts["samples_per_problem"]
    said = []
    for verdict, what in (
        ("error", "could not be judged: the grader failed"),
        ("timeout", "could not be judged: the grader ran out of time"),
    ):
        count = facts["verdicts"][verdict]
        if count:
            at_most = 100 * count / total
            said.append(f"{name}: {count:,} of {total:,} samples {what}; they count as not right, which costs at most {at_most:.1f} points")
    refused = facts["endings"]["refused"]["samples"]
    if refused:
        said.append(f"{name}: {refused:,} of {total:,} prompts were refused, so nothing was generated; they count as not right")
    if per_problem["fewest"] != per_problem["most"]:
        said.append(
            f"{name}: problems have between {per_problem['fewest']:,} and {per_problem['most']:,} samples; the evaluation is not whole"
        )
    return said


def _compare_tables(a: _Table, b: _Table, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Compare one task on the problems that both have; empty where there is none."""
    both = [problem for problem in a.problems if problem in b.problems]
    if not both:
        return {}
    rows_a, rows_b = [a.problems[problem] for problem in both], [b.problems[problem] for problem in both]
    count_a, count_b = a.count_P()[rows_a], b.count_P()[rows_b]
    means_a, means_b = a.right_P()[rows_a] / count_a, b.right_P()[rows_b] / count_b
    paired = compare_paired(means_a, means_b, count_a, count_b, seed)
    better = names[0] if paired.difference > 0 else names[1]
    verdict = f"{better} is better" if paired.p_value < SIGNIFICANCE else "within noise"
    return {
        **asdict(paired),
        "interval": list(paired.interval),
        "accuracy_a": float(means_a.mean()),
        "accuracy_b": float(means_b.mean()),
        "problems_of_one_only": len(a.problems) + len(b.problems) - 2 * len(both),
        "verdict": f"{verdict} ({p_text(paired.p_value)})",
    }
