"""What the model is asked: a system message and the words around a question, by the name of a style.

`sky-t1` is what the paper's mathematics was measured with: the system message its demonstrations were written under, and the bare question.
`qwen25-math-cot` is what its base models got. `boxed` needs no system message and suits any instruct model. A task may bring a template of
its own, in which `{question}` stands for the question.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from structcot.eval.problem import Problem

QUESTION = "{question}"

# The two wordings of the SkyThought evaluation harness for LiveCodeBench.
STDIN_PROGRAM = (
    "Generate an executable Python function generated from the given prompt. The function should take stdin as input and print the output."
    " Simply call the function after the definition. {question}"
)
CALLED_FUNCTION = (
    "Generate an executable Python function generated from the given prompt. Return the function body without invoking it at the final"
    " solution. {question}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStyle:
    """A system message ("" for none) and the template of a mathematical question. Code is always asked for in the words above."""

    system: str
    template: str


@cache
def prompt_styles() -> dict[str, PromptStyle]:
    """The styles by name."""
    sky_t1 = resources.files("structcot.eval").joinpath("sky_t1.txt").read_text(encoding="utf-8").removesuffix("\n")
    return {
        "boxed": PromptStyle(system="", template="Return your final response within \\boxed{}. {question}"),
        "sky-t1": PromptStyle(system=sky_t1, template=QUESTION),
        "qwen25-math-cot": PromptStyle(system="Please reason step by step, and put your final answer within \\boxed{}.", template=QUESTION),
    }


def messages_of(problem: Problem, style: PromptStyle, template: str = "") -> tuple[tuple[str, str], ...]:
    """The (role, content) turns that ask `problem`; `template` beats that of the style."""
    if problem.tests and not template:
        template = CALLED_FUNCTION if problem.entry_point else STDIN_PROGRAM
    asked = (template or style.template).replace(QUESTION, _question(problem))
    system = (("system", style.system),) if style.system else ()
    return (*system, ("user", asked))


def _question(problem: Problem) -> str:
    return f"{problem.question}\n\n{problem.starter_code}" if problem.starter_code else problem.question
