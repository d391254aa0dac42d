"""What a study shows, as plain sentences: none claims more than the intervals carry.

Every sentence that calls a variant worse or better is made from a verdict (`settled`), and one sentence holds variants of one verdict only.
A difference that is not settled is never called an absence of one: what its interval still allows stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from structcot.eval.report_page import percent, points
from structcot.study.report_order import (
    BETTER,
    MEAN,
    NOISE,
    WORSE,
    Facts,
    estimate_of,
    headline_task,
    home_of,
    in_order,
    label_of,
    paper_cell,
    reference_of,
    settings_in,
    settled,
)

GROUPS = {"answer": "Answers", "content": "Content", "structure": "Structure", "other": "Other data"}
# A tenth of a point is the last digit that is shown.
SMALLEST_SHOWN = 0.0005
NOTHING_YET = "Nothing has finished yet: no variant has an accuracy, so nothing can be concluded."


def conclusions(facts: Facts) -> list[str]:
    """Say in sentences what the facts of a study carry; the order is that of the facts' settings, and within each from base to paper."""
    task = headline_task(facts)
    measured = [variant for variant in in_order(facts) if estimate_of(variant, "accuracy", task)]
    if not measured:
        return [NOTHING_YET, *_missing(facts)]
    sentences = [_scope(facts, measured, task)]
    for setting in settings_in(measured, facts):
        of_setting = [variant for variant in measured if home_of(variant, facts) == setting]
        lead = f"With {setting}: " if len(facts["settings"]) > 1 and setting else ""
        sentences += [lead + sentence for sentence in _of_setting(facts, of_setting, setting, task)]
    return [*sentences, *_one_run(facts, measured), *_missing(facts)]


def claim(label: str, difference: Facts, reference: str) -> str:
    """Say how a variant compares with the reference, in the words of the verdict and with the interval that it rests on."""
    verdict = settled(difference)
    if verdict == NOISE:
        return f"{label} cannot be told apart from {reference} ({_signed(difference)})"
    return f"{label} is {verdict} than {reference} by {_size(difference)}"


def _of_setting(facts: Facts, variants: Sequence[Facts], setting: str, task: str) -> Iterator[str]:
    reference = reference_of(facts, setting)
    name = reference["name"] if reference else facts["reference"]
    if reference is None or estimate_of(reference, "accuracy", task) is None:
        if any(variant["group"] != "base" for variant in variants):
            yield f"the reference {name} has no result yet, so there is nothing to compare with."
        return
    compared = [variant for variant in variants if estimate_of(variant, "difference", task)]
    for base in (variant for variant in compared if variant["group"] == "base"):
        yield _base(base, base["difference"][task], name)
    for group, title in GROUPS.items():
        yield from _group(title, [variant for variant in compared if variant["group"] == group], name, task)
    yield from _trends(facts, setting, task)
    yield from _matched(facts, setting, task)
    yield from _endings(compared, reference, task)
    yield from _paper(facts, compared, name, task)


def _scope(facts: Facts, measured: Sequence[Facts], task: str) -> str:
    """What the numbers of all further sentences are."""
    of = f"the unweighted mean of {_join(facts['tasks'])}" if task == MEAN else task
    problems = {variant["accuracy"][task]["problems"] for variant in measured}
    count = f" ({max(problems):,} problems)" if len(problems) == 1 else ""
    return f"Differences are in points of accuracy on {of}{count}, from {facts['reference']}; intervals, in brackets, are of 95 %."


def _base(base: Facts, difference: Facts, reference: str) -> str:
    """Whether training on the demonstrations teaches anything at all: without that nothing further means much."""
    sentence = claim(base["name"], difference, reference)
    match settled(difference):
        case "worse":
            return f"{sentence}: training on {reference} teaches the task."
        case "better":
            return f"{sentence}: training on {reference} costs accuracy here, so this study cannot show what in it teaches."
    return f"{sentence}: it is not shown that training on {reference} teaches the task, so losses below say little about what does."


