"""Graders in processes of their own: in order, within limits, whatever a grader does, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from structcot.errors import ConfigError, StructcotError
from structcot.grading.case import Case, Grade
from structcot.grading.graders import GRADERS, LazyGrader
from structcot.grading.isolated import CASES_AHEAD, GraderPool
from tests.misbehaving_graders import obey

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 0.5


def cases(*words: str) -> list[Case]:
    return [Case(gold="1", pred=word) for word in words]


def grades(*words: str, jobs: int = 1, limit_seconds: float = LIMIT_SECONDS) -> list[Grade]:
    with GraderPool(obey, jobs=jobs, limit_seconds=limit_seconds) as pool:
        return list(pool.map(cases(*words)))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_grades_come_in_the_order_of_the_cases_from_any_number_of_processes() -> None:
    words = [str(number) for number in range(300)]
    for jobs in (1, 3):
        assert [grade.extracted for grade in grades(*words, jobs=jobs)] == words


@pytest.mark.parametrize("word", ["sleep", "spin", "power"])
def test_a_case_that_takes_too_long_is_a_timeout_and_the_others_are_graded(word: str) -> None:
    start = time.monotonic()
    given = grades("a", word, "b", word, "c")
    assert [grade.verdict for grade in given] == ["correct", "timeout", "correct", "timeout", "correct"]
    assert given[1].reason == "not graded within 0.5 s"
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "the grader raised KeyError: 'no such key'"),
        ("memory", "the grader raised MemoryError:"),
        ("recurse", "the grader raised RecursionError: maximum recursion depth exceeded"),
        ("exit", "the grader's process ended with status 3"),
        ("leave", "the grader's process ended with status 1"),
        ("segfault", "the grader's process was ended by SIGSEGV"),
        ("none", "the grader gave a NoneType"),
    ],
)
def test_a_grader_that_fails_is_an_error_with_its_reason_and_the_others_are_graded(word: str, reason: str) -> None:
    given = grades("a", word, "b")
    assert [grade.verdict for grade in given] == ["correct", "error", "correct"]
    assert given[1].reason.startswith(reason)


def test_a_late_case_holds_up_only_its_own_process() -> None:
    start = time.monotonic()
    given = grades("sleep", *map(str, range(20)), jobs=2, limit_seconds=2.0)
    assert [grade.verdict for grade in given] == ["timeout", *["correct"] * 20]
    assert time.monotonic() - start < 30


def test_cases_are_read_as_they_are_needed() -> None:
    read = 0

    def endless() -> Iterator[Case]:
        nonlocal read
        while True:
            read += 1
            yield Case(gold="1", pred="1")

    with GraderPool(obey, jobs=2, limit_seconds=LIMIT_SECONDS) as pool:
        given = pool.map(endless())
        for taken in range(1, 100):
            next(given)
            assert read <= taken + 2 * CASES_AHEAD


def test_no_case_starts_no_process() -> None:
    with GraderPool(obey, jobs=4) as pool:
        assert list(pool.map([])) == []
        assert not pool._workers


def test_a_pool_is_used_again() -> None:
    with GraderPool(obey, jobs=2, limit_seconds=LIMIT_SECONDS) as pool:
        first = {grade.extracted for grade in pool.map(cases("pid", "pid", "pid"))}
        again = {grade.extracted for grade in pool.map(cases("pid", "pid", "pid"))}
        assert len(first | again) <= 2


def test_what_is_left_of_a_map_does_not_get_into_the_next() -> None:
    with GraderPool(obey, jobs=2, limit_seconds=LIMIT_SECONDS) as pool:
        assert next(pool.map(cases(*map(str, range(50))))).extracted == "0"
        assert [grade.extracted for grade in pool.map(cases("a", "b", "c", "d"))] == ["a", "b", "c", "d"]


def test_no_process_is_left_even_of_a_pool_that_is_left_in_the_middle() -> None:
    with GraderPool(obey, jobs=3, limit_seconds=60.0) as pool:
        given = pool.map(cases("pid", *["sleep"] * 10))
        next(given)
        pids = [worker.process.pid for worker in pool._workers]
        assert all(map(is_running, pids))
    assert pids
    assert not any(map(is_running, pids))


def test_killed_processes_are_replaced_and_are_no_zombies() -> None:
    with GraderPool(obey, jobs=1, limit_seconds=0.2) as pool:
        pids = [int(grade.extracted) for grade in pool.map(cases("pid", "spin", "pid", "exit", "pid")) if grade.verdict == "correct"]
        assert len(set(pids)) == 3
        assert [is_running(pid) for pid in pids] == [False, False, True]


def test_it_works_in_threads_at_once_and_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT)
    found: dict[int, list[str]] = {}

    def run(number: int) -> None:
        found[number] = [grade.verdict for grade in grades("a", "spin", "raise", limit_seconds=0.5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: ["correct", "timeout", "error"] for number in range(3)}
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT)) == before


def test_what_a_grader_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    assert grades("print")[0].correct
    assert capfd.readouterr() == ("", "")


def test_a_worker_imports_no_torch_and_nothing_of_the_callers() -> None:
    modules = grades("modules")[0].extracted.split()
    assert "structcot.grading.isolated" in modules
    assert not {"torch", "pytest", "numpy"} & set(modules)


def test_a_grader_that_cannot_be_imported_is_one_message() -> None:
    missing = LazyGrader("a_package_that_is_not_there", "grade")
    with GraderPool(missing) as pool, pytest.raises(ConfigError, match="a_package_that_is_not_there is not installed; pip install"):
        list(pool.map(cases("a")))
    with GraderPool(LazyGrader("tests.misbehaving_graders", "no_such")) as pool, pytest.raises(StructcotError, match="AttributeError"):
        list(pool.map(cases("a")))


def test_ctrl_c_ends_the_caller_with_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from structcot.grading.case import Case
            from structcot.grading.isolated import GraderPool
            from tests.misbehaving_graders import obey

            with GraderPool(obey, jobs=2, limit_seconds=100) as pool:
                for grade in pool.map([Case(gold="1", pred="pid"), *[Case(gold="1", pred="spin")] * 5]):
                    print(grade.extracted, *(worker.process.pid for worker in pool._workers), flush=True)
        """),
        encoding="utf-8",
    )
    caller = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        start_new_session=True,
    )
    assert caller.stdout
    pids = list(map(int, caller.stdout.readline().split()))
    os.killpg(caller.pid, signal.SIGINT)  # as a terminal does
    _, errors = caller.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert errors.count("Traceback") == 1
    assert pids
    assert not any(map(is_running, pids))


