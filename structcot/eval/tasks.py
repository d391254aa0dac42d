"""The benchmarks, each a declaration: where its released version lies, how many problems it has, and which answers they have.

A data set is taken from `data_dir` where a file of the task's name lies there, else from the hub. `answers_sha256` is the hash of all
reference answers: it tells whether what came is the version that results are published for, wherever it came from. A task of the user's own
is any file of questions with answers, or with tests.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from structcot.config import DataSource, nearest
from structcot.data.rows import Rejected, read_rows
from structcot.errors import ConfigError, DataError, FetchError
from structcot.eval.config import TaskConfig
from structcot.eval.problem import Problem
from structcot.eval.rows import BadRow, read_problem
from structcot.hub import find_snapshot

SUFFIXES = (".jsonl", ".json", ".parquet")
SHOWN_BAD_ROWS = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A set of problems. `path` is a file or a hub id; of a hub data set the `files` (patterns) of `revision` are read.

    Only rows whose `url` holds `url_part` count. `question` and `answer` name fields where they are not found by themselves; `template`
    beats the one of the prompt style, `grader` that of the evaluation. `max_new_tokens` is how long outputs may be where the config does
    not say. `num_problems` 0 and `answers_sha256` "" mean that nothing is known of them.
    """

    name: str
    path: str
    revision: str = "main"
    files: tuple[str, ...] = ()
    url_part: str = ""
    question: str = ""
    answer: str = ""
    template: str = ""
    grader: str = ""
    max_new_tokens: int = 32768
    num_problems: int = 0
    answers_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """A task with its problems. `origin` says where they came from, `is_released` whether their answers are those of the known version."""

    task: Task
    problems: tuple[Problem, ...]
    origin: str
    answers_sha256: str

    @property
    def is_released(self) -> bool | None:
        """Whether these are the released problems; None where no version is known."""
        return self.answers_sha256 == self.task.answers_sha256 if self.task.answers_sha256 else None


TASKS = {
    task.name: task
    for task in (
        Task(
            name="aime24",
            path="AI-MO/aimo-validation-aime",
            files=("data/train-*.parquet",),
            url_part="2024",
            num_problems=30,
            answers_sha256="aabad1eca0d8d8f17d2b00588d1d0698c53f7bc3fa4e238ad86786c9253d6f77",
        ),
        Task(
            name="aime25",
            path="opencompass/AIME2025",
            files=("aime2025-I.jsonl", "aime2025-II.jsonl"),
            num_problems=30,
            answers_sha256="4d54cb1dd8772598e9da163fbe008d88e5c7dbe040fe7dec56da571158fa94ba",
        ),
        Task(
            name="amc23",
            path="AI-MO/aimo-validation-amc",
            files=("data/train-*.parquet",),
            url_part="2023",
            num_problems=40,
            answers_sha256="ad3d7d5e94fd317d9519461a6d3a0310e1690508d0b8de869d4e233810cb9bab",
        ),
        Task(
            name="math500",
            path="HuggingFaceH4/MATH-500",
            revision="ff5b20257d8185524591543f8ff5993951537bb8",
            files=("test.jsonl",),
            answer="answer",
            num_problems=500,
            answers_sha256="428c541fbd205e654ef8545102868cac794c36d3522ceec06fbfee46e177308a",
        ),
        Task(
            name="olympiadbench",
            path="Hothan/OlympiadBench",
            files=("OE_TO_maths_en_COMP/*.parquet",),
            answer="final_answer",
            num_problems=675,
            answers_sha256="081b5ac883a48f0fb10f9765594dd93edcdd9bbbe7dde33fc437595e5c6e6074",
        ),
        Task(
            name="gsm8k",
            path="openai/gsm8k",
            files=("main/test-*.parquet",),
            max_new_tokens=2048,
            num_problems=1319,
            answers_sha256="481051cdce47143863487ebd812287638c709dd09c1d4bf6b2d4349b276ff8d5",
        ),
        Task(
            name="livecodebench",  # release_v2, May 2023 to May 2024
            path="livecodebench/code_generation_lite",
            revision="356356a5c3a6baf7748838d82c5c36c62235ca50",
            files=("test.jsonl", "test2.jsonl"),
            num_problems=511,
        ),
    )
}


