"""17,000 records of 16 KB through the commands, timed, with the memory of all their processes together."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from structcot.countdown import DIFFICULTIES, make_demonstrations

NUM_RECORDS, THOUGHT_CHARACTERS = 17_000, 15_300
PERTURB_SECONDS, SEGMENT_SECONDS, PEAK_MIB = 60, 90, 500


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "records.jsonl"
    searches = [one["conversations"][1]["value"] for one in make_demonstrations(num_records=300, seed=0, difficulty=DIFFICULTIES["medium"])]
    thoughts = [text.split("<|begin_of_thought|>")[1].split("<|end_of_thought|>")[0].strip() for text in searches]
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(NUM_RECORDS):
            thought = ""
            while len(thought) < THOUGHT_CHARACTERS:
                thought += rng.choice(thoughts) + "\n\n"
            answer = (
                f"<|begin_of_thought|>\n\n{thought[:THOUGHT_CHARACTERS]}\n\n<|end_of_thought|>\n\n"
                "<|begin_of_solution|>\n\nThe answer is \\boxed{12}.\n\n<|end_of_solution|>"
            )
            turns = [{"from": "user", "value": f"Problem {number}"}, {"from": "assistant", "value": answer}]
            file.write(json.dumps({"id": number, "conversations": turns}) + "\n")
    return path


def private_mib(process: int) -> float:
    """Memory of a process and of all below it, pages shared between them counted once."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    except OSError:  # it has ended
        return 0.0
    own = next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)
    return own + sum(private_mib(int(child)) for child in children)


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a command."""
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, private_mib(process.pid))
            time.sleep(1.0)  # reading it takes time from what is measured
    assert process.returncode == 0
    print(f"{arguments[0]} {arguments[3:]}: {time.perf_counter() - start:.1f} s, {peak:.0f} MiB")
    return time.perf_counter() - start, peak


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["digits", "keywords", "delete", "insert", "shuffle"])
def test_17000_records_of_16_kb_are_perturbed_and_reported_in_a_minute(kind: str, data_set: Path, tmp_path: Path) -> None:
    seconds, mib = run("structcot.perturb", str(data_set), str(tmp_path / "out.jsonl"), "--kind", kind, "--fraction", "0.5")
    assert seconds <= PERTURB_SECONDS
    assert mib <= PEAK_MIB


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_17000_records_of_16_kb_are_segmented_and_measured_in_90_seconds(data_set: Path, tmp_path: Path) -> None:
    seconds, mib = run("structcot.segment", str(data_set), str(tmp_path / "out.jsonl"))
    assert seconds <= SEGMENT_SECONDS
    assert mib <= PEAK_MIB
