"""`structcot segment`: records in, the same records out with the steps and the structure metrics of their thoughts.

`steps` is a list of {start, end, type}, character offsets into the thought, in order and without gaps. A line that holds no answer goes
through as it is and is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from structcot.errors import ConfigError, ServerError
from structcot.files import write_lines_whole
from structcot.parallel import Lines, jobs_of, map_batches
from structcot.server import Server
from structcot.structure.agreement import agreement
from structcot.structure.llm import LlmSegmenter, SegmentError
from structcot.structure.metrics import measure
from structcot.structure.segmenters import SEGMENTERS, Segmenter, Step
from structcot.structure.sentences import paragraphs, sentences
from structcot.structure.summary import Summary
from structcot.tags import read_answer
from structcot.traces import Trace, UnusableTrace, line_of, read_lines, read_trace

LLM = "llm"
# The segmenters that cut by form, without the types: what the chosen one is compared with.
FORMS = {"blank-line": paragraphs, "sentence": sentences}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How to cut: a segmenter by name, the field of the answer, and the server of the segmenter that asks one."""

    segmenter: str
    answer_field: str = ""
    url: str = ""
    model: str = ""
    key: str = "OPENAI_API_KEY"


@dataclass(kw_only=True)
class Batch:
    """A segmented batch: bytes of the output, the summed metrics, and what could not be cut, by reason."""

    output: bytes = b""
    summary: Summary = field(default_factory=Summary)
    unusable: Counter[str] = field(default_factory=Counter)


def segment(source: str, to: str, segmenter: str = "marker", settings: Sequence[str] = ()) -> dict[str, Any]:
    """Segment the records of `source` into `to` ("-" is standard input or output) and return the metrics of the data set.

    Raises:
        ConfigError: naming the argument, setting or file that is wrong.
    """
    values = dict(_setting(text) for text in settings)
    if segmenter not in (*SEGMENTERS, LLM):
        raise ConfigError(f'--segmenter: got "{segmenter}"; use one of {", ".join((*SEGMENTERS, LLM))}')
    if segmenter == LLM and not (values.get("url") and values.get("model")):
        raise ConfigError("--segmenter llm: needs url=URL and model=NAME of an OpenAI-compatible server")
    jobs = jobs_of(values)
    values["answer_field"] = values.pop("field", "")
    values.pop("jobs", None)
    cutting = Cutting(segmenter=segmenter, **values)
    whole = Batch()
    with ExitStack() as stack:
        output = stack.enter_context(write_lines_whole(source, to))
        for batch in map_batches(segment_batch, read_lines(source), cutting, jobs):
            output.write(batch.output)
            whole.summary.merge(batch.summary)
            whole.unusable.update(batch.unusable)
    return {"input": source, "output": to, "segmenter": segmenter, "unusable": dict(whole.unusable), **whole.summary.facts()}


def segment_batch(batch: Lines, cutting: Cutting) -> Batch:
    """Segment a batch of lines."""
    done, output = Batch(), []
    for source, line in batch:
        try:
            trace = read_trace(source, line, cutting.answer_field)
            record = _segmented(trace, cutting)
        except (UnusableTrace, SegmentError, ServerError) as error:
            done.unusable[str(error)] += 1
            output.append(line_of(None, line))
            continue
        done.summary.add(record["metrics"])
        output.append(line_of(record, line))
    done.output = b"".join(output)
    return done


def summary_of(facts: Mapping[str, Any]) -> str:
    """What a person wants to know first, a line each."""
    lines = [f"{facts['traces']:,} traces segmented by {facts['segmenter']}"]
    lines += [f"{count:,} left as they are: {reason}" for reason, count in facts["unusable"].items()]
    if not facts["traces"]:
        return "\n".join(lines)
    lines += [f"{name.replace('_', ' '):26} {100 * share:.1f} %" for name, share in facts["shares"].items()]
    for name, one in facts["distributions"].items():
        lines.append(f"{name.replace('_', ' '):26} mean {one['mean']:,.2f}, median {one['median']:,.2f}, 90 % below {one['p90']:,.2f}")
    return "\n".join(lines)


def _segmented(trace: Trace, cutting: Cutting) -> dict[str, Any]:
    answer = read_answer(trace.text)
    steps = _segmenter(cutting)(answer.thought)
    metrics = measure(answer, steps)
    metrics["agreement"] = {
        f"{cutting.segmenter}/{name}": agreement(answer.thought, steps, [Step(*span, "") for span in spans(answer.thought)]).facts()
        for name, spans in FORMS.items()
        if name != cutting.segmenter
    }
    return {**trace.record, "steps": [asdict(step) for step in steps], "metrics": metrics}


@cache
def _segmenter(cutting: Cutting) -> Segmenter:
    if cutting.segmenter != LLM:
        return SEGMENTERS[cutting.segmenter]
    return LlmSegmenter(Server(url=cutting.url, model=cutting.model, key_variable=cutting.key))


def _setting(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or name.strip() not in ("field", "jobs", "url", "model", "key"):
        raise ConfigError(f'"{text}": is no setting; use field=NAME, jobs=N, url=URL, model=NAME or key=VARIABLE')
    return name.strip(), value.strip()


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("segment")
