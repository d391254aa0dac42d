"""Facts of studies as `study.json` has them, made up but of one piece: intervals fit values, verdicts fit intervals."""

from __future__ import annotations

import math
import random
from typing import Any

from structcot.eval.statistics import wilson_interval

# Name, kind, fraction, group, true accuracy, share of outputs that end, edit distance.
VARIANTS: tuple[tuple[str, str, float | None, str, float, float, float], ...] = (
    ("base", "base", None, "base", 0.296, 1.0, 0.0),
    ("clean", "clean", 0.0, "reference", 0.82, 0.93, 0.0),
    ("wrong-answer-100", "wrong-answer", 1.0, "answer", 0.79, 0.94, 0.02),
    ("digits-20", "digits", 0.2, "content", 0.8, 0.93, 0.08),
    ("digits-50", "digits", 0.5, "content", 0.76, 0.9, 0.19),
    ("digits-70", "digits", 0.7, "content", 0.7, 0.88, 0.26),
    ("digits-100", "digits", 1.0, "content", 0.31, 0.62, 0.36),
    ("keywords-20", "keywords", 0.2, "content", 0.82, 0.93, 0.03),
    ("keywords-50", "keywords", 0.5, "content", 0.81, 0.92, 0.07),
    ("keywords-100", "keywords", 1.0, "content", 0.8, 0.94, 0.14),
    ("shuffle-33", "shuffle", 0.33, "structure", 0.74, 0.85, 0.27),
    ("shuffle-67", "shuffle", 0.67, "structure", 0.5, 0.55, 0.5),
    ("shuffle-100", "shuffle", 1.0, "structure", 0.33, 0.31, 0.71),
    ("delete-33", "delete", 0.33, "structure", 0.72, 0.97, 0.32),
    ("delete-67", "delete", 0.67, "structure", 0.52, 0.99, 0.66),
    ("delete-100", "delete", 1.0, "structure", 0.3, 1.0, 1.0),
    ("insert-33", "insert", 0.33, "structure", 0.75, 0.9, 0.31),
    ("insert-67", "insert", 0.67, "structure", 0.53, 0.7, 0.62),
    ("insert-100", "insert", 1.0, "structure", 0.27, 0.52, 0.94),
    ("short", "short", None, "other", 0.41, 1.0, 0.9),
)
PROBLEMS = 300


def study_facts(
    tasks: tuple[str, ...] = ("clock",), settings: tuple[str, ...] = ("",), seeds: tuple[int, ...] = (0, 1, 2), **changes: Any
) -> dict[str, Any]:
    """A whole study; the single-seed variants are those of keywords, and with one seed all. All settings have one base, which has none."""
    rng = random.Random(0)
    variants = [_variant(rng, VARIANTS[0], "", tasks, seeds)]
    variants += [_variant(rng, row, setting, tasks, seeds) for setting in settings for row in VARIANTS[1:]]
    for variant in variants:
        reference = next(one for one in variants if one["group"] == "reference" and variant["setting"] in (one["setting"], ""))
        if variant is not reference:
            variant["difference"] = {task: _difference(one, reference["accuracy"][task]) for task, one in variant["accuracy"].items()}
            if variant["group"] != "base":
                forced = {task: _difference(one, reference["forced"][task]) for task, one in variant["forced"].items()}
                variant["forced_difference"] = forced
    facts = {
        "title": "Structure and content in clock puzzles",
        "model": "clock-3m",
        "reference": "clean",
        "budget": "tokens",
        "seeds": list(seeds),
        "tasks": list(tasks),
        "settings": list(settings),
        "missing": [{"cell": "insert-67-s2", "error": "out of memory at step 12:\nCUDA error"}],
        "warnings": ["keywords-20: only 41 of 2,000 records were changed; half of the records have no keyword."],
        "variants": variants,
        "curves": _curves(variants, tasks, settings),
        "matched": _matched(variants, tasks, settings),
        "paper": paper(),
        "conclusions": [],
    }
    return facts | changes


