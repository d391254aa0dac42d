"""A curation from problems to shards: checked, in one format, chosen, mixed, the same bytes whatever stopped it on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structcot.curate.asking import ANSWERS
from structcot.curate.command import curate
from structcot.curate.config import MixConfig, SelectConfig, read_curate
from structcot.curate.mix import cell_of, counts_of
from structcot.curate.reformat import by_rule, fidelity, tagged
from structcot.curate.selection import fault_of, select
from structcot.curate.stages import REJECTED, StageFiles, read_records
from structcot.errors import ConfigError, StructcotError
from structcot.tags import read_answer
from tests.faulty_server import Exchange, FaultyServer, completion, says
from tests.tiny_run import DONE, WRONG, Site

NUM_PROBLEMS = 24
# Near duplicates are sought in a process of its own, which takes seconds to start.
ALONE = "duplicates.buckets=0"
SUM = re.compile(r"(\d+) \+ (\d+)")


def teacher(exchange: Exchange) -> None:
    """Thinks before it answers; some answers are wrong, have no thought, are cut off or empty, as the question and the seed say."""
    match = SUM.search(exchange.user())
    assert match, exchange.user()
    number = int(sha256(f"{match[0]} {exchange.body.get('seed')}".encode()).hexdigest(), 16)
    total = int(match[1]) + int(match[2]) + (10**7 if number % 4 == 0 else 0)
    steps = "\n\n".join(["Let me add.", *["Wait, check that again."] * (number % 5), f"It is {total}."])
    text = {
        5: f"It is \\boxed{{{total}}}, at once.",
        6: "",
        7: f"<think>\n{steps}",
    }.get(number % 9, f"<think>\n{steps}\n</think>\n\nThe sum is \\boxed{{{total}}}.")
    says(text, "length" if number % 9 == 7 else "stop")(exchange)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rng = Random(4)
    rows = [
        {"question": f"What is {(a := rng.randrange(10**6))} + {(b := rng.randrange(10**6))}?", "answer": str(a + b)}
        for _ in range(NUM_PROBLEMS)
    ]
    path.write_text("".join(json.dumps({**row, "level": number % 3}) + "\n" for number, row in enumerate(rows)))
    return path


@pytest.fixture
def config_path(problems: Path, tmp_path: Path) -> Path:
    path = tmp_path / "curate.toml"
    path.write_text(
        f"""title = "Sums"
output_dir = "{tmp_path / "out"}"
duplicates = {{buckets = 4, hashes = 2}}
contamination = {{benchmarks = ["{problems.parent / "kept_out.jsonl"}"]}}

[[sources]]
name = "sums"
path = "{problems}"
difficulty_field = "level"

[teacher]
url = "http://localhost:1"
model = "a-teacher"
samples = 3
temperature = 0.7

