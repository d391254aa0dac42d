"""What a Countdown demonstration says: several wordings for each act of the search, drawn with the search's own random numbers.

An act is worded from facts handed in, so nothing is claimed that the search did not find. Markers such as "Wait" and "Alternatively" stand
only where the search really turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

BEGIN_THOUGHT, END_THOUGHT = "<|begin_of_thought|>", "<|end_of_thought|>"
BEGIN_SOLUTION, END_SOLUTION = "<|begin_of_solution|>", "<|end_of_solution|>"
TAGS = (BEGIN_THOUGHT, END_THOUGHT, BEGIN_SOLUTION, END_SOLUTION)

SYSTEM = (
    f"Search between {BEGIN_THOUGHT} and {END_THOUGHT} step by step: try, check, go back when it fails. "
    f"Then answer between {BEGIN_SOLUTION} and {END_SOLUTION}."
)
QUESTIONS = (
    "Use {numbers} once each, with +, -, *, / and parentheses, to make {target}.",
    "Make {target} from {numbers}, each used exactly once, with +, -, *, / and parentheses.",
    "Find an expression for {target} that uses {numbers} once each, with +, -, *, / and parentheses.",
    "With +, -, *, / and parentheses, combine {numbers} into {target}. Use each once.",
)
OPENINGS = (
    "I have {numbers} and need {target}.",
    "Okay, I need {target} out of {numbers}.",
    "The numbers are {numbers}, the target is {target}.",
    "Let me see how {numbers} give {target}.",
    "So {target} is the target, from {numbers}.",
)
REASONS = {
    "divides": ("because {value} divides {target}", "since {target} is a multiple of {value}", "as {value} goes into {target} evenly"),
    "near": ("because that is near {target}", "since {value} is not far from {target}", "which comes close to {target}"),
    "product": ("because adding alone cannot reach {target}", "since {target} is more than the sum", "as {target} needs a product"),
    "small": ("to get a small number", "because a small number is easy to fit in", "to make things smaller"),
    "plain": ("to see what it gives", "just to see where it leads", "which is worth a try"),
}
PROPOSALS = (
    "Let me try {equation}, {reason}. That leaves {left}.",
    "I could start with {equation}, {reason}. Now I have {left}.",
    "Maybe {equation}, {reason}. Then {left} remain.",
    "How about {equation}, {reason}? Left are {left}.",
)
CONTINUATIONS = (
    "Next I try {equation}, {reason}. That leaves {left}.",
    "From there, {equation}, {reason}. Now I have {left}.",
    "Then maybe {equation}, {reason}. So {left} remain.",
)
RETREATS = (
    "Wait, {failed} leads nowhere. Back to {to}.",
    "So {failed} was wrong. Let me go back to {to}.",
    "Hmm, I give up {failed} and return to {to}.",
    "So {failed} is a dead end. Back to {to}.",
)
RETRIES = (
    "Alternatively, {equation}, {reason}. That leaves {left}.",
    "Another way is {equation}, {reason}. Now I have {left}.",
    "Instead, let me try {equation}, {reason}. Then {left} remain.",
    "What about {equation}, {reason}? Left are {left}.",
)
MISSES = (
    "{equations}. That does not work because {why}.",
    "I get {equations}. No, {why}.",
    "Let me check: {equations}. This fails because {why}.",
    "Now {equations}, but {why}.",
)
HITS = (
    "{equations}. Yes, that is {target}!",
    "Let me check: {equations}. That hits the target.",
    "I get {equations}. This is exactly {target}.",
    "Now {equations}, which is what I need.",
)
CHECKS = (
    "Let me verify: {answer} = {target}. Each number is used once, so this works.",
    "Check again: {answer} = {target}, and {numbers} are used exactly once. Good.",
    "To be sure: {answer} = {target}. The numbers {numbers} appear once each.",
    "Verifying: {answer} = {target}. All numbers are used once, so I am done.",
)
SOLUTIONS = (
    "{steps}\n\nThe answer is \\boxed{{{answer}}}.",
    "Step by step:\n{steps}\n\nSo the expression is \\boxed{{{answer}}}.",
    "{answer} = {target}\n\nTherefore: \\boxed{{{answer}}}",
    "Since {answer} = {target}, the answer is \\boxed{{{answer}}}.",
)


class Equation(Protocol):
    """What is worded of a move: how it is written and what it gives."""

    @property
    def equation(self) -> str:
        """The move as it is written, such as `7 * 5 = 35`."""
        ...

    @property
    def value(self) -> int:
        """The number on the right."""
        ...


def question(rng: Random, numbers: str, target: int) -> str:
    """Word the user's request."""
    return rng.choice(QUESTIONS).format(numbers=numbers, target=target) + " Return your final response within \\boxed{}."


def opening(rng: Random, numbers: str, target: int) -> str:
    """Word the first paragraph of the thought."""
    return rng.choice(OPENINGS).format(numbers=numbers, target=target)


def propose(rng: Random, move: Equation, reason: str, *, target: int, left: str, is_first: bool) -> str:
    """Word a move that the search tries; `reason` is a key of REASONS."""
    why = rng.choice(REASONS[reason]).format(value=move.value, target=target)
    return rng.choice(PROPOSALS if is_first else CONTINUATIONS).format(equation=move.equation, reason=why, left=left)


def retry(rng: Random, move: Equation, reason: str, *, target: int, left: str, failed: str, to: str) -> str:
    """Word a step back from the move `failed` to the numbers `to`, and the move tried instead."""
    why = rng.choice(REASONS[reason]).format(value=move.value, target=target)
    back = rng.choice(RETREATS).format(failed=failed, to=to)
    return f"{back} {rng.choice(RETRIES).format(equation=move.equation, reason=why, left=left)}"


def miss(rng: Random, moves: Sequence[Equation], target: int) -> str:
    """Word the last two numbers' results when none is the target, with the truest reason there is."""
    nearest = min(moves, key=lambda move: abs(move.value - target)).value
    if abs(nearest - target) <= 2:
        why = f"{nearest} is off by {abs(nearest - target)}"
    elif all(move.value < target for move in moves):
        why = rng.choice(("these are all below {target}", "all of that is too small")).format(target=target)
    elif all(move.value > target for move in moves):
        why = rng.choice(("everything is above {target}", "all of that is too large")).format(target=target)
    else:
        why = rng.choice(("none of these is {target}", "I do not reach {target}", "{target} is not among them")).format(target=target)
    return rng.choice(MISSES).format(equations=_joined(moves), why=why)


def hit(rng: Random, moves: Sequence[Equation], target: int) -> str:
    """Word the last two numbers' results when the last one is the target."""
    return rng.choice(HITS).format(equations=_joined(moves), target=target)


def checking(rng: Random, answer: str, numbers: str, target: int) -> str:
    """Word the check of the whole expression, the last paragraph of the thought."""
    return rng.choice(CHECKS).format(answer=answer, numbers=numbers, target=target)


def solution(rng: Random, moves: Sequence[Equation], answer: str, target: int) -> str:
    """Word the solution section, which boxes the answer."""
    return rng.choice(SOLUTIONS).format(steps="\n".join(move.equation for move in moves), answer=answer, target=target)


def _joined(moves: Sequence[Equation]) -> str:
    return ", ".join(move.equation for move in moves)
