"""How an output ends, told by its text: loops are found wherever they begin, and a long chain of thought that goes somewhere is none."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.eval.endings import MIN_LOOP_CHARACTERS, TAIL_CHARACTERS, ending_of, is_looping, repeats_exactly

ROOT = Path(__file__).parent.parent
TRACES = ROOT.parent / "shared" / "data" / "traces" / "paper_outputs.jsonl"
WORDS = [f"{stem}{end}" for stem in ("so", "let", "wait", "then", "case", "root") for end in ("", "s", "ing", "ed", "er", "ly")]


def prose(num_words: int, seed: int) -> str:
    """Words in random order: no 20-gram of them comes twice."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def traces() -> list[dict[str, Any]]:
    if not TRACES.is_file():
        pytest.skip(f"no traces at {TRACES}")
    return [json.loads(line) for line in TRACES.read_text(encoding="utf-8").splitlines()]


def test_only_an_output_that_was_cut_off_can_be_truncated_or_looping() -> None:
    loop = "Wait, no. " * 500
    assert ending_of(loop, "stop") == "finished"
    assert ending_of(loop, "length") == "looping"
    assert ending_of(prose(2000, 1), "length") == "truncated"
    assert ending_of("", "length") == "truncated"
    assert ending_of("", "refused") == "refused"
    with pytest.raises(ValueError, match="must be stop, length or refused, got 'eos'"):
        ending_of("", "eos")


@pytest.mark.parametrize("unit", ["0", "的", "\\frac{1}{2}+", "So x = 3.\n\n", prose(40, 2) + ". ", "\ud800"])
@pytest.mark.parametrize("num_words_before", [0, 50, 20_000])
def test_a_loop_is_found_however_much_comes_before_it(unit: str, num_words_before: int) -> None:
    loop = unit * (1 + 2000 // len(unit))
    assert ending_of(prose(num_words_before, 3) + " " + loop, "length") == "looping"
    cut = loop[: -len(unit) // 2] if len(unit) > 1 else loop
    assert ending_of(prose(num_words_before, 3) + " " + cut, "length") == "looping"


def test_a_loop_with_a_number_that_counts_up_is_found_where_its_words_repeat() -> None:
    paragraph = prose(60, 4)
    text = "".join(f"Attempt {number}: {paragraph}\n\n" for number in range(60))
    assert not repeats_exactly(text[-TAIL_CHARACTERS:])
    assert ending_of(text, "length") == "looping"


def test_a_loop_that_only_the_tail_shows_is_found_after_any_length() -> None:
    paragraph = prose(60, 4)
    rounds = "".join(f"Attempt {number}: {paragraph}\n\n" for number in range(30))
    assert ending_of(prose(40_000, 7) + rounds, "length") == "looping"


def test_two_rounds_are_no_loop_and_three_are() -> None:
    unit = "".join(chr(0x4E00 + number) for number in range(150))
    assert not repeats_exactly("x" + 2 * unit)
    assert repeats_exactly("x" + 3 * unit)


def test_a_loop_that_was_left_again_is_none() -> None:
    assert ending_of("Wait, no. " * 300 + prose(6000, 5), "length") == "truncated"


def test_a_table_of_different_rows_is_no_loop() -> None:
    table = "".join(f"f({n}) = {n * n + 1}, which is {'even' if n % 2 else 'odd'}; " for n in range(400))
    assert ending_of(table, "length") == "truncated"


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab "), max_size=30), st.text(st.sampled_from("ab "), min_size=1, max_size=80), st.integers(0, 9))
def test_exact_repetition_is_what_its_definition_says(before: str, unit: str, rounds: int) -> None:
    text = before + unit * rounds
    sizes = range(MIN_LOOP_CHARACTERS, len(text) + 1)
    expected = any(
        all(one == other for one, other in zip(text[-size:], text[-size + period :], strict=False))
        for size in sizes
        for period in range(1, size // 3 + 1)
    )
    assert repeats_exactly(text) == expected


def test_real_chains_of_thought_that_never_finish_are_told_apart() -> None:
    rows = traces()
    finished = [row["response"] for row in rows if "<|end_of_solution|>" in row["response"]]
    unfinished = [row["response"] for row in rows if "<|end_of_thought|>" not in row["response"] and "boxed" not in row["response"][-3000:]]
    assert len(finished) > 150
    assert len(unfinished) > 60
    # A finished answer that was cut off at its last sign would not be a loop; most of what never ends is one.
    assert sum(map(is_looping, finished)) == 0
    assert 0.4 < sum(map(is_looping, unfinished)) / len(unfinished) < 0.9


@pytest.mark.parametrize("text", ["a" * 1_000_000, "ab " * 333_333, prose(150_000, 6), "\n" * 1_000_000, "a" * 999_999 + "b"])
def test_a_megabyte_takes_no_time(text: str) -> None:
    start = time.perf_counter()
    ending_of(text, "length")
    assert time.perf_counter() - start < 5
