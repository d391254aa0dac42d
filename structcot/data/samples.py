"""From a config to samples that are ready to train on, and the files that show what was done.

Every record that cannot be used stops the run here, before any GPU is asked for anything, in one list of `file:line: what is wrong`; with
data.on_bad_record = "skip" the run goes on without them. What was left out is always in OUTPUT/data/rejected.jsonl.

Legend: S samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from structcot.config import Config
from structcot.data.proof import prove
from structcot.data.records import Record, read_records
from structcot.data.rows import Rejected
from structcot.data.store import SampleStore, build_store, default_cache_dir
from structcot.data.turns import default_system_prompt, template_text
from structcot.errors import DataError, ModelError
from structcot.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LISTED_RECORDS = 50
HISTOGRAM_BINS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Samples to train on and to evaluate on.

    `train_indices` are the samples of `train` that are trained on, `eval_indices` those of `eval` that are held out; both in rising order.
    With data.eval_fraction `eval` is the same store as `train`; with nothing held out it is None and `eval_indices` is empty.
    """

    train: SampleStore
    eval: SampleStore | None
    train_indices: np.ndarray
    eval_indices: np.ndarray
    warnings: tuple[str, ...]

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Every record that is not used, of the training and the held-out data."""
        return _rejected(self.train, self.eval)

    @property
    def lengths_S(self) -> np.ndarray:
        """Tokens of each sample that is trained on."""
        return self.train.lengths_S[self.train_indices]

    def summary(self) -> dict[str, int]:
        """Count what is trained on, and what was left out or changed of the training data."""
        counts = self.train.counts
        return {
            "samples": len(self.train_indices),
            "tokens": int(self.lengths_S.sum()),
            "supervised_tokens": int(self.train.supervised_S[self.train_indices].sum()),
            "eval_samples": len(self.eval_indices),
            "dropped": counts.dropped,
            "bad": counts.bad,
            "truncated": counts.truncated,
            "merged_start": counts.merged_start,
            "duplicates": counts.duplicates,
        }


def prepare_samples(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    model_dir: Path,
    should_stop: Callable[[], bool],
    cache_dir: Path | None = None,
) -> PreparedData:
    """Read, render, mask and check all data; the second time it is only opened.

    Raises:
        DataError: listing every bad record, unless they are to be skipped; or if no sample is left.
        ModelError: if the tokenizer gives ids that the model has no row for.
        ConfigError, FetchError, Interrupted: as `build_store`.
    """
    data, cache = config.data, cache_dir or default_cache_dir()
    train = build_store(data.train, data, tokenizer, model_dir, cache, should_stop)
    held_out = build_store(data.eval, data, tokenizer, model_dir, cache, should_stop, "data.eval") if data.eval else None
    rejected = _rejected(train, held_out)
    bad = [record for record in rejected if not record.dropped]
    if bad and data.on_bad_record == "error":
        write_rejected(Path(config.output_dir), rejected)
        raise DataError(_listing(bad, Path(config.output_dir)))
    for key, store in (("data.train", train), ("data.eval", held_out)):
        if store is not None and not len(store):
            write_rejected(Path(config.output_dir), rejected)
            raise DataError(f"{key}: no sample is left of {len(store.rejected)} records; first reason: {_line(store.rejected[0])}")
    train_indices, eval_indices = np.arange(len(train)), np.arange(len(held_out) if held_out else 0)
    if data.eval_fraction:
        train_indices, eval_indices = _hold_out(len(train), data.eval_fraction, config.seed)
        held_out = train
    stores = [train] if held_out is None or held_out is train else [train, held_out]
    return PreparedData(
        train=train,
        eval=held_out,
        train_indices=train_indices,
        eval_indices=eval_indices,
        warnings=tuple(_warnings(stores, tokenizer, model_dir)),
    )


def write_data_files(output_dir: Path, prepared: PreparedData, tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Write OUTPUT/data/rejected.jsonl and OUTPUT/data/proof.json, the proof of the sample of median length.

    Raises:
        DataError: if that sample is not what the tokenizer's own rendering of its record gives.
    """
    write_rejected(output_dir, prepared.rejected)
    by_length = prepared.train_indices[np.argsort(prepared.lengths_S, kind="stable")]
    index = int(by_length[(len(by_length) - 1) // 2])
    sample = prepared.train.sample(index)
    source = config.data.train[prepared.train.origins_S[index]]
    for record in read_records(source, config.data.format, config.data.system_prompt):
        if isinstance(record, Record) and record.source == sample.source:
            proof = prove(sample, record, tokenizer, config.data)
            write_text(output_dir / "data" / "proof.json", json.dumps(proof, ensure_ascii=False, indent=1))
            return
    raise DataError(f"{sample.source}: is no longer there; did the data change meanwhile? Run the command again")


def write_rejected(output_dir: Path, rejected: Sequence[Rejected]) -> None:
    """Write OUTPUT/data/rejected.jsonl: place, reason and, where known, tokens of every record that is not used."""
    lines = [{"source": record.source, "reason": record.reason, "tokens": record.tokens} for record in rejected]
    directory = output_dir / "data"
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "rejected.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def length_histogram(lengths_S: np.ndarray) -> dict[str, list[int]]:
    """Count samples by length: `samples[i]` of them have at least `edges_tokens[i]` and fewer than `edges_tokens[i + 1]` tokens."""
    longest = int(lengths_S.max(initial=1))
    width = -(-(longest + 1) // HISTOGRAM_BINS)
    edges = np.arange(0, longest + width + 1, width)
    counts, _ = np.histogram(lengths_S, bins=edges)
    return {"edges_tokens": edges.tolist(), "samples": counts.tolist()}


def _rejected(train: SampleStore, held_out: SampleStore | None) -> tuple[Rejected, ...]:
    return train.rejected + (held_out.rejected if held_out is not None and held_out is not train else ())


def _listing(bad: Sequence[Rejected], output_dir: Path) -> str:
    lines = [_line(record) for record in bad[:LISTED_RECORDS]]
    if len(bad) > LISTED_RECORDS:
        lines.append(f"... and {len(bad) - LISTED_RECORDS} more (all in {output_dir / 'data' / 'rejected.jsonl'})")
    records = "1 record" if len(bad) == 1 else f"{len(bad)} records"
    return "\n".join([*lines, f'{records} cannot be trained on; mend or remove them, or set data.on_bad_record = "skip"'])


def _line(record: Rejected) -> str:
    return f"{record.source}: {record.reason}"


def _hold_out(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeded choice of what is held out: at least one sample, and not all."""
    if count < 2:
        raise DataError(f"data.eval_fraction: got {fraction}, but there is only {count} sample; add data or leave it at 0")
    held_out = min(max(1, round(count * fraction)), count - 1)
    order = np.random.default_rng([seed, count]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _warnings(stores: Sequence[SampleStore], tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> list[str]:
    model = _model_sizes(model_dir)
    longest = max(int(store.lengths_S.max()) for store in stores)
    largest = max(store.counts.largest_token for store in stores)
    if largest >= model.get("vocab_size", largest + 1):
        raise ModelError(
            f"{model_dir}: the tokenizer gives token {largest}, but the model has only {model['vocab_size']} tokens; "
            "use the tokenizer that belongs to the model"
        )
    warnings = []
    if longest > model.get("max_position_embeddings", longest):
        warnings.append(
            f"the longest sample has {longest} tokens, the model's max_position_embeddings is {model['max_position_embeddings']}: "
            "positions beyond it were never trained; lower data.max_length or use a model with longer context"
        )
    return warnings + _template_warnings(stores, tokenizer)


def _template_warnings(stores: Sequence[SampleStore], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    def total(name: str) -> int:
        return sum(getattr(store.counts, name) for store in stores)

    warnings = []
    system = default_system_prompt(tokenizer) if total("without_system") else ""
    if system:
        warnings.append(
            f"{total('without_system')} samples have no system message and the chat template writes its own into them: "
            f'"{system[:200]}"; set data.system_prompt to choose one'
        )
    if "strftime_now" in template_text(tokenizer):
        warnings.append("the chat template writes today's date into the samples; samples already prepared keep the date of their day")
    if total("merged_start"):
        warnings.append(
            f"in {total('merged_start')} samples the assistant's first token also holds the end of the role header and is not trained on "
            "(content that starts with a newline)"
        )
    if total("prompt_differs"):
        warnings.append(
            f"in {total('prompt_differs')} samples the assistant does not start with the thought that the generation prompt of the chat "
            "template opens; generate with a template that does not open it"
        )
    if total("duplicates"):
        warnings.append(f"{total('duplicates')} samples have the same tokens as another sample")
    return warnings


def _model_sizes(model_dir: Path) -> dict[str, int]:
    path = model_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; fetch the model again") from error
    return {name: values[name] for name in ("vocab_size", "max_position_embeddings") if isinstance(values.get(name), int)}
