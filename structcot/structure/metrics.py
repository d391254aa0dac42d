"""What can be counted on one trace: its steps, words and turns, whether it ends, and whether it loops or points at what is not there.

Everything is told by the text and by the types of the steps; no model and no answer key is asked. The time grows with the length of the
thought and with nothing else.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from structcot.answers import final_answer
from structcot.structure.keywords import count_keywords
from structcot.structure.markers import REFLECTION, STEP_TYPES, marker
from structcot.structure.segmenters import Step
from structcot.structure.sentences import sentences
from structcot.tags import Answer

NGRAM_WORDS = 20
LOOPING_RATE = 0.5
MAX_DANGLING_SHOWN = 3

# Chinese and Japanese write no spaces: each character is a word.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# A polynomial hash, modulo 2^64, of the hashes of words: the base is an odd number without a pattern.
_POWERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(NGRAM_WORDS)], dtype=np.uint64)
# A first sentence is not longer than this; the cut keeps a step of a megabyte from being searched for its end.
_LONGEST_SENTENCE = 2000

# Labels that count up: the second of them makes sense after the first only.
_LABELS = ("case", "option", "approach", "method", "step", "scenario", "possibility")
_CHINESE_LABELS = ("情况", "情形", "方法", "方案", "步骤")
_ONE = r"(?:\d{1,2}|[a-h]|i{1,3}|iv)(?![\w^]|\.\d)"
_LISTED = rf"[ \u00a0]#?{_ONE}|s[ \u00a0]{_ONE}(?:(?:,|,? and|,? or| &) {_ONE})*"
_ITEM = re.compile(_ONE)
_NUMBERS = {"I": 1, "II": 2, "III": 3, "IV": 4} | {numeral: number for number, numeral in enumerate("一二三四五六七八九", 1)}
# Some of what may follow makes another word of the label and the numeral.
_CHINESE_ONE = r"[ (（]*([一二三四五六七八九]|\d{1,2})(?![\d一二三四五六七八九十百个种者次元边角])"
_EQUATION_NUMBER = re.compile(r"\\tag\{(\d{1,2})\}|\((\d{1,2})\)|（(\d{1,2})）")
# "From equation (1)" calls it; "call this equation (1)" and "equation (1): ..." name it.
_CALLS_EQUATION = re.compile(
    r"(?:\b(?:from|in|into|using|use|by|of|to|with|via|see|per|recall|subtract|subtracting|adding|solve|solving)(?: the| both)?[ ~\u00a0]"
    r"(?:equation|eqn?)s?\.?|(?:由|从|用|对|将|把|根据|利用|代入)(?:方程|等式|式子?))[ ~\u00a0]?"
    r"(?:[(（]\d{1,2}[)）](?:, ?| ?and |,? and |和|、))*\Z",
    re.IGNORECASE,
)
_LONGEST_CALL = 60
_VALUE_ENDS = frozenset(string.ascii_letters + string.digits + ")]}")
_POINTS_BACK = re.compile(
    r"\b(?:as|like|what|that|which|found|computed|calculated|derived|got|said|mentioned|noted|shown|did)(?: (?:I|we|was|is|were))?(?: \w+)?"
    r" (?:above|earlier|previously)\b|\b(?:as|like) (?:above|earlier|before)\b|\b(?:going|go) back to\b|\b(?:my|our) (?:earlier|previous)\b"
    r"|如上|前面的|之前的|上面的|回到",
    re.IGNORECASE,
)
_OPENING_SHARE = 0.02


def measure(answer: Answer, steps: Sequence[Step]) -> dict[str, Any]:
    """Measure one trace; `steps` cut `answer.thought`, with offsets into it. The result is ready for JSON, its keys always the same.

    `steps` and `step_types` count steps, `transitions` counts pairs of neighbours as "a>b"; `characters` and `words` are those of the
    thought, where a Chinese character is a word. The densities are steps of a type per 1,000 words. `keywords` has the total of each
    family, `paper_keywords` the words of the family "paper". The rest is explained by the functions of this file: `loop_rate` and
    `is_looping` by `repetition`, `has_answer` by `has_answer`, `dangling_references` by `find_dangling`, `failed_step_share` and
    `failed_character_share` by `failed_steps`, `branches` and `branching_depth` by `count_branches`, `first_step_is_reflection` by
    `starts_with_reflection`. `is_finished` says that the thought is closed and a solution follows; `tags` what is wrong with the tags.
    """
    thought, types = answer.thought, [step.type for step in steps]
    words = split_words(thought)
    type_counts = {kind: types.count(kind) for kind in STEP_TYPES}
    keywords = count_keywords(thought)
    loop_rate, is_looping = repetition(words)
    dangling = find_dangling(thought, types)
    failed = failed_steps(types)
    branches, depth = count_branches(types)
    return {
        "steps": len(steps),
        "step_types": type_counts,
        "transitions": {f"{a}>{b}": count for (a, b), count in sorted(Counter(pairwise(types)).items())},
        "characters": len(thought),
        "words": len(words),
        "backtrack_density": _ratio(1000 * type_counts["backtracking"], len(words)),
        "verification_density": _ratio(1000 * type_counts["verification"], len(words)),
        "keywords": {family: sum(counts.values()) for family, counts in keywords.items()},
        "paper_keywords": keywords["paper"],
        "dangling_references": {"count": len(dangling), "first": dangling[:MAX_DANGLING_SHOWN]},
        "loop_rate": loop_rate,
        "is_looping": is_looping,
        "is_finished": answer.is_closed and bool(answer.solution.strip()),
        "has_answer": has_answer(answer),
        "failed_step_share": _ratio(len(failed), len(steps)),
        "failed_character_share": _ratio(sum(steps[i].end - steps[i].start for i in failed), len(thought)),
        "branches": branches,
        "branching_depth": depth,
        "first_step_is_reflection": starts_with_reflection(thought, steps),
        "tags": answer.defect,
    }


def split_words(text: str) -> list[str]:
    """Split at white space, and around every Chinese or Japanese character."""
    if not text.isascii() and _UNSPACED.search(text):
        text = _UNSPACED.sub(r" \g<0> ", text)
    return text.split()


def repetition(words: Sequence[str]) -> tuple[float, bool]:
    """Share of the 20-grams of words that occurred before in the thought, and whether it ends in a loop.

    It does where more than half of the 20-grams that start in the last third of the thought occurred before. A thought of fewer than 20
    words has no 20-grams and a rate of 0. N-grams are compared by 64-bit hashes: that two of a million collide has odds below 1 in 10^6.
    """
    count = len(words) - NGRAM_WORDS + 1
    if count < 1:
        return 0.0, False
    hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    ngrams = np.convolve(hashes, _POWERS, "valid").tolist()
    start = count - max(1, count // 3)
    distinct = len(set(ngrams))
    new_at_end = distinct - len(set(ngrams[:start]))
    return 1 - distinct / count, 1 - new_at_end / (count - start) > LOOPING_RATE


def has_answer(answer: Answer) -> bool:
    """Whether the solution holds a final answer that is not empty.

    An answer without any tags is searched as a whole.
    """
    is_untagged = not answer.is_closed and answer.thought_end - answer.thought_start == len(answer.text)
    text = answer.text if is_untagged else answer.solution
    return bool(final_answer(text))


def failed_steps(types: Sequence[str]) -> list[int]:
    """Number the steps that lie in abandoned branches, told by the types alone.

    A backtracking or a new approach opens a branch, and is the first step of it. A verification or conclusion settles what the branch has
    so far. A branch that ends in a backtracking is abandoned from its opening, or from what was settled last; one that another approach or
    the end of the thought ends is not. `initializing` steps belong to no branch. The idea of a failed-step fraction is that of arXiv
    2509.19284, where a language model draws the branches.
    """
    failed: list[int] = []
    open_steps: list[int] = []
    for number, kind in enumerate(types):
        if kind == "backtracking":
            failed += open_steps
            open_steps = [number]
        elif kind == "new-approach":
            open_steps = [number]
        elif kind in ("verification", "conclusion"):
            open_steps = []
        elif kind != "initializing":
            open_steps.append(number)
    return failed


def count_branches(types: Sequence[str]) -> tuple[int, int]:
    """Count the branches of the thought and how deep they nest, told by the types alone; both are 0 for a thought without steps.

    The first step opens the trunk, of depth 1. A new approach opens a branch beside the current one, of the same depth. A doubt
    (`uncertainty-estimation`) opens one below it. A verification or a backtracking ends the current branch and goes on in the one above, a
    conclusion goes on in the trunk; the trunk itself never ends. Steps of one type in a row count once, so that the way a thought is cut
    matters little. The idea of a tree of thoughts is that of LCoT2Tree, arXiv 2505.22148, where a language model draws it.
    """
    if not types:
        return 0, 0
    branches, depth, deepest = 1, 1, 1
    for kind, _ in groupby(types):
        if kind == "new-approach":
            branches += 1
        elif kind == "uncertainty-estimation":
            branches, depth = branches + 1, depth + 1
            deepest = max(deepest, depth)
        elif kind in ("verification", "backtracking"):
            depth = max(1, depth - 1)
        elif kind == "conclusion":
            depth = 1
    return branches, deepest


def starts_with_reflection(thought: str, steps: Sequence[Step]) -> bool:
    """Whether the first sentence of the first step backtracks, verifies or doubts, as no thought can that has not begun."""
    if not steps:
        return False
    text = thought[steps[0].start : min(steps[0].end, steps[0].start + _LONGEST_SENTENCE)]
    return any(marker(text[start:end]) in REFLECTION for start, end in sentences(text)[:1])


def find_dangling(thought: str, types: Sequence[str]) -> list[str]:
    r"""List what the thought refers to though nothing like it came before, in order and each thing once.

    That is: a number n > 1 of a label that counts up ("Case 2", "Approach B", "Method III", "情况二") where n - 1 of that label was not
    mentioned before; "from equation (k)" with neither a \tag{k} nor a label "(k)" before; words such as "as above", "we found earlier" or
    "going back to" within the first 2 % of the thought; and a first step that backtracks, verifies or doubts, given as its type.
    """
    lowered = thought.lower()
    # One capital letter has a lower form of two characters; the offsets must stay those of the thought.
    lowered = lowered if len(lowered) == len(thought) else thought.replace("İ", "I").lower()
    found = [(0, types[0])] if types and types[0] in REFLECTION else []
    found += [(match.start(), match[0]) for match in _POINTS_BACK.finditer(thought, 0, int(_OPENING_SHARE * len(thought)))]
    found += _unlabelled_equations(thought)
    for label in _LABELS:
        if label in lowered:
            found += _out_of_turn(label.capitalize() + " ", _mentions(thought, lowered, label))
    for label in _CHINESE_LABELS:
        if label in thought:
            found += _out_of_turn(label, ((match.start(), match[1]) for match in _numbered(label, _CHINESE_ONE).finditer(thought)))
    return [text for _, text in sorted(found)]


@cache
def _numbered(label: str, number: str) -> re.Pattern[str]:
    return re.compile(f"{label}(?:{number})")


def _mentions(thought: str, lowered: str, label: str) -> Iterator[tuple[int, str]]:
    """Find the numbers and letters that follow `label`: their places and their text."""
    for match in _numbered(label, _LISTED).finditer(lowered):
        if not lowered[match.start() - 1 : match.start()].isalnum():
            for item in _ITEM.finditer(lowered, match.start() + len(label) + 1, match.end()):
                name = thought[item.start() : item.end()]
                # "Option B" is a choice that the question offers.
                if not name.islower() and (label != "option" or name.isdecimal()):
                    yield item.start(), name


def _out_of_turn(label: str, mentions: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Keep the first mention of each number that comes without the number before it; digits, letters and numerals count apart."""
    seen: set[tuple[str, int]] = set()
    found = []
    for place, name in mentions:
        if name.isdecimal():
            key = ("digits", int(name))
        elif name in _NUMBERS:
            key = ("numerals", _NUMBERS[name])
        else:
            key = ("letters", ord(name) - ord("A") + 1)
        if key[1] > 1 and key not in seen and (key[0], key[1] - 1) not in seen:
            found.append((place, label + name))
        seen.add(key)
    return found


def _unlabelled_equations(thought: str) -> list[tuple[int, str]]:
    """Find the numbers in brackets that a thought calls as equations, and that label nothing before."""
    seen: set[str] = set()
    found = []
    for match in _EQUATION_NUMBER.finditer(thought):
        number = match[1] or match[2] or match[3]
        before = "" if match[1] else thought[max(0, match.start() - _LONGEST_CALL) : match.start()]
        is_call = number not in seen and thought[match.end() : match.end() + 1] != ":" and _CALLS_EQUATION.search(before) is not None
        if is_call:
            found.append((match.start(), f"equation ({number})"))
        # In f(3) or (2)(3) the brackets label nothing.
        if is_call or before[-1:] not in _VALUE_ENDS:
            seen.add(number)
    return found


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
