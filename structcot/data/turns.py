"""Where the assistant's turns lie in a rendered conversation, found on characters, for any chat template.

The conversation is rendered once as a whole. Turn i starts where the rendering of messages[:i] with its generation prompt ends, and ends
where the rendering of messages[:i+1] ends: both must be prefixes of the whole, else the template rewrites history and the record is unfit.
Within its turn the assistant is trained from there up to the last special token, which ends the turn. No `{% generation %}` is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from structcot.data.records import Message
from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPENED_THOUGHT = re.compile("(?:" + "|".join(re.escape(opening) for opening, _ in THOUGHT_TAGS) + r")\s*\Z")
FIRST_PLACEHOLDER, LAST_PLACEHOLDER = 0xE000, 0xF8FF  # private use area: in no normalisation form, in no vocabulary entry of more than it
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


class UnfitRecord(ValueError):
    """Why one record cannot be rendered; becomes a `Rejected`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A tokenizer's chat template with the special tokens that it may write.

    `special_ids` holds no tag of a thought or solution, even where a tokenizer has those as special tokens: the assistant writes them.
    """

    tokenizer: PreTrainedTokenizerFast
    special_ids: dict[str, int]
    special: re.Pattern[str]

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Text of `messages`; an empty conversation has none.

        Raises:
            UnfitRecord: with the template's own words if it refuses the conversation.
        """
        if not messages:
            return ""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
        except TEMPLATE_ERRORS as error:
            raise UnfitRecord(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Offsets of one trained turn: its text is [start, stop), its thought [start, thought_end); `end_id` is the special token at `stop`."""

    start: int
    thought_end: int
    stop: int
    end_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One rendered conversation and its trained turns.

    `placeholders` maps each character that stands in `text` for a control token of the content to that token's text. `prompt_differs` is
    set where the generation prompt opens a thought that the record does not open in the same way.
    """

    text: str
    turns: tuple[Turn, ...]
    placeholders: dict[str, str]
    prompt_differs: bool


def chat_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """Collect what `lay_out` needs of a tokenizer."""
    written_by_assistant = {tag for tags in (*THOUGHT_TAGS, SOLUTION_TAGS) for tag in tags}
    special_ids = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in written_by_assistant
    }
    longest_first = sorted(special_ids, key=len, reverse=True)
    # A tokenizer without special tokens matches nothing.
    special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return ChatTemplate(tokenizer=tokenizer, special_ids=special_ids, special=special)


def lay_out(
    messages: Sequence[Message], template: ChatTemplate, *, first_trained: int = 0, last_only: bool = False, control_as_text: bool = False
) -> Layout:
    """Render `messages` and find the assistant turns from message `first_trained` on, or the last one only.

    Raises:
        UnfitRecord: if the template changes the assistant's text, rewrites history or ends no turn, or the content holds a control token.
    """
    messages, placeholders = _without_control_tokens(messages, template, control_as_text)
    whole = template.render(messages, generation_prompt=False)
    last = len(messages) - 1
    numbers = [last] if last_only else [i for i in range(first_trained, last + 1) if messages[i].role == "assistant"]
    turns, differs = [], False
    for number in numbers:
        through = whole if number == last else template.render(messages[: number + 1], generation_prompt=False)
        if not whole.startswith(through):
            raise UnfitRecord(_rewritten(number))
        turn, differs_here = _turn(messages[: number + 1], whole[: len(through)], template)
        turns.append(turn)
        differs |= differs_here
    return Layout(text=whole, turns=tuple(turns), placeholders=placeholders, prompt_differs=differs)


def thought_length(text: str) -> int:
    """Number of characters of `text` up to the end of its thought, closing tag included: all where it never closes, 0 without a thought."""
    opened = [(text.find(opening), opening, closing) for opening, closing in THOUGHT_TAGS if opening in text]
    if opened:
        start, opening, closing = min(opened)
        inside, closed, rest = text[start + len(opening) :].partition(closing)
        end = len(text) - len(rest)
        # Some templates write an empty thought before a content that has its own in other tags.
        more = closed and not inside.strip() and any(opening in rest for opening, _ in THOUGHT_TAGS)
        return end + thought_length(rest) if more else end
    closed_only = [text.find(closing) + len(closing) for _, closing in THOUGHT_TAGS if closing in text]
    return min(closed_only, default=0)


