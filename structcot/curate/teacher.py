"""The stage that pays: the teacher's answers to every problem, `samples` of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from structcot.curate.asking import ANSWERS, Answer, AnswerFile, ask_all
from structcot.curate.config import CurateConfig, ServerConfig
from structcot.curate.prompts import problem_of
from structcot.curate.stages import Record, StageFiles
from structcot.eval.engine import Request
from structcot.eval.prompts import PromptStyle, messages_of, prompt_styles

PLAIN = "boxed"


def sample(config: CurateConfig, records: Iterator[Record], files: StageFiles) -> None:
    """Ask the teacher and write each answer as a record, in the order of the problems.

    Raises:
        StructcotError: if not all could be asked; the same call goes on.
    """
    with AnswerFile(files.directory / ANSWERS) as answers:
        ask_all(config.teacher, [request for record in files.look() for request in requests_of(record, config)], answers, what="teacher")
        for record in records:
            for number, request in enumerate(requests_of(record, config)):
                asked = {"sample": number, "asked": request.messages[-1][1]}
                _write({**record, **asked}, answers.need(config.teacher, request), files)


def requests_of(record: Mapping[str, object], config: CurateConfig) -> list[Request]:
    """The requests for all samples of a problem."""
    source = next(one for one in config.sources if one.name == record["source"])
    style = PromptStyle(system=system_message(config.teacher.system_prompt), template=prompt_styles()[PLAIN].template)
    messages = messages_of(problem_of(record), style, source.prompt)
    return [Request(key=f"{record['id']}/{number}", messages=messages, seed=config.seed) for number in range(config.teacher.samples)]


def system_message(name: str) -> str:
    """A system message by its name, or as it stands."""
    styles = prompt_styles()
    return styles[name].system if name in styles else name


def server_facts(config: ServerConfig) -> dict[str, object]:
    """What of a server decides its answers, for the key of a stage: neither how fast it is asked nor what it costs."""
    names = ("model", "max_tokens", "temperature", "top_p")
    return {name: getattr(config, name) for name in names}


def _write(record: Record, answer: Answer, files: StageFiles) -> None:
    tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    whole = {**record, "answer": answer.text, "finish_reason": answer.finish_reason, **tokens}
    if answer.finish_reason == "refused":
        files.reject(whole, "the server refused to answer", answer.reason)
    elif not answer.text.strip():
        files.reject(whole, "the answer is empty")
    else:
        files.keep(whole)
