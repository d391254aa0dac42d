"""The command line: `structcot NAME ...` and `python -m structcot.NAME ...` are the same.

Each command imports what it needs when it runs, so `--help` answers at once. What the user can mend ends in one message and exit status 2,
a failed run in 1, a run stopped by a signal after a complete checkpoint in 75.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from structcot import __version__
from structcot.cli_options import ConfigFile, JsonFile, Overrides, in_a_directory, write_json
from structcot.cli_traces import curate, grade, perturb, segment, view
from structcot.config_file import load_config
from structcot.errors import ConfigError, StructcotError, ToldElsewhere

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Train long-chain-of-thought reasoners from few demonstrations, and ask what in a demonstration teaches."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a path, a hub id, smollm2-135m, countdown, or clock")],
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="where to put it")] = None,
    revision: Annotated[str, typer.Option(help="branch, tag or commit on the hub")] = "main",
    num_records: Annotated[int, typer.Option(min=1, help="countdown, clock: how many demonstrations")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="countdown, clock: seed of problems, search and wording")] = 0,
    difficulty: Annotated[str, typer.Option(help="countdown: easy (3 or 4 numbers), medium, or hard (6 numbers, long searches)")] = "easy",
    json_file: JsonFile = None,
) -> None:
    """Put a model or data set on disk and print its path."""
    from structcot.countdown import DIFFICULTIES
    from structcot.fetch import fetch as fetch_to_disk

    if difficulty not in DIFFICULTIES:
        raise ConfigError(f'--difficulty: got "{difficulty}"; use one of {", ".join(DIFFICULTIES)}')
    path = fetch_to_disk(name, to, revision=revision, num_records=num_records, seed=seed, difficulty=DIFFICULTIES[difficulty])
    print(path)
    write_json(json_file, {"name": name, "path": str(path)})


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Read, render, mask, check and plan the data; writes OUTPUT/data and trains nothing."""
    from structcot.prepare import prepare as prepare_run
    from structcot.rundir import locked

    loaded = load_config(config, overrides or ())
    output_dir = Path(loaded.output_dir)
    with locked(output_dir):
        prepare_run(loaded, lambda: False)
    facts = json.loads((output_dir / "data" / "plan.json").read_text(encoding="utf-8"))
    print("\n".join(f"{key:20} {value}" for key, value in facts.items() if not isinstance(value, dict)))
    write_json(json_file, facts)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Train, or go on where a complete checkpoint lies in the output directory; ends with the exported adapter or model."""
    from structcot.train import train as train_run

    facts = train_run(load_config(config, overrides or ()))
    if os.environ.get("RANK", "0") == "0":
        for name in ("report", "weights", "metrics"):
            print(f"{name:8} {facts[name]}")
        write_json(json_file, facts)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="GPUs of the run")] = 8,
    device: Annotated[str, typer.Option(help="kind of GPU: h100-80gb, h200-141gb, b200-180gb, a100-80gb")] = "h100-80gb",
    document_tokens: Annotated[int | None, typer.Option(min=1, help="assume documents of this length instead of the data's")] = None,
    price: Annotated[float, typer.Option(min=0.0, help="of one GPU for an hour, to tell the cost of the run")] = 0.0,
    json_file: JsonFile = None,
) -> None:
    """Predict memory, time and cost of a run on GPUs, without a GPU and without the model's weights. Ends with 1 if it does not fit."""
    from structcot.machines import find_machine
    from structcot.plan import plan_run
    from structcot.plan_text import facts_of, text_of

    machine = find_machine(device)
    predicted = plan_run(load_config(config, overrides or ()), world_size, machine, document_tokens)
    print(text_of(predicted, price))
    write_json(json_file, facts_of(predicted, price))
    if not predicted.fits:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output directory of a run")],
    merge: Annotated[bool, typer.Option("--merge", help="also write base and adapter merged, as a Hugging Face checkpoint")] = False,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="where to write adapter/ and model/; default: into RUN")] = None,
    json_file: JsonFile = None,
) -> None:
    """Write what a run has learned as a PEFT adapter, checked by reloading it, and as a merged model on request."""
    from structcot.export import export_run

    exports = export_run(run, merge=merge, to=to)
    for one in exports:
        print(f"{one.path}\n  {one.serve_command}")
    write_json(json_file, {one.path.name: {"path": str(one.path), "serve": one.serve_command} for one in exports})


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output directory of a finished run")],
    num_prompts: Annotated[int, typer.Option(min=1, help="how many held-out prompts to answer")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 600,
    json_file: JsonFile = None,
) -> None:
    """Answer held-out prompts with what a run has learned: a look, not a measurement."""
    from structcot.generate import generate as generate_answers

    completions = generate_answers(run, num_prompts=num_prompts, max_new_tokens=max_new_tokens)
    for one in completions:
        print(
            f"{one.source}: {'finished' if one.finished else 'cut off'}, {'thought, then solution' if one.structured else 'no structure'}"
        )
    write_json(json_file, [asdict(one) for one in completions])


