"""The page of `structcot view`: nothing of the data becomes markup, nothing is lost, and steps are matched one to one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structcot.errors import ConfigError
from structcot.structure.markers import STEP_TYPES
from structcot.structure.segmenters import by_marker
from structcot.view import LINK_KINDS, write_view
from structcot.view_match import match_steps
from structcot.view_traces import ROW_FIELDS

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\x00\x07\x1b\x7f\u2028\u202e\"'&\\"
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


class Elements(HTMLParser):
    """Collects the elements of a page, and the texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.records: list[Any] = []
        self.facts: Any = None
        self.programs: list[str] = []
        self.inside: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.inside = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is None:
            return
        if self.inside.get("class") == "record":
            self.records.append(json.loads(data))
        elif self.inside.get("id") == "facts":
            self.facts = json.loads(data)
        else:
            self.programs.append(data)


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return str(path)


def read_page(path: Path) -> Elements:
    elements = Elements()
    elements.feed(path.read_text(encoding="utf-8"))
    return elements


def view(tmp_path: Path, records: list[Any], others: list[Any] | None = None) -> tuple[dict[str, Any], Elements]:
    source = write_lines(tmp_path / "in.jsonl", records)
    compare = None if others is None else write_lines(tmp_path / "other.jsonl", others)
    facts = write_view(source, tmp_path / "page.html", compare=compare)
    return facts, read_page(tmp_path / "page.html")


def named(row: list[Any]) -> dict[str, Any]:
    return dict(zip(ROW_FIELDS, row, strict=True))


def step_texts(row: dict[str, Any]) -> list[tuple[str, int]]:
    """Read the steps of a row as a browser does, over UTF-16 units."""
    units = row["text"].encode("utf-16-le", "surrogatepass")
    place, steps = row["bounds"][0], []
    for gap, length, kind in zip(*[iter(row["steps"])] * 3, strict=True):
        steps.append((units[2 * (place + gap) : 2 * (place + gap + length)].decode("utf-16-le", "surrogatepass"), kind))
        place += gap + length
    return steps


def test_a_record_that_holds_markup_adds_no_element_to_the_page(tmp_path: Path) -> None:
    plain = {"id": "1", "question": "q", "response": "<think>a</think>b", "steps": [{"start": 0, "end": 1, "type": "t"}]}
    hostile: dict[str, Any] = {"id": HOSTILE, "question": HOSTILE, "response": f"<think>{HOSTILE}</think>{HOSTILE}"}
    hostile["steps"] = [{"start": 0, "end": len(HOSTILE), "type": HOSTILE}]
    _, expected = view(tmp_path, [plain])
    _, page = view(tmp_path, [hostile])
    assert page.tags == expected.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    row = named(page.records[0][0])
    assert (row["text"], row["question"], row["name"]) == (hostile["response"], HOSTILE, HOSTILE)
    assert page.facts["types"] == [*STEP_TYPES, HOSTILE]


