"""Reading records: every format and container, and every bad line with its exact place."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from structcot.config import DataSource
from structcot.data import rows
from structcot.data.records import Message, Record, Rejected, read_records
from structcot.errors import ConfigError, DataError, FetchError
from structcot.hub import Snapshot

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
GOOD = {"messages": [USER, ASSISTANT]}
QA = (Message(role="user", content="Q"), Message(role="assistant", content="A"))


def read(path: Path | str, format: str = "auto", system_prompt: str = "", split: str = "train") -> list[Record | Rejected]:
    return list(read_records(DataSource(path=str(path), split=split), format, system_prompt))


def write_lines(path: Path, *lines: object) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n")
    return path


def only(path: Path, **options: str) -> Record:
    (record,) = read(path, **options)
    assert isinstance(record, Record), record
    return record


def messages(*turns: dict) -> dict:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}], "id": 7},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": ""},
        {"prompt": "Q", "completion": "A", "difficulty": 3},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": None, "prompt": "Q", "completion": "A"},
        {"messages": [USER, ASSISTANT], "prompt": "something else"},
    ],
)
def test_formats_are_told_by_their_fields(tmp_path, row):
    assert only(write_lines(tmp_path / "a.jsonl", row)).messages == QA


def test_system_messages(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    path = write_lines(
        tmp_path / "a.jsonl",
        messages(system, USER, ASSISTANT),
        {"system": "Be brief.", "conversations": [{"from": "user", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": [system, USER], "completion": [ASSISTANT]},
        GOOD,
    )
    own = [record.messages for record in read(path) if isinstance(record, Record)]
    assert own == [(Message(role="system", content="Be brief."), *QA)] * 4 + [QA]
    replaced = [record.messages for record in read(path, system_prompt="Think.") if isinstance(record, Record)]
    assert replaced == [(Message(role="system", content="Think."), *QA)] * 5


def test_prompt_messages_are_counted(tmp_path):
    later = {"role": "user", "content": "R"}
    path = write_lines(tmp_path / "a.jsonl", {"prompt": [USER, ASSISTANT, later], "completion": [ASSISTANT]}, GOOD)
    assert [record.prompt_messages for record in read(path)] == [3, 0]
    assert [record.prompt_messages for record in read(path, system_prompt="Think.")] == [4, 0]


def test_source_and_origin(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD).encode())  # no final newline
    found = list(read_records(DataSource(path=str(path), name="mine"), "auto", ""))
    assert [(record.source, record.origin) for record in found if isinstance(record, Record)] == [
        (f"{path}:1", "mine"),
        (f"{path}:4", "mine"),
    ]


BAD = {
    "broken JSON": (b'{"messages": [', "is not valid JSON: Expecting value at column 15"),
    "unterminated": (b'{"prompt": "Q', "Unterminated string starting at at column 12"),
    "not an object": ([USER], "is a list, not a JSON object"),
    "a number": (b"17", "is a number, not a JSON object"),
    "null": (b"null", "is null, not a JSON object"),
    "no known field": (
        {"text": "x", "id": 1},
        "found text, id; needs messages (messages) or conversations (sharegpt) or prompt and completion",
    ),
    "half a format": ({"prompt": "Q"}, "found prompt"),
    "nothing": ({}, "found nothing"),
    "many fields": (dict.fromkeys(f"field{number}" for number in range(30)), "field11 and 18 more; needs"),
    "unprintable field": (b'{"a\\ud800\\nb": 1}', "found a??b; needs"),
    "long role": (messages({"role": "x" * 5000, "content": "y"}), "unknown role " + "x" * 40 + "...; use"),
    "messages no list": ({"messages": "Q"}, '"messages" is a string, not a list'),
    "message no object": ({"messages": ["Q"]}, "messages[0] is a string, not an object"),
    "ShareGPT keys in messages": ({"messages": [{"from": "user", "value": "Q"}]}, 'messages[0] has no "role"; found from, value'),
    "role keys in ShareGPT": ({"conversations": [USER, ASSISTANT]}, 'conversations[0] has no "from"; found role, content'),
    "unknown role": (
        messages(USER, {"role": "tool", "content": "x"}),
        "messages[1] has the unknown role tool; use system, user, assistant",
    ),
    "role no string": (messages(USER, {"role": [], "content": "x"}), "messages[1] has the unknown role []"),
    "content list": (
        messages(USER, {"role": "assistant", "content": [{"type": "text"}]}),
        "messages[1] (assistant) is a list, not a string",
    ),
    "content null": (messages(USER, {"role": "assistant", "content": None}), "messages[1] (assistant) is null, not a string"),
    "thought beside content": (
        messages(USER, {**ASSISTANT, "reasoning_content": "Hm"}),
        'messages[1] has "reasoning_content", which is not read',
    ),
    "two assistants": (messages(USER, ASSISTANT, ASSISTANT), "message 3 is a second assistant turn in a row"),
    "two users": (messages(USER, USER, ASSISTANT), "message 2 is a second user turn in a row"),
    "assistant first": (messages(ASSISTANT), "message 1 is an assistant turn; the first turn must be the user's"),
    "late system": (messages(USER, {"role": "system", "content": "x"}, ASSISTANT), "message 2 is a system message"),
    "no assistant": (messages(USER), "has no assistant turn"),
    "no turn": (messages({"role": "system", "content": "x"}), "has no user and no assistant turn"),
    "empty list": (messages(), "has no user and no assistant turn"),
    "ends in user": (messages(USER, ASSISTANT, USER), "ends in a user turn"),
    "empty assistant": (messages(USER, {"role": "assistant", "content": " \n"}), "message 2 (assistant) is empty"),
    "empty user": (messages({"role": "user", "content": ""}, ASSISTANT), "message 1 (user) is empty"),
    "empty completion": ({"prompt": "Q", "completion": ""}, "message 2 (assistant) is empty"),
    "no completion": ({"prompt": [USER, ASSISTANT], "completion": []}, '"completion" is an empty list'),
    "mixed completion": ({"prompt": "Q", "completion": [ASSISTANT]}, '"prompt" is a string and "completion" a list'),
    "two systems": (
        {"system": "x", "conversations": [{"from": "system", "value": "y"}, {"from": "user", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        "has two system messages",
    ),
    "system no string": ({"system": 3, "conversations": []}, '"system" is a number, not a string'),
    "NUL": ({"prompt": "Q", "completion": "ab\0c"}, "message 2 (assistant) holds a NUL character at offset 2"),
    "invalid UTF-8": (b'{"prompt": "Q", "completion": "ab\xff"}', "is not valid UTF-8 at byte offset 33 of the line"),
    "Latin-1": ('{"prompt": "Q", "completion": "é"}'.encode("latin-1"), "is not valid UTF-8 at byte offset 31"),
    "lone surrogate": (b'{"prompt": "Q", "completion": "a\\ud83d"}', "message 2 (assistant) holds the lone surrogate U+D83D at offset 1"),
    "nested too deep": (b"[" * 100_000, "cannot be read"),
    "number too long": (b'{"id": ' + b"9" * 5000 + b"}", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_is_listed_with_its_line(tmp_path, name):
    line, reason = BAD[name]
    path = write_lines(tmp_path / "a.jsonl", GOOD, b"", line, GOOD)
    before, rejected, after = read(path)
    assert isinstance(rejected, Rejected)
    assert rejected.source == f"{path}:3"
    assert reason in rejected.reason
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert after.source == f"{path}:4"


def test_all_bad_records_of_one_file_are_listed(tmp_path):
    lines = [line for line, _ in BAD.values()]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    found = read(path)
    assert [entry.source for entry in found] == [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    assert all(isinstance(entry, Rejected) for entry in found)


def test_surrogate_pairs_are_one_character(tmp_path):
    assert only(write_lines(tmp_path / "a.jsonl", b'{"prompt": "Q", "completion": "\\ud83d\\ude42"}')).messages[1].content == "🙂"


def test_forced_format(tmp_path):
    both = {**GOOD, "prompt": "P", "completion": "C"}
    path = write_lines(tmp_path / "a.jsonl", both, GOOD)
    record, rejected = read(path, format="prompt-completion")
    assert isinstance(record, Record)
    assert [message.content for message in record.messages] == ["P", "C"]
    assert isinstance(rejected, Rejected)
    assert 'found messages; needs prompt and completion (prompt-completion) (data.format = "prompt-completion")' in rejected.reason


def test_json_array_knows_its_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {"text": 1}, GOOD], indent=2))
    second = path.read_text().splitlines().index('    "text": 1')  # the line before it, counted from 1
    first, rejected, third = read(path)
    assert first.source == f"{path}:2"
    assert rejected.source == f"{path}:{second}"
    assert isinstance(third, Record)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD, GOOD]).encode())
    assert [entry.source for entry in read(path)] == [f"{path}:1"] * 2


def test_json_array_goes_on_after_a_broken_record(tmp_path):
    path = tmp_path / "a.json"
    good = json.dumps(GOOD)
    path.write_text(f'[\n  {good},\n  {{"messages": [oops]}},\n  {good}\n  {good},\n  {good}\n]\n')
    found = read(path)
    assert [type(entry) for entry in found] == [Record, Rejected, Record, Rejected, Record]
    assert [entry.source for entry in found] == [f"{path}:{line}" for line in (2, 3, 4, 5, 6)]
    assert "Expecting value: line 3 column 17" in found[1].reason
    assert "Expecting a comma" in found[3].reason


@pytest.mark.parametrize(
    ("ending", "reason"), [("", "cut short"), (",", "cut short"), ("] x", "follows the end"), (", {] ", "not valid JSON")]
)
def test_json_array_that_ends_wrongly(tmp_path, ending, reason):
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(GOOD)}{ending}")
    first, last = read(path)
    assert isinstance(first, Record)
    assert isinstance(last, Rejected)
    assert last.source == f"{path}:1"
    assert reason in last.reason


def test_json_array_with_a_byte_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"prompt": "Q", "completion": "\xff"},\n' + json.dumps(GOOD).encode() + b"]")
    rejected, record = read(path)
    assert isinstance(record, Record)
    assert rejected.source == f"{path}:2"
    assert "not UTF-8" in rejected.reason


def test_json_that_holds_json_lines(tmp_path):
    path = write_lines(tmp_path / "a.json", GOOD, b"{oops}", GOOD)
    assert [type(entry) for entry in read(path)] == [Record, Rejected, Record]
    assert read(path)[1].source == f"{path}:2"


def test_json_that_is_no_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [GOOD]}, indent=2))
    with pytest.raises(DataError, match=r"a\.json: is neither an array of records nor one record a line"):
        read(path)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \r\n"), ("a.json", b""), ("a.json", b"[ ]")])
def test_empty_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: holds no records"):
        read(tmp_path / name)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = [{"messages": [USER, ASSISTANT], "id": 1}, {"messages": [USER], "id": 2}, {"messages": None, "id": 3}] * 300
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    found = read(path)
    assert [entry.source for entry in found] == [f"{path}:{row}" for row in range(1, 901)]
    assert found[0].messages == QA
    assert found[898].reason == "has no assistant turn"
    assert "found messages, id" in found[899].reason


def test_parquet_without_known_columns_or_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), path)
    assert "found text" in read(path)[0].reason
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="holds no records"):
        read(path)


def test_parquet_with_invalid_text(tmp_path):
    path = tmp_path / "a.parquet"
    completions = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"), pyarrow.py_buffer(b"A\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Q", "Q"], "completion": completions}), path)
    record, rejected = read(path)
    assert isinstance(record, Record)
    assert rejected.source == f"{path}:2"
    assert "not valid UTF-8" in rejected.reason


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is no Parquet file")
    with pytest.raises(DataError, match=r"a\.parquet:1: cannot be read as Parquet"):
        read(path)


def test_paths_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("x")
    Path("folder.jsonl").mkdir()
    write_lines(Path("a.jsonl"), GOOD)
    for path, words in {"gone.jsonl": "does not exist", "data/gone.jsonl": "does not exist", "/gone": "does not exist"}.items():
        with pytest.raises(ConfigError, match=f'data.eval: "{path}" {words}'):
            read_records(DataSource(path=path), "auto", "", "data.eval")
    with pytest.raises(ConfigError, match=r'data.train: "notes.txt" is of no known kind; convert it to .jsonl, .json, .parquet'):
        read("notes.txt")
    with pytest.raises(ConfigError, match="is a directory"):
        read("folder.jsonl")
    with pytest.raises(ConfigError, match='has no split "test"'):
        read("a.jsonl", split="test")


@pytest.fixture
def hub(monkeypatch):
    """Stand-in for `datasets`, which would ask the network."""
    calls: list[tuple[str, str]] = []

    def load_dataset(path: str, *, split: str) -> list[dict]:
        calls.append((path, split))
        if path != "owner/name":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return [GOOD, {"text": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows._load_from_hub.cache_clear()
    yield calls
    rows._load_from_hub.cache_clear()


def test_hub_data_set(hub):
    record, rejected = read("owner/name", split="test")
    assert isinstance(record, Record)
    assert (record.source, record.origin) == ("owner/name:1", "owner/name")
    assert isinstance(rejected, Rejected)
    assert rejected.source == "owner/name:2"
    source = DataSource(path="owner/name", split="test")
    assert rows.source_sha256(source) == rows.source_sha256(source)
    assert hub == [("owner/name", "test")], "one fetch serves all"


def test_hub_data_set_that_cannot_be_fetched(hub):
    with pytest.raises(
        FetchError, match=r'"owner/other" \(split train\) is no file here and cannot be fetched from the hub: Couldn\'t reach'
    ):
        read("owner/other")


@pytest.fixture
def hub_files(tmp_path, monkeypatch):
    """Stand-in for a fetched data set of the hub."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def find_snapshot(repo_id: str, revision: str, *, kinds: tuple[str, ...], patterns: list[str]) -> Snapshot:
        calls.append((repo_id, (revision, *kinds, *patterns)))
        return Snapshot(directory=tmp_path / "snapshot", kind="dataset", commit="0" * 40, files={})

    monkeypatch.setattr(rows, "find_snapshot", find_snapshot)
    rows._files.cache_clear()
    for name in ("b-1", "b-0", "a-0"):
        path = tmp_path / "snapshot" / "ALL" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, {**GOOD, "id": name}, GOOD)
    yield calls
    rows._files.cache_clear()


