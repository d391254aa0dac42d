"""The optional stage that asks a model how hard each problem is, and lets those fall whose source asks for others."""

from __future__ import annotations

import re
from collections.abc import Iterator

from structcot.curate.asking import ANSWERS, AnswerFile, ask_all
from structcot.curate.config import CurateConfig, ServerConfig, SourceConfig
from structcot.curate.stages import Record, StageFiles
from structcot.eval.engine import Request

EASIEST, HARDEST = 1, 10
ASKS = """How hard is the problem below, on a scale from 1 to 10?

1: a single step of school arithmetic. 2: two or three steps, a word problem. 3: the first problems of a contest for middle schools.
4: the middle of such a contest, or a hard exercise of high school. 5: the last problems of a high-school contest with short answers.
6: the first problems of an invitational contest such as AIME. 7: the last problems of AIME. 8: a problem of a national olympiad.
9: a hard problem of the International Mathematical Olympiad. 10: the hardest that were ever set there.
For programs: 1 is a loop over the input, 4 a known algorithm, 7 a problem that few solve in a contest, 10 one that hardly anybody does.

Think briefly, then end with the number in double brackets, such as [[4]].

The problem:

{question}"""
_LABEL = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")


def label(config: CurateConfig, server: ServerConfig, records: Iterator[Record], files: StageFiles) -> None:
    """Label every problem that has no label and whose source asks for some; keep those that are asked for.

    Raises:
        StructcotError: if the model could not be asked for all; the same call goes on.
    """
    sources = {source.name: source for source in config.sources}
    with AnswerFile(files.directory / ANSWERS) as answers:
        asked = [request_of(record, config.seed) for record in files.look() if _is_to_label(record, sources)]
        ask_all(server, asked, answers, what="difficulty")
        for record in records:
            if not _is_to_label(record, sources):
                files.keep(record)
                continue
            text = answers.need(server, request_of(record, config.seed)).text
            found = label_in(text)
            least, greatest = sources[record["source"]].difficulty
            if found is None:
                files.reject(record, "no difficulty could be read from the model's answer", text[-200:])
            elif least <= found <= greatest:
                files.keep({**record, "difficulty": found})
            else:
                files.reject({**record, "difficulty": found}, "the difficulty is not asked for")


def request_of(record: Record, seed: int) -> Request:
    """What the model is asked for one problem."""
    return Request(key=record["id"], messages=(("user", ASKS.replace("{question}", record["question"])),), seed=seed)


def label_in(text: str) -> float | None:
    """The last number in double brackets, None if there is none from 1 to 10."""
    found = _LABEL.findall(text)
    number = float(found[-1]) if found else 0.0
    return number if EASIEST <= number <= HARDEST else None


def _is_to_label(record: Record, sources: dict[str, SourceConfig]) -> bool:
    return record["difficulty"] is None and bool(sources[record["source"]].difficulty)