def test_a_hostile_line_or_file_name_adds_no_element_to_the_page(tmp_path: Path) -> None:
    _, expected = view(tmp_path, [])
    source = write_lines(tmp_path / "<img onerror=x>&.jsonl", [{"<script>alert(1)</script>": 1}])
    write_view(source, tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert page.tags == expected.tags
    assert page.facts["num_unusable"] == 1


def test_the_policy_lets_the_script_of_the_page_run_and_no_other(tmp_path: Path) -> None:
    _, page = view(tmp_path, [{"response": "x"}])
    (program,) = page.programs
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", program)


def test_a_lone_surrogate_reaches_the_page_as_it_was(tmp_path: Path) -> None:
    facts, page = view(tmp_path, ['{"response": "<think>a \\ud800 b. Wait, \\\\ud800.</think>"}'])
    assert named(page.records[0][0])["text"] == "<think>a \ud800 b. Wait, \\ud800.</think>"
    assert facts["traces"] == 1


def test_an_empty_file_gives_a_page_without_records(tmp_path: Path) -> None:
    facts, page = view(tmp_path, [])
    assert facts == {"page": str(tmp_path / "page.html"), "traces": 0, "unusable": []}
    assert page.records == []


def test_lines_without_a_trace_are_reported_with_their_place_and_reason(tmp_path: Path) -> None:
    facts, page = view(tmp_path, ["not json", "", {"response": "fine"}, {"other": 1}, {"response": ""}])
    assert facts["traces"] == 1
    assert [line["source"].rsplit(":", 1)[1] for line in facts["unusable"]] == ["1", "4", "5"]
    assert "not JSON" in facts["unusable"][0]["reason"]
    assert [source for source, _ in page.facts["unusable"]] == [line["source"] for line in facts["unusable"]]


def test_steps_cover_the_thought_where_signs_take_two_units(tmp_path: Path) -> None:
    thought = "Think \U0001f914 first. Wait, \U0001d4d0 is wrong. So the answer is \U0001f600."
    _, page = view(tmp_path, [{"response": f"\U0001f914<think>{thought}</think>4 \U0001f600"}])
    row = named(page.records[0][0])
    texts = step_texts(row)
    assert "".join(text for text, _ in texts) == thought
    assert [(text, STEP_TYPES[kind]) for text, kind in texts] == [
        (thought[step.start : step.end], step.type) for step in by_marker(thought)
    ]
    assert len(texts) > 1
    units = row["text"].encode("utf-16-le")
    assert units[2 * row["bounds"][2] : 2 * row["bounds"][3]].decode("utf-16-le") == "4 \U0001f600"


def test_steps_of_the_record_are_shown_as_they_are_with_gaps_and_new_types(tmp_path: Path) -> None:
    steps = [{"start": 1, "end": 3, "type": "adding-knowledge"}, {"start": 4, "end": 6, "type": "deduction"}]
    _, page = view(tmp_path, [{"response": "<think>abcdefg</think>", "steps": steps}])
    row = named(page.records[0][0])
    assert [(text, page.facts["types"][kind]) for text, kind in step_texts(row)] == [("bc", "adding-knowledge"), ("ef", "deduction")]
    assert row["note"] == ""


WHOLE = {"start": 0, "end": 3, "type": "deduction"}
UNFIT_STEPS = (
    "none",
    [1],
    [WHOLE | {"end": 99}],
    [WHOLE | {"start": 4}],
    [WHOLE, WHOLE],
    [{"start": 0, "end": 1}],
    [WHOLE | {"start": True}],
)


@pytest.mark.parametrize("steps", UNFIT_STEPS)
def test_steps_that_do_not_fit_the_thought_are_told_by_markers_and_that_is_said(tmp_path: Path, steps: Any) -> None:
    _, page = view(tmp_path, [{"response": "<think>abcdefg</think>", "steps": steps}])
    row = named(page.records[0][0])
    assert [text for text, _ in step_texts(row)] == ["abcdefg"]
    assert "do not fit" in row["note"]


def test_a_row_says_what_the_record_is_about_and_whether_it_is_correct(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": "first?"}, {"role": "assistant", "content": "<think>x"}], "correct": False},
        {"problem": {"problem": "nested?"}, "solution": "x", "is_correct": True},
        {"response": "x", "score": 1},
    ]
    _, page = view(tmp_path, records)
    rows = [named(record[0]) for record in page.records]
    assert [row["question"] for row in rows] == ["first?", "nested?", ""]
    assert [row["is_correct"] for row in rows] == [0, 1, -1]
    assert [(row["is_closed"], row["defect"]) for row in rows[:2]] == [(0, "the thought is never closed"), (0, "no thought tags")]


def test_records_are_matched_by_identity_and_repeated_ones_in_their_order(tmp_path: Path) -> None:
    here, there = (
        [{"id": item[0], "response": f"<think>{item[2:]}</think>"} for item in items.split(", ")]
        for items in ("a one, b two, a three, c four", "d five, a ONE, a THREE, a six")
    )
    facts, page = view(tmp_path, here, there)
    assert (facts["matched"], facts["only_here"], facts["only_there"], facts["traces"]) == (2, 2, 2, 6)
    thoughts = [[named(row)["text"][7:-8] for row in record[:2]] for record in page.records]
    assert thoughts == [["one", "ONE"], ["two"], ["three", "THREE"], ["four"], ["five"], ["six"]]
    assert [named(record[0])["side"] for record in page.records] == [0, 0, 0, 0, 1, 1]


def test_a_file_beside_itself_has_only_kept_steps(tmp_path: Path) -> None:
    records = [{"response": "<think>First this. Wait, no. Then that. Wait, no.</think>", "number": number} for number in range(3)]
    facts, page = view(tmp_path, records, records)
    assert facts["matched"] == 3
    for _, _, links in page.records:
        assert set(links[::3]) == {LINK_KINDS.index("kept")}
        assert links[1::3] == links[2::3]


def test_a_page_is_not_replaced_by_half_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(ConfigError, match="cannot be read"):
        write_view(str(tmp_path / "missing.jsonl"), page)
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_what_cannot_work_is_refused_with_the_option_to_change(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"response": "x"}])
    with pytest.raises(ConfigError, match="is a file to read"):
        write_view(source, Path(source))
    with pytest.raises(ConfigError, match="is no folder"):
        write_view(source, tmp_path / "missing" / "page.html")
    with pytest.raises(ConfigError, match="read twice"):
        write_view(source, tmp_path / "page.html", compare="-")


