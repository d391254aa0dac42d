"""Live evaluation measures what the model says, disturbs nothing of the training, and what is wrong with it is said before the start."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structcot import live_eval, start, train
from structcot.config import Config
from structcot.console import live_line
from structcot.distributed import World
from structcot.errors import ConfigError, StructcotError
from structcot.eval.decoding import Endings
from structcot.live_eval import LiveEval, end_ids_of, load_problems, make_live_eval, run_live_eval, shuffled
from structcot.metrics import by_task
from structcot.model.decoding import Decoded
from structcot.report_live import live_charts
from tests.chat_tokenizers import tiny_tokenizer
from tests.ranks import train_on_ranks
from tests.tiny_models import tiny_config
from tests.tiny_run import (
    DONE,
    FAILED,
    NUM_STEPS,
    STOPPED,
    WRONG,
    Site,
    adapter_of,
    copy_run,
    metrics_of,
    read_jsonl,
    signalling,
    write_jsonl,
)

NUM_NEW = 12
NAMES = {"accuracy", "completion_tokens", "truncated", "looping", "end_probability"}
EVALUATED = [0, 4, NUM_STEPS]


def problems_file(directory: Path, name: str = "sums.jsonl", count: int = 5) -> Path:
    return write_jsonl(directory / name, [{"question": f"What is {n} + {n}?", "answer": f"Add.\n#### {2 * n}"} for n in range(count)])


def live_overrides(*paths: Path) -> list[str]:
    tasks = ", ".join(f'"{path}"' for path in paths)
    return [f"log.eval_tasks=[{tasks}]", "log.eval_limit=3", f"log.eval_max_new_tokens={NUM_NEW}"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return problems_file(tmp_path_factory.mktemp("problems"))


@pytest.fixture(scope="module")
def live_run(site: Site, sums: Path) -> Path:
    """An undisturbed run of configs/tiny.toml with live evaluation before the first step and after steps 4 and 8."""
    outcome = site.train(site.directory / "live", *live_overrides(sums))
    assert outcome.status == DONE, outcome.err
    return site.directory / "live"


def without_live(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key.count("/") < 2 or not key.startswith("eval/")} for line in lines]


# What it leaves


def test_training_is_the_same_bit_for_bit_with_and_without(live_run: Path, finished_run: Path) -> None:
    base, *steps = metrics_of(live_run)
    assert base["step"] == 0
    assert without_live(steps) == metrics_of(finished_run)
    assert adapter_of(live_run) == adapter_of(finished_run)


def test_training_with_dropout_is_the_same_bit_for_bit_with_and_without(site: Site, sums: Path, tmp_path: Path) -> None:
    more = ["tuning.lora_dropout=0.3", "train.max_steps=3", "log.eval_steps=1", "data.eval_fraction=0.0"]
    assert site.train(tmp_path / "plain", *more).status == DONE
    assert site.train(tmp_path / "live", *more, *live_overrides(sums)).status == DONE
    assert without_live(metrics_of(tmp_path / "live")[1:]) == metrics_of(tmp_path / "plain")
    assert adapter_of(tmp_path / "live") == adapter_of(tmp_path / "plain")
    assert [step for step, line in enumerate(metrics_of(tmp_path / "live")) if "eval/sums/accuracy" in line] == [0, 1, 2, 3]


def test_metrics_are_the_means_of_the_answers_that_lie_in_eval(live_run: Path) -> None:
    lines = read_jsonl(live_run / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/sums/accuracy" in line] == EVALUATED
    assert sorted(path.name for path in (live_run / "eval").iterdir()) == [f"step-{step:06d}.jsonl" for step in EVALUATED]
    for line in lines:
        if line["step"] not in EVALUATED:
            assert not by_task(line)
            continue
        answers, found = read_jsonl(live_run / "eval" / f"step-{line['step']:06d}.jsonl"), by_task(line)["sums"]
        assert len(answers) == 3
        assert set(found) == NAMES
        assert found["completion_tokens"] == pytest.approx(sum(answer["completion_tokens"] for answer in answers) / 3)
        assert found["end_probability"] == pytest.approx(sum(answer["end_probability"] for answer in answers) / 3)
        assert found["truncated"] == pytest.approx(sum(answer["ending"] == "truncated" for answer in answers) / 3)
        assert found["accuracy"] == pytest.approx(sum(answer["correct"] for answer in answers) / 3)
        assert line["time/eval_seconds"] > 0
        for answer in answers:
            assert 1 <= answer["completion_tokens"] <= NUM_NEW
            assert 0 < answer["end_probability"] < 1
            assert int(answer["gold"]) == 2 * int(answer["problem_id"])
            assert answer["prompt"][-1]["content"].endswith(f"What is {answer['problem_id']} + {answer['problem_id']}?")
            assert answer["verdict"]
            assert answer["reason"]


def test_trained_model_says_something_else_than_the_base(live_run: Path) -> None:
    first, last = (read_jsonl(live_run / "eval" / f"step-{step:06d}.jsonl") for step in (0, NUM_STEPS))
    assert [answer["problem_id"] for answer in first] == [answer["problem_id"] for answer in last]
    assert [answer["output"] for answer in first] != [answer["output"] for answer in last]


def test_page_shows_curves_only_where_there_was_an_evaluation(live_run: Path, finished_run: Path) -> None:
    page, plain = (read_page(run_dir) for run_dir in (live_run, finished_run))
    keys = {"chart-live-accuracy", "chart-live-tokens", "chart-live-endings", "chart-live-end-probability"}
    assert keys <= set(re.findall(r'id="(chart-[a-z-]+)"', page))
    assert "chart-live" not in plain
    for text in (page, plain):
        assert f"{NUM_STEPS} of {NUM_STEPS}" in text
    assert "sums, truncated" in page


def read_page(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_curves_hold_the_values_of_the_steps_that_have_one() -> None:
    first, between, last = {"eval/a/accuracy": 0.25, "eval/b/accuracy": 0.5}, {"eval/loss": 1.0}, {"eval/a/accuracy": 0.75}
    accuracy = live_charts([first, between, last], [0, 1, 2])[0]
    assert accuracy.readout["texts"] == [["0.25", "0.25 at 0", "0.75"], ["0.5", "0.5 at 0", "0.5 at 0"]]
    assert live_charts([between], [1]) == []


def test_line_for_the_terminal_says_what_was_found() -> None:
    found = {"accuracy": 0.125, "completion_tokens": 301.4, "truncated": 0.25, "looping": 0.5, "end_probability": 0.0625}
    line = live_line(4, "gsm8k", found)
    assert line == "gsm8k after step 4: 12.5 % right, 301 tokens, 25 % cut off, 50 % looping, probability of ending 0.062"
    assert "right" not in live_line(4, "gsm8k", {name: value for name, value in found.items() if name != "accuracy"})


# Grading


TEXTS = {
    "right": "So the answer is \\boxed{4}.",
    "wrong": "So the answer is \\boxed{5}.",
    "cut": "Let me think about this sum for a moment, since",
    "loop": "Wait. " * 60,
}


def answered(texts: Sequence[str], monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Any]:
    """The metrics when the model says `texts` to as many problems whose answer is 4; what is cut off has no end token."""
    tokenizer = tiny_tokenizer()
    end_id = tokenizer.eos_token_id
    assert isinstance(end_id, int)

    def decode(model: Any, prompts: Sequence[Any], device: Any, **how: Any) -> list[Decoded]:
        for number in range(3):
            how["go_on"](number < 2)
        chosen = [texts[prompt[0]] for prompt in prompts]
        ended = ["boxed" in text for text in chosen]
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] + [end_id] * end for text, end in zip(chosen, ended, strict=True)]
        return [Decoded(tokens=tuple(one), ended=end, end_probability=0.25) for one, end in zip(tokens, ended, strict=True)]

    monkeypatch.setattr(live_eval, "decode", decode)
    wanted = load_problems(config_of(write_jsonl(path.parent / "fours.jsonl", [{"question": f"{n}?", "answer": "4"} for n in texts])))
    live = LiveEval(
        wanted=wanted,
        prompts=tuple((number,) for number in range(len(texts))),
        endings=Endings(tokenizer=tokenizer, token_ids=frozenset({end_id})),
        max_new_tokens=64,
    )
    checked: list[str] = []
    found = run_live_eval(live, torch.nn.Linear(1, 1), torch.device("cpu"), World(), checked.append, path)  # type: ignore[arg-type]
    assert len(checked) > 3
    return by_task(found)["fours"]


def config_of(*paths: Path, **log: Any) -> Config:
    return tiny_config(log={"eval_tasks": [str(path) for path in paths], "eval_limit": 100, **log})


def test_right_wrong_cut_off_and_looping_answers_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [TEXTS[name] for name in ("right", "wrong", "right", "cut", "loop")]
    found = answered(texts, monkeypatch, tmp_path / "step.jsonl")
    lengths = [answer["completion_tokens"] for answer in read_jsonl(tmp_path / "step.jsonl")]
    assert found == {
        "accuracy": 0.4,
        "completion_tokens": pytest.approx(sum(lengths) / 5),
        "truncated": 0.2,
        "looping": 0.2,
        "end_probability": 0.25,
    }
    answers = read_jsonl(tmp_path / "step.jsonl")
    assert [answer["output"] for answer in answers] == texts, "without the end token"
    assert [answer["extracted"] for answer in answers[:2]] == ["4", "5"]


def test_grader_that_fails_on_answers_makes_them_wrong_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(live_eval.GRADERS, "math", repr)  # gives text and no grade
    found = answered([TEXTS["right"], TEXTS["cut"]], monkeypatch, tmp_path / "step.jsonl")
    assert found["accuracy"] == 0.0
    assert "the grader failed on 2 of 2 answers of the live evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("error", [StructcotError("grader: a worker cannot start"), OSError("no more processes")])
def test_grader_that_cannot_work_leaves_accuracy_out_and_the_rest_in(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            raise error

    monkeypatch.setattr(live_eval, "GraderPool", Broken)
    found = answered([TEXTS["right"], TEXTS["cut"]], monkeypatch, tmp_path / "step.jsonl")
    assert set(found) == NAMES - {"accuracy"}
    assert str(error) in capsys.readouterr().err
    assert all("correct" not in answer for answer in read_jsonl(tmp_path / "step.jsonl"))


# The problems


def test_larger_limit_only_adds_to_a_smaller_one(sums: Path) -> None:
    ids = [[one.problem.id for one in load_problems(config_of(sums, eval_limit=limit))] for limit in (1, 2, 4, 9)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(ids))
    assert sorted(ids[-1]) == ["0", "1", "2", "3", "4"]
    assert ids[-1] != sorted(ids[-1]), "a file may begin with its easiest problems"
    assert shuffled(range(5)) == shuffled(range(5))


def test_model_is_asked_in_the_words_of_the_config(sums: Path) -> None:
    assert [role for role, _ in load_problems(config_of(sums))[0].messages] == ["user"]
    (role, system), (_, asked) = load_problems(config_of(sums, eval_prompt="sky-t1"))[0].messages
    assert role == "system"
    assert "<|begin_of_thought|>" in system
    assert re.fullmatch(r"What is \d \+ \d\?", asked)
    own = tiny_config(data={"system_prompt": "Think first."}, log={"eval_tasks": [str(sums)]})
    assert load_problems(own)[0].messages[0] == ("system", "Think first.")


def test_answer_ends_at_the_tokens_that_templates_and_other_engines_end_at(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prepared: Any = SimpleNamespace(tokenizer=tokenizer, model_dir=tmp_path, spec=SimpleNamespace(vocab_size=384))
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids_of(prepared) == {end_id, tokenizer.eos_token_id}
    for configured, more in ((7, {7}), ([8, 9, 384], {8, 9}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
        assert end_ids_of(prepared) == {end_id, tokenizer.eos_token_id} | more


def test_prompt_ends_where_the_answer_begins(sums: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prepared: Any = SimpleNamespace(tokenizer=tokenizer, model_dir=tmp_path, spec=SimpleNamespace(max_positions=2048, vocab_size=384))
    live = make_live_eval(load_problems(config_of(sums)), config_of(sums), prepared)
    assert live is not None
    turns = [{"role": role, "content": content} for role, content in live.wanted[0].messages]
    assert list(live.prompts[0]) == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert make_live_eval((), config_of(), prepared) is None


# What is refused


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is loaded."""

    def loaded(*arguments: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(start, "build_model", loaded)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ('["gsm9k"]', 'log.eval_tasks: "gsm9k" is no benchmark (did you mean gsm8k?)'),
        ('["nowhere/none.jsonl"]', "log.eval_tasks: "),
        ('["{code}"]', "log.eval_tasks: code is judged by running code"),
        ('["{sums}", "{sums}"]', "two have the same name"),
        ('"{sums}"', "log.eval_tasks"),
    ],
)
def test_task_that_cannot_be_is_refused_before_the_model_is_loaded(tasks: str, words: str, site: Site, sums: Path, tmp_path: Path) -> None:
    code = write_jsonl(tmp_path / "code.jsonl", [{"question": "Print 1.", "tests": [{"input": "", "output": "1"}]}])
    text = tasks.replace("{code}", str(code)).replace("{sums}", str(sums))
    outcome = site.train(tmp_path / "run", f"log.eval_tasks={text}")
    assert outcome.status == WRONG, outcome.err
    assert words in outcome.message


