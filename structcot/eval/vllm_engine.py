"""The engine vLLM, in this process and without a server: continuous batching on GPUs, or on a CPU with a build for it.

Prompts go in as the tokens that the tokenizer's own chat template gives, so that they are the same in every engine. Adapters are applied by
vLLM and not merged. Requests are handed over while others are written, and outputs come out as they are finished: what a stopped run had
finished is kept.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from structcot.data.turns import TEMPLATE_ERRORS
from structcot.errors import ConfigError, ServerError
from structcot.eval.engine import Engine, Output, Request, Sampling
from structcot.eval.prompt_tokens import end_of_turn, prompt_tokens
from structcot.eval.seeds import seed_of
from structcot.fetch import resolve_model

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank (vllm/config/lora.py)."""
NOT_INSTALLED = (
    "engine: vllm is not installed; pip install structcot[vllm] on a machine with CUDA, see docs/engines.md for one without,"
    ' or use engine = "transformers"'
)


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True)
class _Opened:
    """vLLM with its model: engine and classes, the adapter to apply or None, tokens of context, and how many requests it takes at once."""

    name: str
    engine: Any
    tokenizer: Any
    end_of_turn: int | None
    adapter: Any
    params: type[Any]
    failure: type[Exception]
    max_model_len: int
    max_num_seqs: int
    numbers: Iterator[int]


def open_vllm(
    model_name_or_path: str,
    *,
    revision: str = "main",
    adapter: str = "",
    dtype: str = "auto",
    max_model_len: int = 0,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    enforce_eager: bool = False,
) -> Engine:
    """Load a model directory or hub id into vLLM, with the PEFT adapter in the directory `adapter` unless that is "".

    The other arguments mean what they mean in vLLM; `max_model_len` 0 takes the model's own context. vLLM's processes end, and its memory
    is free again, when the engine and what it yields are no longer referred to.

    Raises:
        ConfigError: if vLLM is not installed, or cannot take the model, the adapter or a value.
        FetchError: if the model cannot be fetched.
        ModelError: if the model cannot be used safely.
    """
    from transformers import AutoTokenizer

    vllm, lora_request, failure = _import()
    options = _lora_options(adapter) | ({"max_model_len": max_model_len} if max_model_len else {})
    model_dir = str(resolve_model(model_name_or_path, revision))
    try:
        llm = vllm.LLM(
            model=model_dir,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            disable_log_stats=False,  # they hold the seconds of each request
            **options,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"engine: vllm cannot open {model_dir}: {error}; its own messages above say more") from error
    config = llm.llm_engine.vllm_config
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    opened = _Opened(
        name=model_dir,
        engine=llm.llm_engine,
        tokenizer=tokenizer,
        end_of_turn=end_of_turn(tokenizer),
        adapter=lora_request("adapter", 1, adapter) if adapter else None,
        params=vllm.SamplingParams,
        failure=failure,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        numbers=count(),  # never twice, since what was aborted may still be on its way
    )
    # Its processes hold memory, and references of vLLM's own would keep them alive.
    weakref.finalize(opened, llm.llm_engine.engine_core.shutdown)
    return lambda requests, sampling: _outputs(opened, requests, sampling)


def _import() -> tuple[Any, type[Any], type[Exception]]:
    """Import vLLM: the package, its class for adapters, and the error of an engine that has died."""
    # What a command prints goes to standard output. The variable is read at the import, by the processes of vLLM too.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"{NOT_INSTALLED} ({error})") from error
    return vllm, LoRARequest, EngineDeadError


def _lora_options(adapter: str) -> dict[str, Any]:
    """The options that let vLLM take an adapter of this rank.

    Raises:
        ConfigError: if it is none that vLLM can apply.
    """
    if not adapter:
        return {}
    path = Path(adapter) / "adapter_config.json"
    advice = "merge it with structcot export --merge and give the merged model"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        sizes = [size for size in MAX_LORA_RANKS if size >= rank]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"adapter: {path} is no config of a LoRA adapter: {error!r}; export the adapter again") from error
    for name in ("use_dora", "modules_to_save"):
        if config.get(name):
            raise ConfigError(f"adapter: {path} has {name} = {json.dumps(config[name])}, which vLLM does not apply; {advice}")
    if not sizes:
        raise ConfigError(f"adapter: {path} has rank {rank}, and vLLM takes at most {MAX_LORA_RANKS[-1]}; {advice}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": sizes[0]}


