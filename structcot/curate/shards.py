"""What a curation ends with: the demonstrations in shards, as JSON lines and as Parquet, and a card that says what they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from structcot.curate.config import CurateConfig
from structcot.curate.stages import Done, Record, read_records
from structcot.files import replacing, write_text
from structcot.traces import line_of

DATA, CARD = "data", "README.md"
COLUMNS = ("id", "messages", "source", "gold", "difficulty", "metrics", "provenance")


def write_shards(config: CurateConfig, mixed: Done) -> list[Path]:
    """Write all demonstrations in their order, and remove what an earlier call left there; returns the shards as JSON lines.

    Raises:
        OSError: if they cannot be written.
    """
    directory = Path(config.output_dir) / DATA
    directory.mkdir(parents=True, exist_ok=True)
    num_shards = max(1, -(-mixed.num_kept // config.output.shard_records))
    paths = [directory / f"train-{number:05d}-of-{num_shards:05d}.jsonl" for number in range(num_shards)]
    unwritten = read_records(mixed.kept)
    for path in paths:
        records = list(islice(unwritten, config.output.shard_records))
        with replacing(path, "wb") as file:
            file.writelines(line_of(record, b"") for record in records)
        _write_parquet(path.with_suffix(".parquet"), records)
    wanted = {*paths, *(path.with_suffix(".parquet") for path in paths)}
    for old in set(directory.glob("train-*")) - wanted:
        old.unlink()
    return paths


def write_card(config: CurateConfig, stages: Sequence[Done]) -> None:
    """Write the card: what is in the data, by source and difficulty, how long, of which structure, and why the rest fell."""
    write_text(Path(config.output_dir) / CARD, "\n".join(_card(config, stages)))


def facts_of(records: Iterator[Record]) -> dict[str, Any]:
    """Counts by source and by difficulty, and for lengths and structure least, middle and greatest."""
    sources: Counter[str] = Counter()
    difficulties: Counter[str] = Counter()
    reformatted: Counter[str] = Counter()
    values: dict[str, list[float]] = {"tokens": [], "characters": [], "steps": [], "keywords": []}
    num_records = 0
    for record in records:
        num_records += 1
        sources[record["source"]] += 1
        difficulties["" if record["difficulty"] is None else f"{record['difficulty']:g}"] += 1
        reformatted[record["provenance"]["reformatted"]] += 1
        values["tokens"].append(record["provenance"]["completion_tokens"])
        values["characters"].append(len(record["messages"][-1]["content"]))
        values["steps"].append(record["metrics"]["steps"])
        values["keywords"].append(sum(record["metrics"]["keywords"].values()))
    return {
        "records": num_records,
        "sources": dict(sorted(sources.items())),
        "difficulty": dict(sorted(difficulties.items(), key=lambda entry: float(entry[0] or 0))),
        "reformatted": dict(sorted(reformatted.items())),
        **{name: lengths_of(numbers) for name, numbers in values.items()},
    }


def lengths_of(values: Sequence[float]) -> dict[str, float]:
    """Least, middle and greatest of some numbers, and their 10th and 90th hundredth."""
    ordered = sorted(values)
    places = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: ordered[round(place * (len(ordered) - 1))] for name, place in places.items()} if ordered else {}


def _write_parquet(path: Path, records: Sequence[Record]) -> None:
    """Write one shard with the columns that all records have alike; metrics and provenance are JSON in a column of text."""
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    types = {**dict.fromkeys(COLUMNS, text), "messages": turns, "difficulty": pyarrow.float64()}
    schema = pyarrow.schema([(name, types[name]) for name in COLUMNS])
    rows = [{**record, **{name: json.dumps(record[name], sort_keys=True) for name in ("metrics", "provenance")}} for record in records]
    with replacing(path, "wb") as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file)


def _card(config: CurateConfig, stages: Sequence[Done]) -> Iterator[str]:
    facts = facts_of(read_records(stages[-1].kept))
    yield "---\nconfigs:\n- config_name: default\n  data_files: data/train-*.parquet\n---\n"
    yield f"# {config.title}\n"
    yield f"{facts['records']:,} demonstrations: problems with chains of thought of {config.teacher.model}, checked by {_checks(config)}.\n"
    yield from _counts("By source", facts["sources"])
    yield from _counts("By difficulty", {name or "no label": count for name, count in facts["difficulty"].items()})
    yield from _counts("How the thought came between its tags", facts["reformatted"])
    yield "| | least | 10 % | middle | 90 % | greatest |\n|---|---|---|---|---|---|"
    for name in ("tokens", "characters", "steps", "keywords"):
        yield f"| {name} | {' | '.join(f'{value:,.0f}' for value in facts[name].values())} |"
    yield "\n## Where the rest fell\n\n| stage | read | kept | fell | why |\n|---|---|---|---|---|"
    for done in stages:
        why = "; ".join(f"{reason}: {count:,}" for reason, count in done.rejected.items()) or "–"
        yield f"| {done.name} | {done.num_read:,} | {done.num_kept:,} | {sum(done.rejected.values()):,} | {why} |"
    yield "\n## How it was made\n\n```toml"
    yield f"{config.to_toml('output_dir', 'scale')}```\n"


def _checks(config: CurateConfig) -> str:
    graders = " and ".join(config.check.graders)
    return f"the grader{'s' * (len(config.check.graders) > 1)} {graders}, programs by their tests"


def _counts(title: str, counts: Mapping[str, int]) -> Iterator[str]:
    yield f"{title}: {', '.join(f'{name} {count:,}' for name, count in counts.items()) or 'nothing'}.\n"
