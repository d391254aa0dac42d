"""A cheap proxy of training: how likely a model finds demonstrations that it was not trained on.

A model that was trained on demonstrations as they are reads perturbed ones, and one that was trained on perturbed ones reads them as they
are. Both are measured on demonstrations that no variant was trained on, in nats per supervised token, with the tokens, masks and kinds of
training.

Legend: T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from structcot.config import Config, DataSource
from structcot.config_file import load_config
from structcot.data.render import IGNORE, RenderedSample, load_tokenizer
from structcot.data.samples import prepare_samples
from structcot.device import choose_device
from structcot.errors import ModelError
from structcot.eval.config import EvalConfig, TaskConfig
from structcot.eval.embedded import load_model, merge_adapter
from structcot.eval.subject import find_subject
from structcot.files import json_sha256, write_json
from structcot.study.cells import Cell, content_hash
from structcot.study.finished import Finished

LOSSES = "losses.json"
TOKENS_AT_ONCE = 1024


def measure_losses(done: Sequence[Finished], reference: str) -> dict[str, float]:
    """The mean loss of the reference of its setting and seed on the held-out demonstrations of each cell, perturbed as its data; by name.

    What was measured before is kept in losses.json of the cell, as long as neither the reference nor the demonstrations are others.

    Raises:
        StructcotError: if a run or its demonstrations cannot be read.
    """
    references = {(one.cell.setting, one.cell.seed): one.cell for one in done if one.cell.variant == reference}
    measured: dict[str, float] = {}
    for place, trained in references.items():
        cells = [one.cell for one in done if (one.cell.setting, one.cell.seed) == place and _has_held_out(one.cell)]
        keys = {cell.name: json_sha256([learned_sha256(trained), content_hash(held_out_of(cell))]) for cell in cells}
        known = {cell.name: loss for cell in cells if (loss := _kept(cell, keys[cell.name])) is not None}
        missing = [cell for cell in cells if cell.name not in known]
        losses = run_losses(trained.directory / "run", [held_out_of(cell) for cell in missing])
        for cell, loss in zip(missing, losses, strict=True):
            write_json(cell.directory / LOSSES, {"key": keys[cell.name], "loss": loss})
            known[cell.name] = loss
        measured |= known
    return measured


def run_losses(run: Path, files: Sequence[Path]) -> list[float]:
    """Mean loss of what a finished run has learned on each file of demonstrations, over its supervised tokens.

    Raises:
        ConfigError: if the run is not finished.
        DataError: if the demonstrations cannot be read.
    """
    if not files:
        return []
    config = load_config(run / "config.toml")
    subject = find_subject(EvalConfig(model_name_or_path=str(run), tasks=[TaskConfig(name="losses", path="held_out.jsonl")]))
    model_dir, device = Path(subject.model), choose_device()
    model = load_model(model_dir, getattr(torch, config.train.dtype), device)
    if subject.adapter:
        model = merge_adapter(model, Path(subject.adapter))
    return [mean_loss(model, samples_of(path, config, model_dir), device) for path in files]


def samples_of(demonstrations: Path, config: Config, model_dir: Path) -> list[RenderedSample]:
    """The samples of a file, rendered as those that `config` trains on."""
    data = config.data.model_copy(update={"train": [DataSource(path=str(demonstrations))], "eval": [], "eval_fraction": 0.0})
    prepared = prepare_samples(config.model_copy(update={"data": data}), load_tokenizer(model_dir), model_dir, lambda: False)
    return [prepared.train.sample(int(index)) for index in prepared.train_indices]


@torch.inference_mode()
def mean_loss(model: Any, samples: Iterable[RenderedSample], device: torch.device) -> float:
    """Mean negative log-likelihood of the supervised tokens of all samples together, one sample at a time; summed in fp64.

    Raises:
        ModelError: if the memory of the GPU does not suffice.
    """
    total, num_supervised = 0.0, 0
    for sample in samples:
        tokens_T, labels_T = (torch.from_numpy(array_T.astype(np.int64)).to(device) for array_T in (sample.tokens_T, sample.labels_T))
        try:
            logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]
            # In fp32 the logits of a long sample would need more memory than a small model.
            for some_TV, some_T in zip(logits_TV.split(TOKENS_AT_ONCE), labels_T.split(TOKENS_AT_ONCE), strict=True):
                total += float(torch.nn.functional.cross_entropy(some_TV.float(), some_T, ignore_index=IGNORE, reduction="sum"))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{sample.source}: {len(tokens_T)} tokens are too many for the memory of the GPU; make room there, or hold out shorter ones"
            ) from error
        num_supervised += int((labels_T != IGNORE).sum())
    return total / num_supervised


def held_out_of(cell: Cell) -> Path:
    """Where the held-out demonstrations of a cell lie, perturbed as its data, if there are any."""
    return cell.held_out or cell.directory / "held_out.jsonl"


def _has_held_out(cell: Cell) -> bool:
    """Whether a cell has any; a perturbation may have left all of them out."""
    path = held_out_of(cell)
    return path.is_file() and path.stat().st_size > 0


def learned_sha256(cell: Cell) -> str:
    """Hash of the metrics of a run: two runs that have learned the same have the same losses at every step."""
    with (cell.directory / "run" / "metrics.jsonl").open(encoding="utf-8") as file:
        return json_sha256([json.loads(line).get("train/loss") for line in file])


def _kept(cell: Cell, key: str) -> float | None:
    """What was measured before under this key; None where nothing was, or cannot be read."""
    try:
        record = json.loads((cell.directory / LOSSES).read_text(encoding="utf-8"))
        return float(record["loss"]) if record["key"] == key else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
