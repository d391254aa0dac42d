"""The studies in studies/ load, stand for the cells that they promise, and train and measure as the paper says; and ranks of one cell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from structcot.config import Config
from structcot.countdown import write_countdown
from structcot.errors import ConfigError
from structcot.eval.config import EvalConfig
from structcot.eval.golden import MATHS_BENCHMARKS
from structcot.study.cells import Cell, Stage, stage_keys
from structcot.study.config import read_study
from structcot.study.grid import make_grid
from structcot.study.paper_table import PROBLEMS, TABLE_2
from structcot.study.work import environment_of, last_words, program_of
from tests.study_site import make_study_site
from tests.tiny_models import tiny_chat_model
from tests.tiny_run import DONE, ROOT, read_jsonl

STUDIES = {path.stem: path for path in sorted((ROOT / "studies").glob("*.toml"))}
GPU_STUDIES = {"paper_table2": 19, "sizes": 30, "lora_vs_full": 21}
HEADS = {"0.5b": 14, "1.5b": 12, "7b": 28, "14b": 40, "32b": 40}
# What a study leaves to its user.
NEEDED = {"smoke": ("model_name_or_path=owner/model", "data.train=data/demos.jsonl", "output_dir=out")}
PATH = re.compile(r"\bdata/[\w./-]+")


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file at every path below data/ that a study names, or in a directory weights without content."""
    monkeypatch.chdir(tmp_path)
    texts = [path.read_text() for path in STUDIES.values()] + [text for needed in NEEDED.values() for text in needed]
    for name in {name for text in texts for name in PATH.findall(text)}:
        path = Path(name) if Path(name).suffix else Path(name, "model.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def cells_of(name: str, *overrides: str) -> tuple[Cell, ...]:
    return make_grid(read_study(STUDIES[name], (*NEEDED.get(name, ()), *overrides)))


def stages_of(cells: tuple[Cell, ...], name: str) -> Iterator[tuple[Cell, Stage]]:
    return ((cell, stage) for cell in cells for stage in cell.stages if stage.name == name)


def names_in(values: Mapping[str, Any]) -> set[str]:
    """The cells that the text of a study asks for, put together anew."""
    settings = values.get("settings", [])
    names = {f"{one['name']}-base" if "model_name_or_path" in one else "base" for one in settings} or {"base"}
    for variant in values["variants"]:
        label = variant.get("name") or variant["kind"]
        parts = [f"{label}-{100 * fraction:g}" for fraction in variant.get("fractions", [1.0])] if "kind" in variant else [label]
        seeds = variant.get("seeds") or values.get("seeds", [0])
        names |= {
            f"{prefix}{part}-s{seed}" for prefix in [f"{one['name']}-" for one in settings] or [""] for part in parts for seed in seeds
        }
    return names


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_stands_for_the_cells_that_its_text_names(name: str) -> None:
    cells = [cell.name for cell in cells_of(name)]
    assert len(cells) == len(set(cells))
    assert set(cells) == names_in(tomllib.loads(STUDIES[name].read_text()))


@pytest.mark.parametrize(("name", "number"), GPU_STUDIES.items())
def test_a_study_on_gpus_has_its_number_of_cells(name: str, number: int) -> None:
    assert len(cells_of(name)) == number


def test_the_cells_of_the_papers_table_are_its_rows() -> None:
    cells = cells_of("paper_table2")
    ours = [(cell.kind or cell.variant, cell.fraction) for cell in cells]
    assert sorted(ours) == sorted((row.kind, row.fraction) for row in TABLE_2)
    assert {(cell.seed, cell.setting) for cell in cells} == {(0, "")}
    assert all("--mode clean" in command for cell in cells for command in cell.commands if " perturb " in command)


def test_the_line_that_makes_it_mode_paper_does() -> None:
    command = re.search(r"^#   (sed .*)$", STUDIES["paper_table2"].read_text(), re.MULTILINE)
    assert command
    shutil.copytree(ROOT / "studies", "studies")
    shutil.copytree(ROOT / "configs", "configs")
    subprocess.run(["bash", "-c", command[1]], check=True)
    cells = make_grid(read_study(Path("studies/paper_mode.toml")))
    assert [cell.name for cell in cells] == [cell.name for cell in cells_of("paper_table2")]
    modes = {cell.kind: re.findall(r"--mode (\w+)", " ".join(cell.commands)) for cell in cells if cell.kind}
    assert modes == {kind: ["clean" if kind == "wrong-answer" else "paper"] for kind in modes}


@pytest.mark.parametrize("name", GPU_STUDIES)
def test_every_training_is_the_papers(name: str) -> None:
    trainings = list(stages_of(cells_of(name), "train"))
    assert trainings
    for cell, stage in trainings:
        config = stage.config
        assert isinstance(config, Config)
        rates = {"full": 1e-5, "lora": 1e-4}
        assert config.tuning.method == ("lora" if cell.setting.startswith("r") else "full"), cell.name
        assert config.train.learning_rate == rates[config.tuning.method], cell.name
        assert (config.train.batch_sequences, config.train.num_train_epochs, config.data.max_length) == (96, 3.0, 16384)
        assert (config.train.warmup_ratio, config.train.weight_decay, config.train.lr_scheduler_type) == (0.1, 0.0, "cosine")
        assert config.tuning.lora_alpha == 2 * config.tuning.lora_r
        assert HEADS.get(cell.setting, 40) % config.parallel.sequence == 0
        assert config.parallel.max_tokens_per_microbatch * config.parallel.sequence >= config.data.max_length
        assert stage.command == f"torchrun --standalone --nproc-per-node 8 -m structcot.train {cell.directory}/train.toml"


def test_ranks_of_adapters_are_those_that_their_names_say() -> None:
    tunings = {
        cell.setting: stage.config.tuning
        for cell, stage in stages_of(cells_of("lora_vs_full"), "train")
        if isinstance(stage.config, Config)
    }
    ranks = {setting: tuning.lora_r if tuning.method == "lora" else 0 for setting, tuning in tunings.items()}
    assert ranks == {"r8": 8, "r64": 64, "r256": 256, "full": 0}


@pytest.mark.parametrize("name", GPU_STUDIES)
def test_every_evaluation_is_the_papers_with_more_samples_where_problems_are_few(name: str) -> None:
    few = {task for task, number in zip(MATHS_BENCHMARKS, PROBLEMS, strict=True) if number < 100}
    for cell, stage in stages_of(cells_of(name), "eval"):
        config = stage.config
        assert isinstance(config, EvalConfig)
        assert (config.engine, config.prompt, config.sampling.max_new_tokens, config.sampling.temperature) == ("vllm", "sky-t1", 32768, 0)
        assert {task.name for task in config.tasks} == set(MATHS_BENCHMARKS)
        samples = {task.name: (task.num_samples, task.temperature, task.top_p) for task in config.tasks}
        assert samples == {task: (8, 0.6, 0.95) if task in few else (None, None, None) for task in MATHS_BENCHMARKS}
        assert HEADS.get(cell.setting, 40) % config.vllm.tensor_parallel_size == 0
        assert 8 % config.vllm.tensor_parallel_size == 0


# Ranks of one cell


def test_several_processes_are_started_by_torchrun_and_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study_site(tmp_path / "site")
    monkeypatch.chdir(study.directory)
    alone, ranks = (make_grid(read_study(Path("study.toml"), more)) for more in ((), ("train.processes=2",)))
    assert all(command.startswith("structcot ") for cell in alone for command in cell.commands)
    launched = {command.split()[0] for cell in ranks for command in cell.commands if command.endswith("train.toml")}
    assert launched == {"torchrun"}
    others = [[command for command in cell.commands if not command.endswith("train.toml")] for cell in ranks]
    assert others == [[command for command in cell.commands if not command.endswith("train.toml")] for cell in alone]
    (study.directory / "out" / "data").mkdir(parents=True)
    for name in ("demonstrations", "held_out", "problems"):
        (study.directory / "out" / "data" / f"{name}.jsonl").touch()
    for cell in alone:
        cell.directory.mkdir(parents=True)
        (cell.directory / "data.jsonl").touch()
    assert stage_keys(ranks) == stage_keys(alone)
    with pytest.raises(ConfigError, match=r"study.toml: train.processes: got 0"):
        read_study(Path("study.toml"), ("train.processes=0",))


def test_a_base_may_have_ranks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study_site(tmp_path / "site")
    monkeypatch.chdir(study.directory)
    base = 'base={train="demos.jsonl",config="train.toml",processes=4}'
    cells = {cell.name: cell for cell in make_grid(read_study(Path("study.toml"), (base,)))}
    assert cells["base"].commands[0] == "torchrun --standalone --nproc-per-node 4 -m structcot.train out/cells/base/train.toml"
    assert cells["clean-s0"].commands[0] == "structcot train out/cells/clean-s0/train.toml"


def test_what_is_printed_is_what_is_run_and_ranks_share_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of("smoke", "train.processes=2")
    alone, ranked = (next(stage for _, stage in stages_of(one, "train")) for one in (cells_of("smoke"), cells))
    assert program_of(alone) == [sys.executable, "-m", "structcot.train", *alone.arguments[1:]]
    assert program_of(ranked) == [sys.executable, "-m", "torch.distributed.run", *ranked.command.split()[1:]]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = {"OMP_NUM_THREADS": "5", "OTHER": "x"}
    assert environment_of(alone, given) == given
    assert environment_of(ranked, given) == {"OMP_NUM_THREADS": "2", "OTHER": "x"}
    assert environment_of(ranked, {"OMP_NUM_THREADS": "1"}) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment_of(ranked, given) == given, "the user has set it"


def test_a_failed_rank_is_heard_and_not_what_torchrun_says_of_it(tmp_path: Path) -> None:
    launcher = "E1126 06:29:08 16242 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2) local_rank: 1\n"
    summary = f"{launcher}Traceback (most recent call last):\n  raise ChildFailedError(\n====\nRoot Cause:\n  traceback : none\n====\n"
    log = tmp_path / "log.txt"
    log.write_text(
        "$ structcot perturb a b\nstructcot: of another command\n$ torchrun --standalone -m structcot.train x\nstep 1\n"
        f"structcot: data.jsonl:3: no answer\n1 record cannot be trained on\n{summary}"
    )
    assert last_words(log) == "data.jsonl:3: no answer\n1 record cannot be trained on"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cell_is_trained_by_two_real_ranks(tmp_path: Path) -> None:
    tiny_chat_model(tmp_path / "model")
    write_countdown(tmp_path / "demos.jsonl", num_records=40, seed=0)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    needed = ["model_name_or_path=model", "data.train=demos.jsonl", "output_dir=out", "train.processes=2"]
    command = [sys.executable, "-m", "structcot.study", str(STUDIES["smoke"]), *needed, "--cell", "clean-s0"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    said = Path("out/cells/clean-s0/log.txt").read_text()
    assert ended.returncode == DONE, ended.stderr + said
    assert "$ torchrun --standalone --nproc-per-node 2 -m structcot.train out/cells/clean-s0/train.toml" in said
    assert "on 2 ranks" in said
    assert [line["step"] for line in read_jsonl(Path("out/cells/clean-s0/run/metrics.jsonl"))] == [1, 2, 3, 4]