def paper() -> dict[str, Any]:
    """A stand-in for the paper's table, in per cent and points."""
    values = {
        "Original": ("base", 0.0, "base", 54.2),
        "Correct": ("clean", 0.0, "reference", 66.3),
        "Wrong answers": ("wrong-answer", 1.0, "answer", 63.1),
        "Digits 100%": ("digits", 1.0, "content", 2.7),
        "Digits 70%": ("digits", 0.7, "content", 62.0),
        "Digits 50%": ("digits", 0.5, "content", 64.2),
        "Shuffled 100%": ("shuffle", 1.0, "structure", 56.0),
        "Deleted 67%": ("delete", 0.67, "structure", 53.5),
        "Inserted 100%": ("insert", 1.0, "structure", 44.5),
        "Inserted 90%": ("insert", 0.9, "structure", 50.0),
    }
    rows = []
    for name, (kind, fraction, group, mean) in values.items():
        estimate = {"value": mean - 66.3, "interval": [mean - 66.3 - 9.5, mean - 66.3 + 9.5], "p": 0.1, "p_adjusted": 0.2}
        estimate["verdict"] = "worse" if mean - 66.3 + 9.5 < 0 else "within noise"
        rows.append(
            {
                "name": name,
                "kind": kind,
                "fraction": fraction,
                "group": group,
                "accuracy": {"aime24": mean - 25, "math500": min(99.0, mean + 25)},
                "mean": mean,
                "interval": [max(0.0, mean - 5.5), mean + 5.5],
                "difference": {} if kind == "clean" else {"mean": estimate, "aime24": {**estimate, "verdict": "within noise"}},
            }
        )
    return {"rows": rows, "sentences": ["The paper has one run of each variant: a spread between runs cannot be told from it."]}


def nothing_finished() -> dict[str, Any]:
    """A study of which no cell has run."""
    missing = [{"cell": f"{row[0]}-s0", "error": ""} for row in VARIANTS]
    empty: dict[str, Any] = {"variants": [], "curves": [], "matched": [], "missing": missing, "warnings": [], "tasks": []}
    return study_facts() | empty


def bare() -> dict[str, Any]:
    """A study of one run each with nothing but accuracies: no reports of perturbations, no forced scores, no losses, no examples."""
    facts = study_facts(seeds=(0,), paper={"rows": [], "sentences": []}, missing=[], warnings=[], matched=[])
    for variant in facts["variants"]:
        nothing = {"forced": None, "forced_difference": None, "manipulation": None, "outputs": {}, "trained": None, "examples": []}
        variant |= nothing | {"losses": {"reference_on_it": None, "it_on_reference": None, "reference_on_reference": None}}
    for curve in facts["curves"]:
        curve["trend"] = None
    return facts


def with_gaps() -> dict[str, Any]:
    """A study in which every value that may be None is None somewhere."""
    facts = study_facts(("clock", "maze"), seeds=(0,))
    for index, variant in enumerate(facts["variants"]):
        for name in ("manipulation", "losses"):
            variant[name] = {
                key: value if (index + place) % 2 else None for place, (key, value) in enumerate((variant[name] or {}).items())
            }
        for outputs in variant["outputs"].values():
            outputs |= dict.fromkeys(list(outputs)[index % 3 :: 3])
        if index % 4 == 3:
            variant["forced"] = variant["forced_difference"] = None
            del variant["accuracy"]["mean"], variant["difference"]["mean"], variant["outputs"]["maze"]
    for curve in facts["curves"]:
        curve["points"][1] = {"fraction": 0.5, "value": None, "interval": None}
        curve["points"].append({"fraction": 0.9, "value": 0.5, "interval": None})
    facts["matched"][0] |= {"edit_distance": None}
    facts["matched"][1] |= {"difference": None, "verdict": None}
    return facts


