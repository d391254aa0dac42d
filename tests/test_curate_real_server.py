"""A curation with a real model behind a real server: SmolLM2 by `transformers serve`, fifty problems of GSM8K, four answers each.

As it comes the model solves none of them (1 of 200 answers to a hundred of the shortest). So it is tuned first, on the reference solutions
of six hundred others: then about one answer in ten is right.

What a server samples depends on what else it is asked at the time, so the second run of two could not be compared with the first. A relay
stands between: it asks the real server once for each request, and gives who repeats it the same answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest

from structcot.answers import answer_of
from structcot.curate.asking import ANSWERS
from structcot.curate.reformat import tagged
from structcot.curate.stages import read_records
from structcot.errors import FetchError
from structcot.eval.prompts import prompt_styles
from structcot.fetch import fetch
from structcot.grading.case import Case
from structcot.grading.graders import GRADERS
from structcot.tags import read_answer
from tests.faulty_server import Exchange, FaultyServer
from tests.real_server import need_packages, real_server
from tests.test_curate_run import outcome_of, wait_for
from tests.tiny_run import read_jsonl, write_jsonl

GSM8K = Path(__file__).parent.parent.parent / "shared" / "data" / "benchmarks" / "gsm8k.jsonl"
NUM_PROBLEMS, NUM_SAMPLES, NUM_KILLS, CONCURRENCY = 50, 4, 5, 8
NUM_DEMONSTRATIONS, TEMPERATURE = 600, 0.5
SERVER_SECONDS = 1800.0

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
    need_packages()  # before the minutes of tuning
    shortest = sorted(read_jsonl(GSM8K), key=lambda row: len(row["question"]) + len(row["answer"]))
    problems = write_jsonl(tmp_path / "problems.jsonl", shortest[:NUM_PROBLEMS])
    model_dir = tuned_model(tmp_path, shortest[NUM_PROBLEMS:][:NUM_DEMONSTRATIONS])
    path = tmp_path / "curate.toml"
    log_path = tmp_path / "server.log"
    with real_server(model_dir, log_path, batches=True) as server, FaultyServer(relay := Relay(server.url)) as front:
        path.write_text(config_text(problems, front.url, server.model, tmp_path / "out"))
        answers = tmp_path / "out" / "stages" / "4-sample" / ANSWERS
        rng = Random(3)
        for kill in range(NUM_KILLS):
            process = start("curate", path)
            wait_for(answers, (kill + 1) * 30 + rng.randrange(10), process, SERVER_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert start("curate", path).wait() == 0
        times = relay.times.copy()
        assert start("curate", path, f'output_dir="{tmp_path / "undisturbed"}"').wait() == 0
    assert outcome_of(tmp_path / "out") == outcome_of(tmp_path / "undisturbed")
    assert len(times) == NUM_PROBLEMS * NUM_SAMPLES
    assert times.keys() == relay.times.keys()
    print(f"{sum(times.values()) - len(times)} of {len(times)} requests were in flight at one of {NUM_KILLS} kills")
    assert sum(times.values()) - len(times) <= NUM_KILLS * CONCURRENCY, "only what was in flight at a kill was asked again"
    keys = Counter(json.loads(line)["key"] for line in answers.read_text().splitlines())
    assert set(keys.values()) == {1}, "no answer was written twice"
    made = [one for shard in sorted((tmp_path / "out" / "data").glob("*.jsonl")) for one in read_records(shard)]
    print(f"{len(made)} of {len(keys)} answers are right by both graders and kept")
    assert made
    assert len({(one["id"], one["messages"][-1]["content"]) for one in made}) == len(made), "no answer twice"
    for one in made:
        answer = read_answer(one["messages"][-1]["content"])
        assert not answer.defect
        case = Case(gold=one["gold"], response=answer.text, pred=answer_of(answer) or None)
        assert GRADERS["math"](case).correct
        assert one["provenance"]["verdicts"] == {"math": "correct", "paper": "correct"}


def tuned_model(directory: Path, rows: list[dict[str, str]]) -> Path:
    """SmolLM2 after one pass over reference solutions in the format of the demonstrations, merged; takes some minutes."""
    try:
        base_dir = fetch("smollm2-135m")
    except FetchError as error:
        pytest.skip(f"the small model cannot be fetched: {error}")
    demonstrations = write_jsonl(directory / "demonstrations.jsonl", [demonstration_of(row) for row in rows])
    config = directory / "train.toml"
    config.write_text(f"""model_name_or_path = "{base_dir}"
output_dir = "{directory / "tuned"}"
[data]
train = ["{demonstrations}"]
max_length = 1024
[tuning]
lora_r = 16
lora_alpha = 32
[train]
batch_sequences = 16
num_train_epochs = 1
learning_rate = 2e-3
[parallel]
max_tokens_per_microbatch = 2048
""")
    assert start("train", config).wait() == 0
    assert start("export", directory / "tuned", "--merge").wait() == 0
    model_dir = directory / "tuned" / "model"
    # The server takes from here whether it samples at all when it batches, from the request only how.
    generation = model_dir / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "do_sample": True, "temperature": TEMPERATURE}))
    return model_dir


def demonstration_of(row: dict[str, str]) -> dict[str, object]:
    """A problem of GSM8K with its reference solution as the thought, without the notes of a calculator."""
    thought, _, gold = re.sub(r"<<[^>]*>>", "", row["answer"]).rpartition("\n#### ")
    asked = prompt_styles()["boxed"].template.replace("{question}", row["question"])
    reply = tagged(thought, f"\\boxed{{{gold}}}")
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]}


def config_text(problems: Path, url: str, model: str, output_dir: Path) -> str:
    return f"""title = "GSM8K by a small model"
output_dir = "{output_dir}"
[[sources]]
name = "gsm8k"
path = "{problems}"
[contamination]
benchmarks = ["aime24", "amc23", "math500"]
data_dir = "{GSM8K.parent}"
[teacher]
url = "{url}"
model = "{model}"
samples = {NUM_SAMPLES}
temperature = {TEMPERATURE}
max_tokens = 200
concurrency = {CONCURRENCY}
[select]
per_problem = {NUM_SAMPLES}
"""


def start(command: str, *arguments: Path | str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", f"structcot.{command}", *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, start_new_session=True)
