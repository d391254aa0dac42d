"""An answer from a thought that did not end: the thought is ended for the model, which then has some tokens for its solution.

It tells a model that reasons to no end from one that reasons wrongly. The plain score counts such an output as it is; what comes of the
forced end stands beside it and never in its place (Muennighoff et al. 2025, arXiv 2501.19393, call it budget forcing).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from structcot.eval.engine import Engine, Request, Sampling
from structcot.eval.samples import Sample, Wanted
from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS


def forced_prefix(output: str) -> str:
    """The output with its thought ended and, where the tags have one, its solution begun; "" if it holds no open thought."""
    for opening, closing in THOUGHT_TAGS:
        if opening in output and closing not in output and SOLUTION_TAGS[0] not in output:
            solution = f"\n\n{SOLUTION_TAGS[0]}\n\n" if closing != "</think>" else "\n\n"
            return f"{output.rstrip()}\n\n{closing}{solution}"
    return ""


def is_to_force(sample: Sample) -> bool:
    """Whether an output was cut inside its thought and no answer was forced out of it yet."""
    return sample.finish_reason == "length" and sample.forced_output is None and bool(forced_prefix(sample.output))


def forced_response(sample: Sample) -> str:
    """The whole answer as it is judged: the output, the end of its thought, and what the model wrote then."""
    return forced_prefix(sample.output) + (sample.forced_output or "")


def force_answers(
    samples: Iterable[Sample], wanted: Mapping[str, Wanted], engine: Engine, sampling: Sampling, seed: int
) -> Iterator[Sample]:
    """Yield each sample with `forced_output`; one whose context has no room left gets an empty one."""
    by_key = {sample.key: sample for sample in samples}
    requests = [
        Request(key=key, messages=wanted[key].messages, prefill=forced_prefix(sample.output), seed=seed) for key, sample in by_key.items()
    ]
    for output in engine(requests, sampling) if requests else ():
        yield replace(by_key[output.key], forced_output=output.text)