def _group(title: str, variants: Sequence[Facts], reference: str, task: str) -> Iterator[str]:
    """One sentence for each verdict that occurs."""
    if len(variants) == 1:
        yield f"{title}: {claim(variants[0]['name'], variants[0]['difference'][task], reference)}."
        return
    of_verdict: dict[str, list[Facts]] = {WORSE: [], BETTER: [], NOISE: []}
    for variant in variants:
        of_verdict[settled(variant["difference"][task])].append(variant)
    for verdict in (WORSE, BETTER):
        if of_verdict[verdict]:
            listed = "; ".join(f"{variant['name']} by {_size(variant['difference'][task])}" for variant in of_verdict[verdict])
            yield f"{title}: {_count(of_verdict[verdict], variants)} {verdict} than {reference}: {listed}."
    level = of_verdict[NOISE]
    if level:
        names, room = _join(variant["name"] for variant in level), _room([variant["difference"][task] for variant in level])
        yield f"{title}: {_count(level, variants)} not told apart from {reference}: {names}{room}."


def _room(differences: Sequence[Facts]) -> str:
    """How large a loss the intervals of unsettled differences still allow."""
    lows = [one["interval"][0] for one in differences if one.get("interval")]
    if not lows or min(lows) >= 0:
        return ""
    whose = "its interval allows" if len(differences) == 1 else "their intervals allow"
    return f"; {whose} a loss of up to {100 * -min(lows):.1f} points"


def _trends(facts: Facts, setting: str, task: str) -> Iterator[str]:
    """Slopes of the curves by what their intervals carry; the facts give them in shares per tenth."""
    curves = [curve for curve in facts["curves"] if (curve["setting"], curve["task"]) == (setting, task)]
    curves = [curve for curve in curves if (curve.get("trend") or {}).get("value") is not None]
    for verdict, way in ((WORSE, "falls"), (BETTER, "rises")):
        moved = "; ".join(f"{curve['kind']} by {_size(curve['trend'])}" for curve in curves if settled(curve["trend"]) == verdict)
        if moved:
            yield f"By a straight line through its curve, each by its own interval, accuracy {way} for every 10 % more of {moved}."
    steady = [curve["kind"] for curve in curves if settled(curve["trend"]) == NOISE]
    if steady:
        yield f"No slope can be told from 0 for {_join(steady)}."


def _matched(facts: Facts, setting: str, task: str) -> Iterator[str]:
    """Structure less content where both change the text by as much: a pair is named as costing more only where its interval excludes 0."""
    pairs = [pair for pair in facts["matched"] if (pair["setting"], pair["task"]) == (setting, task)]
    pairs = [pair for pair in pairs if (pair.get("difference") or {}).get("value") is not None]
    of_verdict: dict[str, list[Facts]] = {WORSE: [], BETTER: [], NOISE: []}
    for pair in pairs:
        verdict = pair.get("verdict")
        of_verdict[settled(pair["difference"], verdict if verdict in of_verdict else None)].append(pair)
    for verdict, more, less in ((WORSE, "structure", "content"), (BETTER, "content", "structure")):
        if of_verdict[verdict]:
            listed = "; ".join(
                f"{pair[more]} more than {pair[less]} at {_distance(pair)} by {_size(pair['difference'])}" for pair in of_verdict[verdict]
            )
            yield f"At the same edit distance {more} costs more than {less} in {len(of_verdict[verdict])} of {len(pairs)} pairs: {listed}."
    if of_verdict[NOISE]:
        listed = "; ".join(
            f"{pair['structure']} and {pair['content']} at {_distance(pair)} ({_signed(pair['difference'])})" for pair in of_verdict[NOISE]
        )
        yield f"At the same edit distance structure and content cannot be told apart for {listed}."


