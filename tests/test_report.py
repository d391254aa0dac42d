"""The report page: right at every moment of a run, closed to the network and to what stands in the data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from structcot.errors import ConfigError
from structcot.report import json_for_script, write_report
from structcot.report_charts import Series, log_axis, nice_axis, number, rows_to_draw, smooth

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"
CHART_KEYS = ("loss", "learning-rate", "gradient-norm", "tokens-per-second", "lengths")
PLAN = {
    "samples": 1000,
    "tokens": 5_000_000,
    "supervised_tokens": 4_000_000,
    "dropped": 3,
    "truncated": 0,
    "steps": 60,
    "steps_per_epoch": 20,
    "imbalance": 1.02,
    "hash": "ab" * 32,
    "length_histogram": {"edges_tokens": [0, 1024, 2048, 4096], "samples": [100, 700, 200]},
}
PIECES = [
    {"id": 151644, "text": "<|im_start|>", "trained": "no"},
    {"id": 872, "text": "user\n", "trained": "no"},
    {"id": 11, "text": " 2+2?", "trained": "no"},
    {"id": 12, "text": "Let me \u8003\u3048\u308b \U0001f914", "trained": "thought"},
    {"id": 13, "text": " wait", "trained": "thought"},
    {"id": 14, "text": "4", "trained": "solution"},
    {"id": 151645, "text": "<|im_end|>", "trained": "end"},
]


def metrics_row(step: int, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl as a run writes it."""
    loss = 0.6 + 0.8 * math.exp(-step / 20)
    return {
        "step": step,
        "epoch": step / 20,
        "train/loss": loss,
        "train/grad_norm": 0.5 + 0.1 * math.sin(step),
        "train/learning_rate": 1e-4 * min(1.0, step / 6),
        "loss/thought": 1.1 * loss,
        "loss/solution": 0.7 * loss,
        "loss/end": 0.1 * loss,
        "perf/tokens_per_second": 31_000.0 + step % 7,
        "perf/supervised_tokens_per_second": 25_000.0,
        "perf/mfu_4n": 0.41,
        "memory/peak_gib": 61.5,
        "time/step_seconds": 12.0,
        "time/data_seconds": 0.06,
    } | changes