def _outputs(opened: _Opened, requests: Sequence[Request], sampling: Sampling) -> Iterator[Output]:
    """Keep as many requests in vLLM as it writes at a time, and yield what is finished after each of its steps."""
    todo = iter(requests)
    running: dict[str, tuple[Request, float]] = {}
    try:
        while True:
            while len(running) < opened.max_num_seqs and (request := next(todo, None)) is not None:
                tokens_T = _tokens(opened, request)
                if not 0 < len(tokens_T) < opened.max_model_len:
                    yield _refused(request, len(tokens_T), opened.max_model_len)
                    continue
                number = str(next(opened.numbers))
                params = opened.params(**_options(opened, request, sampling, opened.max_model_len - len(tokens_T)))
                prompt = {"type": "token", "prompt_token_ids": tokens_T}
                opened.engine.add_request(number, prompt, params, lora_request=opened.adapter)
                running[number] = (request, time.perf_counter())
            if not running:
                return
            for step in opened.engine.step():
                if step.finished and step.request_id in running:
                    request, start = running.pop(step.request_id)
                    yield _output(request, step, time.perf_counter() - start)
    except opened.failure as error:
        raise ServerError(f"engine: vllm has ended: {error}; its own messages above say why") from error
    finally:
        with suppress(opened.failure):
            opened.engine.abort_request([*running])


def _tokens(opened: _Opened, request: Request) -> list[int]:
    try:
        return prompt_tokens(opened.tokenizer, opened.name, request)
    except TEMPLATE_ERRORS as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{opened.name}: the chat template refuses the messages of {request.key}: {words}") from error


def _options(opened: _Opened, request: Request, sampling: Sampling, room: int) -> dict[str, Any]:
    """The request's sampling as vLLM calls it, with `room` tokens left of the context.

    A stop string that is a special token is given as a token, since vLLM looks for strings in a text without those.
    """
    special = {token.content: index for index, token in opened.tokenizer.added_tokens_decoder.items() if token.special}
    ends = set() if opened.end_of_turn is None else {opened.end_of_turn}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # -1 is all tokens in every version, 0 in later ones
        "max_tokens": min(sampling.max_new_tokens, room),
        "stop": [string for string in sampling.stop if string and string not in special],
        "stop_token_ids": sorted(ends | {special[string] for string in sampling.stop if string in special}),
        "seed": seed_of(request) if sampling.temperature else None,
    }


def _refused(request: Request, num_tokens: int, max_model_len: int) -> Output:
    return Output(
        key=request.key,
        text="",
        finish_reason="refused",
        prompt_tokens=num_tokens,
        completion_tokens=0,
        seconds=0.0,
        reason=f"the prompt has {num_tokens} tokens, the context {max_model_len}" if num_tokens else "the prompt has no tokens",
    )


def _output(request: Request, finished: Any, seconds: float) -> Output:
    """Read what vLLM gives for a finished request. `seconds` since it was handed over stands in where vLLM measures none.

    Raises:
        ServerError: if vLLM gave the request up.
    """
    written = finished.outputs[0]
    if written.finish_reason not in ("stop", "length"):
        raise ServerError(f"engine: vllm ended {request.key} with {written.finish_reason!r}; its own messages above say why")
    times = finished.metrics
    return Output(
        key=request.key,
        text=written.text,
        finish_reason=written.finish_reason,
        prompt_tokens=len(finished.prompt_token_ids),
        completion_tokens=len(written.token_ids),
        seconds=times.last_token_ts - times.scheduled_ts if getattr(times, "last_token_ts", 0.0) else seconds,
    )
