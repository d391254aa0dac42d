"""A study in which stand-ins take the place of the commands: they write files of the same names in milliseconds, and log what they do.

What a stand-in writes follows from its config and from what it reads, so that equal bytes mean equal work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from structcot.study import command, runner, work
from tests.study_driver import POLL_SECONDS, gather, stand_in_of
from tests.tiny_run import ROOT, demonstration, read_jsonl, write_jsonl

STUDY = """
model_name_or_path = "model"
output_dir = "out"

[data]
train = "demos.jsonl"
held_out = 2
problems = 3

[train]
config = "train.toml"
overrides = ["train.max_steps=4"]

[eval]
overrides = ["sampling.max_new_tokens=32"]

[[variants]]
name = "clean"

[[variants]]
kind = "digits"
fractions = [0.5, 1.0]
"""

# A stand-in logs "start" and, after the last of its results, "end"; what it is told by environment variables: how long a step of training
# takes, how long a training waits for another one to be started, and which command fails.
STAND_IN = """
import hashlib, json, os, signal, sys, time, tomllib
from pathlib import Path

program, *arguments = sys.argv[1:]
place = arguments[1] if program == "perturb" else arguments[0]


def log(what):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(f"{what} {program} {place} threads={os.environ.get('OMP_NUM_THREADS')} gpus={os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def stop(number, frame):
    print("structcot: stopped by SIGTERM")
    sys.exit(75)


def hashed(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


log("start")
signal.signal(signal.SIGTERM, stop)
told = os.environ.get("STAND_IN_FAILS", "")
if told and told in f"{program} {place}":
    print("a line before")
    print("structcot: told to fail")
    sys.exit(1)
if program == "perturb":
    to, rest = Path(place), [part for part in arguments if "/" not in part]
    for suffix in (".records.jsonl", ".jsonl", ".report.json", ".report.html"):
        write(to.with_suffix(suffix), Path(arguments[0]).read_text().replace("add", " ".join(rest)))
elif program == "export":
    write(Path(place) / "model" / "certificate.json", '{"passed": true}')
else:
    config = tomllib.loads(Path(place).read_text())
    out = Path(config["output_dir"])
    if program == "prepare":
        write(out / "data" / "plan.json", json.dumps({"tokens": len(Path(config["data"]["train"][0]["path"]).read_text().split())}))
    if program == "train":
        deadline = time.monotonic() + float(os.environ.get("STAND_IN_MEETS_SECONDS", "0"))
        while time.monotonic() < deadline and Path(os.environ["STAND_IN_LOG"]).read_text().count("start train") < 2:
            time.sleep(0.01)
        data, steps = Path(config["data"]["train"][0]["path"]).read_text(), out / "metrics.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        for step in range(len(steps.read_text().splitlines()) if steps.exists() else 0, max(1, config["train"]["max_steps"])):
            time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0.01")))
            with steps.open("a") as file:
                file.write(json.dumps({"step": step + 1}) + "\\n")
        learned = hashed(data, config["seed"], config["train"], config["tuning"], config["model_name_or_path"])
        what = "adapter" if config["tuning"]["method"] == "lora" else "model"
        write(out / what / "certificate.json", json.dumps({"passed": True, "learned": learned}))
        write(out / "report.html", "")
    if program == "eval":
        model = Path(config["adapter"] or config["model_name_or_path"]) / "certificate.json"
        asked = [Path(task["path"]).read_text() if task["path"] else task["name"] for task in config["tasks"]]
        known = model.read_text() if model.exists() else config["model_name_or_path"]
        write(out / "results.json", json.dumps({"found": hashed(known, asked, config["sampling"], config["seed"])}))
        write(out / "report.html", "")
log("end")
"""


@dataclass(frozen=True, slots=True)
class StudySite:
    """A directory with a study, its demonstrations, an empty model and the stand-ins; relative paths start there."""

    directory: Path

    @property
    def log_path(self) -> Path:
        return self.directory / "log"

    def environment(self, **more: str) -> dict[str, str]:
        """That of a process that runs the study with stand-ins."""
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
        kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        return {**kept, "PYTHONPATH": paths, "STAND_IN_LOG": str(self.log_path), "STAND_IN": str(self.directory / "stand_in.py"), **more}

    def call(self, monkeypatch: pytest.MonkeyPatch, *overrides: str, **options: Any) -> runner.Outcome:
        """`structcot study` in this process; options that are strings in capitals are environment variables."""
        with monkeypatch.context() as patch:
            patch.chdir(self.directory)
            for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
                patch.delenv(name, raising=False)
            for name, value in self.environment(**{key: options.pop(key) for key in list(options) if key.isupper()}).items():
                patch.setenv(name, value)
            patch.setattr(work, "program_of", stand_in_of)
            patch.setattr(runner, "POLL_SECONDS", POLL_SECONDS)
            return command.study(Path("study.toml"), overrides, finish=gather, **options)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """`structcot study` in a process group of its own, started and not waited for."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.study_driver", "study.toml"],
            cwd=self.directory,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def logged(self, what: str = "end") -> Counter[str]:
        """How often each stage of each cell was started or has ended, as `train clean-s0`."""
        counts: Counter[str] = Counter()
        for line in self.log_path.read_text().splitlines() if self.log_path.exists() else ():
            event, program, place, *_ = line.split()
            if event == what:
                inside = Path(place).relative_to("out/cells")
                name = Path(place).stem if program in ("perturb", "prepare") else program
                counts[f"{name} {inside.parts[0]}"] += 1
        return counts

    def record(self, cell: str) -> dict[str, Any]:
        return json.loads((self.directory / "out" / "cells" / cell / "cell.json").read_text())

    def results(self) -> dict[str, bytes]:
        """What must not depend on how often a study was interrupted."""
        patterns = ("study.json", "report.*", "figures/*", "cells/*/eval/results.json")
        paths = [path for pattern in patterns for path in sorted((self.directory / "out").glob(pattern))]
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in paths}


def make_study_site(directory: Path, study: str = STUDY) -> StudySite:
    """Write a study, twelve demonstrations, a model of two files and the stand-ins."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (directory / "train.toml").write_text("[data]\neval_fraction = 0.1\n\n[train]\nbatch_sequences = 4\n")
    (directory / "study.toml").write_text(study)
    (directory / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    write_jsonl(directory / "demos.jsonl", [demonstration(number) for number in range(12)])
    return StudySite(directory)


def questions_of(path: Path) -> list[str]:
    """What the demonstrations of a file ask."""
    return [record["conversations"][0]["value"] for record in read_jsonl(path)]
