"""The commands about problems and traces, which train nothing and load no model: curate, segment, perturb, grade, view."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from structcot.cli_options import JsonFile, Overrides, Settings, write_json


def curate(
    config: Annotated[Path, typer.Argument(metavar="CURATE.toml", help="TOML file of the curation")],
    overrides: Overrides = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="the last stage to run: prompts, sample, check ...; default: all")] = "",
    json_file: JsonFile = None,
) -> None:
    """Make demonstrations: problems, and a teacher's answers that are right, in one format; goes on where an earlier call was stopped."""
    from structcot.curate.command import curate as run

    write_json(json_file, run(config, overrides or (), until=until))


def segment(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="traces or model outputs, a JSON object a line; - for standard input")],
    to: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="the same records with steps and metrics; - for standard output")],
    settings: Settings = None,
    segmenter: Annotated[str, typer.Option(help="marker, sentence, blank-line, or llm")] = "marker",
    json_file: JsonFile = None,
) -> None:
    """Cut chains of thought into steps and measure their structure.

    Settings: field=NAME of the answer, jobs=N processes; for llm: url=URL and model=NAME of an OpenAI-compatible server, and
    key=VARIABLE, the environment variable that holds its key.
    """
    from structcot.segment import segment as segment_records
    from structcot.segment import summary_of

    facts = segment_records(source, to, segmenter, settings or ())
    print(summary_of(facts), file=sys.stderr if to == "-" else sys.stdout)
    write_json(json_file, facts)


def perturb(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="demonstrations, a JSON object a line; - for standard input")],
    to: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="where the perturbed ones go; - for standard output")],
    settings: Settings = None,
    kind: Annotated[str, typer.Option(help="wrong-answer, digits, keywords, delete, insert or shuffle")] = "",
    fraction: Annotated[float, typer.Option(help="how much of it, 0 to 1")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of every choice")] = 0,
    mode: Annotated[str, typer.Option(help="clean, or paper: bug for bug what the code of the paper does")] = "clean",
    json_file: JsonFile = None,
) -> None:
    """Change the content or the structure of demonstrations, and report what that did to them.

    Settings: what the kind takes (docs/structure.md), field=NAME of the answer, jobs=N processes, and then=KIND:FRACTION,NAME=VALUE,... for
    a further perturbation after this one.
    """
    from structcot.perturb.command import perturb as perturb_records
    from structcot.perturb.command import summary_of

    facts = perturb_records(source, to, settings or (), kind=kind, fraction=fraction, seed=seed, mode=mode)
    print(summary_of(facts), file=sys.stderr if to == "-" else sys.stdout)
    write_json(json_file, facts)


def grade(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="saved outputs, a JSON object a line; - for standard input")],
    to: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="the same records with their grades; - for standard output")],
    settings: Settings = None,
    grader: Annotated[str, typer.Option(help="math, exact, or paper: bug for bug what the paper's harness says")] = "math",
    json_file: JsonFile = None,
) -> None:
    """Grade saved outputs: each needs gold, and pred (an answer) or response (a whole output).

    Settings: jobs=N processes, limit=SECONDS for one answer.
    """
    from structcot.grade import grade as grade_records
    from structcot.grade import summary_of

    facts = grade_records(source, to, grader, settings or ())
    print(summary_of(facts), file=sys.stderr if to == "-" else sys.stdout)
    write_json(json_file, facts)


def view(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="traces or model outputs, a JSON object a line")],
    compare: Annotated[str | None, typer.Option(metavar="OTHER.jsonl", help="the same records, perturbed or answered otherwise")] = None,
    to: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="the page")] = Path("view.html"),
    field: Annotated[str, typer.Option(help="field of the answer, where the format is none of the known")] = "",
    json_file: JsonFile = None,
) -> None:
    """Write a self-contained page that shows traces as structure, one file or two side by side."""
    from structcot.view import write_view

    facts = write_view(source, to, compare=compare, field=field)
    print(facts["page"])
    write_json(json_file, facts)
