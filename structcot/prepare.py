"""Everything that a run knows before its first step: model directory, tokenizer, samples and the plan of every step.

Run as `python -m structcot.prepare CONFIG`, or `structcot prepare CONFIG`, to see and check the data without training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from structcot.checkpoint import need_same_run
from structcot.config import Config
from structcot.console import say
from structcot.data.plan import StepPlan, imbalance, make_plan
from structcot.data.render import load_tokenizer
from structcot.data.samples import PreparedData, length_histogram, prepare_samples, write_data_files
from structcot.distributed import num_processes
from structcot.errors import ConfigError
from structcot.fetch import resolve_model
from structcot.files import write_json
from structcot.model.spec import ModelSpec, read_spec
from structcot.rundir import write_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Where the model lies, its shape and tokenizer, the samples, and which of them make which step (numbers into `data.train_indices`).

    `hashes` are the sha256 of what went in, by name; `identity` is what decides what is learned, of the config and of the data.
    """

    model_dir: Path
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    data: PreparedData
    plan: StepPlan
    hashes: dict[str, str]
    identity: dict[str, Any]


def prepare(config: Config, should_stop: Callable[[], bool], *, writes: bool = True) -> Prepared:
    """Read, render, check and plan the data of `config`, and write config.toml and data/ into its output directory.

    Of the ranks of a run one writes, and the others only read what it has prepared.

    Raises:
        DataError: listing every bad record.
        MismatchError: if the output directory holds checkpoints of another run; nothing is written then.
        ConfigError, ModelError, FetchError: if a path, the model or a setting is wrong.
        Interrupted: if `should_stop` said so between chunks of records.
    """
    model_dir = resolve_model(config.model_name_or_path, config.revision)
    spec = read_spec(model_dir)
    tokenizer = load_tokenizer(model_dir)
    output_dir = Path(config.output_dir)
    data = prepare_samples(config, tokenizer, model_dir, should_stop)
    for warning in data.warnings:
        say(f"note: {warning}")
    plan = plan_steps(config, data)
    _need_room_for_longest(config, data)
    identity = {**config.identity(), **{f"sha256 of the {name}": sha256 for name, sha256 in data.train.sha256.items()}}
    if writes:
        need_same_run(output_dir / "checkpoints", identity)
        write_config(config, output_dir)
        write_data_files(output_dir, data, tokenizer, config)
        write_json(output_dir / "data" / "plan.json", plan_facts(config, spec, data, plan))
    hashes = {
        **data.train.sha256,
        "plan": plan.sha256,
        "config": config.sha256,
    }
    return Prepared(model_dir=model_dir, spec=spec, tokenizer=tokenizer, data=data, plan=plan, hashes=hashes, identity=identity)


def plan_steps(config: Config, data: PreparedData) -> StepPlan:
    """Which samples make which step; a source with a weight is visited that many times in an epoch."""
    weights_S = np.array([source.weight for source in config.data.train])[data.train.origins_S[data.train_indices]]
    return make_plan(data.lengths_S, config.train, config.seed, None if (weights_S == 1.0).all() else weights_S)


def plan_facts(config: Config, spec: ModelSpec, data: PreparedData, plan: StepPlan) -> dict[str, object]:
    """What plan.json says: counts of samples and tokens, steps, and how evenly they lie over this number of ranks and over others."""
    degree, max_tokens = config.parallel.sequence, config.parallel.max_tokens_per_microbatch

    def evenness(ranks: int) -> float:
        shares = max(1, ranks // degree)
        return imbalance(plan, num_ranks=shares, max_tokens=max_tokens * degree, attention_ratio=spec.attention_ratio)

    return {
        **data.summary(),
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "imbalance": evenness(num_processes()),
        "imbalance_by_ranks": {str(ranks): evenness(ranks) for ranks in (1, 2, 4, 8, 16)},
        "hash": plan.sha256,
        "length_histogram": length_histogram(data.lengths_S),
    }


def _need_room_for_longest(config: Config, data: PreparedData) -> None:
    lengths = [int(data.lengths_S.max())]
    if data.eval is not None:
        lengths.append(int(data.eval.lengths_S[data.eval_indices].max()))
    parallel = config.parallel
    if max(lengths) > parallel.max_tokens_per_microbatch * parallel.sequence:
        ranks = f" on each of {parallel.sequence} ranks" if parallel.sequence > 1 else ""
        raise ConfigError(
            f"parallel.max_tokens_per_microbatch: got {parallel.max_tokens_per_microbatch}{ranks}, but the longest sample has"
            f" {max(lengths)} tokens and none is cut; raise it to {-(-max(lengths) // parallel.sequence)}, let more ranks share a document"
            ' (parallel.sequence), or lower data.max_length with data.overlong = "drop"'
        )


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("prepare")
