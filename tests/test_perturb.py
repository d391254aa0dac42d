"""What a perturbation may change in one record and what it may not, on generated thoughts and on real ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.perturb.apply import Plan, Stage, gather_donors, perturb_line
from structcot.perturb.spec import KINDS, MODES, Spec, make_spec
from structcot.perturb.structure import steps_at
from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS, read_answer

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
LEVELS = ("step", "sentence", "paragraph")
FRACTIONS = st.sampled_from([0.01, 0.1, 0.25, 0.33, 0.5, 0.67, 0.9, 1.0])
SEEDS = st.integers(0, 3)
SENTENCES = [
    "The sum is 12 and the rest 305.",
    "Wait, 7 was wrong.",
    "But then x = 2.50!",
    "Let me check: 3 + 4 = 7.",
    "Alternatively, take 40.",
    "So \\boxed{42} it is.",
    "Hmm.",
    "Hmm.",
    "Is 0.05 small?",
    "\\[ a_1 = 10. \\]",
    "设有12个苹果。",
    "等等，不对，应该是7。",
    "让我检查一下：3加4是7。",
    "另一种方法是20！",
    "所以答案是42。",
]
GAPS = ["", " ", "\n", "\n\n", "  ", "\n \n", "\r\n"]
SOLUTIONS = ["The answer is \\boxed{42}, from 40 and 2.", "It is 12 \\fbox{\\frac{17}{25}} or 99.", "答案是42。", "Only 3 words."]
(SKY_OPEN, SKY_CLOSE), (THINK_OPEN, THINK_CLOSE) = THOUGHT_TAGS
# What stands before the thought and after it; the solution goes in between the last two.
FRAMES = [
    (f"{SKY_OPEN}\n\n", f"\n\n{SKY_CLOSE}\n\n{SOLUTION_TAGS[0]}\n", f"\n{SOLUTION_TAGS[1]}"),
    (f"Well, 5. {THINK_OPEN}", f"{THINK_CLOSE}\n\n", " "),
    ("", f"\n{THINK_CLOSE}", ""),  # opened by the prompt
]
TEXTS = st.tuples(
    st.lists(st.tuples(st.sampled_from(SENTENCES), st.sampled_from(GAPS)), min_size=1, max_size=14),
    st.sampled_from(FRAMES),
    st.sampled_from(SOLUTIONS),
).map(lambda parts: parts[1][0] + "".join(map("".join, parts[0])) + parts[1][1] + parts[2] + parts[1][2])
STRUCTURE = st.tuples(
    st.sampled_from(LEVELS), st.sampled_from(["none", "prefix", "suffix", "ends"]), st.integers(1, 3), st.sampled_from(["avoid", "allow"])
)


def line_with(text: str, number: int = 1) -> bytes:
    return json.dumps({"id": f"r{number}", "response": text}).encode()


def contents_of(text: str, level: str) -> list[str]:
    thought = read_answer(text).thought
    return [content for start, end in steps_at(level, thought) if (content := thought[start:end].strip())]


def run(text: str, spec: Spec, *, seed: int = 0, others: Sequence[str] = ()) -> tuple[str, Stage]:
    """The text after one perturbation, and what became of it."""
    lines = [(f"d:{number}", line_with(other, number)) for number, other in enumerate([text, *others], 1)]
    donors = (gather_donors(lines, spec, ""),) if spec.kind == "insert" else ()
    outcome = perturb_line(*lines[0], Plan(specs=(spec,), seed=seed, donors=donors))
    return outcome.record["response"] if outcome.record else text, outcome.stages[0]


def structure_spec(kind: str, fraction: float, shape: tuple[str, str, int, str], *more: str) -> Spec:
    level, keep, block, fixed = shape
    own = [f"fixed_points={fixed}"] if kind == "shuffle" else []
    return make_spec(kind, fraction, "clean", [f"level={level}", f"keep={keep}", f"block={block}", *own, *more])


def assert_reads(thought: str, contents: Sequence[str]) -> None:
    """The thought is these contents in this order, with white space around them and nothing else."""
    position = 0
    for content in contents:
        position = re.compile(r"\s*").match(thought, position).end()  # pyright: ignore[reportOptionalMemberAccess]
        assert thought.startswith(content, position), f"{content!r} does not stand at {position} of {thought!r}"
        position += len(content)
    assert not thought[position:].strip()


def assert_only_thought_differs(before: str, text: str) -> None:
    old, new = read_answer(before), read_answer(text)
    assert text[: new.thought_start] == before[: old.thought_start]
    assert text[new.thought_end :] == before[old.thought_end :]
    assert new.defect == ""


def assert_realised(stage: Stage, fraction: float, *, slack: float = 0.5) -> None:
    assert abs(stage.chosen - fraction * stage.units) <= slack + 1e-9
    assert stage.changed <= stage.chosen


@cache
def real_texts() -> tuple[str, ...]:
    """Thoughts of both files of at most 20,000 characters whose tags are whole."""
    texts = []
    for name in ("paper_outputs.jsonl", "annotated.jsonl"):
        path = DATA / "traces" / name
        if not path.is_file():
            pytest.skip(f"no real traces: {path} is not there")
        with path.open(encoding="utf-8") as file:
            found = [text for text in (json.loads(line)["response"] for line in file) if len(text) < 20_000]
        texts += [text for text in found if not read_answer(text).defect][:10]
    assert len(texts) > 5
    return tuple(texts)


def real_shapes() -> Iterator[tuple[str, float, tuple[str, str, int, str]]]:
    """Real texts with fractions and settings in turn."""
    keeps, fixed = ("none", "prefix", "suffix", "ends"), ("avoid", "allow")
    for number, text in enumerate(real_texts()):
        for level in LEVELS:
            yield text, (0.2, 0.33, 0.67, 1.0, 0.5)[number % 5], (level, keeps[number % 4], 1 + number % 3, fixed[number // 2 % 2])


# Nothing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_of_nothing_changes_no_record(kind: str, mode: str) -> None:
    texts = [FRAMES[0][0] + "Wait, 12.\n\nBut 13 too." + FRAMES[0][1] + SOLUTIONS[0] + FRAMES[0][2], "no tags 12", "<think>12"]
    for text in texts:
        outcome = perturb_line("d:1", line_with(text), Plan(specs=(make_spec(kind, 0.0, mode),), seed=1))
        assert outcome.record is None
        assert outcome.reason == ""
        assert not outcome.is_left_out


# Shuffle


def check_shuffle(text: str, fraction: float, shape: tuple[str, str, int, str], seed: int) -> None:
    level, keep, block, fixed = shape
    contents = contents_of(text, level)
    result, stage = run(text, structure_spec("shuffle", fraction, shape), seed=seed)
    if stage.reason:
        assert result == text
        num_movable = len(contents) - 2 * (keep == "ends")
        assert num_movable <= block, stage.reason
        return
    order = stage.order
    assert order is not None
    assert sorted(order) == list(range(len(contents)))
    assert_only_thought_differs(text, result)
    assert_reads(read_answer(result).thought, [contents[index] for index in order])
    assert Counter(result) == Counter(text)  # white space too
    assert_realised(stage, fraction, slack=1.0)
    if keep == "ends":
        assert (order[0], order[-1]) == (0, len(contents) - 1)
    if fixed == "avoid":
        assert stage.changed == stage.chosen
    if fixed == "avoid" and block == 1:
        assert sum(place != step for place, step in enumerate(order)) == stage.chosen


@settings(max_examples=150)
@given(TEXTS, FRACTIONS, STRUCTURE, SEEDS)
def test_shuffled_steps_are_the_same_steps_in_other_places(text: str, fraction: float, shape: tuple[str, str, int, str], seed: int) -> None:
    check_shuffle(text, fraction, shape, seed)


def test_shuffled_steps_of_real_traces_are_the_same_steps() -> None:
    for text, fraction, shape in real_shapes():
        check_shuffle(text, fraction, shape, 1)


def test_a_block_stays_together_when_it_is_shuffled() -> None:
    text = "<think>" + " ".join(f"word{number} is." for number in range(13)) + "</think>42"
    _, stage = run(text, structure_spec("shuffle", 1.0, ("sentence", "none", 3, "avoid")))
    assert stage.order is not None
    assert stage.units == 5
    blocks = [stage.order[start : start + 3] for start in range(0, 13, 3)]
    joined = {(first, first + 1, first + 2) for first in (0, 3, 6, 9)}
    runs = {stage.order[start : start + 3] for start in range(11)}
    assert joined <= runs
    assert blocks[0] != (0, 1, 2)


def test_a_step_may_keep_its_place_only_where_that_is_allowed() -> None:
    text = "<think>One is. Two is. Three is.</think>42"
    orders = {fixed: [run(text, structure_spec("shuffle", 1.0, ("sentence", "none", 1, fixed)), seed=seed)[1] for seed in range(60)]
              for fixed in ("avoid", "allow")}  # fmt: skip
    assert {stage.order for stage in orders["avoid"]} == {(1, 2, 0), (2, 0, 1)}
    assert len({stage.order for stage in orders["allow"]}) == 6
    assert {stage.changed for stage in orders["allow"]} == {0, 2, 3}


# Delete


def check_delete(text: str, fraction: float, shape: tuple[str, str, int, str], seed: int) -> None:
    level, keep, _, _ = shape
    contents = contents_of(text, level)
    result, stage = run(text, structure_spec("delete", fraction, shape), seed=seed)
    if stage.reason:
        assert result == text
        assert (keep, len(contents) < 3) == ("ends", True), stage.reason
        return
    kept = stage.order
    assert kept is not None
    assert list(kept) == sorted(set(kept))
    assert len(contents) - len(kept) == stage.changed == stage.chosen
    assert_realised(stage, fraction)
    assert_only_thought_differs(text, result)
    assert_reads(read_answer(result).thought, [contents[index] for index in kept])
    first = {"prefix": 0, "suffix": len(contents) - len(kept)}.get(keep)
    if first is not None:
        assert list(kept) == list(range(first, first + len(kept)))
    if keep == "ends":
        assert {0, len(contents) - 1} <= set(kept)


@settings(max_examples=150)
@given(TEXTS, FRACTIONS, STRUCTURE, SEEDS)
def test_steps_that_are_not_deleted_stay_in_order(text: str, fraction: float, shape: tuple[str, str, int, str], seed: int) -> None:
    check_delete(text, fraction, shape, seed)


def test_steps_of_real_traces_that_are_not_deleted_stay_in_order() -> None:
    for text, fraction, shape in real_shapes():
        check_delete(text, fraction, shape, 1)


@settings(max_examples=60)
@given(TEXTS, st.sampled_from(LEVELS))
def test_deleting_all_leaves_the_solution_and_empty_tags_or_no_tags(text: str, level: str) -> None:
    kept, _ = run(text, make_spec("delete", 1.0, "clean", [f"level={level}", "empty_thought=keep"]))
    assert_only_thought_differs(text, kept)
    assert not read_answer(kept).thought.strip()
    dropped, _ = run(text, make_spec("delete", 1.0, "clean", [f"level={level}", "empty_thought=drop"]))
    before = read_answer(text)
    opening = re.sub(r"<[^<]*\Z", "", text[: before.thought_start])
    closing = text[before.thought_end :].split(">", 1)[1].lstrip()
    assert dropped == opening + closing
    assert not any(tag in dropped for pair in THOUGHT_TAGS for tag in pair)


def test_steps_that_are_joined_by_a_deletion_are_not_glued_together() -> None:
    text = "<think>One is.\n\nTwo is. Three is.\n\nFour is.</think>42"
    for seed in range(10):
        result, _ = run(text, make_spec("delete", 0.5, "clean", ["level=sentence"]), seed=seed)
        thought = read_answer(result).thought
        assert len(thought.split()) == 4
        assert ("\n\n" in thought) == (thought != "Two is. Three is.")


@settings(max_examples=80)
@given(TEXTS, FRACTIONS, st.sampled_from(LEVELS), SEEDS)
def test_a_share_of_characters_is_deleted_to_the_nearest_step(text: str, fraction: float, level: str, seed: int) -> None:
    contents = contents_of(text, level)
    _, stage = run(text, make_spec("delete", fraction, "clean", [f"level={level}", "match_length=true"]), seed=seed)
    assert stage.order is not None
    assert stage.units == sum(map(len, contents))
    assert stage.changed == stage.units - sum(len(contents[index]) for index in stage.order)
    assert abs(stage.changed - fraction * stage.units) <= max(map(len, contents)) / 2 + 1e-6


# Insert


def assert_takes_from(thought: str, contents: Sequence[str], order: Sequence[int], foreign: Sequence[str], original: str) -> None:
    """The thought is the contents, one of `foreign` wherever `order` has -1, with the white space of the original in its place."""
    starts, position = [], 0
    for content in contents:
        starts.append(original.index(content, position))
        position = starts[-1] + len(content)
    ends = [start + len(content) for start, content in zip(starts, contents, strict=True)]
    gaps = [original[end:start] for end, start in zip(ends, [*starts[1:], len(original)], strict=True)]
    reached = {starts[0]}
    for step, content, gap in zip(order, contents, gaps, strict=True):
        options = foreign if step == -1 else [content]
        reached = {start + len(one + gap) for start in reached for one in options if thought.startswith(one + gap, start)}
    assert len(thought) in reached


def check_insert(text: str, others: Sequence[str], fraction: float, shape: tuple[str, str, int, str], seed: int) -> None:
    level, keep, _, _ = shape
    contents = contents_of(text, level)
    foreign = sorted({content for other in others for content in contents_of(other, level)})
    result, stage = run(text, structure_spec("insert", fraction, shape), seed=seed, others=others)
    if stage.reason:
        assert result == text
        assert (keep, len(contents) < 3) == ("ends", True), stage.reason
        return
    order = stage.order
    assert order is not None
    assert len(order) == len(contents)
    assert order.count(-1) == stage.chosen
    assert all(step in (-1, place) for place, step in enumerate(order))
    assert_realised(stage, fraction)
    assert_only_thought_differs(text, result)
    assert_takes_from(read_answer(result).thought, contents, order, foreign, read_answer(text).thought)
    if keep == "ends":
        assert (order[0], order[-1]) == (0, len(contents) - 1)


@settings(max_examples=100)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), FRACTIONS, STRUCTURE, SEEDS)
def test_inserted_steps_come_from_other_records_and_keep_the_count(
    text: str, others: list[str], fraction: float, shape: tuple[str, str, int, str], seed: int
) -> None:
    check_insert(text, others, fraction, shape, seed)


def test_inserted_steps_of_real_traces_come_from_other_records() -> None:
    texts = real_texts()
    for text, fraction, shape in list(real_shapes())[::2]:
        check_insert(text, [other for other in texts if other != text][:6], fraction, shape, 1)


def stamped(number: int, num_steps: int = 20, domain: str = "") -> bytes:
    """A record whose sentences name it, of growing lengths."""
    sentences = " ".join(f"r{number} s{step} {'x' * 7 * step}." for step in range(num_steps))
    return json.dumps({"id": number, "domain": domain, "response": f"<think>{sentences}</think>{number}"}).encode()


def stamps_after(spec: Spec, number: int, lines: list[tuple[str, bytes]], seed: int = 0) -> tuple[list[int], list[int], str]:
    """The records from which the sentences of record `number` come now, their lengths, and the reason if nothing was done."""
    plan = Plan(specs=(spec,), seed=seed, donors=(gather_donors(lines, spec, ""),))
    outcome = perturb_line(*lines[number], plan)
    text = outcome.record["response"] if outcome.record else json.loads(lines[number][1])["response"]
    sentences = contents_of(text, "sentence")
    return [int(re.findall(r"^r(\d+)", one)[0]) for one in sentences], [len(one) for one in sentences], outcome.stages[0].reason


def test_a_record_is_never_given_its_own_steps() -> None:
    lines = [(f"d:{number + 1}", stamped(number)) for number in range(3)]
    for seed in range(20):
        owners, _, _ = stamps_after(make_spec("insert", 1.0, "clean", ["level=sentence"]), 1, lines, seed)
        assert len(owners) == 20
        assert set(owners) == {0, 2}
    owners, _, reason = stamps_after(make_spec("insert", 1.0, "clean", ["level=sentence"]), 0, lines[:1])
    assert set(owners) == {0}
    assert reason == "no other record to take steps from (any)"


def test_steps_come_from_the_domain_that_is_asked_for() -> None:
    domains = ["maths", "maths", "physics", "", "physics"]
    lines = [(f"d:{number + 1}", stamped(number, domain=domain)) for number, domain in enumerate(domains)]
    inside = make_spec("insert", 1.0, "clean", ["level=sentence", "donors=in-domain"])
    outside = make_spec("insert", 1.0, "clean", ["level=sentence", "donors=cross-domain"])
    assert set(stamps_after(inside, 0, lines)[0]) == {1}
    assert set(stamps_after(outside, 0, lines)[0]) == {2, 4}
    assert "no domain" in stamps_after(outside, 3, lines)[2]
    assert "in-domain" in stamps_after(inside, 1, lines[1:4])[2]


def test_steps_of_a_matched_length_are_nearer_to_what_they_replace() -> None:
    lines = [(f"d:{number + 1}", stamped(number)) for number in range(6)]
    lengths = [len(one) for one in contents_of(json.loads(lines[0][1])["response"], "sentence")]
    misses = {}
    for match in ("true", "false"):
        spec = make_spec("insert", 1.0, "clean", ["level=sentence", f"match_length={match}"])
        drawn = [stamps_after(spec, 0, lines, seed)[1] for seed in range(5)]
        misses[match] = sum(abs(new - old) for one in drawn for new, old in zip(one, lengths, strict=True))
    assert misses["true"] < misses["false"] / 3


# Digits


def spared_places(text: str) -> set[int]:
    """The places that stand in a box, found by counting braces."""
    places: set[int] = set()
    for box in re.finditer(r"\\(?:boxed|fbox)\{", text):
        depth, place = 1, box.end()
        while depth and place < len(text):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            places.add(place)
            place += 1
    return places


def check_digits(text: str, fraction: float, scope: str, seed: int) -> None:
    result, stage = run(text, make_spec("digits", fraction, "clean", [f"scope={scope}"]), seed=seed)
    answer = read_answer(text)
    boxed = spared_places(text)
    inside = set(range(answer.thought_start, answer.thought_end)) if scope != "solution" else set()
    inside |= set(range(answer.solution_start, answer.solution_end)) if scope != "thought" else set()
    digits = {place for place in inside - boxed if text[place] in "0123456789"}
    is_boxed = scope == "thought" or boxed & set(range(answer.solution_start, answer.solution_end))  # else what it states is spared
    if stage.reason:
        assert result == text
        assert not digits or not is_boxed, stage.reason
        return
    changed = {place for place, (old, new) in enumerate(zip(text, result, strict=True)) if old != new}
    assert all(result[place] in "0123456789" for place in changed)
    assert changed <= digits
    assert len(changed) == stage.changed == stage.chosen
    assert_realised(stage, fraction)
    assert stage.units <= len(digits)
    assert stage.units == len(digits) or not is_boxed
    pairs = zip(re.findall(r"[0-9]+", text), re.findall(r"[0-9]+", result), strict=True)
    assert all(old.startswith("0") or not new.startswith("0") or len(old) == 1 for old, new in pairs)


@settings(max_examples=150)
@given(TEXTS, FRACTIONS, st.sampled_from(["thought", "solution", "both"]), SEEDS)
def test_digits_become_other_digits_and_boxed_answers_are_spared(text: str, fraction: float, scope: str, seed: int) -> None:
    check_digits(text, fraction, scope, seed)


def test_digits_of_real_traces_become_other_digits_and_boxed_answers_are_spared() -> None:
    for number, text in enumerate(real_texts()):
        for scope in ("thought", "solution", "both"):
            check_digits(text, (0.2, 0.7, 1.0)[number % 3], scope, number)


def test_the_answer_that_a_solution_states_without_a_box_is_spared() -> None:
    result, stage = run("<think>12 and 13.</think>From 5 and 6. The answer is 42.", make_spec("digits", 1.0, "clean", ["scope=both"]))
    assert result.endswith(" The answer is 42.")
    assert (stage.units, stage.changed) == (6, 6)
    assert "From 5" not in result


def test_mode_paper_corrupts_the_boxed_answer_too() -> None:
    text = f"{SKY_OPEN}\n\nIt is 305.\n\n{SKY_CLOSE}\n\n{SOLUTION_TAGS[0]}\\boxed{{305}}{SOLUTION_TAGS[1]}"
    for scope in ([], ["scope=message"]):
        result, stage = run(text, make_spec("digits", 1.0, "paper" if not scope else "clean", scope))
        assert stage.changed == stage.units == (6 if scope else 2)
        assert "305" not in result


@settings(max_examples=80)
@given(TEXTS, FRACTIONS, SEEDS)
def test_a_number_that_is_chosen_changes_and_keeps_its_form(text: str, fraction: float, seed: int) -> None:
    result, stage = run(text, make_spec("digits", fraction, "clean", ["unit=number", "scope=thought"]), seed=seed)
    assert re.sub(r"[0-9]", "0", result) == re.sub(r"[0-9]", "0", text)
    pattern = r"\b\d+(?:\.\d+)?\b"
    changed = sum(old != new for old, new in zip(re.findall(pattern, text), re.findall(pattern, result), strict=True))
    assert changed == stage.changed == stage.chosen
    assert_realised(stage, fraction)


@settings(max_examples=80)
@given(TEXTS, FRACTIONS, SEEDS)
def test_a_sentence_that_is_chosen_loses_all_its_digits_and_no_other_one(text: str, fraction: float, seed: int) -> None:
    result, stage = run(text, make_spec("digits", fraction, "clean", ["unit=sentence", "scope=thought"]), seed=seed)
    answer = read_answer(text)
    spared = re.compile(r"\\(?:boxed|fbox)\{[^{}]*\}")
    assert text[: answer.thought_start] == result[: answer.thought_start]
    assert text[answer.thought_end :] == result[answer.thought_end :]
    changed = 0
    for start, end in steps_at("sentence", answer.thought):
        old, new = (spared.sub("", whole[answer.thought_start + start : answer.thought_start + end]) for whole in (text, result))
        same = [a == b for a, b in zip(old, new, strict=True) if a in "0123456789"]
        assert len(set(same)) <= 1
        changed += same[:1] == [False]
    assert changed == stage.changed == stage.chosen
    assert_realised(stage, fraction)


# Keywords


@settings(max_examples=80)
@given(TEXTS, FRACTIONS, SEEDS)
def test_keyword_sentences_go_and_no_other_does(text: str, fraction: float, seed: int) -> None:
    sentences = contents_of(text, "sentence")
    holds = [bool(re.search(r"\b(wait|but|alternatively)\b", sentence, re.IGNORECASE | re.ASCII)) for sentence in sentences]
    result, stage = run(text, make_spec("keywords", fraction), seed=seed)
    if stage.reason:
        assert result == text
        assert not any(holds)
        return
    assert_only_thought_differs(text, result)
    assert stage.units == sum(holds)
    assert_realised(stage, fraction)
    thought = read_answer(result).thought
    assert_reads(
        thought, [one for one, is_held in zip(sentences, holds, strict=True) if not is_held] if fraction == 1.0 else [thought.strip()]
    )


# Nesting


@settings(max_examples=80)
@given(TEXTS, st.sampled_from(["delete", "insert", "shuffle", "digits", "keywords"]), STRUCTURE, FRACTIONS, FRACTIONS, SEEDS)
def test_what_a_fraction_chooses_a_larger_one_chooses_too(
    text: str, kind: str, shape: tuple[str, str, int, str], one: float, other: float, seed: int
) -> None:
    is_structure = kind in ("delete", "insert", "shuffle")
    shape = (*shape[:3], "avoid")
    results, moved = [], []
    for fraction in sorted((one, other)):
        spec = structure_spec(kind, fraction, shape) if is_structure else make_spec(kind, fraction)
        result, stage = run(text, spec, seed=seed, others=[f"<think>{'Zebras graze. ' * 5}</think>7"])
        results.append(result)
        moved.append({place for place, step in enumerate(stage.order or ()) if place != step})
    if kind in ("delete", "keywords"):
        left = iter("".join(results[0].split()))
        assert all(character in left for character in "".join(results[1].split())), "not what is left of the smaller fraction"
    elif kind == "digits":
        changed = [{place for place, pair in enumerate(zip(text, result, strict=True)) if pair[0] != pair[1]} for result in results]
        assert changed[0] <= changed[1]
    elif kind == "insert" or shape[2] == 1:
        assert moved[0] <= moved[1]
