"""A million short problems through deduplication, decontamination and the mix on two cores: minutes, and memory that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from structcot.curate.config import CurateConfig, DuplicatesConfig, ScaleConfig, TeacherConfig
from structcot.curate.config import SourceConfig as Source
from structcot.curate.contamination import Benchmarks, decontaminate
from structcot.curate.duplicates import deduplicate
from structcot.curate.mix import mix
from structcot.curate.prompts import collect
from structcot.curate.stages import Done, Record, Stage, StageFiles, run_stage
from tests.test_curate_problems import reworded, word_problem

NUM_RECORDS, LONGEST_SECONDS, MOST_BYTES = 1_000_000, 900, 2 << 30


def resident_bytes(pid: int) -> int:
    """The memory of a process and all that it has started."""
    listed = subprocess.run(["ps", "-o", "pid=,ppid=,rss=", "-e"], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
    own, total, grown = {pid}, 0, True
    while grown:
        grown = False
        for child, parent, _ in rows:
            if parent in own and child not in own:
                own.add(child)
                grown = True
    for one, _, kib in rows:
        total += kib * 1024 if one in own else 0
    return total


class Watch:
    """The most memory that this process and its children held together, looked at twice a second."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            self.most = max(self.most, resident_bytes(os.getpid()))


def answered(records: Iterator[Record], files: StageFiles) -> None:
    """Stands in for the teacher and the checks: every problem has an answer."""
    facts = {"step_types": {}, "steps": 1, "words": 3, "keywords": {"paper": 0}, "branches": 0}
    for record in records:
        files.keep(
            {
                **record,
                "sample": 0,
                "asked": record["question"],
                "text": "t",
                "completion_tokens": 3,
                "reformatted": "rule",
                "metrics": facts,
            }
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_short_records_take_minutes_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    made = "from tests.test_curate_speed import write_problems; import sys; write_problems(sys.argv[1])"
    subprocess.run([sys.executable, "-c", made, str(path)], check=True)  # in a process of its own: its memory is not ours
    source = Source(name="made", path=str(path))
    config = CurateConfig(title="speed", output_dir=str(tmp_path), sources=[source], teacher=TeacherConfig(url="http://x", model="m"))
    benchmarks = Benchmarks(words=8, share=0.5)
    rng = Random(99)
    for number in range(3000):
        benchmarks.add(f"made/{number}", word_problem(rng))
    works = {
        "prompts": lambda _, files: collect([source], files),
        "dup": partial(deduplicate, DuplicatesConfig(), ScaleConfig()),
        "clean": partial(decontaminate, benchmarks),
        "answered": answered,
        "mix": partial(mix, config),
    }
    done: Done | None = None
    start = time.monotonic()
    with Watch() as watch:
        for name, work in works.items():
            begun = time.monotonic()
            done = run_stage(Stage(name=name, facts={}, work=work), tmp_path / name, done)
            print(f"{name}: {time.monotonic() - begun:.0f} s, {done.num_kept:,} kept, {watch.most / 2**30:.2f} GiB so far")
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} s, {watch.most / 2**30:.2f} GiB")
    assert seconds <= LONGEST_SECONDS
    assert watch.most <= MOST_BYTES
    assert done is not None
    assert done.num_kept > 0.95 * NUM_RECORDS


def write_problems(to: str) -> None:
    """A million problems, every hundredth of them reworded from one before."""
    rng = Random(7)
    with Path(to).open("w", encoding="utf-8") as file:
        text = word_problem(rng)
        for number in range(NUM_RECORDS):
            text = reworded(text, rng) if number % 100 == 99 else word_problem(rng)
            file.write(json.dumps({"question": text, "answer": "1"}) + "\n")
