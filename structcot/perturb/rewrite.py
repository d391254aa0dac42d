"""Reflection removed by a language model, as in the paper's code: the whole answer goes to a server and comes back rewritten.

That code keeps whatever comes back, the text of an error too, as a demonstration ("as-text"). With failures "report" a record whose
rewrite fails, loses a tag or touches the solution stays as it is and is counted.
"""

from __future__ import annotations

from functools import cache

from structcot.errors import ServerError
from structcot.perturb.edit import Edit, NotApplied
from structcot.perturb.spec import Spec
from structcot.server import Server
from structcot.tags import Answer, read_answer

# The settings of the paper's calls.
TEMPERATURE, MAX_TOKENS, MAX_RETRIES = 0.7, 16384, 3
INSTRUCTION = (
    "The text below reflects on itself: something is said, then doubted with words like 'wait' or 'let me think again', then revised. "
    "Remove everything that is reflected on together with the reflection on it, and leave no phrase of transition behind. Copy all the "
    "rest word for word, with the tags <|begin_of_thought|>, <|end_of_thought|>, <|begin_of_solution|> and <|end_of_solution|> where they "
    "are. Answer with the text alone.\n\n"
)


def rewrite_without_reflection(answer: Answer, spec: Spec) -> Edit:
    """Have the model of `spec` rewrite a whole answer.

    Raises:
        NotApplied: if that fails and failures are to be reported.
    """
    keeps_errors = spec.failures == "as-text"
    try:
        completion = _server(spec.url, spec.model, spec.key).complete([{"role": "user", "content": INSTRUCTION + answer.text}])
        text = completion.text
    except ServerError as error:
        if not keeps_errors:
            raise NotApplied(f"the server did not answer: {error}") from error
        text = f"Error processing content: {error}"
    if not keeps_errors:
        _check(answer, read_answer(text))
    return Edit(text=text, units=1, chosen=1, changed=int(text != answer.text))


def _check(before: Answer, after: Answer) -> None:
    if after.defect:
        raise NotApplied(f"the rewrite broke the tags: {after.defect}")
    if after.solution.split() != before.solution.split():
        raise NotApplied("the rewrite touched the solution")


@cache
def _server(url: str, model: str, key: str) -> Server:
    return Server(url=url, model=model, key_variable=key, temperature=TEMPERATURE, max_tokens=MAX_TOKENS, max_retries=MAX_RETRIES)
