"""The page of `structcot view` as text: its frame, and the data in it as JSON that can be nothing but data.

Each record is a script element of its own with a type that no browser runs, so the page is written as the records are read. The page's
script makes text nodes of what stands there and never markup; the policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from structcot.page import page_asset, page_head, safe_text

SORTS = {
    "file": "file order",
    "longest": "longest first",
    "shortest": "shortest first",
    "most-steps": "most steps first",
    "fewest-steps": "fewest steps first",
    "backtracking": "most backtracking first",
}
KEYS = (
    ("j k ↓ ↑", "next and previous trace"),
    ("Enter", "open the trace; on a step: go to its partner"),
    ("Esc", "back to the list"),
    ("/", "search"),
    ("n p", "next and previous hit"),
    ("[ ]", "previous and next step"),
    ("?", "these keys"),
)


def page_start(title: str, is_comparison: bool) -> str:
    """Write everything before the data. `title` is any text."""
    return (
        page_head(f"{title} - structcot view", page_asset("view.css"), page_asset("view.js"))
        + f'<body><header><div class="head"><h1>{safe_text(title)}</h1><p id="count" role="status">Reading the traces...</p>'
        '<button id="help" type="button" aria-label="Keys">?</button></div>'
        f"{_controls(is_comparison)}</header>\n"
        '<noscript><p class="warning">This page needs its own script, which the browser does not run.</p></noscript>'
        '<main><section id="list" role="listbox" tabindex="0" aria-label="Traces"><div id="rows"></div></section>'
        '<article id="detail" aria-label="The trace" hidden></article></main>'
        f'<p id="tip" hidden></p>{_dialog()}\n'
    )


def page_record(value: Any) -> str:
    """Write the data of one record."""
    return f'<script type="application/json" class="record">{json_text(value)}</script>\n'


def page_end(facts: Mapping[str, Any]) -> str:
    """Write what is known once all records are read, and the script."""
    return f'<script type="application/json" id="facts">{json_text(facts)}</script><script>{page_asset("view.js")}</script></body></html>\n'


def json_text(value: Any) -> str:
    """Write JSON that may stand in a script element: with no "<" in it, neither a closing tag nor a comment can end the element early.

    Signs that are not ASCII stay as they are, which keeps a Chinese text at half the size. A lone surrogate has to be written as its escape
    by whoever encodes the text: errors="backslashreplace" writes just that.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _controls(is_comparison: bool) -> str:
    return (
        '<div id="types" role="group" aria-label="Types of steps; press one to see only traces that have it"></div>'
        '<div class="controls">'
        '<label class="search">Search <input id="query" type="search" autocomplete="off" spellcheck="false"></label>'
        f"{_choice('sort', 'Sort', dict(_sorts(is_comparison)))}"
        + _choice("state", "Show", {"": "all", "finished": "finished", "unfinished": "not finished", "defect": "with a tag defect"})
        + _choice("grade", "Graded", {"": "any", "1": "correct", "0": "wrong", "-1": "not graded"})
        + (_choice("match", "Records", dict(_matches())) if is_comparison else "")
        + '<label>Steps from <input id="least" type="number" min="0" step="1" value="0"></label></div>'
        '<details id="unusable" hidden><summary></summary><ul></ul></details>'
    )


def _sorts(is_comparison: bool) -> Iterator[tuple[str, str]]:
    yield from SORTS.items()
    if is_comparison:
        yield "differences", "most differences first"


def _matches() -> Iterator[tuple[str, str]]:
    yield from {"": "all", "differ": "that differ", "same": "with the same steps"}.items()
    yield from {"here": "only in the first file", "there": "only in the other file"}.items()


def _choice(key: str, label: str, options: Mapping[str, str]) -> str:
    inner = "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())
    return f'<label id="{key}-label">{label} <select id="{key}">{inner}</select></label>'


def _dialog() -> str:
    rows = "".join(f"<div><dt>{''.join(f'<kbd>{key}</kbd> ' for key in keys.split())}</dt><dd>{does}</dd></div>" for keys, does in KEYS)
    return (
        '<dialog id="keys" aria-labelledby="keys-title"><h2 id="keys-title">Keys</h2>'
        f'<dl>{rows}</dl><form method="dialog"><button>Close</button></form></dialog>'
    )
