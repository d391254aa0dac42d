"""Numbers written as words, read as the paper's harness reads them.

Every word that is no number is passed over, so that "all ten of one kind" is a number, and so is a hyphen: "-two" is 2.
"""

from __future__ import annotations

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_GROUPS = (("billion", 10**9), ("million", 10**6), ("thousand", 10**3))
_POINT = "point"
_NUM_DIGITS = 10
_VALUES = {
    **{word: value for value, word in enumerate(_SMALL.split())},
    **{word: value for value, word in zip(range(20, 100, 10), _TENS.split(), strict=True)},
    "hundred": 100,
    **dict(_GROUPS),
}


def number_of_words(text: str) -> str:
    """The number that the words of `text` name, in digits; `text` itself where they name none or contradict themselves."""
    plain = text.replace("-", " ").lower()
    try:
        if plain.isdigit():
            return str(int(plain))
        words = [word for word in plain.split() if word in _VALUES or word == _POINT]
        return str(_value(words)) if words else text
    except ValueError:
        return text


def _value(words: list[str]) -> float:
    """The value of number words, with those after "point" as decimals.

    Raises:
        ValueError: if a group occurs twice, before a larger one, or without words in front of it.
    """
    if any(words.count(word) > 1 for word in (_POINT, *dict(_GROUPS))):
        raise ValueError("a word for a group or the point occurs twice")
    whole, decimals = words, []
    if _POINT in words:
        point = words.index(_POINT)
        whole, decimals = words[:point], words[point + 1 :]
    places = [whole.index(word) for word, _ in _GROUPS if word in whole]
    if places != sorted(places):
        raise ValueError("a smaller group stands before a larger one")
    total = _whole(whole) + (_decimal(decimals) if decimals else 0)
    return total


def _whole(words: list[str]) -> int:
    """The value of the words before the point.

    What follows the last group counts once. If nothing does, what follows the group before it counts again: "two million one thousand" is
    2,000,000 + 1,000 + (1 + 1,000).
    """
    if len(words) <= 1:
        return sum(_VALUES[word] for word in words)
    total, rest, tails = 0, words, []
    for word, value in _GROUPS:
        if word in rest:
            place = rest.index(word)
            total += _product(rest[:place]) * value
            rest = rest[place + 1 :]
            tails.append(rest)
    tails = [tail for tail in tails if tail] if tails else [words]
    return total + (_product(tails[-1]) if tails else 0)


def _product(words: list[str]) -> int:
    """The value of up to four words without a group: the first two multiply as in "two hundred". From five on only the first counts."""
    values = [_VALUES[word] for word in words]
    if not values:
        raise ValueError("a group has no number")
    if len(values) == 2:
        return values[0] * values[1] if 100 in values else values[0] + values[1]
    if len(values) in (3, 4):
        return values[0] * values[1] + sum(values[2:])
    return values[0]


def _decimal(words: list[str]) -> float:
    """The value of digits after the point; 0 where one of the words is no digit."""
    values = [_VALUES.get(word, _NUM_DIGITS) for word in words]
    return float("0." + "".join(map(str, values))) if max(values) < _NUM_DIGITS else 0
