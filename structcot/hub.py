"""Snapshots of hub repositories, every file checked against the hub's own record of it.

Of a model only safetensors weights, configs and tokenizer files are downloaded, of a data set only data files; never pickled weights, never
code. The files lie in the usual hub cache. What has been checked is noted in a manifest of our own, so that the tens of gigabytes of a
large model are hashed once, not at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from structcot.errors import FetchError, ModelError
from structcot.files import json_sha256, write_json

PATTERNS = {
    "model": ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"),
    "dataset": ("*.jsonl", "*.json", "*.parquet"),
}
# Long enough for a slow answer, short enough to go on without a hub that does not answer.
TIMEOUT_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One commit of a hub repository on disk; `files` maps a name to its `bytes` and `sha256`, and is empty where nothing was checked."""

    directory: Path
    kind: str
    commit: str
    files: dict[str, dict[str, Any]]


def cache_directory() -> Path:
    """Where structcot keeps what it can fetch or compute again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structcot"


def file_facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as manifests keep them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def has_files(directory: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether `directory` holds every file of a manifest at its size."""
    return all((directory / name).is_file() and (directory / name).stat().st_size == facts["bytes"] for name, facts in files.items())


def find_snapshot(repo_id: str, revision: str, kinds: Sequence[str] = ("model", "dataset"), patterns: Sequence[str] = ()) -> Snapshot:
    """Download a repository, as the first of `kinds` that exists; without the hub, take what an earlier download has left.

    `patterns` say which of its files are wanted; without any, all that are of use.

    Raises:
        FetchError: if there is no such repository, the hub cannot be reached, or a file is not what the hub says it is.
        ModelError: if a model repository has no safetensors weights.
    """
    # HTTPError is the root of the HTTP client's errors, whichever client this version of huggingface_hub uses.
    from huggingface_hub.errors import HFValidationError, HTTPError, XetDownloadError  # pyright: ignore[reportPrivateImportUsage]

    failures: list[str] = []
    for kind in kinds:
        try:
            return _download(repo_id, revision, kind, patterns)
        except (HTTPError, HFValidationError, XetDownloadError, OSError) as error:
            failures.append(f"as a {kind}: {first_line(error)}")
    for kind in kinds:
        cached = _cached(repo_id, revision, kind, patterns)
        if cached is not None:
            log.warning("%s: the hub gives no answer (%s); using the copy in its cache, %s", repo_id, failures[0], cached.directory)
            return cached
    raise FetchError(
        f'"{repo_id}" cannot be fetched from the hub at revision "{revision}" ({"; ".join(failures)}); '
        "check the id, the revision and the network, and for a gated repository your hub login"
    )


def first_line(error: BaseException) -> str:
    """What an error says, as far as its first line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def find_shape(repo_id: str, revision: str) -> Path:
    """Download what says how large a model is and how it reads text, and not its weights; without the hub, take what its cache has.

    Raises:
        FetchError: if there is no such repository, or the hub cannot be reached and its cache has nothing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    patterns = [pattern for pattern in PATTERNS["model"] if pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_SECONDS))
    except (HTTPError, HFValidationError, OSError) as error:
        raise FetchError(
            f'"{repo_id}": its config cannot be fetched from the hub at revision "{revision}": {first_line(error)};'
            " check the id, the revision and the network, or give a directory that holds its config.json and tokenizer"
        ) from error


def _download(repo_id: str, revision: str, kind: str, patterns: Sequence[str]) -> Snapshot:
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    info = ask(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    commit = str(info.sha)
    part = f"--{json_sha256(list(patterns))[:12]}" if patterns else ""
    manifest = cache_directory() / "hub" / f"{kind}--{repo_id.replace('/', '--')}--{commit}{part}.json"
    if manifest.exists():
        checked = json.loads(manifest.read_text(encoding="utf-8"))
        if has_files(Path(checked["directory"]), checked["files"]):
            return Snapshot(directory=Path(checked["directory"]), kind=kind, commit=commit, files=checked["files"])
    wanted = [
        file
        for file in info.siblings or ()
        if is_wanted(file.rfilename, kind) and (not patterns or any(fnmatch(file.rfilename, pattern) for pattern in patterns))
    ]
    if kind == "model" and not any(file.rfilename.endswith(".safetensors") for file in wanted):
        raise ModelError(f"{repo_id}: has no safetensors weights; pickled weights can run code when loaded: convert to safetensors")
    if not wanted:
        raise FetchError(f"{repo_id}: this {kind} has no file like {', '.join(patterns or PATTERNS[kind])}; convert it to one of these")
    names = [file.rfilename for file in wanted]
    root = snapshot_download(repo_id, repo_type=kind, revision=commit, allow_patterns=names, etag_timeout=TIMEOUT_SECONDS)
    directory = Path(root)
    files = {file.rfilename: _check_file(directory / file.rfilename, file.size, file.lfs, f"{repo_id}@{commit}") for file in wanted}
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_json(manifest, {"directory": root, "files": files})
    return Snapshot(directory=directory, kind=kind, commit=commit, files=files)


def is_wanted(name: str, kind: str) -> bool:
    """Whether a repository's file is of use. A model's subdirectories hold weights for other programs, so only its top level counts."""
    parts = name.split("/")
    if ".." in parts or name.startswith("/") or (kind == "model" and len(parts) > 1):
        return False
    return any(fnmatch(name, pattern) for pattern in PATTERNS[kind])


def _check_file(path: Path, size: int | None, lfs: Any, where: str) -> dict[str, Any]:
    facts = file_facts(path)
    if size is not None and facts["bytes"] != size:
        raise FetchError(f"{where}: {path} has {facts['bytes']} bytes, should have {size}; remove it and fetch again")
    if lfs is not None and facts["sha256"] != lfs.sha256:
        raise FetchError(f"{where}: {path} has sha256 {facts['sha256']}, should have {lfs.sha256}; remove it and fetch again")
    return facts


def _cached(repo_id: str, revision: str, kind: str, patterns: Sequence[str]) -> Snapshot | None:
    """Return what the hub cache holds of a repository, if it is complete as far as the cache knows."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    names = list(patterns or PATTERNS[kind])
    try:
        directory = Path(snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=names, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Snapshot(directory=directory, kind=kind, commit=directory.name, files={})
