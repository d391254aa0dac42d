"""Checkpoints that are complete or are not there.

One checkpoint is a directory `checkpoints/step-000050/` of torch.distributed.checkpoint files, of which every rank writes its own, and,
written last, `state.json` with the size and hash of each of them and a hash of itself. It is written under a temporary name and renamed, so
a kill, a full disk or a power cut at any moment leaves the last complete one as it was; what is incomplete is passed over and cleared away
at the next start. Only what is trained is saved: adapters (or all weights) and the optimizer's moments. There is no random state to keep:
order, dropout and schedule are functions of the step, and so any number of ranks can go on from what any other number has written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from structcot.distributed import World
from structcot.errors import CheckpointError, MismatchError
from structcot.files import json_sha256, sync_directory, write_json, write_text
from structcot.optim import Optimizer

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
PREFIX = "step-"
TEMPORARY_PREFIX = "tmp-"
ALONE = World()
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


class CheckpointWriter:
    """Writes checkpoints while the run goes on, one at a time; every rank writes its own part.

    What is written is a copy in host memory, so steps may change the weights meanwhile. An error of the writing comes out of the next call,
    on every rank.
    """

    def __init__(self, directory: Path, world: World, keep: int):
        self._directory, self._world, self._keep = directory, world, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, state: TrainState, model: nn.Module, optimizer: Optimizer) -> None:
        """Begin to write a checkpoint of `state`, once the one before it is written.

        Raises:
            CheckpointError: if that one could not be written.
        """
        self.finish()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trained_tensors(model, optimizer).items()}
        behind = replace(self._world, control=self._world.saving)  # so that its collectives do not mix with those of the steps
        self._writing = self._thread.submit(write_checkpoint, self._directory, state, copies, self._keep, behind)

    def check(self) -> None:
        """Find out whether the writing has failed, without waiting for it.

        Raises:
            CheckpointError: if it has on some rank.
        """
        failed = self._writing is not None and self._writing.done() and self._writing.exception() is not None
        if self._world.any(failed):
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is written.

        Raises:
            CheckpointError: if it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the thread; say what went wrong with its work where the run ends before it was asked."""
        self._thread.shutdown()
        failure = None if self._writing is None else self._writing.exception()
        if failure is not None and self._world.is_first:
            log.warning("%s", failure)


def write_checkpoint(directory: Path, state: TrainState, tensors: Mapping[str, Tensor], keep: int, world: World) -> None:
    """Write a checkpoint under `directory`, point LATEST at it and remove all but the newest `keep`; all ranks call this.

    Raises:
        CheckpointError: if it cannot be written; the earlier ones are untouched.
    """
    final = directory / f"{PREFIX}{state.step:06d}"
    temporary = directory / f"{TEMPORARY_PREFIX}{final.name}"
    with world.agreed(), _as_checkpoint_error(final, directory, world):
        if world.is_first:
            directory.mkdir(parents=True, exist_ok=True)
            _need_room(directory, sum(tensor.nbytes for tensor in tensors.values()))
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    with world.agreed(), _as_checkpoint_error(final, directory, world), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
        save(dict(tensors), checkpoint_id=temporary, process_group=world.control, no_dist=world.size == 1)
    facts: dict[str, Any] = {}
    with world.agreed(), _as_checkpoint_error(final, directory, world):
        facts = {path.name: _size_and_hash(path) for path in sorted(temporary.iterdir()) if _is_own(path.name, world)}
    files = {name: fact for part in world.gather(facts) for name, fact in part.items()}
    with world.agreed(), _as_checkpoint_error(final, directory, world):
        if world.is_first:
            _complete(temporary, final, state, dict(sorted(files.items())))
            for old in [path for path in complete_checkpoints(directory) if path != final][keep - 1 :]:
                (old / STATE_FILE).unlink()  # first: what is half removed must not look complete
                shutil.rmtree(old)


