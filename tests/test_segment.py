"""Thoughts cut into steps: nothing lost, nothing cut that belongs together, each step of its type, and the command around it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.cli import run_command
from structcot.segment import segment
from structcot.structure.markers import STEP_TYPES, marker
from structcot.structure.segmenters import SEGMENTERS, Step, whole_steps
from structcot.structure.sentences import paragraphs, sentences
from structcot.tags import read_answer
from structcot.traces import read_lines, read_trace

ROOT = Path(__file__).parent.parent
TRACES = ROOT.parent / "shared" / "data" / "traces"
MEGABYTE = 1_000_000
START, DEDUCE, VERIFY, BACK, DOUBT, NEW, END = STEP_TYPES
ENTRIES = tomllib.loads((ROOT / "structcot" / "structure" / "markers.toml").read_text(encoding="utf-8"))["marker"]
HELD = [entry for entry in ENTRIES if "holds" in entry]
PIECES = [
    "Wait, no. ",
    "So x = 3.5. ",
    "Let me check: ",
    "e.g. this, i.e. that. ",
    "等等，不对。",
    "三加四是七；",
    "最终答案是四！",
    "1. ",
    "J. S. Bach",
    "\\[ a. b. \\]",
    "\\[",
    "\\]",
    "$$ a. $$",
    "$$",
    "$a. b$",
    "```py\nx. y\n\n```",
    "```",
    "\\begin{cases} a. \\\\ b. \\end{cases}",
    "\\begin{",
    "\\end{",
    "\n",
    "\n\n",
    "\r\n",
    "\r\n\r\n",
    "\r",
    "\t",
    " ",
    "  ",
    ".",
    "...",
    "?!",
    '."',
    "。”",
    "\x00",
    "\x0b",
    "\x1c",
    "\x85",
    "\u2028",
    "\u3000",
    "\ufeff",
    "\ud800",
    "🤔",
    "İ",
    "**",
    "- ",
    "Alternatively, ",
    "因此，答案是",
    "\\boxed{3}",
]
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.text(max_size=60),
    st.text(" \t\r\n\u3000", max_size=8),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=15).map("".join),
)


def real_thoughts() -> Iterator[str]:
    files = sorted(TRACES.glob("*.jsonl"))
    if not files:
        pytest.skip("shared/data/traces is not there: real traces are not part of the project")
    for file in files:
        for source, line in read_lines(str(file)):
            yield read_answer(read_trace(source, line).text).thought


def assert_whole(text: str, steps: list[Step]) -> None:
    assert "".join(text[step.start : step.end] for step in steps) == text
    assert [step.start for step in steps] == [0, *(step.end for step in steps[:-1])][: len(steps)]
    assert all(step.start < step.end for step in steps)
    assert {step.type for step in steps} <= set(STEP_TYPES)


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


# Nothing is lost


@pytest.mark.parametrize("name", SEGMENTERS)
@settings(max_examples=300)
@given(text=texts)
def test_steps_joined_are_the_text_without_gaps_and_never_empty(name: str, text: str) -> None:
    steps = SEGMENTERS[name](text)
    assert_whole(text, steps)
    assert_whole(text, whole_steps(steps))
    assert bool(steps) == bool(text)


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize(("text", "number"), [("", 0), (" ", 1), ("\n\n\n", 1), (" \r\n\t\n", 1), ("\n\n x", 1), ("x\n\n", 1)])
def test_white_space_is_no_step_of_its_own(name: str, text: str, number: int) -> None:
    assert len(SEGMENTERS[name](text)) == number


@settings(max_examples=300)
@given(text=texts)
def test_no_piece_between_others_is_blank(text: str) -> None:
    for pieces in (sentences(text), paragraphs(text)):
        assert len(pieces) <= 1 or all(text[start:end].strip() for start, end in pieces)


@settings(max_examples=200)
@given(text=texts)
def test_the_marker_segmenter_cuts_only_between_sentences(text: str) -> None:
    cuts = {step.start for step in SEGMENTERS["marker"](text)}
    assert cuts <= {step.start for step in SEGMENTERS["sentence"](text)}


# Where a cut is, and where none is


@pytest.mark.parametrize(
    "text",
    [
        "See e.g. the sum, i.e. the whole.",
        "As Dr. Smith and Mrs. Jones say.",
        "Take approx. 3 of them.",
        "By Fig. 3 and Eq. 4 it holds.",
        "It is 3.5 and not 3.14 at all.",
        "It costs 1.000.000 today.",
        "1. Add both sides",
        "12. Add both sides",
        "J. S. Bach wrote it.",
        "Let f.g be the product.",
        "A vs. B is the question.",
        "Use \\[ a. b! \\] here.",
        "Use \\[\na.\n\nb.\n\\] here.",
        "Use $$ a. b $$ here.",
        "So \\begin{cases} a. \\\\\n b. \\end{cases} holds.",
        "\\begin{a} x. \\begin{b} y. \\end{b} z. \\end{a} end",
        "```py\nx = 1. \n\ny = 2\n``` end",
        "三加四是七，所以如此",
        "他说“是”，对",
        "x.y.z",
        "See www.a.org/b.html for it",
    ],
)
def test_what_belongs_together_is_not_cut(text: str) -> None:
    assert cut(text) == [text]


@pytest.mark.parametrize(
    "pieces",
    [
        ["One. ", "Two! ", "Three? ", "Four"],
        ["One... ", "Two?! ", "Three"],
        ['He said "no." ', "Then he left."],
        ["(It is so.) ", "Then."],
        ["**Bold.** ", "Then."],
        ["One\n", "Two\r\n", "Three"],
        ["One.\n\n\n", "Two."],
        ["1. One\n", "2. Two"],
        ["It is 3. ", "So be it."],
        ["三加四是七。", "所以是七！", "对吗？", "对；", "好"],
        ["他说“不对。”", "然后走了。"],
        ["一。 ", "Two. ", "三。"],
        ["\\[ a. \\] holds. ", "Then."],
        ["An open \\[ is none. ", "Then."],
        ["An open ``` is none. ", "Then."],
        ["A $$ a. b $$ c. ", "And $$ d. $$ e. ", "End."],
    ],
)
def test_sentences_and_lines_are_cut(pieces: list[str]) -> None:
    assert cut("".join(pieces)) == pieces


@pytest.mark.parametrize(
    "pieces", [["a\nb\n\n", "c"], ["a\r\n\r\n", "b"], ["a\n \t\n\n", "b\n"], ["甲。乙。\n\n", "丙。"], ["\n\na\n\n", "b"]]
)
def test_blank_lines_cut_paragraphs(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert [text[start:end] for start, end in paragraphs(text)] == pieces


def test_the_marker_segmenter_cuts_at_a_turn_and_where_the_thought_goes_on() -> None:
    pieces = [
        ("The sum is 7. One is 3. ", START),
        ("Wait, maybe not. ", BACK),
        ("The sum is 8. Then 5. ", DEDUCE),
        ("Let me check: 3 + 5 = 8. ", VERIFY),
        ("Let me verify with 4. ", VERIFY),
        ("It fits. ", DEDUCE),
        ("So the answer is 5.", END),
    ]
    text = "".join(piece for piece, _ in pieces)
    assert [(text[step.start : step.end], step.type) for step in SEGMENTERS["marker"](text)] == pieces


def test_whole_steps_join_what_a_turn_leads_to() -> None:
    text = "The sum is 7. One is 3. Wait, maybe not. The sum is 8. Then 5. Let me check: 3 + 5. Let me verify. It fits. So the answer is 5."
    steps = whole_steps(SEGMENTERS["marker"](text))
    assert [(text[step.start : step.end], step.type) for step in steps] == [
        ("The sum is 7. One is 3. ", START),
        ("Wait, maybe not. The sum is 8. Then 5. ", BACK),
        ("Let me check: 3 + 5. ", VERIFY),
        ("Let me verify. It fits. ", VERIFY),
        ("So the answer is 5.", END),
    ]
    assert whole_steps([]) == []
    assert whole_steps([Step(0, 2, DEDUCE), Step(2, 3, DEDUCE)]) == [Step(0, 3, DEDUCE)]
    assert whole_steps([Step(0, 1, START), Step(1, 2, START)]) == [Step(0, 1, START), Step(1, 2, START)]


# Types


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (END, "So the answer is 12."),
        (END, "Therefore, x is 3."),
        (END, "In summary, both hold."),
        (END, "**Final Answer**"),
        (END, "因此，答案是四。"),
        (END, "综上，甲对。"),
        (END, "最终答案是四。"),
        (VERIFY, "Let me double-check the sum."),
        (VERIFY, "Okay, let's verify by counting."),
        (VERIFY, "To make sure, take n = 3."),
        (VERIFY, "Wait, let me check that again."),
        (VERIFY, "Does that make sense?"),
        (VERIFY, "Plugging it back in gives 4."),
        (VERIFY, "让我检查一下。"),
        (VERIFY, "验算一下：三加四是七。"),
        (VERIFY, "我们来验证。"),
        (BACK, "Wait, maybe I misread it."),
        (BACK, "But wait, no, I made a mistake."),
        (BACK, "Let's go back to the first equation."),
        (BACK, "Scratch that."),
        (BACK, "No, actually it is 5."),
        (BACK, "I made a mistake in the sum."),
        (BACK, '"Wait, maybe not."'),
        (BACK, "等等，不对。"),
        (BACK, "我算错了。"),
        (BACK, "重新考虑这一步。"),
        (BACK, "嗯，等一下。"),
        (DOUBT, "Hmm, that is large."),
        (DOUBT, "I'm not sure about this."),
        (DOUBT, "But is that true?"),
        (DOUBT, "This is confusing."),
        (DOUBT, "The sign is odd, and I don't know why."),
        (DOUBT, "That doesn't make sense."),
        (DOUBT, "我不知道。"),
        (DOUBT, "这有点奇怪。"),
        (DOUBT, "难道是五？"),
        (DOUBT, "这里我不确定。"),
        (NEW, "Alternatively, use symmetry."),
        (NEW, "Another way is to count pairs."),
        (NEW, "Let's try a smaller case."),
        (NEW, "What if x is negative?"),
        (NEW, "- ALTERNATIVELY, use symmetry."),
        (NEW, "换一种方法。"),
        (NEW, "或者用归纳法。"),
        (NEW, "让我试试。"),
        ("", "The sum is 7."),
        ("", "First, add both sides."),
        ("", "Waiting times add up."),
        ("", "The answers differ."),
        ("", ""),
        ("", " \n"),
        ("", "三加四是七。"),
        ("", "设甲为三。"),
        ("", "不等式成立。"),
        ("", "因为甲是三，所以乙是四。"),
    ],
)
def test_the_words_of_a_sentence_tell_its_type(kind: str, sentence: str) -> None:
    assert marker(sentence) == kind
    assert marker(f"\n {sentence}") == kind


def test_what_comes_before_the_first_marker_sets_the_scene_and_what_follows_one_is_deduction() -> None:
    steps = SEGMENTERS["sentence"]("One is 3. 乙是四。Hmm, maybe. So 5. 换一种方法。乙是六。")
    assert [step.type for step in steps] == [START, START, DOUBT, DEDUCE, NEW, DEDUCE]


def assert_not_hidden(sentence: str) -> None:
    for entry in HELD:
        is_hidden = not any(word in sentence.lower() for word in entry["needs"])
        found = re.search("|".join(entry["holds"]), sentence, re.IGNORECASE)
        assert not (found and is_hidden), f"{sentence!r} holds {found[0] if found else ''!r}, and nothing of needs"


def test_the_quick_test_hides_no_sentence_of_real_thoughts() -> None:
    pattern = [re.compile("|".join(entry["holds"]), re.IGNORECASE) for entry in HELD]
    found = 0
    for thought in real_thoughts():
        for start, end in sentences(thought):
            for entry, holds in zip(HELD, pattern, strict=True):
                if holds.search(thought, start, end):
                    found += 1
                    assert any(word in thought[start:end].lower() for word in entry["needs"]), thought[start:end]
    assert found > 100


@pytest.mark.parametrize("holds", [holds for entry in HELD for holds in entry["holds"]], ids=lambda holds: holds[:40])
@settings(max_examples=60)
@given(data=st.data())
def test_the_quick_test_hides_no_sentence_that_a_pattern_fits(holds: str, data: st.DataObject) -> None:
    sentence = data.draw(st.from_regex(holds))
    assert_not_hidden(sentence)
    assert_not_hidden(sentence.upper())


WORDS = sorted({word for entry in HELD for holds in entry["holds"] for word in re.findall(r"[a-z']+|[\u4e00-\u9fff]+", holds)})


@settings(max_examples=500)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join))
def test_the_quick_test_hides_no_sentence_of_the_words_of_the_patterns(sentence: str) -> None:
    assert_not_hidden(sentence)
    assert_not_hidden(sentence.capitalize())


# Time

ENGLISH = "So x is 3.5, e.g. by $a$. Wait, maybe not.\n\nLet me check: \\[ a. \\] holds? "
SIGNS = ["\\[", ".", "\n", "$$", " ", "\r", "**", "?", "。", "```", "(", "ok ", "I. ", "\\begin{", ENGLISH]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: repr(sign)[:12])
def test_a_megabyte_of_anything_is_cut_in_seconds(name: str, sign: str) -> None:
    signs = sign * (MEGABYTE // len(sign))
    for text in (signs, f"a{signs}b"):
        assert SEGMENTERS[name](text)[-1].end == len(text)


# Tags

THOUGHT, SOLUTION = ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|begin_of_solution|>", "<|end_of_solution|>")


@pytest.mark.parametrize(
    ("text", "thought", "solution", "is_closed", "defect"),
    [
        (f"{THOUGHT[0]}a{THOUGHT[1]} {SOLUTION[0]}b{SOLUTION[1]}", "a", "b", True, ""),
        ("<think>a</think>b", "a", "b", True, ""),
        ("<think>a</think>", "a", "", True, ""),
        ("a</think>b", "a", "b", True, ""),
        ("x <think>a</think>b", "a", "b", True, ""),
        ("<think></think>b", "", "b", True, ""),
        ("a b", "a b", "", False, "no thought tags"),
        ("", "", "", False, "no thought tags"),
        (f"{SOLUTION[0]}b{SOLUTION[1]}", "", "b", False, "no thought tags"),
        ("<think>a", "a", "", False, "the thought is never closed"),
        (f"{THOUGHT[0]}a {SOLUTION[0]}b{SOLUTION[1]}", "a ", "b", False, "the thought is never closed"),
        (f"a{THOUGHT[1]}b", "a", "b", True, "the thought is never opened"),
        ("<think>a<think>b</think>c", "a<think>b", "c", True, "more than one thought: nested or repeated tags"),
        ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d", True, "more than one thought: nested or repeated tags"),
        ("<think>a</think>b</think>c", "a", "b</think>c", True, "more than one thought: nested or repeated tags"),
        (f"<think>a{THOUGHT[1]}b", "a", "b", True, "the tags of the thought do not match or are out of order"),
        (f"{THOUGHT[0]}a</think>b", "a", "b", True, "the tags of the thought do not match or are out of order"),
        ("a</think>b<think>c", "c", "", False, "the tags of the solution are out of order"),
        (f"{SOLUTION[0]}b{SOLUTION[1]}<think>a</think>", "a", "", True, "the tags of the thought do not match or are out of order"),
        (f"<think>a</think>{SOLUTION[0]}b", "a", "b", True, "the solution is never closed"),
        (f"<think>a</think>b{SOLUTION[1]}", "a", f"b{SOLUTION[1]}", True, "the tags of the solution are out of order"),
        (f"<think>a</think>{SOLUTION[1]}{SOLUTION[0]}b", "a", "b", True, "the tags of the solution are out of order"),
        (f"<think>a</think>{SOLUTION[0] * 2}b{SOLUTION[1]}", "a", f"{SOLUTION[0]}b", True, "the tags of the solution are out of order"),
    ],
)
def test_an_answer_is_read_as_far_as_it_goes(text: str, thought: str, solution: str, is_closed: bool, defect: str) -> None:
    answer = read_answer(text)
    assert (answer.thought, answer.solution, answer.is_closed, answer.defect) == (thought, solution, is_closed, defect)


@given(st.lists(st.sampled_from([*THOUGHT, *SOLUTION, "<think>", "</think>", "a", "\n", "<"]), max_size=12).map("".join))
def test_the_parts_of_any_answer_lie_in_it_one_after_the_other(text: str) -> None:
    answer = read_answer(text)
    assert 0 <= answer.thought_start <= answer.thought_end <= answer.solution_start <= answer.solution_end <= len(text)


# The command

TEXT = "<think>\nThe sum is 七. Wait, maybe 8. 🤔 So 5.\n\nLet me check.\n</think>\nIt is \\boxed{5}."
RECORDS: list[dict[str, Any]] = [
    {"z": 1, "response": TEXT, "a": {"b": [None, 1.5]}},
    {"id": "x", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": TEXT}], "é": "\u2028"},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "No tags. Hmm, why?"}]},
]
UNUSABLE = [b'{"half', b'  {"response":   ""}', b"[1]", b"\xff\xfe", b"", b'{"question": "\\u00e9"}']


def lines_of(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in records)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["segment", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command("segment")
    return int(str(ended.value.code or 0))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_records_come_out_as_they_were_with_steps_and_metrics_behind(name: str, tmp_path: Path) -> None:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*RECORDS))
    segment(str(source), str(to), name)
    out = [json.loads(line) for line in to.read_bytes().splitlines()]
    for line, (before, after) in enumerate(zip(RECORDS, out, strict=True), 1):
        assert list(after) == [*before, "steps", "metrics"]
        assert {key: after[key] for key in before} == before
        thought = read_answer(read_trace(f"in:{line}", lines_of(before)).text).thought
        steps = [Step(**step) for step in after["steps"]]
        assert steps == SEGMENTERS[name](thought)
        assert_whole(thought, steps)
        assert after["metrics"]["steps"] == len(steps)
        assert after["metrics"]["characters"] == len(thought)
        assert set(after["metrics"]["agreement"]) == {f"{name}/{form}" for form in ("blank-line", "sentence") if form != name}


def test_what_was_segmented_before_is_segmented_anew(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines_of({"response": TEXT, "steps": "old"}))
    segment(str(source), str(first))
    segment(str(first), str(second))
    assert first.read_bytes() == second.read_bytes()


def test_lines_without_an_answer_pass_byte_for_byte_and_are_reported(tmp_path: Path) -> None:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(UNUSABLE) + b"\n" + lines_of(RECORDS[0]) + b"no line end")
    facts = segment(str(source), str(to))
    out = to.read_bytes().split(b"\n")
    assert out[: len(UNUSABLE)] == UNUSABLE
    assert out[-2:] == [b"no line end", b""]
    assert facts["traces"] == 1
    assert sum(facts["unusable"].values()) == len(UNUSABLE) + 1
    assert facts["unusable"]["the answer is empty"] == 1


def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes((lines_of(*RECORDS) + b"{half\n") * 60)
    facts = [segment(str(source), str(tmp_path / f"out{jobs}"), "marker", [f"jobs={jobs}"]) for jobs in (1, 4)]
    assert (tmp_path / "out1").read_bytes() == (tmp_path / "out4").read_bytes()
    assert facts[0] | {"output": ""} == facts[1] | {"output": ""}
    assert facts[0]["traces"] == 180


def test_standard_input_and_output_are_named_by_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*RECORDS))
    segment(str(source), str(to))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(source.read_bytes())))
    assert command(monkeypatch, "-", "-") == 0
    piped = capsysbinary.readouterr()
    assert piped.out == to.read_bytes()
    assert b"3 traces segmented by marker" in piped.err


def test_the_summary_is_json_with_metrics_and_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, facts_file = tmp_path / "in.jsonl", tmp_path / "facts.json"
    source.write_bytes(lines_of(*RECORDS))
    assert command(monkeypatch, str(source), str(tmp_path / "out"), "--segmenter", "sentence", "--json", str(facts_file), "jobs=1") == 0
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    assert (facts["segmenter"], facts["traces"], facts["unusable"]) == ("sentence", 3, {})
    assert {"shares", "totals", "step_types", "transitions", "keywords", "distributions", "defects"} <= set(facts)
    assert facts["totals"]["steps"] == sum(facts["step_types"].values()) == facts["distributions"]["steps"]["mean"] * 3
    assert facts["defects"] == {"no thought tags": 1}
    (agreement,) = facts["agreement"].items()
    assert agreement[0] == "sentence/blank-line"
    assert agreement[1]["traces"] == 3
    assert 0 < agreement[1]["f1"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segmenter", "words"], 'got "words"; use one of blank-line, sentence, marker, llm'),
        (["unknown=1"], '"unknown=1": is no setting'),
        (["field"], '"field": is no setting'),
        (["jobs=0"], 'jobs: got "0"'),
        (["jobs=many"], 'jobs: got "many"'),
        (["--segmenter", "llm"], "needs url=URL and model=NAME"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_exit_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*RECORDS))
    assert command(monkeypatch, str(source), str(to), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not to.exists()
    assert command(monkeypatch, str(tmp_path / "missing"), str(to)) == command(monkeypatch, str(source), str(source)) == 2


def test_a_field_of_another_name_is_named_by_the_user(tmp_path: Path) -> None:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of({"mine": TEXT, "response": "other"}))
    segment(str(source), str(to), "sentence", ["field=mine"])
    assert json.loads(to.read_bytes())["steps"][-1]["end"] == len(read_answer(TEXT).thought)


# Against an annotator

_SECTION = re.compile(r'\["?([a-z-]+)"?\](.*?)\["?end-section"?\]', re.DOTALL)


def held_out_sections() -> list[tuple[str, str]]:
    """The annotator's label and the type that the markers tell, for each labelled section of the half of traces that tuned no word list.

    A section gets the type of the first sentence that it touches.
    """
    path = TRACES / "annotated.jsonl"
    if not path.is_file():
        pytest.skip("shared/data/traces/annotated.jsonl is not there: annotated traces are not part of the project")
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if int(hashlib.sha256(f"{row['model']}/{row['idx']}".encode()).hexdigest(), 16) % 2:
            pairs += list(typed_sections(row["response"], row["annotated_response"]))
    return pairs


def typed_sections(text: str, annotated: str) -> Iterator[tuple[str, str]]:
    spans, position = sentences(text), 0
    for label, section in _SECTION.findall(annotated):
        content = section.strip()
        start = text.find(content, position)
        start = text.find(content) if start < 0 else start
        if start < 0 or not content or label == "end-section":
            continue  # the annotator changed the words
        position = start + len(content)
        first = next(span for span in spans if span[0] < position and span[1] > start)
        yield label, marker(text[slice(*first)])


@pytest.mark.parametrize(
    ("labels", "least"),
    [(("backtracking",), 0.45), (("uncertainty-estimation",), 0.55), (("backtracking", "uncertainty-estimation"), 0.65)],
    ids=["backtracking", "uncertainty", "both"],
)
def test_markers_agree_with_an_annotator_on_traces_that_tuned_nothing(labels: tuple[str, ...], least: float) -> None:
    pairs = [(label in labels, kind in labels) for label, kind in held_out_sections()]
    assert len(pairs) > 1_000
    both = pairs.count((True, True))
    precision = both / (both + pairs.count((False, True)))
    recall = both / (both + pairs.count((True, False)))
    f1 = 2 * precision * recall / (precision + recall)
    print(f"{'+'.join(labels)}: precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f} on {len(pairs):,} sections")
    assert f1 >= least
