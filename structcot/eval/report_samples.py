"""What a report shows of single samples: a sign for each in a matrix of problems, and some of the failures at length.

Samples are read once and as they come, and only what is shown is kept, so outputs of any number and length pass through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from structcot.page import safe_text

# Why a sample is or is not right: a sign and words, the grader's own failures first. Colour comes from the style sheet by the key.
KINDS = {
    "error": ("!", "the grader failed"),
    "timeout": ("t", "the grader ran out of time"),
    "refused": ("\u00d7", "refused, nothing generated"),
    "looping": ("\u221e", "cut off in a loop"),
    "truncated": ("\u2026", "cut off"),
    "no_answer": ("?", "no answer found"),
    "wrong": ("\u2212", "wrong"),
    "right": ("+", "right"),
}
MAX_SIGNS, MAX_SIGNS_IN_ROW = 20_000, 16
MAX_FAILURES_OF_TASK = 20
MAX_FAILURES = 200
PROMPT_CHARACTERS = 2000
OUTPUT_START_CHARACTERS, OUTPUT_END_CHARACTERS = 1000, 3000
LINE_CHARACTERS, SUMMARY_CHARACTERS = 200, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A sample that is not right, with as much of its texts as is shown."""

    kind: str
    problem_id: str
    sample: int
    facts: tuple[tuple[str, str], ...]
    prompt: str
    output: str


@dataclass(slots=True)
class TaskSamples:
    """The samples of one task: their signs by problem, problems by group, and failures by kind."""

    group_of: dict[str, str] = field(default_factory=dict)
    signs_of: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def kind_of(sample: Mapping[str, Any]) -> str:
    """Say why a sample is right or not: a key of `KINDS`. What ended an output early explains a missing answer better than its absence."""
    if sample["correct"]:
        return "right"
    if sample["verdict"] in ("error", "timeout"):
        return sample["verdict"]
    if sample["ending"] in ("refused", "looping", "truncated"):
        return sample["ending"]
    return "no_answer" if sample["verdict"] == "no_answer" else "wrong"


def collect(samples: Iterable[Mapping[str, Any]]) -> dict[str, TaskSamples]:
    """Keep what is shown of the samples, by task."""
    tasks: dict[str, TaskSamples] = {}
    num_signs = 0
    for sample in samples:
        task, kind, problem = tasks.setdefault(str(sample["task"]), TaskSamples()), kind_of(sample), str(sample["problem_id"])
        task.counts[kind] += 1
        if num_signs < MAX_SIGNS:
            task.group_of.setdefault(problem, str(sample["group"]))
            task.signs_of.setdefault(problem, []).append((int(sample["sample"]), kind, _hint(sample, kind)))
            num_signs += 1
        kept = task.failures.setdefault(kind, [])
        if kind != "right" and len(kept) < MAX_FAILURES_OF_TASK:
            kept.append(_failure(sample, kind))
    return tasks


def matrix(task: TaskSamples) -> str:
    """Write the signs of a task: one box for each problem with a sign for each of its samples, in the groups of the problems."""
    in_order = sorted(task.signs_of, key=lambda problem: task.group_of[problem])
    num_samples = max((len(signs) for signs in task.signs_of.values()), default=0)
    blocks = []
    for group, problems in groupby(in_order, key=lambda problem: task.group_of[problem]):
        boxes = "".join(_box(problem, sorted(task.signs_of[problem]), num_samples) for problem in problems)
        title = f"<h4>{safe_text(group)}</h4>" if len(set(task.group_of.values())) > 1 else ""
        wide = f' wide" style="--samples:{min(num_samples, MAX_SIGNS_IN_ROW)}' if num_samples > 1 else ""
        blocks.append(f'{title}<ul class="matrix{wide}">{boxes}</ul>')
    shown = sum(map(len, task.signs_of.values()))
    left_out = task.counts.total() - shown
    more = f"<p>{left_out:,} more samples are not shown here; samples.jsonl has them all.</p>" if left_out else ""
    return "".join(blocks) + more


def legend(task: TaskSamples) -> str:
    """Write the signs that occur, with their meaning and number, right ones first."""
    kinds = [kind for kind in reversed(KINDS) if task.counts[kind]]
    entries = "".join(f'<li><i class="sign {kind}">{KINDS[kind][0]}</i> {KINDS[kind][1]}: {task.counts[kind]:,}</li>' for kind in kinds)
    return f'<ul class="kinds">{entries}</ul>'


