"""Decontamination: a problem that holds one of a benchmark, alone or inside a longer text, is left out.

Problems are compared word by word in the normal form of `structcot.curate.normal`. A benchmark's problem is the set of its runs of `words`
words; a text that has `share` of them holds it. One that is shorter than a run is held by a text in which all its words follow one another.

Runs are hashed to 64 bits: among 10^5 runs of benchmarks a text of a thousand words meets one by chance once in 10^11 times.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from structcot.curate.config import ContaminationConfig
from structcot.curate.normal import words_of
from structcot.curate.stages import Record, StageFiles
from structcot.errors import ConfigError
from structcot.eval.config import TaskConfig, task_of
from structcot.eval.tasks import find_task, load_task

# A problem of fewer words than this is no problem: "12" or "find x" would be found everywhere.
FEWEST_WORDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmarks:
    """Problems to be kept out: for each run of words the problems that have it, how many runs each has, and short ones as they are.

    `runs_of` maps the hash of a run to numbers of problems; `num_runs` and `names` are by number. `short` has by length in words the
    problems that are too short for a run, by the hash of all their words.
    """

    words: int
    share: float
    names: list[str] = field(default_factory=list)
    num_runs: list[int] = field(default_factory=list)
    runs_of: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    short: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, name: str, question: str) -> None:
        """Keep out one more problem."""
        words = words_of(question)
        if len(words) < FEWEST_WORDS:
            return
        number = len(self.names)
        self.names.append(name)
        runs = set(hashes_of(words, self.words))
        self.num_runs.append(len(runs))
        for run in runs:
            self.runs_of[run].append(number)
        if not runs:
            self.short[len(words)][next(hashes_of(words, len(words)))] = number

    def found_in(self, question: str) -> tuple[str, float]:
        """The name of the problem that a text holds, and how much of it; "" and the largest share there is, if it holds none."""
        words = words_of(question)
        met = Counter(number for run in set(hashes_of(words, self.words)) for number in self.runs_of.get(run, ()))
        name, most = "", 0.0
        for number, count in met.items():
            share = count / self.num_runs[number]
            if share > most:
                name, most = self.names[number], share
        if most >= self.share:
            return name, most
        for length, known in self.short.items():
            number = next((known[run] for run in hashes_of(words, length) if run in known), None)
            if number is not None:
                return self.names[number], 1.0
        return "", most


def load_benchmarks(config: ContaminationConfig) -> Benchmarks:
    """Read the problems that are to be kept out.

    Raises:
        ConfigError, FetchError: if a benchmark is unknown or cannot be read.
    """
    found = Benchmarks(words=config.words, share=config.share)
    for name in config.benchmarks:
        asked = TaskConfig(**task_of(name))
        try:
            loaded = load_task(find_task(asked), config.data_dir)
        except ConfigError as error:
            raise ConfigError(f"contamination.benchmarks: {error}") from error
        for problem in loaded.problems:
            found.add(f"{asked.name}/{problem.id}", problem.question)
    return found


def decontaminate(benchmarks: Benchmarks, records: Iterable[Record], files: StageFiles) -> None:
    """Let every record fall that holds a problem of a benchmark."""
    for record in records:
        name, share = benchmarks.found_in(record["question"])
        if name:
            files.reject(record, f"holds a problem of {name.partition('/')[0]}", f"{name}: {100 * share:.0f} % of its runs")
        else:
            files.keep(record)


def hashes_of(words: Sequence[str], length: int) -> Iterator[int]:
    """The hash of each run of `length` words, in order; none where there are fewer."""
    for start in range(len(words) - length + 1):
        yield int.from_bytes(blake2b(" ".join(words[start : start + length]).encode(), digest_size=8).digest(), "little")


def facts_of(benchmarks: Benchmarks) -> Mapping[str, object]:
    """What decides the result, for the key of the stage: the runs of all problems, in whatever order they were read."""
    digest = blake2b(digest_size=16)
    for run in sorted(benchmarks.runs_of):
        digest.update(run.to_bytes(8, "little"))
    for length, known in sorted(benchmarks.short.items()):
        digest.update(f"{length}: {sorted(known)}".encode())
    return {"words": benchmarks.words, "share": benchmarks.share, "problems": len(benchmarks.names), "runs": digest.hexdigest()}
