"""A study from its file to its results: what it makes, how it goes on after whatever stopped it, and what one failure leaves standing.

Stand-ins take the place of the commands (tests/study_site.py), but for the last tests, which are marked slow.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from structcot.countdown import write_countdown
from structcot.errors import ConfigError, DataError, StoppedWithCheckpoint, StructcotError
from structcot.rundir import hold
from structcot.study import runner
from structcot.study.progress import Standing, clock, headline, show, table
from tests.study_site import StudySite, make_study_site, questions_of
from tests.tiny_models import tiny_chat_model
from tests.tiny_run import DONE, ROOT, STOPPED, demonstration, read_jsonl, write_jsonl

CELLS = ["base", "clean-s0", "digits-50-s0", "digits-100-s0"]
STAGES = {
    "eval base": 1,
    **{f"{stage} {cell}": 1 for cell in CELLS[1:] for stage in ("train", "eval")},
    **{f"{stage} {cell}": 1 for cell in CELLS[2:] for stage in ("data", "held_out")},
}


@pytest.fixture
def study(tmp_path: Path) -> StudySite:
    return make_study_site(tmp_path / "site")


def wait_until_logged(study: StudySite, what: str, stage: str) -> None:
    deadline = time.monotonic() + 30
    while not study.logged(what)[stage]:
        assert time.monotonic() < deadline, study.log_path.read_text()
        time.sleep(0.01)


def config_of(study: StudySite, cell: str, name: str) -> dict:
    return tomllib.loads((study.directory / "out" / "cells" / cell / f"{name}.toml").read_text())


# From end to end


def test_every_cell_is_made_once_and_the_second_call_does_nothing(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = study.call(monkeypatch)
    assert list(outcome.facts) == CELLS
    assert study.logged("start") == study.logged() == STAGES
    record = study.record("digits-50-s0")
    assert (record["status"], record["error"]) == ("done", "")
    assert list(record["stages"]) == ["data", "held_out", "train", "eval"]
    assert record["commands"][0] == (
        "structcot perturb out/data/demonstrations.jsonl out/cells/digits-50-s0/data.jsonl"
        " --kind digits --fraction 0.5 --seed 0 --mode clean"
    )
    assert study.call(monkeypatch) == outcome
    assert study.logged("start") == STAGES


def test_the_reference_is_started_right_after_the_base(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    study.call(monkeypatch, 'reference="plain"', 'variants=[{kind="digits"},{name="plain"}]')
    cells = [Path(line.split()[2]).parts[2] for line in study.log_path.read_text().splitlines()]
    assert list(dict.fromkeys(cells)) == ["base", "plain-s0", "digits-100-s0"]


def test_configs_of_a_cell_hold_what_the_study_sets(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    study.call(monkeypatch, "seeds=[3]")
    train = config_of(study, "digits-50-s3", "train")
    assert (train["seed"], train["model_name_or_path"], train["output_dir"]) == (3, "model", "out/cells/digits-50-s3/run")
    assert [source["path"] for source in train["data"]["train"]] == ["out/cells/digits-50-s3/data.jsonl"]
    assert [source["path"] for source in train["data"]["eval"]] == ["out/data/held_out.jsonl"]
    assert train["data"]["eval_fraction"] == 0.0
    evaluation = config_of(study, "digits-50-s3", "eval")
    assert (evaluation["seed"], evaluation["adapter"]) == (3, "out/cells/digits-50-s3/run/adapter")
    assert config_of(study, "clean-s3", "train")["data"]["train"][0]["path"] == "out/data/demonstrations.jsonl"
    assert (config_of(study, "base", "eval")["adapter"], config_of(study, "base", "eval")["seed"]) == ("", 3)


def test_settings_of_their_own_model_have_a_base_of_their_own(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (
        'settings=[{name="r4",overrides=["tuning.lora_r=4"]},{name="full",model_name_or_path="owner/x",overrides=["tuning.method=full"]}]'
    )
    outcome = study.call(monkeypatch, settings, 'variants=[{name="clean"}]')
    assert list(outcome.facts) == ["base", "full-base", "r4-clean-s0", "full-clean-s0"]
    assert config_of(study, "r4-clean-s0", "train")["tuning"]["lora_r"] == 4
    evaluation = config_of(study, "full-clean-s0", "eval")
    assert (evaluation["model_name_or_path"], evaluation["adapter"]) == ("out/cells/full-clean-s0/run/model", "")
    assert config_of(study, "full-base", "eval")["model_name_or_path"] == "owner/x"


def test_problems_are_asked_as_the_demonstrations_were(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(study.directory / "demos.jsonl", [{"system": "Think.", **demonstration(number)} for number in range(12)])
    study.call(monkeypatch, 'variants=[{name="clean"}]')
    evaluation = config_of(study, "clean-s0", "eval")
    assert [(task["name"], task["template"]) for task in evaluation["tasks"]] == [("problems", "{question}")]
    assert evaluation["system_prompt"] == "Think."


# Data


def test_what_is_asked_or_held_out_is_never_trained_on(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    again = [demonstration(number) for number in (0, 8, 3, 11)]  # 8 becomes a problem, 11 is held out
    write_jsonl(study.directory / "demos.jsonl", again + [demonstration(number) for number in range(12)])
    write_jsonl(study.directory / "short.jsonl", [demonstration(number, f"\\boxed{{{2 * number}}}") for number in range(9, -1, -1)])
    write_jsonl(study.directory / "more.jsonl", [demonstration(number) for number in (50, 8, 51)])
    study.call(
        monkeypatch,
        'variants=[{name="clean"},{name="short",train="short.jsonl"}]',
        'base={train="more.jsonl",config="train.toml",overrides=["train.max_steps=1"]}',
        "data.limit=15",
    )
    data = study.directory / "out" / "data"
    kept_apart = {f"What is {number} + {number}?" for number in range(6, 11)}
    assert [row["question"] for row in read_jsonl(data / "problems.jsonl")] == [f"What is {number} + {number}?" for number in (6, 7, 8)]
    assert [row["answer"] for row in read_jsonl(data / "problems.jsonl")] == ["12", "14", "16"]
    assert questions_of(data / "held_out.jsonl") == [f"What is {number} + {number}?" for number in (9, 10)]
    trained = questions_of(data / "demonstrations.jsonl")
    assert trained == [f"What is {number} + {number}?" for number in (0, 3, 11, 0, 1, 2, 3, 4, 5)]
    assert questions_of(data / "variants" / "short.jsonl") == [f"What is {number} + {number}?" for number in (5, 4, 3, 2, 1, 0)]
    assert questions_of(data / "base.jsonl") == [f"What is {number} + {number}?" for number in (50, 51)]
    assert not kept_apart & {*trained, *questions_of(data / "variants" / "short.jsonl"), *questions_of(data / "base.jsonl")}
    assert questions_of(data / "variants" / "short.held_out.jsonl") == ["What is 9 + 9?"]


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("data.problems=10", ConfigError, "demos.jsonl has 12 records to use, of which held_out = 2 and problems = 10 leave none"),
        ('variants=[{name="clean"},{name="short",train="other.jsonl"}]', ConfigError, "other.jsonl has no answer to a question of demos"),
        ('data.train="bad.jsonl"', DataError, r"bad.jsonl:9: cannot become a problem: it has no reference answer"),
    ],
)
def test_unusable_data_ends_in_a_message_before_anything_runs(
    override: str, error: type[StructcotError], words: str, study: StudySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(study.directory / "other.jsonl", [demonstration(99)])
    write_jsonl(study.directory / "bad.jsonl", [demonstration(number, "None." if number == 8 else None) for number in range(12)])
    with pytest.raises(error, match=words):
        study.call(monkeypatch, override)
    assert not study.log_path.exists()


# Budget


def test_every_variant_is_trained_for_the_steps_that_the_demonstrations_ask_for(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(study.directory / "short.jsonl", [demonstration(number) for number in range(3)])
    study.call(
        monkeypatch,
        "data.problems=1",  # leaves 9 demonstrations: 3 steps of up to 4 an epoch
        'train.overrides=["train.num_train_epochs=1.5"]',
        'variants=[{name="clean"},{name="short",train="short.jsonl"}]',
    )
    assert {config_of(study, cell, "train")["train"]["max_steps"] for cell in ("clean-s0", "short-s0")} == {5}


def test_a_budget_of_tokens_scales_the_epochs(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(study.directory / "short.jsonl", [demonstration(number, "Yes.") for number in range(12)])
    variants = 'variants=[{name="clean"},{name="short",train="short.jsonl"},{kind="digits"}]'
    with pytest.raises(ConfigError, match=r'train\.max_steps: budget = "tokens" scales the epochs'):
        study.call(monkeypatch, 'budget="tokens"', variants)
    outcome = study.call(monkeypatch, 'budget="tokens"', 'train.overrides=["train.num_train_epochs=2.0"]', variants)
    words = {
        path: len((study.directory / "out" / path).read_text().split())
        for path in ("data/demonstrations.jsonl", "data/variants/short.jsonl")
    }
    ratio = words["data/demonstrations.jsonl"] / words["data/variants/short.jsonl"]
    assert ratio > 1.5
    assert config_of(study, "clean-s0", "train")["train"]["num_train_epochs"] == 2.0
    assert config_of(study, "short-s0", "train")["train"]["num_train_epochs"] == pytest.approx(2.0 * ratio, abs=1e-6)
    assert config_of(study, "digits-100-s0", "train")["train"]["num_train_epochs"] != 2.0
    assert not outcome.missing
    assert {name for name in study.logged() if name.startswith("count")} == {
        f"{name} {cell}" for name in ("count", "count_reference") for cell in ("short-s0", "digits-100-s0")
    }


# Changes


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("sampling", {"eval base", *(f"eval {cell}" for cell in CELLS[1:])}),
        ("training", {f"{stage} {cell}" for cell in CELLS[1:] for stage in ("train", "eval")}),
        ("held_out", {*STAGES} - {"eval base", *(f"data {cell}" for cell in CELLS[2:])}),
        ("demonstrations", {*STAGES} - {"eval base"}),
        ("weights", {"eval base", *(f"{stage} {cell}" for cell in CELLS[1:] for stage in ("train", "eval"))}),
        ("mode", {f"{stage} {cell}" for cell in CELLS[2:] for stage in ("data", "held_out", "train", "eval")}),
        ("memory", set()),
        ("title", set()),
        ("path of the data", set()),
    ],
)
def test_only_what_a_change_concerns_is_made_anew(
    override: str, again: set[str], study: StudySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.call(monkeypatch)
    overrides = {
        "sampling": ['eval.overrides=["sampling.max_new_tokens=33"]'],
        "training": ['train.overrides=["train.max_steps=4","train.learning_rate=1e-3"]'],
        "held_out": ["data.held_out=1", "data.limit=11"],
        "mode": ['variants=[{name="clean"},{kind="digits",fractions=[0.5,1.0],mode="paper"}]'],
        "memory": ['train.overrides=["train.max_steps=4","parallel.max_tokens_per_microbatch=512"]'],
        "title": ['title="Another"'],
        "path of the data": ['data.train="moved.jsonl"'],
    }.get(override, [])
    demos = study.directory / "demos.jsonl"
    if override == "demonstrations":
        demos.write_bytes(demos.read_bytes().replace(b"Let me add 1 and 1", b"Let us add 1 and 1"))
    if override == "weights":
        (study.directory / "model" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{} ")
    if override == "path of the data":
        demos.rename(study.directory / "moved.jsonl")
    study.log_path.unlink()
    study.call(monkeypatch, *overrides)
    assert {*study.logged("start")} == again
    assert {*study.logged().values()} <= {1}


def test_nothing_is_left_of_what_a_change_has_made_another(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    study.call(monkeypatch)
    cell = study.directory / "out" / "cells" / "clean-s0"
    old = [cell / "run" / "checkpoint", cell / "eval" / "samples.jsonl", cell / "notes.txt"]
    for path in old:
        path.write_text("of an earlier call")
    study.call(monkeypatch, 'eval.overrides=["sampling.max_new_tokens=33"]')
    assert [path.exists() for path in old] == [True, False, True]
    study.call(monkeypatch, 'train.overrides=["train.max_steps=3"]')
    assert [path.exists() for path in old] == [False, False, True], "and what no study has written stays"
    assert len(read_jsonl(cell / "run" / "metrics.jsonl")) == 3


def test_a_stage_that_lost_its_results_is_made_anew_and_so_is_all_after_it(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    study.call(monkeypatch)
    before = study.results()
    (study.directory / "out" / "cells" / "clean-s0" / "run" / "adapter" / "certificate.json").unlink()
    study.log_path.unlink()
    study.call(monkeypatch)
    assert study.logged() == {"train clean-s0": 1, "eval clean-s0": 1}
    assert study.results() == before


def test_a_directory_that_no_study_has_written_is_left_alone(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    own = study.directory / "out" / "cells" / "clean-s0" / "run" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    outcome = study.call(monkeypatch)
    assert outcome.missing == {"clean-s0": "out/cells/clean-s0: holds run, which no study has written; move it, or name another output_dir"}
    assert [path.name for path in own.parent.parent.iterdir()] in (["run", ".lock"], [".lock", "run"])
    assert own.read_text() == "years of work"


# Failures


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = study.call(monkeypatch, STAND_IN_FAILS="train out/cells/clean-s0")
    assert outcome.missing == {"clean-s0": "train: ended with 1: told to fail"}
    assert (study.record("clean-s0")["status"], study.record("clean-s0")["error"]) == ("failed", outcome.missing["clean-s0"])
    assert list(outcome.facts) == ["base", "digits-50-s0", "digits-100-s0"]
    assert study.call(monkeypatch).missing == {}
    assert study.logged() == STAGES


def test_cells_that_need_a_base_which_failed_are_not_run(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    base = 'base={train="demos.jsonl",config="train.toml",overrides=["train.max_steps=2"]}'
    outcome = study.call(monkeypatch, base, STAND_IN_FAILS="train out/cells/base")
    assert outcome.missing["base"].endswith("told to fail")
    assert {outcome.missing[cell] for cell in CELLS[1:]} == {"not run: it starts from base, which failed"}
    assert study.logged("start") == {"train base": 1}
    assert study.record("clean-s0")["error"] == "not run: it starts from base, which failed"
    study.log_path.unlink()
    assert study.call(monkeypatch, base, jobs=4).missing == {}
    assert study.logged() == {**STAGES, "train base": 1, "export base": 1}
    cells = [Path(line.split()[2]).parts[2] for line in study.log_path.read_text().splitlines()]
    assert cells[: cells.count("base")] == ["base"] * cells.count("base"), "others were started before it was done"
    train = config_of(study, "clean-s0", "train")
    assert train["model_name_or_path"] == "out/cells/base/run/model"


def test_a_stage_that_ended_before_that_was_noted_is_not_run_again(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    study.call(monkeypatch)
    path, record = study.directory / "out" / "cells" / "digits-50-s0" / "cell.json", study.record("digits-50-s0")
    for stage in record["stages"].values():
        stage["done"] = False
    path.write_text(json.dumps({**record, "status": "running"}))
    study.call(monkeypatch)
    assert study.logged("start") == STAGES
    assert study.record("digits-50-s0")["status"] == "done"


def test_a_training_whose_certificate_has_not_passed_is_no_result(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    study.call(monkeypatch)
    certificate = study.directory / "out" / "cells" / "clean-s0" / "run" / "adapter" / "certificate.json"
    certificate.write_text('{"passed": false}')
    study.log_path.unlink()
    study.call(monkeypatch)
    assert study.logged()["train clean-s0"] == 1


# Interruptions


def test_a_study_killed_again_and_again_ends_as_an_undisturbed_one(
    study: StudySite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_study_site(tmp_path / "undisturbed")
    undisturbed.call(monkeypatch)
    rng, kills = random.Random(0), 0
    for _ in range(16):
        process = study.start(STAND_IN_SECONDS="0.05")
        assert process.stdout is not None
        process.stdout.readline()  # once it has imported all that it needs
        try:
            process.wait(timeout=rng.uniform(0.0, 0.25))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills > 3
    process = study.start()
    _, err = process.communicate(timeout=60)
    assert process.returncode == DONE, err
    assert study.results() == undisturbed.results()
    assert max(study.logged().values()) == 1, "a stage that had all its results ran again"
    for cell in CELLS:
        assert study.record(cell)["status"] == "done"
        assert all(stage["done"] for stage in study.record(cell)["stages"].values())
    for cell in CELLS[1:]:
        steps = read_jsonl(study.directory / "out" / "cells" / cell / "run" / "metrics.jsonl")
        assert [line["step"] for line in steps] == [1, 2, 3, 4], "training began again"
    assert not list((study.directory / "out").rglob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_call_goes_on(number: signal.Signals, study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    process = study.start(STAND_IN_SECONDS="0.3")
    wait_until_logged(study, "start", "train clean-s0")
    metrics = study.directory / "out" / "cells" / "clean-s0" / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(number)  # to the study alone, not to the commands that it runs
    _, err = process.communicate(timeout=30)
    assert process.returncode == STOPPED, err
    assert f"structcot: stopped by {number.name}; 1 of 4 cells are done, the same command goes on" in err
    assert "structcot: stopped by SIGTERM" in (study.directory / "out" / "cells" / "clean-s0" / "log.txt").read_text()
    assert study.record("clean-s0")["status"] == "running"
    assert study.call(monkeypatch).missing == {}
    assert study.logged() == STAGES
    assert [line["step"] for line in read_jsonl(metrics)] == [1, 2, 3, 4]


def test_a_signal_during_the_report_says_that_all_cells_are_kept(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tests.study_site.gather", stopped)
        with pytest.raises(StoppedWithCheckpoint, match="stopped by SIGINT; no cell is left to run, the same command writes the report"):
            study.call(monkeypatch)
    assert list(study.call(monkeypatch).facts) == CELLS
    assert study.logged("start") == STAGES


def test_what_a_killed_study_left_running_is_waited_for(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    process = study.start(STAND_IN_SECONDS="0.3")
    wait_until_logged(study, "start", "train clean-s0")
    process.kill()  # and not its commands
    process.communicate()
    assert study.call(monkeypatch).missing == {}
    assert study.logged("start") == study.logged() == STAGES


def test_two_calls_of_one_study_do_not_meet(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    held = hold(study.directory / "out")
    assert held is not None
    with held:
        with pytest.raises(ConfigError, match="output_dir: out is in use by another call of this study; wait for it"):
            study.call(monkeypatch)
        assert study.call(monkeypatch, cell="clean-s0").missing == {}
    assert study.logged() == {"train clean-s0": 1, "eval clean-s0": 1}


# Ways to run


def test_one_cell_is_run_by_its_name_or_number(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    assert study.call(monkeypatch, cell="clean-s0") == runner.Outcome(facts={}, missing={})
    study.call(monkeypatch, cell="2")
    assert {name.split()[1] for name in study.logged()} == {"clean-s0", "digits-50-s0"}
    study.call(monkeypatch)
    assert study.logged() == STAGES
    with pytest.raises(ConfigError, match='--cell: got "clean"; use a number from 0 to 3, or one of base, clean-s0, digits-50-s0'):
        study.call(monkeypatch, cell="clean")


def test_one_cell_needs_its_base(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    base = 'base={train="demos.jsonl",config="train.toml",overrides=["train.max_steps=2","tuning.method=full"]}'
    with pytest.raises(ConfigError, match="--cell: clean-s0 starts from base, which is not done; run --cell base first"):
        study.call(monkeypatch, base, cell="clean-s0")
    study.call(monkeypatch, base, cell="base")
    study.call(monkeypatch, base, cell="clean-s0")
    assert study.logged() == {f"{stage} {cell}": 1 for stage in ("train", "eval") for cell in ("base", "clean-s0")}


def test_a_dry_run_prints_every_command_and_writes_nothing(
    study: StudySite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = study.call(monkeypatch, dry_run=True)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if not line.startswith(" ")] == [f"{number}  {cell}" for number, cell in enumerate(CELLS)]
    assert printed[1:4] == ["   structcot eval out/cells/base/eval.toml", "1  clean-s0", "   structcot train out/cells/clean-s0/train.toml"]
    assert outcome.facts["cells"][1] == {
        "name": "clean-s0",
        "commands": [["structcot", stage, f"out/cells/clean-s0/{stage}.toml"] for stage in ("train", "eval")],
    }
    assert not (study.directory / "out").exists()


def test_an_array_job_has_a_task_for_each_cell(study: StudySite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study.call(monkeypatch, 'title="My study"', slurm=tmp_path / "job.sh")
    script = (tmp_path / "job.sh").read_text()
    assert script.startswith("#!/bin/bash\n")
    assert "#SBATCH --array=0-3\n" in script
    assert "$base" not in script
    assert not (study.directory / "out").exists()
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    last = script.splitlines()[-1]
    assert last == f"""exec {sys.executable} -m structcot.study study.toml 'title="My study"' --cell "$SLURM_ARRAY_TASK_ID\""""
    study.call(monkeypatch, 'base={train="demos.jsonl",config="train.toml"}', slurm=tmp_path / "based.sh")
    based = (tmp_path / "based.sh").read_text()
    assert "base=$(sbatch --parsable --array=0-0 FILE)" in based
    assert "--dependency=afterok:$base --array=1-3 FILE" in based


