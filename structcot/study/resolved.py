"""The training and the evaluation config of a cell: the user's file and overrides, and what the study sets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structcot.config import Config
from structcot.config_file import checked, lay_over, load_config, parse_config, read_values
from structcot.errors import ConfigError
from structcot.eval.config import EvalConfig
from structcot.eval.prompts import QUESTION
from structcot.eval.tasks import SUFFIXES, find_task
from structcot.study.config import Part

PROBLEMS = "problems"
# A study says which model is trained on what, where it is written, and what is held out: in a file such values are beaten, as overrides
# they are mistakes.
TRAINING_KEYS = ("model_name_or_path", "output_dir", "seed", "data.train", "data.eval", "data.eval_fraction")
EVALUATION_KEYS = ("model_name_or_path", "adapter", "output_dir", "seed")
# Keys of an evaluation that do not decide its result, or that stand for files whose content does.
RUNS_ELSEWHERE = {"model_name_or_path", "adapter", "output_dir", "data_dir", "batch_size", "compare_with", "server", "vllm"}


def training_config(part: Part, overrides: Sequence[str], own: Mapping[str, Any], where: str) -> Config:
    """Resolve the config of a run; `own` are the values that the study sets, by dotted key, and `where` is the key that messages name.

    Raises:
        ConfigError: if the file, an override or the whole is wrong.
    """
    given = [*part.overrides, *overrides]
    _refuse(given, TRAINING_KEYS, where)
    given += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in {"data.eval_fraction": 0.0, **own}.items()]
    try:
        return load_config(Path(part.config), given) if part.config else parse_config(lay_over({}, given), origin="overrides")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def evaluation_config(part: Part, own: Mapping[str, Any], problems: Path | None, where: str) -> EvalConfig:
    """Resolve the config of an evaluation; `problems` is the file of the problems that are made from the demonstrations, None without any.

    Those are asked in the words of the demonstrations.

    Raises:
        ConfigError: if the file, an override or the whole is wrong, or there is no such benchmark.
    """
    _refuse(part.overrides, EVALUATION_KEYS, where)
    try:
        values = {**lay_over(read_values(Path(part.config)) if part.config else {}, part.overrides), **own}
        tasks = values.get("tasks", [])
        tasks = tasks.split(",") if isinstance(tasks, str) else tasks
        if problems is not None and isinstance(tasks, list):
            tasks = [*tasks, {"name": PROBLEMS, "path": str(problems), "template": QUESTION}]
        if not tasks:
            raise ConfigError('tasks: are missing; name some by overrides = ["tasks=aime24,math500"], or make some by data.problems = 100')
        config = checked(EvalConfig, values | {"tasks": tasks}, origin=part.config or "overrides")
        for task in config.tasks:
            find_task(task)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if config.engine == "openai":
        raise ConfigError(f'{where}: engine: a study serves no models, so "openai" cannot be used; use transformers or vllm')
    return config


def training_facts(config: Config) -> dict[str, Any]:
    """What decides what is learned, as JSON values, but for the model and the data, whose content counts and not their names."""
    named = ("model_name_or_path", "data.train", "data.eval")
    return {key: value for key, value in config.identity().items() if key not in named}


def evaluation_facts(config: EvalConfig) -> dict[str, Any]:
    """What decides the result of an evaluation, as JSON values, but for the model and the content of files."""
    values = config.model_dump(mode="json", exclude=RUNS_ELSEWHERE)
    values["grading"].pop("jobs")
    for task in values["tasks"]:
        task["path"] = "" if task["name"] == PROBLEMS or Path(task["path"]).is_file() else task["path"]
    return values


def task_files(config: EvalConfig) -> list[Path]:
    """The files on this machine that problems are read from, but for those that the study writes."""
    local = [Path(config.data_dir) / f"{task.name}{suffix}" for task in config.tasks for suffix in SUFFIXES if config.data_dir]
    named = [Path(task.path) for task in config.tasks if task.path and task.name != PROBLEMS]
    return [path for path in (*local, *named) if path.is_file()]


def of_as_many_steps(config: Config, num_records: int) -> Config:
    """The config of a run of as many steps as `num_records` demonstrations would give it, however many are left in its data."""
    train = config.train
    if train.max_steps > 0 or train.batch_sequences is None:
        return config
    steps = math.ceil(round(train.num_train_epochs * math.ceil(num_records / train.batch_sequences), 6))
    return config.model_copy(update={"train": train.model_copy(update={"max_steps": steps})})


def of_as_many_tokens(config: Config, num_tokens: int, reference_tokens: int) -> Config:
    """The config of a run over as many tokens as `reference_tokens` in the same epochs, where its own data has `num_tokens`."""
    epochs = round(config.train.num_train_epochs * reference_tokens / num_tokens, 6)
    return config.model_copy(update={"train": config.train.model_copy(update={"num_train_epochs": epochs})})


def need_budget(config: Config, budget: str, where: str) -> None:
    """Make sure that a training config leaves the budget to the study.

    Raises:
        ConfigError: naming the key that does not.
    """
    if budget == "tokens" and config.train.max_steps > 0:
        raise ConfigError(f'{where}: train.max_steps: budget = "tokens" scales the epochs; set train.num_train_epochs, and max_steps to -1')
    if budget == "samples" and config.train.batch_tokens and config.train.max_steps < 0:
        raise ConfigError(
            f"{where}: train.batch_tokens: gives longer demonstrations more steps; use batch_sequences, set train.max_steps, or take"
            ' budget = "tokens"'
        )


def _refuse(overrides: Sequence[str], keys: Sequence[str], where: str) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in keys:
            raise ConfigError(f"{where}: {key} is set by the study; leave it out")
