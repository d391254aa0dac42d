"""The report of an evaluation: the same numbers in three files, closed to the network and to what models wrote, of any size."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from structcot.eval.golden import BESIDE, MATHS_BENCHMARKS
from structcot.eval.report import write_reports
from structcot.eval.report_samples import KINDS, MAX_FAILURES_OF_TASK, collect, cut, failures_of, kind_of
from structcot.eval.summary import compare, summarise

HOSTILE = "\"'><img src=x></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!-- \x07\u202e\ud800 | *`"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")


def sample(task: str, problem: int, number: int = 0, is_right: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "task": task,
        "problem_id": f"problem-{problem}",
        "sample": number,
        "prompt": [{"role": "user", "content": f"What is {problem} + 1?"}],
        "output": f"It is \\boxed{{{problem + 1}}}.",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 100 + problem,
        "seconds": 1.0,
        "gold": str(problem + 1),
        "group": "",
        "extracted": str(problem + 1) if is_right else "0",
        "verdict": "correct" if is_right else "wrong",
        "correct": is_right,
        "reason": "equal" if is_right else f"0 is not {problem + 1}",
        "ending": "finished",
        "paper_correct": is_right,
    } | changes


def evaluation(task: str, num_problems: int = 30, num_samples: int = 1, num_right: int = 17) -> list[dict[str, Any]]:
    return [sample(task, p, s, p < num_right) for p in range(num_problems) for s in range(num_samples)]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.scripts = "", list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-1:] != ["style"]:
            self.text += data

    def count(self, tag: str, name: str = "") -> int:
        return sum(one == tag and name in (attributes.get("class") or "").split() for one, attributes in self.elements)

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}


def write(folder: Path, samples: list[dict[str, Any]], comparisons: Any = (), **settings: Any) -> tuple[Page, str, dict[str, Any]]:
    """Write the reports and give what a reader finds in them."""
    write_reports(folder, {**settings, **summarise(samples)}, iter(samples), comparisons, "a run")
    html = (folder / "report.html").read_text(encoding="utf-8")
    return Page(html), (folder / "report.md").read_text(encoding="utf-8"), json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_three_files_say_the_same(tmp_path: Path) -> None:
    samples = evaluation("aime24", 30, 8) + evaluation("mine", 40)
    page, text, results = write(tmp_path, samples, model="a/model", sampling={"temperature": 0.6})
    assert results["tasks"]["aime24"] == summarise(samples)["tasks"]["aime24"]
    assert results["sampling"] == {"temperature": 0.6}
    low, high = (f"{100 * end:.1f}" for end in results["tasks"]["aime24"]["interval"])
    for said in (page.text, text):
        assert "56.7" in said
        assert f"{low} to {high}" in said
        assert "sampling.temperature" in said.replace("\\", "")
        assert "a/model" in said
    assert "30 × 8" in page.text
    assert "pass@8, %" in page.text
    assert f"| mine | 42.5 | {' to '.join(f'{100 * end:.1f}' for end in results['tasks']['mine']['interval'])} | 40 | 40 |" in text


def test_the_papers_values_stand_beside_as_those_of_other_models(tmp_path: Path) -> None:
    page, text, _ = write(tmp_path, evaluation("aime24"))
    row = re.search(r"\| aime24 .*", text)
    assert row is not None
    assert row[0].endswith("| 16.7 | 33.3 | 56.7 |")
    assert "other models" in text
    assert "The paper: Qwen2.5-32B-Instruct" in page.text
    assert "the paper: before training" in page.text
    own, _, _ = write(tmp_path, evaluation("mine"))
    assert "The paper: Qwen2.5-32B-Instruct" not in own.text


def test_the_mean_of_the_four_benchmarks_is_a_row_of_its_own(tmp_path: Path) -> None:
    samples = [one for task in MATHS_BENCHMARKS for one in evaluation(task, 20, num_right=5 if task == "aime24" else 15)]
    page, text, results = write(tmp_path, samples)
    assert results["average"]["accuracy"] == pytest.approx(0.625)
    assert "| mean of four | 62.5 |" in text
    assert "| 54.2 | 66.5 |" in text
    assert page.text.count("mean of four") >= 4


def test_every_sample_has_its_sign_and_reason_and_groups_are_named(tmp_path: Path) -> None:
    samples = evaluation("t", 6, 2, num_right=3)
    for one, (verdict, ending) in zip(
        samples[6:],
        [("wrong", "finished"), ("no_answer", "finished"), ("no_answer", "truncated"), ("no_answer", "looping"), ("timeout", "finished")],
        strict=False,
    ):
        one |= {"verdict": verdict, "ending": ending, "group": "hard"}
    samples[11] |= {"verdict": "error", "group": "hard", "ending": "looping"}
    page, _, _ = write(tmp_path, samples)
    assert [kind_of(one) for one in samples[6:]] == ["wrong", "no_answer", "truncated", "looping", "timeout", "error"]
    for kind in ("right", "wrong", "no_answer", "truncated", "looping", "timeout", "error"):
        assert page.count("i", kind) >= 1, kind
        assert KINDS[kind][1] in page.text
    hints = [attributes["title"] or "" for tag, attributes in page.elements if tag == "i" and "title" in attributes]
    assert sum("problem-3, sample 0: wrong; 0 is not 4; 103 tokens" in hint for hint in hints) == 1
    assert "2 of 2" in page.text
    assert "hard" in page.text
    assert len({sign for sign, _ in KINDS.values()}) == len(KINDS)


def test_what_a_grader_could_not_judge_is_said_first_and_shown_first(tmp_path: Path) -> None:
    samples = evaluation("t", 60, num_right=10)
    samples[50] |= {"verdict": "error", "reason": "the grader died"}
    samples[55] |= {"verdict": "timeout"}
    page, text, _ = write(tmp_path, samples)
    warning = "t: 1 of 60 samples could not be judged: the grader failed; they count as not right, which costs at most 1.7 points"
    assert page.text.index(warning) < page.text.index("Accuracy, %")
    assert warning in text
    shown = failures_of(collect(samples)["t"])
    assert [failure.kind for failure in shown[:3]] == ["error", "timeout", "wrong"]
    assert len(shown) == MAX_FAILURES_OF_TASK
    assert "the grader died" in page.text
    assert "20 of 50 outputs that are not right" in page.text
    is_open = [("open" in attributes) for tag, attributes in page.elements if tag == "details" and attributes.get("class") == "failures"]
    assert is_open == [True]


def test_no_kind_of_failure_crowds_out_another() -> None:
    samples = evaluation("t", 100, num_right=0)
    samples[99] |= {"verdict": "no_answer", "ending": "looping"}
    assert [failure.kind for failure in failures_of(collect(samples)["t"])[:3]] == ["looping", "wrong", "wrong"]


def test_comparisons_are_told_in_words(tmp_path: Path) -> None:
    a, b = evaluation("t", 40, num_right=30), evaluation("t", 40, num_right=10)
    page, text, results = write(tmp_path, a, [compare(a, b, "new <b>", "old"), compare(a, evaluation("other"), "new", "far")])
    assert "t: new <b> is better (p < 0.0001)" in page.text
    assert "75.0 against 25.0, +50.0 points" in page.text
    assert "They have no problem in common." in page.text
    assert "**t: new \\<b\\> is better (p \\< 0.0001)**" in text
    assert results["comparisons"][0]["tasks"]["t"]["only_a"] == 20


@pytest.mark.parametrize("field", ["task", "problem_id", "group", "output", "extracted", "gold", "reason", "prompt"])
def test_a_hostile_text_adds_no_element_and_no_row(field: str, tmp_path: Path) -> None:
    samples = evaluation("t", 12, num_right=6)
    # Problems keep names of their own, and lie in two groups.
    ends = [number if field == "problem_id" else number % 2 if field == "group" else "" for number in range(12)]
    tame, tame_text, _ = write(tmp_path, [one | {field: f"tame{end}"} for one, end in zip(samples, ends, strict=True)])
    page, text, _ = write(tmp_path, [one | {field: f"{HOSTILE}{end}"} for one, end in zip(samples, ends, strict=True)])
    assert [tag for tag, _ in page.elements if tag not in ("i", "b", "code")] == [
        tag for tag, _ in tame.elements if tag not in ("i", "b", "code")
    ]
    assert page.count("img") == 0
    assert len(page.scripts) == 2
    assert page.scripts[1] == tame.scripts[1]
    assert "</script><script>alert(1)</script>" in page.text
    assert text.count("\n") == tame_text.count("\n")
    assert [line.count(" | ") for line in text.splitlines()] == [line.count(" | ") for line in tame_text.splitlines()]


def test_hostile_settings_and_names_are_text(tmp_path: Path) -> None:
    samples = evaluation("t", 3)
    page, _, results = write(tmp_path, samples, [compare(samples, samples, HOSTILE, "b")], model=HOSTILE)
    assert page.count("img") == 0
    assert len(page.scripts) == 2
    assert results["model"] == HOSTILE


def test_the_page_asks_nothing_of_a_network_and_runs_its_own_script_only(tmp_path: Path) -> None:
    page, _, _ = write(tmp_path, evaluation("aime24"))
    policy = next(attributes["content"] or "" for tag, attributes in page.elements if attributes.get("http-equiv"))
    digest = b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert not {"src", "href", "action"} & set(attributes)
    assert "url(" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_long_texts_are_cut_in_the_middle_and_say_so(tmp_path: Path) -> None:
    text = "A" * 500_000 + "B" * 500_000
    page, _, _ = write(tmp_path, [sample("t", 1, is_right=False, output=text, prompt=text, extracted=text, gold=text, reason=text)])
    assert "[... 996,000 characters are left out here ...]" in page.text
    assert len(page.text) < 20_000
    assert cut("short", 3, 3) == "short"
    assert cut("0123456789", 2, 3) == "01\n[... 5 characters are left out here ...]\n789"


@pytest.mark.parametrize("prompt", ["plain text", [{"role": "user", "content": "plain text"}], [("user", "plain text")], []])
def test_a_prompt_may_be_text_or_turns(prompt: Any, tmp_path: Path) -> None:
    page, _, _ = write(tmp_path, [sample("t", 1, is_right=False, prompt=prompt)])
    assert ("plain text" in page.text) == bool(prompt)


def test_no_samples_one_sample_and_empty_outputs_are_reports_too(tmp_path: Path) -> None:
    page, text, results = write(tmp_path, [])
    assert "There are no samples yet." in page.text
    assert results["tasks"] == {}
    assert "| Task |" in text
    one, _, _ = write(tmp_path, [sample("t", 1)])
    assert "1 of" not in one.text
    refused = sample("t", 1, is_right=False, ending="refused", finish_reason="refused", completion_tokens=0, output="", verdict="no_answer")
    page, text, _ = write(tmp_path, [refused])
    assert "t: 1 of 1 prompts were refused" in page.text
    assert "chart-lengths-0" in page.ids()
    assert "| t | 0.0 |" in text


def test_the_same_results_make_the_same_files_and_a_failed_write_keeps_the_old_ones(tmp_path: Path) -> None:
    samples = evaluation("t")
    write(tmp_path, samples)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"results.json", "report.md", "report.html"}
    write(tmp_path, samples)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(KeyError):
        write_reports(tmp_path, {"tasks": {}}, [])
    assert (tmp_path / "report.html").read_bytes() == before["report.html"]


def big(num_samples: int) -> Iterator[dict[str, Any]]:
    for number in range(num_samples):
        yield sample(f"task-{number % 4}", number // 4, is_right=number % 3 == 0, output=f"{number} " * 3000)


def test_ten_thousand_long_outputs_make_a_small_page_in_seconds(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    write_reports(tmp_path, summarise(big(10_000)), big(10_000))
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_samples_beyond_the_bound_of_the_matrix_are_counted(tmp_path: Path) -> None:
    samples = (sample("t", number, output="") for number in range(25_000))
    page = collect(samples)["t"]
    assert page.counts.total() == 25_000
    assert sum(map(len, page.signs_of.values())) == 20_000


def test_statistics_and_report_need_no_torch() -> None:
    names = ("statistics", "endings", "summary", "golden", "report", "report_page")
    code = f"import sys, {', '.join(f'structcot.eval.{name}' for name in names)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_browser_runs_the_page_without_complaint(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is found")
    samples = [one for task in ("aime24", "mine") for one in evaluation(task, 30, 4)]
    for one in samples[:8]:
        one |= {"correct": False, "verdict": "wrong", "output": HOSTILE, "problem_id": HOSTILE, "sample": id(one)}
    write(tmp_path, samples)
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [browser, *flags, "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    page = Page(done.stdout)
    # The script has made sliders of the charts.
    assert sum(attributes.get("role") == "slider" for _, attributes in page.elements) == 3
    assert page.count("img") == 0


def test_the_paper_has_a_sign_for_each_row_that_stands_beside() -> None:
    from structcot.eval.report_plots import GOLDEN_SIGNS

    assert len(GOLDEN_SIGNS) == len(BESIDE)
