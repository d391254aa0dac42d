"""A curation with a real model behind a real server: SmolLM2 by `transformers serve`, fifty problems of GSM8K, four answers each.

What a server samples depends on what else it is asked at the time, so the second run of two could not be compared with the first. A relay
stands between: it asks the real server once for each request, and gives who repeats it the same answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
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
from tests.faulty_server import Exchange, FaultyServer
from tests.real_server import real_server
from tests.test_curate_run import outcome_of

GSM8K = Path(__file__).parent.parent.parent / "shared" / "data" / "benchmarks" / "gsm8k.jsonl"
NUM_PROBLEMS, NUM_SAMPLES, NUM_KILLS, CONCURRENCY = 50, 4, 5, 8

pytestmark = pytest.mark.slow


class Relay:
    """Passes requests on to a server; one that was there before gets the answer of that time. `times` counts each."""

    def __init__(self, url: str):
        self.url = url
        self.times: Counter[str] = Counter()
        self._answers: dict[str, bytes] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def __call__(self, exchange: Exchange) -> None:
        asked = json.dumps(exchange.body, sort_keys=True)
        self.times[asked] += 1
        with self._locks[asked]:  # asked again while the first is under way, as after a kill, it waits for that answer
            if asked not in self._answers:
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(f"{self.url}/chat/completions", asked.encode(), headers)
                with urllib.request.urlopen(request, timeout=600) as answer:
                    self._answers[asked] = answer.read()
        exchange.send(200, self._answers[asked])


@pytest.mark.timeout(3600)
def test_right_answers_of_a_real_model_are_kept_though_the_curation_is_killed_five_times(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip("the benchmark files are not at hand (../shared/data/benchmarks)")
    try:
        model_dir = fetch("smollm2-135m")
    except FetchError as error:
        pytest.skip(f"the small model cannot be fetched: {error}")
    path = tmp_path / "curate.toml"
    with real_server(model_dir, tmp_path / "server.log") as server, FaultyServer(relay := Relay(server.url)) as front:
        path.write_text(config_text(front.url, server.model, tmp_path / "out"))
        answers = tmp_path / "out" / "stages" / "4-sample" / ANSWERS
        rng = Random(3)
        for kill in range(NUM_KILLS):
            process = start(path)
            wait_for(answers, (kill + 1) * 30 + rng.randrange(10), process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert start(path).wait() == 0
        times = relay.times.copy()
        begun = time.monotonic()
        assert start(path, f'output_dir="{tmp_path / "undisturbed"}"').wait() == 0
        print(f"the undisturbed run took {time.monotonic() - begun:.0f} s, no answer of it made anew")
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "undisturbed")
    assert len(times) == NUM_PROBLEMS * NUM_SAMPLES
    assert times.keys() == relay.times.keys()
    print(f"{sum(times.values()) - len(times)} of {len(times)} requests were in flight at one of {NUM_KILLS} kills")
    assert sum(times.values()) - len(times) <= NUM_KILLS * CONCURRENCY, "only what was in flight at a kill was asked again"
    keys = Counter(json.loads(line)["key"] for line in answers.read_text().splitlines())
    assert set(keys.values()) == {1}, "no answer was written twice"
    made = [one for shard in sorted((tmp_path / "out" / "data").glob("*.jsonl")) for one in read_records(shard)]
    print(f"{len(made)} of {len(keys)} answers are right by both graders")
    assert made
    for one in made:
        answer = read_answer(one["messages"][-1]["content"])
        assert not answer.defect
        case = Case(gold=one["gold"], response=answer.text, pred=answer_of(answer) or None)
        assert GRADERS["math"](case).correct
        assert one["provenance"]["verdicts"] == {"math": "correct", "paper": "correct"}


def config_text(url: str, model: str, output_dir: Path) -> str:
    return f"""title = "GSM8K by a small model"
output_dir = "{output_dir}"
[[sources]]
name = "gsm8k"
path = "{GSM8K}"
limit = {NUM_PROBLEMS}
[contamination]
benchmarks = ["aime24", "amc23", "math500"]
data_dir = "{GSM8K.parent}"
[teacher]
url = "{url}"
model = "{model}"
samples = {NUM_SAMPLES}
temperature = 0.7
max_tokens = 160
concurrency = {CONCURRENCY}
[reformat]
untagged = "last-paragraph"
[select]
per_problem = {NUM_SAMPLES}
"""


def start(path: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "structcot.curate", str(path), *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for(answers: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while (not answers.is_file() or answers.read_bytes().count(b"\n") < count) and process.poll() is None:
        time.sleep(0.05)
