"""The config of a run: every key, its type, its range and its default.

Names follow TRL and PEFT where those have one. Every section rejects unknown keys and names the nearest valid one; every value is
checked against its range here, so no later stage meets a nonsensical number. A config is immutable once loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """A table of the config: unknown keys and values of a wrong type are errors, nothing can be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSource(Section):
    """One file or hub data set. `weight` is how often an epoch shows each of its samples: 2.0 twice, 0.5 a seeded half of them."""

    path: str = Field(min_length=1)
    split: str = "train"
    weight: float = Field(default=1.0, gt=0.0, le=1000.0)
    name: str = ""

    @property
    def label(self) -> str:
        """The name that metrics and messages use: `name`, else the path."""
        return self.name or self.path


class DataConfig(Section):
    """`[data]`: which demonstrations, how they are read and what of them is trained on."""

    train: list[DataSource] = Field(min_length=1)
    eval: list[DataSource] = []
    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    format: Literal["auto", "messages", "sharegpt", "prompt-completion"] = "auto"
    max_length: int = Field(default=16384, ge=2)
    overlong: Literal["error", "drop", "truncate"] = "error"
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    system_prompt: str = ""
    on_bad_record: Literal["error", "skip"] = "error"
    control_tokens: Literal["reject", "text"] = "reject"

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str | dict | DataSource) for entry in entries):
            raise ValueError('give paths, or tables such as {path = "data.jsonl", weight = 2.0}')
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("data.eval and data.eval_fraction both say what is held out; keep one")
        return self


class TuningConfig(Section):
    """`[tuning]`: low-rank adapters on chosen projections, or all weights."""

    method: Literal["lora", "full"] = "lora"
    lora_r: int = Field(default=64, ge=1, le=4096)
    lora_alpha: float = Field(default=128.0, gt=0.0)
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    lora_target_modules: Literal["all-linear"] | list[str] = "all-linear"
    use_rslora: bool = False

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _targets_exist(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, list) or not value:
            raise ValueError(f'use "all-linear" or a list of {" ".join(PROJECTIONS)}')
        for name in value:
            if name not in PROJECTIONS:
                raise ValueError(f'"{name}" is no projection of the model{nearest(str(name), PROJECTIONS)}; valid: {" ".join(PROJECTIONS)}')
        return sorted(set(value), key=PROJECTIONS.index)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The projections that carry an adapter, in the model's order."""
        return PROJECTIONS if self.lora_target_modules == "all-linear" else tuple(self.lora_target_modules)

    @property
    def lora_scale(self) -> float:
        """Factor of the low-rank product: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.lora_alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)


class TrainConfig(Section):
    """`[train]`: the optimizer and its schedule. A step is `batch_sequences` samples, or `batch_tokens` tokens, over all ranks."""

    batch_sequences: int | None = Field(default=None, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)
    num_train_epochs: float = Field(default=3.0, gt=0.0)
    max_steps: int = Field(default=-1, ge=-1)
    learning_rate: float = Field(default=1e-4, gt=0.0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _one_batch_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and "batch_tokens" not in values:
            return {"batch_sequences": 96, **values}
        return values

    @model_validator(mode="after")
    def _not_two_batch_sizes(self) -> Self:
        if self.batch_sequences and self.batch_tokens:
            raise ValueError("train.batch_sequences and train.batch_tokens both say how large a step is; keep one")
        if self.max_steps == 0:
            raise ValueError("train.max_steps: got 0; use -1 for whole epochs or a number of steps from 1")
        return self


class ParallelConfig(Section):
    """`[parallel]`: how the run is laid over processes, and what it keeps in memory. Nothing here changes the result.

    `hang_seconds` is how long a rank may make no progress before it is taken to hang.
    """

    shard: int = Field(default=-1, ge=-1)
    replicate: int = Field(default=1, ge=1)
    sequence: Literal[1, 2, 4, 8] = 1
    max_tokens_per_microbatch: int = Field(default=32768, ge=2)
    recompute: Literal["none", "block", "full", "auto"] = "auto"
    cpu_offload: Literal["none", "activations", "optimizer", "parameters"] = "none"
    hang_seconds: float = Field(default=1800.0, gt=0.0)


class CheckpointConfig(Section):
    """`[checkpoint]`: every how many steps a checkpoint is written, and how many are kept."""

    save_steps: int = Field(default=50, ge=1)
    save_total_limit: int = Field(default=2, ge=1)


class LogConfig(Section):
    """`[log]`: where metrics go beside metrics.jsonl, every how many steps a line is shown, and when and how the model is evaluated.

    Every `eval_steps` steps, and after the last, held-out loss is measured, and the first `eval_limit` problems of each of `eval_tasks`
    (names of benchmarks, or paths) are asked in the words of `eval_prompt` and answered with up to `eval_max_new_tokens` tokens.
    """

    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    logging_steps: int = Field(default=1, ge=1)
    eval_steps: int = Field(default=0, ge=0)
    eval_tasks: list[str] = []
    eval_limit: int = Field(default=16, ge=1)
    eval_max_new_tokens: int = Field(default=512, ge=1)
    eval_prompt: Literal["boxed", "sky-t1", "qwen25-math-cot"] = "boxed"


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    model_name_or_path: str = Field(min_length=1)
    revision: str = "main"
    output_dir: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    attn_implementation: Literal["auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"] = "auto"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    data: DataConfig
    tuning: TuningConfig = TuningConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("output_dir")
    @classmethod
    def _home_is_a_place(cls, value: str) -> str:
        return os.path.expanduser(value)

    def to_toml(self) -> str:
        """The whole config with every default written out; loads back to an equal config."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def sha256(self) -> str:
        """Hash of every value."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The values that decide what is learned, as dotted keys: two runs that differ in none of them are the same run."""
        runs_elsewhere = ("output_dir", "parallel.", "checkpoint.", "log.", "kernels", "attn_implementation")
        values = dict(_flatten(self.model_dump(mode="json")))
        return {key: value for key, value in values.items() if not key.startswith(runs_elsewhere)}


def nearest(name: str, candidates: Sequence[str]) -> str:
    """Text ' (did you mean ...?)' that ends an error message, or nothing where no candidate is close."""
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