@pytest.mark.usefixtures("no_model")
def test_answers_longer_than_the_model_has_room_for_are_refused(site: Site, sums: Path, tmp_path: Path) -> None:
    outcome = site.train(tmp_path / "run", f'log.eval_tasks=["{sums}"]', "log.eval_max_new_tokens=32760")
    assert outcome.status == WRONG
    assert "log.eval_max_new_tokens: got 32760, but the model has 32768 positions" in outcome.message
    room = re.search(r"use (\d+) or less", outcome.message)
    assert room is not None
    assert 32000 < int(room[1]) < 32760


@pytest.mark.parametrize("value", ["log.eval_limit=0", "log.eval_max_new_tokens=0", "log.eval_prompt=none"])
def test_values_out_of_range_are_refused(value: str, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(value.partition("=")[0])):
        site.config(tmp_path / "run", value)


# Stopping and going on


def test_signal_during_the_first_evaluation_starts_again(site: Site, sums: Path, live_run: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_eval, "decode", signalling(live_eval.decode, signal.SIGTERM, call=1))
        outcome = site.train(tmp_path / "run", *live_overrides(sums))
    assert outcome.status == FAILED
    assert "stopped by SIGTERM before the first step" in outcome.message
    assert site.train(tmp_path / "run", *live_overrides(sums)).status == DONE
    assert metrics_of(tmp_path / "run") == metrics_of(live_run)


