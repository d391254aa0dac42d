"""The grader of mathematics: real and adversarial pairs, families of notations, what never is equal, and where an answer is found."""

from __future__ import annotations

import json
import re
import threading
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("math_verify", reason="math-verify is not installed: pip install structcot[eval]")

from structcot.grading.case import Case, Grade
from structcot.grading.math import grade_math

ROOT = Path(__file__).parent.parent
PAIRS = ROOT.parent / "shared" / "data" / "grading" / "answer_pairs.jsonl"
SCORES = ROOT.parent / "shared" / "data" / "grading" / "paper_scores.jsonl"
DOCS = ROOT / "docs" / "grading.md"

quick = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])


def verdict(gold: str, pred: str, **fields: Any) -> Grade:
    return grade_math(Case(gold=gold, pred=pred, **fields))


def equal(gold: str, pred: str, **fields: Any) -> bool:
    return verdict(gold, pred, **fields).correct


@cache
def pairs() -> list[dict[str, Any]]:
    if not PAIRS.is_file():
        pytest.skip(f"{PAIRS.name} is not there: adversarial pairs of answers are not part of the project")
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


@cache
def disagreeing() -> list[dict[str, Any]]:
    return [row for row in pairs() if equal(row["gold"], row["pred"]) is not row["should_match"]]


# Pairs from the test suites of other graders


def test_of_the_adversarial_pairs_95_percent_are_judged_as_they_should_be() -> None:
    assert len(disagreeing()) <= 0.05 * len(pairs())


def test_of_the_pairs_that_differ_not_one_percent_are_called_equal() -> None:
    different = [row for row in pairs() if not row["should_match"]]
    called_equal = [row["id"] for row in disagreeing() if not row["should_match"]]
    assert len(called_equal) <= 0.01 * len(different), called_equal


