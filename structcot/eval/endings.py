"""How an output ends: finished by the model, cut off while it still went somewhere, cut off in a loop, or never begun."""

from __future__ import annotations

from structcot.structure.metrics import repetition, split_words

ENDINGS = ("finished", "truncated", "looping", "refused")
# A loop is told from the end of the output, where it must still go on.
TAIL_CHARACTERS = 6000
MIN_LOOP_CHARACTERS = 200
MIN_ROUNDS = 3


def ending_of(text: str, finish_reason: str) -> str:
    """Name the ending: "finished", "truncated", "looping" or "refused"; `finish_reason` is that of the engine.

    Only an output that was cut off can be looping. It is where its words repeat (`structcot.structure.metrics.repetition`: more than half
    of the 20-grams in the last third of the output, or of its tail, occurred before), or where its last characters are three rounds or
    more of the same text, which finds loops without spaces. The time grows with the length of the output.

    Raises:
        ValueError: if `finish_reason` is none of an engine's.
    """
    match finish_reason:
        case "stop":
            return "finished"
        case "refused":
            return "refused"
        case "length":
            return "looping" if is_looping(text) else "truncated"
    raise ValueError(f"finish_reason: must be stop, length or refused, got {finish_reason!r}")


def is_looping(text: str) -> bool:
    """Whether a text that was cut off repeats itself at its end."""
    tail = text[-TAIL_CHARACTERS:]
    return repeats_exactly(tail) or repetition(split_words(text))[1] or repetition(split_words(tail))[1]


def repeats_exactly(tail: str) -> bool:
    """Whether a text ends in at least `MIN_ROUNDS` rounds of one text, over at least `MIN_LOOP_CHARACTERS` characters.

    Read backwards the rounds are a beginning that has a period; the failure function of Knuth, Morris and Pratt knows the smallest period
    of every beginning: its length less the longest beginning that is its end too.
    """
    backwards = tail[::-1]
    border = [0] * len(backwards)
    length = 0
    for index in range(1, len(backwards)):
        while length and backwards[index] != backwards[length]:
            length = border[length - 1]
        length += backwards[index] == backwards[length]
        border[index] = length
        size = index + 1
        if size >= MIN_LOOP_CHARACTERS and size >= MIN_ROUNDS * (size - length):
            return True
    return False
