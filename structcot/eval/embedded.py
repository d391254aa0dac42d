"""The embedded engine: a model that transformers loads, in this process, with a decoding loop of our own.

It needs no server and no GPU. Weights are safetensors, code of a model repository is never run, and an adapter is merged when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from structcot.data.turns import TEMPLATE_ERRORS
from structcot.device import choose_device
from structcot.errors import ConfigError, ModelError
from structcot.eval.batching import Batcher, Row
from structcot.eval.decoding import Endings, random_numbers
from structcot.eval.engine import Engine, Output, Request, Sampling
from structcot.eval.grouped_attention import register
from structcot.eval.prompt_tokens import end_of_turn, prompt_tokens
from structcot.export_files import ADAPTER_WEIGHTS
from structcot.fetch import resolve_model

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def open_embedded(model_name_or_path: str, *, revision: str, adapter: str, dtype: str, batch_size: int) -> Engine:
    """Load a model directory or hub id, with the PEFT adapter in the directory `adapter` merged unless that is "".

    `dtype` is "bfloat16" or "float32"; at most `batch_size` outputs are written at a time. Runs on the GPU where there is one.

    Raises:
        ConfigError: if an argument is wrong.
        FetchError: if the model cannot be fetched.
        ModelError: if the model or the adapter cannot be used.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f'dtype: got "{dtype}"; use "bfloat16" or "float32"')
    if batch_size < 1:
        raise ConfigError(f"batch_size: got {batch_size}; use 1 or more")
    model_dir = resolve_model(model_name_or_path, revision)
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, getattr(torch, dtype), choose_device())
    _need_known_layers(model.config.get_text_config(), model_dir)
    if adapter:
        model = merge_adapter(model, Path(adapter))
    embedded = Embedded(
        name=str(model_dir),
        tokenizer=tokenizer,
        endings=Endings(tokenizer=tokenizer, token_ids=_ending_ids(model, tokenizer)),
        batcher=Batcher(model, batch_size),
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    return embedded.answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A loaded model; `context` is the most tokens that prompt and output may have together, None without a limit."""

    name: str
    tokenizer: Any
    endings: Endings
    batcher: Batcher
    context: int | None

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Output]:
        """Yield what the model makes of each request, as it is finished; first those that it cannot answer.

        Raises:
            ConfigError: if there are messages and no chat template that takes them.
            ModelError: if the memory of the GPU does not suffice.
        """
        rows: list[Row] = []
        for index, request in enumerate(requests):
            prompt = self._encode(request)
            if reason := self._refusal(len(prompt)):
                yield Output(
                    key=request.key,
                    text="",
                    finish_reason="refused",
                    prompt_tokens=len(prompt),
                    completion_tokens=0,
                    seconds=0.0,
                    reason=reason,
                )
                continue
            limit = min(sampling.max_new_tokens, self.context - len(prompt)) if self.context else sampling.max_new_tokens
            rows.append(Row(index=index, prompt=prompt, limit=limit, numbers=random_numbers(request.seed, request.key), tokens=[]))
        endings = self._endings(sampling.stop)
        for row in self.batcher.run(rows, sampling, endings):
            yield _output(requests[row.index], row, endings)

    def _encode(self, request: Request) -> list[int]:
        try:
            return prompt_tokens(self.tokenizer, self.name, request)
        except TEMPLATE_ERRORS as error:
            raise ConfigError(
                f"{self.name}: the chat template refuses the messages of {request.key}, with roles"
                f" {', '.join(role for role, _ in request.messages)}: {' '.join(str(error).split())}"
            ) from error

    def _refusal(self, num_tokens: int) -> str:
        """Why a prompt of so many tokens cannot be answered; "" if it can."""
        if num_tokens == 0:
            return "the prompt has no tokens"
        if self.context and num_tokens >= self.context:
            return f"the prompt has {num_tokens} tokens, the model's context {self.context}"
        return ""

    def _endings(self, strings: tuple[str, ...]) -> Endings:
        """With the strings of a request. One that is a special token is looked for as a token, since it is no text."""
        special = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ids = self.endings.token_ids | {special[string] for string in strings if string in special}
        return replace(self.endings, token_ids=ids, strings=tuple(string for string in strings if string and string not in special))


def _output(request: Request, row: Row, endings: Endings) -> Output:
    text, is_ended = endings.text(row.tokens)
    return Output(
        key=request.key,
        text=text,
        finish_reason="stop" if is_ended else "length",
        prompt_tokens=len(row.prompt),
        completion_tokens=len(row.tokens),
        seconds=row.seconds,
    )


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a model directory; it need not have a chat template.

    Raises:
        ModelError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: the tokenizer cannot be loaded: {error}; fetch the model again") from error


def load_model(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model on `device`, never as a whole in other memory too, without progress bars and notes to developers.

    Raises:
        ModelError: if it is no causal language model, or does not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation=register(), **place
        ).eval()
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{model_dir}: does not fit into the memory of the GPU; use a smaller model") from error
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_dir}: cannot be loaded as a causal language model: {error}") from error


def _need_known_layers(config: Any, model_dir: Path) -> None:
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if unknown:
        raise ModelError(
            f"{model_dir}: has layers of the kind {', '.join(sorted(unknown))}, and this engine knows {' and '.join(sorted(KNOWN_LAYERS))};"
            " use another engine"
        )


def merge_adapter(model: Any, adapter: Path) -> Any:
    """W + scale * B A, added in fp32 and rounded once to the dtype of W, since PEFT keeps the adapter itself in fp32.

    Raises:
        ModelError: if the directory holds no adapter of this model.
    """
    from peft import PeftModel

    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{adapter}: has no {ADAPTER_WEIGHTS}; give the directory of a PEFT adapter")
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    except LOAD_ERRORS as error:
        raise ModelError(f"{adapter}: is no adapter of this model: {error}") from error


def _ending_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: as the generation config says, the tokenizer, and the chat template."""
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return frozenset(int(index) for index in ids if index is not None)
