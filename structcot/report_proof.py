"""The data proof: one whole sample as the trainer sees it, token by token, each in the colour of what it is trained as.

The text can be copied as it is: spaces and line ends stay characters of the text and get their signs from the style sheet. What a browser
would hide or obey (control characters, marks that turn the writing direction, zero-width spaces) is shown by name instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from structcot.page import safe_text

KINDS = {
    "no": "not trained on",
    "thought": "thought",
    "solution": "solution",
    "end": "end of turn",
    "prompt": "prompt",
    "other": "of unknown kind",
}
# A run may train on no prompt, and no kind should be unknown: the legend names these two only where they are.
RARE_KINDS = ("prompt", "other")
MAX_TOKENS_SHOWN = 6000
NUM_TOKENS_AT_EACH_END = 2500

_WHITESPACE = re.compile(r"[ \t\n]")
_WHITESPACE_CLASS = {" ": "sp", "\t": "tab", "\n": "nl"}


def proof_section(proof: Mapping[str, Any]) -> str:
    """Lay out the sample in a box, a legend with the count of each kind, and a warning where the counts are not what the file claims."""
    pieces = proof.get("pieces")
    pieces = [piece for piece in pieces if isinstance(piece, dict)] if isinstance(pieces, list) else []
    if not pieces:
        return '<p class="empty">data/proof.json is not there or not whole yet.</p>'
    counts = Counter(map(_kind, pieces))
    shown_kinds = [kind for kind in KINDS if counts[kind] or kind not in RARE_KINDS]
    legend = "".join(f'<li><span class="run {kind}">{KINDS[kind]}</span> {counts[kind]:,}</li>' for kind in shown_kinds)
    source = safe_text(proof.get("source", "of unknown source"))
    return (
        f"<p>One whole sample, {source}, exactly as the model reads it. {_verdict(proof, counts)}</p>"
        f'<ul class="kinds">{legend}</ul>'
        '<p class="token-readout" aria-live="polite">Point at a token, or use the left and right arrow keys in the box, '
        "to see its number and id.</p>"
        '<div class="tokens" tabindex="0" role="group" aria-label="Tokens of the sample">' + "".join(_shown(pieces)) + "</div>"
    )


def _kind(piece: Mapping[str, Any]) -> str:
    kind = piece.get("trained")
    return kind if isinstance(kind, str) and kind in KINDS else "other"


def _verdict(proof: Mapping[str, Any], counts: Counter[str]) -> str:
    """Compare the counts of the pieces with those that the file states; a difference means that picture and training disagree."""
    found = {"tokens": counts.total(), "supervised_tokens": counts.total() - counts["no"]}
    wrong = [f"{safe_text(proof[key])} {key}, but shows {count:,}" for key, count in found.items() if key in proof and proof[key] != count]
    share = f"{found['supervised_tokens']:,} of its {found['tokens']:,} tokens are trained on."
    return share if not wrong else f'{share} <strong class="bad">data/proof.json claims {"; ".join(wrong)}.</strong>'


def _shown(pieces: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Show all tokens, or both ends of a long sample with a line between them that says what is left out."""
    if len(pieces) <= MAX_TOKENS_SHOWN:
        yield from _runs(pieces, 0)
        return
    start, stop = NUM_TOKENS_AT_EACH_END, len(pieces) - NUM_TOKENS_AT_EACH_END
    left_out = Counter(map(_kind, pieces[start:stop]))
    amounts = ", ".join(f"{left_out[kind]:,} {label}" for kind, label in KINDS.items() if left_out[kind])
    yield from _runs(pieces[:start], 0)
    yield f'<p class="left-out">Tokens {start:,} to {stop - 1:,} are not shown here: {amounts}. data/proof.json holds them all.</p>'
    yield from _runs(pieces[stop:], stop)


def _runs(pieces: Sequence[Mapping[str, Any]], first_index: int) -> Iterator[str]:
    """Put neighbours of one kind in one span, so that a colour is unbroken and each token lies in it as a span of its own."""
    for kind, run in groupby(enumerate(pieces, first_index), key=lambda numbered: _kind(numbered[1])):
        tokens = "".join(f'<span title="{_title(index, piece)}">{_visible(str(piece.get("text", "")))}</span>' for index, piece in run)
        yield f'<span class="run {kind}" data-kind="{KINDS[kind]}">{tokens}</span>'


def _title(index: int, piece: Mapping[str, Any]) -> str:
    """Name a token. One without a text is a later part of a character that takes several tokens; the first of them shows it."""
    part = "" if piece.get("text") else ", part of the character before it"
    return f"token {index:,}, id {safe_text(piece.get('id', '?'))}{part}"


def _visible(text: str) -> str:
    marked = _WHITESPACE.sub(lambda match: f'<i class="{_WHITESPACE_CLASS[match[0]]}">{match[0]}</i>', safe_text(text))
    return marked or '<i class="none"></i>'