def failures_of(task: TaskSamples) -> list[Failure]:
    """Give the failures that are shown of a task: those of the grader first, then each other kind in turn, so that none is crowded out."""
    own = [failure for kind in ("error", "timeout") for failure in task.failures.get(kind, ())]
    others = [task.failures.get(kind, []) for kind in KINDS if kind not in ("error", "timeout", "right")]
    most = max(map(len, others), default=0)
    mixed = [listed[turn] for turn in range(most) for listed in others if turn < len(listed)]
    return [*own, *mixed][:MAX_FAILURES_OF_TASK]


def failure_entry(failure: Failure) -> str:
    """Write one failure as an entry that opens: what was judged, the prompt, and both ends of the output."""
    sign, meaning = KINDS[failure.kind]
    facts = "".join(f"<dt>{name}</dt><dd>{safe_text(value) or '<i>empty</i>'}</dd>" for name, value in failure.facts)
    name = f"{failure.problem_id}, sample {failure.sample}"
    answer, reference = (_line(value, SUMMARY_CHARACTERS) for _, value in failure.facts[:2])
    short = (
        f": <code>{safe_text(answer)}</code>, not <code>{safe_text(reference)}</code>"
        if failure.kind == "wrong" and answer and reference
        else ""
    )
    return (
        f'<details class="failure"><summary><i class="sign {failure.kind}">{sign}</i> <b>{safe_text(name)}</b> {meaning}{short}</summary>'
        f'<dl>{facts}</dl><h4>Prompt</h4><pre tabindex="0">{safe_text(failure.prompt)}</pre>'
        f'<h4>Output</h4><pre tabindex="0">{safe_text(failure.output)}</pre></details>'
    )


def cut(text: str, start: int, end: int) -> str:
    """Keep the first `start` and the last `end` characters of a text, and say what is left out between them."""
    left_out = len(text) - start - end
    return text if left_out <= 0 else f"{text[:start]}\n[... {left_out:,} characters are left out here ...]\n{text[len(text) - end :]}"


def _box(problem: str, signs: list[tuple[int, str, str]], num_samples: int) -> str:
    cells = "".join(f'<i class="sign {kind}" title="{safe_text(hint)}">{KINDS[kind][0]}</i>' for _, kind, hint in signs)
    if num_samples == 1:
        return f"<li>{cells}</li>"
    right = sum(kind == "right" for _, kind, _ in signs)
    return f'<li><b>{safe_text(_line(problem, 24))}</b><span class="signs">{cells}</span><em>{right} of {len(signs)}</em></li>'


def _hint(sample: Mapping[str, Any], kind: str) -> str:
    said = f"{_line(sample['problem_id'], 60)}, sample {sample['sample']}: {KINDS[kind][1]}"
    reason = _line(sample.get("reason", ""), 100)
    return f"{said}; {reason}; {sample['completion_tokens']:,} tokens" if reason else f"{said}; {sample['completion_tokens']:,} tokens"


def _failure(sample: Mapping[str, Any], kind: str) -> Failure:
    facts = (
        ("answer", _line(sample["extracted"])),
        ("reference", _line(sample["gold"])),
        ("reason", _line(sample.get("reason", ""))),
        ("ending", f"{sample['ending']}, {sample['completion_tokens']:,} tokens"),
    )
    return Failure(
        kind=kind,
        problem_id=_line(sample["problem_id"], 60),
        sample=int(sample["sample"]),
        facts=facts,
        prompt=cut("\n\n".join(_turns(sample.get("prompt", ""))), PROMPT_CHARACTERS // 2, PROMPT_CHARACTERS // 2),
        output=cut(str(sample.get("output", "")), OUTPUT_START_CHARACTERS, OUTPUT_END_CHARACTERS),
    )


def _turns(prompt: Any) -> Iterator[str]:
    """Write a prompt as text, whether it is text or a list of turns."""
    if isinstance(prompt, str):
        yield prompt
        return
    for turn in prompt:
        role, content = (turn.get("role", ""), turn.get("content", "")) if isinstance(turn, Mapping) else turn
        yield f"{role}: {content}"


def _line(text: object, limit: int = LINE_CHARACTERS) -> str:
    """Write the beginning of a text on one line."""
    start = str(text)[: 2 * limit]
    line = " ".join(start.split())
    return line if len(line) <= limit and len(start) == len(str(text)) else f"{line[:limit]}\u2026"
