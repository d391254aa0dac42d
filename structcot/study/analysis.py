"""From finished cells to the facts of a study: what study.json holds and the report shows.

Accuracies, differences and curves are over each task by itself, and over all where there are several ("mean"). The comparisons with the
reference within one setting and one measure are one family, and so are the matched pairs: their p-values are corrected together. The noise
of the seeds is pooled over the variants that were trained. Legend: S seeds, P problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from structcot.errors import StructcotError
from structcot.perturb.spec import CONTENT_KINDS, STRUCTURE_KINDS
from structcot.study.cells import Cell, is_finished, read_record, stage_keys
from structcot.study.conclusions import conclusions
from structcot.study.config import BASE, StudyConfig
from structcot.study.finished import Answers, Finished, read_finished
from structcot.study.losses import measure_losses
from structcot.study.paper_table import paper_facts
from structcot.study.report_order import MEAN
from structcot.study.statistics import Arm, SeedNoise, accuracy, difference, holm, matched, seed_noise, trend, verdict

GROUPS = {"wrong-answer": "answer"} | dict.fromkeys(CONTENT_KINDS, "content") | dict.fromkeys(STRUCTURE_KINDS, "structure")
FEW_FINISHED = 0.5
Variant = dict[str, Any]
Place = tuple[str, str]
ShareOf = Callable[[Answers], np.ndarray | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All finished cells by (setting, variant), the tasks and the measures (tasks, and their mean), and the noise of seeds.

    `noise` is by (setting, measure).
    """

    reference: str
    groups: Mapping[Place, Sequence[Finished]]
    tasks: Sequence[str]
    measures: Sequence[str]
    noise: Mapping[Place, SeedNoise | None]


def right_P(answers: Answers) -> np.ndarray:
    """The share of right samples of each problem."""
    return answers.right_P


def forced_P(answers: Answers) -> np.ndarray | None:
    """The same where thoughts were made to end; None if that was not asked for."""
    return answers.forced_P


