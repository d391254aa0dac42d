"""`structcot plan` on a tiny model and its data: what it says, to people and to programs, and how it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from structcot.data.plan import document_costs, spread, waited_cost
from structcot.plan import possible_changes, with_changes
from tests.tiny_models import tiny_config
from tests.tiny_run import DONE, FAILED, TINY_CONFIG, WRONG, Outcome, Site


def plan(site: Site, tmp_path: Path, *more: str) -> Outcome:
    return site.run("plan", str(TINY_CONFIG), *site.overrides(tmp_path / "run"), *more)


def test_a_plan_of_real_data_says_what_the_run_will_do(site: Site, finished_run: Path, tmp_path: Path) -> None:
    outcome = plan(site, tmp_path, "--world-size", "2", "--price", "2.5", "--json", str(tmp_path / "plan.json"))
    assert outcome.status == DONE, outcome.err
    facts = json.loads((tmp_path / "plan.json").read_text())
    ran = json.loads((finished_run / "data" / "plan.json").read_text())
    assert facts["steps"] == ran["steps"]
    assert facts["fits"]
    assert facts["peak_gib"] == pytest.approx(sum(facts["peak_gib_by_kind"].values()))
    assert facts["gpu_hours"] == pytest.approx(2 * facts["finish_hours"])
    assert facts["cost"] == pytest.approx(2.5 * facts["gpu_hours"])
    assert facts["recompute"] == "none"
    for words in ("2 x h100-80gb: fits: peak", f"{ran['samples']} samples of the data", "all-gather of weights", "Nothing here was timed"):
        assert words in outcome.out
    assert not (tmp_path / "run").exists(), "a plan writes nothing"


@pytest.mark.slow
def test_weights_need_not_be_there(site: Site, tmp_path: Path) -> None:
    own = Site(tmp_path / "site")
    own.model_dir.mkdir(parents=True)
    for path in site.model_dir.iterdir():
        if path.suffix != ".safetensors":
            (own.model_dir / path.name).write_bytes(path.read_bytes())
    own.data_path.write_bytes(site.data_path.read_bytes())
    assert plan(own, tmp_path).status == DONE


@pytest.mark.slow
def test_what_does_not_fit_ends_with_1_and_says_what_would(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from structcot import machines

    small = machines.MACHINES["h100-80gb"]
    tight = replace(small, memory_bytes=2.0 * 2**30 + 1e6)
    monkeypatch.setitem(machines.MACHINES, "h100-80gb", tight)
    outcome = plan(site, tmp_path, "--world-size", "1", "--document-tokens", "2048")
    assert outcome.status == FAILED
    assert "does not fit: needs " in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "h100"), '--device: got "h100" (did you mean h100-80gb?); known are'),
        (("--document-tokens", "4096"), "--document-tokens: got 4096, but a micro-batch holds 2048 tokens"),
        (("--world-size", "3", "parallel.replicate=2"), "replicate = 2 for 3 processes"),
        (("parallel.sequence=8",), "which does not divide the model's 4 heads"),
    ],
)
def test_a_wrong_argument_is_one_message(arguments: tuple[str, ...], words: str, site: Site, tmp_path: Path) -> None:
    outcome = plan(site, tmp_path, *arguments)
    assert outcome.status == WRONG
    assert words in outcome.message


def test_changes_that_are_offered_can_be_made() -> None:
    config = tiny_config(tuning={"method": "full"}, parallel={"max_tokens_per_microbatch": 4096})
    offered = possible_changes(config, 8, longest=1000, largest=2048)
    assert ({"parallel.max_tokens_per_microbatch": 2048}, 8) in offered
    assert ({"train.optimizer": "adamw-8bit"}, 8) in offered
    assert ({}, 16) in offered
    for changes, _ in offered:
        values = with_changes(config, changes).model_dump()
        assert all(values[key.split(".")[0]][key.split(".")[1]] == value for key, value in changes.items())
    too_long = [changes for changes, _ in possible_changes(config, 8, longest=3000, largest=2048)]
    assert {"parallel.max_tokens_per_microbatch": 2048} not in too_long, "no document is cut"


@pytest.mark.parametrize("seed", range(4))
def test_ranks_with_short_documents_take_the_shape_of_those_with_a_long_one(seed: int) -> None:
    lengths = [32550] * 7 + np.random.default_rng(seed).integers(500, 6000, 89).tolist()
    bins = spread(range(len(lengths)), lengths, num_ranks=8, max_tokens=32768, attention_ratio=1e-5)
    costs = document_costs(lengths, 1e-5)
    assert waited_cost(bins, costs) / (float(costs.sum()) / 8) < 1.13, "with equal micro-batches it is 1.21 to 1.24"
