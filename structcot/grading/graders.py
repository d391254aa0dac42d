"""The graders by name. A grader's module is imported when it first grades, or when a worker that is to grade with it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from structcot.errors import ConfigError
from structcot.grading.case import Case, Grade


@dataclass(frozen=True, slots=True)
class LazyGrader:
    """A grader that is imported by need; sent to another process, it is imported there and arrives as the function itself."""

    module: str
    name: str

    def __call__(self, case: Case) -> Grade:
        """Grade a case."""
        return load_grader(self.module, self.name)(case)

    def __reduce__(self) -> tuple[Callable[[str, str], Callable[[Case], Grade]], tuple[str, str]]:
        return load_grader, (self.module, self.name)


def load_grader(module: str, name: str) -> Callable[[Case], Grade]:
    """Import a grader.

    Raises:
        ConfigError: if a package that it needs is not installed.
    """
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"grader {name}: the package {error.name} is not installed; pip install structcot[eval]") from error


GRADERS: dict[str, Callable[[Case], Grade]] = {
    "math": LazyGrader("structcot.grading.math", "grade_math"),
    "exact": LazyGrader("structcot.grading.exact", "grade_exact"),
    "paper": LazyGrader("structcot.grading.paper", "grade_paper"),
}
