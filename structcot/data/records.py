"""Records: conversations as messages, whatever format they came in.

Three formats are read: messages, ShareGPT, prompt-completion; data.format names one or each record's own fields tell. Every record that
cannot be trained on is yielded as a `Rejected` with its place and the reason, so that one run lists all of them. Fields beside those of the
format are metadata and are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from structcot.config import DataSource
from structcot.data.rows import Rejected, Row, read_rows

FORMAT_FIELDS = {"messages": ("messages",), "sharegpt": ("conversations",), "prompt-completion": ("prompt", "completion")}
MESSAGE_ROLES = {role: role for role in ("system", "user", "assistant")}
SHAREGPT_ROLES = {**MESSAGE_ROLES, "human": "user", "gpt": "assistant"}
# Text that a template may put beside the content: a record that has it would lose it without a word.
TEXT_BESIDE_CONTENT = ("reasoning_content", "reasoning", "thinking", "tool_calls")
SHOWN_FIELDS, SHOWN_CHARACTERS = 12, 40
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One conversation: an optional system message, then user and assistant in turn, the assistant last.

    `origin` is the label of its data source. The first `prompt_messages` messages are the prompt of a prompt-completion record: an
    assistant turn among them is context, never trained on.
    """

    source: str
    origin: str
    messages: tuple[Message, ...]
    prompt_messages: int = 0


class _BadRecord(ValueError):
    """Why one record cannot be used; becomes a `Rejected`."""


def read_records(source: DataSource, format: str, system_prompt: str, key: str = "data.train") -> Iterator[Record | Rejected]:
    """Stream the records of `source`; `format`, `system_prompt` as in `[data]`, `key` the config key that messages name.

    Raises:
        ConfigError: if the file does not exist or is of no known kind. Raised by the call, not by the first record.
        DataError: if the file holds no records at all, or cannot be read as what its name says.
        FetchError: if a data set of the hub cannot be fetched.
    """
    return (_record(row, source.label, format, system_prompt) for row in read_rows(source, key))


def _record(row: Row | Rejected, origin: str, format: str, system_prompt: str) -> Record | Rejected:
    if isinstance(row, Rejected):
        return row
    try:
        messages, prompt_messages = _messages_of(row.value, format)
        if system_prompt:
            own = bool(messages) and messages[0].role == "system"
            prompt_messages += prompt_messages > 0 and not own
            messages = [Message(role="system", content=system_prompt), *messages[own:]]
        _check_order(messages)
        _check_text(messages)
    except _BadRecord as error:
        return Rejected(source=row.source, reason=str(error))
    return Record(source=row.source, origin=origin, messages=tuple(messages), prompt_messages=prompt_messages)


def _messages_of(value: Any, format: str) -> tuple[list[Message], int]:
    """The messages of one row, and how many of them are a prompt."""
    if not isinstance(value, dict):
        raise _BadRecord(f"is {_name(value)}, not a JSON object")
    name = _format_of(value, format)
    if name == "messages":
        return _message_list(value["messages"], "messages"), 0
    if name == "sharegpt":
        return _sharegpt_messages(value), 0
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Message(role="user", content=prompt), Message(role="assistant", content=completion)], 1
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise _BadRecord('"completion" is an empty list')
        context = _message_list(prompt, "prompt")
        return context + _message_list(completion, "completion"), len(context)
    raise _BadRecord(f'"prompt" is {_name(prompt)} and "completion" {_name(completion)}; both must be strings or both lists of messages')


def _format_of(value: dict[str, Any], format: str) -> str:
    present = {field for field, content in value.items() if content is not None}
    candidates = FORMAT_FIELDS if format == "auto" else {format: FORMAT_FIELDS[format]}
    for name, fields in candidates.items():
        if present.issuperset(fields):
            return name
    wanted = " or ".join(f"{' and '.join(fields)} ({name})" for name, fields in candidates.items())
    setting = "" if format == "auto" else f' (data.format = "{format}")'
    raise _BadRecord(f"misses the fields of a record: found {_fields(value)}; needs {wanted}{setting}")


