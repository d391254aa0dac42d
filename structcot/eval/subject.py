"""Who is evaluated: a model, a model with an adapter, or what a run has trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from structcot.errors import ConfigError
from structcot.eval.config import EvalConfig
from structcot.fetch import resolve_model

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model by directory, or by its name on a server; `adapter` is the directory of a PEFT adapter, or "".

    `hashes` are the sha256 of what tells two subjects apart: the model's config and the adapter's weights.
    """

    name: str
    model: str
    adapter: str
    hashes: Mapping[str, str]


def find_subject(config: EvalConfig) -> Subject:
    """Find what `config` names. A run's output directory stands for its merged model, or else for its base with its adapter.

    Raises:
        ConfigError: if there is no such model or adapter.
        FetchError, ModelError: if the model cannot be fetched, or not be used safely.
    """
    if config.engine == "openai":
        name = config.server.model or config.model_name_or_path
        return Subject(name=name, model=name, adapter="", hashes={})
    model, adapter = config.model_name_or_path, config.adapter
    run = Path(model).expanduser()
    if model and (run / "config.toml").is_file():
        model, adapter = _trained_by(run, adapter)
    if adapter:
        adapter = str(_adapter_directory(Path(adapter)))
        model = model or base_of(Path(adapter))
    directory = resolve_model(model, config.revision)
    hashes = {"model_config": _sha256(directory / "config.json")}
    if adapter:
        hashes["adapter"] = _sha256(Path(adapter) / ADAPTER_WEIGHTS)
    name = config.adapter or config.model_name_or_path
    return Subject(name=name, model=str(directory), adapter=adapter, hashes=hashes)


def base_of(adapter: Path) -> str:
    """The model that an adapter was trained on, as its config names it.

    Raises:
        ConfigError: if it names none.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; export the adapter again") from error
    if not base:
        raise ConfigError(f"{path}: names no base model; give it as model_name_or_path")
    return str(base)


def _trained_by(run: Path, adapter: str) -> tuple[str, str]:
    if (run / "model" / "config.json").is_file():
        return str(run / "model"), adapter
    if (run / "adapter" / ADAPTER_CONFIG).is_file() and not adapter:
        return base_of(run / "adapter"), str(run / "adapter")
    raise ConfigError(f"model_name_or_path: {run} is a run without adapter/ or model/; train it to the end, or run structcot export {run}")


def _adapter_directory(path: Path) -> Path:
    found = next((place for place in (path, path / "adapter") if (place / ADAPTER_CONFIG).is_file()), None)
    if found is None:
        raise ConfigError(f"adapter: {path} holds no {ADAPTER_CONFIG}; give the directory of a PEFT adapter, or of a run that has one")
    if not (found / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"adapter: {found} holds no {ADAPTER_WEIGHTS}; pickled weights are not read: convert them to safetensors")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
