"""Files that a reader sees old or new, never half written, and hashes of what goes into them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from structcot.errors import ConfigError


@contextmanager
def replacing(path: Path, mode: str, **how: Any) -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` once all of it is written; `mode` and `how` as for `open`.

    Raises:
        OSError: if it cannot be written; what lay at `path` stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, **how) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step that survives a power cut."""
    with replacing(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def write_lines_whole(source: str, to: str) -> Iterator[IO[bytes]]:
    """Open what is made of `source`: a file that takes the name `to` once all of it is written, or standard output for "-".

    Raises:
        ConfigError: if `source` is no file (or "-", standard input), if `to` is the same one, or cannot be written.
    """
    if source != "-" and not Path(source).is_file():
        raise ConfigError(f"{source}: is no file; give a file of JSON lines, or - for standard input")
    if to == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(to)
    if source != "-" and path.exists() and path.samefile(source):
        raise ConfigError(f"{to}: is the input too; write to another file")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(path, "wb"))
        except OSError as error:
            raise ConfigError(f"{to}: cannot be written: {error.strerror}; give a file in a directory that is there") from error
        yield file


def json_sha256(value: Any) -> str:
    """Hash of a value by its JSON text with sorted keys: equal values give equal hashes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
