"""samples.jsonl: an object for each output.

An output is appended as soon as it is finished, and graded later: so a stopped evaluation goes on where it was, and what is there can be
graded anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

from structcot.errors import MismatchError
from structcot.eval.endings import ending_of
from structcot.eval.engine import Output
from structcot.eval.problem import Problem
from structcot.files import replacing
from structcot.grading.case import Grade


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One output that an evaluation asks for: the `sample`-th answer, from 0, to a problem of a task."""

    task: str
    problem: Problem
    sample: int
    messages: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """The name of the request; problems have an id each, so names do not meet."""
        return f"{self.task}/{self.problem.id}/{self.sample}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A line of samples.jsonl. `verdict` is one of `structcot.grading.case.VERDICTS`, "" while the output is not graded.

    `paper_correct` is what the grader of the paper says, None for code. `seconds` are those of the generation. `forced_output` is what the
    model wrote after a forced end of its thought (`structcot.eval.forcing`), None where nothing was forced; `forced_correct` counts that in
    place of the output, None where it was not asked for.
    """

    task: str
    problem_id: str
    sample: int
    prompt: list[dict[str, str]]
    output: str
    finish_reason: str
    finish_detail: str
    ending: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    gold: str
    group: str
    extracted: str = ""
    verdict: str = ""
    correct: bool = False
    reason: str = ""
    paper_correct: bool | None = None
    forced_output: str | None = None
    forced_correct: bool | None = None

    @property
    def key(self) -> str:
        """The name of the request that this answers."""
        return f"{self.task}/{self.problem_id}/{self.sample}"

    def graded(self, grade: Grade, paper: Grade | None = None) -> dict[str, Any]:
        """The line with a grade."""
        judged = {"extracted": grade.extracted, "verdict": grade.verdict, "correct": grade.correct, "reason": grade.reason}
        return {**asdict(self), **judged, "paper_correct": None if paper is None else paper.correct}


def sample_of(wanted: Wanted, output: Output) -> Sample:
    """What is written of an output as soon as it is there."""
    return Sample(
        task=wanted.task,
        problem_id=wanted.problem.id,
        sample=wanted.sample,
        prompt=turns_of(wanted.messages),
        output=output.text,
        finish_reason=output.finish_reason,
        finish_detail=output.reason,
        ending=ending_of(output.text, output.finish_reason),
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        seconds=round(output.seconds, 3),
        gold=wanted.problem.gold,
        group=wanted.problem.group,
    )


def turns_of(messages: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Messages as chat templates and servers take them."""
    return [{"role": role, "content": content} for role, content in messages]


class SampleFile:
    """samples.jsonl of an evaluation, open to append to. A last line that a kill has cut short is taken away.

    Raises:
        MismatchError: if it holds what no evaluation has written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.samples: dict[str, Sample] = {}
        self._file: IO[bytes] | None = None
        if path.exists():
            self._read()

    def __enter__(self) -> Self:
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, sample: Sample) -> None:
        """Keep an output, whatever happens next."""
        if self._file is None:
            raise RuntimeError(f"{self.path}: is not open")
        self._file.write(_line(asdict(sample)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.samples[sample.key] = sample

    def replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the file anew, in the order of `lines`."""
        with replacing(self.path, "wb") as file:
            for line in lines:
                file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        known, end = {field.name for field in fields(Sample)}, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    sample = Sample(**{name: value for name, value in json.loads(line).items() if name in known})
                except (ValueError, TypeError, AttributeError) as error:
                    raise MismatchError(
                        f"{self.path}:{number}: is no sample of an evaluation: {error}; name another output_dir, or remove the file"
                    ) from error
                self.samples[sample.key] = sample
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
