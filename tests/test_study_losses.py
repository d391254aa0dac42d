"""The cheap proxy: what a finished run finds of demonstrations is what training itself and transformers say, and is measured once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from structcot.config_file import load_config
from structcot.data.render import IGNORE
from structcot.device import choose_device
from structcot.errors import ConfigError, ModelError
from structcot.study import losses
from structcot.study.cells import Cell
from structcot.study.finished import Finished
from structcot.study.losses import mean_loss, measure_losses, run_losses, samples_of
from tests.tiny_models import tiny_chat_model
from tests.tiny_run import DONE, Site, demonstration, read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A model and demonstrations in float32, and a cache of samples for this process too."""
    site = Site(tmp_path_factory.mktemp("losses"))
    tiny_chat_model(site.model_dir)
    write_jsonl(site.data_path, [demonstration(number) for number in range(12)])
    write_jsonl(site.directory / "held_out.jsonl", [demonstration(number) for number in range(20, 25)])
    write_jsonl(site.directory / "perturbed.jsonl", [demonstration(number, "So it goes.") for number in range(20, 25)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in site.environment.items():
            patch.setenv(name, value)
        yield site


def trained(site: Site, name: str, *more: str) -> Path:
    run, held_out = site.directory / name, site.directory / "held_out.jsonl"
    overrides = ["train.dtype=float32", "train.max_steps=2", "data.eval_fraction=0", f"data.eval={held_out}", *more]
    outcome = site.train(run, *overrides)
    assert outcome.status == DONE, outcome.err
    return run


def model_of(directory: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.to(choose_device()).eval()


@pytest.fixture(scope="module")
def lora_run(site: Site) -> Path:
    return trained(site, "lora")


@pytest.fixture(scope="module")
def full_run(site: Site) -> Path:
    return trained(site, "full", "tuning.method=full")


@pytest.mark.parametrize("name", ["lora_run", "full_run"])
def test_the_loss_of_a_run_is_the_held_out_loss_of_its_own_training(name: str, site: Site, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(name)
    held_out, perturbed = run_losses(run, [site.directory / "held_out.jsonl", site.directory / "perturbed.jsonl"])
    assert held_out == pytest.approx(read_jsonl(run / "metrics.jsonl")[-1]["eval/loss"], rel=1e-5)
    assert abs(perturbed - held_out) > 0.01


def test_an_adapter_counts(site: Site, lora_run: Path, full_run: Path) -> None:
    path = site.directory / "held_out.jsonl"
    untrained = model_of(site.model_dir)
    samples = samples_of(path, load_config(lora_run / "config.toml"), site.model_dir)
    before = mean_loss(untrained, samples, choose_device())
    assert all(abs(run_losses(run, [path])[0] - before) > 1e-4 for run in (lora_run, full_run))


def test_the_loss_of_one_sample_is_that_of_transformers(site: Site, full_run: Path) -> None:
    config, device = load_config(full_run / "config.toml"), choose_device()
    model = model_of(full_run / "model")
    sample = samples_of(site.directory / "held_out.jsonl", config, site.model_dir)[0]
    # What is predicted at a position is the token after it; transformers shifts by itself.
    labels_T = torch.full((len(sample.tokens_T),), -100)
    labels_T[1:] = torch.tensor(sample.labels_T[:-1].astype("int64"))
    labels_T[labels_T == IGNORE] = -100
    tokens_T = torch.from_numpy(sample.tokens_T.astype("int64"))
    with torch.no_grad():
        expected = float(model(input_ids=tokens_T[None].to(device), labels=labels_T[None].to(device)).loss)
    assert mean_loss(model, [sample], device) == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_over_the_tokens_of_all_samples_however_many_go_at_once(
    site: Site, full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, device = load_config(full_run / "config.toml"), choose_device()
    model = model_of(full_run / "model")
    samples = samples_of(site.directory / "held_out.jsonl", config, site.model_dir)
    counts = [int((sample.labels_T != IGNORE).sum()) for sample in samples]
    assert len(set(counts)) > 1
    whole = mean_loss(model, samples, device)
    monkeypatch.setattr(losses, "TOKENS_AT_ONCE", 7)
    each = [mean_loss(model, [sample], device) for sample in samples]
    assert whole == pytest.approx(math.fsum(n * loss for n, loss in zip(counts, each, strict=True)) / sum(counts), rel=1e-6)


def test_too_little_memory_is_said_with_the_sample(site: Site, full_run: Path) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError

    samples = samples_of(site.directory / "held_out.jsonl", load_config(full_run / "config.toml"), site.model_dir)
    with pytest.raises(ModelError, match=r"held_out\.jsonl:1: \d+ tokens are too many for the memory of the GPU; make room"):
        mean_loss(full, samples, choose_device())


def test_a_run_that_is_not_finished_is_refused(site: Site, full_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(full_run / "config.toml", run)
    assert run_losses(run, []) == []
    with pytest.raises(ConfigError, match=r"is a run without adapter/ or model/; train it to the end"):
        run_losses(run, [site.directory / "held_out.jsonl"])


# What was measured before


def cell_in(home: Path, name: str, run: Path, held_out: Path | None) -> Finished:
    """A finished cell; the reference has a run."""
    directory = home / name
    directory.mkdir()
    if name == "clean":
        (directory / "run").symlink_to(run)
    if held_out is not None:
        shutil.copy(held_out, directory / "held_out.jsonl")
    kind = "" if name == "clean" else "digits"
    cell = Cell(name=name, variant=name, kind=kind, fraction=1.0, setting="", seed=0, directory=directory, stages=())
    return Finished(cell=cell, tasks={}, examples=(), manipulation=None, trained=None)


def test_losses_are_kept_until_the_reference_or_the_demonstrations_are_others(
    site: Site, lora_run: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [
        cell_in(tmp_path, "clean", lora_run, None),
        cell_in(tmp_path, "digits", lora_run, site.directory / "perturbed.jsonl"),
        cell_in(tmp_path, "keywords", lora_run, site.directory / "held_out.jsonl"),
    ]
    first = measure_losses(done, "clean")
    assert list(first) == ["digits", "keywords"]
    assert [first[name] for name in first] == run_losses(lora_run, [tmp_path / name / "held_out.jsonl" for name in first])
    kept = {name: (tmp_path / name / "losses.json").read_bytes() for name in first}

    asked: list[str] = []
    real = losses.run_losses

    def noted(run: Path, files: list[Path]) -> list[float]:
        asked.extend(path.parent.name for path in files)
        return real(run, files)

    monkeypatch.setattr(losses, "run_losses", noted)
    assert measure_losses(done, "clean") == first
    assert asked == []

    with (tmp_path / "digits" / "held_out.jsonl").open("a") as file:
        file.write(json.dumps(demonstration(30)) + "\n")
    second = measure_losses(done, "clean")
    assert asked == ["digits"]
    assert (second["digits"] != first["digits"], second["keywords"]) == (True, first["keywords"])

    asked.clear()
    (tmp_path / "clean" / "run").unlink()
    (tmp_path / "clean" / "run").symlink_to(full_run)
    third = measure_losses(done, "clean")
    assert asked == ["digits", "keywords"]
    assert third["keywords"] == run_losses(full_run, [tmp_path / "keywords" / "held_out.jsonl"])[0]
    assert (tmp_path / "keywords" / "losses.json").read_bytes() != kept["keywords"]


def test_what_was_kept_and_cannot_be_read_is_measured_again(site: Site, lora_run: Path, tmp_path: Path) -> None:
    done = [
        cell_in(tmp_path, "clean", lora_run, None),
        cell_in(tmp_path, "digits", lora_run, site.directory / "perturbed.jsonl"),
    ]
    first = measure_losses(done, "clean")
    for content in ("{", "[]", '{"key": 1}'):
        (tmp_path / "digits" / "losses.json").write_text(content)
        assert measure_losses(done, "clean") == first
