"""The paper's table says no more than samples of its size can carry, and agrees with the published z-values where those are decisive."""

from __future__ import annotations

import json
import math

import pytest

from structcot.eval.golden import BEFORE, MATHS_BENCHMARKS
from structcot.study.paper_table import (
    KEYWORDS,
    LENGTH_FRACTIONS,
    PRINTED_AVERAGE_ORIGINAL,
    PROBLEMS,
    REFERENCE,
    TABLE_2,
    TOKENS,
    paper_facts,
)

FACTS = paper_facts()
ROWS = {row["name"]: row for row in FACTS["rows"]}

# Printed average; difference to "Correct" in standard errors, of the mean of the four and over all problems, computed apart from this code.
KNOWN = {
    "Original": (54.15, -3.2, -4.5),
    "Correct": (66.3, 0.0, 0.0),
    "Wrong answers": (63.1, -0.8, -1.0),
    "Digits 100%": (2.7, -21.8, -48.0),
    "Digits 70%": (62.0, -1.1, -2.0),
    "Digits 50%": (64.2, -0.5, -1.4),
    "Digits 20%": (64.5, -0.5, -0.6),
    "Keywords 100%": (63.0, -0.8, -1.9),
    "Keywords 50%": (65.9, -0.1, -0.8),
    "Keywords 20%": (62.3, -1.0, -1.3),
    "Shuffled 100%": (56.1, -2.6, -4.6),
    "Shuffled 67%": (57.2, -2.3, -4.9),
    "Shuffled 33%": (62.3, -1.0, -1.9),
    "Deleted 100%": (49.5, -4.4, -6.5),
    "Deleted 67%": (53.5, -3.2, -4.6),
    "Deleted 33%": (62.3, -1.1, -0.6),
    "Inserted 100%": (44.5, -5.8, -8.4),
    "Inserted 67%": (52.0, -3.6, -5.7),
    "Inserted 33%": (63.7, -0.7, -1.0),
}


def test_the_table_has_every_row_of_the_paper_once() -> None:
    assert sorted(ROWS) == sorted(KNOWN)
    assert len(FACTS["rows"]) == len(KNOWN)
    assert [row["name"] for row in FACTS["rows"] if row["difference"] is None] == [REFERENCE]
    assert ROWS["Original"]["accuracy"] == {task: BEFORE.percent[task] for task in MATHS_BENCHMARKS}


@pytest.mark.parametrize("name", KNOWN)
def test_every_mean_is_the_printed_one(name: str) -> None:
    row = ROWS[name]
    assert row["mean"] == pytest.approx(KNOWN[name][0], abs=0.051)
    assert row["mean"] == pytest.approx(sum(row["accuracy"].values()) / 4, abs=0.0051)
    assert row["interval"][0] < row["mean"] < row["interval"][1]


def test_every_printed_value_is_a_number_of_right_answers_but_for_five() -> None:
    # Five values of OlympiadBench are shares of 674 problems, not of 675.
    odd = {row.name for row in TABLE_2 if not row.is_whole}
    assert odd == {"Shuffled 100%", "Deleted 100%", "Deleted 33%", "Inserted 100%", "Inserted 67%"}
    for row in TABLE_2:
        counted = [round(100 * right / number, 1) for right, number in zip(row.right, PROBLEMS, strict=True)]
        assert counted[:3] == pytest.approx(row.percent[:3])
        assert counted[3] == pytest.approx(row.percent[3], abs=0.11)
        if row.name in odd:
            assert round(100 * row.right[3] / 674, 1) == pytest.approx(row.percent[3])
    assert next(row for row in TABLE_2 if row.name == "Correct").right == (446, 12, 31, 395)


@pytest.mark.parametrize("column", ["mean", "pooled"])
def test_verdicts_agree_with_the_known_z_where_it_is_decisive(column: str) -> None:
    for name, (_, z_mean, z_pooled) in KNOWN.items():
        z, found = (z_mean if column == "mean" else z_pooled), ROWS[name]["difference"]
        if found is not None and abs(z) > 4:
            assert found[column]["verdict"] == "worse", name
        if found is not None and abs(z) < 1:
            assert found[column]["verdict"] == "within noise", name
            assert found[column]["interval"][0] < 0 < found[column]["interval"][1]


def test_a_comparison_is_as_computed_by_hand() -> None:
    # 12 against 5 of 30: Newcombe's interval and the score test.
    found = ROWS["Original"]["difference"]["aime24"]
    low, high, low_other, high_other = 0.0734, 0.3356, 0.2459, 0.5768
    expected = (-0.2333 - math.hypot(0.1667 - low, high_other - 0.4), -0.2333 + math.hypot(high - 0.1667, 0.4 - low_other))
    assert found["value"] == pytest.approx(-23.3)
    assert found["interval"] == pytest.approx([100 * end for end in expected], abs=0.1)
    together = 17 / 60
    assert found["p"] == pytest.approx(math.erfc((7 / 30) / math.sqrt(together * (1 - together) * 2 / 30) / math.sqrt(2)), rel=0.02)
    # Of the mean of four the variances add up, and a quarter is taken of their root.
    z = ROWS["Deleted 67%"]["difference"]["mean"]
    assert z["value"] == pytest.approx(-12.8)
    assert math.erfc(3.2 / math.sqrt(2)) == pytest.approx(z["p"], rel=0.5)


def test_p_values_are_adjusted_over_the_eighteen_comparisons_of_a_column() -> None:
    for column in ("mean", "pooled", *MATHS_BENCHMARKS):
        found = sorted((row["difference"][column] for row in FACTS["rows"] if row["difference"]), key=lambda one: one["p"])
        assert found[0]["p_adjusted"] == pytest.approx(min(1.0, 18 * found[0]["p"]))
        assert all(one["p_adjusted"] >= one["p"] for one in found)
        assert all((one["verdict"] == "within noise") == (one["p_adjusted"] > 0.05) for one in found)


def test_the_sentences_say_what_the_numbers_carry() -> None:
    mean, pooled, *_ = sentences = FACTS["sentences"]
    assert "On the mean of the four benchmarks, 6 of 18 rows differ" in mean
    assert "Shuffled 100%" in mean.split("within noise")[1]
    assert "Shuffled 100% (-8.8)" in pooled.split("within noise")[0]
    on_aime = next(one for one in sentences if one.startswith("On AIME24"))
    assert '1 of 18 rows differs from "Correct" (family-wise 5 %): Digits 100% (-40.0); within noise: Original, ' in on_aime
    assert any(str(PRINTED_AVERAGE_ORIGINAL) in one and "54.15" in one for one in sentences)
    assert "a spread of 13.3 points" in sentences[-1]


def test_the_facts_are_json_with_the_lengths_of_the_appendix() -> None:
    assert json.loads(json.dumps(FACTS, allow_nan=False)) == FACTS == paper_facts()
    assert len(FACTS["outputs"]) == len(TOKENS) * len(LENGTH_FRACTIONS)
    for table in (TOKENS, KEYWORDS):
        # Nothing was done at fraction 0, so the three kinds begin alike.
        assert len({tuple(values[task][0] for task in MATHS_BENCHMARKS) for values in table.values()}) == 1
        assert all(len(values[task]) == len(LENGTH_FRACTIONS) for values in table.values() for task in MATHS_BENCHMARKS)
    last = FACTS["outputs"][-1]
    assert (last["kind"], last["fraction"], last["tokens"]["aime24"], last["keywords"]["aime24"]) == ("shuffle", 1.0, 18054, 210)
