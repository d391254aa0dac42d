"""Problems before anybody is asked: their normal form, sources, near duplicates, and what is kept out for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.curate.config import ContaminationConfig, DuplicatesConfig, ScaleConfig, SourceConfig
from structcot.curate.contamination import Benchmarks, decontaminate, facts_of, load_benchmarks
from structcot.curate.duplicates import deduplicate
from structcot.curate.near_duplicates import lines_of_share
from structcot.curate.normal import numbers_of, words_of
from structcot.curate.prompts import collect
from structcot.curate.stages import REJECTED, Done, Record, Stage, StageFiles, read_records, run_stage
from structcot.errors import ConfigError, DataError

NAMES = ("Ann", "Bo", "Cleo", "Dana", "Emil", "Farid", "Gita", "Hugo", "Ines", "Jonas", "Kim", "Lena", "Marek", "Nora", "Omar", "Pia")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "tickets", "pencils", "shells", "cards", "bottles", "plates", "ropes")
PLACES = ("market", "school", "harbour", "library", "garden", "station", "bakery", "museum", "stadium", "workshop", "farm", "bridge")
ACTS = ("buys", "sells", "finds", "loses", "packs", "counts", "sorts", "lends", "paints", "carries", "stacks", "hides")
OF_LATEX = (
    "Let $x$ be a positive integer such that $x^2 + {a}x + {b}$ is divisible by ${c}$. {lead} Find the least $x$ for which this holds.",
    "In triangle $ABC$ the sides have lengths ${a}$, ${b}$ and ${c}$. {lead} Compute the radius of the circle through its corners.",
    "The sequence $a_n$ starts with $a_1 = {a}$ and satisfies $a_{{n+1}} = {b} a_n - {c}$. {lead} What is the remainder of $a_{{100}}$?",
)


def word_problem(rng: Random) -> str:
    """A problem unlike any other: who does what where, with which numbers."""
    number = partial(rng.randrange, 3, 999)
    lead = f"{rng.choice(NAMES)} asks {rng.choice(NAMES)} about the {rng.choice(THINGS)} in the {rng.choice(PLACES)}."
    if rng.random() < 0.3:
        return rng.choice(OF_LATEX).format(a=number(), b=number(), c=number(), lead=lead)
    parts = [
        f"{rng.choice(NAMES)} {rng.choice(ACTS)} {number()} {rng.choice(THINGS)} {rng.choice(('near', 'behind', 'inside', 'beside'))} the"
        f" {rng.choice(PLACES)}{rng.choice(('', ' every morning', ' on Sundays', ' before noon', ' after school'))}."
        for _ in range(rng.randrange(3, 6))
    ]
    return f"{' '.join(parts)} {lead} How many {rng.choice(THINGS)} are there in the end?"


def reworded(text: str, rng: Random) -> str:
    """The same problem with a few other words, no number touched."""
    words = text.split()
    for _ in range(rng.randrange(1, 3)):
        place = rng.randrange(1, len(words))
        if words[place].isalpha():
            words[place : place + 1] = rng.choice(([], [words[place], "then"], ["such"], ["the", words[place]]))
    changed = " ".join(words) + rng.choice(("", " Explain your answer.", " Show all steps."))
    return changed if changed != text else reworded(text, rng)


REWRITINGS: Sequence[Callable[[str, Random], str]] = (
    lambda text, rng: "  ".join(text.replace(", ", " ,\n").split(" ")),
    lambda text, rng: text.replace("$", "").replace("{", "").replace("}", ""),
    lambda text, rng: text.replace("$", "\\(", 1).replace("$", "\\)", 1).replace("\\frac", "\\dfrac").replace("\\le", "\\leq"),
    lambda text, rng: f"Problem {rng.randrange(1, 99)}. {text}",
    lambda text, rng: f"({rng.randrange(1, 30)}) {text} (10 points)",
    lambda text, rng: f"{word_problem(rng)} Now solve this one, too: {text} {word_problem(rng)}",
    lambda text, rng: f"Here is an exercise from a contest.\n\n{text}\n\nWrite down every step, and box the result.",
)


@pytest.fixture
def staged(tmp_path: Path) -> Callable[[Sequence[str]], Done]:
    """Questions as the kept records of a stage."""

    def make(questions: Sequence[str]) -> Done:
        path = tmp_path / "questions.jsonl"
        path.write_text(
            "".join(json.dumps({"question": text, "answer": "1", "note": number}) + "\n" for number, text in enumerate(questions))
        )
        return collected(tmp_path / "prompts", SourceConfig(name="made", path=str(path)))

    return make


def collected(directory: Path, *sources: SourceConfig) -> Done:
    facts = {"sources": [source.model_dump(mode="json") for source in sources]}
    return run_stage(Stage(name="prompts", facts=facts, work=lambda _, files: collect(sources, files)), directory, None)


def run(directory: Path, before: Done, work: Callable[[Iterator[Record], StageFiles], None]) -> Done:
    return run_stage(Stage(name=directory.name, facts={}, work=work), directory, before)


def rejected(done: Done) -> list[Record]:
    return list(read_records(done.directory / REJECTED))


# The normal form


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            r"Problem 12. Find $\dfrac{1}{2}+ \left(3 \times 4\right)$ if $x \leq 5^\circ$.",
            r"(3) Find \(\tfrac12+(3\cdot4)\) if \(x\le 5^{\circ}\).",
        ),
        ("What is 1,000 + 2?", "  What   is\n1000+2 ?"),
        (r"Let $ABCD$ be a \textbf{square} with $AB=6$ (10 points)", "let ABCD be a square with AB = 6"),
        (r"Compute $\sqrt{x^{2}+1}$", r"Compute \[\sqrt{x^2 + 1}\]"),
        ("Example 3: She has three dogs.", "She has 3 dogs."),
        ("It’s 5 – 3", "It's 5 - 3"),
        (r"$a,\ldots,z$ with $a\ne z$", r"$a, \dots, z$ with $a \neq z$"),
        ("ﬁnd ½ of x", "find 1/2 of x"),
        ("求1000的平方根", "求 1000 的平方根"),
    ],
)
def test_two_ways_to_write_a_problem_are_one(one: str, other: str) -> None:
    assert words_of(one) == words_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2 + 3", "2 - 3"),
        ("x < 3", "x > 3"),
        ("x^2", "x_2 + x"),
        ("find the sum", "find the product"),
        ("12", "1 2"),
        ("1.5", "15"),
        ("3! = 6", "3 = 6"),
    ],
)
def test_what_is_another_problem_stays_one(one: str, other: str) -> None:
    assert words_of(one) != words_of(other)


@given(st.text(max_size=200))
def test_any_text_has_a_normal_form_that_is_its_own(text: str) -> None:
    words = words_of(text)
    assert all(word and not word.isspace() for word in words)
    assert numbers_of(words) == sorted(word for word in words if word[0].isdigit())


# Sources


def test_rows_become_problems_or_fall_with_a_reason(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"question": "What is 2 + 3?", "answer": "5", "level": 4, "set": "a"},
        {"question": "What  is 2+3 ?", "answer": "5", "level": 4, "set": "a"},
        {"question": "What is 2 + 4?", "answer": "6", "level": 9, "set": "a"},
        {"question": "What is 2 + 5?", "answer": "7", "level": 4, "set": "b"},
        {"question": "What is 2 + 6?", "answer": "word " * 100, "level": 4, "set": "a"},
        {"question": "What is 2 + 7?", "level": 4, "set": "a"},
        {"question": "What is 2 + 8?", "solution": "It is \\boxed{10}.", "level": "5", "set": "a"},
        {"question": "What is 2 + 9?", "answer": 11, "set": "a"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    source = SourceConfig(name="s", path=str(path), where={"set": ["a"]}, difficulty=[3, 8], difficulty_field="level")
    done = collected(tmp_path / "prompts", source)
    kept = list(read_records(done.kept))
    assert [(one["question"], one["gold"], one["difficulty"]) for one in kept] == [
        ("What is 2 + 3?", "5", 4.0),
        ("What is 2 + 8?", "10", 5.0),
    ]
    assert (kept[0]["source"], kept[0]["origin"]) == ("s", f"{path}:1")
    assert done.rejected == {
        "another value than where= asks for": 1,
        "the difficulty is not asked for": 2,
        "the reference answer cannot be told from the reference solution": 1,
        "the row cannot be read": 1,
        "the row has no question, or nothing to check an answer with": 1,
        "the same problem was there before": 1,
    }
    assert done.num_read == 9 == done.num_kept + sum(done.rejected.values())
    assert next(one for one in rejected(done) if "the same" in one["rejected"]["reason"])["rejected"]["detail"] == kept[0]["id"]


def test_a_limit_ends_a_source_and_not_the_next(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"question": f"{name} {n}", "answer": n}) + "\n" for n in range(9)))
    done = collected(tmp_path / "prompts", *(SourceConfig(name=name, path=str(tmp_path / f"{name}.jsonl"), limit=3) for name in "ab"))
    assert [one["question"] for one in read_records(done.kept)] == [f"{name} {n}" for name in "ab" for n in range(3)]


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'sources.a.path: "none.jsonl" does not exist'):
        collected(tmp_path / "prompts", SourceConfig(name="a", path="none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records"):
        collected(tmp_path / "prompts", SourceConfig(name="a", path=str(tmp_path / "empty.jsonl")))
    assert not (tmp_path / "prompts" / "kept.jsonl").exists()


# Near duplicates


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=30), st.integers(1, 8))
@settings(max_examples=60)
def test_shares_have_every_line_once(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], num_shares: int) -> None:
    path = tmp_path_factory.mktemp("shares") / "lines"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert [line for share in range(num_shares) for line in lines_of_share(path, share, num_shares)] == [line + b"\n" for line in lines]


def test_reworded_problems_fall_and_those_with_other_numbers_stay(staged: Callable[[Sequence[str]], Done], tmp_path: Path) -> None:
    first = "A train leaves the station at 7 and goes 90 miles an hour. Another follows at 8 with 120 miles an hour. When do they meet?"
    again = first.replace("the station", "the old station") + " Explain."
    other = first.replace("90", "80")
    before = staged([first, "Two and two are what?", again, other, "Something else entirely, with 7 and 90 and 8 and 120 in it."])
    done = run(tmp_path / "dup", before, partial(deduplicate, DuplicatesConfig(), ScaleConfig(tasks=3, workers=1)))
    assert [one["question"] for one in rejected(done)] == [again]
    assert rejected(done)[0]["rejected"]["detail"] == next(read_records(before.kept))["id"]
    assert not (done.directory / "work").exists()
    loose = run(tmp_path / "loose", before, partial(deduplicate, DuplicatesConfig(same_numbers=False), ScaleConfig(workers=1)))
    assert [one["question"] for one in rejected(loose)] == [again, other]


@pytest.mark.slow
def test_planted_duplicates_and_contaminated_problems_are_found_among_twenty_thousand(
    staged: Callable[[Sequence[str]], Done], tmp_path: Path
) -> None:
    rng = Random(5)
    plain = [word_problem(rng) for _ in range(20_000)]
    asked = [word_problem(rng) for _ in range(100)]
    benchmarks = Benchmarks(words=8, share=0.5)
    for number, question in enumerate(asked):
        benchmarks.add(f"made/{number}", question)
    originals = rng.sample(plain, 200)
    copies = [reworded(text, rng) for text in originals]
    contaminated = [REWRITINGS[number % len(REWRITINGS)](text, rng) for number, text in enumerate(asked)]
    questions = [*plain, *copies, *contaminated]
    rng.shuffle(questions)
    before = staged(questions)
    unique = run(tmp_path / "dup", before, partial(deduplicate, DuplicatesConfig(), ScaleConfig()))
    clean = run(tmp_path / "clean", unique, partial(decontaminate, benchmarks))
    left = {one["question"] for one in read_records(clean.kept)}
    # Of a pair the later one falls, and that may be the original: what counts is that one of them does.
    found = sum(original not in left or copy not in left for original, copy in zip(originals, copies, strict=True))
    caught = sum(question not in left for question in contaminated)
    wrong = len({*plain} - {*originals} - left)
    print(f"found are {found} of 200 near duplicates and {caught} of 100 contaminated problems; {wrong} of 19,800 others fell")
    assert found >= 0.95 * 200
    assert caught >= 0.95 * 100
    assert wrong <= 0.005 * 19_800


# Benchmarks


def test_a_problem_is_found_in_any_dress_and_a_likeness_is_not() -> None:
    rng = Random(2)
    asked = [word_problem(rng) for _ in range(50)]
    benchmarks = Benchmarks(words=8, share=0.5)
    for number, question in enumerate(asked):
        benchmarks.add(f"made/{number}", question)
    for number, question in enumerate(asked):
        for rewrite in REWRITINGS:
            assert benchmarks.found_in(rewrite(question, rng))[0] == f"made/{number}", rewrite(question, rng)
    assert not any(benchmarks.found_in(word_problem(rng))[0] for _ in range(500))


def test_a_short_problem_is_found_as_a_whole_only() -> None:
    benchmarks = Benchmarks(words=8, share=0.5)
    benchmarks.add("b/0", r"Simplify $\sqrt{242}$.")
    benchmarks.add("b/1", "Find x.")
    assert benchmarks.found_in("Please simplify \\(\\sqrt{242}\\) for me.") == ("b/0", 1.0)
    assert benchmarks.found_in("Simplify the root of 242")[0] == ""
    assert benchmarks.found_in("Find x.")[0] == "", "two words are no problem"


def test_benchmarks_are_named_or_files_and_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "How many legs have seven spiders and two beetles together?", "answer": "68"}) + "\n")
    found = load_benchmarks(ContaminationConfig(benchmarks=[str(path)]))
    assert found.names == ["mine/0"]
    assert facts_of(found) == facts_of(load_benchmarks(ContaminationConfig(benchmarks=[str(path)])))
    with pytest.raises(ConfigError, match=r"contamination.benchmarks: .*math50"):
        load_benchmarks(ContaminationConfig(benchmarks=["math50"]))