def _endings(compared: Sequence[Facts], reference: Facts, task: str) -> Iterator[str]:
    """What is left of each loss where every thought is made to end, also the reference's: two losses side by side, without a cause."""
    lost = [one for one in compared if one["group"] != "base" and settled(one["difference"][task]) == WORSE]
    both = [(one, left) for one in lost if (left := estimate_of(one, "forced_difference", task)) is not None]
    forced = [(one, left) for one, left in both if abs(left["value"] - one["difference"][task]["value"]) >= SMALLEST_SHOWN]
    if both and not forced:
        yield "With every thought made to end, every loss stays as it is."
    words = {
        WORSE: "there is still a loss for",
        NOISE: f"the accuracy can no longer be told apart from that of {reference['name']} for",
        BETTER: f"the accuracy is above that of {reference['name']} for",
    }
    for verdict, text in words.items():
        said = [(one, left) for one, left in forced if settled(left) == verdict]
        if said:
            listed = "; ".join(f"{one['name']} ({_signed(left)}, and {_signed(one['difference'][task])} as it is)" for one, left in said)
            yield f"With every thought made to end, {text} {listed}."


def _paper(facts: Facts, compared: Sequence[Facts], reference: str, task: str) -> Iterator[str]:
    """Where signs agree with the paper's, by what both intervals carry: the paper's other model and tasks are not tested against ours."""
    names: dict[tuple[str, str], list[str]] = {}
    for variant in compared:
        cell = paper_cell(facts, variant, task)
        if cell and cell.difference:
            names.setdefault((settled(variant["difference"][task]), settled(cell.difference)), []).append(variant["name"])

    words = {
        (WORSE, WORSE): "As in the paper, worse than {}",
        (BETTER, BETTER): "As in the paper, better than {}",
        (WORSE, BETTER): "Against the paper, where the sign is the other, worse than {}",
        (BETTER, WORSE): "Against the paper, where the sign is the other, better than {}",
        (WORSE, NOISE): "Beyond what the paper's sample sizes carry, worse than {}",
        (BETTER, NOISE): "Beyond what the paper's sample sizes carry, better than {}",
        (NOISE, WORSE): "With a loss in the paper, and not told apart from {} here",
        (NOISE, BETTER): "With a gain in the paper, and not told apart from {} here",
        (NOISE, NOISE): "Neither here nor by the paper's sample sizes told apart from {}",
    }
    for verdicts, text in words.items():
        if verdicts in names:
            yield f"{text.format(reference)}: {_join(names[verdicts])}."


def _one_run(facts: Facts, measured: Iterable[Facts]) -> Iterator[str]:
    trained = [variant for variant in measured if variant["group"] != "base"]
    single = [label_of(variant, facts) for variant in trained if len(variant["seeds"]) == 1]
    if single and len(single) == len(trained):
        yield "Every variant has one training run: training noise is not in these intervals."
    elif single:
        yield f"One training run: training noise is not in these intervals for {_join(single)}."


def _missing(facts: Facts) -> Iterator[str]:
    count = len(facts["missing"])
    if count:
        yield f"{count:,} {'cell is' if count == 1 else 'cells are'} missing, so this is not the whole study."


def _count(part: Sequence[Facts], whole: Sequence[Facts]) -> str:
    return f"{len(part)} of {len(whole)} variants {'is' if len(part) == 1 else 'are'}"


def _size(estimate: Facts) -> str:
    """Write a settled difference without its sign: "12.3 points (6.5 to 18.0)"."""
    low, high = sorted(abs(end) for end in estimate["interval"])
    return f"{percent(abs(estimate['value']))} points ({percent(low)} to {percent(high)})"


def _signed(estimate: Facts) -> str:
    interval = estimate.get("interval")
    ends = f", {' to '.join(map(points, interval))}" if interval else ", no interval"
    return f"{points(estimate['value'])} points{ends}"


def _distance(pair: Facts) -> str:
    distance = pair.get("edit_distance")
    return "the same distance" if distance is None else f"{distance:.2f}"


def _join(names: Iterable[str]) -> str:
    *first, last = list(names)
    return f"{', '.join(first)} and {last}" if first else last
