"""The decoding loop: rows of unequal length in one batch, in which a row that ends makes room for the next prompt at once.

Prompts run alone or with others of about their length, behind one another's ends by nothing but ids that no token looks at: attention is
causal, so padding on the right needs no mask. Then each row has its slot, and a step adds a token to all.

B: rows. T: tokens of a prompt. C: columns of the cache. V: vocabulary.
"""

from __future__ import annotations

import inspect
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structcot.errors import ModelError
from structcot.eval.decoding import Endings, choose_tokens
from structcot.eval.engine import Sampling
from structcot.eval.slots import SlotCache

PREFILL_TOKENS = 4096
"""Prompts run together as long as they hold no more tokens than this, padding counted."""


@dataclass(slots=True, kw_only=True)
class Row:
    """An output in the making: `index` is its request's, `limit` the most tokens it may have, `start` a time of `time.perf_counter`."""

    index: int
    prompt: list[int]
    limit: int
    numbers: random.Random
    tokens: list[int]
    start: float = 0.0
    seconds: float = 0.0

    @property
    def length(self) -> int:
        """Tokens whose keys are known: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1


class Batcher:
    """Runs rows through a model, at most `batch_size` at a time."""

    def __init__(self, model: Any, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.device = model.device  # asked once: a model looks through its parameters to tell
        self.masks = Masks(model.config.get_text_config(), model.dtype)
        # The argument was renamed; both names must be right, since a model silently ignores what it does not know.
        self.cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def run(self, rows: Sequence[Row], sampling: Sampling, endings: Endings) -> Iterator[Row]:
        """Yield each row when it is finished. Long prompts go first: they are of like length, and memory is claimed early.

        Raises:
            ModelError: if the memory of the GPU does not suffice.
        """
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        cache = SlotCache(min(self.batch_size, len(waiting)), max((len(row.prompt) + row.limit for row in waiting), default=0))
        active: list[Row] = []
        while waiting or active:
            try:
                if waiting and len(active) < cache.num_slots:
                    new = take_prompts(waiting, cache.num_slots - len(active))
                    logits_BV = self.read_prompts(new, cache, len(active))
                    active += new
                else:
                    new = active
                    logits_BV = self.step(active, cache)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"the GPU's memory does not suffice for {cache.num_slots} outputs at a time: {str(error).splitlines()[0]}"
                    " set a smaller batch_size or max_new_tokens"
                ) from error
            add_tokens(new, logits_BV, sampling)
            yield from self.finish(active, cache, endings)

    @torch.inference_mode()
    def read_prompts(self, rows: Sequence[Row], cache: SlotCache, first_slot: int) -> Tensor:
        """Fill the slots from `first_slot` on with prompts; returns the logits of what follows them (B, V)."""
        from transformers import DynamicCache

        start = time.perf_counter()
        lengths = [len(row.prompt) for row in rows]
        ids_BT = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        for row, ids_T in zip(rows, ids_BT, strict=True):
            row.start = start
            ids_T[: len(row.prompt)] = torch.tensor(row.prompt)
        ends = sorted({length - 1 for length in lengths})
        filled: Any = DynamicCache()
        ends_E = torch.tensor(ends, device=self.device)
        logits_BEV = self._forward(ids_BT.to(self.device), filled, logits_to_keep=ends_E if len(ends) > 1 else 1)
        cache.put(first_slot, lengths, [(layer.keys, layer.values) for layer in filled.layers])
        return logits_BEV[range(len(rows)), [ends.index(length - 1) for length in lengths]]

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], cache: SlotCache) -> Tensor:
        """Feed the newest token of each row, in slots 0 to B - 1; returns the logits of the next (B, V)."""
        lengths = [row.length for row in rows]
        newest = [row.tokens[-1] for row in rows]
        ids_B, positions_B = torch.tensor([newest, lengths], device=self.device)
        cache.expect(positions_B, lengths)
        mask = self.masks.of_step(positions_B, lengths)
        return self._forward(ids_B.unsqueeze(1), cache, attention_mask=mask, position_ids=positions_B.unsqueeze(1))[:, -1]

    def _forward(self, ids_BT: Tensor, cache: Any, **arguments: Any) -> Tensor:
        return self.model(input_ids=ids_BT, use_cache=True, **{self.cache_argument: cache}, **arguments).logits

    @torch.inference_mode()
    def _move(self, cache: SlotCache, source: int, target: int, length: int) -> None:
        cache.move(source, target, length)

    def finish(self, active: list[Row], cache: SlotCache, endings: Endings) -> Iterator[Row]:
        """Take the rows that have ended out of the batch."""
        for slot in reversed(range(len(active))):
            row = active[slot]
            if len(row.tokens) < row.limit and not endings.is_ended(row.tokens):
                continue
            row.seconds = time.perf_counter() - row.start
            last = active.pop()
            if slot < len(active):
                self._move(cache, len(active), slot, last.length)
                active[slot] = last
            yield row


class Masks:
    """What the token of each row may look at, where that is not simply everything in the cache."""

    def __init__(self, config: Any, dtype: torch.dtype):
        self.dtype = dtype
        self.kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        self.window = window if window and self.kinds != {"full_attention"} else None

    def of_step(self, positions_B: Tensor, lengths: Sequence[int]) -> Any:
        """None where every row sees all columns; else an additive mask (B, 1, 1, C), or one for each kind of layer."""
        full = None if min(lengths) == max(lengths) else self._mask(positions_B, max(lengths) + 1, None)
        if self.window is None:
            return full
        sliding = self._mask(positions_B, max(lengths) + 1, self.window) if max(lengths) >= self.window else full
        return {"full_attention": full, "sliding_attention": sliding} if self.kinds else sliding

    def _mask(self, positions_B: Tensor, num_columns: int, window: int | None) -> Tensor:
        columns_C = torch.arange(num_columns, device=positions_B.device)
        seen_BC = columns_C <= positions_B[:, None]
        if window is not None:
            seen_BC &= columns_C > positions_B[:, None] - window
        zeros_BC = torch.zeros(seen_BC.shape, dtype=self.dtype, device=positions_B.device)
        return zeros_BC.masked_fill_(~seen_BC, float("-inf"))[:, None, None]


def take_prompts(waiting: deque[Row], num_free: int) -> list[Row]:
    """The next prompts to run together: at least one, at most as many as there are free slots."""
    width = len(waiting[0].prompt)
    count = max(1, min(num_free, len(waiting), PREFILL_TOKENS // width))
    return [waiting.popleft() for _ in range(count)]


@torch.inference_mode()
def add_tokens(rows: Sequence[Row], logits_BV: Tensor, sampling: Sampling) -> None:
    """Choose the next token of each row."""
    draws = [row.numbers.random() if sampling.temperature > 0.0 else 0.0 for row in rows]
    for row, token in zip(rows, choose_tokens(logits_BV, sampling, draws), strict=True):
        row.tokens.append(token)
