"""`structcot view`: chains of thought as structure on one page, or those of two files side by side.

Records are read, cut into steps and written one at a time, so memory stays small. Of the other file of a comparison only the identity of
each record is kept, with its place in the file. Records of the same identity are matched in the order in which they come.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from structcot.errors import ConfigError
from structcot.files import replacing
from structcot.traces import Trace, UnusableTrace, read_lines, read_trace
from structcot.view_match import Link, match_steps
from structcot.view_page import page_end, page_record, page_start
from structcot.view_traces import ROW_FIELDS, Shown, TypeNames, page_row, read_shown

LINK_KINDS = ("kept", "moved", "changed", "deleted", "inserted")
# The page lists so many unusable lines and counts the rest.
MAX_LISTED = 200


def write_view(source: str, to: Path, *, compare: str | None = None, field: str = "") -> dict[str, Any]:
    """Write the page for the traces of `source` ("-" for standard input), with those of `compare` beside them.

    `field` names the field of the answer where the format is none of the known. The page replaces `to` in one piece.

    Returns:
        `page`, the path as text; `traces`, the number of records shown; `unusable`, the lines left out, each with `source` and `reason`;
        with `compare` also how many records are `matched`, `only_here` and `only_there`.

    Raises:
        ConfigError: if a file cannot be read, or `to` is one of them or lies in no folder.
    """
    _check(source, to, compare)
    facts = _Facts(answer_field=field)
    # A lone surrogate is written as its JSON escape.
    with replacing(to, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as page:
        page.write(page_start(" and ".join(Path(name).name for name in (source, compare) if name), compare is not None))
        if compare is None:
            for trace, _ in facts.read(source):
                page.write(page_record([facts.row(read_shown(trace))]))
        else:
            _write_pairs(page, source, compare, facts)
        page.write(page_end(facts.for_page(source, compare)))
    facts_out = {"page": str(to), "traces": facts.num_traces, "unusable": facts.unusable}
    return facts_out | facts.matches if compare is not None else facts_out


@dataclass(slots=True, kw_only=True)
class _Facts:
    """What is counted while the files are read."""

    answer_field: str
    num_traces: int = 0
    unusable: list[dict[str, str]] = field(default_factory=list)
    matches: dict[str, int] = field(default_factory=lambda: {"matched": 0, "only_here": 0, "only_there": 0})
    types: TypeNames = field(default_factory=TypeNames)

    def read(self, path: str) -> Iterator[tuple[Trace, int]]:
        """Stream the traces of a file with the offsets of their lines in bytes; lines that hold none are noted, blank ones are not."""
        offset = 0
        for source, line in read_lines(path):
            try:
                if line.strip():
                    yield read_trace(source, line, self.answer_field), offset
            except UnusableTrace as error:
                self.unusable.append({"source": source, "reason": str(error)})
            offset += len(line)

    def row(self, shown: Shown, side: int = 0) -> list[Any]:
        """Lay out the row of a record that is shown alone or first."""
        self.num_traces += 1
        return page_row(shown, self.types, side)

    def for_page(self, source: str, compare: str | None) -> dict[str, Any]:
        """Lay out what the page's script needs beside the records."""
        return {
            "files": [source, compare] if compare is not None else [source],
            "fields": ROW_FIELDS,
            "kinds": LINK_KINDS,
            "types": self.types.names,
            "unusable": [[line["source"], line["reason"]] for line in self.unusable[:MAX_LISTED]],
            "num_unusable": len(self.unusable),
        }


def _write_pairs(page: IO[str], source: str, compare: str, facts: _Facts) -> None:
    """Write the records of `source`, each with its partner, then those that only `compare` has."""
    places: dict[bytes, deque[tuple[str, int]]] = defaultdict(deque)
    for trace, offset in facts.read(compare):
        places[_fingerprint(trace)].append((trace.source, offset))
    with Path(compare).open("rb") as other:
        for trace, _ in facts.read(source):
            shown, waiting = read_shown(trace), places.get(_fingerprint(trace))
            if waiting:
                partner = _read_at(other, *waiting.popleft(), facts.answer_field)
                links = match_steps(shown.step_texts, partner.step_texts)
                page.write(page_record([facts.row(shown), page_row(partner, facts.types), _flat(links)]))
                facts.matches["matched"] += 1
            else:
                page.write(page_record([facts.row(shown)]))
                facts.matches["only_here"] += 1
        for name, offset in sorted((place for waiting in places.values() for place in waiting), key=lambda place: place[1]):
            page.write(page_record([facts.row(_read_at(other, name, offset, facts.answer_field), side=1)]))
            facts.matches["only_there"] += 1


def _fingerprint(trace: Trace) -> bytes:
    """The identity of a record in 16 bytes; a question can be long, and a file has many."""
    return hashlib.blake2b(trace.identity.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


def _read_at(file: BinaryIO, source: str, offset: int, field: str) -> Shown:
    file.seek(offset)
    return read_shown(read_trace(source, file.readline(), field))


def _flat(links: list[Link]) -> list[int]:
    """Three numbers a link: its kind, the step here and the step there, -1 where there is none."""
    flat = []
    for link in links:
        flat += [LINK_KINDS.index(link.kind), *(-1 if step is None else step for step in (link.here, link.there))]
    return flat


def _check(source: str, to: Path, compare: str | None) -> None:
    if compare == "-":
        raise ConfigError("--compare: got -; the other file is read twice, give a path (IN.jsonl may be -)")
    if not to.parent.is_dir():
        raise ConfigError(f"--output: {to}: {to.parent} is no folder; create it or give another path")
    for path in (source, compare):
        if path not in (None, "-") and to.exists() and Path(path).exists() and to.samefile(path):
            raise ConfigError(f"--output: {to}: is a file to read; give another path for the page")


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("view")
