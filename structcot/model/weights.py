"""safetensors files into the decoder and out of it. Every tensor of a checkpoint is used exactly once, or the load fails and says which.

Only safetensors are read: a pickled file can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from structcot.config import Config
from structcot.errors import ModelError
from structcot.model.decoder import Decoder
from structcot.model.lora import attach_lora
from structcot.model.spec import read_spec
from structcot.model_files import SIDE_FILES, TOKENIZER_FILES, WEIGHTS_INDEX, copy_files, weight_files

MAX_SHARD_BYTES = 5 * 10**9


def build_model(model_dir: Path, config: Config, device: torch.device) -> Decoder:
    """The model that `config` trains, weights loaded: frozen with adapters, or all weights as fp32 masters.

    Raises:
        ModelError: if the checkpoint does not fit its own config.json.
        ConfigError: if an adapter is asked for where the model has no such projection.
    """
    compute_dtype = getattr(torch, config.train.dtype)
    with torch.device("meta"):
        model = Decoder(read_spec(model_dir), compute_dtype)
    full = config.tuning.method == "full"
    load_weights(model, model_dir, torch.float32 if full else compute_dtype, device)
    if not full:
        attach_lora(model, config.tuning, config.seed)
    return model.to(device)


def load_weights(model: Decoder, model_dir: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Replace the (meta) parameters of `model` by the checkpoint's, in `dtype`, one tensor at a time.

    Raises:
        ModelError: if a tensor is missing, left over, of another shape, or a file cannot be read.
    """
    wanted = dict(model.named_parameters())
    found = dict(read_tensors(model_dir))
    extra_head = found.pop("lm_head.weight", None) if model.spec.tied_head else None
    leftover = [name for name in found if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    missing = [name for name in wanted if name not in found]
    if leftover or missing:
        raise ModelError(f"{model_dir}: the weights do not fit config.json: missing {_some(missing)}, left over {_some(leftover)}")
    for name, parameter in wanted.items():
        read = found[name]
        tensor = read()
        if tensor.shape != parameter.shape:
            raise ModelError(f"{model_dir}: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(parameter.shape)}")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
    if model.spec.tied_head:
        embedding = model.model.embed_tokens.weight
        if extra_head is not None and not torch.equal(extra_head().to(embedding.dtype), embedding):
            raise ModelError(f"{model_dir}: config.json ties the head to the embedding, but lm_head.weight differs from it")
        model.lm_head.weight = embedding


class TensorReader:
    """Reads one tensor of a safetensors file when called."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def __call__(self) -> Tensor:
        """Read it, in the file's dtype."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def read_tensors(model_dir: Path) -> Iterator[tuple[str, TensorReader]]:
    """(name, reader) of every tensor of a checkpoint, no tensor read yet.

    Raises:
        ModelError: if a file is damaged.
    """
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read as safetensors: {error}; fetch the model again") from error
        for name in names:
            yield name, TensorReader(path, name)


def weights_fingerprint(model_dir: Path) -> str:
    """Hash that tells two checkpoints apart without reading them whole: names, sizes, headers and 256 spots of each file."""
    digest = hashlib.sha256()
    for path in weight_files(model_dir):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            digest.update(file.read(min(header_bytes, size)))
            for spot in range(256):
                file.seek(size * spot // 256)
                digest.update(file.read(4096))
    return digest.hexdigest()


def save_weights(tensors: Mapping[str, Tensor], model_dir: Path, directory: Path) -> None:
    """Write a Hugging Face checkpoint: shards of at most 5 GB with an index, and the files beside them copied from `model_dir`."""
    directory.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=MAX_SHARD_BYTES, filename_pattern="model{suffix}.safetensors")
    for file_name, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, directory / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_files(model_dir, directory, (*SIDE_FILES, *TOKENIZER_FILES))


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
