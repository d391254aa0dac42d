"""Whole files through `structcot perturb`: what comes out, in which order, with which report, and what wrong input and arguments do."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from structcot import parallel
from structcot.errors import ConfigError
from structcot.perturb import donors as donor_sampling
from structcot.perturb.command import perturb
from structcot.perturb.spec import KINDS, MODES
from structcot.tags import read_answer
from tests.tiny_run import DONE, WRONG, Site

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
THOUGHT = "<think>\nOne is 12.\n\nWait, two is 13.\n\nBut three is 14. Let me check.\n\nAlternatively, it is 15.\n</think>\n"
TEXT = THOUGHT + "The answer is \\boxed{15}."


def write(path: Path, lines: Sequence[bytes | dict[str, Any]]) -> str:
    """A file of these lines; a record becomes a line of JSON."""
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return str(path)


def run(directory: Path, lines: Sequence[bytes | dict[str, Any]], *settings: str, name: str = "out", **more: Any) -> list[bytes]:
    """The lines that come out; the files lie in `directory` under `name`."""
    to = directory / f"{name}.jsonl"
    more = {"kind": "delete", "fraction": 0.5, **more}
    perturb(write(directory / f"{name}.in.jsonl", lines), str(to), settings if "jobs=4" in settings else (*settings, "jobs=1"), **more)
    return to.read_bytes().splitlines(keepends=True)


def report(directory: Path, name: str = "out") -> dict[str, Any]:
    """The report without paths."""
    facts = json.loads((directory / f"{name}.report.json").read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if key not in ("input", "output")}


def facts_of_records(directory: Path, name: str = "out") -> list[dict[str, Any]]:
    """The lines of the file of records, without the paths."""
    lines = (directory / f"{name}.records.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**facts, "source": int(facts["source"].rpartition(":")[2])} for facts in map(json.loads, lines)]


def many(count: int) -> list[dict[str, Any]]:
    """Records that differ, in English and Chinese."""
    rng = random.Random(3)
    openings = ("Wait,", "But", "So", "Let me check:", "等等，", "Alternatively,", "另一种方法：")
    records = []
    for number in range(count):
        steps = [f"{rng.choice(openings)} r{number} has {rng.randrange(1000)}." for _ in range(rng.randrange(1, 12))]
        text = "<think>\n" + "\n\n".join(steps) + f"\n</think>\nThe answer is \\boxed{{{number}}}."
        records.append({"id": number, "domain": "maths" if number % 2 else "physics", "response": text})
    return records


# The same bytes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_of_nothing_gives_the_same_bytes(kind: str, mode: str, tmp_path: Path) -> None:
    odd = b'{ "response":"<think>\\u0031 Wait, 12. \\ud83d\\ude00</think>3" ,"x":1.50}\r\n'
    lines = [odd, {"id": 1, "response": TEXT, "correct": False}, b"not JSON\n", b"\n", b"[1]\n"]
    assert b"".join(run(tmp_path, lines, kind=kind, mode=mode, fraction=0.0)) == (tmp_path / "out.in.jsonl").read_bytes()
    assert report(tmp_path)["changed"] == 0


@pytest.mark.parametrize("name", ["paper_outputs.jsonl", "annotated.jsonl"])
def test_a_fraction_of_nothing_gives_the_same_bytes_of_real_traces(name: str, tmp_path: Path) -> None:
    path = DATA / "traces" / name
    if not path.is_file():
        pytest.skip(f"no real traces: {path} is not there")
    with path.open("rb") as file:
        lines = [line for _, line in zip(range(40), file, strict=False)]
    assert run(tmp_path, lines, kind="shuffle", fraction=0.0) == lines


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("delete", ("then=shuffle:0.5,level=paragraph", "then=digits:0.5", "then=keywords:0.5")), ("insert", ("match_length=true",))],
)
def test_neither_the_number_of_processes_nor_the_order_of_the_file_counts(
    kind: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "LINES_PER_BATCH", 8)  # more batches than wait at one time
    records: list[Any] = many(160)
    records[7], records[30] = b"not JSON\n", {"id": 30, "response": "no tags"}
    order = random.Random(1).sample(range(160), 160)
    one = run(tmp_path, records, *settings, kind=kind, fraction=0.3, name="one")
    four = run(tmp_path, records, *settings, "jobs=4", kind=kind, fraction=0.3, name="four")
    mixed = run(tmp_path, [records[number] for number in order], *settings, "jobs=4", kind=kind, fraction=0.3, name="mixed")
    assert one == four
    assert mixed == [one[number] for number in order]
    assert report(tmp_path, "one") == report(tmp_path, "four") == report(tmp_path, "mixed")
    facts = facts_of_records(tmp_path, "one")
    assert facts == facts_of_records(tmp_path, "four")
    assert [{**fact, "source": 0} for fact in facts_of_records(tmp_path, "mixed")] == [{**facts[number], "source": 0} for number in order]
    assert report(tmp_path, "one")["changed"] > 100


def test_another_seed_gives_other_bytes_and_the_same_seed_the_same(tmp_path: Path) -> None:
    for kind in ("delete", "insert", "shuffle", "digits", "keywords"):
        first, again, other = (run(tmp_path, many(30), kind=kind, fraction=0.4, seed=seed) for seed in (1, 1, 2))
        assert first == again
        assert first != other


def test_records_of_the_same_text_are_not_perturbed_alike(tmp_path: Path) -> None:
    text = "<think>" + " ".join(f"Step {number} is." for number in range(20)) + "</think>1"
    lines = run(tmp_path, [{"id": number, "response": text} for number in range(8)], "level=sentence")
    assert len({json.loads(line)["response"] for line in lines}) == 8


def test_sampled_donors_do_not_depend_on_the_order_of_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(donor_sampling, "MAX_DONOR_BYTES", 1000)
    lines = [(f"d:{number}", b"%d" % number * (1 + 37 * number % 400)) for number in range(60)]
    orders = [lines, lines[::-1], lines[30:] + lines[:30], sorted(lines, key=lambda one: len(one[1]))]
    sampled = [[line for _, line in donor_sampling.sample_lines(one, seed=0)] for one in orders]
    assert all(sum(map(len, one)) <= 1000 for one in sampled)
    assert [len(one) for one in sampled] == [len(sampled[0])] * 4
    assert all(one == sampled[0] for one in sampled)


def test_a_last_line_that_does_not_end_changes_no_choice(tmp_path: Path) -> None:
    records: list[Any] = many(12)
    ended = run(tmp_path, records, kind="insert")
    unended = run(tmp_path, [*records[:-1], json.dumps(records[-1]).encode()], kind="insert")
    assert ended == unended


def test_a_chain_is_what_its_parts_do_one_after_the_other(tmp_path: Path) -> None:
    records = many(20)
    chain = run(tmp_path, records, "then=digits:0.5", kind="delete", fraction=0.4)
    first = run(tmp_path, records, kind="delete", fraction=0.4)
    # The place in the chain is part of the choice, so an empty place stands for the part that is done already.
    assert chain == run(tmp_path, first, "then=digits:0.5", kind="delete", fraction=0.0)
    assert chain != first
    stages = report(tmp_path)["stages"]
    assert [stage["kind"] for stage in stages] == ["delete", "digits"]


# Records of every kind

BROKEN = {
    "no thought tags": "Just 12 words. Wait, no.",
    "more than one thought: nested or repeated tags": "<think>12 <think>13. But</think></think>14",
    "the thought is never closed": "<think>12. Wait. But 13.",
    "the thought is never opened": "12. Wait.<|end_of_thought|>13",
    "the solution is never closed": "<|begin_of_thought|>12.<|end_of_thought|><|begin_of_solution|>13",
    "the tags of the thought do not match or are out of order": "<think>12.<|end_of_thought|>13",
}
UNUSABLE = {
    b'{"id": "q", "response": ""}\n': "the answer is empty",
    b"{'single': 1}\n": "not JSON",
    b'{"response": "\xff"}\n': "not JSON",
    b"[1, 2]\n": "not a JSON object",
    b'"text"\n': "not a JSON object",
    b" \n": "a blank line",
    b'{"prompt": "q"}\n': "no answer: found prompt",
    b'{"messages": [{"role": "user", "content": "q"}]}\n': "no assistant turn",
    b'{"messages": [1, null]}\n': "no assistant turn",
    b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}\n": "not JSON",
}
GOOD: list[Any] = [{"id": "good", "response": TEXT}, {"id": "fine", "response": TEXT}]


@pytest.mark.parametrize("kind", ["digits", "keywords", "delete", "insert", "shuffle"])
def test_broken_records_come_out_byte_for_byte_with_a_reason_and_the_others_are_perturbed(kind: str, tmp_path: Path) -> None:
    tagged = [
        json.dumps({"response": text, "id": text}, indent=None, separators=(" ,", ":  ")).encode() + b"\n" for text in BROKEN.values()
    ]
    lines = [GOOD[0], *UNUSABLE, *tagged, GOOD[1]]
    result = run(tmp_path, lines, kind=kind, fraction=1.0)
    assert result[1:-1] == lines[1:-1]
    facts = facts_of_records(tmp_path)
    assert [fact["changed"] for fact in facts] == [True, *[False] * (len(lines) - 2), True]
    for fact, reason in zip(facts[1:-1], [*UNUSABLE.values(), *(f"{kind}: {reason}" for reason in BROKEN)], strict=True):
        assert fact["reason"].startswith(reason)
    assert report(tmp_path)["stages"][0]["not_applied"] == dict.fromkeys(sorted(BROKEN), 1)
    assert sum(report(tmp_path)["unusable"].values()) == len(UNUSABLE)


@pytest.mark.parametrize(
    "record",
    [
        {"id": "\ud800", "response": TEXT},
        {"\ud800": 1},
        {"id": "text", "response": TEXT.replace("12", "\ud800 十二")},
        {"id": "steps", "steps": [{"start": 0, "end": None}, {"start": None, "end": len(THOUGHT) - 16}], "response": TEXT},
        {"id": "text", "steps": "none", "metrics": 3, "response": TEXT},
    ],
    ids=["half a pair in the id", "half a pair in a name", "half a pair in the answer", "steps without edges", "steps that are a text"],
)
def test_an_odd_record_does_not_stop_the_others(record: dict[str, Any], tmp_path: Path) -> None:
    for settings in ([], ["level=given"]):
        result = run(tmp_path, [GOOD[0], record, {**GOOD[1], "steps": [{"start": 0, "end": len(read_answer(TEXT).thought)}]}], *settings)
        assert len(result) == 3
        assert report(tmp_path)["changed"] >= 1


def test_deep_records_do_not_stop_the_others(tmp_path: Path) -> None:
    tail = b', "response": ' + json.dumps(TEXT).encode() + b"}\n"
    deep = [b'{"x": ' + b"[" * depth + b"]" * depth + tail for depth in range(800, 1010)]
    result = run(tmp_path, [GOOD[0], *deep, GOOD[1]])
    changed = [fact["changed"] for fact in facts_of_records(tmp_path)]
    assert (changed[0], changed[1], changed[-2], changed[-1]) == (True, True, False, True)
    assert all(out == line for out, line, is_changed in zip(result[1:-1], deep, changed[1:-1], strict=True) if not is_changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shuffle", "insert", "digits"])
def test_a_record_of_a_megabyte_is_perturbed_in_seconds(kind: str, tmp_path: Path) -> None:
    thought = "\n\n".join(f"Wait, step {number} has a sum of {number * 7} and no more." for number in range(22_000))
    text = f"<think>{thought}</think>The answer is \\boxed{{1}}."
    assert len(text) > 1_000_000
    started = time.process_time()
    result = run(tmp_path, [{"id": "long", "response": text}, *many(60)], kind=kind)
    assert time.process_time() - started < 20
    perturbed = json.loads(result[0])["response"]
    assert perturbed != text
    assert perturbed.endswith("</think>The answer is \\boxed{1}.")


def test_a_record_with_most_of_the_steps_is_given_those_of_others(tmp_path: Path) -> None:
    long = {"id": "long", "response": f"<think>{'So it is. ' * 20_000}</think>1"}
    (line, *_) = run(tmp_path, [long, GOOD[0]], "level=sentence", kind="insert", fraction=0.001)
    assert report(tmp_path)["stages"][0]["not_applied"] == {}
    assert json.loads(line)["response"] != long["response"]


def test_a_prompt_prefix_does_not_fail_where_there_is_no_user_turn(tmp_path: Path) -> None:
    wrong = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": TEXT}], "correct": False, "gold": "16"}
    alone = {"messages": [{"role": "assistant", "content": TEXT}]}
    result = run(tmp_path, [wrong, alone], "prompt_prefix=Box it. ", kind="wrong-answer", fraction=1.0)
    assert json.loads(result[0])["messages"][0]["content"] == "Box it. q"
    assert json.loads(result[1]) == alone


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("record", "path"),
    [
        ({"z": 1, "messages": [*TURNS, {"role": "assistant", "content": TEXT, "weight": 2}], "é": "ü"}, ("messages", 2, "content")),
        ({"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": TEXT}]}, ("conversations", 1, "value")),
        ({"prompt": "q", "completion": TEXT, "n": None}, ("completion",)),
        ({"prompt": TURNS, "completion": [{"role": "assistant", "content": TEXT}]}, ("completion", 0, "content")),
        ({"solution": "plain", "x": [1.5, {"y": True}], "response": TEXT}, ("response",)),
    ],
    ids=["messages", "ShareGPT", "prompt-completion", "chat prompt-completion", "response"],
)
def test_order_and_all_fields_of_every_format_are_kept(record: dict[str, Any], path: tuple[Any, ...], tmp_path: Path) -> None:
    (line,) = run(tmp_path, [record], fraction=0.5, kind="delete")
    changed = json.loads(line)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    assert len(inside[path[-1]]) < len(TEXT)
    inside[path[-1]] = TEXT
    assert json.dumps(changed) == json.dumps(record)


def test_steps_and_metrics_are_dropped_from_changed_records_only(tmp_path: Path) -> None:
    derived = {"steps": [], "metrics": {"words": 3}}
    changed, unchanged = run(tmp_path, [{"id": 1, "response": TEXT, **derived}, {"id": 2, "response": "no tags", **derived}])
    assert set(json.loads(changed)) == {"id", "response"}
    assert json.loads(unchanged) == {"id": 2, "response": "no tags", **derived}


def test_a_dash_is_standard_input_and_output(tmp_path: Path) -> None:
    records = many(5)
    for kind in ("delete", "insert"):
        expected = run(tmp_path, records, kind=kind)
        command = [sys.executable, "-m", "structcot.perturb", "-", "-", "--kind", kind, "--fraction", "0.5", "jobs=1"]
        done = subprocess.run(command, input=(tmp_path / "out.in.jsonl").read_bytes(), capture_output=True, check=True)
        assert done.stdout.splitlines(keepends=True) == expected
        assert b"5 records" in done.stderr


# The report

BY_HAND: list[Any] = [
    {
        "id": "a",
        "response": "<think>\nOne two.\n\nWait, three.\n\nBut four 12.\n\nSo five.\n</think>\nThe answer is \\boxed{12}.",
    },
    {"id": "b", "response": "<think>\nBut six.\n\nAlternatively seven.\n</think>\nNo more."},
    {"id": "c", "response": "Just text, \\boxed{7}."},
]


def test_numbers_of_the_report_are_those_counted_by_hand(tmp_path: Path) -> None:
    run(tmp_path, [*BY_HAND, b"{\n"], "level=paragraph", "keep=prefix", kind="delete", fraction=0.5, seed=4)
    facts = report(tmp_path)
    # Words: 16 + 8 + 4, of which "but four 12 so five" and "alternatively seven" go. Tokens: 32 + 16 + 9, of which 8 and 3 go.
    expected = {
        "seed": 4, "records": 4, "changed": 2, "unchanged": 2, "left_out": {}, "words_before": 28, "words_after": 21,
        "tokens_before": 57, "tokens_after": 46, "edit_distance": 7, "keywords_before": 4, "keywords_after": 2, "had_answer": 2,
        "answer_kept": 2, "tokens_after_per_token_before": round(46 / 57, 6), "edit_distance_per_word": 0.25, "keywords_left": 0.5,
        "answers_kept": 1.0, "realised_fraction": 0.5,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert list(facts["unusable"].values()) == [1]
    (stage,) = facts["stages"]
    expected = {
        "kind": "delete", "asked_fraction": 0.5, "records_changed": 2, "units": 6, "chosen": 3, "changed": 3, "steps_before": 6,
        "steps_after": 3, "steps_foreign": 0, "steps_moved": 0, "realised_fraction": 0.5, "chosen_fraction": 0.5, "kendall_tau": 1.0,
        "not_applied": {"no thought tags": 1},
    }  # fmt: skip
    assert {name: stage[name] for name in expected} == expected
    assert stage["histogram"]["counts"] == [0] * 10 + [2] + [0] * 9
    first, second, third, fourth = facts_of_records(tmp_path)
    assert (first["edit_distance"], first["tokens_before"], first["tokens_after"], first["keywords_left"]) == (5, 32, 24, 0.5)
    assert (second["edit_distance"], second["words_before"], second["had_answer"], second["kendall_tau"]) == (2, 8, False, None)
    assert (third["changed"], third["reason"], third["edit_distance"]) == (False, "delete: no thought tags", 0)
    assert fourth["reason"].startswith("not JSON")


def test_order_in_the_report_is_that_counted_by_hand(tmp_path: Path) -> None:
    # Two steps can only be exchanged (one inversion of one pair), three only rotated (two inversions of three pairs).
    three = {"id": "d", "response": "<think>\nSix.\n\nSeven.\n\nEight.\n</think>\n\\boxed{1}"}
    run(tmp_path, [BY_HAND[1], three, BY_HAND[2]], "level=paragraph", kind="shuffle", fraction=1.0)
    facts = report(tmp_path)
    (stage,) = facts["stages"]
    assert (stage["units"], stage["changed"], stage["steps_moved"]) == (5, 5, 5)
    assert stage["kendall_tau"] == pytest.approx((-1 - 1 / 3) / 2, abs=1e-6)
    assert facts["histograms"]["kendall_tau"]["counts"] == [1, 0, 0, 0, 0, 0, 1] + [0] * 13
    assert facts["tokens_after_per_token_before"] == 1.0
    # "but six alternatively seven" to "alternatively seven but six": four edits; a rotation of three words: two.
    assert facts["edit_distance"] == 6


def test_a_step_from_elsewhere_and_a_lost_answer_are_counted(tmp_path: Path) -> None:
    run(tmp_path, BY_HAND[:2], "level=paragraph", "keep=suffix", kind="insert", fraction=0.5)
    (stage,) = report(tmp_path)["stages"]
    assert (stage["steps_before"], stage["steps_after"], stage["steps_foreign"], stage["kendall_tau"]) == (6, 6, 3, 1.0)
    run(tmp_path, BY_HAND, "scope=message", kind="digits", fraction=1.0)
    facts = report(tmp_path)
    assert (facts["had_answer"], facts["answer_kept"], facts["answers_kept"]) == (2, 0, 0.0)
    assert (facts["stages"][0]["units"], facts["stages"][0]["changed"]) == (5, 5)


def test_the_page_runs_no_script_and_asks_no_network(tmp_path: Path) -> None:
    run(tmp_path, [*BY_HAND, {"<script>": 1}], "then=shuffle:0.5", "then=digits", name="<i>")
    page = (tmp_path / "<i>.report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|<iframe|\son\w+=|src=|href=[\"'](?!#)|url\(|@import|<i>", page, re.IGNORECASE)
    assert set(re.findall(r"https?://[^\"'\s<]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert "no answer: found &lt;script&gt;" in page


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kind", "shufle"], '--kind: got "shufle" (did you mean "shuffle"?)'),
        ([], "--kind: is missing; use one of"),
        (["--kind", "delete", "--fraction", "1.5"], "--fraction: got 1.5; use a share between 0 and 1"),
        (["--kind", "delete", "--fraction", "nan"], "--fraction: got nan"),
        (["--kind", "delete", "--mode", "dirty"], '--mode: got "dirty"'),
        (["--kind", "delete", "keeep=ends"], '"keeep": delete takes no such setting (did you mean "keep"?)'),
        (["--kind", "delete", "keep=end"], 'keep: got "end" (did you mean "ends"?)'),
        (["--kind", "shuffle", "scope=thought"], '"scope": shuffle takes no such setting'),
        (["--kind", "shuffle", "block=0"], 'block: got "0"'),
        (["--kind", "delete", "unit"], '"unit": is no setting; write name=value'),
        (["--kind", "delete", "jobs=0"], 'jobs: got "0"'),
        (["--kind", "delete", "then=digits:half"], '"digits:half": the fraction "half" is no number'),
        (["--kind", "delete", "then=digit:0.5"], 'got "digit" (did you mean "digits"?)'),
        (["--kind", "delete", "then=wrong-answer:0.5"], "then: wrong-answer exchanges whole answers, so it comes first"),
    ],
)
def test_a_wrong_argument_gives_one_message(arguments: list[str], said: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    ended = Site(tmp_path).run("perturb", source, str(tmp_path / "out.jsonl"), *arguments)
    assert ended.status == WRONG
    assert said in ended.message
    assert ended.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_input_that_is_not_there_or_is_the_output_too_gives_one_message(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    before = Path(source).read_bytes()
    for arguments, said in [
        ((str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")), "none.jsonl: is no file"),
        ((source, source), "in.jsonl: is the input too"),
        ((source, str(tmp_path / "away" / "out.jsonl")), "out.jsonl: cannot be written"),
    ]:
        ended = Site(tmp_path).run("perturb", *arguments, "--kind", "delete")
        assert ended.status == WRONG
        assert said in ended.message
        assert ended.err.count("\n") == 1
    assert Path(source).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_command_says_what_was_asked_and_what_was_done(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", BY_HAND)
    ended = Site(tmp_path).run(
        "perturb", source, str(tmp_path / "out.jsonl"), "--kind", "delete", "--fraction", "0.5", "level=paragraph", "jobs=1"
    )
    assert ended.status == DONE
    assert "3 records: 2 changed, 1 as they were" in ended.out
    assert "delete: 0.5 asked, 0.5000 done, 3 of 6 units" in ended.out
    assert "1 not applied: no thought tags" in ended.out


def test_a_json_array_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"response": "One 1."}]), encoding="utf-8")
    with pytest.raises(ConfigError, match="jq -c"):
        perturb(str(tmp_path / "data.json"), str(tmp_path / "out.jsonl"), kind="digits")
    assert not (tmp_path / "out.jsonl").exists()
