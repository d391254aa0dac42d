"""From finished cells to the facts of a study: the cells are written here by hand, with two tasks, two settings and three seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structcot.config_file import checked
from structcot.errors import StructcotError
from structcot.study import analysis, losses
from structcot.study.analysis import analyse
from structcot.study.cells import Cell
from structcot.study.config import StudyConfig
from structcot.study.finished import answers_of, read_finished
from structcot.study.report import write_report
from structcot.study.statistics import Difference, Matched, accuracy, difference, holm, matched, seed_noise, trend
from tests.tiny_run import write_jsonl

TASKS, SETTINGS, SEEDS = ("maze", "clock"), ("r4", "r64"), (0, 1, 2)
PROBLEMS = {"maze": 40, "clock": 25}
MISSING = "r64-delete-100-s2"
# Name: kind, fraction, right answers of 40 problems with seed 0, and words changed by the word; each further seed has one more right.
VARIANTS = {
    "clean": ("", 0.0, 30, None),
    "digits-50": ("digits", 0.5, 29, 0.1),
    "digits-100": ("digits", 1.0, 27, 0.2),
    "delete-100": ("delete", 1.0, 6, 0.4),
    "shuffle-100": ("shuffle", 1.0, 8, 0.3),
    "wrong-answer-100": ("wrong-answer", 1.0, 28, 0.05),
    "short": ("", 0.0, 20, None),
}
CONFIG = {
    "title": "By hand",
    "model_name_or_path": "owner/model",
    "seeds": list(SEEDS),
    "data": {"train": "demos.jsonl"},
    "variants": [
        {"name": "clean"},
        {"kind": "digits", "fractions": [0.5, 1.0]},
        *({"kind": kind} for kind in ("delete", "shuffle", "wrong-answer")),
        {"name": "short"},
    ],
    "settings": [{"name": "r4"}, {"name": "r64"}],
}


@dataclass(frozen=True, slots=True)
class ByHand:
    """A study whose cells have no stages, so that they are finished as soon as cell.json says so."""

    config: StudyConfig
    cells: list[Cell]

    def facts(self) -> dict[str, Any]:
        return analyse(self.config, self.cells)

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)


def loss_of(run: Path, files: list[Path]) -> list[float]:
    """A stand-in for the model: the loss of a file is what its first line says."""
    return [json.loads(path.read_text())["loss"] for path in files]


@pytest.fixture
def losses_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The cells whose run was asked for losses, and those whose demonstrations it read."""
    calls: list[tuple[str, str]] = []

    def noted(run: Path, files: list[Path]) -> list[float]:
        calls.extend((run.parent.name, path.parent.name) for path in files)
        return loss_of(run, files)

    monkeypatch.setattr(losses, "run_losses", noted)
    return calls