def test_cells_at_once_share_cores_and_gpus(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "num_processes", lambda: 8)
    outcome = study.call(monkeypatch, jobs=2, STAND_IN_MEETS_SECONDS="20", CUDA_VISIBLE_DEVICES="0,1,2")
    assert not outcome.missing
    assert study.logged() == STAGES
    lines = [line.split() for line in study.log_path.read_text().splitlines()]
    assert {line[-2] for line in lines} == {"threads=4"}
    assert {line[-1] for line in lines} == {"gpus=0,2", "gpus=1"}
    trainings = [line[0] for line in lines if line[1] == "train"]
    assert trainings[:2] == ["start", "start"], "one waited for the other"


def test_a_base_that_all_others_wait_for_has_the_whole_machine(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "num_processes", lambda: 8)
    base = 'base={train="demos.jsonl",config="train.toml"}'
    assert not study.call(monkeypatch, base, jobs=2, CUDA_VISIBLE_DEVICES="0,1").missing
    given = {(" out/cells/base/" in line, *line.split()[-2:]) for line in study.log_path.read_text().splitlines()}
    assert given == {(True, "threads=8", "gpus=0,1"), (False, "threads=4", "gpus=0"), (False, "threads=4", "gpus=1")}


@pytest.mark.parametrize(("slot", "gpus"), [(0, "0"), (1, "1"), (2, "0")])
def test_more_slots_than_gpus_take_turns(slot: int, gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = runner.slot_environment(slot, 3)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == (gpus, "7")


def test_cells_at_once_have_a_gpu_for_each_process(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--jobs: 2 cells at once share 3 GPUs, and each needs 2; use --jobs 1"):
        study.call(monkeypatch, "train.processes=2", jobs=2, CUDA_VISIBLE_DEVICES="0,1,2")
    assert not study.logged("start")
    assert not study.call(monkeypatch, "train.processes=2", jobs=2, CUDA_VISIBLE_DEVICES="0,1,2,3").missing


# What a person sees


class Terminal(list[str]):
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None:
        pass


def test_progress_tells_what_runs_and_how_long_the_rest_may_take() -> None:
    standings = {
        "base": Standing(status="done", seconds=60.0),
        "clean-s0": Standing(status="done", seconds=100.0),
        "a": Standing(status="failed", stage="train"),
        "b": Standing(status="running", stage="eval", seconds=20.0),
        "c": Standing(),
    }
    assert headline(standings, 1) == "2 of 5 cells done, 1 running, 1 failed, 1 waiting, about 0:02:20 left"
    assert headline(standings, 8).endswith("about 0:01:10 left")
    assert table(standings, 1)[1:] == ["  a         train           0:00:00  failed", "  b         eval            0:00:20  running"]
    assert clock(3 * 3600 + 61.7) == "3:01:01"


def test_a_terminal_is_drawn_over_and_a_file_gets_a_line_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"a": Standing(status="running", stage="train", seconds=1.0), "b": Standing()}
    after = {"a": Standing(status="done", seconds=2.0), "b": Standing()}
    terminal = Terminal()
    show({}, before, 1, terminal)  # pyright: ignore[reportArgumentType]
    show(before, after, 1, terminal)  # pyright: ignore[reportArgumentType]
    assert terminal[0].startswith("\x1b[J0 of 2")
    assert terminal[1].startswith("\x1b[2A\x1b[J1 of 2")
    show({}, before, 1, sys.stderr)
    show(before, after, 1, sys.stderr)
    show(after, after, 1, sys.stderr)
    assert capsys.readouterr().err.splitlines() == [
        "a: train (0 of 2 cells done, 1 running, 1 waiting)",
        "a: done (1 of 2 cells done, 1 waiting, about 0:00:02 left)",
    ]


# The real commands


def start_smoke(directory: Path, *overrides: str) -> subprocess.Popen[str]:
    """studies/smoke.toml with everything it needs, in a process group of its own, started in `directory`."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(directory / "cache")}
    needed = [f"model_name_or_path={directory.parent / 'model'}", f"data.train={directory.parent / 'demos.jsonl'}", "output_dir=out"]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.study_driver", str(ROOT / "studies" / "smoke.toml"), *needed, *overrides],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_smoke_study_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    tiny_chat_model(tmp_path / "model")
    write_countdown(tmp_path / "demos.jsonl", num_records=40, seed=0)
    sites = {name: StudySite(tmp_path / name) for name in ("undisturbed", "killed")}
    for site in sites.values():
        site.directory.mkdir()
    process = start_smoke(sites["undisturbed"].directory)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == DONE, out
    rng, kills = random.Random(1), 0
    for _ in range(6):
        process = start_smoke(sites["killed"].directory)
        try:
            process.wait(timeout=rng.uniform(3.0, 25.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills
    process = start_smoke(sites["killed"].directory)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == DONE, out
    results = sites["killed"].results()
    assert results == sites["undisturbed"].results()
    assert {"out/study.json", "out/report.html", "out/report.md", "out/figures/differences.svg"} <= {*results}
    facts = json.loads(results["out/study.json"])
    assert [one["name"] for one in facts["variants"]] == ["base", "clean", "shuffle-100"]
    assert facts["missing"] == []
    assert facts["variants"][2]["losses"]["reference_on_it"] > 0
    for cell in ("base", "clean-s0", "shuffle-100-s0"):
        record = sites["killed"].record(cell)
        assert all(stage["done"] for stage in record["stages"].values())
        said = (sites["killed"].directory / "out" / "cells" / cell / "log.txt").read_text()
        for program, last in (("train", "metrics  out/"), ("eval", " 8 problems, 8 outputs")):
            assert said.count(last) <= 1, f"{program} of {cell} ran to its end twice"
    for cell in ("clean-s0", "shuffle-100-s0"):
        runs = [site.directory / "out" / "cells" / cell / "run" for site in sites.values()]
        assert [[line["train/loss"] for line in read_jsonl(run / "metrics.jsonl")] for run in runs[:1]] == [
            [line["train/loss"] for line in read_jsonl(run / "metrics.jsonl")] for run in runs[1:]
        ]
        assert "eval/loss" in read_jsonl(runs[0] / "metrics.jsonl")[-1]


@pytest.mark.slow
def test_a_real_study_may_train_its_base_and_count_tokens(tmp_path: Path) -> None:
    tiny_chat_model(tmp_path / "model")
    write_countdown(tmp_path / "demos.jsonl", num_records=40, seed=0)
    site = StudySite(tmp_path / "site")
    site.directory.mkdir()
    process = start_smoke(
        site.directory,
        'budget="tokens"',
        'train.overrides=["train.max_steps=-1","train.num_train_epochs=0.5","checkpoint.save_steps=2"]',
        f'base={{train="{tmp_path}/demos.jsonl",config="{ROOT}/configs/tiny.toml",overrides=["train.max_steps=2"]}}',
        'variants=[{name="clean"},{kind="delete",fractions=[0.67]}]',
    )
    out = process.communicate(timeout=280)[0]
    assert process.returncode == DONE, out
    tokens = {
        name: json.loads((site.directory / "out" / "cells" / "delete-67-s0" / name / "data" / "plan.json").read_text())["tokens"]
        for name in ("count", "count_reference", "run")
    }
    assert tokens["count"] == tokens["run"] < tokens["count_reference"]
    epochs = config_of(site, "delete-67-s0", "train")["train"]["num_train_epochs"]
    assert epochs == pytest.approx(0.5 * tokens["count_reference"] / tokens["count"], abs=1e-6)
    assert config_of(site, "delete-67-s0", "train")["model_name_or_path"] == "out/cells/base/run/model"