def test_the_command_and_the_module_are_the_same(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"text": "x"}])
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "structcot.view", source, "-o", str(page), "--field", "text"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(page)
    assert len(read_page(page).records) == 1


def test_real_traces_are_shown_whole(tmp_path: Path) -> None:
    source = DATA / "traces" / "r1_distill.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    facts = write_view(str(source), tmp_path / "page.html")
    rows = [named(record[0]) for record in read_page(tmp_path / "page.html").records]
    assert (facts["traces"], facts["unusable"]) == (77, [])
    texts = [json.loads(line)["solution"] for line in source.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        start, end = row["bounds"][:2]
        assert "".join(text for text, _ in step_texts(row)).encode("utf-16-le") == row["text"].encode("utf-16-le")[2 * start : 2 * end]


STEPS = st.lists(st.sampled_from(["a b c", "a b d", "x", "y 1 2", "y 3 4", "", " x "]), max_size=14)


@given(STEPS, STEPS)
def test_every_step_of_either_thought_is_in_exactly_one_link(here: list[str], there: list[str]) -> None:
    links = match_steps(here, there)
    assert [link.here for link in links if link.kind != "inserted"] == list(range(len(here)))
    assert sorted(link.there for link in links if link.there is not None) == list(range(len(there)))
    for link in links:
        assert (link.here is None) == (link.kind == "inserted")
        assert (link.there is None) == (link.kind == "deleted")


@given(STEPS, STEPS)
def test_kept_steps_are_a_longest_common_subsequence_and_no_same_step_is_left(here: list[str], there: list[str]) -> None:
    links = match_steps(here, there)
    here, there = [text.strip() for text in here], [text.strip() for text in there]
    kept = [(link.here, link.there) for link in links if link.kind == "kept"]
    assert [right for _, right in kept] == sorted(right for _, right in kept if right is not None)
    longest = [[0] * (len(there) + 1) for _ in range(len(here) + 1)]
    for left, text in enumerate(here):
        for right, other in enumerate(there):
            without = max(longest[left][right + 1], longest[left + 1][right])
            longest[left + 1][right + 1] = longest[left][right] + 1 if text == other else without
    assert len(kept) == longest[-1][-1]
    same = [link for link in links if link.kind in ("kept", "moved")]
    assert all(here[link.here or 0] == there[link.there or 0] for link in same)
    assert len(same) == (Counter(here) & Counter(there)).total()


def test_a_step_that_changes_its_place_is_moved() -> None:
    links = match_steps(["a", "b", "c", "d"], ["b", "c", "d", "a"])
    assert [(link.kind, link.here, link.there) for link in links] == [("moved", 0, 3), ("kept", 1, 0), ("kept", 2, 1), ("kept", 3, 2)]


def test_a_deleted_first_repetition_leaves_the_second_in_place() -> None:
    links = match_steps(["a", "x", "a", "y"], ["x", "a", "y"])
    assert [link.kind for link in links] == ["deleted", "kept", "kept", "kept"]


def test_a_step_with_other_digits_is_changed_and_one_with_other_words_is_not() -> None:
    links = match_steps(["start", "So 12 + 7 = 19.", "end"], ["start", "So 58 + 3 = 91.", "end"])
    assert [link.kind for link in links] == ["kept", "changed", "kept"]
    links = match_steps(["start", "The sum is even.", "end"], ["start", "Bananas grow on plants.", "end"])
    assert [link.kind for link in links] == ["kept", "deleted", "kept", "inserted"]


def test_a_step_like_one_in_another_gap_is_not_changed() -> None:
    links = match_steps(["one two three four", "middle"], ["middle", "one two three five"])
    assert [link.kind for link in links] == ["deleted", "kept", "inserted"]


def test_thoughts_that_loop_are_matched_in_time() -> None:
    links = match_steps(["again", "and again"] * 3000, ["and again", "again"] * 2500 + ["new"])
    counts = Counter(link.kind for link in links)
    assert (counts["deleted"], counts["inserted"]) == (1000, 1)