@pytest.fixture
def study(tmp_path: Path, losses_run: list[tuple[str, str]]) -> ByHand:
    """A study to change."""
    return write_study(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    """The same study, to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "run_losses", loss_of)
        yield write_study(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def facts(made: ByHand) -> dict[str, Any]:
    return made.facts()


def write_study(home: Path) -> ByHand:
    config = checked(StudyConfig, CONFIG | {"output_dir": str(home)}, origin="test.toml")
    cells = [cell_of(home, "base", "base", "", 0.0, "", 0)]
    cells += [
        cell_of(home, f"{setting}-{name}-s{seed}", name, kind, fraction, setting, seed)
        for name, (kind, fraction, _, _) in VARIANTS.items()
        for setting in SETTINGS
        for seed in SEEDS
    ]
    for cell in cells:
        write_cell(cell)
    return ByHand(config, cells)


def cell_of(home: Path, name: str, variant: str, kind: str, fraction: float, setting: str, seed: int) -> Cell:
    directory = home / "cells" / name
    return Cell(name=name, variant=variant, kind=kind, fraction=fraction, setting=setting, seed=seed, directory=directory, stages=())


def num_right(cell: Cell, task: str) -> int:
    """In r64 three fewer than in r4, and in clock as many times 25 / 40."""
    of_forty = 2 if cell.variant == "base" else VARIANTS[cell.variant][2] + cell.seed - 3 * (cell.setting == "r64")
    return of_forty * PROBLEMS[task] // 40


def samples_of(cell: Cell) -> Iterator[dict[str, Any]]:
    """Two samples a problem, as `structcot eval` writes them; of outputs that are not right every second one is cut off."""
    for task, num_problems in PROBLEMS.items():
        for problem in range(num_problems):
            for sample in range(2):
                correct = problem * 7 % num_problems < num_right(cell, task)
                yield {
                    "task": task,
                    "problem_id": f"{task}-{problem}",
                    "sample": sample,
                    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"Question {problem}?"}],
                    "output": "<think>\nWait, is it so? I see.\n</think>\n\nYes." if correct else "<think>\nI go.\n\nWait",
                    "ending": "finished" if correct or sample else "truncated",
                    "completion_tokens": 10 if correct else 32,
                    "gold": "Yes",
                    "correct": correct,
                    "forced_correct": None if cell.name == "r4-short-s1" else correct or sample == 0,
                }


def write_cell(cell: Cell) -> None:
    (cell.directory / "eval").mkdir(parents=True)
    record = {"status": "done", "error": "", "stages": {}}
    if cell.name == MISSING:
        record |= {"status": "failed", "error": "train: ended with 1: out of memory"}
    (cell.directory / "cell.json").write_text(json.dumps(record))
    write_jsonl(cell.directory / "eval" / "samples.jsonl", samples_of(cell))
    if cell.variant == "base":
        return
    (cell.directory / "run" / "data").mkdir(parents=True)
    (cell.directory / "run" / "data" / "plan.json").write_text(json.dumps({"samples": 100, "steps": 12, "tokens": 5000}))
    steps = [{"step": step + 1, "train/loss": 3.0 - step / 10 + cell.seed, "train/num_tokens": 500 * (step + 1)} for step in range(12)]
    steps[-1]["eval/loss"] = 0.5 + cell.seed
    write_jsonl(cell.directory / "run" / "metrics.jsonl", steps)
    distance = VARIANTS[cell.variant][3]
    if distance is not None:
        report = {
            **({} if cell.kind == "shuffle" and cell.seed == 2 else {"realised_fraction": cell.fraction - 0.03 * cell.seed}),
            "edit_distance_per_word": distance,
            "changed": 90 + cell.seed,
            "tokens_before": 5000,
            "tokens_after": 4000,
            "keywords_before": 70,
            "keywords_after": 30,
            "stages": [{"kendall_tau": 0.25 if cell.kind == "shuffle" else None}],
        }
        (cell.directory / "data.report.json").write_text(json.dumps(report))
        (cell.directory / "held_out.jsonl").write_text(json.dumps({"loss": 1.0 + distance + cell.seed}))


def right_SP(study: ByHand, variant: str, setting: str, task: str) -> np.ndarray:
    """The right answers once more, by nothing that the analysis uses."""
    cells = [cell for cell in study.cells if (cell.variant, cell.setting) == (variant, setting) and cell.name != MISSING]
    each = [[problem * 7 % PROBLEMS[task] < num_right(cell, task) for problem in range(PROBLEMS[task])] for cell in cells]
    return np.array(each, dtype=float)


def of(facts: dict[str, Any], name: str, setting: str = "r4") -> dict[str, Any]:
    found = [one for one in facts["variants"] if (one["name"], one["setting"]) == (name, setting)]
    assert len(found) == 1
    return found[0]


def estimate(one: Any) -> dict[str, Any]:
    return {"value": one.value, "interval": list(one.interval)}


# What the whole says


def test_the_facts_name_the_study_its_variants_and_what_is_missing(facts: dict[str, Any]) -> None:
    assert {key: facts[key] for key in ("title", "model", "reference", "budget", "seeds", "tasks", "settings")} == {
        "title": "By hand",
        "model": "owner/model",
        "reference": "clean",
        "budget": "samples",
        "seeds": [0, 1, 2],
        "tasks": ["maze", "clock"],
        "settings": ["r4", "r64"],
    }
    assert facts["missing"] == [{"cell": MISSING, "error": "train: ended with 1: out of memory"}]
    places = [(one["name"], one["setting"]) for one in facts["variants"]]
    assert places == [("base", ""), *((name, setting) for name in VARIANTS for setting in SETTINGS)]
    about = {one["name"]: (one["kind"], one["fraction"], one["group"]) for one in facts["variants"]}
    assert about == {
        "base": ("base", 0.0, "base"),
        "clean": ("clean", 0.0, "reference"),
        "digits-50": ("digits", 0.5, "content"),
        "digits-100": ("digits", 1.0, "content"),
        "delete-100": ("delete", 1.0, "structure"),
        "shuffle-100": ("shuffle", 1.0, "structure"),
        "wrong-answer-100": ("wrong-answer", 1.0, "answer"),
        "short": ("short", 0.0, "other"),
    }
    assert (of(facts, "delete-100")["seeds"], of(facts, "delete-100", "r64")["seeds"]) == ([0, 1, 2], [0, 1])
    assert any("cannot be told apart" in sentence or "worse than clean" in sentence for sentence in facts["conclusions"])
    assert len(facts["paper"]["rows"]) > 10


def test_the_facts_are_json_and_the_same_bytes_twice(facts: dict[str, Any], made: ByHand) -> None:
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert json.dumps(made.facts()) == json.dumps(facts)


def test_the_report_takes_the_facts_as_they_are(facts: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path, facts)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "delete-100" in page
    assert f"| {MISSING} |" in text
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert {"differences-r4", "dose-r64-clock", "heat", "matched", "outputs-maze", "losses"} <= names


# Variants


def test_accuracy_is_by_task_and_their_unweighted_mean_with_the_noise_of_the_seeds_pooled(facts: dict[str, Any], made: ByHand) -> None:
    accuracies = of(facts, "digits-100")["accuracy"]
    assert list(accuracies) == ["maze", "clock", "mean"]
    assert accuracies["maze"]["by_seed"] == pytest.approx([27 / 40, 28 / 40, 29 / 40])
    assert (accuracies["maze"]["problems"], accuracies["mean"]["problems"]) == (40, 65)
    assert accuracies["mean"]["value"] == pytest.approx((accuracies["maze"]["value"] + accuracies["clock"]["value"]) / 2)
    arms = {name: right_SP(made, name, "r4", "maze") for name in VARIANTS}
    assert {key: accuracies["maze"][key] for key in ("value", "interval")} == estimate(
        accuracy(arms["digits-100"], seed_noise([*arms.values()]))
    )


def test_a_forced_accuracy_is_there_where_every_run_has_one(facts: dict[str, Any]) -> None:
    for name in VARIANTS:
        forced, plain = of(facts, name)["forced"], of(facts, name)["accuracy"]
        if name == "short":
            assert forced is None
        else:  # one of the two samples of each problem that is not right is right when forced
            assert forced["maze"]["value"] == pytest.approx((1 + plain["maze"]["value"]) / 2)
            assert list(forced) == ["maze", "clock", "mean"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_differences_are_from_the_reference_of_the_setting_and_corrected_as_one_family(
    setting: str, facts: dict[str, Any], made: ByHand
) -> None:
    assert of(facts, "clean", setting)["difference"] is None
    names = [*(["base"] if setting == "r4" else []), *(name for name in VARIANTS if name != "clean")]
    arms = {name: right_SP(made, name, setting, "maze") for name in VARIANTS} | {"base": right_SP(made, "base", "", "maze")}
    noise = seed_noise([arms[name] for name in VARIANTS])
    found = {name: difference(arms[name], arms["clean"], noise) for name in names}
    adjusted = dict(zip(names, holm([one.p_value for one in found.values()]), strict=True))
    for name in names:
        said = of(facts, name, "" if name == "base" else setting)["difference"]["maze"]
        assert said | {"verdict": ""} == {
            **estimate(found[name]),
            "p": found[name].p_value,
            "p_adjusted": adjusted[name],
            "verdict": "",
        }
    verdicts = {name: of(facts, name, setting)["difference"]["maze"]["verdict"] for name in names if name != "base"}
    assert verdicts == {
        "digits-50": "within noise",
        "digits-100": "within noise",
        "delete-100": "worse",
        "shuffle-100": "worse",
        "wrong-answer-100": "within noise",
        "short": "worse",
    }


def test_a_base_that_settings_share_is_compared_within_the_first_of_them_only(study: ByHand) -> None:
    before = of(study.facts(), "base", "")["difference"]
    set_status(study, lambda cell: cell.setting == "r4" and cell.variant == "clean", "failed")
    assert of(study.facts(), "base", "")["difference"] is None, "compared with the reference of another setting"
    own = {"name": "big", "model_name_or_path": "owner/big"}
    settings = [own, *CONFIG["settings"]]
    config = checked(StudyConfig, CONFIG | {"settings": settings, "output_dir": study.config.output_dir}, origin="test.toml")
    set_status(study, lambda cell: True, "done")
    big = [replace(cell, name=f"big-{cell.name}", setting="big") for cell in study.cells if cell.setting == "r64"]
    facts = analyse(config, [*study.cells, *big])
    assert facts["settings"] == ["r4", "r64", "big"], "what shares the base comes first"
    assert of(facts, "base", "")["difference"] == before


def test_what_a_perturbation_did_is_the_mean_over_seeds(facts: dict[str, Any]) -> None:
    manipulation = of(facts, "digits-50")["manipulation"]
    assert manipulation.pop("realised_fraction") == pytest.approx(0.47)
    assert manipulation == {
        "edit_distance": pytest.approx(0.1),
        "changed_records": 91.0,
        "tokens_before": 5000.0,
        "tokens_after": 4000.0,
        "keywords_before": 70.0,
        "keywords_after": 30.0,
        "order_tau": None,
    }
    shuffled = of(facts, "shuffle-100")["manipulation"]
    assert (shuffled["order_tau"], shuffled["realised_fraction"]) == (0.25, None)
    assert [of(facts, name)["manipulation"] for name in ("clean", "short")] == [None, None]


def test_outputs_are_described_by_task(facts: dict[str, Any]) -> None:
    outputs = of(facts, "base", "")["outputs"]
    assert list(outputs) == ["maze", "clock"]
    right = 2 / 40
    assert outputs["maze"] == {
        "tokens_mean": pytest.approx(10 * right + 32 * (1 - right)),
        "tokens_median": 32.0,
        "finished": pytest.approx((1 + right) / 2),
        "truncated": pytest.approx((1 - right) / 2),
        "looping": 0.0,
        "keywords": 1.0,
        "first_reflects": pytest.approx(right),
    }


def test_losses_stand_beside_those_of_the_reference_of_the_setting(facts: dict[str, Any]) -> None:
    for setting in SETTINGS:
        assert of(facts, "digits-50", setting)["losses"] == {
            "reference_on_it": pytest.approx(1.1 + 1),
            "it_on_reference": 1.5,
            "reference_on_reference": 1.5,
        }
    assert of(facts, "delete-100", "r64")["losses"]["it_on_reference"] == 1.0, "the mean of the two seeds that are there"
    assert of(facts, "clean")["losses"]["reference_on_it"] is None
    assert of(facts, "base", "")["losses"] == dict.fromkeys(("reference_on_it", "it_on_reference", "reference_on_reference"))


def test_a_loss_is_measured_by_the_reference_of_the_same_setting_and_seed_and_once(
    study: ByHand, losses_run: list[tuple[str, str]]
) -> None:
    study.facts()
    measured = [cell.name for cell in study.cells if cell.kind and cell.name != MISSING]
    assert sorted(cell for _, cell in losses_run) == sorted(measured)
    assert all(run.rpartition("-")[2] == cell.rpartition("-")[2] for run, cell in losses_run)
    assert all(run.partition("-")[0] == cell.partition("-")[0] for run, cell in losses_run)
    losses_run.clear()
    study.facts()
    assert losses_run == []


def test_held_out_demonstrations_that_were_all_left_out_have_no_loss(study: ByHand, losses_run: list[tuple[str, str]]) -> None:
    for seed in SEEDS:
        (study.cell(f"r4-wrong-answer-100-s{seed}").directory / "held_out.jsonl").write_bytes(b"")
    assert of(study.facts(), "wrong-answer-100")["losses"]["reference_on_it"] is None
    assert ("r4-clean-s0", "r4-wrong-answer-100-s0") not in losses_run


def test_what_a_variant_was_trained_on_is_the_mean_over_seeds(facts: dict[str, Any]) -> None:
    assert of(facts, "clean")["trained"] == {
        "records": 100.0,
        "tokens": 6000.0,
        "steps": 12.0,
        "final_loss": pytest.approx(1 + 3.0 - 0.65),  # of the last ten of twelve steps
    }
    assert of(facts, "base", "")["trained"] is None


def test_three_examples_of_the_first_seed_are_kept(facts: dict[str, Any]) -> None:
    examples = of(facts, "short")["examples"]
    assert [one["problem_id"] for one in examples] == ["maze-0", "maze-0", "maze-1"]
    assert examples[0] == {
        "task": "maze",
        "problem_id": "maze-0",
        "question": "Question 0?",
        "gold": "Yes",
        "output": "<think>\nWait, is it so? I see.\n</think>\n\nYes.",
        "correct": True,
        "ending": "finished",
    }


def test_outputs_that_do_not_end_are_warned_of(study: ByHand) -> None:
    path = study.cell("base").directory / "eval" / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [{**line, "ending": "looping"} if line["task"] == "clock" else line for line in lines])
    assert study.facts()["warnings"] == ["base: only 0 % of the outputs to clock end by themselves"]


# Curves and pairs


def test_curves_start_at_the_reference_and_have_a_slope(facts: dict[str, Any], made: ByHand) -> None:
    curves = {(one["kind"], one["setting"], one["task"]): one for one in facts["curves"]}
    kinds = ("digits", "delete", "shuffle", "wrong-answer")
    assert {*curves} == {(kind, setting, task) for kind in kinds for setting in SETTINGS for task in (*TASKS, "mean")}
    curve = curves["digits", "r4", "maze"]
    assert (curve["group"], curves["delete", "r4", "maze"]["group"]) == ("content", "structure")
    names = ("clean", "digits-50", "digits-100")
    assert [point["fraction"] for point in curve["points"]] == [0.0, 0.5, 1.0]
    for name, point in zip(names, curve["points"], strict=True):
        assert {key: of(facts, name)["accuracy"]["maze"][key] for key in ("value", "interval")} == {
            key: point[key] for key in ("value", "interval")
        }
    arms = [right_SP(made, name, "r4", "maze") for name in names]
    noise = seed_noise([right_SP(made, name, "r4", "maze") for name in VARIANTS])
    slope = trend(list(zip((0.0, 0.5, 1.0), arms, strict=True)), noise)
    assert curve["trend"] == estimate(slope)
    assert curve["trend"]["value"] == pytest.approx((27 - 30) / 40 / 10)


def test_pairs_are_matched_where_both_are_as_far_from_the_original_and_corrected_together(facts: dict[str, Any], made: ByHand) -> None:
    pairs = facts["matched"]
    assert [(one["structure"], one["content"]) for one in pairs if (one["setting"], one["task"]) == ("r4", "maze")] == [
        ("delete", "digits"),
        ("shuffle", "digits"),
    ]
    assert {(one["setting"], one["task"]) for one in pairs} == {(setting, task) for setting in SETTINGS for task in (*TASKS, "mean")}
    arms = {name: right_SP(made, name, "r4", "maze") for name in VARIANTS}
    expected = matched(
        arms["clean"],
        [(0.4, arms["delete-100"])],
        [(0.1, arms["digits-50"]), (0.2, arms["digits-100"])],
        seed_noise([*arms.values()]),
    )
    assert expected is not None
    first = pairs[0]
    assert first["edit_distance"] == pytest.approx(0.2)
    assert first["difference"]["value"] == pytest.approx(((30 + 6) / 2 - 27) / 40)
    assert first["difference"]["value"] == pytest.approx(expected.difference.value)
    assert first["difference"]["interval"] == pytest.approx(expected.difference.interval)
    assert first["verdict"] == "worse"


@pytest.mark.parametrize(("p_value", "said"), [(0.03, "within noise"), (0.02, "worse")])
def test_the_two_pairs_of_a_task_are_corrected_for_one_another(
    p_value: float, said: str, made: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Matched(edit_distance=0.2, difference=Difference(value=-0.1, interval=(-0.19, -0.01), p_value=p_value))
    monkeypatch.setattr(analysis, "matched", lambda *_: found)
    assert [one["verdict"] for one in made.facts()["matched"]] == [said] * 12


def test_two_perturbations_of_one_kind_are_not_mixed_up(study: ByHand) -> None:
    other = {"clean": "clean", "digits-50": "other-50", "digits-100": "other-100"}
    more = [replace(cell, name=f"more-{cell.name}", variant=other[cell.variant]) for cell in study.cells if cell.kind == "digits"]
    facts = analyse(study.config, [*study.cells, *more])
    points = {one["kind"]: len(one["points"]) for one in facts["curves"] if (one["setting"], one["task"]) == ("r4", "maze")}
    assert points == {"digits": 3, "other": 3, "delete": 2, "shuffle": 2, "wrong-answer": 2}
    assert {one["content"] for one in facts["matched"]} == {"digits", "other"}
    assert of(facts, "other-50")["kind"] == "digits"


# What is not there, or not as it should be


def set_status(study: ByHand, chosen: Callable[[Cell], bool], status: str) -> None:
    for cell in filter(chosen, study.cells):
        (cell.directory / "cell.json").write_text(json.dumps({"status": status, "error": "", "stages": {}}))


def test_without_a_reference_there_is_nothing_to_compare_with_and_nothing_breaks(study: ByHand, tmp_path: Path) -> None:
    set_status(study, lambda cell: cell.variant == "clean", "running")
    facts = study.facts()
    assert [one["difference"] for one in facts["variants"]] == [None] * len(facts["variants"])
    assert (facts["curves"], facts["matched"]) == ([], [])
    assert {one["cell"] for one in facts["missing"]} == {MISSING, *(f"{setting}-clean-s{seed}" for setting in SETTINGS for seed in SEEDS)}
    assert of(facts, "short")["accuracy"]["maze"]["value"] == pytest.approx(21 / 40)
    assert of(facts, "digits-50")["losses"]["reference_on_it"] is None
    write_report(tmp_path, facts)


def test_a_study_of_which_nothing_has_run_has_facts_and_a_report(study: ByHand, tmp_path: Path) -> None:
    set_status(study, lambda cell: True, "waiting")
    facts = study.facts()
    assert (facts["variants"], facts["tasks"], len(facts["missing"])) == ([], [], len(study.cells))
    write_report(tmp_path, facts)


def test_cells_that_answer_other_problems_are_refused(study: ByHand) -> None:
    cell = study.cell("r64-short-s1")
    samples = [line for line in samples_of(cell) if line["problem_id"] != "clock-3"]
    write_jsonl(cell.directory / "eval" / "samples.jsonl", samples)
    with pytest.raises(StructcotError, match=r"r64-short-s1: answers other problems of clock than .*/base; remove eval/ in the one"):
        study.facts()


@pytest.mark.parametrize(
    ("name", "content"),
    [("eval/samples.jsonl", "{"), ("eval/samples.jsonl", '{"task": "maze"}'), ("run/metrics.jsonl", ""), ("run/data/plan.json", "[]")],
)
def test_a_file_that_is_not_what_its_command_writes_is_named_with_what_to_do(name: str, content: str, study: ByHand) -> None:
    cell = study.cell("r4-short-s1")
    (cell.directory / name).write_text(content)
    with pytest.raises(StructcotError, match=r"r4-short-s1: cannot be read: .*; remove it and run the study again"):
        read_finished(cell)


def test_shares_are_over_the_samples_of_each_problem() -> None:
    rights = [("b", True), ("a", False), ("b", False), ("a", True), ("a", True), ("b", False)]
    lines = [{"problem_id": name, "correct": right, "ending": "finished", "completion_tokens": 1, "output": ""} for name, right in rights]
    answers = answers_of(lines)
    assert (answers.problem_ids, answers.right_P.tolist(), answers.forced_P) == (("b", "a"), pytest.approx([1 / 3, 2 / 3]), None)