def test_the_docs_list_the_pairs_on_which_the_grader_disagrees_and_no_others() -> None:
    listed = re.findall(r"^\| (\d+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(map(int, listed)) == sorted(row["id"] for row in disagreeing())


def test_real_answers_that_the_papers_grader_took_for_equal_by_mistake_are_not() -> None:
    if not SCORES.is_file():
        pytest.skip(f"{SCORES.name} is not there: scores of the paper's grader are not part of the project")
    rows = [json.loads(line) for line in SCORES.read_text(encoding="utf-8").splitlines()]
    by_mistake = {
        ("1,5", "15"),
        ("5,15", "515"),
        ("100", "1"),
        ("20", "2000"),
        ("102018", "102019"),
        ("64,\\frac{1}{4}", "64"),
        ("-2,5", "-25"),
    }
    seen = [row for row in rows if (row["gold"], row["pred"]) in by_mistake]
    assert {(row["gold"], row["pred"]) for row in seen} == by_mistake
    assert all(row["score"] for row in seen)
    assert not any(equal(row["gold"], row["pred"]) for row in seen)


# Families


EQUAL = r"""
5 | 5.0
5 | \boxed{5}
27.0 | 27
-5 | −5
1234 | 1,234
1000000 | 1{,}000{,}000
1000000 | 1\,000\,000
32348 | \$32,\!348
1,22 | 1.22
0.5 | .5
0.5 | \frac12
0.5 | \dfrac{1}{2}
-\frac{1}{2} | \frac{1}{-2}
\frac{9}{5} | 1\frac{4}{5}
5/2 | 2 1/2
0.\overline{3} | \frac13
1/3 | 0.3333333
3.1416 | 3.14159
0.0833333333333333 | 0.0833333333333334
3e8 | 3\times10^{8}
0.001 | 1.0 \times 10^{-3}
1/1024 | 2^{-10}
28\% | 0.28
28\% | 28
28 | 28 \text{ percent}
50% | 1/2
90^\circ | 90
90 | 90 degrees
18 | 18\text{ cm}^2
18\text{ cm}^2 | 18 \text{ square centimeters}
5 \text{ km} | 5000 \text{ m}
\$5.50 | 5.5 \text{ dollars}
5 | 5 m/s
9 | 9 \text{ boys}
12 | 12^{\text{th}}
64 | 64 square feet
2516_8 | 2516_{8}
2516_8 | 2516
x=5 | 5
5 = x | 5
x = 11 | x = 5+5+1 = 11
1/3 | x = 1/3 \approx 0.33
x \approx 3.14 | 3.14
y = 2x+3 | 2x - y + 3 = 0
2x+3y=5 | 4x+6y=10
(p,q)=(3,2) | (3,2)
AB=4,CD=5 | 4, 5
x=1,y=2 | y=2,x=1
p=5,q=2;p=7,q=2 | (5,2),(7,2)
a_n = 2n+1 | 2n+1 \text{ for } n \ge 1
f(x)=2x | 2x
1,2,3 | 3, 2, 1
19, 46, and 82 | 82, 46, \text{ and } 19
\{1,2\} | \{2,1\}
\{1,2\} | 2, 1
\{3\} | 3
\emptyset | \{\}
(1,2),(3,4) | (3,4), (1,2)
(3,\frac{\pi}{2}) | \left( 3 , \pi/2 \right)
1,2,3 | (1,2,3)
1 \pm \sqrt{2} | 1+\sqrt2, 1-\sqrt2
x = \pm 3 | x=3 \text{ or } x=-3
[2,\infty) | x \ge 2
(0,1) | 0<x<1
[-1,1] | x\in[-1,1]
]0,1[ | (0,1)
x > 5 | 5 < x
x \neq 3 | (-\infty,3)\cup(3,\infty)
1\leq|z|\leq 2 | [-2,-1]\cup[1,2]
(-\infty,-2)\cup(2,\infty) | x<-2 \text{ or } x>2
(-\infty, 0) U (0,1) | (0,1)\cup(-\infty,0)
\{x : x>2\} | (2,\infty)
\mathbb{R} | \text{all real numbers}
3:4 | 6 : 8
3:4 | \frac{3}{4}
V_1:V_2=11:21 | 11:21
\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} | \left[\begin{array}{cc}1 & 2 \\ 3 & 4\end{array}\right]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | (1,2)
\begin{pmatrix}6 & 8 \\ 10 & 12\end{pmatrix} | \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} + \begin{pmatrix}5 & 6 \\ 7 & 8\end{pmatrix}
x^2+2x+1 | (x+1)^2
\tan^2 y+1 | \sec^2(y)
\frac{1}{3\sqrt[3]{x}^2} | \frac{1}{3x^{2/3}}
\sqrt{8} | 2\sqrt2
\frac{\sqrt{3}}{2} | sqrt(3)/2
|x-1| | |1-x|
\log_2 8 | 3
e^{i\pi} | -1
\binom{n}{2} | \frac{n(n-1)}{2}
\lceiln/2\rceil+1 | \lceil\frac{n}{2}\rceil+1
n! | n\cdot(n-1)!
1-\frac{1}{\mathrm{e}} | 1-e^{-1}
12\pi | 12π
\sqrt{53} | √53
3+4i | 4i+3
+\infty | \infty
R_{\odot}^2 k_{\mathrm{B}} | k_B R_\odot^2
1,2,\ldots,n | 1, 2, \dots, n
\text{Evelyn} | evelyn
\text{no solution} | No solution.
\text{13} | 13
\text{(C)} | C
(C) | (C) Plane
C | c
B | The correct option is B because A is wrong
D | D. it can't be A or B
42 | The answer is **42**.
42 | 答案是42。
66 | Die Antwort ist 66.
72 | #### 72
120 | Final Answer: The volume of $ABC$ is 120. I hope it is correct.
7 | There are 3 red and 4 blue ones, so we have 7
1,2 | \boxed{1} and \boxed{2}
1,2 | \boxed{1} papers and \boxed{2} bins
7 | \boxed{\boxed{7}}
1,2 | \boxed{\boxed{1}, \boxed{2}}
1,2 | The solutions are $x=1$ and $x=2$.
(3,4) | The point is (3, 4).
3 | The answer is therefore 3.
\text{yes} | Yes, it is.
k\pi, k\in\mathbb{Z} | k\pi
\frac{dy}{dx} = 2x | 2x
-3 < x < 3 | |x|<3
\frac{1}{2}ab | ab/2
xyz | zyx
\cos 36^\circ | \frac{1+\sqrt5}{4}
\{1,3\} \cup \{5\} | \{1,3,5\}
1.55 | 1.55eV
9 | 9boys
2\text{ hours} | 120 \text{ minutes}
1 \text{ m}^2 | 10000 \text{ cm}^2
x = 1000 | 1 000
"""

DIFFERENT = r"""
5 | 5.1
5 | -5
42 | 43
11 | 711
100 | 1
0.75 | 75
28 | 0.28
28\% | 2800
1,5 | 15
4,8 | 48
20 | 2000
102018 | 102019
1000000 | 1000001
10^{100}+1 | 10^{100}
2^{2005}+1 | 2^{2005}
1/2^99 | 1/2^98
10^{-30} | 0
\frac{1}{2004!} | \frac{1}{2006!}
10^{10^{10}} | 10^{10}
3.89e-10 | 3.88e-10
22/7 | \pi
\sqrt{2} | 1.41
\frac{1}{54} | \frac{15}{4}
1 2 | 12
5 \text{ cm} | 5 \text{ m}
0.64N | 0.64
1012_3 | 1012_4
1,2,3 | 1,2
1,2 | 1,2,3
16,3,1,1 | 16,3,1
1,-2 | 1,-3
3 | 3, 4
\pm 2021 | 2021
\{1,2\} | \{1\}
(1,2) | (2,1)
(1,2) | 12
(1,1006),(3,331),(11,31) | (1,1006)(1006,1)
[0,1) | [0,1]
(2,\infty) | [2,\infty)
(-\sqrt{3},\sqrt{3}) | [-\sqrt{3},\sqrt{3}]
(0,1)\cup(2,3) | (0,1)
D=(0,1) | D=[0,1]
x>5 | x<5
x \ge 5 | x>5
x<2 | x<3
x=5 | y=5
2x+z=1 | 1
n=3k | 3
3x+4y+14=0 | 0
2x+z=1 | 2x+z=2
(35+70=105) | (35+70=115)
y=2x+3 | y=2x-3
12:00 | 1:00
2:3 | 3:2
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
x^2+2x+1 | y^2+2y+1
x+2n+1 | x+1
2RC+R+C | 2RC-R+C
f(x) | f(y)
f(x)=x, f(x)=2-x | f(x)=x
\sqrt{x^2} | x
4 | 4\sqrt(2)
1-\frac{1}{e} | 1+\frac{1}{e}
3+4i | 3-4i
\infty | -\infty
1,2,\ldots,n | 1,3,\ldots,2n-1
\sum_{k=0}^{n-1} F_k | \sum_{k=0}^{n-2} F_k
\text{yes} | no
no | on
\text{(A)} | B
(A) Cecile | C
d | \text{E}
\text{e} | (E)
A | A + B
B | A and B
A | A, B
\sqrt{2}(2^{2005}+1) | \sqrt{2}\cdot 2^{2005}
no | no solution
\frac{1}{2}ab | \frac{1}{2}
3xyz | 3
\frac{dM}{dt}=\frac{10^5}{7}M^{6} | 6
\cos 36^\circ | \cos 36
120^\circ | 120 \text{ rad}
2 | AZYUK2A
0 | no solution
7 | \boxed{7}, then again: \boxed{8}
"""


def table(text: str) -> list[tuple[str, str]]:
    return [(gold, pred) for gold, _, pred in (line.partition(" | ") for line in text.strip().splitlines())]


@pytest.mark.parametrize(("gold", "pred"), table(EQUAL))
def test_answers_that_are_equal_whatever_their_notation(gold: str, pred: str) -> None:
    given = verdict(gold, pred)
    assert given.correct, given


@pytest.mark.parametrize(("gold", "pred"), table(DIFFERENT))
def test_answers_that_differ_however_alike(gold: str, pred: str) -> None:
    given = verdict(gold, pred)
    assert given.verdict == "wrong", given


# Fields of a case


@pytest.mark.parametrize(
    ("pred", "is_right"), [("2.25", True), ("2.2", True), ("2.3", True), ("2.31", False), ("9/4", True), ("-2.25", False)]
)
def test_a_tolerance_allows_an_absolute_error(pred: str, is_right: bool) -> None:
    assert equal("2.25", pred, tolerance=0.05) is is_right


def test_a_tolerance_holds_for_each_element_of_a_list() -> None:
    assert equal("1.0, 2.0", "1.01, 1.99", tolerance=0.02)
    assert not equal("1.0, 2.0", "1.01, 1.9", tolerance=0.02)


@pytest.mark.parametrize("pred", ["3", "3 V", "3\\,\\mathrm{V}", "3V", "3 \\text{V}"])
def test_the_unit_of_a_case_may_be_there_or_not(pred: str) -> None:
    assert equal("3", pred, unit="$\\mathrm{V}$")


def test_another_unit_than_that_of_the_case_stays_part_of_the_answer() -> None:
    assert not equal("3", "3A", unit="V")


def test_several_answers_come_in_any_order_but_all_and_no_more() -> None:
    assert equal("1,2,3", "(3,1,2)", is_multiple=True)
    assert equal("(1,2),(3,4)", "(3,4),(1,2)", is_multiple=True)
    assert not equal("(1,2),(3,4)", "(2,1),(3,4)", is_multiple=True)
    assert not equal("1,2,3", "1,2", is_multiple=True)
    assert not equal("1,2", "1,2,2", is_multiple=True)
    assert not equal("1,5", "1.5", is_multiple=True)


def test_a_list_that_is_no_set_of_answers_keeps_the_order_of_a_tuple() -> None:
    assert not equal("(1,2,3)", "3,1,2")


# Where the answer is


@pytest.mark.parametrize(
    ("response", "extracted", "kind"),
    [
        ("<think>\\boxed{1}</think>\\boxed{2}", "2", "correct"),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>\\boxed{2}<|end_of_solution|>", "2", "correct"),
        ("so \\boxed{\\frac{4}{\\sqrt{4}}}", "\\frac{4}{\\sqrt{4}}", "correct"),
        ("first \\boxed{3}, then \\boxed{2}", "2", "correct"),
        ("first \\boxed{2}.\n\nOr rather \\boxed{3}", "3", "wrong"),
        ("The answer is 2.", "2", "correct"),
        ("**Final Answer**\n\\boxed{2}", "2", "correct"),
        ("we get \\boxed{5}. The final answer is $2$.", "2", "correct"),
        ("<think>\\boxed{2}</think>I do not know.", "", "no_answer"),
        ("<think>so the answer is 2, but wait, 3 4 5", "", "no_answer"),
        ("there are 1 and 2", "", "no_answer"),
        ("so \\boxed{2", "", "no_answer"),
        ("\\boxed{}", "", "no_answer"),
        ("", "", "no_answer"),
        ("\\boxed{2}<|im_end|>\n<|im_start|>user\n\\boxed{3}", "2", "correct"),
    ],
)
def test_the_answer_of_a_whole_output_is_in_its_last_box_behind_the_thought(response: str, extracted: str, kind: str) -> None:
    given = grade_math(Case(gold="2", response=response))
    assert (given.extracted, given.verdict) == (extracted, kind)


def test_of_two_boxes_that_differ_the_last_counts_and_the_reason_says_so() -> None:
    assert "several boxes" in grade_math(Case(gold="2", response="first \\boxed{3}.\n\nNo: \\boxed{2}")).reason
    assert "several boxes" not in grade_math(Case(gold="2", response="first \\boxed{2}.\n\nYes: \\boxed{2}")).reason


def test_boxes_joined_by_a_word_are_one_answer() -> None:
    assert grade_math(Case(gold="2, 3", response="The roots are $\\boxed{2}$ and $\\boxed{3}$.")).correct
    assert not grade_math(Case(gold="3", response="The roots are $\\boxed{2}$ and $\\boxed{3}$.")).correct


def test_an_inline_formula_that_runs_over_lines_is_none() -> None:
    assert verdict("9", "Answer $ \n 9 \n $").verdict == "no_answer"
    assert equal("9", "Answer $$ \n 9 \n $$")


@pytest.mark.parametrize("pred", ["", "   ", "\\boxed{}"])
def test_an_empty_answer_is_no_answer(pred: str) -> None:
    assert verdict("0", pred).verdict == "no_answer"


def test_every_grade_says_why() -> None:
    for gold, pred in [*table(EQUAL), *table(DIFFERENT)]:
        assert verdict(gold, pred).reason


def test_it_grades_in_a_thread_and_leaves_signals_alone() -> None:
    found: list[Grade] = []
    cases = [Case(gold="\\begin{pmatrix}2\\end{pmatrix}", pred="\\begin{pmatrix}1\\end{pmatrix}+\\begin{pmatrix}1\\end{pmatrix}")] * 3
    thread = threading.Thread(target=lambda: found.extend(map(grade_math, cases)))
    thread.start()
    thread.join(60)
    assert [one.verdict for one in found] == ["correct"] * 3


# Properties


numbers = st.integers(-(10**6), 10**6)
rationals = st.builds(Fraction, st.integers(-999, 999), st.integers(1, 99))


def notations(value: Fraction) -> list[str]:
    sign, above, below = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [
        f"{sign}\\frac{{{above}}}{{{below}}}",
        f"{sign}\\dfrac{{{3 * above}}}{{{3 * below}}}",
        f"{sign}{above}/{below}",
        f"x = {sign}{above}/{below}",
    ]
    forms += [
        f"\\frac{{{value.numerator}}}{{{below}}}",
        f"{sign}{above} \\div {below}",
        f"$\\displaystyle {sign}\\tfrac{{{above}}}{{{below}}}$",
    ]
    if above > below and above % below:
        forms.append(f"{sign}{above // below}\\frac{{{above % below}}}{{{below}}}")
    if 10**4 % below == 0:
        decimal = f"{sign}{above * (10**4 // below) // 10**4}.{above * (10**4 // below) % 10**4:04d}"
        forms += [decimal, decimal.rstrip("0").rstrip("."), f"{decimal} \\times 10^{{0}}", f"{decimal}e0"]
    return forms


expressions = st.recursive(
    st.one_of(st.integers(1, 99).map(str), st.sampled_from(["x", "y", "n", "\\pi", "a_{1}", "\\theta"])),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: f"\\frac{{{two[0]}}}{{{two[1]}}}"),
        st.tuples(inner, inner).map(lambda two: f"\\left({two[0]}+{two[1]}\\right)"),
        st.tuples(inner, inner).map(lambda two: f"\\left({two[0]}\\right)\\left({two[1]}\\right)"),
        inner.map(lambda one: f"\\sqrt{{{one}}}"),
        inner.map(lambda one: f"\\left({one}\\right)^{{2}}"),
    ),
    max_leaves=6,
)


