"""How much a text changed, in numbers that cost little: words, tokens, edit distance, order.

Words are runs of letters and digits in lower case. The token count is an estimate without a vocabulary: a run of Latin letters, a digit, or
any other character that is no white space is one token, which is how the pre-tokenizers of today's models cut before they merge.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from structcot.answers import answer_of
from structcot.perturb.edit import FOREIGN
from structcot.tags import read_answer

# The paper names these; `structcot.structure.keywords` has longer families.
KEYWORDS = (b"wait", b"but", b"alternatively")
_LETTERS = bytes(range(ord("a"), ord("z") + 1)) + bytes(range(ord("A"), ord("Z") + 1)) + bytes(range(0xC0, 0x100))
_DIGITS = b"0123456789"
_BLANKS = b" \t\n\r\v\f"
_TO_LETTER_RUNS = bytes(97 if code in _LETTERS else 32 for code in range(256))
_TO_WORDS = bytes(code if code in _LETTERS + _DIGITS else 32 for code in range(256))
_RUNS_AND_BLANKS = _LETTERS + _BLANKS
_IDEOGRAPH = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WORD_OR_IDEOGRAPH = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An answer before and after: tokens by estimate, edit distance in words, keywords, and whether the final answer is the same."""

    tokens_before: int
    tokens_after: int
    words_before: int
    words_after: int
    edit_distance: int
    keywords_before: int
    keywords_after: int
    had_answer: bool
    answer_kept: bool


def measure_change(before: str, after: str) -> Change:
    """Compare two texts of one answer; `edit_distance` is Levenshtein's, in words."""
    is_same = before == after
    words_before, tokens_before, answer_before = words_of(before), count_tokens(before), answer_of(read_answer(before))
    words_after, tokens_after = (words_before, tokens_before) if is_same else (words_of(after), count_tokens(after))
    return Change(
        tokens_before=tokens_before,
        tokens_after=tokens_after,
        words_before=len(words_before),
        words_after=len(words_after),
        edit_distance=0 if is_same else Levenshtein.distance(words_before, words_after),
        keywords_before=sum(map(words_before.count, KEYWORDS)),
        keywords_after=sum(map(words_after.count, KEYWORDS)),
        had_answer=bool(answer_before),
        answer_kept=is_same or answer_before == answer_of(read_answer(after)),
    )


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text by the rule at the top of this file."""
    data = text.encode("latin-1", "replace")
    return len(data.translate(_TO_LETTER_RUNS).split()) + len(data.translate(None, _RUNS_AND_BLANKS))


def words_of(text: str) -> list[bytes]:
    """The words of a text in order: runs of letters and digits, each Chinese character by itself."""
    if _IDEOGRAPH.search(text):
        return [word.encode() for word in _WORD_OR_IDEOGRAPH.findall(text.lower())]
    # A few times faster; of scripts other than the Latin it sees nothing.
    return text.lower().encode("latin-1", "replace").translate(_TO_WORDS).split()


def kendall_tau(order: Sequence[int]) -> float | None:
    """Kendall's tau between the order of the steps that are still there and their order before: 1 as it was, -1 reversed.

    None where fewer than two are left. tau = 1 - 4 inversions / (n (n - 1)); Kendall, 1938, Biometrika 30, 81-93.
    """
    steps = [step for step in order if step != FOREIGN]
    if len(steps) < 2:
        return None
    seen: list[int] = []
    inversions = 0
    for step in steps:
        inversions += len(seen) - bisect_left(seen, step)
        insort(seen, step)
    return 1.0 - 4.0 * inversions / (len(steps) * (len(steps) - 1))
