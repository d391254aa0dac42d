"""The files of a Hugging Face model directory: which there are, which of them are safe to open, and how they are copied.

Only safetensors are read: a pickled file can run code when it is opened.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from structcot.errors import ModelError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# Files beside the weights that a checkpoint needs to be loaded elsewhere.
SIDE_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def check_model_directory(path: Path) -> None:
    """Check that a directory holds a model that loads without running code: a config, and safetensors weights that lie inside it.

    Raises:
        ModelError: naming what is missing or unsafe.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: has no config.json; give the directory of a Hugging Face model")
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file() and _read_object(path / name).get("auto_map"):
            raise ModelError(
                f'{path / name}: "auto_map": needs remote code, which is never executed; use a model that transformers has built in'
            )
    for file in weight_files(path):
        _check_safetensors(file)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names.

    Raises:
        ModelError: if there is none, the index cannot be read, or it names a file outside the directory.
    """
    if (path / WEIGHTS_INDEX).is_file():
        return [path / name for name in _indexed_files(path / WEIGHTS_INDEX)]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if pickled := sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES):
        raise ModelError(f"{path}: only {', '.join(pickled)}; pickled weights can run code when loaded: convert to safetensors")
    raise ModelError(f"{path}: has neither {WEIGHTS} nor {WEIGHTS_INDEX}; fetch the model again")


def _indexed_files(index: Path) -> list[str]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f'{index}: has no "weight_map" from tensors to files; fetch the model again')
    names = sorted(set(weight_map.values()))
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f'{index}: names "{name}", which is no plain name of a safetensors file; such an index is not followed')
    return names


def _check_safetensors(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: is named in {WEIGHTS_INDEX} but missing; fetch the model again")
    with path.open("rb") as file:
        start = file.read(9)
    # A clone without git-lfs leaves a few lines of text in place of each large file.
    if start == b"version h":
        raise ModelError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in its directory")
    # The format opens with the length of its JSON header in 8 bytes.
    if start[8:] != b"{" or 8 + int.from_bytes(start[:8], "little") > path.stat().st_size:
        raise ModelError(f"{path}: is cut short or no safetensors file; fetch the model again")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, should hold a JSON object; fetch the model again")
    return value


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of `names` that `source` has."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(os.path.realpath(source / name), target / name)
