"""Rendering: a record becomes tokens, labels and kinds.

The whole conversation is rendered once by the tokenizer's own chat template and encoded once, so the tokens are those of
`apply_chat_template`. Labels come from character spans, never from a padding id. The next-token shift happens here and nowhere else:
labels_T[t] is the token that position t must predict.

Shapes: T = tokens of one sample.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from structcot.config import DataConfig
from structcot.data.records import Message, Record
from structcot.data.rows import Rejected
from structcot.data.turns import ChatTemplate, Layout, Turn, UnfitRecord, chat_template, lay_out
from structcot.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE = -100
KINDS = ("none", "thought", "solution", "end", "prompt")
NONE, THOUGHT, SOLUTION, END, PROMPT = range(5)
# Raise when the same record, template and options give other tokens, labels or kinds than before: stored samples are then made anew.
RENDER_VERSION = 1
# Text beyond this many characters per allowed token is not encoded just to count how much too long it is.
CHARACTERS_PER_TOKEN = 16
SHORT_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedSample:
    """One sample as the model sees it.

    `tokens_T` int32; `labels_T` int32, the next token or IGNORE, the last always IGNORE; `kinds_T` uint8, an index of KINDS for the label.
    `merged_start` is set where a turn's first token began in the header (a newline of each in one token): it is not trained on.
    `prompt_differs` is set where the generation prompt opens a thought that the record writes otherwise.
    """

    source: str
    origin: str
    tokens_T: np.ndarray
    labels_T: np.ndarray
    kinds_T: np.ndarray
    truncated: bool
    merged_start: bool
    prompt_differs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Tokens with the characters each covers; `complete` is false where only the head of a far too long text was encoded."""

    tokens_T: np.ndarray
    characters_of: Callable[[int], tuple[int, int]]
    complete: bool = True

    def first_at(self, position: int) -> int:
        """The first token that starts at or after character `position`."""
        return bisect.bisect_left(range(len(self.tokens_T)), position, key=lambda token: self.characters_of(token)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Tokens of one trained turn: thought [start, thought_end), solution [thought_end, end), end-of-turn token at `end`."""

    start: int
    thought_end: int
    end: int
    end_id: int


def unmasked_sample(tokens_T: np.ndarray, source: str) -> RenderedSample:
    """A sample of bare tokens in which every next token is a label of kind "prompt": for probes and benchmarks."""
    tokens_T = tokens_T.astype(np.int32)
    labels_T = np.append(tokens_T[1:], np.int32(IGNORE))
    return RenderedSample(
        source=source,
        origin=source,
        tokens_T=tokens_T,
        labels_T=labels_T,
        kinds_T=np.where(labels_T == IGNORE, NONE, PROMPT).astype(np.uint8),
        truncated=False,
        merged_start=False,
        prompt_differs=False,
    )


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model directory and try its chat template.

    Raises:
        ModelError: if there is no fast tokenizer or no chat template, or the template ends an assistant turn with no special token.
    """
    from transformers import AutoTokenizer

    file = model_dir / "tokenizer.json"
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: is no directory; fetch the model first")
    try:
        if file.exists():
            json.loads(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{model_dir}: the tokenizer cannot be loaded: {error}; fetch the model again") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{model_dir}: {type(tokenizer).__name__} gives no character offsets; use a model with a tokenizer.json")
    if not tokenizer.chat_template:
        raise ModelError(
            f"{model_dir}: the tokenizer has no chat template; use the instruction-tuned model, or put its chat_template.jinja there"
        )
    trial = [Message(role="user", content="Question"), Message(role="assistant", content="Answer")]
    try:
        lay_out(trial, chat_template(tokenizer))
    except UnfitRecord as error:
        raise ModelError(f"{model_dir}: {error}; put a chat_template.jinja there that does") from error
    return tokenizer


def encode_record(record: Record, tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> tuple[Layout, Encoded]:
    """Render and encode one record, whatever its length.

    Raises:
        UnfitRecord: if it cannot be rendered.
    """
    template = chat_template(tokenizer)
    layout = _layout(record, template, config)
    if layout.placeholders:
        return _encode_hidden(layout, template)
    return layout, _encode([layout.text], tokenizer)[0]


def rendering_options(config: DataConfig) -> dict[str, Any]:
    """The values of `[data]` that decide what a record becomes."""
    return config.model_dump(include={"format", "max_length", "overlong", "train_on", "system_prompt", "control_tokens"})


def render_records(records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> list[RenderedSample | Rejected]:
    """Render `records` in order, encoding them together on all cores; one result for each."""
    template = chat_template(tokenizer)
    layouts = [_layout_or_rejected(record, template, config) for record in records]
    encoded = iter(
        _encode_plain([layout for layout in layouts if isinstance(layout, Layout) and not layout.placeholders], tokenizer, config)
    )
    results: list[RenderedSample | Rejected] = []
    for record, layout in zip(records, layouts, strict=True):
        try:
            if isinstance(layout, Rejected):
                results.append(layout)
            elif layout.placeholders:
                results.append(_sample(record, *_encode_hidden(layout, template), config))
            else:
                results.append(_sample(record, layout, next(encoded), config))
        except UnfitRecord as error:
            results.append(Rejected(source=record.source, reason=str(error)))
    return results


def _layout(record: Record, template: ChatTemplate, config: DataConfig) -> Layout:
    return lay_out(
        record.messages,
        template,
        first_trained=record.prompt_messages,
        last_only=config.train_on == "last-assistant",
        control_as_text=config.control_tokens == "text",
    )


def _layout_or_rejected(record: Record, template: ChatTemplate, config: DataConfig) -> Layout | Rejected:
    try:
        return _layout(record, template, config)
    except UnfitRecord as error:
        return Rejected(source=record.source, reason=str(error))


def _encode_plain(layouts: Sequence[Layout], tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> list[Encoded]:
    limit = CHARACTERS_PER_TOKEN * config.max_length + SHORT_CHARACTERS
    heads = _encode([layout.text[:limit] for layout in layouts], tokenizer)
    for index, (layout, head) in enumerate(zip(layouts, heads, strict=True)):
        if len(layout.text) > limit:
            fits = len(head.tokens_T) <= config.max_length
            heads[index] = _encode([layout.text], tokenizer)[0] if fits else replace(head, complete=False)
    return heads


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [
        Encoded(tokens_T=np.array(ids, dtype=np.int32), characters_of=cast(Callable[[int], tuple[int, int]], encoding.token_to_chars))
        for ids, encoding in zip(batch["input_ids"], batch.encodings or (), strict=True)
    ]


def _encode_hidden(layout: Layout, template: ChatTemplate) -> tuple[Layout, Encoded]:
    """Encode a text whose placeholders stand for control tokens, as plain text, between the special tokens that the template wrote."""
    if not np.array_equal(_encode_pieces(layout.text, template).tokens_T, _encode([layout.text], template.tokenizer)[0].tokens_T):
        raise UnfitRecord("this tokenizer does not encode text piece by piece as it does whole; remove the control tokens from the content")

    def restored(text: str) -> str:
        for stand_in, literal in layout.placeholders.items():
            text = text.replace(stand_in, literal)
        return text

    def moved(position: int) -> int:
        return len(restored(layout.text[:position]))

    turns = [
        Turn(start=moved(turn.start), thought_end=moved(turn.thought_end), stop=moved(turn.stop), end_id=turn.end_id)
        for turn in layout.turns
    ]
    return replace(layout, text=restored(layout.text), turns=tuple(turns)), _encode_pieces(layout.text, template, restored)


def _encode_pieces(text: str, template: ChatTemplate, restored: Callable[[str], str] = str) -> Encoded:
    """Encode each stretch between special tokens by itself, none of it as a special token; offsets count in the restored text."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = done = 0
    for match in [*template.special.finditer(text), None]:
        plain = restored(text[done : match.start() if match else len(text)])
        batch = template.tokenizer([plain], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
        ids += batch["input_ids"][0]
        offsets += [(position + start, position + end) for start, end in batch["offset_mapping"][0]]
        position += len(plain)
        if match:
            ids.append(template.special_ids[match[0]])
            offsets.append((position, position + len(match[0])))
            position, done = position + len(match[0]), match.end()
    return Encoded(tokens_T=np.array(ids, dtype=np.int32), characters_of=offsets.__getitem__)


def _sample(record: Record, layout: Layout, encoded: Encoded, config: DataConfig) -> RenderedSample | Rejected:
    length = len(encoded.tokens_T)
    overlong = length > config.max_length
    if overlong and config.overlong != "truncate":
        more = "" if encoded.complete else "more than "
        reason = f"{more}{length} tokens, data.max_length is {config.max_length}"
        return Rejected(source=record.source, reason=reason, tokens=length, dropped=config.overlong == "drop")
    spans = [_span(turn, encoded) for turn in layout.turns]
    tokens_T = encoded.tokens_T
    if overlong:
        tokens_T, spans = _truncated(tokens_T, spans, config.max_length)
    if not any(span.end > span.start for span in spans):
        where = f" within data.max_length = {config.max_length}" if overlong else ""
        return Rejected(source=record.source, reason=f"no token of an assistant's text is left to train on{where}", tokens=length)
    labels_T, kinds_T = _labels(tokens_T, spans, train_on_all=config.train_on == "all")
    return RenderedSample(
        source=record.source,
        origin=record.origin,
        tokens_T=tokens_T,
        labels_T=labels_T,
        kinds_T=kinds_T,
        truncated=overlong,
        merged_start=any(
            span.start > 0 and encoded.characters_of(span.start - 1)[1] > turn.start
            for span, turn in zip(spans, layout.turns, strict=False)
        ),
        prompt_differs=layout.prompt_differs,
    )


def _span(turn: Turn, encoded: Encoded) -> _Span:
    """The tokens of a turn. In a head that was cut short `end` may lie one past the last token."""
    start, end = encoded.first_at(turn.start), encoded.first_at(turn.stop)
    tokens_T = encoded.tokens_T
    if end == len(tokens_T) or tokens_T[end] != turn.end_id:
        end -= end > 0 and tokens_T[end - 1] == turn.end_id  # a special token that takes the blanks before it starts earlier
    found = tokens_T[end] == turn.end_id if end < len(tokens_T) else not encoded.complete
    if not found:
        raise UnfitRecord(f"the tokenizer gives no token {turn.end_id} where the chat template ends the turn")
    return _Span(start=start, thought_end=min(encoded.first_at(turn.thought_end), end), end=end, end_id=turn.end_id)


def _truncated(tokens_T: np.ndarray, spans: list[_Span], max_length: int) -> tuple[np.ndarray, list[_Span]]:
    """Cut to `max_length` tokens so that the last is an end-of-turn token: the model is never taught to go on for ever.

    A cut within a turn keeps its first tokens and ends it; a cut within a prompt goes back to the turn before.
    """
    last = max_length - 1
    for index in reversed(range(len(spans))):
        span = spans[index]
        if span.end < last:
            return tokens_T[: span.end + 1], spans[: index + 1]
        if span.start < last:
            ended = replace(span, thought_end=min(span.thought_end, last), end=last)
            return np.append(tokens_T[:last], np.int32(span.end_id)), [*spans[:index], ended]
    return tokens_T[:0], []


def _labels(tokens_T: np.ndarray, spans: Sequence[_Span], *, train_on_all: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels and kinds, shifted: position t holds what concerns token t + 1."""
    token_kinds_T = np.full(len(tokens_T), PROMPT if train_on_all else NONE, dtype=np.uint8)
    for span in spans:
        token_kinds_T[span.start : span.thought_end] = THOUGHT
        token_kinds_T[max(span.start, span.thought_end) : span.end] = SOLUTION
        token_kinds_T[span.end] = END
    kinds_T = np.append(token_kinds_T[1:], np.uint8(NONE))
    labels_T = np.full(len(tokens_T), IGNORE, dtype=np.int32)
    labels_T[:-1] = np.where(kinds_T[:-1] != NONE, tokens_T[1:], IGNORE)
    return labels_T, kinds_T
