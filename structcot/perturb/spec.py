"""What to perturb and how: a kind, a fraction, and the settings that the kind takes.

`--mode` only chooses defaults. In mode "paper" they are what the code of Li et al., 2025 (arXiv 2502.07374; branch `corrupt` of
NovaSky-AI/SkyThought) does, in mode "clean" what its text means, with the confounds removed. So each deviation of the paper's code from
the paper's text is one setting with a name, and can be switched alone in either mode.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from structcot.errors import ConfigError

CONTENT_KINDS, STRUCTURE_KINDS = ("digits", "keywords"), ("delete", "insert", "shuffle")
KINDS = ("wrong-answer", *CONTENT_KINDS, *STRUCTURE_KINDS)
MODES = ("clean", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One perturbation. A setting that its kind does not take keeps its default and means nothing; `docs/structure.md` explains each."""

    kind: str
    fraction: float = 1.0
    record_fraction: float = 1.0
    scope: str = "thought"
    unit: str = ""
    choice: str = "exact"
    replacement: str = "digit"
    family: str = "paper"
    url: str = ""
    model: str = ""
    key: str = "OPENAI_API_KEY"
    failures: str = "report"
    level: str = "step"
    keep: str = "none"
    block: int = 1
    fixed_points: str = "avoid"
    match_length: bool = False
    donors: str = "any"
    domain: str = ""
    empty_thought: str = "keep"
    select: str = "pair"
    graders: str = "two"
    pool: str = ""
    problem: str = ""
    gold: str = ""
    prompt_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: the kinds that take it, the values it may have (none: any text), and its defaults in both modes by kind."""

    kinds: tuple[str, ...]
    values: tuple[Any, ...] = ()
    clean: Any = None
    paper: Any = None


SETTINGS = {
    "record_fraction": Setting((*CONTENT_KINDS, *STRUCTURE_KINDS)),
    "scope": Setting(CONTENT_KINDS, ("thought", "solution", "both", "message"), "thought", {"digits": "message", "keywords": "both"}),
    "unit": Setting(
        CONTENT_KINDS,
        ("digit", "number", "sentence", "passage"),
        {"digits": "digit", "keywords": "sentence"},
        {"digits": "number", "keywords": "passage"},
    ),
    "choice": Setting(("digits",), ("exact", "coin"), "exact", "coin"),
    "replacement": Setting(("digits",), ("digit", "zero-to-ten"), "digit", "zero-to-ten"),
    "family": Setting(("keywords",), ("paper", "nowait", "chinese"), "paper", "paper"),
    "url": Setting(("keywords",)),
    "model": Setting(("keywords",)),
    "key": Setting(("keywords",)),
    "failures": Setting(("keywords",), ("report", "as-text"), "report", "as-text"),
    "level": Setting(STRUCTURE_KINDS, ("step", "sentence", "paragraph", "given"), "step", "step"),
    "keep": Setting(STRUCTURE_KINDS, ("none", "prefix", "suffix", "ends"), "none", "none"),
    "block": Setting(STRUCTURE_KINDS),
    "fixed_points": Setting(("shuffle",), ("avoid", "allow"), "avoid", "allow"),
    "match_length": Setting(("delete", "insert"), (False, True), False, False),
    "donors": Setting(("insert",), ("any", "in-domain", "cross-domain"), "any", "any"),
    "domain": Setting(("insert",)),
    "empty_thought": Setting(("delete",), ("keep", "drop"), "keep", "drop"),
    "select": Setting(("wrong-answer",), ("pair", "wrong-only"), "pair", "wrong-only"),
    "graders": Setting(("wrong-answer",), (), "two", "one"),
    "pool": Setting(("wrong-answer",)),
    "problem": Setting(("wrong-answer",)),
    "gold": Setting(("wrong-answer",)),
    "prompt_prefix": Setting(("wrong-answer",), (), "", "Return your final response within \\boxed{{}}. "),
}
UNITS = {"digits": ("digit", "number", "sentence"), "keywords": ("sentence", "passage")}


def make_spec(kind: str, fraction: float, mode: str = "clean", settings: Sequence[str] = ()) -> Spec:
    """Build a spec from its kind, the defaults of `mode`, and settings written `name=value`.

    Raises:
        ConfigError: naming the setting, what was found and what is allowed; also where a setting is not one of the kind's.
    """
    if kind not in KINDS:
        raise ConfigError(f'--kind: got "{kind}"{_nearest(kind, KINDS)}; use one of {", ".join(KINDS)}')
    if mode not in MODES:
        raise ConfigError(f'--mode: got "{mode}"; use clean or paper')
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"--fraction: got {fraction}; use a share between 0 and 1")
    spec = replace(_defaults(kind, mode), fraction=fraction)
    if kind == "keywords" and mode == "paper":
        # The paper's code rewrites a share of the samples as a whole, where its text removes a share of the sentences.
        spec = replace(spec, fraction=1.0, record_fraction=fraction)
    for setting in settings:
        spec = _with_setting(spec, setting)
    if spec.select == "wrong-only" and spec.pool:
        raise ConfigError("pool: select=wrong-only takes the wrong records of the input itself; leave one of the two out")
    if spec.kind == "keywords" and spec.url and (spec.unit != "passage" or not spec.model or spec.fraction < 1.0):
        raise ConfigError("url: a server removes whole passages from whole answers; use unit=passage, model=NAME and record_fraction")
    if spec.scope == "message" and spec.kind == "keywords":
        raise ConfigError("scope: keywords are removed from the thought, the solution or both; message is for digits")
    return spec


def parse_spec(text: str, mode: str = "clean") -> Spec:
    """Build a spec from one text, `kind:fraction,name=value,...`, such as `shuffle:0.5,level=sentence`.

    Raises:
        ConfigError: as `make_spec`.
    """
    head, *settings = text.split(",")
    kind, _, fraction = head.partition(":")
    try:
        return make_spec(kind.strip(), float(fraction or 1.0), mode, settings)
    except ValueError as error:
        raise ConfigError(f'"{text}": the fraction "{fraction}" is no number; write kind:fraction,name=value,...') from error


def spec_text(spec: Spec) -> str:
    """Write a spec as `parse_spec` reads it, with every setting that its kind takes."""
    settings = [f"{name}={_written(getattr(spec, name))}" for name, setting in SETTINGS.items() if spec.kind in setting.kinds]
    return ",".join([f"{spec.kind}:{spec.fraction:g}", *(text for text in settings if not text.endswith("="))])


def _defaults(kind: str, mode: str) -> Spec:
    values: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        default = getattr(setting, mode)
        default = default.get(kind) if isinstance(default, dict) else default
        if kind in setting.kinds and default is not None:
            values[name] = default
    return Spec(kind=kind, **values)


def _with_setting(spec: Spec, text: str) -> Spec:
    name, found, value = text.partition("=")
    name = name.strip().replace("-", "_")
    own = [one for one, setting in SETTINGS.items() if spec.kind in setting.kinds]
    if not found:
        raise ConfigError(f'"{text}": is no setting; write name=value')
    if name not in own:
        raise ConfigError(f'"{name}": {spec.kind} takes no such setting{_nearest(name, own)}; it takes {", ".join(own)}')
    return replace(spec, **{name: _value(spec, name, value)})


def _value(spec: Spec, name: str, text: str) -> Any:
    allowed = UNITS[spec.kind] if name == "unit" else SETTINGS[name].values
    kind_of = {field.name: field.type for field in fields(Spec)}[name]
    if kind_of == "float":
        return _number(name, text, float, 0.0, 1.0)
    if kind_of == "int":
        return _number(name, text, int, 1, 10**9)
    if kind_of == "bool":
        if text not in ("true", "false"):
            raise ConfigError(f'{name}: got "{text}"; use true or false')
        return text == "true"
    if allowed and text not in allowed:
        raise ConfigError(f'{name}: got "{text}"{_nearest(text, allowed)}; use one of {", ".join(allowed)}')
    return text


def _number(name: str, text: str, kind: type, low: float, high: float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise ConfigError(f'{name}: got "{text}"; use a number from {low} to {high}')
    return value


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _nearest(text: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(text, known, 1)
    return f' (did you mean "{close[0]}"?)' if close else ""