def hostile(text: str) -> dict[str, Any]:
    """A study in which every text is `text`, as far as texts need not differ."""
    facts = study_facts((f"{text} a", f"{text} b"), (f"{text} x", f"{text} y"), title=text, model=text, budget=text, warnings=[text])
    facts |= {"missing": [{"cell": text, "error": text}], "conclusions": [text], "reference": text}
    facts["paper"]["sentences"] = [text]
    for variant in facts["variants"]:
        variant |= {"name": f"{text} {variant['name']}", "kind": text if variant["group"] == "other" else variant["kind"]}
        for example in variant["examples"]:
            example |= dict.fromkeys(("task", "problem_id", "question", "gold", "output", "ending"), text)
    for curve in facts["curves"]:
        curve["kind"] = text if curve["kind"] == "insert" else curve["kind"]
    for pair in facts["matched"]:
        pair |= {"structure": text, "content": text, "verdict": text}
    return facts


def _variant(rng: random.Random, row: tuple[Any, ...], setting: str, tasks: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    name, kind, fraction, group, truth, ending, distance = row
    own = [] if group == "base" else [seeds[0]] if kind == "keywords" else list(seeds)
    harder = [truth * (1 - 0.12 * place) for place in range(len(tasks))]
    accuracy = {task: _accuracy(rng, at, max(1, len(own))) for task, at in zip(tasks, harder, strict=True)}
    forced = {task: _accuracy(rng, at + 0.6 * (1 - ending) * (1 - at), max(1, len(own))) for task, at in zip(tasks, harder, strict=True)}
    steps = None if kind in ("base", "short") else 0.0
    return {
        "name": name,
        "kind": kind,
        "fraction": fraction,
        "group": group,
        "setting": setting,
        "seeds": own,
        "accuracy": _with_mean(accuracy),
        "forced": _with_mean(forced),
        "difference": None,
        "forced_difference": None,
        "manipulation": None
        if group in ("base", "reference", "other")
        else {
            "realised_fraction": (fraction or 0) * 0.99,
            "edit_distance": distance,
            "changed_records": round(2000 * min(1.0, 5 * distance)),
            "tokens_before": 228_114,
            "tokens_after": round(228_114 * (1 - 0.8 * distance if kind == "delete" else 1)),
            "keywords_before": 8_120,
            "keywords_after": round(8_120 * (1 - (fraction or 0) if kind in ("keywords", "delete") else 1)),
            "order_tau": 1 - (fraction or 0) if kind == "shuffle" else None,
        },
        "outputs": {task: _outputs(rng, kind, ending, fraction or 0.0) for task in tasks},
        "losses": {
            "reference_on_it": None if group == "base" else 0.31 + 1.1 * distance + rng.uniform(0, 0.05),
            "it_on_reference": 0.31 + 0.9 * (0.82 - truth) + rng.uniform(0, 0.05) if steps is not None else None,
            "reference_on_reference": 0.31 if group == "reference" else None,
        },
        "trained": None if group == "base" else {"records": 2000, "tokens": 912_000, "steps": 384, "final_loss": 0.29 + distance / 2},
        "examples": [_example(tasks[0], index, index != 1) for index in range(3)],
    }


def _accuracy(rng: random.Random, truth: float, num_seeds: int) -> dict[str, Any]:
    by_seed = [min(1.0, max(0.0, truth + rng.gauss(0, 0.015))) for _ in range(num_seeds)]
    value = sum(by_seed) / num_seeds
    return {"value": value, "interval": list(wilson_interval(value, PROBLEMS)), "by_seed": by_seed, "problems": PROBLEMS}


def _with_mean(by_task: dict[str, Any]) -> dict[str, Any]:
    if len(by_task) == 1:
        return by_task
    value = sum(one["value"] for one in by_task.values()) / len(by_task)
    interval = list(wilson_interval(value, PROBLEMS * len(by_task)))
    return {**by_task, "mean": {"value": value, "interval": interval, "by_seed": [value], "problems": PROBLEMS * len(by_task)}}


def _difference(one: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    value = one["value"] - reference["value"]
    error = math.hypot(*((end["interval"][1] - end["interval"][0]) / 3.92 for end in (one, reference)))
    p = math.erfc(abs(value) / error / math.sqrt(2))
    adjusted = min(1.0, 10 * p)
    verdict = "within noise" if adjusted > 0.05 else "worse" if value < 0 else "better"
    interval = [value - 1.96 * error, value + 1.96 * error]
    return {"value": value, "interval": interval, "p": p, "p_adjusted": adjusted, "verdict": verdict}


def _outputs(rng: random.Random, kind: str, ending: float, fraction: float) -> dict[str, Any]:
    length = 128 * (1.4 if kind == "shuffle" else 1 - 0.9 * fraction if kind == "delete" else 0.06 if kind == "base" else 1.0)
    return {
        "tokens_mean": length * (1 + 0.4 * (1 - ending)),
        "tokens_median": round(length * rng.uniform(0.9, 1.0)),
        "finished": ending,
        "truncated": (1 - ending) * 0.4,
        "looping": (1 - ending) * 0.6,
        "keywords": 0.0 if kind == "base" else 14.2 * (1 - fraction if kind in ("keywords", "delete") else 1.0),
        "first_reflects": 0.92 if kind == "shuffle" else 0.01,
    }


def _example(task: str, index: int, is_correct: bool) -> dict[str, Any]:
    return {
        "task": task,
        "problem_id": f"{task}-{index}",
        "question": f"The clock shows {index + 1}:00. What does it show after 8 steps of {index + 2} hours?",
        "gold": "7",
        "output": "<think>\n1 + 2 is 3.\n\nWait, a step is 2 hours, not 3.\n\n" * 4 + "</think>\n\nThe answer is \\boxed{7}.",
        "correct": is_correct,
        "ending": "finished" if is_correct else "looping",
    }


def _curves(variants: list[dict[str, Any]], tasks: tuple[str, ...], settings: tuple[str, ...]) -> list[dict[str, Any]]:
    curves = []
    names = ("mean", *tasks) if len(tasks) > 1 else tasks
    for setting in settings:
        for kind, group in (
            ("digits", "content"),
            ("keywords", "content"),
            *((kind, "structure") for kind in ("shuffle", "delete", "insert")),
        ):
            for task in names:
                of_kind = [one for one in variants if one["setting"] == setting and (one["kind"] == kind or one["group"] == "reference")]
                points = [{"fraction": one["fraction"], **{k: one["accuracy"][task][k] for k in ("value", "interval")}} for one in of_kind]
                slope = (points[-1]["value"] - points[0]["value"]) / 10
                trend = {"value": slope, "interval": [slope - 0.006, slope + 0.006]}
                curves.append({"kind": kind, "group": group, "setting": setting, "task": task, "points": points, "trend": trend})
    return curves


def _matched(variants: list[dict[str, Any]], tasks: tuple[str, ...], settings: tuple[str, ...]) -> list[dict[str, Any]]:
    names = ("mean", *tasks) if len(tasks) > 1 else tasks
    facts = []
    pairs = {("delete", "digits"): (0.36, 0.08), ("shuffle", "digits"): (0.36, 0.19), ("insert", "digits"): (0.36, 0.12)}
    pairs |= {("delete", "keywords"): (0.14, -0.03), ("shuffle", "keywords"): (0.14, -0.02), ("insert", "keywords"): (0.14, -0.08)}
    for setting in settings:
        for task in names:
            for (structure, content), (distance, value) in pairs.items():
                verdict = "better" if value > 0.05 else "worse" if value < -0.05 else "within noise"
                difference = {"value": value, "interval": [value - 0.05, value + 0.05]}
                where = {"task": task, "setting": setting, "structure": structure, "content": content}
                facts.append({**where, "edit_distance": distance, "difference": difference, "verdict": verdict})
    return facts
