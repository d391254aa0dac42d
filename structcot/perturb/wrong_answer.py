"""Wrong answers: right records answered wrongly, from samples that two graders call wrong.

In `select` "pair" a fraction of the right records get a wrong answer to the same problem, so that the sets with and without wrong answers
hold the same problems in the same order; what the graders disagree on is left out. In "wrong-only" the set becomes a sample of the wrong
records, whatever their problems, as in the code of the paper.
The records are read twice: once to judge them, keeping a few numbers of each, and once to write them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structcot.errors import DataError
from structcot.parallel import Lines, map_batches
from structcot.perturb.choose import whole_share
from structcot.perturb.judge import judge
from structcot.perturb.spec import Spec
from structcot.traces import UnusableTrace, read_lines, read_trace

Location = tuple[int, int]
NO_WRONG_ANSWER = "no wrong answer to this problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongAnswers:
    """What becomes of each line, by its number: a wrong answer at an offset of the file `path`, left out, or left as it is for a reason."""

    path: str
    answer_field: str
    answers: dict[int, Location]
    left_out: dict[int, str]
    kept: dict[int, str]
    counts: Counter[str] = field(default_factory=Counter)

    def answer_for(self, number: int) -> str | None:
        """The wrong answer for a line, None where it gets none."""
        location = self.answers.get(number)
        if location is None:
            return None
        with Path(self.path).open("rb") as file:
            file.seek(location[0])
            line = file.read(location[1])
        return read_trace(f"{self.path}@{location[0]}", line, self.answer_field).text


@dataclass(frozen=True, slots=True)
class _Judged:
    """One judged line: its number, place, problem, verdict and the number that decides its turn."""

    number: int
    location: Location
    problem: bytes
    verdict: str
    reason: str
    turn: bytes


def find_wrong_answers(path: str, spec: Spec, *, seed: int, answer_field: str, jobs: int) -> WrongAnswers:
    """Judge the lines of `path`, and of the pool of `spec` if it names one, and decide what becomes of each line of `path`.

    Raises:
        DataError: if no record can be judged, or none is wrong.
        ConfigError: if a file cannot be read or a grader is not installed.
    """
    judged = list(_judged(path, spec, seed, answer_field, jobs))
    candidates = list(_judged(spec.pool, spec, seed, answer_field, jobs)) if spec.pool else judged
    wrong = [one for one in candidates if one.verdict == "wrong"]
    counts = Counter(one.verdict for one in judged)
    if not wrong:
        reasons = Counter(one.reason for one in candidates if one.reason)
        detail = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
        raise DataError(f"{spec.pool or path}: holds no answer that its graders call wrong{': ' + detail if detail else ''}")
    if spec.select == "wrong-only":
        taken = {one.number for one in _in_turn(wrong)[: whole_share(spec.fraction, len(wrong))]}
        if not taken:
            raise DataError(f"{path}: a fraction of {spec.fraction:g} of {len(wrong):,} wrong records is none; ask for more")
        left_out = {one.number: f"not among the wrong ones taken: {one.verdict}" for one in judged if one.number not in taken}
        return WrongAnswers(path=path, answer_field=answer_field, answers={}, left_out=left_out, kept={}, counts=counts)
    answers, reused = _paired(judged, wrong, spec.fraction)
    counts["answers_used_more_than_once"] = reused
    left_out = {one.number: "the graders disagree" for one in judged if one.verdict == "disputed"}
    answerable = {one.problem for one in wrong}
    kept = {one.number: _why_kept(one, answerable) for one in judged if one.number not in answers and one.number not in left_out}
    return WrongAnswers(path=spec.pool or path, answer_field=answer_field, answers=answers, left_out=left_out, kept=kept, counts=counts)


def _paired(judged: list[_Judged], wrong: list[_Judged], fraction: float) -> tuple[dict[int, Location], int]:
    """Give wrong answers to a fraction of the right records, each problem's in turn; also count those given more than once."""
    by_problem: dict[bytes, list[_Judged]] = defaultdict(list)
    for one in _in_turn(wrong):
        by_problem[one.problem].append(one)
    right = [one for one in judged if one.verdict == "right"]
    able = _in_turn([one for one in right if one.problem in by_problem])
    given: Counter[bytes] = Counter()
    answers = {}
    for one in able[: whole_share(fraction, len(right))]:
        options = by_problem[one.problem]
        answers[one.number] = options[given[one.problem] % len(options)].location
        given[one.problem] += 1
    return answers, sum(max(0, count - len(by_problem[problem])) for problem, count in given.items())


def _why_kept(one: _Judged, answerable: set[bytes]) -> str:
    if one.verdict == "right":
        return "" if one.problem in answerable else NO_WRONG_ANSWER
    return "already wrong" if one.verdict == "wrong" else one.reason


def _in_turn(judged: list[_Judged]) -> list[_Judged]:
    """By the hash of the line: an order that does not depend on that of the file."""
    return sorted(judged, key=lambda one: one.turn)


def _judged(path: str, spec: Spec, seed: int, answer_field: str, jobs: int) -> Iterator[_Judged]:
    number = offset = 0
    for batch in map_batches(_judge_batch, read_lines(path), (spec, seed, answer_field), jobs):
        for size, problem, verdict, reason, turn in batch:
            number += 1
            yield _Judged(number, (offset, size), problem, verdict, reason, turn)
            offset += size


def _judge_batch(batch: Lines, context: tuple[Spec, int, str]) -> list[tuple[int, bytes, str, str, bytes]]:
    spec, seed, answer_field = context
    facts = []
    for source, line in batch:
        turn = hashlib.blake2b(line.strip(), digest_size=8, key=str(seed).encode()).digest()
        try:
            judgement = judge(read_trace(source, line, answer_field), spec)
        except UnusableTrace as error:
            facts.append((len(line), b"", "unjudged", str(error), turn))
            continue
        problem = hashlib.blake2b(judgement.problem.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        facts.append((len(line), problem, judgement.verdict, judgement.reason, turn))
    return facts


def with_prompt_prefix(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The record with `prefix` before the text of its first user turn, or of its prompt."""
    for turns, role, content in (("messages", "role", "content"), ("conversations", "from", "value"), ("prompt", "role", "content")):
        listed = record.get(turns)
        if isinstance(listed, list):
            users = [index for index, turn in enumerate(listed) if turn.get(role) in ("user", "human")][:1]
            longer = [{**turn, content: prefix + turn[content]} if index in users else turn for index, turn in enumerate(listed)]
            return {**record, turns: longer}
    name = next((name for name in ("prompt", "problem", "question", "input") if isinstance(record.get(name), str)), None)
    return {**record, name: prefix + record[name]} if name else record
