"""Live evaluation: a few fixed problems that the model answers every `log.eval_steps` steps, with the weights of that moment.

A loss tells how likely the demonstrations are, not whether the model reasons: whether its answers are right, how long they grow, whether it
still ends them. The problems are the first `log.eval_limit` of each task in one shuffled order, the same in every run. Each rank answers
its share by `structcot.model.decoding`; the first one grades all, in other processes, and writes them to OUTPUT/eval/, one file a step.
Nothing of training changes by it: no weight, no gradient, no random number.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from structcot.config import Config
from structcot.config_file import checked
from structcot.console import say
from structcot.data.records import Message
from structcot.data.turns import UnfitRecord, chat_template, lay_out
from structcot.distributed import World
from structcot.errors import ConfigError, StructcotError
from structcot.eval.config import EvalConfig
from structcot.eval.decoding import Endings
from structcot.eval.engine import Output
from structcot.eval.grading import case_of
from structcot.eval.prompts import PromptStyle, messages_of, prompt_styles
from structcot.eval.samples import Sample, Wanted, sample_of
from structcot.eval.tasks import find_task, load_task
from structcot.files import write_text
from structcot.grading.case import Case, Grade
from structcot.grading.graders import GRADERS
from structcot.grading.isolated import GraderPool
from structcot.metrics import Metrics
from structcot.model.decoder import Decoder
from structcot.model.decoding import Decoded, decode
from structcot.prepare import Prepared

ROWS_AT_ONCE = 32
"""Answers that a rank writes at a time."""

GRADER_PROCESSES, GRADER_SECONDS = 2, 10.0
"""So many graders work at a time, each so long at one answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEval:
    """The problems as the model reads them: `prompts[n]` are the tokens that ask `wanted[n]`."""

    wanted: tuple[Wanted, ...]
    prompts: tuple[tuple[int, ...], ...]
    endings: Endings
    max_new_tokens: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(dict.fromkeys(one.task for one in self.wanted))


def load_problems(config: Config) -> tuple[Wanted, ...]:
    """The problems that `log.eval_tasks` names, each with the messages that ask it; needs no model.

    `data.system_prompt`, where there is one, takes the place of the style's own: the model is asked as it is trained.

    Raises:
        ConfigError: if a task is unknown, cannot be read as problems, or is judged by running code.
        DataError, FetchError: if a task's file is wrong or cannot be fetched.
    """
    if not config.log.eval_tasks:
        return ()
    asked = {"tasks": config.log.eval_tasks, "prompt": config.log.eval_prompt, "model_name_or_path": config.model_name_or_path}
    evaluation = checked(EvalConfig, asked, origin="log.eval_tasks")
    style = prompt_styles()[evaluation.prompt]
    style = PromptStyle(system=config.data.system_prompt or style.system, template=style.template)
    wanted: list[Wanted] = []
    for entry in evaluation.tasks:
        try:
            task = load_task(find_task(entry))
        except ConfigError as error:
            raise ConfigError(f"log.eval_tasks: {str(error).removeprefix('tasks: ')}") from error
        if any(problem.tests for problem in task.problems):
            raise ConfigError(
                f"log.eval_tasks: {entry.name} is judged by running code, which training does not do; evaluate it by structcot eval, "
                "and give tasks with answers here"
            )
        for problem in shuffled(task.problems)[: config.log.eval_limit]:
            messages = messages_of(problem, style, task.task.template)
            wanted.append(Wanted(task=entry.name, problem=problem, sample=0, messages=messages))
    return tuple(wanted)


def shuffled(problems: Sequence[Any]) -> list[Any]:
    """The same items in an order that is always the same, so that a larger limit only adds to a smaller one."""
    order = list(problems)
    random.Random(0).shuffle(order)
    return order


def make_live_eval(wanted: tuple[Wanted, ...], config: Config, prepared: Prepared) -> LiveEval | None:
    """The problems in the model's tokens; None where there are none.

    Raises:
        ConfigError: if the chat template refuses a prompt, or the model has no room for one and its answer.
    """
    if not wanted:
        return None
    template, tokenizer = chat_template(prepared.tokenizer), prepared.tokenizer
    prompts = []
    for one in wanted:
        try:
            text = template.render([Message(role=role, content=content) for role, content in one.messages], generation_prompt=True)
        except UnfitRecord as error:
            raise ConfigError(f"log.eval_tasks: {one.key}: {error}; choose another log.eval_prompt") from error
        prompts.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    longest, room = max(map(len, prompts)), prepared.spec.max_positions
    if longest + config.log.eval_max_new_tokens > room:
        raise ConfigError(
            f"log.eval_max_new_tokens: got {config.log.eval_max_new_tokens}, but the model has {room} positions, of which a prompt of"
            f" log.eval_tasks takes {longest}; use {max(1, room - longest)} or less, or other tasks"
        )
    endings = Endings(tokenizer=tokenizer, token_ids=end_ids_of(prepared))
    return LiveEval(wanted=wanted, prompts=tuple(prompts), endings=endings, max_new_tokens=config.log.eval_max_new_tokens)