def _complete(temporary: Path, final: Path, state: TrainState, files: dict[str, Any]) -> None:
    """Write state.json, give the directory its name and point LATEST at it."""
    content = {**asdict(state), "files": files}
    write_json(temporary / STATE_FILE, {**content, "sha256": json_sha256(content)})
    sync_directory(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_directory(final.parent)
    write_text(final.parent / "LATEST", final.name + "\n")


def _is_own(name: str, world: World) -> bool:
    """Whether this rank hashes a file: those that it wrote itself (`__RANK_NUMBER.distcp`), and the first what belongs to none."""
    owner = re.match(r"__(\d+)_", name)
    return (int(owner[1]) if owner else 0) == world.rank


def load_latest(directory: Path, state: TrainState, model: nn.Module, optimizer: Optimizer, world: World = ALONE) -> TrainState:
    """Load the newest complete checkpoint into `model` and `optimizer`; `state` is where a fresh run stands, given back if there is none.

    It may have been written by another number of ranks. A damaged checkpoint is named and passed over for the one before it.

    Raises:
        MismatchError: if the checkpoint belongs to another run.
        CheckpointError: if there are checkpoints and none can be read.
    """
    names = world.first(lambda: _clear_and_list(directory))
    for path in (directory / name for name in names):
        problem = next(filter(None, world.gather(_damage(path, world))), None)
        if problem is not None:
            if world.is_first:
                log.warning("%s; trying the checkpoint before it", problem)
            continue
        saved = world.first(lambda path=path: read_state(path))
        with world.agreed():
            _same_run(path, saved, state)
        tensors = trained_tensors(model, optimizer)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(tensors, checkpoint_id=path, process_group=world.control, no_dist=world.size == 1)
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; remove it to resume from the one before") from error
        optimizer.loaded()
        with world.agreed():
            if world.is_first:
                write_text(directory / "LATEST", path.name + "\n")
        return saved
    if names:
        with world.agreed():
            raise CheckpointError(f"{directory}: every checkpoint is damaged; remove them to start again, or restore one from a copy")
    return state


def _clear_and_list(directory: Path) -> list[str]:
    """Names of the complete checkpoints, newest first; what is incomplete is removed."""
    paths = complete_checkpoints(directory)
    for leftover in {*directory.glob(f"{TEMPORARY_PREFIX}*"), *directory.glob(f"{PREFIX}*")} - set(paths):
        shutil.rmtree(leftover)
    return [path.name for path in paths]


def _damage(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, as far as this rank looks: at every `world.size`-th file."""
    try:
        _need_undamaged(path, world)
    except CheckpointError as error:
        return str(error)
    return None


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


def trained_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that a step changes, by name; the tensors are the live ones, so loading into them loads the run."""
    tensors = {f"model.{name}": parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    return tensors | {f"optimizer.{name}": tensor for name, tensor in optimizer.tensors().items()}


def _need_room(directory: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < num_bytes + MARGIN_BYTES:
        raise OSError(f"needs {num_bytes / 2**20:.0f} MiB and {free_bytes / 2**20:.0f} MiB are free")


@contextmanager
def _as_checkpoint_error(final: Path, directory: Path, world: World) -> Iterator[None]:
    """Clear away what was begun, and say what went wrong and what remains."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        if world.is_first:
            shutil.rmtree(directory / f"{TEMPORARY_PREFIX}{final.name}", ignore_errors=True)
        cause = error if isinstance(error, OSError) else next(_roots(error), error)
        raise CheckpointError(
            f"{final}: the checkpoint cannot be written: {cause}; {last_complete(directory)};"
            " free some space and run the same command again"
        ) from error


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


def _need_undamaged(path: Path, world: World) -> None:
    """Compare the files of a checkpoint with what its state.json says of them, every rank some of them."""
    files = sorted(_read_state_file(path)["files"].items())
    for name, facts in files[world.rank :: world.size]:
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
