"""The final answer of a text: its last box, else what it states last."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structcot.answers import answer_span, box_spans, final_answer

MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So \\boxed{12}.", "12"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}} and more", "\\{1, 2\\}"),
        ("\\boxed{a\\}b}", "a\\}b"),
        ("\\boxed {12}", "12"),
        ("\\boxed{ 12 }", "12"),
        ("\\fbox{12}", "12"),
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{1} and \\fbox{2}", "2"),
        ("\\boxed{x = \\boxed{3}}", "x = \\boxed{3}"),
        ("\\boxed{1}, cut off: \\boxed{\\frac{1}{2", ""),
        ("\\boxed{}", ""),
        ("\\boxed{5}. The answer is 6.", "5"),
    ],
)
def test_the_answer_is_what_stands_in_the_last_box(text: str, found: str) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the answer is 12.", "12"),
        ("The answer is 12", "12"),
        ("The answer is 0.5.", "0.5"),
        ("The final answer is: 12.\nThank you.", "12"),
        ("**The answer is 12.**", "12"),
        ("**The answer is 12**.", "12"),
        ("**Answer:** 12", "12"),
        ("The answer is $x + 1$.", "x + 1"),
        ("Answer: 12", "12"),
        ("the result is 7.", "7"),
        ("The answer is 1. No, the answer is 2.", "2"),
        ("答案是12。", "12"),
        ("所以答案为 四。", "四"),
        ("答案：四", "四"),
        ("The answer is 1. 答案是二。", "二"),
    ],
)
def test_without_a_box_the_answer_is_the_last_one_stated(text: str, found: str) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize("text", ["", "   \n", "I do not know.", "No answers here.", "boxed{12}", "答案在书里。", "\\boxedsomething"])
def test_a_text_without_an_answer_has_none(text: str) -> None:
    assert answer_span(text) is None
    assert final_answer(text) == ""


def test_the_span_of_a_box_lies_between_its_braces() -> None:
    text = "a \\boxed{1{2}3} b \\fbox{c} \\boxed{d"
    assert [text[start:end] for start, end in box_spans(text)] == ["1{2}3", "c", "d"]


@given(
    st.lists(st.sampled_from(["\\boxed{", "\\fbox{", "{", "}", "\\", "\\}", "1", " ", "\n", "the answer is ", ".", "答案是", "。"])).map(
        "".join
    )
)
def test_spans_lie_in_the_text_one_after_the_other(text: str) -> None:
    position = 0
    for start, end in box_spans(text):
        assert position <= start <= end <= len(text)
        position = end
    span = answer_span(text)
    assert span is None or 0 <= span[0] <= span[1] <= len(text)
    assert final_answer(text) == final_answer(text).strip()


@given(
    st.recursive(
        st.text("12x+\\ ", max_size=5).map(lambda text: text.replace("\\", "\\,")),
        lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    )
)
def test_any_balanced_content_of_a_box_is_found_whole(content: str) -> None:
    assert final_answer(f"before {{ \\boxed{{1}} \\boxed{{{content}}} after }}") == content.strip()


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "sign", ["\\boxed{", "\\boxed{1} ", "\\boxed ", "{", "\\", "The answer is 1. ", "answer: ", "答案是", "答案是一。"]
)
def test_a_megabyte_of_anything_takes_seconds(sign: str) -> None:
    final_answer(sign * (MEGABYTE // len(sign)))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("sign", "end"), [(" ", ""), (" ", "\n"), ("*", "x"), (".", ""), ("1 ", "")])
def test_a_stated_answer_with_a_megabyte_behind_it_takes_seconds(sign: str, end: str) -> None:
    final_answer("The answer is" + sign * (MEGABYTE // len(sign)) + end)
