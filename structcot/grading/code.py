"""Whether a program is right: it is run on every test in the sandbox, and what comes out is compared here.

The program is the last ``` block after the thought, and is right if it passes all tests. What LiveCodeBench's grader counts as right is
right here: lines on standard output are compared without the blanks around them, as text or else as rows of exact decimal numbers; what a
call returns must equal the expected value, a tuple counting as a list. What is expected never goes into the sandbox, so a program cannot
look it up, and nothing that it does there to its checker can make it right.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from structcot.eval.problem import Problem, ProgramTest
from structcot.grading.case import Grade
from structcot.sandbox import harness
from structcot.sandbox.backend import Backend
from structcot.sandbox.process import START_SECONDS, Limits, Process, SandboxFailure, running
from structcot.tags import read_answer

_FENCE = "```"
# Processor time is no limit of its own, since threads take turns: only native code in several threads at once comes to this.
_CPU_PER_SECOND = 2.0
_SHOWN = 80
_UNPRINTABLE = re.compile(r"[^ -~]")
_AHEAD = 2
# JSON that equals another is at most so many times as long: a letter may be written as six, a list with blanks.
_LONGEST_EQUAL = 16
_ENDED = {
    "memory": "out of memory",
    "output": "too much output",
    "threads": "too many threads",
    "signal": "killed by a signal",
    "exited": "ended without an answer",
}


def extract_program(output: str) -> str:
    """Return the last ``` block of what follows the thought, or of the whole output if no thought is closed; "" if there is none.

    As for LiveCodeBench, a block is what lies between the last two lines that hold a fence.
    """
    answer = read_answer(output)
    lines, fences = _lines_and_fences(answer.solution if answer.is_closed else output)
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def fenced_blocks(text: str) -> list[str]:
    """All ``` blocks of a text in their order, each from one line with a fence to the next; one that is not closed is none."""
    lines, fences = _lines_and_fences(text)
    return ["\n".join(lines[start + 1 : end]) for start, end in zip(fences[::2], fences[1::2], strict=False)]


def _lines_and_fences(text: str) -> tuple[list[str], list[int]]:
    """The lines of a text, and the numbers of those that hold a fence."""
    lines = text.split("\n")
    return lines, [number for number, line in enumerate(lines) if _FENCE in line]


def grade_programs(items: Iterable[tuple[str, Problem]], backend: Backend, limits: Limits, jobs: int) -> Iterator[Grade]:
    """Grade (output, problem) pairs in order, `jobs` programs at a time; few pairs are held at once."""
    waiting: deque[Future[Grade]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                for output, problem in islice(remaining, jobs * _AHEAD - len(waiting)):
                    waiting.append(pool.submit(grade_program, output, problem, backend, limits))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def grade_program(output: str, problem: Problem, backend: Backend, limits: Limits) -> Grade:
    """Judge the program in a model's output by the tests of the problem; `limits.seconds` are for each test, and for loading it.

    What could not be tried, for want of tests or of a sandbox, is an "error", never wrong.
    """
    program = extract_program(output)
    fault = _fault_of(problem)
    if fault:
        return Grade(extracted=program, verdict="error", reason=fault)
    if not program.strip():
        return Grade(extracted="", verdict="no_answer", reason="no code block")
    cpu_seconds = _CPU_PER_SECOND * limits.seconds * (1 + len(problem.tests))
    try:
        with running(_text_of_harness(), backend, limits, cpu_seconds) as process:
            verdict, reason = _judge(process, program, problem, limits.seconds)
    except SandboxFailure as failure:
        verdict, reason = "error", f"the sandbox failed: {_one_line(str(failure))}"
    return Grade(extracted=program, verdict=verdict, reason=reason)


@cache
def _text_of_harness() -> str:
    return Path(harness.__file__).read_text(encoding="utf-8")


def _fault_of(problem: Problem) -> str:
    """Why nothing can be said by the tests of a problem; "" if something can."""
    if not problem.tests:
        return "the problem has no tests"
    for number, test in enumerate(problem.tests if problem.entry_point else (), 1):
        try:
            for line in test.input.split("\n"):
                json.loads(line)
            _results_of(test)
        except (ValueError, RecursionError) as error:
            return f"test {number} of the problem is not JSON: {_one_line(str(error))}"
    return ""


def _judge(process: Process, program: str, problem: Problem, seconds: float) -> tuple[str, str]:
    """Load the program and put the tests to it, one after the other, until one fails; return the verdict and why.

    Raises:
        SandboxFailure: if the harness, before it knows the program, does not come so far as to ask for it.
    """
    if process.hear(START_SECONDS) != ("", harness.READY.encode()):
        raise SandboxFailure("the harness does not start")
    process.tell(problem.entry_point.encode("utf-8", "surrogatepass"))
    letter, about = _ask(process, program, seconds, harness.LOADED)
    if letter != harness.LOADED:
        what = "does not compile" if letter == harness.UNCOMPILED else "before the tests"
        return "wrong", f"{what}: {about}"
    count = len(problem.tests)
    wanted, difference = (harness.RETURNED, _difference_of_values) if problem.entry_point else (harness.WROTE, _difference_of_texts)
    for number, test in enumerate(problem.tests, 1):
        letter, about = _ask(process, test.input, seconds, wanted)
        if letter != wanted:
            return "wrong", f"test {number} of {count}: {about}"
        reason = difference(about, test)
        if reason:
            return "wrong", f"test {number} of {count}: wrong answer: {reason}"
    return "correct", f"passed all {count} tests" if count > 1 else "passed the only test"


_NO_ANSWER = "none"


def _ask(process: Process, text: str, seconds: float, wanted: str) -> tuple[str, str]:
    """Send `text` into the sandbox; return the letter of the answer, `wanted` if all is well, and the rest.

    Where none comes, it is `_NO_ANSWER` and what happened. An answer may be any bytes at all.
    """
    process.tell(text.encode("utf-8", "surrogatepass"))
    ending, data = process.hear(seconds)
    if ending:
        return _NO_ANSWER, f"over {seconds:g} s" if ending == "time" else _ENDED[ending]
    letter, about = data[:1].decode("ascii", "replace"), data[1:].decode("utf-8", "replace")
    if letter == wanted:
        return letter, about
    return (letter, _one_line(about)) if letter in (harness.UNCOMPILED, harness.RAISED) else (_NO_ANSWER, "an answer that is none")


def _difference_of_values(got: str, test: ProgramTest) -> str:
    """In what the JSON of a result differs from the expected one; "" where it does not. It may be any text at all."""
    try:
        # Not `in`, for which NaN would be NaN.
        equal = len(got) <= _LONGEST_EQUAL * (len(test.output) + _SHOWN) and any(json.loads(got) == result for result in _results_of(test))
    except (ValueError, RecursionError):
        equal = False
    return "" if equal else f"expected {_one_line(test.output)}, got {_one_line(got)}"


def _results_of(test: ProgramTest) -> list[Any]:
    """The values that a call may return: JSON, or else one of the lines, each of which is JSON."""
    try:
        return [json.loads(test.output)]
    except ValueError:
        return [json.loads(line) for line in test.output.split("\n")]


def _difference_of_texts(got: str, test: ProgramTest) -> str:
    """In what an output differs from the expected one; "" where it does not."""
    got, expected = got.strip(), test.output.strip()
    if got.count("\n") != expected.count("\n"):
        lines = expected.count("\n") + 1
        return f"expected {lines} lines, got {got.count(chr(10)) + 1}: {_one_line(got)}"
    for got_line, expected_line in zip(got.split("\n"), expected.split("\n"), strict=True):
        if got_line.strip() != expected_line.strip() and not _are_equal_numbers(got_line, expected_line):
            return f"expected {_one_line(expected_line)}, got {_one_line(got_line)}"
    return ""


def _are_equal_numbers(got: str, expected: str) -> bool:
    """Whether two lines are rows of equal numbers, exactly: 1.0 is 1.00, and 0.1 is not 0.10000001."""
    try:
        return [Decimal(word) for word in got.split()] == [Decimal(word) for word in expected.split()]
    except InvalidOperation:
        return False


def _one_line(text: str) -> str:
    """A text as a reason can hold it: one line of printable signs, cut in the middle."""
    ends = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), " ".join(ends.split()))