def analyse(config: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """The facts of a study, as JSON values; cells that are not finished are listed as missing and change nothing else.

    Raises:
        StructcotError: if a finished cell cannot be read, or cells answer different problems.
    """
    keys = stage_keys(cells)
    is_done = {cell.name: is_finished(cell, keys[cell.name]) for cell in cells}
    done = [read_finished(cell) for cell in cells if is_done[cell.name]]
    settings = settings_of(config)
    measured = measure(done, config.reference)
    losses = measure_losses(done, config.reference)
    variants = [variant_facts(measured, place, losses) for place in measured.groups]
    add_differences(measured, variants, settings[0])
    add_reference_losses(variants, config.reference)
    facts = {
        "title": config.title,
        "model": config.model_name_or_path,
        "reference": config.reference,
        "budget": config.budget,
        "seeds": config.seeds,
        "tasks": list(measured.tasks),
        "settings": settings,
        "missing": [{"cell": cell.name, "error": read_record(cell)["error"]} for cell in cells if not is_done[cell.name]],
        "warnings": list(_warnings(measured)),
        "variants": variants,
        "curves": [curve for setting in settings for curve in curves_of(measured, variants, setting)],
        "matched": [pair for setting in settings for pair in matched_pairs(measured, variants, setting)],
        "paper": paper_facts(),
    }
    return {**facts, "conclusions": conclusions(facts)}


def settings_of(config: StudyConfig) -> list[str]:
    """The names of the settings; those that share a base come first, since it is compared within the first of all."""
    by_base = sorted(config.settings, key=lambda setting: bool(setting.model_name_or_path))
    return [setting.name for setting in by_base] or [""]


def measure(done: Iterable[Finished], reference: str) -> Measured:
    """Lay finished cells out by setting and variant, in the order of the grid.

    Raises:
        StructcotError: if they do not all answer the same problems.
    """
    groups: dict[Place, list[Finished]] = {}
    problems: dict[str, tuple[Path, tuple[str, ...]]] = {}
    for one in done:
        groups.setdefault((one.cell.setting, one.cell.variant), []).append(one)
        for task, answers in one.tasks.items():
            first, asked = problems.setdefault(task, (one.cell.directory, answers.problem_ids))
            if asked != answers.problem_ids:
                raise StructcotError(
                    f"{one.cell.directory}: answers other problems of {task} than {first}; remove eval/ in the one that is out of date, and"
                    " run the study again"
                )
    tasks = list(problems)
    measures = [*tasks, *([MEAN] if len(tasks) > 1 else [])]
    noise = {}
    for setting in dict.fromkeys(setting for setting, _ in groups):
        trained = [own for (where, name), own in groups.items() if where == setting and name != BASE]
        for one in measures:
            arms = [arm for own in trained if (arm := arm_of(own, tasks if one == MEAN else [one])) is not None]
            noise[setting, one] = seed_noise(arms) if arms else None
    return Measured(reference=reference, groups=groups, tasks=tasks, measures=measures, noise=noise)


def arm_of(own: Sequence[Finished], tasks: Sequence[str], share_of: ShareOf = right_P) -> Arm | None:
    """What `share_of` gives of the cells of a variant as an array (S, P) for each task; None where a cell lacks one."""
    shares_TS = [[share_of(one.tasks[task]) if task in one.tasks else None for one in own] for task in tasks]
    known_TS = [[share_P for share_P in shares_S if share_P is not None] for shares_S in shares_TS]
    if [len(shares_S) for shares_S in known_TS] != [len(own)] * len(tasks):
        return None
    return [np.stack(shares_S) for shares_S in known_TS]


def shares_of(measured: Measured, variant: Mapping[str, Any], one: str, share_of: ShareOf = right_P) -> Arm | None:
    """The shares of a variant by one measure."""
    return arm_of(measured.groups[variant["setting"], variant["name"]], measured.tasks if one == MEAN else [one], share_of)


def variant_facts(measured: Measured, place: Place, losses: Mapping[str, float]) -> Variant:
    """All that there is to say about one variant without a look at another."""
    own = measured.groups[place]
    cell, trained = own[0].cell, [one.trained for one in own if one.trained]
    by_name = {BASE: "base", measured.reference: "reference"}
    held_out = [one["held_out_loss"] for one in trained if one["held_out_loss"] is not None]
    return {
        "name": cell.variant,
        "kind": cell.kind or cell.variant,
        "fraction": cell.fraction,
        "group": by_name.get(cell.variant) or GROUPS.get(cell.kind, "other"),
        "setting": cell.setting,
        "seeds": [one.cell.seed for one in own],
        "accuracy": _accuracies(measured, place, right_P),
        "forced": _accuracies(measured, place, forced_P),
        "difference": None,
        "forced_difference": None,
        "manipulation": _mean_facts([one.manipulation for one in own if one.manipulation]),
        "outputs": {task: _mean_facts([one.tasks[task].outputs for one in own if task in one.tasks]) for task in measured.tasks},
        "losses": {
            "reference_on_it": _mean([losses[one.cell.name] for one in own if one.cell.name in losses]),
            "it_on_reference": _mean(held_out),
        },
        "trained": _mean_facts([{key: value for key, value in one.items() if key != "held_out_loss"} for one in trained]),
        "examples": list(own[0].examples),
    }


def add_differences(measured: Measured, variants: Sequence[Variant], home: str) -> None:
    """Compare each variant with the reference of its setting; a base that settings share, with that of the setting `home`.

    `forced_difference` compares what is right where thoughts were made to end; the base, which has none, is left out of it.
    """
    references = {one["setting"]: one for one in variants if one["name"] == measured.reference}
    for setting, reference in references.items():
        own = (setting, "") if setting == home else (setting,)
        family = [one for one in variants if one is not reference and one["setting"] in own]
        trained = [one for one in family if one["name"] != BASE]
        for measure_ in measured.measures:
            noise = measured.noise[setting, measure_]
            _compare(measured, "difference", (reference, family), measure_, right_P, noise)
            _compare(measured, "forced_difference", (reference, trained), measure_, forced_P, noise)


def _compare(
    measured: Measured, key: str, sides: tuple[Variant, Sequence[Variant]], measure_: str, share_of: ShareOf, noise: SeedNoise | None
) -> None:
    """Write under `key` of each variant of a family how it differs from the reference by one measure."""
    reference, family = sides
    theirs = shares_of(measured, reference, measure_, share_of)
    arms = [(one, shares_of(measured, one, measure_, share_of)) for one in family]
    found = [(one, difference(arm, theirs, noise)) for one, arm in arms if arm is not None and theirs is not None]
    adjusted = holm([one.p_value for _, one in found])
    for (variant, one), p_adjusted in zip(found, adjusted, strict=True):
        said = {"p": one.p_value, "p_adjusted": p_adjusted, "verdict": verdict(one.value, p_adjusted)}
        variant[key] = {**(variant[key] or {}), measure_: {**_estimate(one), **said}}


def add_reference_losses(variants: Sequence[Variant], reference: str) -> None:
    """Lay the loss of the reference on demonstrations as they are beside the others of its setting."""
    own = {one["setting"]: one["losses"]["it_on_reference"] for one in variants if one["name"] == reference}
    for one in variants:
        one["losses"]["reference_on_reference"] = own.get(one["setting"])


def curves_of(measured: Measured, variants: Sequence[Variant], setting: str) -> Iterator[dict[str, Any]]:
    """Accuracy against the fraction for each perturbation, from the reference at 0 on; "kind" is what `perturbation_of` gives."""
    own = [variant for variant in variants if variant["setting"] == setting]
    start = [variant for variant in own if variant["name"] == measured.reference]
    perturbed = sorted((variant for variant in own if variant["group"] in GROUPS.values()), key=lambda variant: variant["fraction"])
    for label in dict.fromkeys(perturbation_of(variant) for variant in own if variant["group"] in GROUPS.values()):
        of_label = [variant for variant in perturbed if perturbation_of(variant) == label]
        points = [*start, *of_label]
        for measure_ in measured.measures if start else ():
            noise = measured.noise[setting, measure_]
            arms = [(one["fraction"], shares_of(measured, one, measure_)) for one in points]
            known = [(fraction, arm) for fraction, arm in arms if arm is not None]
            slope = trend(known, noise)
            yield {
                "kind": label,
                "group": of_label[0]["group"],
                "setting": setting,
                "task": measure_,
                "points": [{"fraction": fraction, **_estimate(accuracy(arm, noise))} for fraction, arm in known],
                "trend": _estimate(slope) if slope else None,
            }


def matched_pairs(measured: Measured, variants: Sequence[Variant], setting: str) -> Iterator[dict[str, Any]]:
    """Each broken structure against each broken content, where both are as far from the original; pairs of one measure are a family."""
    own = [variant for variant in variants if variant["setting"] == setting]
    reference = next((variant for variant in own if variant["name"] == measured.reference), None)
    for measure_ in measured.measures if reference else ():
        start = shares_of(measured, reference, measure_) if reference else None
        if start is None:
            continue
        curves: dict[str, dict[str, list[tuple[float, Arm]]]] = {"structure": {}, "content": {}}
        for one in own:
            distance, arm = (one["manipulation"] or {}).get("edit_distance"), shares_of(measured, one, measure_)
            if one["group"] in curves and distance is not None and arm is not None:
                curves[one["group"]].setdefault(perturbation_of(one), []).append((distance, arm))
        found = []
        for structure, content in product(curves["structure"], curves["content"]):
            both = curves["structure"][structure], curves["content"][content]
            pair = matched(start, *both, measured.noise[setting, measure_])
            found += [(structure, content, pair)] if pair is not None else []
        adjusted = holm([pair.difference.p_value for _, _, pair in found])
        for (structure, content, pair), p_adjusted in zip(found, adjusted, strict=True):
            yield {
                "task": measure_,
                "setting": setting,
                "structure": structure,
                "content": content,
                "edit_distance": pair.edit_distance,
                "difference": _estimate(pair.difference),
                "verdict": verdict(pair.difference.value, p_adjusted),
            }


def perturbation_of(variant: Variant) -> str:
    """The name of a perturbation without its fraction: one kind may be there twice, with other settings, and is not mixed up."""
    return variant["name"].removesuffix(f"-{100 * variant['fraction']:g}")


def _accuracies(measured: Measured, place: Place, share_of: ShareOf) -> dict[str, Any] | None:
    found = {}
    for name in measured.measures:
        arm = arm_of(measured.groups[place], measured.tasks if name == MEAN else [name], share_of)
        if arm is not None:
            found[name] = {
                **_estimate(accuracy(arm, measured.noise[place[0], name])),
                "by_seed": np.mean([right_SP.mean(axis=1) for right_SP in arm], axis=0).tolist(),
                "problems": sum(right_SP.shape[1] for right_SP in arm),
            }
    return found or None


def _estimate(one: Any) -> dict[str, Any]:
    return {"value": one.value, "interval": list(one.interval)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of each number over seeds; None of one that is not known of all."""
    if not facts:
        return None
    return {key: None if any(one[key] is None for one in facts) else _mean([one[key] for one in facts]) for key in facts[0]}


def _warnings(measured: Measured) -> Iterator[str]:
    """What makes a variant hard to compare."""
    for (setting, name), own in measured.groups.items():
        for task in measured.tasks:
            shares = [one.tasks[task].outputs["finished"] for one in own if task in one.tasks]
            if shares and sum(shares) / len(shares) < FEW_FINISHED:
                place = f"{setting}: {name}" if setting else name
                yield f"{place}: only {100 * sum(shares) / len(shares):.0f} % of the outputs to {task} end by themselves"
