"""One stage of a curation: records in, records out, and of each that is not kept why not.

A stage has a directory with `kept.jsonl`, `rejected.jsonl` and `manifest.json`. The manifest is written last and holds a key, the hash of
all that decides the result: its settings, what it read, and this version. A stage whose manifest has the key is not run again; one that was
stopped starts anew, but for what it pays for, which it keeps by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from structcot import __version__
from structcot.errors import MismatchError
from structcot.files import json_sha256, replacing, write_json
from structcot.traces import line_of

Record = dict[str, Any]
KEPT, REJECTED, MANIFEST = "kept.jsonl", "rejected.jsonl", "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A stage that is done: its name, its directory, how many records came out, how many fell for each reason, and the hash of the kept."""

    name: str
    directory: Path
    num_read: int
    num_kept: int
    rejected: Mapping[str, int]
    sha256: str

    @property
    def kept(self) -> Path:
        """The records that the next stage reads."""
        return self.directory / KEPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage does. `facts` are the settings that decide its result, as JSON values; `work` reads the records that came before."""

    name: str
    facts: Mapping[str, Any]
    work: Callable[[Iterator[Record], StageFiles], None]


@dataclass(slots=True, kw_only=True)
class StageFiles:
    """The files of a stage at work, each of which takes its name when all of it is written. `before` is the stage that it reads, if any."""

    directory: Path
    before: Done | None
    num_read: int = 0
    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    _files: ExitStack = field(default_factory=ExitStack)
    _kept: IO[bytes] | None = None
    _rejected: IO[bytes] | None = None
    _digest: Any = field(default_factory=hashlib.sha256)

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._kept = self._files.enter_context(replacing(self.directory / KEPT, "wb"))
        self._rejected = self._files.enter_context(replacing(self.directory / REJECTED, "wb"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    def keep(self, record: Record) -> None:
        """Hand a record on to the next stage."""
        line = line_of(record, b"")
        self._digest.update(line)
        self.num_kept += 1
        _open(self._kept).write(line)

    def reject(self, record: Record, reason: str, detail: str = "") -> None:
        """Let a record fall. Reasons are counted, so they hold nothing of the record; what does is the `detail`."""
        self.rejected[reason] += 1
        said = {"reason": reason, **({"detail": detail} if detail else {})}
        _open(self._rejected).write(line_of({**record, "rejected": said}, b""))

    def read(self) -> Iterator[Record]:
        """The records of the stage before, counted as they are read; a stage gets them once."""
        for record in self.look():
            self.num_read += 1
            yield record

    def look(self) -> Iterator[Record]:
        """The same records, as often as a stage wants to look at them."""
        yield from read_records(self.before.kept) if self.before else ()

    @property
    def sha256(self) -> str:
        """Hash of what was kept."""
        return self._digest.hexdigest()


def run_stage(stage: Stage, directory: Path, before: Done | None) -> Done:
    """Run a stage on what the one before has kept, or take what is there if it was run on the same.

    Raises:
        StructcotError: if the stage cannot do its work.
        OSError: if the directory cannot be written.
    """
    key = json_sha256([__version__, stage.name, stage.facts, before.sha256 if before else ""])
    if (done := find_done(stage.name, directory, key)) is not None:
        return done
    (directory / MANIFEST).unlink(missing_ok=True)
    with StageFiles(directory=directory, before=before) as files:
        stage.work(files.read(), files)
    facts = {"read": files.num_read, "kept": files.num_kept, "rejected": dict(sorted(files.rejected.items())), "sha256": files.sha256}
    write_json(directory / MANIFEST, {"stage": stage.name, "key": key, **facts})
    return _done(stage.name, directory, facts)


def find_done(name: str, directory: Path, key: str) -> Done | None:
    """What a stage left under this key; None if it left nothing, or not all of it."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise MismatchError(f"{directory / MANIFEST}: is no manifest of a stage: {error}; remove it to run the stage again") from error
    if manifest.get("key") != key or not (directory / KEPT).is_file() or not (directory / REJECTED).is_file():
        return None
    return _done(name, directory, manifest)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file of a stage, one at a time."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _done(name: str, directory: Path, facts: Mapping[str, Any]) -> Done:
    return Done(
        name=name,
        directory=directory,
        num_read=facts["read"],
        num_kept=facts["kept"],
        rejected=facts["rejected"],
        sha256=facts["sha256"],
    )


def _open(file: IO[bytes] | None) -> IO[bytes]:
    if file is None:
        raise RuntimeError("the files of a stage are written inside its with block only")
    return file
