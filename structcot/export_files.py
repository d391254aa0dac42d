"""From a trained model to files that other tools load: a PEFT adapter, or a whole Hugging Face checkpoint.

Names and fields of the adapter are PEFT's, so PEFT, transformers and vLLM read it as it is. Merging is done in fp32 and rounded once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from structcot.config import Config
from structcot.errors import ExportError
from structcot.files import write_json, write_text
from structcot.model.decoder import Decoder
from structcot.model.lora import LoraPair, adapters_of
from structcot.model.weights import read_tensors, save_weights
from structcot.model_files import TOKENIZER_FILES, copy_files

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written: the adapter's directory or the model's, and the command that serves it."""

    path: Path
    serve_command: str


def export_adapter(model: Decoder, model_dir: Path, tokenizer, config: Config, directory: Path) -> Export:
    """Write the adapter of `model` as PEFT does, with the tokenizer and chat template it was trained with.

    Raises:
        ExportError: if the directory cannot be written.
    """
    tensors = {}
    for name, pair in adapters_of(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.lora_A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.lora_B.detach().cpu().contiguous()
    config = config.model_copy(update={"model_name_or_path": name_for_others(config.model_name_or_path, model_dir)})
    command = serve_command(config, directory)
    with _fresh(directory) as fresh:
        save_file(tensors, fresh / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(fresh / "adapter_config.json", peft_config(config))
        _save_tokenizer(model_dir, tokenizer, fresh)
        write_text(fresh / "README.md", _adapter_card(config, command))
    return Export(path=directory, serve_command=command)


def export_model(model: Decoder, model_dir: Path, tokenizer, directory: Path) -> Export:
    """Write a whole checkpoint in the base's dtypes: the trained weights, or the base with its adapters merged.

    Raises:
        ExportError: if the directory cannot be written.
    """
    with _fresh(directory) as fresh:
        save_weights(merged_tensors(model, model_dir), model_dir, fresh)
        _save_tokenizer(model_dir, tokenizer, fresh)
    return Export(path=directory, serve_command=f"vllm serve {directory}")


def merged_tensors(model: Decoder, model_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the base checkpoint with what was learned: W + scale * B A in fp32, or the trained weight, rounded once."""
    adapters: dict[str, LoraPair] = dict(adapters_of(model))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad and "adapters." not in name}
    tensors: dict[str, Tensor] = {}
    for name, read in read_tensors(model_dir):
        if model.spec.tied_head and name == "lm_head.weight":
            continue
        base = read()
        pair = adapters.get(name.removesuffix(".weight"))
        if pair is not None:
            delta = pair.scale * (pair.lora_B.detach().cpu() @ pair.lora_A.detach().cpu())
            tensors[name] = (base.float() + delta).to(base.dtype)
        else:
            tensors[name] = trained[name].detach().cpu().to(base.dtype) if name in trained else base
    return tensors


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


def name_for_others(name: str, model_dir: Path) -> str:
    """What other tools load the base by: a path or hub id as it was given; for a name that only structcot knows, where the model lies."""
    return name if "/" in name or Path(name).exists() else str(model_dir)


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