def test_files_of_a_hub_data_set_are_read_in_the_order_of_their_names(hub_files):
    source = DataSource(path="hf://datasets/owner/name/ALL/b-*.jsonl")
    found = [record.source for record in rows.read_rows(source)]
    assert found == [f"hf://datasets/owner/name/ALL/b-{file}.jsonl:{line}" for file in (0, 1) for line in (1, 2)]
    assert hub_files == [("owner/name", ("main", "dataset", "ALL/b-*.jsonl"))], "one fetch serves all"
    other = DataSource(path="hf://datasets/owner/name/ALL/b-0.jsonl")
    assert len({rows.source_sha256(one) for one in (source, source, other)}) == 2


@pytest.mark.parametrize("path", ["hf://owner/name", "hf://datasets/owner/name", "hf://datasets/owner/name/data.arrow"])
def test_hub_paths_that_name_no_files(path):
    with pytest.raises(ConfigError, match=f'data.train: "{path}" names no files of a data set of the hub; write hf://datasets/owner/name/'):
        read(path)


def test_files_of_the_hub_have_no_split():
    with pytest.raises(ConfigError, match='has no split "test"'):
        read("hf://datasets/owner/name/a.jsonl", split="test")


def test_a_file_is_preferred_to_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    write_lines(Path("owner/name.jsonl"), GOOD)
    assert only(Path("owner/name.jsonl")).source == "owner/name.jsonl:1"
    assert hub == []


def test_file_hash_is_that_of_its_bytes(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    before = rows.source_sha256(DataSource(path=str(path)))
    assert before == rows.source_sha256(DataSource(path=str(path), name="other"))
    path.write_bytes(path.read_bytes() + b"\n")
    assert before != rows.source_sha256(DataSource(path=str(path)))
