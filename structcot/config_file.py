"""Config files: a TOML file and overrides in, a checked config out, or a message that names the file, the key and what is allowed."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from structcot.config import Config, DataSource, nearest
from structcot.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)

# Pairs of keys of a section that say the same thing in two ways.
EXCLUSIVE = (("train", ("batch_sequences", "batch_tokens")), ("data", ("eval", "eval_fraction")))

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

# What other trainers call our keys: named in the error text, never accepted.
FOREIGN_NAMES = {
    "base_model": "model_name_or_path",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "lora_rank": "tuning.lora_r",
    "r": "tuning.lora_r",
    "lora_target": "tuning.lora_target_modules",
    "target_modules": "tuning.lora_target_modules",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "per_device_train_batch_size": "train.batch_sequences",
    "gradient_accumulation_steps": "train.batch_sequences",
    "train_batch_size": "train.batch_sequences",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "gradient_checkpointing": "parallel.recompute",
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config of a run, lay `key=value` overrides over it and check everything.

    Raises:
        ConfigError: naming the file, the dotted key, what was found and what is allowed.
    """
    values = read_values(path)
    for override in overrides:
        _forget_what_it_replaces(values, override.partition("=")[0].strip())
    return parse_config(lay_over(values, overrides), origin=str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The values of a TOML file, unchecked.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {error}; give the path of a TOML file") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error


def lay_over(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Change `values` by `a.b=value` overrides, whose values are TOML, and return them.

    Raises:
        ConfigError: if one of them is no override.
    """
    for override in overrides:
        _lay_over(values, override)
    return values


def parse_config(values: dict[str, Any], origin: str) -> Config:
    """Check the values of a run; `origin` is the file that messages name.

    Raises:
        ConfigError: listing every key that is wrong, one a line.
    """
    return checked(Config, {"data": {}, **values}, origin)  # so that it is data.train that is missing


def checked(schema: type[Schema], values: dict[str, Any], origin: str) -> Schema:
    """Check a nested dictionary of values against a section and those in it.

    Raises:
        ConfigError: listing every key that is wrong, one a line.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, origin, details) for details in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key that a config of this schema may hold, dotted."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))  # a table may be optional
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is not None and get_origin(field.annotation) is not list:
            yield from valid_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _lay_over(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f'override "{override}": use key=value, for example train.learning_rate=2e-4')
    table = values
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f'override "{override}": {name} is a value, not a table')
    table[path[-1]] = _toml_value(text.strip())


def _forget_what_it_replaces(values: dict[str, Any], key: str) -> None:
    """Of two keys that exclude each other, the one of the command line beats the one of the file."""
    for section, pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if key == f"{section}.{name}" and isinstance(values.get(section), dict):
                values[section].pop(other, None)


def _toml_value(text: str) -> Any:
    """The TOML value, or the text itself: a shell eats the quotes of `output_dir="runs/a"`; a wrong type is found by the schema."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(schema: type[BaseModel], origin: str, details: Any) -> str:
    location = [str(part) for part in details["loc"]]
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}{_suggestion(schema, key)}"
    if details["type"] == "missing":
        return f"{origin}: {key} is missing; set it in the file or as {key}=... on the command line"
    message = details["msg"].removeprefix("Value error, ")
    if not location:
        return f"{origin}: {message}"
    if details["type"].startswith(("greater_than", "less_than")):
        message = f"allowed is {_bounds(schema, details['loc'])}"
    if details["type"] == "model_type":
        message = f"use a table, [{key}]"
    if message.startswith(key):
        return f"{origin}: {message}"
    return f"{origin}: {key}: got {json.dumps(details['input'], default=str)[:200]}; {message[0].lower()}{message[1:]}"


def _bounds(schema: type[BaseModel], location: Sequence[str | int]) -> str:
    """The allowed range of the number at `location`, for example '>= 1 and <= 4096'."""
    section: Any = schema
    limits: list[str] = []
    for name in location:
        if isinstance(name, str):  # else an entry of a list
            field = section.model_fields[name]
            limits = [f"{sign} {getattr(one, kind)}" for kind, sign in SIGNS.items() for one in field.metadata if hasattr(one, kind)]
            section = next(iter(get_args(field.annotation)), field.annotation)
    return " and ".join(limits)


def _suggestion(schema: type[BaseModel], key: str) -> str:
    last = key.rsplit(".", 1)[-1]
    if re.fullmatch(r"data\.(train|eval)\.\d+", key.rpartition(".")[0]):
        return f"; valid: {' '.join(DataSource.model_fields)}{nearest(last, list(DataSource.model_fields))}"
    if schema is Config and last in FOREIGN_NAMES:
        return f"; here it is called {FOREIGN_NAMES[last]}"
    keys = [*schema.model_fields, *valid_keys(schema)]
    same_name = [candidate for candidate in keys if candidate.rsplit(".", 1)[-1] == last]
    if same_name:
        return f"; did you mean {same_name[0]}?"
    beside = {candidate.rpartition(".")[2]: candidate for candidate in keys if candidate.rpartition(".")[0] == key.rpartition(".")[0]}
    if near := difflib.get_close_matches(last, beside, n=1):
        return f"; did you mean {beside[near[0]]}?"
    by_last = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.5) or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"; did you mean {by_last.get(close[0], close[0])}?"
