"""What models do in clock puzzles, line by line: whether operations are worked out rightly, and whether the search is one.

Run as `python -m structcot.clock.behaviour STUDY_DIR`, after the study. An answer is right or wrong as a whole; here is what went wrong
in it. Content is what stands behind an equals sign, structure is which line follows which: a way that the numbers allow, carried on with
what it made, and none that was tried before.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from structcot.clock.puzzle import Way, pairs_of, work_out

OPERATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
OPENING = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+), left (\d+)\.")
TRIAL = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+), (\d+) - (\d+) = (\d+)(, yes)?\.")
SEED = re.compile(r"-s\d+$")
SHARES = {
    "operations right": "of all that are worked out",
    "openings allowed": "two of the numbers as they stand and the third left",
    "openings new": "not tried before in this output",
    "trials carried on": "from what the opening made, with the number that is left, compared with the target",
    "yes is true": "of the outputs that say yes, those in which the numbers then give the target",
}


def counts_of(question: str, output: str) -> Counter[str]:
    """Count in one output for each of `SHARES` how many there are ("all " before its name) and how many are so."""
    counts: Counter[str] = Counter()
    target, *numbers = map(int, re.findall(r"\d+", question))
    opened: set[tuple[str, ...]] = set()
    value, left, says_yes = "", "", False
    for left_, operator, right, result in OPERATION.findall(output):
        _note(counts, "operations right", work_out(int(left_), operator, int(right)) == int(result))
    for line in output.partition("Check:")[0].split("\n\n"):
        if match := OPENING.fullmatch(line.strip()):
            first, operator, second, value, left = match.groups()
            _note(counts, "openings allowed", (int(first), int(second), int(left)) in pairs_of(numbers))
            _note(counts, "openings new", (first, operator, second, left) not in opened)
            opened.add((first, operator, second, left))
        elif match := TRIAL.fullmatch(line.strip()):
            start, operator, other, made, compared, needed, _, yes = match.groups()
            _note(counts, "trials carried on", (start, other, compared, needed) == (value, left, made, str(target)))
            says_yes = says_yes or bool(yes)
    if says_yes:
        boxed = re.search(r"\\boxed\{(\d+) ([-+*]) (\d+) ([-+*]) (\d+)\}", output)
        _note(counts, "yes is true", boxed is not None and _makes(boxed.groups(), numbers, target))
    return counts


def behaviour_table(outputs: Mapping[str, Iterable[tuple[str, str, bool]]]) -> str:
    """A Markdown table of shares in per cent, by name from question, output and whether that is right; a dash where nothing is to count."""
    names = ["right", *SHARES]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, answers in outputs.items():
        counts: Counter[str] = Counter()
        for question, output, is_right in answers:
            _note(counts, "right", is_right)
            counts += counts_of(question, output)
        shares = (f"{100 * counts[key] / counts[f'all {key}']:.1f}" if counts[f"all {key}"] else "–" for key in names)
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _note(counts: Counter[str], name: str, is_so: bool) -> None:
    counts[f"all {name}"] += 1
    counts[name] += is_so


def _makes(boxed: tuple[str, ...], numbers: list[int], target: int) -> bool:
    first, one, second, other, third = boxed
    way = Way(numbers=(int(first), int(second), int(third)), operators=(one, other))
    return way.numbers in pairs_of(numbers) and way.value == target


def main() -> None:
    """Print the table of a study: all cells that were evaluated, those of a variant together."""
    outputs: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    for path in sorted(Path(sys.argv[1]).glob("cells/*/eval/samples.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            outputs[SEED.sub("", path.parts[-3])].append((sample["prompt"][-1]["content"], sample["output"], sample["correct"]))
    print(behaviour_table(outputs))
    print("\n" + "\n".join(f"- *{name}*: {meaning}" for name, meaning in SHARES.items()))


if __name__ == "__main__":
    main()