def find_task(asked: TaskConfig) -> Task:
    """The task that a config asks for: a benchmark, perhaps from another place, or a set of the user's own.

    Raises:
        ConfigError: if there is no benchmark of that name, and no path is given.
    """
    known = TASKS.get(asked.name)
    if known is None and not asked.path:
        raise ConfigError(
            f'tasks: "{asked.name}" is no benchmark{nearest(asked.name, list(TASKS))}; use {", ".join(TASKS)}, or give a path'
        )
    own = {"path": asked.path, "files": tuple(asked.files), "revision": asked.revision or "main"} if asked.path else {}
    named = {"question": asked.question, "answer": asked.answer, "template": asked.template, "grader": asked.grader}
    return replace(known or Task(name=asked.name, path=asked.path), **own, **{name: value for name, value in named.items() if value})


def load_task(task: Task, data_dir: str = "") -> LoadedTask:
    """Read the problems of a task.

    Raises:
        ConfigError: if its file does not exist, or two of its problems have the same id.
        DataError: listing the rows that are no problems, or if there are more or fewer than the released version has.
        FetchError: if it cannot be fetched.
    """
    files, origin = _files_of(task, data_dir)
    problems, bad = [], []
    for number, (source, row) in enumerate(_rows_of(files, task)):
        try:
            if isinstance(row, Rejected):
                raise BadRow(row.reason)
            problems.append(replace(read_problem(row, number, task.question, task.answer), grader=task.grader))
        except BadRow as error:
            bad.append(f"{source}: {error}")
    if bad:
        raise DataError("\n".join([*bad[:SHOWN_BAD_ROWS], *([f"and {len(bad) - SHOWN_BAD_ROWS} more"] if bad[SHOWN_BAD_ROWS:] else [])]))
    _check(task, problems, origin)
    loaded = LoadedTask(task=task, problems=tuple(problems), origin=origin, answers_sha256=_answers_sha256(problems))
    if loaded.is_released is False:
        log.warning("%s: %s has other answers than the released version; the results are not those of the benchmark", task.name, origin)
    return loaded


def _files_of(task: Task, data_dir: str) -> tuple[list[str], str]:
    """The files to read, and what to call them."""
    for suffix in SUFFIXES:
        local = Path(data_dir).expanduser() / f"{task.name}{suffix}"
        if data_dir and local.is_file():
            return [str(local)], str(local)
    if not task.files:
        return [task.path], task.path
    try:
        snapshot = find_snapshot(task.path, task.revision, kinds=("dataset",), patterns=task.files)
    except FetchError as error:
        raise FetchError(f"{task.name}: {error}; or put {task.name}.jsonl into a directory and name that by data_dir=DIR") from error
    found = [path for pattern in task.files for path in sorted(snapshot.directory.glob(pattern))]
    return [str(path) for path in found], f"{task.path}@{snapshot.commit}"


def _rows_of(files: list[str], task: Task) -> Iterator[tuple[str, Any]]:
    for path in files:
        for row in read_rows(DataSource(path=path), f"tasks: {task.name}", fields=()):
            if isinstance(row, Rejected):
                yield row.source, row
            elif not task.url_part or not isinstance(row.value, dict) or task.url_part in str(row.value.get("url", task.url_part)):
                yield row.source, row.value


def _check(task: Task, problems: list[Problem], origin: str) -> None:
    if task.num_problems and len(problems) != task.num_problems:
        raise DataError(
            f"{task.name}: {origin} has {len(problems)} problems, the released version {task.num_problems};"
            " for a set of your own give its path, or another name"
        )
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ConfigError(f'tasks: {task.name}: two problems of {origin} have the id "{problem.id}"; give each its own')
        seen.add(problem.id)


def _answers_sha256(problems: list[Problem]) -> str:
    """Hash of all answers, or of the tests where there are no answers, in an order of their own: sources list problems differently."""
    answers = [problem.gold or json.dumps([[test.input, test.output] for test in problem.tests]) for problem in problems]
    return hashlib.sha256(json.dumps(sorted(answers)).encode()).hexdigest()
