"""Checkpoints that are complete or are not there.

One checkpoint is a directory `checkpoints/step-000050/` of torch.distributed.checkpoint files and, written last, `state.json` with the size
and hash of each of them and a hash of itself. It is written under a temporary name and renamed, so a kill, a full disk or a power cut at
any moment leaves the last complete one as it was; what is incomplete is passed over and cleared away at the next start. Only what is
trained is saved: adapters (or all weights) and the optimizer's moments. There is no random state to keep: order, dropout and schedule are
functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from structcot.errors import CheckpointError, MismatchError
from structcot.files import json_sha256, sync_directory, write_json, write_text

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
PREFIX = "step-"
TEMPORARY_PREFIX = "tmp-"
MARGIN_BYTES = 64 * 2**20
"""Room beyond the checkpoint's own size that must be free before one is begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands after `step` optimizer steps; `num_tokens` real tokens were read.

    `identity` holds the config values and the hashes of the data that decide what is learned, `plan_sha256` the order of samples,
    `weights_sha256` the base model.
    """

    step: int
    num_tokens: int
    identity: dict[str, Any]
    plan_sha256: str
    weights_sha256: str


def save_checkpoint(directory: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write a checkpoint under `directory`, point LATEST at it and remove all but the newest `keep`.

    Raises:
        CheckpointError: if it cannot be written; the earlier ones are untouched.
    """
    tensors = _trained_tensors(model, optimizer)
    final = directory / f"{PREFIX}{state.step:06d}"
    temporary = directory / f"{TEMPORARY_PREFIX}{final.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _need_room(directory, sum(tensor.nbytes for tensor in tensors.values()))
        shutil.rmtree(temporary, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            save(tensors, checkpoint_id=temporary, no_dist=True)
        files = {path.name: _size_and_hash(path) for path in sorted(temporary.iterdir())}
        content = {**asdict(state), "files": files}
        write_json(temporary / STATE_FILE, {**content, "sha256": json_sha256(content)})
        sync_directory(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync_directory(directory)
        write_text(directory / "LATEST", final.name + "\n")
    except (OSError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_cannot_write(final, directory, error)) from error
    for old in [path for path in complete_checkpoints(directory) if path != final][keep - 1 :]:
        (old / STATE_FILE).unlink()  # first: what is half removed must not look complete
        shutil.rmtree(old)
    return final


def load_latest(directory: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load the newest complete checkpoint into `model` and `optimizer`; `state` is where a fresh run stands, given back if there is none.

    A damaged checkpoint is named and passed over for the one before it.

    Raises:
        MismatchError: if the checkpoint belongs to another run.
        CheckpointError: if there are checkpoints and none can be read.
    """
    paths = complete_checkpoints(directory)
    for leftover in {*directory.glob(f"{TEMPORARY_PREFIX}*"), *directory.glob(f"{PREFIX}*")} - set(paths):
        shutil.rmtree(leftover)
    for path in paths:
        try:
            saved = read_state(path)
            _need_undamaged(path)
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
            continue
        _same_run(path, saved, state)
        tensors = _trained_tensors(model, optimizer)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(tensors, checkpoint_id=path, no_dist=True)
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; remove it to resume from the one before") from error
        write_text(directory / "LATEST", path.name + "\n")
        return saved
    if paths:
        raise CheckpointError(f"{directory}: every checkpoint is damaged; remove them to start again, or restore one from a copy")
    return state


def need_same_run(directory: Path, identity: dict[str, Any]) -> None:
    """Make sure that the newest checkpoint, if there is one, belongs to the run that is about to write beside it.

    Raises:
        MismatchError: naming what differs.
    """
    for path in complete_checkpoints(directory):
        try:
            saved = read_state(path)
        except CheckpointError:
            continue
        return _same_run(path, saved, replace(saved, identity=identity))


def last_complete(directory: Path) -> str:
    """Text that names the newest complete checkpoint."""
    paths = complete_checkpoints(directory)
    return f"the last complete checkpoint is {paths[0]}" if paths else "there is no complete checkpoint yet"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints with a state.json, newest first."""
    paths = [path for path in directory.glob(f"{PREFIX}*") if (path / STATE_FILE).is_file()]
    return sorted(paths, key=lambda path: (len(path.name), path.name), reverse=True)


def read_state(path: Path) -> TrainState:
    """The state that a checkpoint was written at.

    Raises:
        CheckpointError: if state.json is damaged.
    """
    values = _read_state_file(path)
    return TrainState(**{field.name: values[field.name] for field in fields(TrainState)})


def _trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a step changes, by name; the tensors are the live ones, so loading into them loads the run."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.data
            tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _need_room(directory: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < num_bytes + MARGIN_BYTES:
        raise OSError(f"needs {num_bytes / 2**20:.0f} MiB and {free_bytes / 2**20:.0f} MiB are free")


def _cannot_write(final: Path, directory: Path, error: BaseException) -> str:
    cause = error if isinstance(error, OSError) else next(_roots(error), error)
    return f"{final}: the checkpoint cannot be written: {cause}; {last_complete(directory)}; free some space and run the same command again"


def _roots(error: BaseException) -> Iterator[BaseException]:
    """The failures that a CheckpointException collects from all ranks."""
    for failure in getattr(error, "failures", {}).values():
        yield failure[0] if isinstance(failure, tuple) else failure


def _same_run(path: Path, saved: TrainState, current: TrainState) -> None:
    differing = [
        f"{key} was {saved.identity.get(key)!r} and is {current.identity.get(key)!r}"
        for key in sorted(saved.identity.keys() | current.identity.keys())
        if saved.identity.get(key) != current.identity.get(key)
    ]
    if saved.weights_sha256 != current.weights_sha256:
        differing.append("the base model's weights differ")
    if not differing and saved.plan_sha256 != current.plan_sha256:
        differing.append("the data or its order differ")
    if differing:
        raise MismatchError(
            f"{path}: belongs to another run: {'; '.join(differing)}. Give another output_dir, undo the change, or remove the checkpoints"
        )


def _need_undamaged(path: Path) -> None:
    """Compare the files of a checkpoint with what its state.json says of them."""
    for name, facts in _read_state_file(path)["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if _size_and_hash(path / name) != facts:
            raise CheckpointError(f"{path}: {name} is damaged")


def _read_state_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if values.pop("sha256") == json_sha256(values):
            return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE_FILE}: cannot be read: {error!r}") from error
    raise CheckpointError(f"{path / STATE_FILE}: is damaged")


def _size_and_hash(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
