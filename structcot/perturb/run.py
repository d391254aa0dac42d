"""A data set through a chain of perturbations: streamed, in several processes, with its report beside it.

For OUT.jsonl there are OUT.records.jsonl (a line for every record, what became of it), OUT.report.json and OUT.report.html. Each appears
whole or not at all.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from structcot.files import write_json, write_lines_whole, write_text
from structcot.parallel import Lines, map_batches
from structcot.perturb.apply import Plan, gather_donors, perturb_line
from structcot.perturb.donors import Donors, sample_lines
from structcot.perturb.page import render_page
from structcot.perturb.report import Report, json_lines
from structcot.perturb.spec import Spec, spec_text
from structcot.perturb.wrong_answer import find_wrong_answers
from structcot.traces import line_of, read_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A perturbed batch: bytes of the output and of the file of records, and the sums over it."""

    output: bytes
    records: bytes
    report: Report


def perturb_file(source: str, to: str, plan: Plan, jobs: int) -> dict[str, Any]:
    """Perturb the records of `source` into `to` ("-" is standard input or output) and return the facts of the report.

    Raises:
        ConfigError: if a file cannot be read or written, or both are one.
        DataError: if wrong answers are asked for and the records cannot be judged.
    """
    with ExitStack() as stack:
        output = stack.enter_context(write_lines_whole(source, to))
        records = stack.enter_context(write_lines_whole(source, beside(to, ".records.jsonl"))) if to != "-" else None
        path = stack.enter_context(_readable_twice(source)) if _needs_two_passes(plan) else source
        first = plan.specs[0]
        if first.kind == "wrong-answer" and first.fraction:
            plan = replace(plan, wrong=find_wrong_answers(path, first, seed=plan.seed, answer_field=plan.answer_field, jobs=jobs))
        plan = replace(plan, donors=tuple(_donors(path, spec, plan, jobs) for spec in plan.specs))
        report = Report()
        for batch in map_batches(perturb_batch, read_lines(path, source), plan, jobs):
            output.write(batch.output)
            report.merge(batch.report)
            if records:
                records.write(batch.records)
    facts = _facts(source, to, plan, report)
    if to != "-":
        write_json(Path(beside(to, ".report.json")), facts)
        write_text(Path(beside(to, ".report.html")), render_page(facts))
    return facts


def perturb_batch(batch: Lines, plan: Plan) -> Batch:
    """Perturb a batch of lines; a record that does not change is written as it was read."""
    report, output, facts = Report(), [], []
    for source, line in batch:
        outcome = perturb_line(source, line, plan)
        facts.append(report.add(outcome))
        if not outcome.is_left_out:
            output.append(line_of(outcome.record, line))
    return Batch(output=b"".join(output), records="".join(json_lines(facts)).encode(), report=report)


def beside(to: str, suffix: str) -> str:
    """The path of a file that lies beside the output: its name with another ending."""
    return str(Path(to).with_suffix(suffix))


def _facts(source: str, to: str, plan: Plan, report: Report) -> dict[str, Any]:
    """All that there is to say about a perturbed data set."""
    facts = report.facts()
    stages = [
        {
            "kind": spec.kind,
            "asked_fraction": spec.fraction,
            "asked_record_fraction": spec.record_fraction,
            "settings": spec_text(spec),
            **stage,
        }
        for spec, stage in zip(plan.specs, facts.pop("stages"), strict=False)
    ]
    judged = {"judged": dict(sorted(plan.wrong.counts.items()))} if plan.wrong else {}
    alone = {"realised_fraction": stages[0]["realised_fraction"]} if len(stages) == 1 else {}
    return {"input": source, "output": to, "seed": plan.seed, **facts, **alone, **judged, "stages": stages}


def _donors(path: str, spec: Spec, plan: Plan, jobs: int) -> Donors:
    if spec.kind != "insert" or not spec.fraction:
        return Donors()
    sampled = sample_lines(read_lines(path), plan.seed)
    parts = list(map_batches(_donor_batch, sampled, (spec, plan.answer_field), jobs))
    return Donors(
        steps=tuple(chain.from_iterable(part.steps for part in parts)), owners=tuple(chain.from_iterable(part.owners for part in parts))
    )


def _donor_batch(batch: Lines, context: tuple[Spec, str]) -> Donors:
    return gather_donors(batch, *context)


def _needs_two_passes(plan: Plan) -> bool:
    return any(spec.kind in ("insert", "wrong-answer") and spec.fraction for spec in plan.specs)


@contextmanager
def _readable_twice(source: str) -> Iterator[str]:
    """The path of a file with the lines of `source`: standard input is kept on disk while it is needed."""
    if source != "-":
        yield source
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield file.name
