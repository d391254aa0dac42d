"""Whatever happens to one rank, all ranks end soon, with a message and a status that is not zero, and the last checkpoint stands."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from structcot.checkpoint import complete_checkpoints
from tests import ranks
from tests.one_step import REORDERED, relative_error
from tests.ranks import train_on_ranks
from tests.tiny_run import DONE, FAILED, NUM_STEPS, STOPPED, WRONG, Site, adapter_of, checkpoints_of, copy_run, fill_disk_at, metrics_of

KILLED = -signal.SIGKILL
TWO = ["checkpoint.save_steps=2", "log.eval_steps=4", "train.dtype=float32"]


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Path:
    """A run of two ranks."""
    run_dir = site.directory / "two-ranks"
    outcomes = train_on_ranks(site, 2, site.overrides(run_dir, *TWO))
    assert [outcome.status for outcome in outcomes] == [DONE, DONE], outcomes[0].err
    return run_dir


def go_on(site: Site, run_dir: Path, undisturbed: Path) -> None:
    """The same command ends as the undisturbed run did, bit for bit."""
    assert {outcome.status for outcome in train_on_ranks(site, 2, site.overrides(run_dir, *TWO))} == {DONE}
    assert metrics_of(run_dir) == metrics_of(undisturbed)
    assert adapter_of(run_dir) == adapter_of(undisturbed)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_other_and_loses_nothing_that_was_complete(rank: int, site: Site, undisturbed: Path, tmp_path: Path) -> None:
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "run", *TWO), {rank: (ranks.kill_in_step, 6)})
    assert outcomes[rank].status == KILLED
    assert outcomes[1 - rank].status == FAILED
    assert "another rank has ended or does not answer" in outcomes[1 - rank].message
    assert checkpoints_of(tmp_path / "run")[-1] >= "step-000004"
    go_on(site, tmp_path / "run", undisturbed)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_all_after_a_complete_checkpoint(rank: int, site: Site, undisturbed: Path, tmp_path: Path) -> None:
    trouble = {rank: (ranks.kill_in_step, 4, signal.SIGTERM)}
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "run", *TWO), trouble)
    assert [outcome.status for outcome in outcomes] == [STOPPED, STOPPED], outcomes[0].err
    assert f"stopped by SIGTERM after step 4 of {NUM_STEPS}" in outcomes[0].message
    assert "structcot:" not in outcomes[1].err, "one message is enough"
    assert checkpoints_of(tmp_path / "run")[-1] == "step-000004"
    go_on(site, tmp_path / "run", undisturbed)


def test_a_full_disk_on_one_rank_stops_all(site: Site, undisturbed: Path, tmp_path: Path) -> None:
    trouble = {1: (fill_disk_at, "tmp-step-000006", 1, 1000)}
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "run", *TWO), trouble)
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    assert "step-000006: the checkpoint cannot be written: " in outcomes[0].message
    assert "File too large" in outcomes[0].message
    assert checkpoints_of(tmp_path / "run")[-1] == "step-000004"
    go_on(site, tmp_path / "run", undisturbed)


def test_a_rank_that_hangs_is_found_within_the_time_allowed_and_all_stacks_are_told(site: Site, undisturbed: Path, tmp_path: Path) -> None:
    start_seconds = time.monotonic()
    overrides = site.overrides(tmp_path / "run", *TWO, "parallel.hang_seconds=6")
    outcomes = train_on_ranks(site, 2, overrides, {1: (ranks.hang_in_step, 5)})
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    assert time.monotonic() - start_seconds < 40
    for rank, outcome in enumerate(outcomes):
        stack = (tmp_path / "run" / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert f"rank {rank} has made no progress for 6 s; it was" in outcome.err
        assert stack in outcome.err
    assert re.search(r"hanging", outcomes[1].err), "the function that hangs is in the stack"
    assert "all_reduce" in outcomes[0].err, "the other one waits for it"
    go_on(site, tmp_path / "run", undisturbed)


def test_a_loss_that_is_no_number_on_one_rank_stops_all_and_its_records_are_named(site: Site, undisturbed: Path, tmp_path: Path) -> None:
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "run", *TWO), {1: (ranks.nan_in_step, 5)})
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    assert re.search(r"step 5: the loss is nan .* Records with a non-finite loss: \S*train\.jsonl:\d+", outcomes[0].message)
    assert "structcot:" not in outcomes[1].err
    go_on(site, tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.shard=3", "parallel: got shard = 3 and replicate = 1 for 2 processes"),
        ("parallel.sequence=4", "parallel.sequence: got 4 for 2 processes"),
        ("data.max_length=20", "tokens"),
    ],
)
def test_what_the_user_can_mend_is_said_once_and_ends_all_ranks(override: str, message: str, site: Site, tmp_path: Path) -> None:
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "run", override))
    assert [outcome.status for outcome in outcomes] == [WRONG, WRONG]
    assert message in outcomes[0].message
    assert not complete_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("others", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(others: int, site: Site, tmp_path: Path) -> None:
    more = [*TWO, "train.max_steps=8"]
    assert {one.status for one in train_on_ranks(site, 4, site.overrides(tmp_path / "whole", *more))} == {DONE}
    stop = {2: (ranks.kill_in_step, 5, signal.SIGTERM)}
    assert {one.status for one in train_on_ranks(site, 4, site.overrides(tmp_path / "run", *more), stop)} == {STOPPED}
    copy_run(tmp_path / "run", tmp_path / "copy")
    assert {one.status for one in train_on_ranks(site, others, site.overrides(tmp_path / "copy", *more))} == {DONE}
    whole, moved = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "copy")
    exact = ("step", "epoch", "train/num_tokens", "data/step_tokens", "data/step_supervised_tokens")
    assert [[line[key] for key in exact] for line in moved] == [[line[key] for key in exact] for line in whole]
    assert [line["train/loss"] for line in moved] == pytest.approx([line["train/loss"] for line in whole], rel=1e-5)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_fails_alone_in_an_evaluation_ends_the_other_at_once(rank: int, site: Site, undisturbed: Path, tmp_path: Path) -> None:
    start_seconds = time.monotonic()
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "run", *TWO), {rank: (ranks.fail_in_evaluation,)})
    assert time.monotonic() - start_seconds < 30
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    assert "RuntimeError: out of memory" in outcomes[rank].err
    assert "another rank has ended or does not answer" in outcomes[1 - rank].message
    go_on(site, tmp_path / "run", undisturbed)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_while_data_is_rendered_ends_all_with_the_same_status(rank: int, site: Site, tmp_path: Path) -> None:
    own = Site(tmp_path / "site")  # whose cache is empty
    shutil.copytree(site.model_dir, own.model_dir)
    shutil.copy(site.data_path, own.data_path)
    overrides = own.overrides(tmp_path / "run", *TWO)
    trouble = {rank: (ranks.signal_in_prepare, signal.SIGTERM)}
    outcomes = train_on_ranks(own, 2, overrides, trouble)
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    assert outcomes[0].message == "stopped by SIGTERM before the first step; the same command starts again"
    train_on_ranks(own, 2, overrides, {0: (ranks.kill_in_step, 4, signal.SIGTERM)})
    shutil.rmtree(own.directory / "cache")
    outcomes = train_on_ranks(own, 2, overrides, trouble)
    assert [outcome.status for outcome in outcomes] == [STOPPED, STOPPED]
    assert "stopped by SIGTERM before the next step" in outcomes[0].message
    assert outcomes[1].err == ""


def test_the_adapter_of_four_ranks_is_that_of_one(site: Site, tmp_path: Path) -> None:
    more = ["train.dtype=float32", "train.max_steps=4"]
    assert site.train(tmp_path / "one", *more).status == DONE
    assert {outcome.status for outcome in train_on_ranks(site, 4, site.overrides(tmp_path / "four", *more, "parallel.sequence=2"))} == {
        DONE
    }
    one, four = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "four"))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in four.items()}
    moved = {name: relative_error(four[name], one[name]) for name in one}
    assert max(moved.values()) <= REORDERED, moved
    assert json.loads((tmp_path / "four" / "adapter" / "certificate.json").read_text())["passed"]
    configs = [json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text()) for name in ("one", "four")]
    assert configs[0] == configs[1]
