"""What is counted on one trace, on two segmentations of it, and on a whole data set."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.errors import ConfigError
from structcot.structure.agreement import agreement, boundaries, window_diff
from structcot.structure.keywords import count_keywords, keyword_families, keyword_pattern
from structcot.structure.markers import STEP_TYPES
from structcot.structure.metrics import (
    count_branches,
    failed_steps,
    find_dangling,
    has_answer,
    measure,
    repetition,
    split_words,
    starts_with_reflection,
)
from structcot.structure.segmenters import SEGMENTERS, Step, by_blank_line, by_marker, by_sentence
from structcot.structure.summary import COUNT_EDGES, SHARE_EDGES, Distribution, Summary
from structcot.tags import read_answer

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
START, DEDUCE, VERIFY, BACK, DOUBT, NEW, END = STEP_TYPES
FILLER = " ".join(f"word{number}" for number in range(3000))
ENGLISH = """<think>
The sum of two numbers is 7 and one is 3, so the other is 4.

Wait, maybe I misread it. The product was meant.

Let me check: 3 + 4 = 7.

So the final answer is 4.
</think>
The other is \\boxed{4}."""
CHINESE = (
    "<think>\n两数之和是七，一个是三。\n\n等等，不对，重新考虑。\n\n让我检查一下：三加四是七。\n\n最终答案是四。\n</think>\n答案是四。"
)
PIECES = [
    "Wait, no. ",
    "But then x = 2. ",
    "Let me check. ",
    "等等，不对。",
    "情况二：",
    "Case 2: ",
    "x\n\n",
    "so y. ",
    "\\boxed{3}",
    "</think>",
    " ",
    "İ",
]
thoughts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def measured(text: str, segmenter: str = "marker") -> dict[str, Any]:
    answer = read_answer(text)
    return measure(answer, SEGMENTERS[segmenter](answer.thought))


def real(name: str) -> Iterator[dict[str, Any]]:
    path = DATA / "traces" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"the real traces are not here: {name}.jsonl")
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def test_a_word_counts_only_where_it_stands_alone() -> None:
    counts = count_keywords("Ohio, button, checkout, anybody, début and unchecked hold none. But OH, wait: check it. wait等等")
    assert {word: count for word, count in counts["nowait"].items() if count} == {"wait": 2, "but": 1, "check": 1, "oh": 1}
    assert counts["paper"] == {"wait": 2, "let me think again": 0, "but": 1, "alternatively": 0}
    assert counts["chinese"]["等等"] == 1


def test_words_of_several_words_and_with_hyphens_count_once() -> None:
    counts = count_keywords("Let me\nthink  again. I double-check.")
    assert counts["paper"]["let me think again"] == 1
    assert counts["nowait"]["again"] == 1
    assert (counts["nowait"]["double-check"], counts["nowait"]["check"]) == (1, 0)


def test_a_chinese_word_inside_a_longer_one_of_another_sense_does_not_count() -> None:
    assert count_keywords("图形不对称，与此不对应。对不对？")["chinese"]["不对"] == 0
    assert count_keywords("等等，不对。")["chinese"]["不对"] == 1


def test_every_family_names_its_source_and_an_unknown_one_is_refused() -> None:
    families = keyword_families()
    assert list(families) == ["paper", "nowait", "chinese"]
    assert all(family.source for family in families.values())
    assert "arXiv 2502.07374" in families["paper"].source
    with pytest.raises(ConfigError, match='none called "nowhere"; choose one of paper'):
        keyword_pattern("nowhere")


@given(
    st.lists(st.sampled_from(["let me think again", "wait", "Double-check", "but", "Ohio", "不对", "对不对", "等等", "é", " ", "-", ". "]))
)
def test_one_pass_counts_what_the_pattern_of_each_family_finds(words: list[str]) -> None:
    text = "".join(words)
    for family, counts in count_keywords(text).items():
        assert sum(counts.values()) == len(keyword_pattern(family).findall(text))


def test_an_english_trace_is_measured() -> None:
    metrics = measured(ENGLISH)
    assert list(metrics["step_types"]) == list(STEP_TYPES)
    assert metrics["steps"] == sum(metrics["step_types"].values())
    assert metrics["step_types"][VERIFY] == metrics["step_types"][END] == metrics["step_types"][START] == 1
    assert metrics["words"] == len(read_answer(ENGLISH).thought.split())
    assert metrics["verification_density"] == pytest.approx(1000 / metrics["words"])
    assert metrics["keywords"] == {"paper": 1, "nowait": 4, "chinese": 0}
    assert metrics["paper_keywords"]["wait"] == 1
    assert metrics["is_finished"]
    assert metrics["has_answer"]
    assert not metrics["first_step_is_reflection"]
    assert metrics["dangling_references"] == {"count": 0, "first": []}
    assert metrics["tags"] == ""


def test_a_chinese_trace_is_measured() -> None:
    metrics = measured(CHINESE, "blank-line")
    assert metrics["step_types"] == dict.fromkeys(STEP_TYPES, 0) | {START: 1, BACK: 1, VERIFY: 1, END: 1}
    assert metrics["transitions"] == {f"{BACK}>{VERIFY}": 1, f"{START}>{BACK}": 1, f"{VERIFY}>{END}": 1}
    assert metrics["words"] > 30
    assert metrics["keywords"]["chinese"] == 4  # 等等, 不对, 重新, 检查
    assert metrics["is_finished"]
    assert metrics["has_answer"]


def test_words_of_unspaced_script_are_characters() -> None:
    assert split_words("让x=2 成立 ok") == ["让", "x=2", "成", "立", "ok"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Case 1: x > 0. Case 2: x < 0. In case 2 we see more.", []),
        ("Case 2: x < 0. Case 3: x = 0. Case 2 again.", ["Case 2"]),
        ("Cases 1 and 2 are easy. Case 3 is not. Case 5 is odd.", ["Case 5"]),
        ("Approach B is next. In case a and case I see it, no.", ["Approach B"]),
        ("Option C is the answer offered. Option 3 is mine.", ["Option 3"]),
        ("Method III fails, a staircase 2 m high.", ["Method III"]),
        ("Step 4 comes now. See step 2.5 and step 2x.", ["Step 4"]),
        ("情况一样。方法一行，方法二不行。情况三：", ["情况三"]),
        ("From equation (3), f(3) = 2.", ["equation (3)"]),
        ("x = 1 \\tag{3} From equation (3) it follows.", []),
        ("x = 1 (3)\nFrom equation (3) it follows.", []),
        ("Call this equation (3). From equation (3) it follows.", []),
        ("f(3) = 2. From equations (3) and (4) it follows.", ["equation (3)", "equation (4)"]),
        ("Going back to equation (3): it says x = 1.", []),
        ("由方程（2）得", ["equation (2)"]),
    ],
)
def test_a_reference_to_what_is_not_there_dangles(text: str, found: list[str]) -> None:
    assert find_dangling(text, []) == found


def test_a_thought_that_points_back_at_its_start_dangles_and_later_does_not() -> None:
    assert find_dangling("As I mentioned earlier, x = 2. " + FILLER, []) == ["As I mentioned earlier"]
    assert find_dangling("如上所述，" + FILLER, []) == ["如上"]
    assert find_dangling(FILLER + " as I mentioned earlier", []) == []
    assert find_dangling("A train left 2 hours earlier. " + FILLER, []) == []


def test_a_thought_that_begins_with_a_turn_dangles() -> None:
    metrics = measured("<think>Wait, that's wrong. So x = 2.</think>2")
    assert metrics["first_step_is_reflection"]
    assert metrics["dangling_references"]["count"] == 1
    assert metrics["dangling_references"]["first"][0] in (BACK, DOUBT)


def test_the_first_sentence_alone_says_whether_a_thought_begins_with_a_turn() -> None:
    text = "The sum is 7. Wait, no."
    assert not starts_with_reflection(text, [Step(0, len(text), DEDUCE)])
    assert starts_with_reflection("Let me verify that. The sum is 7.", [Step(0, 33, DEDUCE)])
    assert not starts_with_reflection("", [])


def test_only_twenty_words_said_before_make_a_loop() -> None:
    phrase = [f"w{number}" for number in range(20)]
    assert repetition(phrase[:19]) == (0.0, False)
    assert repetition(phrase) == (0.0, False)
    # 21 n-grams, of which the last says the first again.
    assert repetition(phrase * 2) == (pytest.approx(1 / 21), False)
    rate, is_looping = repetition(phrase * 10)
    assert rate == pytest.approx(161 / 181)
    assert is_looping
    assert repetition(list(reversed(phrase)) + phrase) == (0.0, False)


def test_a_loop_counts_only_at_the_end() -> None:
    fresh = [f"new{number}" for number in range(600)]
    loop = ["so", "x", "is", "two"] * 100
    assert repetition(loop + fresh)[1] is False
    assert repetition(fresh + loop)[1] is True
    # Of the last 200 n-grams of 600, those repeat that lie in the 100 or 140 words at the end.
    said = fresh[:140]
    assert repetition(fresh[: 619 - 100] + said[:100])[1] is False
    assert repetition(fresh[: 619 - 140] + said)[1] is True


@given(st.lists(st.integers(0, 7), max_size=16))
@settings(max_examples=200)
def test_the_loop_rate_is_that_of_comparing_all_pairs(blocks: list[int]) -> None:
    words = [f"{block}.{number}" for block in blocks for number in range(7 + block)]
    ngrams = [tuple(words[place : place + 20]) for place in range(len(words) - 19)]
    repeated = sum(ngram in ngrams[:place] for place, ngram in enumerate(ngrams))
    last = len(ngrams) - max(1, len(ngrams) // 3)
    at_end = sum(ngrams[place] in ngrams[:place] for place in range(max(0, last), len(ngrams)))
    rate, is_looping = repetition(words)
    assert rate == pytest.approx(repeated / len(ngrams) if ngrams else 0)
    assert is_looping == (bool(ngrams) and at_end / (len(ngrams) - last) > 0.5)


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        ("<think>x</think>It is \\boxed{\\frac{1}{2}}.", True),
        ("<think>x</think>It is \\boxed{}.", False),
        ("<think>x</think>First \\boxed{1}, last \\boxed{2", False),
        ("<think>x</think>The answer is 4.", True),
        ("<think>x</think>**Answer:** 4", True),
        ("<think>x</think>The answer is", False),
        ("<think>x</think>答案是四", True),
        ("<think>\\boxed{4}", False),
        ("<think>\\boxed{4}</think>", False),
        ("No tags, \\boxed{4}.", True),
    ],
)
def test_an_answer_is_a_whole_box_or_a_sentence_of_the_solution(text: str, is_there: bool) -> None:
    assert has_answer(read_answer(text)) == is_there


@pytest.mark.parametrize(
    ("text", "is_finished"), [("<think>x</think>y", True), ("<think>x</think> \n", False), ("<think>x", False), ("x", False)]
)
def test_a_trace_is_finished_where_something_follows_its_closed_thought(text: str, is_finished: bool) -> None:
    assert measured(text)["is_finished"] == is_finished


@pytest.mark.parametrize(
    ("types", "failed"),
    [
        ([], []),
        ([START, DEDUCE, BACK, DEDUCE], [1]),
        ([DEDUCE, DOUBT, DEDUCE, BACK, DEDUCE, END], [0, 1, 2]),
        ([DEDUCE, VERIFY, BACK, DEDUCE], []),
        ([DEDUCE, VERIFY, DEDUCE, BACK], [2]),
        ([DEDUCE, NEW, DEDUCE, BACK, DEDUCE, BACK, VERIFY], [1, 2, 3, 4]),
        ([START, BACK, BACK], [1]),
    ],
)
def test_steps_fail_where_backtracking_ends_their_branch(types: list[str], failed: list[int]) -> None:
    assert failed_steps(types) == failed


@pytest.mark.parametrize(
    ("types", "branches", "depth"),
    [
        ([], 0, 0),
        ([START, DEDUCE, END], 1, 1),
        ([START, NEW, DEDUCE, NEW], 3, 1),
        ([START, DOUBT, DOUBT, DEDUCE, NEW, DOUBT], 4, 3),
        ([BACK, VERIFY, BACK, DOUBT], 2, 2),
        ([DOUBT, DEDUCE, DOUBT, VERIFY, DOUBT, END, DOUBT], 5, 3),
    ],
)
def test_doubts_nest_and_approaches_stand_side_by_side(types: list[str], branches: int, depth: int) -> None:
    assert count_branches(types) == (branches, depth)


def test_the_failed_share_is_told_in_steps_and_characters() -> None:
    answer = read_answer("<think>aaaabb</think>c")
    metrics = measure(answer, [Step(0, 3, DEDUCE), Step(3, 4, BACK), Step(4, 6, END)])
    assert metrics["failed_step_share"] == pytest.approx(1 / 3)
    assert metrics["failed_character_share"] == pytest.approx(1 / 2)
    assert metrics["backtrack_density"] == 1000


def test_an_empty_thought_has_nothing_to_count() -> None:
    metrics = measured("<think></think>4")
    assert metrics["steps"] == metrics["words"] == metrics["branches"] == 0
    assert metrics["transitions"] == {}
    assert metrics["backtrack_density"] == metrics["loop_rate"] == metrics["failed_step_share"] == 0.0
    assert metrics["is_finished"]
    assert list(metrics) == list(measured(ENGLISH))


@given(thoughts, st.sampled_from(sorted(SEGMENTERS)))
@settings(max_examples=150)
def test_counts_add_up_and_shares_are_shares(text: str, segmenter: str) -> None:
    metrics = measured(text, segmenter)
    assert sum(metrics["step_types"].values()) == metrics["steps"]
    assert sum(metrics["transitions"].values()) == max(0, metrics["steps"] - 1)
    for name in ("loop_rate", "failed_step_share", "failed_character_share"):
        assert 0 <= metrics[name] <= 1
    assert metrics["branching_depth"] <= metrics["branches"]
    assert (metrics["branches"] > 0) == (metrics["steps"] > 0)
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["tags"] == read_answer(text).defect


def test_boundaries_that_differ_by_white_space_are_the_same() -> None:
    text = "  One.  Two.\n\nThree. "
    a = [Step(0, 8, DEDUCE), Step(8, 12, DEDUCE), Step(12, 21, DEDUCE)]
    b = [Step(0, 2, DEDUCE), Step(2, 6, DEDUCE), Step(6, 14, DEDUCE), Step(14, 20, DEDUCE), Step(20, 21, DEDUCE)]
    assert boundaries(text, a) == boundaries(text, b) == [8, 14]
    facts = agreement(text, a, b)
    assert (facts.precision, facts.recall, facts.f1, facts.window_diff) == (1, 1, 1, 0)


def test_precision_and_recall_count_shared_boundaries() -> None:
    text = "abcdefghij"
    a = [Step(0, 2, DEDUCE), Step(2, 5, DEDUCE), Step(5, 10, DEDUCE)]
    b = [Step(0, 5, DEDUCE), Step(5, 6, DEDUCE), Step(6, 8, DEDUCE), Step(8, 10, DEDUCE)]
    facts = agreement(text, a, b)
    assert (facts.boundaries_a, facts.boundaries_b, facts.shared) == (2, 3, 1)
    assert (facts.precision, facts.recall) == (1 / 2, pytest.approx(1 / 3))
    assert facts.f1 == pytest.approx(0.4)


def test_one_step_against_many_shares_nothing() -> None:
    whole, parts = [Step(0, 4, DEDUCE)], [Step(0, 2, DEDUCE), Step(2, 4, DEDUCE)]
    facts = agreement("abcd", whole, parts)
    assert (facts.precision, facts.recall, facts.f1) == (1, 0, 0)
    assert agreement("abcd", whole, whole).f1 == 1
    assert agreement("", [], []).window_diff == 0


def test_window_diff_is_that_of_its_formula_and_forgives_a_near_miss() -> None:
    # Two steps of 10: windows of 5. A cut that is off by 1 is seen by the 2 windows between, one that is missing by 5 of 15.
    assert window_diff([11], [10], 20) == pytest.approx(2 / 15)
    assert window_diff([], [10], 20) == pytest.approx(5 / 15)
    assert window_diff([10], [10], 20) == 0


@given(thoughts)
def test_agreement_is_mirrored_where_the_sides_change_and_whole_with_itself(text: str) -> None:
    a, b = by_sentence(text), by_blank_line(text)
    there, back = agreement(text, a, b), agreement(text, b, a)
    assert (there.precision, there.recall, there.f1) == (back.recall, back.precision, back.f1)
    assert 0 <= there.window_diff <= 1
    assert agreement(text, a, a).f1 == 1
    assert agreement(text, a, a).window_diff == 0


def summed(rows: list[dict[str, Any]]) -> Summary:
    summary = Summary()
    for row in rows:
        summary.add(row)
    return summary


def test_a_summary_of_nothing_is_all_zero() -> None:
    facts = Summary().facts()
    assert facts["traces"] == 0
    assert set(facts["shares"].values()) == {0.0}
    assert facts["distributions"]["steps"]["mean"] == 0


def test_a_summary_adds_up_what_was_measured() -> None:
    rows = [measured(ENGLISH), measured(CHINESE), measured("<think>Wait, Case 2"), measured("no tags")]
    for row, f1 in zip(rows, (0.5, 1.0), strict=False):
        row["agreement"] = {"marker|sentence": {"f1": f1, "boundaries_a": 3}}
    facts = summed(rows).facts()
    assert facts["traces"] == 4
    assert facts["shares"] == {
        "finished": 0.5,
        "answer": 0.5,
        "looping": 0.0,
        "first_step_is_reflection": 0.25,
        "dangling_references": 0.25,
    }
    assert facts["defects"] == {"no thought tags": 1, "the thought is never closed": 1}
    assert facts["totals"]["words"] == sum(row["words"] for row in rows)
    assert sum(facts["step_types"].values()) == facts["totals"]["steps"]
    assert sum(facts["transition_counts"].values()) == facts["totals"]["steps"] - 4
    assert facts["agreement"] == {"marker|sentence": {"traces": 2, "boundaries_a": 3.0, "f1": 0.75}}
    assert facts["keywords"]["paper"]["per_1000_words"] == pytest.approx(1000 * 2 / facts["totals"]["words"])
    for row in facts["transitions"].values():
        assert sum(row.values()) == pytest.approx(1)
        assert list(row) == list(STEP_TYPES)


@given(st.lists(st.tuples(thoughts, st.integers(0, 2)), max_size=12), st.randoms())
@settings(max_examples=40)
def test_merged_summaries_say_what_one_summary_says(texts: list[tuple[str, int]], random: Any) -> None:
    rows = [(measured(text), part) for text, part in texts]
    whole = summed([row for row, _ in rows])
    parts = [summed([row for row, part in rows if part == number]) for number in range(3)]
    random.shuffle(parts)
    merged = Summary()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert json.dumps(merged.facts()) == json.dumps(whole.facts())


def test_quantiles_are_exact_for_small_numbers_and_near_for_large_ones() -> None:
    small, large = Distribution(COUNT_EDGES), Distribution(COUNT_EDGES)
    for value in range(1, 52):
        small.add(value)
        large.add(1000 * value)
    assert small.quantile(0.5) == 26
    assert small.facts()["mean"] == 26
    assert large.quantile(0.5) == pytest.approx(26_000, rel=0.023)
    assert (large.quantile(0), large.quantile(1)) == (pytest.approx(1000, rel=0.023), 51_000)


def test_the_histogram_of_the_facts_holds_every_value_once() -> None:
    shares = Distribution(SHARE_EDGES)
    for value in (0.0, 0.299, 0.3, 0.55, 1.0):
        shares.add(value)
    histogram = shares.facts()["histogram"]
    assert histogram["counts"] == [1, 0, 1, 1, 0, 1, 0, 0, 0, 1]
    assert len(histogram["edges"]) == 11
    middle = Distribution(SHARE_EDGES)
    middle.add(0.55)
    assert middle.facts()["histogram"] == {"edges": [0.5, 0.6], "counts": [1]}


def test_a_summary_of_many_traces_stays_small() -> None:
    summary, row = Summary(), measured(ENGLISH)
    for number in range(5000):
        summary.add(row | {"characters": number * 37, "words": number, "backtrack_density": number / 7})
    assert len(pickle.dumps(summary)) < 120_000


def test_traces_of_the_paper_without_a_closed_thought_are_not_finished_and_many_loop() -> None:
    open_ones, closed = [], []
    keywords = 0
    for record in real("paper_outputs"):
        answer = read_answer(record["response"])
        metrics = measure(answer, by_marker(answer.thought))
        (closed if answer.is_closed else open_ones).append(metrics)
        keywords += metrics["paper_keywords"]["wait"]
    assert len(open_ones) > 80
    assert not any(metrics["is_finished"] for metrics in open_ones)
    assert sum(metrics["is_looping"] for metrics in open_ones) > 0.5 * len(open_ones)
    assert not any(metrics["is_looping"] for metrics in closed)
    assert all(metrics["is_finished"] for metrics in closed)
    assert keywords > 2000


@pytest.mark.parametrize("name", ["paper_outputs", "r1_distill", "annotated"])
def test_real_thoughts_neither_begin_with_a_turn_nor_often_dangle(name: str) -> None:
    rows = [measured(record.get("response") or record["solution"]) for record in real(name)]
    facts = summed(rows).facts()
    assert facts["shares"]["first_step_is_reflection"] < 0.02
    assert facts["shares"]["dangling_references"] < 0.03
    assert facts["totals"]["steps"] > 10 * facts["traces"]


def test_the_time_grows_with_the_length_alone() -> None:
    for passage in ("Wait, Case 2 (3). ", "answer is ", "\\boxed{", "等等", "equations (1), "):
        text = "<think>" + passage * (500_000 // len(passage)) + "</think>" + passage * 1000
        answer = read_answer(text)
        start = time.perf_counter()
        measure(answer, [Step(0, len(answer.thought), DEDUCE)])
        assert time.perf_counter() - start < 5  # a tenth of that on one idle core
