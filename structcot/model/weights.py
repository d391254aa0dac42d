"""safetensors files into the decoder and out of it. Every tensor of a checkpoint is used exactly once, or the load fails and says which.

Only safetensors are read: a pickled file can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from structcot.config import Config
from structcot.errors import ModelError
from structcot.model.decoder import Decoder
from structcot.model.lora import adapters_of, attach_lora
from structcot.model.parts import local_part, local_rows
from structcot.model.shard import shard_model
from structcot.model.spec import ModelSpec, read_spec
from structcot.model_files import WEIGHTS_INDEX, weight_files

MAX_SHARD_BYTES = 5 * 10**9

PIECE_BYTES = 256 * 2**20
"""Of a file that is read at a time."""

BLOCK_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
"""Norms that are sharded with the adapters, which are fp32; they are rounded where they are used, so nothing of the result changes."""


def build_model(model_dir: Path, config: Config, device: torch.device, mesh: DeviceMesh | None = None) -> Decoder:
    """The model that `config` trains, weights loaded: frozen with adapters, or all weights as fp32 masters; sharded over `mesh` if given.

    Raises:
        ModelError: if the checkpoint does not fit its own config.json.
        ConfigError: if an adapter is asked for where the model has no such projection.
    """
    model = empty_model(read_spec(model_dir), config, mesh)
    in_host_memory = mesh is not None and config.parallel.cpu_offload == "parameters"
    model.to_empty(device=torch.device("cpu") if in_host_memory else device)
    model.tie()
    load_weights(model, model_dir)
    for _, pair in adapters_of(model):
        pair.initialise(config.seed)
    return model


def empty_model(spec: ModelSpec, config: Config, mesh: DeviceMesh | None = None, device: str = "meta") -> Decoder:
    """The model that `config` trains, its weights still without values, and on `meta` without memory.

    All that is trained is kept in fp32, and so are norms, but for those of heads: these and frozen matrices are in the computation's dtype.

    Raises:
        ConfigError: if an adapter is asked for where the model has no such projection.
    """
    compute_dtype = getattr(torch, config.train.dtype)
    with torch.device(device):
        model = Decoder(spec, compute_dtype)
        if config.tuning.method == "lora":
            for name, parameter in model.named_parameters():
                if not name.endswith(BLOCK_NORMS):
                    parameter.data = parameter.data.to(compute_dtype)
            attach_lora(model, config.tuning)
    if mesh is not None:
        shard_model(model, mesh, config)
    return model


def load_weights(model: Decoder, model_dir: Path) -> None:
    """Fill the parameters of `model` but its adapters from a checkpoint, each rank its own rows, a few at a time.

    The files are mapped, so the ranks of a node share one copy of them in the page cache, and none holds more than PIECE_BYTES in private.

    Raises:
        ModelError: if a tensor is missing, left over, of another shape, or a file cannot be read.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if ".adapters." not in name}
    found = dict(read_tensors(model_dir))
    extra_head = found.pop("lm_head.weight", None) if model.spec.tied_head else None
    leftover = [name for name in found if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    missing = [name for name in wanted if name not in found]
    if leftover or missing:
        raise ModelError(f"{model_dir}: the weights do not fit config.json: missing {_some(missing)}, left over {_some(leftover)}")
    for name, parameter in wanted.items():
        reader = found[name]
        if reader.shape != tuple(parameter.shape):
            raise ModelError(f"{model_dir}: {name} has shape {reader.shape}, config.json says {tuple(parameter.shape)}")
        for place, piece in reader.pieces(local_rows(parameter)):
            local_part(parameter.data)[place].copy_(piece)
    if extra_head is not None:
        _need_equal(extra_head, model.model.embed_tokens.weight, model_dir)


def _need_equal(head: TensorReader, embedding: Tensor, model_dir: Path) -> None:
    for place, piece in head.pieces(local_rows(embedding)):
        part = local_part(embedding.data)[place]
        if not torch.equal(piece.to(part.device, part.dtype), part):
            raise ModelError(f"{model_dir}: config.json ties the head to the embedding, but lm_head.weight differs from it")


class TensorReader:
    """One tensor of a safetensors file, which is opened when something is read."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...]):
        self.path, self.name, self.shape = path, name, shape

    def __call__(self) -> Tensor:
        """All of it, in the file's dtype."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)

    def like(self) -> Tensor:
        """Its shape and dtype, without memory."""
        with safe_open(self.path, framework="pt") as file:
            row = file.get_slice(self.name)[:1] if self.shape else file.get_tensor(self.name)
            return torch.empty(self.shape, dtype=row.dtype, device="meta")

    def pieces(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """`rows` of it in pieces of about PIECE_BYTES, each with its place among `rows`."""
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_slice(self.name)
            row_bytes = 4 * math.prod(self.shape[1:])
            step = max(1, PIECE_BYTES // max(1, row_bytes))
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                yield slice(start - rows.start, stop - rows.start), tensor[start:stop]


def read_tensors(model_dir: Path) -> Iterator[tuple[str, TensorReader]]:
    """(name, reader) of every tensor of a checkpoint, no tensor read yet.

    Raises:
        ModelError: if a file is damaged.
    """
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read as safetensors: {error}; fetch the model again") from error
        for name, shape in shapes.items():
            yield name, TensorReader(path, name, shape)


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


def save_weights(readers: Mapping[str, TensorReader], tensor: Callable[[str], Tensor], directory: Path | None) -> None:
    """Write the tensors that `tensor` makes as a Hugging Face checkpoint: files of at most 5 GB with an index.

    `readers` are those of the base, whose names, shapes and dtypes it has. Without a directory every tensor is made and none kept: for
    ranks that only give their part of them.
    """
    shapes = {name: reader.like() for name, reader in readers.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD_BYTES, filename_pattern="model{suffix}.safetensors")
    for file_name, names in split.filename_to_tensors.items():
        if directory is None:
            for name in names:
                tensor(name)
        else:
            save_file({name: tensor(name).contiguous() for name in names}, directory / file_name, metadata={"format": "pt"})
    if split.is_sharded and directory is not None:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
