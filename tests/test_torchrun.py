"""A run under torchrun that is killed again and again carries on by itself and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from structcot.checkpoint import complete_checkpoints, read_state
from tests.ranks import train_on_ranks
from tests.tiny_run import DONE, ROOT, TINY_CONFIG, Site, adapter_of, metrics_of

NUM_KILLS, NUM_RANKS = 20, 2
LONG = ["train.max_steps=160", "checkpoint.save_steps=2", "log.eval_steps=40", "train.dtype=float32"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_twenty_times_ends_as_an_undisturbed_one(site: Site, tmp_path: Path) -> None:
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    assert {outcome.status for outcome in train_on_ranks(site, NUM_RANKS, site.overrides(undisturbed, *LONG), seconds=240)} == {DONE}
    launch = ("-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", f"--max-restarts={2 * NUM_KILLS}", "--monitor-interval=0.1")
    command = [sys.executable, *launch, "-m", "structcot.train", str(TINY_CONFIG), *site.overrides(run_dir, *LONG)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, **site.environment, "PYTHONPATH": paths}, stdout=file, stderr=file)
    chance = random.Random(0)
    for _ in range(NUM_KILLS):
        wait_for_a_new_checkpoint(process, run_dir, log)
        time.sleep(chance.uniform(0.0, 0.4))
        ranks = children_of(process.pid)
        victims = ranks if chance.random() < 0.3 else [chance.choice(ranks)] if ranks else []
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):  # it may just have ended
                os.kill(victim, number)
        for path in complete_checkpoints(run_dir / "checkpoints"):
            read_state(path)
    assert process.wait(timeout=300) == DONE, log.read_text()[-3000:]
    assert metrics_of(run_dir) == metrics_of(undisturbed)
    assert adapter_of(run_dir) == adapter_of(undisturbed)


def wait_for_a_new_checkpoint(process: subprocess.Popen[bytes], run_dir: Path, log: Path) -> None:
    before, deadline = newest(run_dir), time.monotonic() + 90
    while newest(run_dir) == before:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, "no step for 90 s"
        time.sleep(0.02)


def newest(run_dir: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        return complete_checkpoints(run_dir / "checkpoints")[0].name
    return ""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
