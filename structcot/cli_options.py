"""Arguments and options that several commands have, and what all of them do with --json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from structcot.errors import ConfigError

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the run")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="values that beat the file, e.g. train.learning_rate=2e-4")
]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="settings, listed above")]


def in_a_directory(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written for want of its directory before hours of work go into it."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{option.opts[0]}: {path.parent} is no directory; make it first, or name another file")
    return path


JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the same facts as JSON", callback=in_a_directory)]


def write_json(path: Path | None, facts: object) -> None:
    """Write what a command reports as JSON, for "-" to standard output."""
    if path == Path("-"):
        print(json.dumps(facts, indent=2))
    elif path is not None:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
