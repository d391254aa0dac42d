"""Ranks read a checkpoint by slices: each its own rows, from one copy of the files in the page cache, with little memory beside."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from structcot.distributed import joined
from structcot.model import weights
from structcot.model.decoder import Decoder
from structcot.model.parts import local_part, whole_on_cpu
from structcot.model.spec import read_spec
from structcot.model.weights import build_model
from tests.ranks import CPU, on_ranks
from tests.tiny_models import MODELS, tiny_checkpoint, tiny_config

GIB = 2**30
LARGE = {
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def load_and_gather(model_dir: Path, method: str, replicate: int) -> tuple[dict[str, Tensor], float]:
    """Every parameter, put together again from all ranks, and the share of them that this rank holds."""
    config = tiny_config(model_dir, tuning={"method": method, "lora_r": 6}, parallel={"replicate": replicate})
    with joined(config.parallel, CPU) as world:
        model = build_model(model_dir, config, CPU, world.mesh)
        held = sum(local_part(parameter.data).numel() for parameter in model.parameters())
        return {name: whole_on_cpu(parameter).clone() for name, parameter in model.named_parameters()}, held / num_weights(model)


def num_weights(model: Decoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("num_ranks", "replicate"), [(1, 1), (2, 1), (4, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_what_ranks_hold_makes_the_checkpoint(kind: str, num_ranks: int, replicate: int, method: str, tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path, kind)
    model = build_model(model_dir, tiny_config(model_dir, tuning={"method": method, "lora_r": 6}), CPU)
    for gathered, share in on_ranks(num_ranks, load_and_gather, model_dir, method, replicate):
        assert gathered.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(tensor, gathered[name]) for name, tensor in model.named_parameters())
        assert share == pytest.approx(replicate / num_ranks, rel=0.1)


def test_pieces_of_any_size_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tiny_checkpoint(tmp_path, "qwen2")
    whole = dict(build_model(model_dir, tiny_config(model_dir), CPU).named_parameters())
    monkeypatch.setattr(weights, "PIECE_BYTES", 1000)
    in_pieces = build_model(model_dir, tiny_config(model_dir), CPU)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in in_pieces.named_parameters())


def load_watched(model_dir: Path) -> tuple[float, float]:
    """GiB of this rank's shard, and the most private memory that loading took."""
    config = tiny_config(model_dir, train={"dtype": "bfloat16"})
    with joined(config.parallel, CPU) as world, most_private_memory() as most:
        model = build_model(model_dir, config, CPU, world.mesh)
        return sum(local_part(parameter.data).nbytes for parameter in model.parameters()) / GIB, max(most) / GIB


@contextmanager
def most_private_memory() -> Iterator[list[int]]:
    """Samples of the anonymous memory of this process, in bytes beyond what it had before; the list grows while the body runs."""
    done, samples, before = threading.Event(), [0], private_bytes()

    def sample() -> None:
        while not done.is_set():
            samples.append(private_bytes() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def private_bytes() -> int:
    line = next(line for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_a_checkpoint_of_several_gigabytes_costs_a_rank_its_shard_and_little_more(tmp_path: Path) -> None:
    size_gib = write_large_checkpoint(tmp_path)
    assert size_gib > 3.5
    results = on_ranks(4, load_watched, tmp_path)
    for shard_gib, most_gib in results:
        assert shard_gib == pytest.approx(size_gib / 4, rel=0.03)
        assert most_gib - shard_gib < 0.5, results
    print(f"{size_gib:.2f} GiB in {len(list(tmp_path.glob('*.safetensors')))} files: shard and most private memory, GiB: {results}")


def write_large_checkpoint(directory: Path) -> float:
    """A random model in bf16 whose layers are spread over several files; its size in GiB."""
    (directory / "config.json").write_text(json.dumps(LARGE))
    spec = read_spec(directory)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(spec, torch.bfloat16).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        layer = (name.split(".") + [""] * 2)[2]
        groups.setdefault(f"part-{int(layer) // 6}" if layer.isdigit() else "part-rest", []).append(name)
    for group, names in groups.items():
        save_file({name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}, directory / f"{group}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{group}.safetensors" for group, names in groups.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) / GIB
