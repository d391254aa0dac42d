"""`structcot eval`: a config file, options and overrides become one checked config; results become lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structcot.config_file import checked, lay_over, read_values
from structcot.errors import ConfigError
from structcot.eval.config import EvalConfig


def read_config(arguments: Sequence[str], options: Mapping[str, Any]) -> EvalConfig:
    """Read `[EVAL.toml] [key=value ...]`; `options` are the values of flags by their keys, which beat the file, and overrides beat both.

    Raises:
        ConfigError: naming the argument, file or key that is wrong.
    """
    path = arguments[0] if arguments and "=" not in arguments[0] else ""
    values = read_values(Path(path)) if path else {}
    values |= {key: value for key, value in options.items() if value is not None}
    overrides = arguments[1:] if path else arguments
    unclear = [text for text in overrides if "=" not in text]
    if unclear:
        raise ConfigError(f'"{unclear[0]}": is no key=value; give one EVAL.toml first, then overrides such as sampling.num_samples=8')
    if "tasks" not in values and not any(text.startswith("tasks") for text in overrides):
        raise ConfigError("tasks: is missing; name some by --tasks aime24,math500, or give an EVAL.toml")
    return checked(EvalConfig, lay_over(values, overrides), origin=path or "structcot eval")


def summary_of(results: Mapping[str, Any]) -> str:
    """What a person wants to know first, a line a task."""
    lines = []
    for name, task in results["tasks"].items():
        low, high = task["interval"]
        lines.append(
            f"{name:16} {100 * task['accuracy']:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]  "
            f"{task['problems']} problems, {task['samples']} outputs"
        )
    return "\n".join(lines)