def test_workers_end_when_their_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import time
            from structcot.grading.case import Case
            from structcot.grading.isolated import GraderPool
            from tests.misbehaving_graders import obey

            pool = GraderPool(obey, jobs=1, limit_seconds=100)
            print(next(pool.map([Case(gold="1", pred="pid")])).extracted, flush=True)
            time.sleep(100)
        """),
        encoding="utf-8",
    )
    caller = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}
    )
    assert caller.stdout
    pid = int(caller.stdout.readline())
    caller.kill()
    caller.wait()
    until = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)


def test_the_cost_of_a_case_is_below_a_millisecond() -> None:
    many = cases(*["1"] * 3000)
    with GraderPool(obey, jobs=1) as pool:
        next(pool.map(many[:1]))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            assert sum(grade.correct for grade in pool.map(many)) == len(many)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) / len(many) < 1e-3


# Bombs


TOWERS = [
    "10^{10^{10}}",
    "10^10^10^10",
    "9^{9^{9^9}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "x^{x^{x^{x^x}}}",
    "((((x+1)^9)^9)^9)^9",
    "e^{e^{e^{e^{e}}}}",
]
HUGE = [
    "9" * 1_000_000,
    "9" * 100_000 + "!",
    "100000!",
    "9!!!!",
    "\\binom{1000000}{500000}",
    "1e999999999",
    "10^{-999999999}",
    "1" + "0" * 5000,
]
NESTED = [
    opening * 10_000 + "1" + closing * 10_000
    for opening, closing in (("{", "}"), ("(", ")"), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("\\boxed{", "}"))
]
OPEN = ["\\frac{" * 10_000, "\\boxed{" * 10_000, "\\text{" * 3000, "\\begin{pmatrix}" * 1000, "|" * 3000, "$" * 100_000, "\\" * 10_001]
LONG = [
    "x" * 1_000_000,
    "1," * 100_000,
    "a_" * 5000,
    "-" * 5000 + "1",
    "=".join("x" * 1000),
    "<".join("x" * 1000),
    "\\pm " * 30 + "1",
    "," * 100_000,
]
LONG += [" " * 1_000_000, "\n" * 100_000, "so 1 and 3 " * 50_000, "The answer is " * 20_000, "\\boxed{1} and " * 20_000]
STRANGE = [
    "nan",
    "\\infty",
    "-\\infty",
    "\0",
    "\ud800",
    "\\frac{1}{0}",
    "0^0",
    "0/0",
    "\\infty-\\infty",
    "\u202e1",
    "１２",
    "٣",
    "\x7f\x1b[0m",
]
SLOW = [
    "\\sum_{n=1}^{10^{9}} \\frac1n",
    "\\prod_{k=1}^{\\infty} k!",
    "\\int_0^1 x^{x^{x^x}} dx",
    "\\lim_{x \\to 0} \\frac{\\sin x^{x^x}}{x}",
]


def named(text: str) -> str:
    return text[:20].encode("unicode_escape").decode()


def test_bombs_get_a_grade_each_within_the_limit() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install structcot[eval]")
    bombs = [*TOWERS, *HUGE, *NESTED, *OPEN, *LONG, *STRANGE, *SLOW]
    seconds = 3.0
    wrong = [Case(gold=gold, pred=bomb) for bomb in bombs for gold in ("2", "x^{2}+1")]
    outputs = [Case(gold="2", response=bomb) for bomb in bombs]
    with GraderPool(GRADERS["math"], jobs=2, limit_seconds=seconds) as pool:
        next(pool.map(wrong[:1]))
        start = time.monotonic()
        given = list(pool.map([*wrong, *outputs]))
    late = sum(grade.verdict == "timeout" for grade in given)
    assert len(given) == 3 * len(bombs)
    assert all(grade.reason and len(grade.reason) < 1000 for grade in given)
    assert not [named(case.pred or case.response) for case, grade in zip([*wrong, *outputs], given, strict=True) if grade.correct]
    assert late <= len(SLOW) * 2
    assert time.monotonic() - start < late * (seconds + 3) + 60


@pytest.mark.parametrize("bomb", [*TOWERS, *NESTED, *OPEN, *LONG[:6], "nan", "\0", "\ud800"], ids=named)
def test_a_bomb_that_is_the_reference_word_for_word_is_right_or_no_answer(bomb: str) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install structcot[eval]")
    assert GRADERS["math"](Case(gold=bomb, pred=bomb)).verdict in ("correct", "no_answer")
