"""What all pages have in common: self-contained, no script but their own, no network, and text that stays text."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any

_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
_HIDDEN = (0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2060, 0x206A), 0xFEFF, *range(0xFFF9, 0xFFFC))
_SHOWN_BY_NAME = _CONTROL_PICTURES | {code: f"\u27e8U+{code:04X}\u27e9" for code in _HIDDEN}


def page_head(title: str, style: str, script: str = "") -> str:
    """Write a page up to its body: the title (any text), the style sheet, and a policy under which no script runs but `script`, if any."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{safe_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
    )


def page_asset(name: str) -> str:
    """Read a style sheet or script that comes with the package."""
    return files("structcot").joinpath(name).read_text(encoding="utf-8")


def json_for_script(value: Any) -> str:
    """Write JSON that may stand in a script element: with no "<" in it, neither a closing tag nor a comment can end the element early."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def safe_text(value: object) -> str:
    """Write `value` as text of a page: escaped, with everything visible that would act unseen. Line ends and tabs stay."""
    return escape(str(value).translate(_SHOWN_BY_NAME))