def test_signal_during_a_later_evaluation_loses_neither_the_step_nor_what_was_to_be_measured(
    site: Site, sums: Path, live_run: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_eval, "decode", signalling(live_eval.decode, signal.SIGTERM, call=2))
        assert site.train(tmp_path / "run", *live_overrides(sums)).status == STOPPED
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert site.train(tmp_path / "run", *live_overrides(sums)).status == DONE
    assert metrics_of(tmp_path / "run") == metrics_of(live_run)
    assert adapter_of(tmp_path / "run") == adapter_of(live_run)


def test_run_that_is_finished_can_be_evaluated_later(site: Site, sums: Path, finished_run: Path, live_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(finished_run, tmp_path / "run")
    assert site.train(run_dir, *live_overrides(sums)).status == DONE
    assert metrics_of(run_dir)[-1] == metrics_of(live_run)[-1]
    name = f"eval/step-{NUM_STEPS:06d}.jsonl"
    assert (run_dir / name).read_bytes() == (live_run / name).read_bytes()


def test_figures_of_another_base_model_are_not_kept(site: Site, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalling(train.train_step, signal.SIGTERM, call=1))
        assert site.train(tmp_path / "run", *live_overrides(sums)).status == FAILED
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0]
    other = problems_file(tmp_path, "other.jsonl")
    assert site.train(tmp_path / "run", *live_overrides(other), "train.max_steps=1").status == DONE
    assert [set(by_task(line)) for line in metrics_of(tmp_path / "run")] == [{"other"}, {"other"}]


# Ranks


def test_two_ranks_that_share_their_documents_measure_what_one_does(site: Site, sums: Path, tmp_path: Path) -> None:
    more = [*live_overrides(sums), "train.dtype=float32", "train.max_steps=2"]
    assert site.train(tmp_path / "one", *more).status == DONE
    outcomes = train_on_ranks(site, 2, site.overrides(tmp_path / "two", *more, "parallel.sequence=2"))
    assert [outcome.status for outcome in outcomes] == [DONE] * 2, outcomes[0].err
    for step in (0, 2):
        one, two = (read_jsonl(tmp_path / name / "eval" / f"step-{step:06d}.jsonl") for name in ("one", "two"))
        assert [{**answer, "end_probability": 0} for answer in two] == [{**answer, "end_probability": 0} for answer in one]
        assert [answer["end_probability"] for answer in two] == pytest.approx([answer["end_probability"] for answer in one], rel=1e-3)
    one, two = (metrics_of(tmp_path / name)[0]["eval/sums/completion_tokens"] for name in ("one", "two"))
    assert one == two