@quick
@given(rationals, st.data())
def test_a_rational_number_is_equal_in_every_notation(value: Fraction, data: st.DataObject) -> None:
    one, other = (data.draw(st.sampled_from(notations(value))) for _ in range(2))
    assert equal(one, other), (one, other)


@quick
@given(rationals, rationals, st.data())
def test_two_rational_numbers_are_never_equal_in_any_notation(value: Fraction, other: Fraction, data: st.DataObject) -> None:
    one, two = (data.draw(st.sampled_from(notations(each))) for each in (value, other))
    assert equal(one, two) is (value == other), (one, two)


@quick
@given(numbers)
def test_a_number_and_the_next_are_never_equal(number: int) -> None:
    for form in (
        str,
        lambda value: f"{value:,}",
        lambda value: f"${value}$",
        lambda value: f"x={value}",
        lambda value: f"\\sqrt{{2}}+{value}",
    ):
        assert not equal(form(number), form(number + 1))
        assert equal(form(number), form(number))


@quick
@given(expressions)
def test_an_answer_equals_itself_however_it_is_set(expression: str) -> None:
    plain = expression.replace("\\left", "").replace("\\right", "")
    spaced = re.sub(r"([{}()+])", r" \1 ", plain)
    for form in (
        expression,
        plain,
        spaced,
        plain.replace("\\frac", "\\dfrac"),
        f"${plain}$",
        f"\\[{plain}\\]",
        f"\\boxed{{{plain}}}",
        f"{plain}.",
    ):
        assert equal(expression, form), form


