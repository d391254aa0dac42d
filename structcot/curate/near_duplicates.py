"""Near duplicates by MinHash, over datatrove: processes on this machine, a SLURM array, or Ray, by the same code.

Three passes, each resumable: signatures of all problems in parallel, pairs that share a bucket of them, clusters of pairs. A signature is
of the runs of words of a problem, and with `same_numbers` of its numbers beside each: problems that differ in a number share nothing.

Run by the stage as `python -m structcot.curate.near_duplicates JOB.json`, in a process of its own, which keeps datatrove's log apart.
Broder (1997), "On the resemblance and containment of documents", is the source of the method.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from structcot.curate.normal import numbers_of, words_of

POLL_SECONDS = 10.0
# Signatures read at a time where buckets are merged: datatrove's five make it wait for every few of them.
SIGNATURES_AT_ONCE = 4096
CLUSTERS = "clusters"


class Problems(PipelineStep):
    """Reads the lines of a file that begin in this task's share of its bytes."""

    name, type = "problems", "reader"

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield a document for each problem."""
        for number, line in enumerate(lines_of_share(Path(self.path), rank, world_size)):
            yield Document(text=json.loads(line)["question"], id=str(number))


class Signatures(MinhashDedupSignature):
    """Signatures of problems in their normal form."""

    def __init__(self, folder: str, config: MinhashConfig, same_numbers: bool):
        words: Any = WhitespaceTokenizer()  # never asked, and taken in place of a language
        super().__init__(folder, config, language=words)
        self.same_numbers = same_numbers

    def get_shingles(self, text: str) -> np.ndarray:
        """Hash the runs of words; one run where there are too few words for one."""
        words = words_of(text)
        length = max(1, min(self.config.n_grams, len(words)))
        beside = " ".join(numbers_of(words)).encode() if self.same_numbers else b""
        key = blake2b(beside, digest_size=16).digest()
        runs = (" ".join(words[start : start + length]).encode() for start in range(max(1, len(words) - length + 1)))
        return np.array([int.from_bytes(blake2b(run, digest_size=8, key=key).digest()) for run in runs], dtype=np.uint64).reshape(-1, 1)


def lines_of_share(path: Path, share: int, num_shares: int) -> Iterator[bytes]:
    """The lines of a file that begin in one of so many equal shares of its bytes: all shares together have each line once, in order."""
    size = path.stat().st_size
    start, end = size * share // num_shares, size * (share + 1) // num_shares
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while file.tell() < end and (line := file.readline()):
            yield line


def find_clusters(job: Mapping[str, Any]) -> None:
    """Run the passes. `job` has `source`, `directory`, `executor`, `tasks`, `workers`, `slurm`, and the keys of `[duplicates]`."""
    config = MinhashConfig(
        n_grams=job["words"], num_buckets=job["buckets"], hashes_per_bucket=job["hashes"], hash_config=HashConfig(hash_fc="sha1")
    )
    signatures, pairs, clusters = (f"{job['directory']}/{name}" for name in ("signatures", "pairs", CLUSTERS))
    bucket = MinhashDedupBuckets(signatures, pairs, config=config, lines_to_buffer=SIGNATURES_AT_ONCE)
    passes = {
        "sign": ([Problems(job["source"]), Signatures(signatures, config, job["same_numbers"])], job["tasks"]),
        "pair": ([bucket], job["buckets"]),
        "cluster": ([MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True)], 1),
    }
    for name, (pipeline, num_tasks) in passes.items():
        _run(job, name, pipeline, num_tasks)


def read_clusters(directory: Path, num_tasks: int) -> Iterator[dict[int, int]]:
    """For each task's share of the problems, in order, the cluster of each that has one, by its place in the share."""
    for task in range(num_tasks):
        path = directory / CLUSTERS / f"{task:06d}.clusters"
        data = path.read_bytes() if path.is_file() else b""
        yield dict(struct.iter_unpack("<2I", data))


def _run(job: Mapping[str, Any], name: str, pipeline: list[Any], num_tasks: int) -> None:
    """Run one pass to its end; tasks that an earlier call has done are not done again."""
    how: dict[str, Any] = {"pipeline": pipeline, "tasks": num_tasks, "logging_dir": f"{job['directory']}/log/{name}"}
    match job["executor"]:
        case "local":
            LocalPipelineExecutor(**how, workers=min(job["workers"], num_tasks)).run()
        case "ray":
            RayPipelineExecutor(**how, workers=job["workers"] or -1).run()
        case _:
            executor = SlurmPipelineExecutor(**how, workers=job["workers"] or -1, job_name=f"structcot-{name}", **job["slurm"])
            executor.run()
            while executor.get_incomplete_ranks(skip_completed=True):
                time.sleep(POLL_SECONDS)


def main() -> None:
    """Run the job of a file."""
    find_clusters(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