def _without_control_tokens(
    messages: Sequence[Message], template: ChatTemplate, control_as_text: bool
) -> tuple[Sequence[Message], dict[str, str]]:
    """The messages with a private character for each control token in their content, and what each character stands for."""
    found: dict[str, None] = {}
    for number, message in enumerate(messages, 1):
        match = template.special.search(message.content)
        if match and not control_as_text:
            raise UnfitRecord(
                f'message {number} ({message.role}) holds the control token "{match[0]}" at offset {match.start()}; '
                'remove it, or set data.control_tokens = "text" to have it read as plain text'
            )
        if match:
            found.update(dict.fromkeys(template.special.findall(message.content)))
    if not found:
        return messages, {}
    used = set().union(*(message.content for message in messages))
    free = (chr(code) for code in range(FIRST_PLACEHOLDER, LAST_PLACEHOLDER + 1) if chr(code) not in used)
    stand_ins = dict(zip(found, free, strict=False))
    hidden = [
        Message(role=message.role, content=template.special.sub(lambda match: stand_ins[match[0]], message.content)) for message in messages
    ]
    return hidden, {stand_in: text for text, stand_in in stand_ins.items()}


def _turn(messages: Sequence[Message], through: str, template: ChatTemplate) -> tuple[Turn, bool]:
    """The last turn of `through`, and whether the generation prompt differs from what stands before it."""
    number = len(messages) - 1
    prompt = template.render(messages[:number], generation_prompt=True)
    differs = not through.startswith(prompt)
    start = _after_role(messages, prompt, through, template) if differs else len(prompt)
    endings = list(template.special.finditer(through, start))
    if not endings or through[endings[-1].end() :].strip():
        raise UnfitRecord("the chat template closes an assistant turn with no end-of-turn token; the model would never learn to stop")
    stop = endings[-1].start()
    start = _after_header(messages, prompt, through[:stop], start, template)
    end_id = template.special_ids[endings[-1][0]]
    return Turn(start=start, thought_end=start + thought_length(through[start:stop]), stop=stop, end_id=end_id), differs


def _after_role(messages: Sequence[Message], prompt: str, through: str, template: ChatTemplate) -> int:
    """Where the turn starts if the generation prompt opens a thought that this turn lacks or writes otherwise: after the role header."""
    bare = template.render(messages[:-1], generation_prompt=False)
    opened = OPENED_THOUGHT.search(prompt, len(bare)) if prompt.startswith(bare) else None
    if opened is None or not through.startswith(prompt[: opened.start()]):
        raise UnfitRecord(_rewritten(len(messages) - 1))
    return opened.start()


def _after_header(messages: Sequence[Message], prompt: str, through: str, start: int, template: ChatTemplate) -> int:
    """Check that the turn holds its content; move `start` past a role header where the template has no generation prompt to hold it."""
    content, turn = messages[-1].content, through[start:]
    at = turn.find(content)
    at = turn.find(content.strip()) if at < 0 else at
    if at >= 0 and not turn[:at].strip():
        return start
    bare = template.render(messages[:-1], generation_prompt=False)
    if at >= 0:
        # With a generation prompt, what the template writes before the content is the model's to write (Qwen3's empty thought).
        return start if bare != prompt else start + at
    squeezed, wanted = _squeezed(through[len(bare) :]), _squeezed(content)
    if wanted not in squeezed or (bare == prompt and not squeezed.startswith(wanted)):
        raise UnfitRecord(f"the chat template drops or changes text of the assistant turn (message {len(messages)})")
    return start


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _rewritten(number: int) -> str:
    return (
        f"the chat template writes message {number + 1} differently as the last turn than within the conversation (some strip earlier "
        'thoughts); set data.train_on = "last-assistant", or give one record per turn'
    )


def template_text(tokenizer: Any) -> str:
    """Text of the template that conversations without tools are rendered with."""
    return str(tokenizer.get_chat_template())


def default_system_prompt(tokenizer: PreTrainedTokenizerFast) -> str:
    """Text that the template writes as a system message where the conversation has none; empty if it writes nothing."""
    template, mark = chat_template(tokenizer), "\ue000"
    user = Message(role="user", content="Question")
    try:
        without = template.render([user], generation_prompt=False)
        before, _, after = template.render([Message(role="system", content=mark), user], generation_prompt=False).partition(mark)
    except UnfitRecord:  # a template that takes no system message writes none
        return ""
    if not (after and without.startswith(before) and without.endswith(after)):
        return ""
    return without[len(before) : len(without) - len(after)].strip()
