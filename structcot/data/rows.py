"""Rows of a data source, one at a time: JSON Lines, JSON arrays, Parquet, data sets of the Hugging Face hub.

A row that cannot be read is yielded as a `Rejected` with its place, never raised, so that one bad line hides no other. Lines and rows count
from 1; the source of a row is `path:line`, or `owner/name:row` on the hub. `hf://datasets/owner/name/part*.jsonl` names files of a data
set of the hub: they are fetched, and read as files of one's own.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from structcot.config import DataSource
from structcot.errors import ConfigError, DataError, FetchError
from structcot.hub import find_snapshot

RECORD_FIELDS = ("messages", "conversations", "system", "prompt", "completion")
EXTENSIONS = (".jsonl", ".json", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = "hf://"
HUB_PATTERN = re.compile(rf"{HUB_FILES}datasets/({HUB_ID.pattern})/(.+)")
PARQUET_ROWS_PER_READ = 256
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One decoded row, whatever its shape, and where it stands."""

    source: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record that is not trained on, and why.

    `tokens` is its rendered length where that is known. `dropped` is set where the config asked for it (data.overlong = drop): such a
    record is listed, but is no error.
    """

    source: str
    reason: str
    tokens: int | None = None
    dropped: bool = False


def read_rows(source: DataSource, key: str = "data.train", fields: tuple[str, ...] = RECORD_FIELDS) -> Iterator[Row | Rejected]:
    """Stream the rows of `source`; `key` is the config key that messages name.

    Of Parquet only the columns in `fields` are read, all of them where there is none of these.

    Raises:
        ConfigError: if the file does not exist or is of no known kind. Raised by the call, not by the first row.
        DataError: if the file holds no rows, or cannot be read as what its name says.
        FetchError: if a data set of the hub cannot be fetched.
    """
    kind = _kind(source, key)
    if kind == "hub":
        rows = _hub_rows(source)
    else:
        reader = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": partial(_parquet_rows, fields=fields)}[kind]
        rows = chain.from_iterable(reader(path, name) for name, path in _files(source.path))
    return _never_empty(rows, source)


def source_sha256(source: DataSource, key: str = "data.train") -> str:
    """Hash of the bytes of the files, or of the rows of a hub data set (whose files differ between versions of `datasets`).

    Raises:
        ConfigError, FetchError: as `read_rows`.
    """
    digest = hashlib.sha256()
    if _kind(source, key) != "hub":
        for _, path in _files(source.path):
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()
    for value in _load_from_hub(source.path, source.split):
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _kind(source: DataSource, key: str) -> str:
    if source.path.startswith(HUB_FILES):
        return _extension_of_hub_files(source, key)
    file, extension = _file(source), Path(source.path).suffix.lower()
    if file.is_dir():
        raise ConfigError(f'{key}: "{source.path}" is a directory; name the files in it ({", ".join(EXTENSIONS)})')
    if not file.exists():
        if HUB_ID.fullmatch(source.path) and extension not in EXTENSIONS:
            return "hub"
        raise ConfigError(f'{key}: "{source.path}" does not exist; give a file ({", ".join(EXTENSIONS)}) or a hub id like owner/name')
    if extension not in EXTENSIONS:
        raise ConfigError(f'{key}: "{source.path}" is of no known kind; convert it to {", ".join(EXTENSIONS)}')
    _need_no_split(source, key)
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(f'{key}: "{source.path}" cannot be read: {error.strerror}; check its permissions') from error
    return extension


def _extension_of_hub_files(source: DataSource, key: str) -> str:
    extension = Path(source.path).suffix.lower()
    if not HUB_PATTERN.fullmatch(source.path) or extension not in EXTENSIONS:
        raise ConfigError(
            f'{key}: "{source.path}" names no files of a data set of the hub; write {HUB_FILES}datasets/owner/name/file, with * for any '
            f"part of the name, and one of {', '.join(EXTENSIONS)} at its end"
        )
    _need_no_split(source, key)
    return extension


def _need_no_split(source: DataSource, key: str) -> None:
    if source.split != "train":
        raise ConfigError(f'{key}: "{source.path}" is a file and has no split "{source.split}"; leave split out')


def _file(source: DataSource) -> Path:
    return Path(source.path).expanduser()


@lru_cache(maxsize=64)
def _files(path: str) -> Sequence[tuple[str, Path]]:
    """The files that a path names, each with the name that its rows go by; those of the hub in the order of their names."""
    found = HUB_PATTERN.fullmatch(path)
    if not found:
        return [(path, Path(path).expanduser())]
    repo_id, pattern = found.groups()
    directory = find_snapshot(repo_id, "main", kinds=("dataset",), patterns=[pattern]).directory
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    return [(f"{HUB_FILES}datasets/{repo_id}/{name}", directory / name) for name in names if fnmatchcase(name, pattern)]


def _never_empty(rows: Iterator[Row | Rejected], source: DataSource) -> Iterator[Row | Rejected]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source.path}: holds no records; remove it from the config or fill it")


def _jsonl_rows(path: Path, name: str) -> Iterator[Row | Rejected]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if text:
                yield _parsed_line(text, f"{name}:{number}")


def _parsed_line(line: bytes, source: str) -> Row | Rejected:
    try:
        return Row(source=source, value=json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Rejected(source=source, reason=f"is not valid UTF-8 at byte offset {error.start} of the line ({error.reason})")
    except json.JSONDecodeError as error:
        return Rejected(source=source, reason=f"is not valid JSON: {error.msg} at column {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # a number of more than 4300 digits, thousands of nested brackets
        return Rejected(source=source, reason=f"is JSON that cannot be read: {error}")


def _json_rows(path: Path, name: str) -> Iterator[Row | Rejected]:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    content = data.lstrip()
    first_line = content.partition(b"\n")[0].rstrip()
    if content.startswith(b"["):
        # A byte that is not UTF-8 becomes a lone surrogate, which rejects its own record and no other.
        yield from _array_rows(data.decode("utf-8", "surrogateescape"), name)
    elif first_line.startswith(b"{") and first_line.endswith(b"}"):
        yield from _jsonl_rows(path, name)
    elif content:
        raise DataError(f"{name}: is neither an array of records nor one record a line; write [{{...}}, {{...}}] or JSON Lines")


def _array_rows(text: str, name: str) -> Iterator[Row | Rejected]:
    """Decode one element after the other, each with the line it starts on."""
    decoder = json.JSONDecoder()
    position, counted, line, separated = text.index("[") + 1, 0, 1, True
    while True:
        position = _skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        source = f"{name}:{line}"
        if position == len(text):
            yield Rejected(source=source, reason="the array is not closed with ]: the file is cut short")
            return
        if text[position] == "]":
            if text[position + 1 :].strip():
                yield Rejected(source=source, reason="something follows the end of the array")
            return
        try:
            if not separated:
                raise json.JSONDecodeError("Expecting a comma before this record", text, position)
            value, position = decoder.raw_decode(text, position)
            yield Row(source=source, value=value)
        except (ValueError, RecursionError) as error:
            found = _next_of_same_indent(text, position)
            lost = "" if found else "; the records after it cannot be told apart and are not read"
            yield Rejected(source=source, reason=f"is not valid JSON: {error}{lost}")
            if found is None:
                return
            position, separated = found, True
            continue
        position = _skip_blank(text, position)
        separated = text.startswith((",", "]"), position) or position == len(text)
        position += text.startswith(",", position)


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _next_of_same_indent(text: str, position: int) -> int | None:
    """Where the next record starts after a broken one: a line that opens a brace at the same indent."""
    indent = text[text.rfind("\n", 0, position) + 1 : position]
    if indent.strip():
        return None
    found = re.compile(rf"^{indent}\{{", re.MULTILINE).search(text, position + 1)
    return found.end() - 1 if found else None


def _parquet_rows(path: Path, name: str, fields: tuple[str, ...]) -> Iterator[Row | Rejected]:
    import pyarrow
    import pyarrow.parquet

    number = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [field for field in names if field in fields] or None
            for batch in file.iter_batches(batch_size=PARQUET_ROWS_PER_READ, columns=known):
                for index in range(batch.num_rows):
                    yield _parquet_row(batch.slice(index, 1), f"{name}:{number}", names)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}:{number}: cannot be read as Parquet: {error}") from error


def _parquet_row(row: Any, source: str, names: list[str]) -> Row | Rejected:
    try:
        # Columns that are not read keep their name, so that a message can say what was found.
        return Row(source=source, value={**dict.fromkeys(names), **row.to_pylist()[0]})
    except UnicodeDecodeError as error:
        return Rejected(source=source, reason=f"is not valid UTF-8 at byte offset {error.start} of a column ({error.reason})")


def _hub_rows(source: DataSource) -> Iterator[Row | Rejected]:
    for number, value in enumerate(_load_from_hub(source.path, source.split), 1):
        yield Row(source=f"{source.path}:{number}", value=value)


@lru_cache(maxsize=8)
def _load_from_hub(path: str, split: str) -> Any:
    """The data set, fetched once per process: hashing and reading each ask for it."""
    import datasets

    try:
        return datasets.load_dataset(path, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FetchError(
            f'"{path}" (split {split}) is no file here and cannot be fetched from the hub: {detail}; '
            "check the name, the network and HF_TOKEN, or give the path of a downloaded file"
        ) from error
