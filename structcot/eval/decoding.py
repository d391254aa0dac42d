"""Which token comes next, and where an output ends.

B: rows of a batch. V: vocabulary.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structcot.eval.engine import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_CANDIDATES = 256
"""How many of the likeliest tokens are sorted at first; a nucleus is seldom larger."""
SPARE_TOKENS = 4
"""A tokenizer may write the first token of a text otherwise than inside it, so a few more than needed are decoded."""


def random_numbers(seed: int, key: str) -> random.Random:
    """The random numbers of one request: the same on every machine, whatever else is in the batch."""
    return random.Random(hashlib.sha256(f"{seed}\n{key}".encode()).digest())


def choose_tokens(logits_BV: Tensor, sampling: Sampling, draws: Sequence[float]) -> list[int]:
    """The next token of each row: the likeliest at temperature 0, else the one that the row's draw from [0, 1) falls on.

    The tokens that top_k and top_p keep lie side by side in the order of the vocabulary, each as wide as its probability, so that rounding
    moves a boundary by as little and no more.
    """
    if sampling.temperature == 0.0:
        return logits_BV.float().argmax(-1).tolist()
    ends_BV = kept_probabilities(logits_BV, sampling).double().cumsum(-1)
    draws_B1 = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device).unsqueeze(1)
    return torch.searchsorted(ends_BV, draws_B1 * ends_BV[:, -1:], right=True).squeeze(1).tolist()


def kept_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """fp32 probabilities at the temperature, zero for what is not considered; they need not sum to 1.

    `top_k` keeps the k likeliest tokens, then `top_p` the fewest of them that hold that share of their probability; a token as likely as
    the last one kept is kept too.
    """
    logits_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    probabilities_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1.0:
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < _least_of_nucleus(probabilities_BV, sampling.top_p), 0.0)
    return probabilities_BV


def _least_of_nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Probability (B, 1) of the last token, likeliest first, before which the sum is under `top_p`."""
    num_tokens = probabilities_BV.shape[1]
    num_candidates = min(FIRST_CANDIDATES, num_tokens)
    while True:
        candidates_BK = probabilities_BV.topk(num_candidates).values
        before_BK = candidates_BK.double().cumsum(-1) - candidates_BK
        if num_candidates == num_tokens or bool((before_BK[:, -1] >= top_p).all()):
            break
        num_candidates = min(8 * num_candidates, num_tokens)
    num_kept_B1 = (before_BK < top_p).sum(-1, keepdim=True).clamp(min=1)
    return candidates_BK.gather(1, num_kept_B1 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endings:
    """What ends an output: a token of `token_ids`, or one of the `strings` in its text."""

    tokenizer: PreTrainedTokenizerBase
    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()

    def is_ended(self, tokens: list[int]) -> bool:
        """Whether the last token ends the output. Looks no further back than a string that ends in it can begin."""
        if tokens[-1] in self.token_ids:
            return True
        if not self.strings:
            return False
        num_bytes = max(len(string.encode()) for string in self.strings)
        tail = self._decode(tokens[-num_bytes - SPARE_TOKENS :])
        return any(string in tail for string in self.strings) and self.text(tokens)[1]

    def text(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text of an output without what ends it, and whether something does."""
        is_ended = tokens[-1] in self.token_ids
        text = self._decode(tokens[:-1] if is_ended else tokens)
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return (text[: min(places)], True) if places else (text, is_ended)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
