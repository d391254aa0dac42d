"""Files of a sample store, written sample by sample: what is per token goes to disk at once, what is per sample at the end.

Arrays are plain .npy files. `index.json` is written last and holds the size of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from structcot.data.records import Record
from structcot.data.render import IGNORE, RenderedSample
from structcot.data.rows import Rejected

TOKEN_ARRAYS = {"tokens": np.dtype("<i4"), "labels": np.dtype("<i4"), "kinds": np.dtype("u1")}
SAMPLE_ARRAYS = ("offsets", "origins", "supervised", "flags")
TRUNCATED, MERGED_START, PROMPT_DIFFERS = 1, 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounts:
    """What a build saw.

    Samples, their tokens and supervised tokens; rejected records, as asked for (`dropped`) and as errors (`bad`); samples that were
    truncated, whose first token merged with the header, whose generation prompt differs, that have no system message of their own; samples
    whose tokens another one also has; and the largest token id.
    """

    samples: int
    tokens: int
    supervised_tokens: int
    dropped: int
    bad: int
    truncated: int
    merged_start: int
    prompt_differs: int
    without_system: int
    duplicates: int
    largest_token: int


class StoreWriter:
    """Appends samples to the files of a store in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = {name: (directory / f"{name}.npy").open("w+b") for name in TOKEN_ARRAYS}
        for name in TOKEN_ARRAYS:
            self._write_header(name, 0)
        self.lengths: list[int] = []
        self.supervised: list[int] = []
        self.origins: list[int] = []
        self.flags: list[int] = []
        self.sources: list[str] = []
        self.rejected: list[Rejected] = []
        self.seen: set[bytes] = set()
        self.without_system = 0
        self.largest_token = -1

    def add(self, entry: Record | Rejected, result: RenderedSample | Rejected, origin: int) -> None:
        """Take what became of `entry`, which came from data source number `origin`."""
        if isinstance(result, Rejected):
            self.rejected.append(result)
            return
        for name in TOKEN_ARRAYS:
            self.files[name].write(getattr(result, f"{name}_T").astype(TOKEN_ARRAYS[name], copy=False).tobytes())
        self.lengths.append(len(result.tokens_T))
        self.supervised.append(int(np.count_nonzero(result.labels_T != IGNORE)))
        self.origins.append(origin)
        self.flags.append(TRUNCATED * result.truncated | MERGED_START * result.merged_start | PROMPT_DIFFERS * result.prompt_differs)
        self.sources.append(result.source)
        self.seen.add(hashlib.blake2b(result.tokens_T.tobytes(), digest_size=16).digest())
        self.without_system += isinstance(entry, Record) and entry.messages[0].role != "system"
        self.largest_token = max(self.largest_token, int(result.tokens_T.max()))

    def counts(self) -> StoreCounts:
        """Count what was added so far."""
        dropped = sum(rejected.dropped for rejected in self.rejected)
        return StoreCounts(
            samples=len(self.lengths),
            tokens=sum(self.lengths),
            supervised_tokens=sum(self.supervised),
            dropped=dropped,
            bad=len(self.rejected) - dropped,
            truncated=sum(flags & TRUNCATED > 0 for flags in self.flags),
            merged_start=sum(flags & MERGED_START > 0 for flags in self.flags),
            prompt_differs=sum(flags & PROMPT_DIFFERS > 0 for flags in self.flags),
            without_system=self.without_system,
            duplicates=len(self.lengths) - len(self.seen),
            largest_token=self.largest_token,
        )

    def finish(self, index: dict[str, Any]) -> None:
        """Write everything that is left, and the index last."""
        for name, file in self.files.items():
            self._write_header(name, sum(self.lengths))
            _close_synced(file)
        arrays = {
            "offsets": np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8"),
            "origins": np.array(self.origins, dtype="<u2"),
            "supervised": np.array(self.supervised, dtype="<i8"),
            "flags": np.array(self.flags, dtype="u1"),
        }
        for name, array in arrays.items():
            with (self.directory / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                _close_synced(file)
        self._write_text("sources.json", json.dumps(self.sources))
        self._write_text("rejected.jsonl", "".join(json.dumps(asdict(rejected)) + "\n" for rejected in self.rejected))
        sizes = {path.name: path.stat().st_size for path in sorted(self.directory.iterdir()) if path.suffix in (".npy", ".json", ".jsonl")}
        self._write_text("index.json", json.dumps({**index, "counts": asdict(self.counts()), "sizes": sizes}, indent=1))

    def _write_header(self, name: str, count: int) -> None:
        # numpy pads the header so that the count can grow in place.
        self.files[name].seek(0)
        header = {"descr": TOKEN_ARRAYS[name].str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self.files[name], header)
        self.files[name].seek(0, os.SEEK_END)

    def _write_text(self, name: str, text: str) -> None:
        with (self.directory / name).open("w", encoding="utf-8") as file:
            file.write(text)
            _close_synced(file)


def _close_synced(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
