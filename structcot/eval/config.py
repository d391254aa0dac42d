"""The config of an evaluation: every key, its type, its range and its default. Checked as strictly as that of a run."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

import tomli_w
from pydantic import ConfigDict, Field, field_validator, model_validator

from structcot.config import Section


class TaskConfig(Section):
    """One task: a benchmark by `name`, or a set of one's own at `path`, a file or a hub id. What is left out is the benchmark's own.

    `num_samples`, `temperature`, `top_p` and `grader` beat those of the whole evaluation.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    path: str = ""
    revision: str = ""
    files: list[str] = Field(default=[])
    question: str = ""
    answer: str = ""
    template: str = ""
    grader: Literal["", "math", "exact", "paper"] = ""
    limit: int | None = Field(default=None, ge=1)
    num_samples: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)


class SamplingConfig(Section):
    """`[sampling]`: answers to each problem, and how tokens are chosen. The defaults are the paper's: one, greedy.

    `max_new_tokens` 0 takes the task's own: 32,768, as in the paper, but 2,048 for gsm8k. With `forced_answer_tokens` an output that is cut
    inside its thought is also asked for an answer of so many tokens, after a forced end of the thought, which is scored apart.
    """

    num_samples: int = Field(default=1, ge=1, le=10_000)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=0, ge=0)
    forced_answer_tokens: int = Field(default=0, ge=0)
    stop: list[str] = Field(default=[])


class ServerConfig(Section):
    """`[server]`: for engine = "openai", where the model is served. The key is read from the environment variable that `key` names."""

    url: str = ""
    model: str = ""
    key: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1, le=4096)
    timeout_seconds: float = Field(default=3600.0, gt=0.0)
    max_retries: int = Field(default=8, ge=0)


class VllmConfig(Section):
    """`[vllm]`: for engine = "vllm", as vLLM calls them. `max_model_len` 0 takes the model's own."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int = Field(default=0, ge=0)
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    enforce_eager: bool = False


class CodeConfig(Section):
    """`[code]`: how generated programs are run. `sandbox` "none" runs them unprotected, where the machine has no way to contain them.

    `timeout_seconds` is for one test, `memory_gib` for one program.
    """

    sandbox: Literal["auto", "bubblewrap", "landlock", "none"] = "auto"
    timeout_seconds: float = Field(default=6.0, gt=0.0)
    memory_gib: float = Field(default=4.0, gt=0.0)


class GradingConfig(Section):
    """`[grading]`: the grader whose word counts in mathematics, how long it may take for one answer, and how many processes grade.

    What the grader of the paper says is noted beside it. `jobs` 0 takes all cores.
    """

    math: Literal["math", "paper"] = "math"
    limit_seconds: float = Field(default=10.0, gt=0.0)
    jobs: int = Field(default=0, ge=0)


class EvalConfig(Section):
    """A whole evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    model_name_or_path: str = ""
    revision: str = "main"
    adapter: str = ""
    output_dir: str = ""
    tasks: list[TaskConfig] = Field(min_length=1)
    data_dir: str = ""
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = Field(default=16, ge=1)
    prompt: Literal["boxed", "sky-t1", "qwen25-math-cot"] = "boxed"
    system_prompt: str = ""
    compare_with: list[str] = Field(default=[])
    sampling: SamplingConfig = SamplingConfig()
    server: ServerConfig = ServerConfig()
    vllm: VllmConfig = VllmConfig()
    grading: GradingConfig = GradingConfig()
    code: CodeConfig = CodeConfig()

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_tasks(cls, value: Any) -> Any:
        entries = value.split(",") if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str | dict | TaskConfig) for entry in entries):
            raise ValueError('give names or paths, as in ["aime24", "mine.jsonl"], or tables: {name = "mine", path = "mine.jsonl"}')
        return [task_of(entry.strip()) if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _what_is_evaluated_is_named(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {', '.join(names)}: two have the same name; give each its own by {{name = ..., path = ...}}")
        if self.engine == "openai" and not (self.server.url and (self.server.model or self.model_name_or_path)):
            raise ValueError('server: engine = "openai" needs server.url and server.model')
        if self.engine == "openai" and self.sampling.forced_answer_tokens:
            raise ValueError("sampling.forced_answer_tokens: a server cannot go on from a thought; use another engine, or leave it out")
        if self.engine == "openai" and self.adapter:
            raise ValueError("adapter: a server loads its adapters itself; name the adapter as server.model")
        if self.engine != "openai" and not (self.model_name_or_path or self.adapter):
            raise ValueError("model_name_or_path: is missing; name a model, a run, or an adapter")
        return self

    @field_validator("output_dir", "adapter", "data_dir")
    @classmethod
    def _home_is_a_place(cls, value: str) -> str:
        return os.path.expanduser(value)

    def to_toml(self) -> str:
        """The whole config with every default written out; loads back to an equal config."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def task_of(text: str) -> dict[str, Any]:
    """A task as one word: a benchmark, a path, or NAME=PATH."""
    name, equals, path = text.partition("=")
    if equals:
        return {"name": name.strip(), "path": path.strip()}
    if "/" in text or text.endswith((".jsonl", ".json", ".parquet")):
        return {"name": text.rstrip("/").rpartition("/")[2].rsplit(".", 1)[0] or text, "path": text}
    return {"name": text}
