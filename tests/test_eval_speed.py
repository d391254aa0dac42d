"""How long an evaluation takes on a laptop: the embedded model, twenty problems of GSM8K, one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_problems_of_gsm8k_take_less_than_five_minutes(tmp_path: Path) -> None:
    if not (BENCHMARKS / "gsm8k.jsonl").is_file():
        pytest.skip("the benchmark files are not at hand (../shared/data/benchmarks)")
    fetch = [sys.executable, "-m", "structcot.fetch", "smollm2-135m"]
    fetched = subprocess.run(fetch, capture_output=True, text=True, cwd=ROOT, check=False)
    if fetched.returncode:
        pytest.skip(f"the embedded model cannot be fetched: {fetched.stderr.strip()}")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = ["structcot.eval", "--model", "smollm2-135m", "--tasks", "gsm8k", "--limit", "20", "--output-dir", str(tmp_path / "out")]
    start_seconds = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command, f"data_dir={BENCHMARKS}"], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    seconds = time.monotonic() - start_seconds
    assert done.returncode == 0, done.stderr
    assert seconds < 300
    assert "20/20" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert all(line["verdict"] and line["reason"] for line in lines)