@quick
@given(expressions, expressions)
def test_equality_does_not_depend_on_the_order_of_two_expressions(one: str, other: str) -> None:
    assert equal(one, other) is equal(other, one)


@quick
@given(expressions)
def test_an_expression_is_not_itself_and_one(expression: str) -> None:
    assert not equal(expression, f"{expression}+1")
    assert not equal(f"{expression}-1", expression)


@quick
@given(st.lists(st.integers(0, 30), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_sets_and_lists_have_no_order_and_tuples_do(values: list[int], chance: Any) -> None:
    mixed = list(values)
    chance.shuffle(mixed)
    one, other = (", ".join(map(str, each)) for each in (values, mixed))
    assert equal(f"\\{{{one}\\}}", f"\\{{{other}\\}}")
    assert equal(one, other)
    assert equal(f"({one})", f"({other})") is (values == mixed)
    assert not equal(one, ", ".join(map(str, values[1:])))


@quick
@given(st.integers(-50, 50), st.integers(1, 50), st.sampled_from(["()", "[]", "(]", "[)"]), st.sampled_from(["()", "[]", "(]", "[)"]))
def test_the_brackets_of_an_interval_matter(low: int, width: int, ours: str, theirs: str) -> None:
    one, other = (f"{marks[0]}{low}, {low + width}{marks[1]}" for marks in (ours, theirs))
    assert equal(one, other) is (ours == theirs)
    signs = ["\\le" if mark in "[]" else "<" for mark in theirs]
    assert equal(one, f"{low} {signs[0]} x {signs[1]} {low + width}") is (ours == theirs)


@quick
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_two_texts_get_a_grade(gold: str, pred: str) -> None:
    given = verdict(gold or "1", pred)
    assert given.verdict in ("correct", "wrong", "no_answer")
    assert given.reason


@quick
@given(
    st.lists(
        st.sampled_from(
            [
                *"0123456789xyn+-*/^_=<>,;:()[]{}|$.%! ",
                "\\frac",
                "\\sqrt",
                "\\left",
                "\\{",
                "\\}",
                "\\pm",
                "\\cup",
                "\\text{",
                "\\in",
                "\\boxed{",
                "\\infty",
                "\\circ",
                "\\begin{pmatrix}",
                "\\\\",
                "&",
                "\\overline{",
                "and",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_any_row_of_signs_gets_a_grade_and_equals_itself(signs: str) -> None:
    given = verdict(signs or "1", "1")
    assert given.verdict in ("correct", "wrong", "no_answer")
    again = verdict(signs or "1", f"{signs} ")
    assert again.verdict in ("correct", "no_answer")