def end_ids_of(prepared: Prepared) -> frozenset[int]:
    """The tokens that end an answer: the one that demonstrations end with, and those that other engines stop at."""
    turns = [Message(role="user", content="Question"), Message(role="assistant", content="Answer")]
    path = prepared.model_dir / "generation_config.json"
    configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = [lay_out(turns, chat_template(prepared.tokenizer)).turns[0].end_id, prepared.tokenizer.eos_token_id]
    ids += configured if isinstance(configured, list) else [configured]
    return frozenset(one for one in ids if isinstance(one, int) and one < prepared.spec.vocab_size)


def run_live_eval(live: LiveEval, model: Decoder, device: torch.device, world: World, check: Callable[[str], None], path: Path) -> Metrics:
    """Answer all problems with the model as it is, write the answers to `path`, and return the metrics, the same on every rank.

    `check` is called between tokens, with what is being done, and may raise to stop.

    Raises:
        ConfigError: if there is not enough memory.
    """
    start_seconds = time.perf_counter()
    answers = answer_together(live, model, device, world, check)
    check("grading the answers of the live evaluation")
    metrics = world.first(lambda: judge(live, answers, path))
    return {**metrics, "time/eval_seconds": time.perf_counter() - start_seconds}


def answer_together(live: LiveEval, model: Decoder, device: torch.device, world: World, check: Callable[[str], None]) -> list[Decoded]:
    """The answers to all problems, in their order, on every rank: each rank writes those of its share."""
    num_tokens = 0

    def go_on(has_rows: bool) -> bool:
        nonlocal num_tokens
        check(f"writing the answers of the live evaluation, after {num_tokens} tokens")
        num_tokens += 1
        return world.any(has_rows)

    num_prompts, own = len(live.prompts), list(range(world.rank, len(live.prompts), world.size))
    answers: dict[int, Decoded] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, -(-num_prompts // world.size), ROWS_AT_ONCE):
            places = own[start : start + ROWS_AT_ONCE]
            prompts = [live.prompts[place] for place in places]
            written = decode(model, prompts, device, end_ids=live.endings.token_ids, max_new_tokens=live.max_new_tokens, go_on=go_on)
            answers |= zip(places, written, strict=True)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"log.eval_tasks: the answers of the live evaluation do not fit into the memory of rank {world.rank}: {error}; lower"
            " log.eval_limit or log.eval_max_new_tokens"
        ) from error
    finally:
        model.train(was_training)
    everyone = {place: answer for part in world.gather(answers) for place, answer in part.items()}
    return [everyone[place] for place in range(num_prompts)]


def judge(live: LiveEval, answers: Sequence[Decoded], path: Path) -> Metrics:
    """Grade the answers, write them to `path` and return the metrics of all tasks."""
    samples = [sample_from(one, prompt, answer, live) for one, prompt, answer in zip(live.wanted, live.prompts, answers, strict=True)]
    grades = grade([case_of(sample, one.problem) for sample, one in zip(samples, live.wanted, strict=True)])
    lines = [line_of(*parts) for parts in zip(samples, grades or [None] * len(samples), answers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {name: value for task in live.names for name, value in means_of(task, [line for line in lines if line["task"] == task])}


def grade(cases: Sequence[Case]) -> list[Grade] | None:
    """Judge answers in processes of their own; None, and a word to the user, where that fails: training goes on without."""
    try:
        with GraderPool(GRADERS["math"], jobs=GRADER_PROCESSES, limit_seconds=GRADER_SECONDS) as pool:
            grades = list(pool.map(cases))
    except (StructcotError, OSError) as error:
        say(f"note: the answers of the live evaluation could not be graded, and have no accuracy: {error}")
        return None
    failed = [one.reason for one in grades if one.verdict in ("error", "timeout")]
    if failed:
        say(f"note: the grader failed on {len(failed)} of {len(grades)} answers of the live evaluation, which count as wrong: {failed[0]}")
    return grades


def sample_from(wanted: Wanted, prompt: Sequence[int], answer: Decoded, live: LiveEval) -> Sample:
    """An answer as an evaluation keeps it."""
    output = Output(
        key=wanted.key,
        text=live.endings.text(answer.tokens)[0],
        finish_reason="stop" if answer.ended else "length",
        prompt_tokens=len(prompt),
        completion_tokens=len(answer.tokens),
        seconds=0.0,
    )
    return sample_of(wanted, output)


def line_of(sample: Sample, graded: Grade | None, answer: Decoded) -> dict[str, Any]:
    """What a person reads of an answer, under the names of an evaluation's samples.jsonl; `graded` is None where no grader worked."""
    line = {
        "task": sample.task,
        "problem_id": sample.problem_id,
        "prompt": sample.prompt,
        "output": sample.output,
        "gold": sample.gold,
        "ending": sample.ending,
        "completion_tokens": sample.completion_tokens,
        "end_probability": answer.end_probability,
    }
    if graded is not None:
        line |= {"extracted": graded.extracted, "verdict": graded.verdict, "correct": graded.correct, "reason": graded.reason}
    return line


def means_of(task: str, lines: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """The metrics of a task: means over its answers, and shares of them."""
    means = [
        ("completion_tokens", fmean(line["completion_tokens"] for line in lines)),
        ("truncated", fmean(line["ending"] == "truncated" for line in lines)),
        ("looping", fmean(line["ending"] == "looping" for line in lines)),
        ("end_probability", fmean(line["end_probability"] for line in lines)),
    ]
    if all("correct" in line for line in lines):
        means.insert(0, ("accuracy", fmean(line["correct"] for line in lines)))
    return [(f"eval/{task}/{name}", value) for name, value in means]
