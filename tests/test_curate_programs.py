"""A curation of programs: rows as APPS and TACO have them, judged by their tests in the sandbox, wherever in an answer they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from structcot.curate.check import programs_of
from structcot.curate.command import curate
from structcot.curate.reformat import tagged
from structcot.curate.stages import REJECTED, read_records
from structcot.grading.code import extract_program, fenced_blocks
from tests.faulty_server import Exchange, FaultyServer, says

READS = "```python\nprint(int(input()) + {add})\n```"
CALLED = "```python\ndef grow(x):\n    return x + {add}\n```"
ROWS = [
    {"question": "Print 1 more than the number.", "input_output": json.dumps({"inputs": ["1\n", "5\n"], "outputs": ["2\n", "6\n"]})},
    {
        "question": "Return 2 more than x from grow.",
        "starter_code": "def grow(x):\n",
        "input_output": json.dumps({"fn_name": "grow", "inputs": [[1], [2]], "outputs": [[3], [4]]}),
    },
    {"question": "Print 3 more than the number.", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["4\n"]})},
    {"question": "Print 4 more than the number.", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["5\n"]})},
]
THOUGHT = "Let me think about the number.\n\nWait, I should read it first."
ANSWERS = {
    "1 more": f"<think>\n{THOUGHT}\n</think>\n\nSo:\n\n{READS.format(add=1)}",
    "2 more": f"{THOUGHT}\n\nSo:\n\n{CALLED.format(add=2)}\n\nUse it as\n\n```python\ngrow(5)\n```",
    "3 more": f"<think>\n{THOUGHT}\n</think>\n\nSo:\n\n{READS.format(add=2)}",
    "4 more": f"{THOUGHT}\n\nSo:\n\n{READS.format(add=5)}\n\nor\n\n{READS.format(add=6)}",
}


def teacher(exchange: Exchange) -> None:
    """Answers, and copies its untagged answer into two sections, in which only the program is in a block."""
    asked = exchange.user()
    answer = next(text for words, text in ANSWERS.items() if words in asked) if "Copy it" not in asked else ""
    says(answer or tagged(THOUGHT, f"So:\n\n{CALLED.format(add=2)}\n\nUse it as\n\npython\ngrow(5)"))(exchange)


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps({"difficulty": "MEDIUM", **row}) + "\n" for row in ROWS))
    path = tmp_path / "curate.toml"
    path.write_text(
        f"""output_dir = "{tmp_path / "out"}"
duplicates = {{buckets = 0}}
contamination = {{benchmarks = []}}

[[sources]]
name = "programs"
path = "{tmp_path / "programs.jsonl"}"
where = {{difficulty = ["MEDIUM"]}}

[teacher]
url = "http://localhost:1"
model = "a-teacher"

[reformat]
kept_words = 0.8

[reformat.server]
url = "http://localhost:1"
model = "a-copier"
"""
    )
    return path


def test_programs_are_kept_if_they_pass_their_tests(config_path: Path, tmp_path: Path) -> None:
    with FaultyServer(teacher) as server:
        facts = curate(config_path, [f"teacher.url={server.url!r}", f"reformat.server.url={server.url!r}"])
    stages = {one["stage"]: one for one in facts["stages"]}
    assert stages["check"]["rejected"] == {"the answer is wrong": 2}
    assert (stages["reformat"]["kept"], stages["mix"]["kept"]) == (2, 2)
    made = {one["provenance"]["reformatted"]: one for one in read_records(next((tmp_path / "out" / "data").glob("*.jsonl")))}
    assert set(made) == {"rule", "model"}
    for how, one in made.items():
        assert one["provenance"]["verdicts"] == {"tests": "correct"}
        assert extract_program(one["messages"][-1]["content"]) == one["provenance"]["extracted"].rstrip("\n"), how
    assert "def grow(x):" in made["model"]["messages"][1]["content"], "starter code is asked for"


def test_without_a_copier_a_program_before_the_last_block_falls(config_path: Path, tmp_path: Path) -> None:
    text = config_path.read_text().partition("[reformat]")[0]
    config_path.write_text(f'{text}[reformat]\nuntagged = "last-paragraph"\n')
    with FaultyServer(teacher) as server:
        facts = curate(config_path, [f"teacher.url={server.url!r}"])
    stages = {one["stage"]: one for one in facts["stages"]}
    assert stages["check"]["kept"] == 2
    assert stages["reformat"]["rejected"] == {"the last paragraph is not the program that passes": 1}
    (fallen,) = _rejected(tmp_path, "reformat")
    assert fallen["question"] == ROWS[1]["question"]


def _rejected(tmp_path: Path, stage: str) -> list[dict[str, str]]:
    (directory,) = (tmp_path / "out" / "stages").glob(f"*-{stage}")
    return list(read_records(directory / REJECTED))


def test_blocks_before_the_last_are_tried_only_where_no_tag_says_what_the_solution_is() -> None:
    blocks = [f"```\n{number}\n```" for number in range(6)]
    text = "\n\n".join(blocks)
    assert fenced_blocks(text) == list("012345")
    assert [extract_program(one) for one in programs_of(text)] == ["5", "4", "3", "2"]
    assert programs_of(f"<think>\n{text}\n</think>\n{blocks[0]}") == [f"<think>\n{text}\n</think>\n{blocks[0]}"]
    assert [extract_program(one) for one in programs_of("no block")] == [""]
    assert fenced_blocks("```\nopen") == []