def write_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_proof(run_dir: Path, pieces: list[dict[str, Any]], **changes: Any) -> None:
    supervised = sum(piece["trained"] != "no" for piece in pieces)
    proof = {"source": "train.jsonl:7", "tokens": len(pieces), "supervised_tokens": supervised, "pieces": pieces} | changes
    (run_dir / "data" / "proof.json").write_text(json.dumps(proof))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 40 steps out of 60 with every file that the page reads."""
    run_dir = tmp_path / "a-run"
    (run_dir / "data").mkdir(parents=True)
    (run_dir / "adapter").mkdir()
    write_metrics(run_dir, [metrics_row(step) for step in range(1, 41)])
    write_proof(run_dir, PIECES)
    (run_dir / "data" / "plan.json").write_text(json.dumps(PLAN))
    rejected = [{"source": f"train.jsonl:{line}", "reason": "too long", "tokens": 20_000} for line in (3, 9)]
    rejected.append({"source": "train.jsonl:5", "reason": "no answer", "tokens": 12})
    (run_dir / "data" / "rejected.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rejected))
    (run_dir / "config.toml").write_text(
        'model_name_or_path = "Qwen/Qwen2.5-32B-Instruct"\n[tuning]\nmethod = "lora"\nlora_r = 64\nlora_alpha = 128.0\n'
        'lora_target_modules = "all-linear"\n[train]\nmax_grad_norm = 1.0\n'
    )
    (run_dir / "manifest.json").write_text(json.dumps({"data": "cd" * 32, "packages": {"torch": "2.13.0"}}))
    (run_dir / "adapter" / "certificate.json").write_text(json.dumps({"logits": {"passed": True, "largest_difference": 0.0}}))
    return run_dir


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text of each id's element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    def readouts(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_page_shows_every_part_of_a_run(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert {f"chart-{key}" for key in CHART_KEYS} <= page.ids()
    assert set(page.readouts()) == set(CHART_KEYS)
    for text in ("Qwen2.5-32B-Instruct", "LoRA, rank 64", "40 of 60", "80.0 %", "too long", "2.13.0", "Passed.", "4 min to go"):
        assert text in page.text
    loss = f"{number(metrics_row(1)['train/loss'])} \u2192 {number(metrics_row(40)['train/loss'])}"
    assert loss in page.text
    assert "\u221248" in page.text.split(loss)[1][:10]
    assert "chart-source-loss" not in page.ids()


def test_page_asks_nothing_of_a_network(run_dir: Path) -> None:
    path = write_report(run_dir)
    text = path.read_text(encoding="utf-8")
    for _, attributes in Page(text).elements:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes)
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b[ (]", text)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text(run_dir: Path) -> None:
    harmless = page_of(run_dir)
    write_metrics(run_dir, [metrics_row(step, **{f"loss/source/{HOSTILE}": 1.0}) for step in (1, 2)])
    write_proof(run_dir, [{"id": HOSTILE, "text": HOSTILE, "trained": "thought"}] * 2, source=HOSTILE)
    (run_dir / "data" / "rejected.jsonl").write_text(json.dumps({"source": HOSTILE, "reason": HOSTILE, "tokens": 1}) + "\n")
    (run_dir / "config.toml").write_text(f"model_name_or_path = '''{HOSTILE}'''\n[tuning]\nmethod='lora'\nlora_alpha='''{HOSTILE}'''\n")
    for name in ("manifest.json", "adapter/certificate.json"):
        (run_dir / name).write_text(json.dumps({HOSTILE: HOSTILE}))
    (run_dir / "data" / "plan.json").write_text(json.dumps(PLAN | {HOSTILE: HOSTILE, "hash": HOSTILE}))
    page = page_of(run_dir)
    assert len(page.scripts) == len(harmless.scripts) == 2
    assert page.scripts[1] == harmless.scripts[1]
    assert "img" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 12
    assert "<" not in json_for_script({HOSTILE: HOSTILE})
    assert json.loads(json_for_script({HOSTILE: HOSTILE})) == {HOSTILE: HOSTILE}


def test_signs_that_act_unseen_are_shown_by_name(run_dir: Path) -> None:
    write_proof(run_dir, [{"id": 1, "text": "a\u202eb\u200bc\x00d\r", "trained": "thought"}, {"id": 2, "text": "\ud83d", "trained": "end"}])
    text = page_of(run_dir).text
    assert "a\u27e8U+202E\u27e9b\u27e8U+200B\u27e9c\u2400d\u240d" in text
    assert "\\ud83d" in text


def test_half_written_last_line_is_no_news_and_a_broken_line_is(run_dir: Path) -> None:
    whole = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(whole + '{"step": 41, "train/lo')
    page = page_of(run_dir)
    assert "40 of 60" in page.text
    assert "left out" not in page.text
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "tr\n' + whole)
    assert "the first is line 1" in page_of(run_dir).text


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "manifest.json", "data", "data/plan.json", "data/proof.json", "adapter"])
def test_any_file_may_be_missing(run_dir: Path, name: str) -> None:
    gone = run_dir / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    page = page_of(run_dir)
    assert {f"chart-{key}" for key in CHART_KEYS} <= page.ids()
    assert "cannot be read" not in page.text


def test_empty_directory_makes_a_page_and_no_directory_an_error(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert {f"chart-{key}" for key in CHART_KEYS} <= page.ids()
    assert page.text.count("is not there or not whole yet.") == 4
    with pytest.raises(ConfigError, match="output_dir of a run"):
        write_report(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["manifest.json", "data/plan.json", "data/proof.json", "adapter/certificate.json", "config.toml"])
@pytest.mark.parametrize("content", ['{"half', "[1, 2]", "\x00", "\u00ff"])
def test_broken_file_is_named_and_hides_nothing_else(run_dir: Path, name: str, content: str) -> None:
    (run_dir / name).write_text(content, encoding="latin-1")
    page = page_of(run_dir)
    assert f"{Path(name).name} " in page.text
    assert "step 1 to step 40" in page.text


def test_one_step_is_a_page(run_dir: Path) -> None:
    write_metrics(run_dir, [metrics_row(1)])
    page = page_of(run_dir)
    assert page.readouts()["loss"]["x"] == [50.0]
    assert "1 of 60" in page.text


def test_null_and_not_finite_values_are_neither_drawn_nor_hidden(run_dir: Path) -> None:
    rows = [metrics_row(step) for step in range(1, 41)]
    rows[10] |= {"loss/thought": None, "loss/end": None}
    rows[19] |= {"train/loss": math.nan, "train/grad_norm": math.inf, "perf/mfu_4n": None}
    write_metrics(run_dir, rows)
    path = write_report(run_dir)
    page = Page(path.read_text(encoding="utf-8"))
    thought = page.readouts()["loss"]["texts"][1]
    assert thought[10] == f"{number(rows[9]['loss/thought'])} at 10"
    assert page.readouts()["loss"]["texts"][0][19] == "nan"
    assert page.text.count("values that are not finite") == 2
    paths = [attributes["d"] or "" for tag, attributes in page.elements if tag == "path"]
    assert not re.search("nan|inf", " ".join(paths))
    whole = next(attributes["d"] or "" for _, attributes in page.elements if attributes.get("class") == "raw s-whole")
    assert (whole.count("M"), whole.count("L")) == (2, 37)


def test_resumed_steps_count_once_and_the_later_ones_win(run_dir: Path) -> None:
    rows = [metrics_row(step) for step in (1, 2, 3)] + [metrics_row(step, **{"train/loss": 0.25}) for step in (2, 3)]
    write_metrics(run_dir, rows)
    page = page_of(run_dir)
    assert "3 of 60" in page.text
    assert "there again after a resume: 2" in page.text
    assert page.readouts()["loss"]["texts"][0][1:] == ["0.25", "0.25"]


def test_proof_shows_each_token_with_its_kind_and_counts_them(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    counts = dict(re.findall(r'<li><span class="run (\w+)">[^<]*</span> ([\d,]+)</li>', html))
    assert counts == {"no": "3", "thought": "2", "solution": "1", "end": "1"}
    runs = re.findall(r'<span class="run (\w+)" data-kind', html)
    assert runs == ["no", "thought", "solution", "end"]
    assert '<span title="token 6, id 151645">&lt;|im_end|&gt;</span>' in html
    assert "4 of its 7 tokens are trained on" in html
    assert "".join(piece["text"] for piece in PIECES) in Page(html).text
    assert "claims" not in html


def test_proof_names_rare_kinds_where_they_are(run_dir: Path) -> None:
    assert "unknown kind" not in page_of(run_dir).text
    write_proof(run_dir, [*PIECES, {"id": 1, "text": "", "trained": "prompt"}, {"id": 2, "text": "x", "trained": ["?"]}])
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert re.findall(r'<span class="run (\w+)">[^<]*</span> 1<', html) == ["solution", "end", "prompt", "other"]
    assert 'title="token 7, id 1, part of the character before it"' in html


def test_proof_says_where_the_counts_of_the_file_are_wrong(run_dir: Path) -> None:
    write_proof(run_dir, PIECES, supervised_tokens=5)
    assert "claims 5 supervised_tokens, but shows 4" in page_of(run_dir).text


def test_long_sample_shows_both_ends_and_says_what_is_left_out(run_dir: Path) -> None:
    pieces = [{"id": 7, "text": f" w{index}", "trained": "thought" if index < 8000 else "solution"} for index in range(9000)]
    write_proof(run_dir, pieces)
    page = page_of(run_dir)
    titles = [attributes["title"] for _, attributes in page.elements if "title" in attributes]
    assert len(titles) == 5000
    assert (titles[2499], titles[2500]) == ("token 2,499, id 7", "token 6,500, id 7")
    assert "Tokens 2,500 to 6,499 are not shown here: 4,000 thought." in page.text
    assert "9,000 of its 9,000 tokens" in page.text


def test_rejected_records_are_counted_by_reason(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<tr><td>too long</td><td>2</td><td>40,000</td><td>train.jsonl:3</td></tr><tr><td>no answer</td><td>1</td>" in html


def test_certificate_that_failed_says_so(run_dir: Path) -> None:
    (run_dir / "adapter" / "certificate.json").write_text(json.dumps({"a": {"passed": True}, "b": {"passed": False}}))
    assert "Failed." in page_of(run_dir).text


def test_sources_get_a_chart_of_their_own(run_dir: Path) -> None:
    names = [f"set-{index}" for index in range(10)]
    write_metrics(run_dir, [metrics_row(step, **{f"loss/source/{name}": 1.0 for name in names[: step + 7]}) for step in (1, 2, 3)])
    page = page_of(run_dir)
    assert len(page.readouts()["source-loss"]["texts"]) == 8
    assert "the 8 of 10 sources with the most steps" in page.text


def test_fifty_thousand_steps_are_fast_and_no_spike_is_lost(run_dir: Path) -> None:
    rows = [metrics_row(step) for step in range(1, 50_001)]
    rows[33_333]["train/loss"] = 9.87
    write_metrics(run_dir, rows)
    start = time.perf_counter()
    path = write_report(run_dir)
    assert time.perf_counter() - start < 10  # 2 s on one idle core; the machine that tests may be a busy one
    assert path.stat().st_size < 2_500_000
    page = Page(path.read_text(encoding="utf-8"))
    place = page.readouts()["loss"]["at"].index("step 33,334")
    assert page.readouts()["loss"]["texts"][0][place] == "9.87"


def test_failed_write_keeps_the_old_page_and_leaves_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(run_dir).read_text(encoding="utf-8")
    write_metrics(run_dir, [metrics_row(1)])

    def full_disk(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text(encoding="utf-8") == old
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".report")]


def test_same_files_make_the_same_page(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.61234, "0.6123"), (1234.56, "1,234.6"), (2000.0, "2,000"), (98_765.4, "98,765"), (9.8e-05, "9.8e-5"), (1e-4, "1e-4")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0.3, 1.4), (0, 1e-4), (-3, 7e8), (5, 5), (0, 0), (1e6, 1e6 + 1e-9), (-1e30, 1e30)])
def test_axis_encloses_its_values_with_few_even_ticks(low: float, high: float) -> None:
    axis = nice_axis(low, high)
    slack = 1e-9 * (axis.high - axis.low)
    assert axis.low - slack <= low <= high <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 7
    gaps = [right - left for left, right in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert max(gaps) == pytest.approx(min(gaps))


def test_log_axis_has_whole_decades() -> None:
    assert log_axis(0.02, 350).ticks == pytest.approx((0.01, 0.1, 1, 10, 100, 1000))
    assert log_axis(1e-20, 1e20).high >= 1e20
    assert len(log_axis(1e-20, 1e20).ticks) <= 8


def test_mean_over_neighbours_does_not_lag_and_skips_gaps() -> None:
    assert smooth([2.0] * 5, 101, range(5)) == pytest.approx([2.0] * 5)
    assert smooth([1.0, 2.0, None, 6.0, math.nan, 4.0], 3, range(6)) == pytest.approx([1.0, 1.5, None, 6.0, None, 4.0])
    falling = [float(-row) for row in range(50)]
    assert smooth(falling, 11, [0, 3, 49]) == pytest.approx([0.0, -3.0, -49.0])


def test_drawn_rows_keep_extremes_of_every_series() -> None:
    first, second = [0.0] * 20_000, [0.0] * 20_000
    first[777], second[19_001], second[5] = 5.0, -5.0, math.nan
    rows = rows_to_draw([Series(name="a", style="", values=first), Series(name="b", style="", values=second)], 20_000)
    assert {0, 5, 777, 19_001, 19_999} <= set(rows)
    assert len(rows) < 2_000


@pytest.mark.slow
def test_a_browser_runs_the_page_without_complaint(run_dir: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: install it to see the page run in a browser")
    path = write_report(run_dir)
    # The page's policy forbids a foreign script, so the one that plays the reader needs it lifted.
    moves = """<script>
      const loss = document.querySelector("#chart-loss .plot");
      loss.dispatchEvent(new PointerEvent("pointermove", {clientX: loss.getBoundingClientRect().left + 1}));
      document.querySelector("#chart-lengths .plot").dispatchEvent(new KeyboardEvent("keydown", {key: "Home"}));
      for (let i = 0; i < 4; i++) document.querySelector(".tokens").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
    </script>"""
    played = run_dir / "played.html"
    played.write_text(re.sub("<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8")) + moves, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    for page in (path, played):
        seen = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in seen.stderr
        # The script gives each chart its keys: no chart is a slider unless it ran to the end.
        assert seen.stdout.count('role="slider"') == len(CHART_KEYS)
    for text in ('<span class="at">step 1</span>', '<span class="at">0 to 1,024 tokens</span>', "token 3, id 12, thought"):
        assert text in seen.stdout
