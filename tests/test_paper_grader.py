"""The paper's grader: its figures and verdicts on real outputs, each of its mistakes by name, and input that breaks other graders."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.grading.case import VERDICTS, Case, Grade
from structcot.grading.paper import grade_paper
from structcot.grading.paper_answers import answer_of_case, gold_of_case
from structcot.grading.paper_expression import is_gigantic, read_expression
from structcot.grading.paper_parse import parse
from structcot.grading.paper_strings import strip_string
from structcot.grading.paper_words import number_of_words

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
GRADING, TRACES = DATA / "grading", DATA / "traces"
# What the harness gives a comparison, and more, for a machine that is busy.
LIMIT_SECONDS = 10
SAMPLED_ROWS = 40


class OutOfTime(BaseException):
    """Passes through every `except Exception` on its way out."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        pytest.skip(f"the shared data is not here: {path.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judged(pred: str, gold: str) -> Grade:
    return grade_paper(Case(gold=gold, pred=pred))


def equal(pred: str, gold: str) -> bool:
    return judged(pred, gold).correct


def answered(response: str, gold: str = "7", benchmark: str = "math500") -> str | None:
    return answer_of_case(Case(gold=gold, response=response, benchmark=benchmark), gold)


def differing(rows: list[dict[str, Any]]) -> list[str]:
    """The rows whose logged score the grader does not give; what takes too long is wrong, as in the harness."""
    found = []
    for row in rows:
        correct = False
        try:
            with limited(LIMIT_SECONDS):
                correct = grade_paper(Case(gold=row["gold"], pred=row["pred"])).correct
        except OutOfTime:
            pass
        if correct != row["score"]:
            found.append(f"{row['pred']!r} for {row['gold']!r}: {correct}")
    return found


# --- the paper's own figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task"), [("google__gemma-2-27b-it__amc23", "amc23"), ("Qwen__Qwen2.5-14B-Instruct__math500", "math500")])
def test_raw_outputs_give_the_printed_accuracy_and_each_logged_answer_and_score(name: str, task: str) -> None:
    rows = lines(GRADING / f"{name}.jsonl")
    metrics = json.loads((GRADING / "paper_metrics.json").read_text(encoding="utf-8"))
    printed = next(one["acc"] for one in metrics if one["dataset"] == task)
    grades = [grade_paper(Case(gold=str(row["answer"]), response=row["code"][0], benchmark=task)) for row in rows]
    assert [grade.extracted for grade in grades] == [row["pred"][0] for row in rows]
    assert [grade.correct for grade in grades] == [row["score"][0] for row in rows]
    assert round(100 * sum(grade.correct for grade in grades) / len(rows), 1) == printed


def test_long_thoughts_give_the_logged_answers_and_scores() -> None:
    rows = lines(TRACES / "paper_outputs.jsonl")
    grades = [grade_paper(Case(gold=row["gold"], response=row["response"], benchmark=row["dataset"])) for row in rows]
    assert [grade.extracted for grade in grades] == [row["pred"] or "" for row in rows]
    assert [grade.correct for grade in grades] == [row["score"] for row in rows]


def test_a_sample_of_the_logged_scores_is_reproduced() -> None:
    rows = lines(GRADING / "paper_scores.jsonl")
    assert differing(rows[:: len(rows) // SAMPLED_ROWS]) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_logged_score_is_reproduced() -> None:
    unique = {(row["pred"], row["gold"]): row for row in lines(GRADING / "paper_scores.jsonl")}
    assert differing(list(unique.values())) == []


def test_the_plain_form_of_a_logged_reference_stays_as_it_is() -> None:
    rows = [row for row in lines(GRADING / "paper_scores.jsonl") if row["dataset"] != "minerva_math"]
    assert [row["gold"] for row in rows if strip_string(row["gold"]) != row["gold"]] == []


# --- mistakes in numbers ---------------------------------------------------------------------------------------------------------------


def test_commas_vanish_from_numbers_so_that_a_list_is_one_number() -> None:
    assert equal("1,5", "15")
    assert equal("-2,5", "-25")
    assert not equal("1;5", "15")


def test_a_number_may_be_a_hundred_times_too_large_or_too_small() -> None:
    assert judged("100", "1").reason == "equal up to a factor of 100 (percent)"
    assert equal("20", "2000")
    assert equal("0.5", "50")
    assert not equal("0.05", "50")


def test_whole_numbers_within_a_ten_thousandth_are_equal() -> None:
    assert judged("102018", "102019").reason == "equal as numbers within 1e-4 of the reference"
    assert not equal("1000", "1001")


def test_a_percentage_is_its_hundredth() -> None:
    assert equal("50%", "0.5")
    assert equal(r"50\%", "0.5")
    assert not equal("50%%", "0.5")


def test_all_numbers_too_large_for_a_float_are_equal() -> None:
    assert equal("1" * 400, "2" * 500)


def test_another_number_is_wrong_without_asking_further() -> None:
    assert judged("3", "4") == Grade(extracted="3", verdict="wrong", reason="another number")


# --- mistakes in rows, brackets and equations ------------------------------------------------------------------------------------------


def test_the_kind_of_brackets_does_not_count() -> None:
    assert equal(r"(2,\infty)", r"[2,\infty)")
    assert equal("{3}", "3")
    assert equal("[3,4]", "3,4")


def test_rows_are_compared_in_order() -> None:
    assert judged(r"(\frac{1}{2},3)", "(0.5,3)").reason == "equal part by part, in order"
    assert not equal(r"(3,\frac{1}{2})", "(0.5,3)")


def test_each_part_of_a_row_may_be_a_hundred_times_too_large() -> None:
    assert equal("(100,2)", "(1,200)")


def test_the_last_character_of_a_row_is_dropped_whatever_it_is() -> None:
    assert equal("(1,2)a", "(1,2)b")


def test_of_a_list_without_brackets_only_the_start_counts() -> None:
    assert equal(r"1,-\sqrt{2}", r"1,-\sqrt{3}")
    assert equal("1,-2", "1,-3")
    assert not equal("1,-2", "2,-2")


def test_two_functions_are_the_first_one() -> None:
    assert equal("f(x)=x", "f(x)=x,f(x)=-x")
    assert not equal("f(x)=-x", "f(x)=x,f(x)=-x")


def test_sets_of_plain_numbers_have_no_order() -> None:
    assert equal("{1,-2}", "{-2,1}")


def test_a_short_name_left_of_an_equals_sign_is_dropped() -> None:
    assert judged("ab=5", "5").reason == "after the equals sign equal as text"
    assert equal(r"\frac{1}{2}", "k=0.5")
    assert not equal("abc=5", "5")


def test_equations_are_equal_as_differences_of_their_sides_of_either_sign() -> None:
    assert judged("x+y=5", "5=x+y").reason == "equal as equations, perhaps with the sides exchanged"
    assert equal("x+y-5=0", "x=5-y")
    assert not equal("x+y=5", "x-y=5")


def test_matrices_are_compared_entry_by_entry_and_else_to_three_decimals() -> None:
    halves = r"\begin{pmatrix}0.5\\2\end{pmatrix}"
    assert judged(halves, r"\begin{pmatrix}\frac{1}{2}\\2\end{pmatrix}").reason == "equal as matrices, entry by entry"
    rounded = judged(r"\begin{pmatrix}0.3333&1\end{pmatrix}", r"\begin{pmatrix}0.33337&1\end{pmatrix}")
    assert rounded.reason == "equal as matrices to three decimals"
    assert not equal(halves, r"\begin{pmatrix}0.5\\3\end{pmatrix}")


def test_a_matrix_is_compared_with_curly_brackets_as_a_matrix() -> None:
    assert equal(r"\begin{pmatrix}1\2\end{pmatrix}", "{1,2}")


def test_a_choice_is_the_last_letter_that_stands_alone() -> None:
    assert equal("not B, but (C)", "C")
    assert judged("(C), then B", "C").reason != "its last letter from A to E is the choice"


# --- symbols ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"),
        (r"\sec^2(y)", r"\tan^2(y)+1"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("2.8284", r"2\sqrt{2}"),
        (r"\frac{dx}{dt}+1", r"1+\frac{dx}{dt}"),
        ("(2**3,1)", "(8,1)"),
        (r"7\\", "7"),
    ],
)
def test_formulas_are_equal_by_sympy(pred: str, gold: str) -> None:
    assert equal(pred, gold)


@pytest.mark.parametrize(
    ("pred", "gold"), [("x+1", "x+2n+1"), (r"\frac{1+\sqrt{5}}{2}", "2"), (r"1\\sqrt{19}", "1"), (r"\cup", r"\cap"), ("1", r"\text{e}")]
)
def test_other_formulas_are_not(pred: str, gold: str) -> None:
    assert not equal(pred, gold)


def test_what_no_reader_understands_is_text() -> None:
    assert parse("[1,2)") == "[1,2)"


def test_pi_is_a_symbol_without_a_value() -> None:
    assert not equal("3.14159", r"\pi")
    assert equal(r"\frac{2\pi}{2}", r"\pi")


def test_all_false_statements_of_python_are_equal() -> None:
    assert equal("x==3", "y==4")


def test_of_a_list_in_brackets_the_rest_of_the_text_does_not_count() -> None:
    assert equal(r"[0,\pi^2],x", r"[0,\pi^2]")


def test_lists_in_square_brackets_are_lists_of_formulas() -> None:
    first, second = parse(r"[0,\frac{\pi^2}{2}]")
    assert (first, second.equals(sympy.pi**2 / 2)) == (0, True)


@pytest.mark.parametrize(
    "text", ["__import__('os').getcwd()", "().__class__", "open(0)[0]", "[x for x in (1,2)]", "lambda: 1", "x.y", "f'{1}'"]
)
def test_no_answer_runs_code(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        read_expression(text)


def test_functions_that_could_run_code_are_symbols() -> None:
    assert str(read_expression("(sympify(x), exit(1), sin(0))")) == "(sympify(x), exit(1), 0)"


def test_gigantic_numbers_are_not_worked_out() -> None:
    assert is_gigantic(parse("9^{9^{9^{9}}}"))
    assert is_gigantic(parse("(10^8)!"))
    assert not is_gigantic(parse("2^{1009}+100!+x^{2n}"))
    assert not equal("9^{9^{9^{9}}}", "10^{10^{10}}")


# --- the plain form --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\text{five}", "5"),
        (r"\text{(C)}", "(C)"),
        ("all ten of one kind", "11"),
        ("-two", "2"),
        ("the point", "0"),
        (r"24\text{ cm}^2", "24"),
        (r"24\text{cm}^3", "24^3"),
        (r"3\text{a}+4\text{b}", "3"),
        ("12thgrade", "12"),
        (r"12\text{th grade}", "12"),
        ("3,1,2", "1,2,3"),
        ("(3,1,2)", "(3,1,2)"),
        ("007", "7"),
        ("9" * 5000, "-1,-1"),
        ("5 m", "5"),
        ("a+b", "+b"),
        (r"90^\circ", "90"),
        (r"\$5", "5"),
        ("50%", "50"),
        ("x=5", "5"),
        ("ab=5", "5"),
        ("abc=5", "abc=5"),
        ("2.0x", "2x"),
        ("3.", "3"),
        (".5", "0.5"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac", r"\frac"),
        ("3/4", r"\frac{3}{4}"),
        ("03/4", "03/4"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("j+1", "i+1"),
        ("landing", "ling"),
        ("infinity", r"\infty"),
        (r"(-\infty,\infty)", r"\mathbb{R}"),
        (r"\left(1,\dfrac{1}{2}\right)", r"(1,\frac{1}{2})"),
        (r"\begin{array}{cc}1&2\end{array}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        ("m", "m"),
    ],
)
def test_the_plain_form_keeps_the_harness_s_mistakes(text: str, plain: str) -> None:
    assert strip_string(text) == plain


def test_units_stay_where_the_benchmark_asks_for_them() -> None:
    assert strip_string("5 m", keep_units=True) == "5m"


def test_a_smaller_group_at_the_end_counts_again() -> None:
    assert number_of_words("two million one thousand") == "2002001"
    assert number_of_words("two thousand five hundred") == "2500"
    assert number_of_words("one point two five") == "1.25"
    assert number_of_words("thousand million") == "thousand million"


# --- where the answer is found ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}", r"\frac{1}{2}"),
        (r"It is boxed 5$ here", "5"),
        ("The answer is 4. No, the answer is 5.", "5"),
        ("final answer is $9$. I hope it is correct.", "9"),
        ("答案是 6\n\nand more", "6"),
        ("So we get 1,234.5 and then", "1234.5"),
        ("Let me check 3 again, and 4", "4"),
        (r"\boxed{:8/}", "8"),
        (r"\boxed{3}<|im_end|>\boxed{4}", "3"),
        ("nothing", ""),
    ],
)
def test_the_answer_is_found_as_the_harness_finds_it(response: str, found: str) -> None:
    assert answered(response) == found


def test_a_thought_that_was_cut_scores_by_its_last_number() -> None:
    grade = grade_paper(Case(gold="42", response="<|begin_of_thought|>\n\nWait, 6 times 7 is 42, but", benchmark="math500"))
    assert (grade.extracted, grade.verdict) == ("42", "correct")


def test_a_box_in_the_thought_counts_as_well() -> None:
    assert answered(r"<|begin_of_thought|> \boxed{3} <|end_of_thought|> It is 4.") == "3"


@pytest.mark.parametrize("response", ["", " \n ", "error", "<|im_end|>5"])
def test_no_output_is_no_answer(response: str) -> None:
    assert grade_paper(Case(gold="5", response=response)).verdict == "no_answer"


def test_an_empty_answer_is_right_only_where_the_reference_is_empty() -> None:
    assert judged("", "5") == Grade(extracted="", verdict="no_answer", reason="no answer")
    assert equal("", "")


def test_a_reference_of_letters_takes_letters_from_the_answer() -> None:
    assert answered("I think\n\nthe answer is 5, that is (B).", gold="B") == "B"
    assert answered(r"\boxed{A and C}", gold="AC") == "AC"


@pytest.mark.parametrize(
    ("task", "response", "found"),
    [
        ("gpqa", "Either (B) or (C).", "C"),
        ("mmlu_stem", "The answer is (D), not A", "D"),
        ("mmlu_pro", r"\boxed{E}", "E"),
        ("minerva_math", r"\boxed{5 m}", "5m"),
        ("olympiadbench", r"\boxed{5 m}", "5"),
    ],
)
def test_some_benchmarks_have_rules_of_their_own(task: str, response: str, found: str) -> None:
    assert answered(response, benchmark=task) == found


@pytest.mark.parametrize(
    ("task", "raw", "plain"),
    [
        ("amc23", "27.0", "27"),
        ("gsm8k", "3 + 4 = 7\n#### 7", "7"),
        ("olympiadbench", "$5 m$", "5"),
        ("math", r"So it is $\boxed{\frac12}$.", r"\frac{1}{2}"),
        ("minerva_math", r"so \boxed{5 \mathrm{~m}}", r"5\mathrm{~m}"),
        ("minerva_math", r"x \leq 5", r"x \le 5"),
    ],
)
def test_the_reference_is_brought_to_the_plain_form(task: str, raw: str, plain: str) -> None:
    assert gold_of_case(Case(gold=raw, benchmark=task)) == plain


# --- bad input -------------------------------------------------------------------------------------------------------------------------

NESTED, MEGABYTE = 10_000, 1_000_000
BAD = {
    "null bytes": "\0" * 10,
    "half a character": r"\boxed{" + "\ud800}",
    "not a number": "nan",
    "a gigantic exponent": "1e999999999999",
    "a power tower": "9**9**9**9",
    "deep brackets": "(" * NESTED + "1" + ")" * NESTED,
    "deep braces": "{" * NESTED + "1" + "}" * NESTED,
    "deep fractions": r"\frac{1}{" * NESTED + "1" + "}" * NESTED,
    "many digits": "1" * MEGABYTE,
    "many words": "5 m and a km " * (MEGABYTE // 13),
    "open texts": r"\text{" * (MEGABYTE // 6),
    "open boxes": r"\boxed{" * (MEGABYTE // 7),
    "fractions of nothing": r"\frac" * (MEGABYTE // 5),
    "a long list": "1," * (MEGABYTE // 2),
    "zeros": "1." + "0" * MEGABYTE + "5",
    "line breaks": "\n" * MEGABYTE,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_judged_in_bounded_time(name: str) -> None:
    start = time.monotonic()
    boxed = grade_paper(Case(gold=r"\frac{1}{2}", response=rf"\boxed{{{BAD[name]}}}", benchmark="math500"))
    assert (boxed.verdict in VERDICTS, boxed.correct) == (True, False)
    assert not equal(BAD[name], r"\frac{1}{2}")
    # Far above what it takes. A rule that is not linear takes hours.
    assert time.monotonic() - start < 120


def test_rows_nested_too_deeply_are_wrong_with_a_reason() -> None:
    grade = judged("(" * NESTED + "1" + ")" * NESTED, "(" * NESTED + "2" + ")" * NESTED)
    assert (grade.verdict, grade.reason) == ("wrong", "nested too deeply to be compared")


PIECES = st.sampled_from(
    [*r"\ {}()[],.=/^_$%-+ 0159xayj".replace(" ", ""), " ", "\\frac", "\\text{", "\\boxed{", "cm", "and", "five", "\\\\"]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=12).map("".join))
@settings(max_examples=60)
def test_any_text_is_judged_and_is_equal_to_itself(pred: str, gold: str) -> None:
    assert judged(pred, gold).verdict in VERDICTS
    assert equal(gold, gold)
    assert grade_paper(Case(gold=gold, response=pred, benchmark="math500")).verdict in VERDICTS


@given(st.lists(PIECES, max_size=20).map("".join))
@settings(max_examples=200)
def test_the_plain_form_has_no_spaces_and_keeps_its_length_in_bounds(text: str) -> None:
    plain = strip_string(text)
    assert " " not in plain
    assert len(plain) <= 4 * len(text) + 10
