"""`--mode paper` does what the code of the paper does, each point of it under a test of its own.

That code: branch `corrupt` of NovaSky-AI/SkyThought, `corrupt_data.py`, `tag_output.py`, `produce_conversations.py`. What it does not fix
(how steps are cut, deleted, inserted and shuffled was never published) follows the text of the paper, arXiv 2502.07374, section 4.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from structcot.errors import DataError
from structcot.perturb.apply import Plan, gather_donors, perturb_line
from structcot.perturb.command import perturb
from structcot.perturb.spec import make_spec, spec_text
from tests.faulty_server import FaultyServer, refuses, says

THOUGHT = (
    "I need 12 of 3.14 and 7. So 3 plus 9 is 12.\n\nWait, 3 plus 8 is 11. But x2 and 2nd do not count.\n\n"
    "Alternatively, take 40 and 28. It is 12."
)
SOLUTION = "\n\nThe answer is \\boxed{12}, from 40 and 28.\n\n"
TAGS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>")


def tagged(thought: str, solution: str = SOLUTION) -> str:
    return f"{TAGS[0]}\n\n{thought}\n\n{TAGS[1]}\n\n{TAGS[2]}{solution}{TAGS[3]}"


def record(text: str, number: int = 0, question: str = "Which?") -> dict[str, Any]:
    return {"id": f"r{number}", "conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": text}]}


def perturbed(text: str, kind: str, fraction: float, *settings: str, seed: int = 0, number: int = 0, mode: str = "paper") -> str:
    spec = make_spec(kind, fraction, mode, settings)
    lines = [("donors:1", json.dumps(record(tagged("Wait, the sum of angles is 90.\n\nBut why?"), 99)).encode())]
    donors = (gather_donors(lines, spec, ""),) if kind == "insert" else ()
    outcome = perturb_line(f"data:{number + 1}", json.dumps(record(text, number)).encode(), Plan(specs=(spec,), seed=seed, donors=donors))
    return text if outcome.record is None else outcome.record["conversations"][1]["value"]


def numbers(text: str) -> list[str]:
    return re.findall(r"\b\d+(?:\.\d+)?\b", text)


# Corrupted digits


def test_digits_a_number_and_not_a_digit_is_replaced_and_a_decimal_becomes_one_integer() -> None:
    text = "pi is 3.14 and 1234567."
    drawn = [perturbed(text, "digits", 1.0, seed=seed) for seed in range(50)]
    for one in drawn:
        assert re.fullmatch(r"pi is (\d|10) and (\d|10)\.", one), one


def test_digits_are_drawn_from_the_eleven_integers_0_to_10() -> None:
    drawn = Counter(numbers(perturbed("It is 77.", "digits", 1.0, seed=seed))[0] for seed in range(1100))
    assert set(drawn) == {str(value) for value in range(11)}
    assert max(drawn.values()) < 2 * min(drawn.values())


def test_digits_that_touch_a_letter_or_an_underscore_are_not_matched() -> None:
    text = "x2 2nd a_3 3_b 共3个 4"
    assert all(perturbed(text, "digits", 1.0, seed=seed)[:-2].strip() == text[:-2].strip() for seed in range(20))


def test_digits_the_solution_and_the_boxed_answer_are_corrupted_too() -> None:
    answers = {re.search(r"\\boxed\{(\d+)\}", perturbed(tagged(THOUGHT), "digits", 1.0, seed=seed))[1] for seed in range(60)}  # type: ignore[index]
    assert "12" not in answers
    assert len(answers) == 11


def test_digits_each_number_is_replaced_with_the_probability_asked_for_and_not_an_exact_share() -> None:
    text = " ".join(["777"] * 40)
    counts = [40 - perturbed(text, "digits", 0.5, seed=seed).split().count("777") for seed in range(200)]
    assert 18.5 < sum(counts) / len(counts) < 21.5
    assert len(set(counts)) > 5


def test_digits_are_corrupted_in_an_answer_without_tags() -> None:
    assert numbers(perturbed("Just 777 and 888.", "digits", 1.0)) != ["777", "888"]


# Removed keywords


def test_keywords_the_fraction_is_a_share_of_the_samples_each_rewritten_as_a_whole_or_not_at_all() -> None:
    text = tagged(THOUGHT)
    results = Counter(perturbed(text, "keywords", 0.5, number=number) for number in range(200))
    assert len(results) == 2
    assert 70 < results[text] < 130


def test_keywords_whole_passages_go_with_what_they_reflect_on_and_not_just_the_keywords() -> None:
    changed = perturbed(tagged(THOUGHT), "keywords", 1.0)
    assert "Wait" not in changed
    assert "So 3 plus 9 is 12." not in changed, "what is reflected on stayed"
    assert "I need 12 of 3.14 and 7." in changed


def test_keywords_the_four_tags_stay() -> None:
    changed = perturbed(tagged(THOUGHT), "keywords", 1.0)
    assert tuple(re.findall(r"<\|\w+\|>", changed)) == TAGS


def test_keywords_a_model_rewrites_the_whole_answer_where_a_server_is_named() -> None:
    with FaultyServer(says("All of it, rewritten.")) as server:
        assert perturbed(tagged(THOUGHT), "keywords", 1.0, f"url={server.url}", "model=m", "key=") == "All of it, rewritten."
        assert tagged(THOUGHT) in server.requests[0]["messages"][-1]["content"]
        assert (server.requests[0]["temperature"], server.requests[0]["max_tokens"]) == (0.7, 16384)


def test_keywords_an_error_of_the_server_becomes_training_text_and_does_not_in_clean_mode() -> None:
    text = tagged(THOUGHT)
    with FaultyServer(refuses(400)) as server:
        url = f"url={server.url}"
        assert perturbed(text, "keywords", 1.0, url, "model=m", "key=").startswith("Error processing content: ")
        assert perturbed(text, "keywords", 1.0, url, "model=m", "key=", "unit=passage", mode="clean") == text


# Deleted, inserted, shuffled


STEPS = "First, add. It is 5.\n\nWait, that is off.\n\nAlternatively, subtract. It is 1.\n\nLet me check that.\n\nTherefore it holds."


def test_steps_begin_where_a_linear_thought_breaks() -> None:
    spec = make_spec("delete", 0.5, "paper")
    line = json.dumps(record(tagged(STEPS))).encode()
    outcome = perturb_line("data:1", line, Plan(specs=(spec,), seed=0))
    assert outcome.stages[0].units == 5


def test_deleted_at_100_percent_leaves_the_solution_block_alone() -> None:
    assert perturbed(tagged(STEPS), "delete", 1.0) == f"{TAGS[2]}{SOLUTION}{TAGS[3]}"


def test_inserted_replaces_steps_by_steps_of_other_samples_and_keeps_their_number() -> None:
    changed = perturbed(tagged(STEPS), "insert", 1.0)
    thought = changed[changed.index(TAGS[0]) + len(TAGS[0]) : changed.index(TAGS[1])].strip().split("\n\n")
    assert set(thought) == {"Wait, the sum of angles is 90.", "But why?"}
    assert len(thought) == 5


def test_shuffled_does_not_force_every_step_to_move() -> None:
    assert any(perturbed(tagged(STEPS), "shuffle", 1.0, seed=seed) == tagged(STEPS) for seed in range(600))


@pytest.mark.parametrize("kind", ["delete", "insert", "shuffle"])
def test_the_solution_block_stays_byte_for_byte(kind: str) -> None:
    assert perturbed(tagged(STEPS), kind, 0.7).endswith(f"{TAGS[2]}{SOLUTION}{TAGS[3]}")


# Wrong answers


def wrong_answers(tmp_path: Path, records: Sequence[dict[str, Any]], fraction: float = 1.0) -> list[dict[str, Any]]:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    perturb(str(source), str(to), kind="wrong-answer", fraction=fraction, mode="paper")
    return [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]


def judged(number: int, correct: bool | None, text: str = "") -> dict[str, Any]:
    one = record(text or tagged("So.", "\\boxed{1}"), number, f"Problem {number}?")
    return one if correct is None else {**one, "correct": correct}


def test_wrong_answers_only_the_wrong_records_are_kept_whatever_their_problems(tmp_path: Path) -> None:
    kept = wrong_answers(tmp_path, [judged(0, True), judged(1, False), judged(2, True), judged(3, False)])
    assert [one["id"] for one in kept] == ["r1", "r3"]


def test_wrong_answers_a_number_of_them_is_sampled(tmp_path: Path) -> None:
    assert len(wrong_answers(tmp_path, [judged(number, False) for number in range(10)], 0.3)) == 3


def test_wrong_answers_records_that_were_not_judged_are_not_selected(tmp_path: Path) -> None:
    assert [one["id"] for one in wrong_answers(tmp_path, [judged(0, None), judged(1, False)])] == ["r1"]


def test_wrong_answers_what_the_one_grader_cannot_read_counts_as_wrong(tmp_path: Path) -> None:
    truncated = {**record(f"{TAGS[0]} I was cut off", 0), "gold": "12"}
    right_in_other_words = {**record(tagged("So.", "\\boxed{\\frac12}"), 1), "gold": "0.5"}
    right = {**record(tagged("So.", "\\boxed{0.5}"), 2), "gold": "0.5"}
    assert [one["id"] for one in wrong_answers(tmp_path, [truncated, right_in_other_words, right])] == ["r0", "r1"]


def test_wrong_answers_the_prompt_gets_doubled_braces(tmp_path: Path) -> None:
    (kept,) = wrong_answers(tmp_path, [judged(1, False)])
    assert kept["conversations"][0]["value"] == "Return your final response within \\boxed{{}}. Problem 1?"


def test_wrong_answers_a_sample_of_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is none"):
        wrong_answers(tmp_path, [judged(1, False)], 0.1)


# Each deviation by its name


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("digits", "unit=number"),
        ("digits", "replacement=zero-to-ten"),
        ("digits", "scope=message"),
        ("digits", "choice=coin"),
        ("keywords", "unit=passage"),
        ("keywords", "failures=as-text"),
        ("delete", "empty_thought=drop"),
        ("shuffle", "fixed_points=allow"),
        ("wrong-answer", "select=wrong-only"),
        ("wrong-answer", "graders=one"),
    ],
)
def test_each_deviation_of_the_code_is_one_setting_that_can_be_switched_alone(kind: str, setting: str) -> None:
    paper, clean = spec_text(make_spec(kind, 0.5, "paper")), spec_text(make_spec(kind, 0.5, "clean"))
    assert setting in paper.split(",")
    assert setting not in clean.split(",")
    assert spec_text(make_spec(kind, 0.5, "clean", [setting])) == clean.replace(
        next(one for one in clean.split(",") if one.startswith(setting.split("=")[0] + "=")), setting
    )
