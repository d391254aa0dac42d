"""The funnel as a page: how many records each stage read and kept, why the rest fell, and some records at every border."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from structcot.curate.stages import REJECTED, Done, Record, read_records
from structcot.files import write_text
from structcot.page import page_asset, page_head, safe_text

PAGE = "funnel.html"
NUM_SHOWN, LONGEST_SHOWN = 3, 6000
# What tells most about a record, the newest of it first.
SHOWN_FIELDS = ("rejected", "messages", "text", "answer", "question", "gold", "extracted", "verdicts", "difficulty", "origin")


def write_funnel(output_dir: Path, title: str, stages: Sequence[Done]) -> None:
    """Write the page. The same stages make the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    text = page_head(title, page_asset("curate/funnel.css")) + "<body>\n" + "\n".join(_body(title, stages)) + "\n</body></html>\n"
    write_text(output_dir / PAGE, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))


def _body(title: str, stages: Sequence[Done]) -> Iterator[str]:
    most = max([1, *(max(done.num_read, done.num_kept) for done in stages)])
    yield f"<h1>{safe_text(title)}</h1>"
    yield f"<p>{stages[-1].num_kept:,} demonstrations came out of {stages[0].num_read:,} rows.</p>" if stages else ""
    yield "<table class=overview><tr><th>stage</th><th>kept</th><th>fell</th><th class=wide></th></tr>"
    for done in stages:
        counts = f'<td class="number">{done.num_kept:,}</td><td class="number">{sum(done.rejected.values()):,}</td>'
        yield f'<tr><td><a href="#{safe_text(done.name)}">{safe_text(done.name)}</a></td>{counts}<td>{_bar(done, most)}</td></tr>'
    yield "</table>"
    for done in stages:
        yield f'<h2 id="{safe_text(done.name)}">{safe_text(done.name)}</h2>'
        yield f"<p class=soft>read {done.num_read:,}, kept {done.num_kept:,}, fell {sum(done.rejected.values()):,}</p>"
        yield _reasons(done.rejected)
        yield _samples("kept", islice(read_records(done.kept), NUM_SHOWN))
        yield _samples("fell", _one_of_each(done.directory / REJECTED, len(done.rejected)))


def _bar(done: Done, most: int) -> str:
    """Kept and fallen on a scale that all stages share."""
    fell = sum(done.rejected.values())
    widths = [("kept", 100 * done.num_kept / most), ("fell", 100 * fell / most)]
    parts = "".join(f'<span class="{name}" style="width:{width:.2f}%"></span>' for name, width in widths if width)
    return f'<div class="bar" role="img" aria-label="kept {done.num_kept}, fell {fell}">{parts}</div>'


def _reasons(rejected: Mapping[str, int]) -> str:
    rows = sorted(rejected.items(), key=lambda entry: (-entry[1], entry[0]))
    cells = "".join(f'<tr><td class="number">{count:,}</td><td>{safe_text(reason)}</td></tr>' for reason, count in rows)
    return f"<table>{cells}</table>" if cells else ""


def _one_of_each(path: Path, num_reasons: int) -> Iterator[Record]:
    """The first record that fell for each reason."""
    seen: set[str] = set()
    for record in read_records(path) if num_reasons else ():
        if record["rejected"]["reason"] not in seen:
            seen.add(record["rejected"]["reason"])
            yield record
        if len(seen) == num_reasons:
            return


def _samples(kind: str, records: Iterator[Record]) -> str:
    return "".join(f"<details><summary>{_head(kind, record)}</summary>{_fields(record)}</details>" for record in records)


def _head(kind: str, record: Record) -> str:
    reason = record.get("rejected", {}).get("reason", "")
    name = record.get("id") or record.get("origin") or ""
    name = f"{name}/{record['sample']}" if "sample" in record else name
    return f"{kind}: {safe_text(name)}{f' <span class=soft>({safe_text(reason)})</span>' if reason else ''}"


def _fields(record: Record) -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td><pre>{safe_text(_shown(record[name]))}</pre></td></tr>" for name in SHOWN_FIELDS if record.get(name)
    )
    return f"<table>{rows}</table>"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ... {len(text) - LONGEST_SHOWN:,} characters more"
