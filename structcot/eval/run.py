"""An evaluation from its config to its report: problems -> requests -> outputs -> grades -> results.

Outputs are kept as they come, so the same command goes on after whatever ended it, and grades what is there without the model where nothing
is missing.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from structcot.console import say
from structcot.errors import ConfigError, MismatchError, StoppedWithCheckpoint, StructcotError
from structcot.eval.config import EvalConfig, TaskConfig
from structcot.eval.engine import Request, Sampling
from structcot.eval.engines import open_engine
from structcot.eval.forcing import force_answers, is_to_force
from structcot.eval.grading import grade_samples, need_graders
from structcot.eval.prompts import PromptStyle, messages_of, prompt_styles
from structcot.eval.report import write_reports
from structcot.eval.samples import Sample, SampleFile, Wanted, sample_of, turns_of
from structcot.eval.subject import Subject, find_subject
from structcot.eval.summary import compare, summarise
from structcot.eval.tasks import LoadedTask, Task, find_task, load_task
from structcot.files import json_sha256, write_text
from structcot.rundir import locked, write_manifest
from structcot.signals import STOPPING, StopRequested

# What decides an output: a sample made under other values is another sample. Tasks, limits and numbers of samples may grow.
OUTPUT_KEYS = ("engine", "dtype", "seed", "sampling", "prompt", "system_prompt")
SAMPLES = "samples.jsonl"


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run an evaluation from wherever its output directory stands, and return its results.

    Raises:
        ConfigError: if the config names what is not there.
        MismatchError: if the output directory holds samples of another evaluation.
        StoppedWithCheckpoint: if a signal stopped it; the same call goes on.
        StructcotError: if a task, a model or a server cannot be used; see structcot.errors.
    """
    output_dir = Path(config.output_dir or default_output_dir(config))
    style = prompt_styles()[config.prompt]
    if config.system_prompt:
        style = PromptStyle(system=config.system_prompt, template=style.template)
    tasks = [load_task(find_task(one), config.data_dir) for one in config.tasks]
    wanted = [one for task, asked in zip(tasks, config.tasks, strict=True) for one in wanted_of(task, asked, config, style)]
    need_graders((one.problem for one in wanted), config)
    others = {name: read_samples(Path(name)) for name in config.compare_with}
    with locked(output_dir):
        subject = find_subject(config)
        file = SampleFile(output_dir / SAMPLES)
        check_same(file, wanted, identity_of(subject, config), output_dir)
        write_text(output_dir / "eval.toml", config.to_toml())
        write_text(output_dir / "identity.json", json.dumps(identity_of(subject, config), indent=2) + "\n")
        with stopped_by_signals(file, wanted):
            generate(file, wanted, subject, config)
            problems = {one.key: one.problem for one in wanted}
            lines = grade_samples([file.samples[one.key] for one in wanted], problems, config)
        file.replace(lines)
        hashes = {"config": json_sha256(config.model_dump(mode="json")), **subject.hashes}
        hashes |= {f"answers/{task.task.name}": task.answers_sha256 for task in tasks}
        write_manifest(output_dir, hashes, {"engine": config.engine})
        results = {**facts_of(subject, config, tasks), **summarise(lines, config.seed)}
        results["warnings"] += [
            f"{one.task.name}: {one.origin} has other answers than the released version; this is not the benchmark's figure"
            for one in tasks
            if one.is_released is False
        ]
        comparisons = [compare(lines, samples, output_dir.name, Path(name).name, config.seed) for name, samples in others.items()]
        write_reports(output_dir, results, lines, comparisons, title=subject.name)
        return {**results, "comparisons": comparisons}


def default_output_dir(config: EvalConfig) -> str:
    """A directory named after what is evaluated."""
    model = config.adapter or config.model_name_or_path or config.server.model
    return str(Path("runs") / "eval" / "-".join(part for part in model.strip("/.").split("/")[-3:] if part not in ("", ".", "..")))


def wanted_of(loaded: LoadedTask, asked: TaskConfig, config: EvalConfig, style: PromptStyle) -> Iterator[Wanted]:
    """Every output that is asked for of one task: the samples of a problem side by side."""
    limit = asked.limit or config.limit
    for problem in loaded.problems[:limit]:
        messages = messages_of(problem, style, loaded.task.template)
        for sample in range(asked.num_samples or config.sampling.num_samples):
            yield Wanted(task=loaded.task.name, problem=problem, sample=sample, messages=messages)


def sampling_of(task: Task, asked: TaskConfig, config: EvalConfig) -> Sampling:
    """How the tokens of a task's outputs are chosen."""
    given = config.sampling
    return Sampling(
        temperature=given.temperature if asked.temperature is None else asked.temperature,
        top_p=given.top_p if asked.top_p is None else asked.top_p,
        top_k=given.top_k,
        max_new_tokens=given.max_new_tokens or task.max_new_tokens,
        stop=tuple(given.stop),
    )


