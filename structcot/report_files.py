"""What the report page reads: the files of a run directory, at any moment of the run.

A file that is not there yet reads as empty. A file that is there and broken reads as far as it can be, with a line in `notes` that says
what was left out; only the last line of a file of lines may be half written without a word, because a run may be writing it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What could be read of a run directory: empty where a file is not there, with a line in `notes` where one is broken."""

    name: str
    metrics: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    plan: dict[str, Any]
    proof: dict[str, Any]
    manifest: dict[str, Any]
    certificate: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    notes: list[str]

    @property
    def num_steps(self) -> int:
        """Optimizer steps that metrics.jsonl tells of; what was measured before the first is step 0 and none of them."""
        return sum(row["step"] > 0 for row in self.metrics)


def read_run(run_dir: Path) -> RunFiles:
    """Read the files of a run directory, also while they are being written."""
    notes: list[str] = []
    by_step = _read_metrics(run_dir / "metrics.jsonl", notes)
    config_text = _read_text(run_dir / "config.toml", notes)
    return RunFiles(
        name=run_dir.resolve().name,
        metrics=[by_step[step] for step in sorted(by_step)],
        rejected=_read_lines(run_dir / "data" / "rejected.jsonl", notes),
        plan=_read_object(run_dir / "data" / "plan.json", notes),
        proof=_read_object(run_dir / "data" / "proof.json", notes),
        manifest=_read_object(run_dir / "manifest.json", notes),
        certificate=_read_object(run_dir / "adapter" / "certificate.json", notes),
        config=_parse_toml(config_text, notes),
        config_text=config_text,
        notes=notes,
    )


def number_in(record: Mapping[str, Any], key: str) -> float | None:
    """Take the number under `key`, None where there is none: a key may be missing, null, or hold something else."""
    value = record.get(key)
    return value if type(value) in (int, float) else None


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """Take the number under `key` of each row, None where it has none."""
    return [number_in(row, key) for row in rows]


def known(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Take the finite numbers under `key`, of the rows that have one."""
    return [value for value in column(rows, key) if value is not None and math.isfinite(value)]


def _read_text(path: Path, notes: list[str]) -> str:
    """Read the text of a file, empty where it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return ""


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read the JSON object in a file, empty where there is none."""
    text = _read_text(path, notes)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        notes.append(f"{path.name} is not complete JSON: {error}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds a JSON {type(value).__name__} and not an object")
        return {}
    return value


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read a JSON object a line. A last line without an end is still being written; any other broken line is noted."""
    records, broken = [], []
    lines = _read_text(path, notes).split("\n")
    for index, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            record = None
        if isinstance(record, dict):
            records += [record] if record else []
        elif index < len(lines):
            broken.append(index)
    if broken:
        notes.append(f"{path.name}: lines left out because they hold no JSON object: {len(broken):,}, the first is line {broken[0]:,}")
    return records


def _read_metrics(path: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Read metrics by step. A step is there twice where a run was killed after it and resumed before it: the later one made the result."""
    rows = _read_lines(path, notes)
    numbered = [row for row in rows if type(row.get("step")) is int]
    by_step = {row["step"]: row for row in numbered}
    if len(numbered) < len(rows):
        notes.append(f"{path.name}: lines left out because they name no step: {len(rows) - len(numbered):,}")
    if len(by_step) < len(numbered):
        notes.append(f"{path.name}: steps that are there again after a resume: {len(numbered) - len(by_step):,}; the later ones are shown")
    return by_step


def _parse_toml(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        notes.append(f"config.toml is not valid TOML: {error}")
        return {}
