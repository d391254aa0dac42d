"""The data proof: one sample, token by token, with what each token is trained as.

Before it is shown, the sample is made again from its record and compared with what the tokenizer's own `apply_chat_template` gives: a proof
that does not hold is an error, not a page.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from structcot.config import DataConfig
from structcot.data.records import Record
from structcot.data.render import IGNORE, KINDS, Encoded, RenderedSample, encode_record
from structcot.data.turns import Layout, UnfitRecord
from structcot.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prove(sample: RenderedSample, record: Record, tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> dict[str, Any]:
    """Describe `sample`, made of `record`, as {"source", "tokens", "supervised_tokens", "pieces": [{"id", "text", "trained"}]}.

    The texts of all pieces join to the rendered conversation; where tokens share a character, the first of them shows it.

    Raises:
        DataError: if the tokens are not those of `apply_chat_template`, or a label is not the next token.
    """
    try:
        layout, encoded = encode_record(record, tokenizer, config)
    except UnfitRecord as error:
        raise DataError(f"{sample.source}: was prepared but cannot be rendered again: {error}; did the data change meanwhile?") from error
    expected = encoded.tokens_T
    if not layout.placeholders:
        turns = [{"role": message.role, "content": message.content} for message in record.messages]
        own = cast(dict[str, Any], tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True))
        expected = np.array(own["input_ids"])
    _compare(sample, expected)
    trained = ["no", *(KINDS[kind] if kind else "no" for kind in sample.kinds_T[:-1])]
    pieces = zip(sample.tokens_T.tolist(), _texts(sample, layout, encoded, tokenizer), trained, strict=True)
    return {
        "source": sample.source,
        "tokens": len(sample.tokens_T),
        "supervised_tokens": int(np.count_nonzero(sample.labels_T != IGNORE)),
        "pieces": [{"id": index, "text": text, "trained": what} for index, text, what in pieces],
    }


def _compare(sample: RenderedSample, expected_T: np.ndarray) -> None:
    # A truncated sample ends with the end-of-turn token in place of what followed.
    compared = len(sample.tokens_T) - sample.truncated
    same_length = sample.truncated or compared == len(expected_T)
    if not same_length or not np.array_equal(sample.tokens_T[:compared], expected_T[:compared]):
        differing = np.flatnonzero(sample.tokens_T[:compared][: len(expected_T)] != expected_T[:compared])
        position = int(differing[0]) if len(differing) else min(compared, len(expected_T))
        raise DataError(
            f"{sample.source}: token {position} is not what the tokenizer's apply_chat_template gives "
            f"({compared} tokens prepared, {len(expected_T)} expected); delete the sample cache and prepare the data again"
        )
    labels_T, next_T = sample.labels_T[:-1], sample.tokens_T[1:]
    wrong = np.flatnonzero((labels_T != IGNORE) & (labels_T != next_T))
    if len(wrong) or sample.labels_T[-1] != IGNORE:
        raise DataError(f"{sample.source}: the label at token {int(wrong[0]) if len(wrong) else len(next_T)} is not the next token")


def _texts(sample: RenderedSample, layout: Layout, encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    count = len(sample.tokens_T)
    cut = count < len(encoded.tokens_T) or sample.truncated
    starts = [0, *(encoded.characters_of(token)[0] for token in range(1, count))]
    borders = [*starts, encoded.characters_of(count - 1)[1] if cut else len(layout.text)]
    texts = [layout.text[start:end] for start, end in pairwise(borders)]
    for token in range(count - 1, 0, -1):
        if starts[token] == starts[token - 1]:
            texts[token - 1], texts[token] = texts[token], ""
    if sample.truncated:
        texts[-1] = tokenizer.convert_ids_to_tokens([int(sample.tokens_T[-1])])[0]
    return texts
