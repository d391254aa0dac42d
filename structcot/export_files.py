"""From a trained model to files that other tools load: a PEFT adapter, or a whole Hugging Face checkpoint.

Names and fields of the adapter are PEFT's, so PEFT, transformers and vLLM read it as it is. Merging is done in fp32 and rounded once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from structcot.config import Config
from structcot.distributed import World
from structcot.errors import ExportError
from structcot.files import write_json, write_text
from structcot.model.decoder import Decoder
from structcot.model.lora import LoraPair, adapters_of
from structcot.model.parts import whole_on_cpu
from structcot.model.weights import read_tensors, save_weights
from structcot.model_files import SIDE_FILES, TOKENIZER_FILES, copy_files

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written: the adapter's directory or the model's, and the command that serves it."""

    path: Path
    serve_command: str


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """The adapter of `model` as PEFT names it, whole and in host memory; every rank must call this."""
    return {
        f"base_model.model.{name}.{matrix}.weight": whole_on_cpu(getattr(pair, matrix))
        for name, pair in adapters_of(model)
        for matrix in ("lora_A", "lora_B")
    }


def export_adapter(tensors: dict[str, Tensor], model_dir: Path, tokenizer, config: Config, export: Export) -> None:
    """Write an adapter as PEFT does, with the tokenizer and chat template it was trained with.

    Raises:
        ExportError: if the directory cannot be written.
    """
    with _fresh(export.path) as fresh:
        save_file(tensors, fresh / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(fresh / "adapter_config.json", peft_config(served(config, model_dir)))
        _save_tokenizer(model_dir, tokenizer, fresh)
        write_text(fresh / "README.md", _adapter_card(served(config, model_dir), export.serve_command))


def export_model(model: Decoder, model_dir: Path, tokenizer, directory: Path, world: World) -> None:
    """Write a whole checkpoint in the base's dtypes: the trained weights, or the base with its adapters merged.

    Every rank gives its part of each tensor; the first writes a file at a time, so that it never holds more than one of them.

    Raises:
        ExportError: if the directory cannot be written.
    """
    readers = dict(read_tensors(model_dir))
    if model.spec.tied_head:
        readers.pop("lm_head.weight", None)
    adapters: dict[str, LoraPair] = dict(adapters_of(model))
    trained = {name: parameter for name, parameter in model.trained_parameters().items() if ".adapters." not in name}

    def tensor(name: str) -> Tensor:
        base, pair = readers[name](), adapters.get(name.removesuffix(".weight"))
        if pair is not None:
            return merged(base, pair)
        return whole_on_cpu(trained[name]).to(base.dtype) if name in trained else base

    with ExitStack() as stack:
        with world.agreed():
            fresh = stack.enter_context(_fresh(directory)) if world.is_first else None
        save_weights(readers, tensor, fresh)
        with world.agreed():
            if fresh is not None:
                copy_files(model_dir, fresh, (*SIDE_FILES, *TOKENIZER_FILES))
                _save_tokenizer(model_dir, tokenizer, fresh)


def merged(base_NK: Tensor, pair: LoraPair) -> Tensor:
    """W + scale * B A in fp32, rounded once to the dtype of W."""
    delta_NK = pair.scale * (whole_on_cpu(pair.lora_B) @ whole_on_cpu(pair.lora_A))
    return (base_NK.float() + delta_NK).to(base_NK.dtype)


def served(config: Config, model_dir: Path) -> Config:
    """The config with the base named as other tools load it: a path or hub id as given; for a name of ours, where the model lies."""
    name = config.model_name_or_path
    return config.model_copy(update={"model_name_or_path": name if "/" in name or Path(name).exists() else str(model_dir)})


def peft_config(config: Config) -> dict[str, object]:
    """adapter_config.json of the adapter, every field that PEFT and vLLM look at."""
    tuning = config.tuning
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model_name_or_path,
        "revision": config.revision if "/" in config.model_name_or_path and not Path(config.model_name_or_path).exists() else None,
        "r": tuning.lora_r,
        "lora_alpha": int(tuning.lora_alpha) if tuning.lora_alpha.is_integer() else tuning.lora_alpha,
        "lora_dropout": tuning.lora_dropout,
        "target_modules": sorted(tuning.target_modules),
        "exclude_modules": None,
        "bias": "none",
        "use_rslora": tuning.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "peft_version": metadata.version("peft"),
    }


def serve_command(config: Config, adapter_dir: Path) -> str:
    """The command that serves base and adapter, with the smallest maximal rank that vLLM accepts for it."""
    rank = next((rank for rank in VLLM_RANKS if rank >= config.tuning.lora_r), None)
    if rank is None:
        return (
            f"structcot export {config.output_dir} --merge && vllm serve {config.output_dir}/model   # vLLM takes adapters up to rank 512"
        )
    return f"vllm serve {config.model_name_or_path} --enable-lora --lora-modules structcot={adapter_dir} --max-lora-rank {rank}"


def _save_tokenizer(model_dir: Path, tokenizer, directory: Path) -> None:
    """The base's own tokenizer files, byte for byte, and the template as a file of its own, which newer tools read first."""
    copy_files(model_dir, directory, TOKENIZER_FILES)
    write_text(directory / "chat_template.jinja", tokenizer.chat_template)


@contextmanager
def _fresh(directory: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `directory` when all is written."""
    fresh = directory.with_name(f"tmp-{directory.name}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise ExportError(
            f"{directory}: cannot be written: {error}; the checkpoint is complete, so free some space and try again"
        ) from error


def _adapter_card(config: Config, command: str) -> str:
    front = json.dumps({"base_model": config.model_name_or_path, "library_name": "peft", "tags": ["lora", "structcot"]}, indent=2)
    return f"""---
{front}
---

# LoRA adapter of {config.model_name_or_path}

Rank {config.tuning.lora_r}, alpha {config.tuning.lora_alpha:g}, on {", ".join(config.tuning.target_modules)}; trained with structcot.
`certificate.json` says how it was checked against the model that was trained.

Load it with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{config.model_name_or_path}", dtype="{config.train.dtype}")
model = PeftModel.from_pretrained(base, "path/of/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")
```

Serve it with vLLM:

```
{command}
```
"""
