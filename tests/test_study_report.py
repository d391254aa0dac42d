"""The report of a study: conclusions that the intervals carry, files that agree, drawings that stand alone, nothing that acts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structcot.study.conclusions import NOTHING_YET, claim, conclusions
from structcot.study.report import write_report
from structcot.study.report_intervals import difference_rows
from structcot.study.report_order import in_order, paper_cell, settled
from structcot.study.report_plots import dose_panels, drawing, proxy_panels
from structcot.study.report_tables import heat_grid, results_table, unmatched_paper_rows
from tests.study_facts import bare, hostile, nothing_finished, study_facts, with_gaps
from tests.test_eval_report import BROWSERS, HOSTILE, Page

MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "whole": study_facts,
    "several": lambda: study_facts(("clock", "maze", "aime24"), ("r8", "r64")),
    "nothing": nothing_finished,
    "bare": bare,
    "gaps": with_gaps,
}
SHARE = st.floats(-1, 1).map(lambda value: round(value, 4))
INTERVAL = st.one_of(st.none(), st.tuples(SHARE, SHARE).map(sorted))
CLAIMS = re.compile(r"\b(worse|better) than\b")


def write(folder: Path, facts: dict[str, Any]) -> tuple[Page, str]:
    write_report(folder, facts)
    return Page((folder / "report.html").read_text(encoding="utf-8")), (folder / "report.md").read_text(encoding="utf-8")


def concluded(facts: dict[str, Any]) -> dict[str, Any]:
    return facts | {"conclusions": conclusions(facts)}


def difference(value: float, ends: Sequence[float], verdict: str | None = None) -> dict[str, Any]:
    return {"value": value, "interval": list(ends)} | ({"verdict": verdict} if verdict else {})


@st.composite
def random_facts(draw: st.DrawFn) -> dict[str, Any]:
    """Facts whose values, intervals and verdicts need not fit one another, with a name for each variant that is in no other name."""
    facts = study_facts(seeds=draw(st.sampled_from([(0,), (0, 1)])))
    estimate = st.fixed_dictionaries({"value": SHARE, "interval": INTERVAL})
    verdicts = st.sampled_from(["worse", "better", "within noise"])
    for index, variant in enumerate(facts["variants"]):
        variant["name"] = f"v{index:02}x"
        if variant["difference"]:
            variant["difference"] = {"clock": draw(estimate) | {"verdict": draw(verdicts), "p": 0.5, "p_adjusted": 0.5}}
        variant["forced"] = {"clock": draw(estimate)} if draw(st.booleans()) else None
    for pair in facts["matched"]:
        pair |= {"difference": draw(estimate), "verdict": draw(verdicts)}
    for curve in facts["curves"]:
        curve["trend"] = draw(st.one_of(st.none(), estimate))
    return facts


@given(random_facts())
def test_no_sentence_says_more_than_the_verdicts_and_the_intervals(facts: dict[str, Any]) -> None:
    by_name = {variant["name"]: variant for variant in facts["variants"]}
    pairs = {(pair["structure"], pair["content"]): pair for pair in facts["matched"]}
    for sentence in conclusions(facts):
        for verdict in CLAIMS.findall(sentence):
            named = set(re.findall(r"v\d\dx", sentence)) - {"v01x"}
            assert named, sentence
            for name in named:
                found = by_name[name]["difference"]["clock"]
                assert found["verdict"] == verdict, sentence
                assert found["interval"][1] < 0 if verdict == "worse" else found["interval"][0] > 0, sentence
        if "not told apart" in sentence or "cannot be told apart from" in sentence:
            for name in set(re.findall(r"v\d\dx", sentence)) - {"v01x"}:
                assert settled(by_name[name]["difference"]["clock"]) == "within noise", sentence
        for more, less in re.findall(r"(\w+) more than (\w+) at", sentence):
            sign = 1 if (more, less) in pairs else -1
            pair = pairs[(more, less) if sign == 1 else (less, more)]
            low, high = sorted(sign * end for end in pair["difference"]["interval"])
            assert low <= high < 0, sentence
            assert pair["verdict"] == ("worse" if sign == 1 else "better"), sentence


@given(SHARE, st.tuples(SHARE, SHARE).map(sorted), st.sampled_from(["worse", "better", "within noise", None]))
def test_a_difference_is_settled_only_where_interval_and_verdict_agree(value: float, ends: list[float], verdict: str | None) -> None:
    found = settled(difference(value, ends, verdict))
    assert found == "within noise" or (ends[1] < 0) == (found == "worse")
    assert found == "within noise" or verdict in (None, found)
    assert found != "within noise" or ends[0] <= 0 <= ends[1] or verdict is not None
    said = claim("digits-50", difference(value, ends, verdict), "clean")
    assert ("cannot be told apart" in said) == (found == "within noise")


def test_the_conclusions_of_a_whole_study_name_sizes_and_intervals() -> None:
    said = "\n".join(conclusions(study_facts()))
    assert re.search(r"base is worse than clean by 5\d\.\d points \(\d+\.\d to \d+\.\d\): training on clean teaches the task", said)
    assert re.search(r"Content: 2 of 7 variants are worse than clean: digits-70 by .*; digits-100 by", said)
    assert re.search(
        r"Content: 5 of 7 .* not told apart from clean: .*keywords-100; their intervals allow a loss of up to 1\d\.\d points", said
    )
    assert "structure costs more than content in 1 of 6 pairs: insert more than keywords at 0.14 by 8.0 points (3.0 to 13.0)." in said
    left = next(line for line in said.splitlines() if line.startswith("With every thought made to end"))
    assert "there is still a loss for" in left
    assert "shuffle-100 (\u221221.5 points, \u221228.4 to \u221214.7, and \u221249.1 points, \u221256.0 to \u221242.3 as it is)" in left
    assert "base" not in left
    assert "As in the paper, worse than clean: base, digits-100, shuffle-100, delete-67 and insert-100." in said
    assert "One training run: training noise is not in these intervals for keywords-20, keywords-50 and keywords-100." in said
    assert "1 cell is missing" in said


def test_what_is_not_there_is_not_concluded_from() -> None:
    assert conclusions(nothing_finished())[0] == NOTHING_YET
    facts = study_facts()
    facts["variants"] = [one for one in facts["variants"] if one["group"] != "reference"]
    assert "the reference clean has no result yet, so there is nothing to compare with." in conclusions(facts)
    assert not any(CLAIMS.search(sentence) for sentence in conclusions(facts))
    assert "Every variant has one training run: training noise is not in these intervals." in conclusions(bare())


def test_each_setting_is_concluded_from_by_itself_and_the_base_belongs_to_the_first() -> None:
    facts = study_facts(settings=("r8", "r64"))
    said = conclusions(facts)
    assert sum(sentence.startswith("With r64: ") for sentence in said) > 5
    assert [sentence.startswith("With r8: base is worse than clean") for sentence in said].count(True) == 1
    assert not any(sentence.startswith("With r64: base") for sentence in said)
    heads, rows = heat_grid(facts)
    assert heads == ["r8", "r64"]
    assert [cell is None for cell in dict(rows)["base"]] == [False, True]
    assert difference_rows(facts, "r8", "clock")[0].label == "base"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (difference(-0.5, (-0.6, -0.4), "worse"), "training on clean teaches the task"),
        (difference(0.5, (0.4, 0.6), "better"), "costs accuracy here"),
        (difference(-0.02, (-0.1, 0.06), "within noise"), "it is not shown that training on clean teaches the task"),
    ],
)
def test_base_against_clean_says_whether_the_study_can_show_anything(found: dict[str, Any], words: str) -> None:
    facts = study_facts()
    facts["variants"][0]["difference"]["clock"] = found
    assert words in conclusions(facts)[1]


def test_signs_are_compared_with_the_paper_in_every_combination() -> None:
    facts = study_facts()
    found = {"worse": (-0.3, -0.2), "better": (0.2, 0.3), "within noise": (-0.1, 0.1)}
    variant = next(one for one in facts["variants"] if one["name"] == "digits-70")
    facts["variants"] = [facts["variants"][1], variant]
    row = next(row for row in facts["paper"]["rows"] if row["name"] == "Digits 70%")
    said = {}
    for here, ends in found.items():
        for there, paper_ends in found.items():
            variant["difference"]["clock"] = difference(sum(ends) / 2, ends, here)
            row["difference"]["mean"] = difference(0.0, [100 * end for end in paper_ends], there)
            said[here, there] = next(one for one in conclusions(facts) if "paper" in one)
    assert len(set(said.values())) == 9
    assert said["worse", "worse"] == "As in the paper, worse than clean: digits-70."
    assert said["within noise", "worse"] == "With a loss in the paper, and not told apart from clean here: digits-70."


def test_the_table_has_the_papers_order_and_its_numbers_beside(tmp_path: Path) -> None:
    facts = study_facts()
    facts["variants"].reverse()
    assert [one["name"] for one in in_order(facts)] == [one["name"] for one in study_facts()["variants"]]
    table = results_table(facts, "clock")
    rows = {row[0]: row for row in table.rows}
    assert rows["clean"][3] == "reference"
    assert rows["delete-67"][-3:] == ("53.5 (48.0 to 59.0)", "\u221212.8 (\u221222.3 to \u22123.3)", "worse")
    assert rows["digits-20"][-3:] == ("\u2013",) * 3
    assert unmatched_paper_rows(facts) == ["Inserted 90%"]
    page, text = write(tmp_path, facts)
    assert "Rows of the paper with no variant here: Inserted 90%." in page.text
    for row in table.rows:
        assert f"| {' | '.join(row)} |" in text


def test_a_benchmark_of_the_paper_is_compared_with_itself_and_other_tasks_with_its_mean() -> None:
    facts = study_facts(("aime24",))
    variant = next(one for one in facts["variants"] if one["name"] == "digits-50")
    own, mean = paper_cell(facts, variant, "aime24"), paper_cell(facts, variant, "clock")
    assert own is not None
    assert mean is not None
    assert (own.benchmark, own.accuracy, own.interval) == ("aime24", pytest.approx(39.2), None)
    assert (mean.benchmark, mean.accuracy) == ("mean", pytest.approx(64.2))
    assert paper_cell(facts, {**variant, "fraction": 0.52}, "clock") is None


@pytest.mark.parametrize("name", MADE)
def test_files_say_the_same_and_come_out_the_same_again(name: str, tmp_path: Path) -> None:
    facts = concluded(MADE[name]())
    page, text = write(tmp_path, facts)
    for sentence in facts["conclusions"]:
        assert sentence in page.text
        assert sentence in text
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))}
    links = re.findall(r"\]\((figures/.*?\.svg)\)", text)
    assert {tmp_path / link for link in links} == {path for path in before if path.suffix == ".svg"}
    write_report(tmp_path, concluded(MADE[name]()))
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))} == before
    assert "None" not in page.text
    assert "nan" not in page.text
    assert "None" not in text


def test_a_section_without_a_body_is_left_out(tmp_path: Path) -> None:
    sections = lambda page: [attributes["id"] for tag, attributes in page.elements if tag == "section"]  # noqa: E731
    everything, _ = write(tmp_path, concluded(study_facts()))
    assert sections(everything) == [
        *("conclusions", "results", "dose", "differences", "matched", "checks", "outputs", "losses", "examples"),
        *("missing", "warnings", "paper", "training", "settings"),
    ]
    assert sections(write(tmp_path, concluded(bare()))[0]) == ["conclusions", "results", "dose", "differences", "settings"]
    assert sections(write(tmp_path, concluded(nothing_finished()))[0]) == ["conclusions", "missing", "paper", "settings"]


def test_verdicts_are_words_and_every_drawing_has_its_numbers_in_text(tmp_path: Path) -> None:
    facts = concluded(study_facts(("clock", "maze")))
    page, _ = write(tmp_path, facts)
    assert page.count("span", "worse") == page.count("span", "verdict") - page.count("span", "noise") - page.count("span", "better")
    assert page.text.count("within noise") > 20
    cells = [one for one in page.elements if one[0] == "td" and (one[1].get("class") or "").startswith(("loss", "gain"))]
    assert len(cells) == 3 * 19
    for variant in facts["variants"][1:]:
        for points in variant["accuracy"].values():
            assert f"{100 * points['value']:.1f}" in page.text
    assert page.count("div", "example") == 3 * len(facts["variants"])


def test_curves_stay_in_their_box_and_names_do_not_cover_one_another() -> None:
    for facts, setting in ((study_facts(), ""), (with_gaps(), "")):
        for panel in dose_panels(facts, setting, "mean" if len(facts["tasks"]) > 1 else "clock", "dose"):
            heights = sorted(tag.at[1] for tag in panel.tags)
            assert all(high - low > 0.08 for low, high in pairwise(heights))
            assert all(-1e-9 <= place <= 1 + 1e-9 for mark in panel.marks for point in mark.points for place in point)
            assert "g-content" in panel.legend[0][0] or "g-structure" in panel.legend[0][0]
        for panel in proxy_panels(facts, "mean" if len(facts["tasks"]) > 1 else "clock"):
            places = [tag.at for tag in panel.tags]
            assert all(abs(a[0] - b[0]) > 0.03 or abs(a[1] - b[1]) > 0.04 for a in places for b in places if a is not b)
            assert "nan" not in drawing(panel, 100, 100)


@pytest.mark.parametrize("name", MADE)
def test_every_figure_is_xml_that_stands_alone(name: str, tmp_path: Path) -> None:
    write_report(tmp_path, MADE[name]())
    for path in sorted((tmp_path / "figures").iterdir()):
        root = ElementTree.parse(path).getroot()
        width, height = float(root.get("width") or 0), float(root.get("height") or 0)
        texts = [(element.text or "", element) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert texts
        assert "url(" not in path.read_text(encoding="utf-8")
        for text, element in texts:
            assert text.strip()
            assert float(element.get("x") or 0) < width
            assert float(element.get("y") or 0) < height


def test_hostile_texts_add_no_element_and_no_row(tmp_path: Path) -> None:
    tame, tame_text = write(tmp_path / "tame", hostile("tame"))
    page, text = write(tmp_path / "hostile", hostile(HOSTILE))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in tame.elements]
    assert page.count("img") == page.count("script") == 0
    assert "<script>alert(1)</script>" in page.text
    assert text.count("\n") == tame_text.count("\n")
    assert [line.count(" | ") for line in text.splitlines()] == [line.count(" | ") for line in tame_text.splitlines()]
    for path in sorted((tmp_path / "hostile" / "figures").iterdir()):
        assert re.fullmatch(r"[a-z0-9-]+\.svg", path.name)
        tags = {element.tag.split("}")[1] for element in ElementTree.parse(path).getroot().iter()}
        assert tags <= {"svg", "title", "style", "rect", "text", "path", "g"}


def test_the_page_asks_nothing_of_a_network_and_runs_no_script(tmp_path: Path) -> None:
    page, _ = write(tmp_path, concluded(study_facts()))
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.scripts == []
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert not {"src", "href", "action"} & set(attributes)
    named = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(named) == len(set(named))


def test_long_outputs_are_cut(tmp_path: Path) -> None:
    facts = study_facts()
    facts["variants"][2]["examples"][0]["output"] = "A" * 500_000 + "B" * 500_000
    page, _ = write(tmp_path, facts)
    assert "[... 997,000 characters are left out here ...]" in page.text
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_the_report_needs_no_torch() -> None:
    code = "import sys, structcot.study.report, structcot.study.conclusions; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_browser_shows_the_page_without_complaint_and_a_phone_needs_no_sideways_scroll(tmp_path: Path) -> None:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is found")
    from tests.test_view_browser import Browser

    write_report(tmp_path / "study", concluded(study_facts(("clock", "maze"), ("r8", "r64"))))
    write_report(tmp_path / "hostile", hostile(HOSTILE))
    browser = Browser(program, tmp_path / "profile")
    try:
        for width in (390, 1300):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            for name in ("study", "hostile"):
                browser.visit(tmp_path / name / "report.html")
                browser.value("document.querySelectorAll('details').forEach((it) => { it.open = true; })")
                assert browser.complaints == []
                assert browser.value("document.documentElement.scrollWidth") <= width, (name, width)
    finally:
        browser.end()