@app.command("eval")
def evaluate(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[EVAL.toml] [KEY=VALUE]...", help="config file, overrides")] = None,
    model: Annotated[str | None, typer.Option(help="a directory, a hub id, or the output directory of a run")] = None,
    adapter: Annotated[str | None, typer.Option(help="directory of a PEFT adapter, or of a run that has one")] = None,
    tasks: Annotated[str | None, typer.Option(help="benchmarks by name, or NAME=FILE.jsonl, separated by commas")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers (default), vllm, or openai for any compatible server")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first problems of each task")] = None,
    output_dir: Annotated[str | None, typer.Option(metavar="DIR", help="where samples and reports go; default: runs/eval/MODEL")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure accuracy on benchmarks, with intervals; goes on where an earlier call was stopped.

    Benchmarks: aime24, aime25, amc23, math500, olympiadbench, livecodebench, gsm8k. Keys: docs/evaluation.md, for instance
    sampling.max_new_tokens=4096, prompt=sky-t1, data_dir=DIR (files NAME.jsonl that are taken in place of the hub's).
    """
    from structcot.eval.command import read_config, summary_of
    from structcot.eval.run import evaluate as run_evaluation

    options = {
        "model_name_or_path": model,
        "adapter": adapter,
        "tasks": tasks,
        "engine": engine,
        "limit": limit,
        "output_dir": output_dir,
    }
    results = run_evaluation(read_config(arguments or (), options))
    print(summary_of(results))
    write_json(json_file, results)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="TOML file of the study")],
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="cells at once, each with its share of cores and GPUs")] = 1,
    cell: Annotated[str, typer.Option(metavar="NAME", help="run this cell only: its name, or its number in --dry-run")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print every cell with its commands, and run nothing")] = False,
    slurm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write an array job for sbatch, and run nothing", callback=in_a_directory)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Perturb, train, evaluate, compare: a whole study of what teaches; goes on where an earlier call was stopped."""
    from structcot.study.command import study as run

    outcome = run(config, overrides or (), jobs=jobs, cell=cell, dry_run=dry_run, slurm=slurm)
    write_json(json_file, outcome.facts)
    if outcome.missing:
        raise StructcotError(f"{config}: {len(outcome.missing)} cells are not done, see above; the same command tries them again")


for command in (curate, segment, perturb, grade, view):
    app.command()(command)


def main() -> None:
    """Entry point of `structcot`."""
    _guarded(sys.argv[1:])


def run_command(name: str) -> None:
    """Entry point of `python -m structcot.NAME`."""
    _guarded([name, *sys.argv[1:]])


def _guarded(arguments: list[str]) -> None:
    """Run a command; errors that are the user's or the run's own end in one message."""
    # Tokenizers warn on every fork once they have run in threads; nothing here forks after that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(args=arguments, prog_name="structcot")
    except ToldElsewhere as error:
        sys.exit(error.exit_status)
    except (StructcotError, OSError, KeyboardInterrupt) as error:
        print(f"structcot: {'stopped by SIGINT' if isinstance(error, KeyboardInterrupt) else error}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, StructcotError) else 1)


if __name__ == "__main__":
    main()
