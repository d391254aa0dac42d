"""The stage that brings every answer into one format: a thought between its tags, then a solution between its own.

Answers with `<think>` are rewritten by rule, those in the format stay as they are. Of others nobody but a reader can tell where the thought
ends: a model is asked to copy them into two sections, and its copy counts only if it kept the words, added few, and gives the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rapidfuzz.distance import LCSseq

from structcot.answers import answer_of, final_answer
from structcot.curate.asking import ANSWERS, Answer, AnswerFile, ask_all
from structcot.curate.config import ReformatConfig
from structcot.curate.stages import Record, StageFiles
from structcot.eval.engine import Request
from structcot.grading.code import extract_program
from structcot.structure.metrics import split_words
from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS, read_answer

(BEGIN_THOUGHT, END_THOUGHT), (BEGIN_SOLUTION, END_SOLUTION) = THOUGHT_TAGS[0], SOLUTION_TAGS
ASKS = f"""Below is an answer to a problem. Copy it word by word into two sections, and write nothing else.

First all of its thinking, as it stands, with every attempt, doubt and step back, between the tags {BEGIN_THOUGHT} and {END_THOUGHT}.
Then its final solution between the tags {BEGIN_SOLUTION} and {END_SOLUTION}: the result with the reasoning that leads to it{{detail}}.
Correct nothing, leave nothing out, add nothing.

The answer:

{{answer}}"""
MATH_DETAIL = ", the final answer in \\boxed{}"
CODE_DETAIL = ", with the whole program in exactly one block between ``` fences"
_BLANKS = re.compile(r"\s+")


def reformat(config: ReformatConfig, seed: int, records: Iterator[Record], files: StageFiles) -> None:
    """Rewrite every answer. A record that stays has it in `text`, and in `reformatted` how it came there: "as it was", "rule" or "model".

    Raises:
        StructcotError: if the model could not be asked for all; the same call goes on.
    """
    server = config.server
    if server is None:
        for record in records:
            by_rule(record, files, config.untagged)
        return
    with AnswerFile(files.directory / ANSWERS) as answers:
        ask_all(
            server, [request_of(record, seed) for record in files.look() if not has_thought(record["answer"])], answers, what="reformat"
        )
        for record in records:
            if has_thought(record["answer"]):
                by_rule(record, files)
            else:
                by_model(record, answers.need(server, request_of(record, seed)), config.kept_words, files)


def has_thought(text: str) -> bool:
    """Whether an answer has tags of a thought, so that rules suffice."""
    return any(tag in text for pair in THOUGHT_TAGS for tag in pair)


def by_rule(record: Record, files: StageFiles, untagged: str = "reject") -> None:
    """Put the thought and the solution of an answer between the tags of the format."""
    text = record["answer"].strip()
    if untagged == "last-paragraph" and not has_thought(text) and "\n" in text:
        thought, _, solution = text.rpartition("\n\n" if "\n\n" in text else "\n")
        whole = {**record, "text": tagged(thought.strip(), solution.strip()), "reformatted": "last paragraph"}
        if record["tests"] and not _same_answer(record, whole["text"]):
            files.reject(record, "the last paragraph is not the program that passes")
        else:
            files.keep(whole)
        return
    answer = read_answer(record["answer"])
    if answer.defect:
        files.reject(record, "there are no tags of a thought" if not has_thought(answer.text) else "the tags are broken", answer.defect)
        return
    thought, solution = answer.thought.strip(), answer.solution.strip()
    if not thought or not solution:
        files.reject(record, "the thought or the solution is empty")
        return
    text = tagged(thought, solution)
    files.keep({**record, "text": text, "reformatted": "as it was" if text == record["answer"].strip() else "rule"})


def by_model(record: Record, copied: Answer, kept_words: float, files: StageFiles) -> None:
    """Take a model's copy if it is one."""
    answer = read_answer(copied.text)
    thought, solution = answer.thought.strip(), answer.solution.strip()
    if copied.finish_reason != "stop":
        files.reject(record, "the copy of the model was cut off")
    elif answer.defect or not thought or not solution or not copied.text.strip().startswith(BEGIN_THOUGHT):
        files.reject(record, "the copy of the model is not in the format", answer.defect)
    elif (share := fidelity(record["answer"], f"{thought} {solution}")) < kept_words:
        files.reject(record, "the copy of the model has other words", f"{100 * share:.1f} % are the same")
    elif not _same_answer(record, tagged(thought, solution)):
        files.reject(record, "the copy of the model gives another answer")
    else:
        files.keep({**record, "text": tagged(thought, solution), "reformatted": "model", "fidelity": round(share, 4)})


def tagged(thought: str, solution: str) -> str:
    """An answer in the format of the paper's data."""
    return f"{BEGIN_THOUGHT}\n\n{thought}\n\n{END_THOUGHT}\n\n{BEGIN_SOLUTION}\n\n{solution}\n\n{END_SOLUTION}"


def fidelity(text: str, copied: str) -> float:
    """How faithful a copy is: words in a longest common subsequence, as a share of the longer of the two; 1 for the same words."""
    ours, theirs = split_words(text), split_words(copied)
    return LCSseq.similarity(ours, theirs) / max(len(ours), len(theirs), 1)


def request_of(record: Record, seed: int) -> Request:
    """What the model is asked for one answer."""
    detail = CODE_DETAIL if record["tests"] else MATH_DETAIL
    asks = ASKS.replace("{detail}", detail).replace("{answer}", record["answer"])
    return Request(key=f"{record['id']}/{record['sample']}", messages=(("user", asks),), seed=seed)


def _same_answer(record: Record, text: str) -> bool:
    if record["tests"]:
        return _BLANKS.sub(" ", record["extracted"]).strip() == _BLANKS.sub(" ", extract_program(text)).strip()
    return _BLANKS.sub("", final_answer(record["answer"])) == _BLANKS.sub("", answer_of(read_answer(text)))
