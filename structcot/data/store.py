"""The sample store: rendered samples as flat memory-mapped arrays, kept in a cache under the hash of all that made them.

A store is written under a temporary name and renamed when complete, so an interrupted build leaves nothing that could be taken for one, and
of two processes that build the same store the second to finish takes the first one's. What a stored sample depends on is in its key: change
a byte of the data, a tokenizer file, the template, an option or this code's RENDER_VERSION and another store is built.

Legend: S samples, T tokens of one sample, N tokens of all samples.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from structcot.config import DataConfig, DataSource
from structcot.data.records import Record, read_records
from structcot.data.render import RENDER_VERSION, RenderedSample, render_records, rendering_options
from structcot.data.rows import Rejected, source_sha256
from structcot.data.turns import template_text
from structcot.data.writer import MERGED_START, PROMPT_DIFFERS, SAMPLE_ARRAYS, TOKEN_ARRAYS, TRUNCATED, StoreCounts, StoreWriter
from structcot.errors import ConfigError, Interrupted
from structcot.files import json_sha256
from structcot.model_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_RECORDS, CHUNK_CHARACTERS = 512, 1 << 20  # bounds the memory of one parallel encoding to some 100 MB
UNFINISHED = ".unfinished-"


@dataclass(frozen=True, kw_only=True)
class SampleStore:
    """Rendered samples of one or more data sources, in their order.

    `tokens_N`, `labels_N` int32, `kinds_N` uint8 as in `RenderedSample`, end to end; sample s lies at [offsets_S1[s], offsets_S1[s + 1]).
    `origins_S` uint16 numbers the data source of each sample, `origin_names` are their labels; `supervised_S` int64 counts labels.
    `sha256` holds the hashes "data", "template" and "tokenizer", `file_sha256` that of each data source.
    """

    directory: Path
    tokens_N: np.ndarray
    labels_N: np.ndarray
    kinds_N: np.ndarray
    offsets_S1: np.ndarray
    origins_S: np.ndarray
    supervised_S: np.ndarray
    flags_S: np.ndarray
    origin_names: tuple[str, ...]
    counts: StoreCounts
    sha256: Mapping[str, str]
    file_sha256: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.offsets_S1) - 1

    @property
    def key(self) -> str:
        """Hash of all that made this store; the name of its directory."""
        return self.directory.name

    @cached_property
    def lengths_S(self) -> np.ndarray:
        """Tokens of each sample, int64."""
        return np.diff(self.offsets_S1)

    @cached_property
    def rejected(self) -> tuple[Rejected, ...]:
        """Every record that became no sample, in the order of the data."""
        lines = (self.directory / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        return tuple(Rejected(**json.loads(line)) for line in lines)

    @cached_property
    def sources_S(self) -> list[str]:
        """Place of each sample, `path:line`."""
        return json.loads((self.directory / "sources.json").read_text(encoding="utf-8"))

    def sample(self, index: int) -> RenderedSample:
        """Sample `index`; its arrays are views of the mapped files."""
        place = slice(self.offsets_S1[index], self.offsets_S1[index + 1])
        flags = int(self.flags_S[index])
        return RenderedSample(
            source=self.sources_S[index],
            origin=self.origin_names[self.origins_S[index]],
            tokens_T=self.tokens_N[place],
            labels_T=self.labels_N[place],
            kinds_T=self.kinds_N[place],
            truncated=bool(flags & TRUNCATED),
            merged_start=bool(flags & MERGED_START),
            prompt_differs=bool(flags & PROMPT_DIFFERS),
        )


def default_cache_dir() -> Path:
    """Where stores are kept: $XDG_CACHE_HOME/structcot/samples, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "structcot" / "samples"