def generate(file: SampleFile, wanted: Sequence[Wanted], subject: Subject, config: EvalConfig) -> None:
    """Have the model write every output that is missing, and keep each as soon as it is finished."""
    missing = {one.key: one for one in wanted if one.key not in file.samples}
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} outputs are there already")
    if not missing and not to_force(file, config):
        return
    engine = open_engine(subject, config)
    with file:
        for asked in config.tasks:
            requests = [Request(key=key, messages=one.messages, seed=config.seed) for key, one in missing.items() if one.task == asked.name]
            bar = tqdm(total=len(requests), desc=asked.name, unit="output", dynamic_ncols=True, mininterval=1.0)
            num_tokens, start_seconds = 0, time.perf_counter()
            with bar:
                for output in engine(requests, sampling_of(find_task(asked), asked, config)) if requests else ():
                    file.append(sample_of(missing[output.key], output))
                    num_tokens += output.completion_tokens
                    bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start_seconds):,.0f} tokens/s", refresh=False)
                    bar.update(1)
        sampling = Sampling(max_new_tokens=config.sampling.forced_answer_tokens, stop=tuple(config.sampling.stop))
        for sample in force_answers(to_force(file, config), {one.key: one for one in wanted}, engine, sampling, config.seed):
            file.append(sample)


def to_force(file: SampleFile, config: EvalConfig) -> list[Sample]:
    """The outputs that are still to be asked for an answer after a forced end of their thought."""
    return [sample for sample in file.samples.values() if is_to_force(sample)] if config.sampling.forced_answer_tokens else []


def identity_of(subject: Subject, config: EvalConfig) -> dict[str, Any]:
    """What an output depends on, as JSON values."""
    values = config.model_dump(mode="json")
    decided = {key: values[key] for key in OUTPUT_KEYS}
    decided["sampling"] = {key: value for key, value in decided["sampling"].items() if key != "num_samples"}
    return {"model": subject.model, **subject.hashes, **decided}


def check_same(file: SampleFile, wanted: Sequence[Wanted], identity: Mapping[str, Any], output_dir: Path) -> None:
    """Make sure that the samples in the output directory belong to this evaluation, and that all of them are asked for.

    Raises:
        MismatchError: naming what differs.
    """
    path = output_dir / "identity.json"
    if not file.samples:
        return
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    differing = [key for key in identity if before.get(key) != identity[key]]
    if differing:
        key = differing[0]
        raise MismatchError(
            f"output_dir: {output_dir} holds an evaluation with {key} {json.dumps(before.get(key))}, not {json.dumps(identity[key])};"
            " name another directory"
        )
    prompts = {one.key: one.messages for one in wanted}
    for key, sample in file.samples.items():
        if key not in prompts:
            raise MismatchError(f"output_dir: {output_dir} holds sample {key}, which is not asked for; name another directory")
        if sample.prompt != turns_of(prompts[key]):
            raise MismatchError(f"output_dir: {output_dir} holds sample {key} of another prompt; name another directory")


@contextmanager
def stopped_by_signals(file: SampleFile, wanted: Sequence[Wanted]) -> Iterator[None]:
    """Leave at once when a signal asks for it: what is finished is on disk.

    Raises:
        StoppedWithCheckpoint: saying how much there is.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    except StopRequested as request:
        raise StoppedWithCheckpoint(f"stopped by {request}; {_so_far(file, wanted)}, the same command goes on") from None
    except StructcotError as error:
        if not file.samples:
            raise
        raise type(error)(f"{error}; {_so_far(file, wanted)}, the same command goes on") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _so_far(file: SampleFile, wanted: Sequence[Wanted]) -> str:
    return f"{len(file.samples)} of {len(wanted)} outputs are kept"


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """The graded samples of a finished evaluation.

    Raises:
        ConfigError: if there is none in `directory`.
    """
    path = directory / SAMPLES
    if not path.is_file():
        raise ConfigError(f"compare_with: {path} is not there; give the output directory of a finished evaluation")
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    if not all(line["verdict"] for line in lines):
        raise ConfigError(f"compare_with: {path} has outputs without grades; let that evaluation finish first")
    return lines


def facts_of(subject: Subject, config: EvalConfig, tasks: Sequence[LoadedTask]) -> dict[str, Any]:
    """What the results are of, for whoever reads them without the config."""
    return {
        "model": subject.name,
        "adapter": subject.adapter,
        "sha256": dict(subject.hashes),
        "engine": config.engine,
        "prompt": config.prompt,
        "sampling": {
            task.task.name: asdict(sampling_of(task.task, asked, config)) for task, asked in zip(tasks, config.tasks, strict=True)
        },
        "seed": config.seed,
        "grader": config.grading.math,
        "sources": {
            task.task.name: {"origin": task.origin, "answers_sha256": task.answers_sha256, "is_released": task.is_released}
            for task in tasks
        },
    }