def _sharegpt_messages(value: dict[str, Any]) -> list[Message]:
    system = value.get("system")
    if system is not None and not isinstance(system, str):
        raise _BadRecord(f'"system" is {_name(system)}, not a string')
    messages = _message_list(value["conversations"], "conversations", ("from", "value"), SHAREGPT_ROLES)
    if not system:
        return messages
    if messages and messages[0].role == "system":
        raise _BadRecord('has two system messages: "system" and the first of "conversations"')
    return [Message(role="system", content=system), *messages]


def _message_list(
    entries: Any, where: str, fields: tuple[str, str] = ("role", "content"), roles: dict[str, str] = MESSAGE_ROLES
) -> list[Message]:
    if not isinstance(entries, list):
        raise _BadRecord(f'"{where}" is {_name(entries)}, not a list')
    return [_message(entry, f"{where}[{index}]", fields, roles) for index, entry in enumerate(entries)]


def _message(entry: Any, where: str, fields: tuple[str, str], roles: dict[str, str]) -> Message:
    if not isinstance(entry, dict):
        raise _BadRecord(f"{where} is {_name(entry)}, not an object")
    for field in fields:
        if field not in entry:
            raise _BadRecord(f'{where} has no "{field}"; found {_fields(entry)}')
    role, content = entry[fields[0]], entry[fields[1]]
    if not isinstance(role, str) or role not in roles:
        raise _BadRecord(f"{where} has the unknown role {_shown(role)}; use {', '.join(roles)}")
    if not isinstance(content, str):
        raise _BadRecord(f"the content of {where} ({role}) is {_name(content)}, not a string")
    for field in TEXT_BESIDE_CONTENT:
        if entry.get(field):
            raise _BadRecord(
                f'{where} has "{field}", which is not read; write it into the content (a thought between <think> and </think>)'
            )
    return Message(role=roles[role], content=content)


def _check_order(messages: list[Message]) -> None:
    """An optional system message, then user, assistant, user, ... and the assistant last."""
    turns = messages[bool(messages) and messages[0].role == "system" :]
    skipped = len(messages) - len(turns)
    if not turns:
        raise _BadRecord("has no user and no assistant turn")
    for index, message in enumerate(turns):
        number = skipped + index + 1
        if message.role == "system":
            raise _BadRecord(f"message {number} is a system message; only the first message may be one")
        if message.role != ("user", "assistant")[index % 2]:
            before = f"a second {message.role} turn in a row" if index else "an assistant turn; the first turn must be the user's"
            raise _BadRecord(f"message {number} is {before}")
    if len(turns) == 1:
        raise _BadRecord("has no assistant turn")
    if turns[-1].role == "user":
        raise _BadRecord("ends in a user turn; the last must be the assistant's")


def _check_text(messages: list[Message]) -> None:
    for number, message in enumerate(messages, 1):
        where, content = f"message {number} ({message.role})", message.content
        if message.role != "system" and not content.strip():
            raise _BadRecord(f"{where} is empty")
        if "\0" in content:
            raise _BadRecord(f"{where} holds a NUL character at offset {content.index(chr(0))}")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(content[error.start])
            raise _BadRecord(
                f"{where} holds the lone surrogate U+{code:04X} at offset {error.start}: half a character, or a byte that is not UTF-8"
            ) from error


def _fields(value: dict[Any, Any]) -> str:
    names = [_shown(name) for name in value]
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    return ", ".join(names[:SHOWN_FIELDS]) + more or "nothing"


def _shown(value: Any) -> str:
    """Text of the data as a message may hold it: short, on one line, without half characters."""
    text = str(value)
    short = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


def _name(value: Any) -> str:
    return JSON_NAMES.get(type(value), f"a {type(value).__name__}")
