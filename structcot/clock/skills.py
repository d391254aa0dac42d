"""What a model knows of the content of clock puzzles: operations worked out, and compared with a number, line by line.

Run as `python -m structcot.clock.skills MODEL data/clock/skills.jsonl`. A study of structure is fair only where content is known before:
a model that computes wrongly fails for that, whatever it was shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from structcot.eval.embedded import open_embedded
from structcot.eval.engine import Request, Sampling

MAX_NEW_TOKENS, BATCH_SIZE = 160, 128


def skill_shares(answers: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Shares of right lines in pairs of (given, right) answers: `results` of operations, and `comparisons` of those that are right."""
    num_lines = num_results = num_comparisons = 0
    for given, right in answers:
        lines = given.split("\n\n")
        for number, wanted in enumerate(right.split("\n\n")):
            operation, _, comparison = wanted.partition(", ")
            said, _, word = (lines[number] if number < len(lines) else "").partition(", ")
            num_lines += 1
            num_results += said == operation
            num_comparisons += (said, word) == (operation, comparison)
    return {"results": num_results / num_lines, "comparisons": num_comparisons / max(1, num_results)}


def main() -> None:
    """Ask a model everything in a file and print what it knows."""
    model, path = sys.argv[1:]
    problems = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    engine = open_embedded(model, revision="main", adapter="", dtype="bfloat16", batch_size=BATCH_SIZE)
    requests = [Request(key=problem["id"], messages=(("user", problem["question"]),)) for problem in problems]
    outputs = {output.key: output.text for output in engine(requests, Sampling(max_new_tokens=MAX_NEW_TOKENS))}
    shares = skill_shares((outputs[problem["id"]], problem["answer"]) for problem in problems)
    print(f"results {100 * shares['results']:.2f} %, comparisons {100 * shares['comparisons']:.2f} %")


if __name__ == "__main__":
    main()
