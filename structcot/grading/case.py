"""What a grader is given and what it says."""

from __future__ import annotations

from dataclasses import dataclass

# Only the first is right; the rest say what kind of wrong it is. An "error" is the grader's own failure, which reports count apart.
VERDICTS = ("correct", "wrong", "no_answer", "timeout", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An answer to be judged: `pred` where it is at hand, else it is sought in `response`, a whole output.

    `gold` is the reference answer. `tolerance` is the largest absolute error allowed of a number, `unit` what the number is counted in (an
    answer may name it or not); `is_multiple` says that `gold` lists several answers, separated by commas, in any order. `benchmark` is the
    name of the task, for rules that depend on it.
    """

    gold: str
    response: str = ""
    pred: str | None = None
    tolerance: float | None = None
    unit: str = ""
    is_multiple: bool = False
    benchmark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The answer that was judged ("" where none was found), one of `VERDICTS`, and why, in one line."""

    extracted: str
    verdict: str
    reason: str

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.verdict == "correct"