[output]
shard_records = 10
"""
    )
    (tmp_path / "kept_out.jsonl").write_text(
        json.dumps({"question": json.loads(problems.read_text().splitlines()[0])["question"], "answer": "1"})
    )
    return path


def outcome_of(directory: Path) -> dict[str, bytes]:
    paths = [*sorted((directory / "data").iterdir()), directory / "README.md", directory / "funnel.html", directory / "curate.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def stage_files(tmp_path: Path) -> StageFiles:
    return StageFiles(directory=tmp_path / "stage", before=None)


def record(answer: str, **more: Any) -> dict[str, Any]:
    return {"id": "a", "sample": 0, "answer": answer, "tests": [], "finish_reason": "stop", "completion_tokens": 5, **more}


# The whole


def test_problems_become_right_demonstrations(config_path: Path, tmp_path: Path) -> None:
    with FaultyServer(teacher) as server:
        facts = curate(config_path, [f"teacher.url={server.url!r}"])
        again = curate(config_path, [f"teacher.url={server.url!r}"])
        assert len(server.requests) == 3 * (NUM_PROBLEMS - 1), "one problem is a benchmark's, and nothing is asked twice"
    assert again == facts
    stages = {one["stage"]: one for one in facts["stages"]}
    assert list(stages) == ["prompts", "deduplicate", "decontaminate", "sample", "check", "reformat", "select", "mix"]
    for before, after in zip(facts["stages"], facts["stages"][1:], strict=False):
        assert after["read"] == before["kept"]
    for one in facts["stages"]:
        made = 3 if one["stage"] == "sample" else 1
        assert one["read"] * made == one["kept"] + sum(one["rejected"].values())
    assert stages["sample"]["rejected"] == {"the answer is empty": stages["sample"]["rejected"]["the answer is empty"]}
    assert "the answer is wrong" in stages["check"]["rejected"]
    shards = sorted((tmp_path / "out" / "data").glob("*.jsonl"))
    made = [one for path in shards for one in read_records(path)]
    assert len(shards) == -(-len(made) // 10)
    assert 10 < len(made) <= NUM_PROBLEMS - 1
    for one in made:
        system, user, assistant = one["messages"]
        match = SUM.search(user["content"])
        assert match
        answer = read_answer(assistant["content"])
        assert not answer.defect
        assert f"\\boxed{{{int(match[1]) + int(match[2])}}}" in answer.solution
        assert "long thinking process" in system["content"]
        assert user["content"].startswith("Return your final response within \\boxed{}. What is ")
        assert one["provenance"]["verdicts"] == {"math": "correct", "paper": "correct"}
        assert (one["provenance"]["teacher"], one["provenance"]["reformatted"]) == ("a-teacher", "rule")
        assert one["provenance"]["origin"].startswith(str(tmp_path / "sums.jsonl:"))


def test_the_data_is_what_a_training_reads(config_path: Path, site: Site, tmp_path: Path) -> None:
    import pyarrow.parquet

    with FaultyServer(teacher) as server:
        curate(config_path, [f"teacher.url={server.url!r}", ALONE])
    for suffix in (".jsonl", ".parquet"):
        paths = sorted(str(path) for path in (tmp_path / "out" / "data").glob(f"*{suffix}"))
        overrides = site.overrides(tmp_path / f"run{suffix}", f"data.train={json.dumps(paths)}", "data.control_tokens='text'")
        outcome = site.run("prepare", str(Path(__file__).parent.parent / "configs" / "tiny.toml"), *overrides)
        assert outcome.status == DONE, outcome.err
    table = pyarrow.parquet.read_table(tmp_path / "out" / "data" / "train-00000-of-00002.parquet")
    first = next(read_records(tmp_path / "out" / "data" / "train-00000-of-00002.jsonl"))
    assert table.column("messages")[0].as_py() == first["messages"]
    assert json.loads(table.column("provenance")[0].as_py()) == first["provenance"]


def test_a_changed_setting_runs_what_depends_on_it_and_asks_nothing_again(config_path: Path, tmp_path: Path) -> None:
    with FaultyServer(teacher) as server:
        url = f"teacher.url={server.url!r}"
        curate(config_path, [url])
        asked = len(server.requests)
        stages = tmp_path / "out" / "stages"
        written = {path.name: (path / "manifest.json").stat().st_mtime_ns for path in stages.iterdir()}
        facts = curate(config_path, [url, "select.per_problem=2", "output.shard_records=1000"])
        changed = {name for name, moment in written.items() if (stages / name / "manifest.json").stat().st_mtime_ns != moment}
        assert changed == {"7-select", "8-mix"}
        assert len(list((tmp_path / "out" / "data").iterdir())) == 2, "shards of the earlier call are gone"
        assert facts["stages"][-1]["kept"] > NUM_PROBLEMS - 1
        curate(config_path, [url, "teacher.samples=4"])
        assert len(server.requests) == asked + NUM_PROBLEMS - 1, "the fourth sample of each"


@pytest.mark.slow
def test_a_curation_killed_at_random_ends_with_the_same_bytes_and_pays_for_nothing_twice(config_path: Path, tmp_path: Path) -> None:
    def slowly(exchange: Exchange) -> None:
        time.sleep(0.02)
        teacher(exchange)

    with FaultyServer(slowly) as server:
        overrides = [f'teacher.url="{server.url}"', "teacher.concurrency=2"]
        curate(config_path, [*overrides, f'output_dir="{tmp_path / "undisturbed"}"'])
        undisturbed = outcome_of(tmp_path / "undisturbed")
        server.requests.clear()
        command = [sys.executable, "-m", "structcot.curate", str(config_path), *overrides]
        rng = Random(8)
        answers = tmp_path / "out" / "stages" / "4-sample" / ANSWERS
        paid: set[str] = set()
        for _ in range(5):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            wait_for(answers, len(paid) + rng.randrange(0, 12), process)
            time.sleep(rng.uniform(0.0, 0.1))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.1)  # what was in flight has arrived or not
            paid = {json.loads(line)["key"] for line in answers.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
        subprocess.run(command, check=True, capture_output=True)
        times = Counter(key_of(body) for body in server.requests)
    assert outcome_of(tmp_path / "out") == undisturbed
    assert len(times) == 3 * (NUM_PROBLEMS - 1)
    assert sum(times.values()) - len(times) <= 5 * 2, "only what was in flight at a kill is asked again"


def wait_for(answers: Path, count: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while (not answers.is_file() or answers.read_bytes().count(b"\n") < count) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def key_of(body: dict[str, Any]) -> tuple[str, int]:
    return body["messages"][-1]["content"], body["seed"]


# What a user may get wrong


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources=[]", "sources: got []"),
        ('teacher.modle="x"', "unknown key teacher.modle; did you mean teacher.model?"),
        ("teacher.samples=0", "teacher.samples: got 0"),
        ("teacher.max_dollars=5.0", "max_dollars: needs prompt_dollars and completion_dollars"),
        ("mix.sources={other=1.0}", "mix.sources: other is no source; there are sums"),
        ('check.graders=["math","math"]', "check.graders: math, math: one is there twice"),
        ('check.graders=["maths"]', "check.graders"),
        ('sources=[{name="a",path="a.jsonl",difficulty=[4.0,9.0]}]', "sources.a.difficulty: needs difficulty_field"),
        ('sources=[{name="a",path="a.jsonl",difficulty=[9.0,4.0]}]', "difficulty: got [9.0, 4.0]"),
        ('sources=[{name="a",path="a.jsonl",prompt="Solve it."}]', "prompt: has no {question}"),
        ('sources=[{name="a",path="a.jsonl"},{name="a",path="b.jsonl"}]', "sources: a, a: two have the same name"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(override: str, message: str, config_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        curate(config_path, [override])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_a_mistake_with_status_2_and_knows_its_stages(config_path: Path, site: Site, tmp_path: Path) -> None:
    outcome = site.run("curate", str(config_path), "--until", "prompt")
    assert outcome.status == WRONG
    assert outcome.message.startswith('--until: got "prompt"; use one of prompts, deduplicate, ')
    outcome = site.run("curate", str(config_path), "--until", "prompts", "--json", str(tmp_path / "facts.json"))
    assert outcome.status == DONE, outcome.err
    assert json.loads((tmp_path / "facts.json").read_text())["stages"][0]["kept"] == NUM_PROBLEMS
    assert not (tmp_path / "out" / "data").exists()


def test_stages_that_look_for_nothing_are_left_out(config_path: Path) -> None:
    with FaultyServer(teacher) as server:
        facts = curate(config_path, [f"teacher.url={server.url!r}", "duplicates.buckets=0", "contamination.benchmarks=[]"])
    assert [one["stage"] for one in facts["stages"]][:2] == ["prompts", "sample"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs" / "curate").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_configs_whose_shares_are_demonstrations(path: Path) -> None:
    config = read_curate(path)
    assert config.mix.total == 1000 * round(sum(config.mix.sources.values()))
    assert set(config.mix.sources) == {source.name for source in config.sources}


def test_a_written_config_loads_back(config_path: Path, tmp_path: Path) -> None:
    config = read_curate(config_path)
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert read_curate(tmp_path / "again.toml") == config


# One format


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>\na\n\nb\n</think>\n\nc", tagged("a\n\nb", "c")),
        ("a</think>c", tagged("a", "c")),
        (tagged("a", "c"), tagged("a", "c")),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>c<|end_of_solution|>", tagged("a", "c")),
    ],
)
def test_tagged_answers_come_into_the_format_by_rule(answer: str, text: str, tmp_path: Path) -> None:
    with stage_files(tmp_path) as files:
        by_rule(record(answer), files)
    kept = next(read_records(files.directory / "kept.jsonl"))
    assert kept["text"] == text
    assert kept["reformatted"] == ("as it was" if answer == text else "rule")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("a\n\nb\n\nc\n", tagged("a\n\nb", "c")),
        ("a\nb", tagged("a", "b")),
        ("<think>a\n\nb</think>c\n\nd", tagged("a\n\nb", "c\n\nd")),
    ],
)
def test_the_last_paragraph_is_the_solution_where_one_asks_for_that(answer: str, text: str, tmp_path: Path) -> None:
    with stage_files(tmp_path) as files:
        by_rule(record(answer), files, "last-paragraph")
        by_rule(record("one line"), files, "last-paragraph")
    assert [one["text"] for one in read_records(files.directory / "kept.jsonl")] == [text]
    assert dict(files.rejected) == {"there are no tags of a thought": 1}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("no tags", "there are no tags of a thought"),
        ("<think>a", "the tags are broken"),
        ("<think>a</think>b<think>c</think>d", "the tags are broken"),
        ("<think></think>c", "the thought or the solution is empty"),
        ("<think>a</think> \n", "the thought or the solution is empty"),
    ],
)
def test_what_has_no_thought_and_solution_falls(answer: str, reason: str, tmp_path: Path) -> None:
    with stage_files(tmp_path) as files:
        by_rule(record(answer), files)
    assert dict(files.rejected) == {reason: 1}
    assert next(read_records(files.directory / REJECTED))["answer"] == answer


def test_a_model_s_copy_counts_if_it_is_one(config_path: Path, tmp_path: Path) -> None:
    """The teacher writes without tags; the model that copies leaves words out, changes the answer or the format, for some."""

    def copier(exchange: Exchange) -> None:
        text = exchange.user()
        if "Copy it word by word" not in text:
            match = SUM.search(text)
            assert match
            says(f"First I add the tens of both. Then the rest. Then I check. It is \\boxed{{{int(match[1]) + int(match[2])}}}.")(exchange)
            return
        answer = text.partition("The answer:\n\n")[2]
        thought, _, rest = answer.partition("Then I check.")
        whole = tagged(f"{thought}Then I check.", rest.strip())
        box = re.search(r"boxed\{(\d+)\}", answer)
        assert box
        fault = int(box[1]) % 4
        wrong = answer.replace(box[1], "7")
        said = {1: whole.replace("Then the rest.", "..."), 2: tagged(thought, wrong.partition("Then I check.")[2]), 3: answer}.get(
            fault, whole
        )
        says(said)(exchange)

    with FaultyServer(copier) as server:
        settings = [f"teacher.url={server.url!r}", "teacher.samples=1", f'reformat.server={{url="{server.url}",model="a-copier"}}']
        facts = curate(config_path, settings)
    stages = {one["stage"]: one for one in facts["stages"]}
    assert set(stages["reformat"]["rejected"]) == {
        "the copy of the model has other words",
        "the copy of the model is not in the format",
    } | ({"the copy of the model gives another answer"} & set(stages["reformat"]["rejected"]))
    kept = list(read_records(tmp_path / "out" / "stages" / "6-reformat" / "kept.jsonl"))
    assert kept
    assert all(one["reformatted"] == "model" and one["fidelity"] >= 0.9 for one in kept)


def test_fidelity_falls_with_what_is_left_out_and_with_what_is_added() -> None:
    words = " ".join(map(str, range(100)))
    assert fidelity(words, words) == 1.0
    assert fidelity(words, words.replace(" 50 51 52 53 54", "")) == pytest.approx(0.95)
    assert fidelity(words, f"{words} a b c") == pytest.approx(100 / 103)
    assert fidelity(words, " ".join(map(str, range(99, -1, -1)))) == pytest.approx(0.01)
    assert fidelity("", "") == 0.0


# The choice


def test_answers_that_are_cut_or_loop_are_no_demonstrations(config_path: Path) -> None:
    config = read_curate(config_path, ["select.max_tokens=10"]).select
    fine = record("<think>a</think>b", text=tagged("a", "b"))
    assert fault_of(fine, config) == ""
    assert fault_of({**fine, "finish_reason": "length"}, config) == "the answer was cut off"
    assert fault_of({**fine, "completion_tokens": 11}, config) == "the answer is longer than select.max_tokens"
    loop = "Wait, let me check this once more, since it may be wrong. " * 30
    assert fault_of({**fine, "text": tagged(loop, "b")}, config) == "the thought loops"


def test_the_same_answer_to_a_problem_counts_once(tmp_path: Path) -> None:
    texts = {"a": ["It is 2.", "It  is\n2.", "It must be 2.", "It is 2."], "b": ["It is 2."]}
    records = [
        record("", id=problem, sample=number, text=tagged(thought, "2"))
        for problem, thoughts in texts.items()
        for number, thought in enumerate(thoughts)
    ]
    with stage_files(tmp_path) as files:
        select(SelectConfig(per_problem=3), iter(records), files)
    assert [(one["id"], one["sample"]) for one in read_records(files.directory / "kept.jsonl")] == [("a", 0), ("a", 2), ("b", 0)]
    fallen = [(one["sample"], one["rejected"]["reason"]) for one in read_records(files.directory / REJECTED)]
    assert fallen == [(1, "the same answer was there before"), (3, "the same answer was there before")]


@pytest.mark.parametrize("prefer", ["shortest", "most-structured"])
def test_the_preferred_answer_is_chosen(prefer: str, config_path: Path, tmp_path: Path) -> None:
    with FaultyServer(teacher) as server:
        curate(config_path, [f"teacher.url={server.url!r}", "teacher.samples=4", f'select.prefer="{prefer}"'])
    directory = tmp_path / "out" / "stages"
    everything = Counter(one["id"] for one in read_records(directory / "6-reformat" / "kept.jsonl"))
    kept = {one["id"]: one for one in read_records(directory / "7-select" / "kept.jsonl")}
    assert set(kept) == set(everything)
    for one in read_records(directory / "6-reformat" / "kept.jsonl"):
        chosen = kept[one["id"]]["text"]
        if prefer == "shortest":
            assert len(chosen) <= len(one["text"])
        else:
            assert chosen.count("Wait,") >= one["text"].count("Wait,")


# The mix

CELLS = st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "1", "5"])), st.integers(1, 50), min_size=1)
SHARES = st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 5.0), max_size=3)


@given(CELLS, SHARES, st.integers(0, 200))
def test_a_mix_takes_what_there_is_and_no_more_than_asked(
    available: dict[tuple[str, str], int], shares: dict[str, float], total: int
) -> None:
    counts = counts_of(available, MixConfig(total=total, sources=shares))
    assert set(counts) == set(available)
    assert all(0 <= counts[cell] <= available[cell] for cell in available)
    if total:
        assert sum(counts.values()) <= total
    if shares:
        assert all(not counts[cell] for cell in available if cell[0] not in shares)
    if not shares and not total:
        assert counts == available
    if not shares and total <= sum(available.values()) and total:
        assert sum(counts.values()) == total


def test_shares_hold_where_there_is_enough() -> None:
    available = {("a", ""): 100, ("b", ""): 100}
    assert counts_of(available, MixConfig(sources={"a": 3.0, "b": 1.0})) == {("a", ""): 100, ("b", ""): 33}
    assert counts_of(available, MixConfig(sources={"a": 3.0, "b": 1.0}, total=40)) == {("a", ""): 30, ("b", ""): 10}
    assert counts_of({("a", "1"): 100, ("a", "5"): 100}, MixConfig(difficulty={"1": 1.0, "5": 2.0}, total=30)) == {
        ("a", "1"): 10,
        ("a", "5"): 20,
    }


@pytest.mark.parametrize(("label", "bound"), [(None, ""), (0.5, ""), (1.0, "1"), (4.9, "1"), (5.0, "5"), (9.0, "5")])
def test_a_difficulty_lies_at_or_above_its_bound(label: float | None, bound: str) -> None:
    assert cell_of({"source": "a", "difficulty": label}, MixConfig(difficulty={"1": 1.0, "5": 2.0})) == ("a", bound)


def test_a_stage_that_fails_leaves_what_was_before(config_path: Path, tmp_path: Path) -> None:
    with FaultyServer(teacher) as server:
        url = f"teacher.url={server.url!r}"
        curate(config_path, [url, ALONE])
        before = outcome_of(tmp_path / "out")
        prices = ["teacher.prompt_dollars=1.0", "teacher.completion_dollars=1.0", "teacher.max_dollars=0.0001"]
        with pytest.raises(StructcotError, match="max_dollars"):
            curate(config_path, [url, ALONE, "teacher.samples=5", *prices])
    assert outcome_of(tmp_path / "out") == before


def test_answers_of_a_server_that_says_no_counts_are_kept(config_path: Path, tmp_path: Path) -> None:
    def uncounted(exchange: Exchange) -> None:
        match = SUM.search(exchange.user())
        assert match
        body = completion(f"<think>a</think>\\boxed{{{int(match[1]) + int(match[2])}}}")
        del body["usage"]
        exchange.send(200, json.dumps(body).encode())

    with FaultyServer(uncounted) as server:
        facts = curate(config_path, [f"teacher.url={server.url!r}", "teacher.samples=1", ALONE])
    assert facts["stages"][-1]["kept"] == NUM_PROBLEMS - 1