def build_store(
    sources: Sequence[DataSource],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    model_dir: Path,
    cache_dir: Path,
    should_stop: Callable[[], bool],
    config_key: str = "data.train",
) -> SampleStore:
    """Open the store of `sources`, building it first if the cache holds none; `config_key` is what messages name.

    Raises:
        ConfigError: if a source does not exist, or the cache directory cannot be written.
        DataError: if a source holds no records or is not what its name says. Bad records are no error here: see `SampleStore.rejected`.
        FetchError: if a hub data set cannot be fetched.
        Interrupted: when `should_stop` says so, asked between chunks of records.
    """
    files = {f"{source.path}:{source.split}": source_sha256(source, config_key) for source in sources}
    tokenizer_files = [(name, (model_dir / name).read_bytes()) for name in TOKENIZER_FILES if (model_dir / name).is_file()]
    hashes = {
        "data": json_sha256([files[f"{source.path}:{source.split}"] for source in sources]),
        "template": hashlib.sha256(template_text(tokenizer).encode()).hexdigest(),
        "tokenizer": json_sha256([[name, hashlib.sha256(content).hexdigest()] for name, content in tokenizer_files]),
    }
    versions = {package: importlib.metadata.version(package) for package in ("tokenizers", "transformers")}
    # Paths and labels are stored with the samples, for messages and metrics, and so are part of the key.
    names = [(source.path, source.split, source.label) for source in sources]
    key = json_sha256([RENDER_VERSION, hashes, rendering_options(config), versions, names])
    store = open_store(cache_dir / key)
    if store is not None:
        return store
    index = {"sha256": hashes, "file_sha256": files, "origin_names": [source.label for source in sources]}
    with _unfinished_directory(cache_dir) as directory:
        with _writing(cache_dir):
            writer = StoreWriter(directory)
        for number, source in enumerate(sources):
            for chunk in _chunks(read_records(source, config.format, config.system_prompt, config_key)):
                if should_stop():
                    raise Interrupted(
                        "stopped while preparing the data, before there was anything to resume; the same command starts again"
                    )
                results = iter(render_records([entry for entry in chunk if isinstance(entry, Record)], tokenizer, config))
                with _writing(cache_dir):
                    for entry in chunk:
                        writer.add(entry, entry if isinstance(entry, Rejected) else next(results), number)
        with _writing(cache_dir):
            writer.finish(index)
            return _put_in_place(directory, cache_dir / key)


def open_store(directory: Path) -> SampleStore | None:
    """Map a complete store; None where there is none, or what is there is damaged."""
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        if any((directory / name).stat().st_size != size for name, size in index["sizes"].items()):
            return None
        arrays = {name: _load_array(directory / f"{name}.npy") for name in (*TOKEN_ARRAYS, *SAMPLE_ARRAYS)}
        return SampleStore(
            directory=directory,
            tokens_N=arrays["tokens"],
            labels_N=arrays["labels"],
            kinds_N=arrays["kinds"],
            offsets_S1=arrays["offsets"],
            origins_S=arrays["origins"],
            supervised_S=arrays["supervised"],
            flags_S=arrays["flags"],
            origin_names=tuple(index["origin_names"]),
            counts=StoreCounts(**index["counts"]),
            sha256=index["sha256"],
            file_sha256=index["file_sha256"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # an array without elements cannot be mapped
        return np.load(path)


def _chunks(entries: Iterator[Record | Rejected]) -> Iterator[list[Record | Rejected]]:
    chunk: list[Record | Rejected] = []
    characters = 0
    for entry in entries:
        chunk.append(entry)
        characters += sum(len(message.content) for message in entry.messages) if isinstance(entry, Record) else 0
        if len(chunk) == CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{cache_dir}: the prepared samples cannot be kept there: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a directory that can be written and has room"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(cache_dir: Path) -> Iterator[None]:
    """Keep other processes from adding to the cache or removing from it."""
    with (cache_dir / "lock").open("ab") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _unfinished_directory(cache_dir: Path) -> Iterator[Path]:
    """Give a directory that is gone afterwards unless it was renamed; a lock in it tells a running build from a killed one."""
    directory = cache_dir / f"{UNFINISHED}{uuid.uuid4().hex}"
    with _writing(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(cache_dir):
            _remove_killed_builds(cache_dir)
            directory.mkdir()
            lock = (directory / "lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield directory
    finally:
        lock.close()
        shutil.rmtree(directory, ignore_errors=True)


def _remove_killed_builds(cache_dir: Path) -> None:
    for directory in cache_dir.glob(f"{UNFINISHED}*"):
        try:
            with (directory / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # a build that runs holds it, or it is just gone
            continue


def _put_in_place(directory: Path, place: Path) -> SampleStore:
    """Rename a complete directory to its key; where another process was first, use what it wrote."""
    with _one_at_a_time(place.parent):
        store = open_store(place)
        if store is None:
            shutil.rmtree(place, ignore_errors=True)  # a damaged one
            directory.rename(place)
            store = open_store(place)
    if store is None:
        raise OSError(f"{place} was written but cannot be read back")
    return store
