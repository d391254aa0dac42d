"""A curation with a real model behind a real server: SmolLM2 by `transformers serve`, fifty problems of GSM8K, four answers each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from structcot.answers import answer_of
from structcot.curate.asking import ANSWERS
from structcot.curate.stages import read_records
from structcot.errors import FetchError
from structcot.fetch import fetch
from structcot.grading.case import Case
from structcot.grading.graders import GRADERS
from structcot.tags import read_answer
from tests.real_server import real_server

GSM8K = Path(__file__).parent.parent.parent / "shared" / "data" / "benchmarks" / "gsm8k.jsonl"
NUM_PROBLEMS, NUM_SAMPLES, NUM_KILLS = 50, 4, 5

pytestmark = pytest.mark.slow


@pytest.mark.timeout(3600)
def test_right_answers_of_a_real_model_are_kept_though_the_curation_is_killed_five_times(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip("the benchmark files are not at hand (../shared/data/benchmarks)")
    try:
        model_dir = fetch("smollm2-135m")
    except FetchError as error:
        pytest.skip(f"the small model cannot be fetched: {error}")
    path = tmp_path / "curate.toml"
    with real_server(model_dir, tmp_path / "server.log") as server:
        path.write_text(
            f"""title = "GSM8K by a small model"
output_dir = "{tmp_path / "out"}"
[[sources]]
name = "gsm8k"
path = "{GSM8K}"
limit = {NUM_PROBLEMS}
[contamination]
benchmarks = ["aime24", "amc23", "math500"]
data_dir = "{GSM8K.parent}"
[teacher]
url = "{server.url}"
model = "{server.model}"
samples = {NUM_SAMPLES}
temperature = 0.7
max_tokens = 160
concurrency = 8
[reformat]
untagged = "last-paragraph"
[select]
per_problem = {NUM_SAMPLES}
"""
        )
        answers = tmp_path / "out" / "stages" / "4-sample" / ANSWERS
        rng = Random(3)
        for kill in range(NUM_KILLS):
            process = start(path)
            wait_for(answers, (kill + 1) * 30 + rng.randrange(10), process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        begun = time.monotonic()
        process = start(path)
        assert process.wait() == 0
        print(f"the rest took {time.monotonic() - begun:.0f} s")
    keys = Counter(json.loads(line)["key"] for line in answers.read_text().splitlines())
    assert len(keys) == NUM_PROBLEMS * NUM_SAMPLES
    assert set(keys.values()) == {1}, "no answer was paid for twice"
    made = [one for shard in sorted((tmp_path / "out" / "data").glob("*.jsonl")) for one in read_records(shard)]
    print(f"{len(made)} of {len(keys)} answers are right by both graders")
    assert made
    for one in made:
        answer = read_answer(one["messages"][-1]["content"])
        assert not answer.defect
        case = Case(gold=one["gold"], response=answer.text, pred=answer_of(answer) or None)
        assert GRADERS["math"](case).correct
        assert one["provenance"]["verdicts"] == {"math": "correct", "paper": "correct"}


def start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "structcot.curate", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for(answers: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while (not answers.is_file() or answers.read_bytes().count(b"\n") < count) and process.poll() is None:
        time.sleep(0.05)
