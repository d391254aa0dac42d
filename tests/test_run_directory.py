"""What a run leaves behind, read as another program would read it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import runpy
import shlex
import sys
import tomllib
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from structcot import __version__, export_files
from structcot.config_file import load_config
from structcot.export_files import peft_config, serve_command, served
from tests.tiny_models import tiny_config
from tests.tiny_run import (
    DONE,
    FAILED,
    NUM_STEPS,
    TINY_CONFIG,
    WRONG,
    Outcome,
    Site,
    adapter_of,
    checkpoints_of,
    copy_run,
    demonstration,
    files_of,
    metrics_of,
    read_jsonl,
    write_jsonl,
)

FILES = {
    "config.toml",
    "manifest.json",
    "metrics.jsonl",
    "report.html",
    "data/plan.json",
    "data/rejected.jsonl",
    "data/proof.json",
    "checkpoints/LATEST",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/tokenizer.json",
    "adapter/tokenizer_config.json",
    "adapter/chat_template.jinja",
    "adapter/certificate.json",
    "adapter/README.md",
}
METRICS = {
    "step",
    "epoch",
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/num_tokens",
    "data/step_tokens",
    "data/step_supervised_tokens",
    "loss/thought",
    "loss/solution",
    "loss/end",
    "perf/tokens_per_second",
    "perf/supervised_tokens_per_second",
    "perf/mfu_4n",
    "perf/hfu",
    "memory/peak_gib",
    "time/step_seconds",
    "time/data_seconds",
}
PLAN = {"samples", "tokens", "supervised_tokens", "dropped", "truncated", "steps", "steps_per_epoch", "imbalance", "hash"}
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def merged_run(site: Site, finished_run: Path) -> Path:
    """A copy of the finished run, exported anew with `--merge`."""
    run_dir = copy_run(finished_run, site.directory / "merged")
    outcome = site.run("export", str(run_dir), "--merge", "--json", str(run_dir / "export.json"))
    assert outcome.status == DONE, outcome.err
    return run_dir


@pytest.fixture(scope="module")
def full_run(site: Site) -> Path:
    """A run that trains all weights."""
    run_dir = site.directory / "full"
    outcome = site.train(run_dir, "tuning.method=full", "train.max_steps=3", "train.learning_rate=1e-4")
    assert outcome.status == DONE, outcome.err
    return run_dir


def test_run_directory_holds_what_it_should_and_no_leftovers(finished_run: Path) -> None:
    files = {name for name in files_of(finished_run) if not name.startswith("checkpoints/step-")}
    assert files - {".lock"} == FILES
    assert checkpoints_of(finished_run) == ["step-000004", "step-000008"]


def test_command_ends_with_the_places_of_report_weights_and_metrics(finished: tuple[Path, Outcome]) -> None:
    run_dir, outcome = finished
    places = dict(line.split() for line in outcome.out.splitlines())
    assert places == {
        "report": str(run_dir / "report.html"),
        "weights": str(run_dir / "adapter"),
        "metrics": str(run_dir / "metrics.jsonl"),
    }
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in outcome.err
    assert "vllm serve" in outcome.err


# config.toml and manifest.json


def test_resolved_config_loads_as_it_is(site: Site, finished_run: Path) -> None:
    resolved = load_config(finished_run / "config.toml")
    asked = site.config(finished_run)
    assert resolved == asked
    assert resolved.sha256 == asked.sha256
    values = tomllib.loads((finished_run / "config.toml").read_text())
    assert values["tuning"]["lora_r"] == 8
    assert values["tuning"]["lora_dropout"] == 0.0  # a default, written out
    assert set(values) >= {"data", "tuning", "train", "parallel", "checkpoint", "log", "seed", "kernels", "attn_implementation"}


def test_run_of_the_resolved_config_is_the_same_run(site: Site, finished_run: Path, tmp_path: Path) -> None:
    outcome = site.run("train", str(finished_run / "config.toml"), f"output_dir={tmp_path / 'again'}")
    assert outcome.status == DONE, outcome.err
    assert metrics_of(tmp_path / "again") == metrics_of(finished_run)
    assert adapter_of(tmp_path / "again") == adapter_of(finished_run)


def test_manifest_holds_the_hashes_of_all_that_went_in(site: Site, finished_run: Path) -> None:
    manifest = read(finished_run / "manifest.json")
    hashes = manifest["sha256"]
    assert set(hashes) == {"data", "template", "tokenizer", "plan", "config", "weights"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes.values())
    file_hash = hashlib.sha256(site.data_path.read_bytes()).hexdigest()
    assert hashes["data"] == hashlib.sha256(json.dumps([file_hash]).encode()).hexdigest()
    assert hashes["template"] == hashlib.sha256((finished_run / "adapter" / "chat_template.jinja").read_bytes()).hexdigest()
    assert hashes["plan"] == read(finished_run / "data" / "plan.json")["hash"]
    assert hashes["config"] == load_config(finished_run / "config.toml").sha256
    assert manifest["structcot"] == __version__
    assert manifest["packages"]["torch"] == metadata.version("torch")
    assert re.fullmatch(r"([0-9a-f]{40}(\+changed)?)?", manifest["git_commit"])
    assert manifest["devices"]["processes"] == 1


def test_manifest_tells_apart_what_differs(site: Site, finished_run: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [*read_jsonl(site.data_path), demonstration(99)])
    assert site.train(tmp_path / "run", f"data.train={other}", "train.max_steps=1").status == DONE
    before, after = (read(run_dir / "manifest.json")["sha256"] for run_dir in (finished_run, tmp_path / "run"))
    assert {name for name in before if before[name] != after[name]} == {"data", "plan", "config"}


# metrics.jsonl


def test_every_step_has_every_metric_once(finished_run: Path) -> None:
    lines = read_jsonl(finished_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line in lines:
        assert set(line) - {"eval/loss"} == METRICS
        assert ("eval/loss" in line) == (line["step"] in (4, 8))
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())


def test_metrics_agree_with_one_another_and_with_the_plan(finished_run: Path) -> None:
    lines, plan = read_jsonl(finished_run / "metrics.jsonl"), read(finished_run / "data" / "plan.json")
    total = 0
    for line in lines:
        total += line["data/step_tokens"]
        assert line["train/num_tokens"] == total
        assert 0 < line["data/step_supervised_tokens"] < line["data/step_tokens"]
        assert line["epoch"] == pytest.approx(line["step"] / plan["steps_per_epoch"])
        assert line["perf/tokens_per_second"] == pytest.approx(line["data/step_tokens"] / line["time/step_seconds"])
        assert line["time/data_seconds"] < line["time/step_seconds"]
        assert line["loss/thought"] != line["loss/solution"]
        assert min(line[f"loss/{part}"] for part in ("thought", "solution", "end")) <= line["train/loss"]
        assert max(line[f"loss/{part}"] for part in ("thought", "solution", "end")) >= line["train/loss"]
    epoch = lines[: plan["steps_per_epoch"]]
    assert sum(line["data/step_tokens"] for line in epoch) == plan["tokens"]
    assert sum(line["data/step_supervised_tokens"] for line in epoch) == plan["supervised_tokens"]
    rates = [line["train/learning_rate"] for line in lines]
    assert max(rates) == rates[0] == 1e-3  # one step of warm-up: 10 percent of 8, rounded up
    assert rates == sorted(rates, reverse=True)


def test_cutting_a_step_into_micro_batches_does_not_change_its_result(site: Site, tmp_path: Path) -> None:
    more = ["train.dtype=float32", "train.max_steps=3", "train.batch_sequences=9"]
    assert site.train(tmp_path / "whole", *more).status == DONE
    assert site.train(tmp_path / "cut", *more, "parallel.max_tokens_per_microbatch=200").status == DONE
    for whole, cut in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut"), strict=True):
        assert cut == {key: pytest.approx(value, rel=1e-5) for key, value in whole.items()}


def test_training_lowers_the_held_out_loss(finished_run: Path) -> None:
    first, last = (line["eval/loss"] for line in read_jsonl(finished_run / "metrics.jsonl") if "eval/loss" in line)
    assert last < first


def test_loss_is_told_apart_by_source_where_there_are_several(site: Site, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [demonstration(number, "<think>Hm.</think> So.") for number in range(6)])
    sources = f'data.train=["{site.data_path}", {{path="{other}", name="short"}}]'
    assert site.train(tmp_path / "run", sources, "train.max_steps=2", "train.batch_sequences=16").status == DONE
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        named = {key.removeprefix("loss/source/") for key in line if key.startswith("loss/source/")}
        assert named == {str(site.data_path), "short"}


# data/


def test_plan_counts_what_is_trained_on(finished_run: Path) -> None:
    plan = read(finished_run / "data" / "plan.json")
    assert set(plan) >= PLAN
    assert (plan["samples"], plan["eval_samples"], plan["dropped"], plan["truncated"]) == (18, 2, 0, 0)
    assert (plan["steps"], plan["steps_per_epoch"]) == (NUM_STEPS, 5)  # 18 samples in steps of at most 4
    assert plan["imbalance"] == 1.0  # one rank
    assert re.fullmatch(r"[0-9a-f]{64}", plan["hash"])
    assert sum(plan["length_histogram"]["samples"]) == plan["samples"]


def test_plan_counts_the_tokens_that_the_tokenizer_gives(site: Site, tmp_path: Path) -> None:
    arguments = [str(TINY_CONFIG), *site.overrides(tmp_path / "run", "data.eval_fraction=0.0")]
    assert site.run("prepare", *arguments).status == DONE
    tokenizer = AutoTokenizer.from_pretrained(site.model_dir)

    def count(turns: list[dict[str, str]], generation_prompt: bool) -> int:
        encoded = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=generation_prompt)
        return len(encoded["input_ids"])

    tokens = supervised_tokens = 0
    for record in read_jsonl(site.data_path):
        turns = [{"role": turn["from"], "content": turn["value"]} for turn in record["conversations"]]
        tokens += count(turns, False)
        supervised_tokens += count(turns, False) - count(turns[:1], True) - 1  # nothing after the end of the turn: a newline
    plan = read(tmp_path / "run" / "data" / "plan.json")
    assert (plan["samples"], plan["tokens"], plan["supervised_tokens"]) == (20, tokens, supervised_tokens)


def test_rejected_records_are_listed_with_place_reason_and_tokens(site: Site, tmp_path: Path) -> None:
    long = demonstration(3, "<think>" + "Wait. " * 500 + "</think> 6")
    data = write_jsonl(tmp_path / "some.jsonl", [demonstration(0), "{broken", long, demonstration(1), demonstration(2)])
    more = [f"data.train={data}", "data.on_bad_record=skip", "data.overlong=drop", "data.max_length=500", "data.eval_fraction=0.0"]
    outcome = site.run("prepare", str(TINY_CONFIG), *site.overrides(tmp_path / "run", *more))
    assert outcome.status == DONE, outcome.err
    broken, overlong = read_jsonl(tmp_path / "run" / "data" / "rejected.jsonl")
    assert broken["source"] == f"{data}:2"
    assert "is not valid JSON" in broken["reason"]
    assert broken["tokens"] is None
    assert overlong["source"] == f"{data}:3"
    assert overlong["tokens"] > 500
    assert overlong["reason"] == f"{overlong['tokens']} tokens, data.max_length is 500"
    plan = read(tmp_path / "run" / "data" / "plan.json")
    assert (plan["samples"], plan["dropped"], plan["bad"]) == (3, 1, 1)


def test_a_record_found_too_long_is_counted_where_it_is_cut(site: Site, tmp_path: Path) -> None:
    long = demonstration(3, "<think>" + "Wait. " * 500 + "</think> 6")
    data = write_jsonl(tmp_path / "some.jsonl", [demonstration(0), long])
    more = [f"data.train={data}", "data.overlong=truncate", "data.max_length=500", "data.eval_fraction=0.0"]
    assert site.run("prepare", str(TINY_CONFIG), *site.overrides(tmp_path / "run", *more)).status == DONE
    plan = read(tmp_path / "run" / "data" / "plan.json")
    assert (plan["samples"], plan["truncated"], plan["dropped"]) == (2, 1, 0)
    assert (tmp_path / "run" / "data" / "rejected.jsonl").read_text() == ""


# checkpoints/


def test_checkpoint_state_is_complete(finished_run: Path) -> None:
    assert (finished_run / "checkpoints" / "LATEST").read_text() == "step-000008\n"
    for step in (4, 8):
        directory = finished_run / "checkpoints" / f"step-{step:06d}"
        state = read(directory / "state.json")
        assert state["step"] == step
        assert state["num_tokens"] == read_jsonl(finished_run / "metrics.jsonl")[step - 1]["train/num_tokens"]
        assert state["files"].keys() == {path.name for path in directory.iterdir()} - {"state.json"}
        for name, (size, sha256) in state["files"].items():
            content = (directory / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)


def test_checkpoint_holds_the_adapter_in_the_format_of_torch(finished_run: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(finished_run / "checkpoints" / "step-000008").read_metadata().state_dict_metadata
    adapter = load_file(finished_run / "adapter" / "adapter_model.safetensors")
    assert sum(name.startswith("model.") for name in stored) == len(adapter)
    assert {name.rpartition(".")[2] for name in stored if name.startswith("optimizer.")} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (3, [3, 4, 5])])
def test_only_the_newest_checkpoints_are_kept(limit: int, kept: list[int], site: Site, tmp_path: Path) -> None:
    more = ["checkpoint.save_steps=1", f"checkpoint.save_total_limit={limit}", "train.max_steps=5"]
    assert site.train(tmp_path / "run", *more).status == DONE
    assert checkpoints_of(tmp_path / "run") == [f"step-{step:06d}" for step in kept]


# adapter/


def test_adapter_loads_in_peft_and_moves_the_base_model(site: Site, finished_run: Path) -> None:
    directory = finished_run / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True, return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(site.model_dir, dtype=torch.float32)
    with torch.no_grad():
        before = base(**prompt).logits
        model = PeftModel.from_pretrained(base, str(directory))
        after = model(**prompt).logits
    assert (after - before).abs().max() > 0.01
    trained = load_file(directory / "adapter_model.safetensors")
    live = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    assert len(live) == len(trained) == 2 * 7 * 2  # A and B of seven projections of two blocks
    for name, value in trained.items():
        assert value.dtype == torch.float32
        assert torch.equal(live[name.replace(".weight", ".default.weight")], value)


def test_adapter_has_the_names_that_peft_gives(finished_run: Path) -> None:
    with safe_open(finished_run / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert not [name for name in names if re.search(r"_orig_mod|_fsdp|module\.|default", name)]


def test_adapter_config_is_what_peft_and_vllm_want(site: Site, finished_run: Path) -> None:
    config = read(finished_run / "adapter" / "adapter_config.json")
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 8, 16)
    assert config["base_model_name_or_path"] == str(site.model_dir)
    assert config["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert config["modules_to_save"] is None  # vLLM refuses any other
    assert config["bias"] == "none"
    assert config["use_dora"] is False
    assert config["inference_mode"] is True
    known = LoraConfig.from_pretrained(finished_run / "adapter")
    assert known.r == 8
    assert set(config) <= {*LoraConfig.__dataclass_fields__, "peft_version"}


@pytest.mark.parametrize(("alpha", "written"), [("16", 16), ("16.5", 16.5)])
def test_alpha_is_a_whole_number_where_it_is_one(alpha: str, written: float) -> None:
    value = peft_config(tiny_config(tuning={"lora_alpha": float(alpha)}))["lora_alpha"]
    assert value == written
    assert type(value) is type(written)


def test_adapter_of_the_default_config_can_be_described() -> None:
    assert peft_config(tiny_config().model_copy(update={"tuning": type(tiny_config().tuning)()}))["lora_alpha"] == 128


def test_adapter_brings_tokenizer_and_template_of_its_base(site: Site, finished_run: Path) -> None:
    adapter = finished_run / "adapter"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (adapter / name).read_bytes() == (site.model_dir / name).read_bytes()
    turns = [{"role": "user", "content": "Hello"}]
    own, base = (AutoTokenizer.from_pretrained(path).apply_chat_template(turns, tokenize=False) for path in (adapter, site.model_dir))
    assert own == base


def test_certificate_says_that_the_reloaded_adapter_is_the_trained_model(finished_run: Path) -> None:
    certificate = read(finished_run / "adapter" / "certificate.json")
    assert certificate["passed"] is True
    assert certificate["equal_to_live"] is True
    assert certificate["zero_lora_B"] == 0
    assert certificate["kl_base_to_live"] > 10 * abs(certificate["kl_reloaded_to_live"])
    proof = read(finished_run / "data" / "proof.json")
    assert certificate["probe_tokens"] == min(512, proof["tokens"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 64}, "the reloaded model differs from the trained one by"),
        ({"target_modules": ["q_proj"]}, "the reloaded model differs"),
    ],
    ids=["alpha", "modules"],
)
def test_adapter_that_reloads_as_another_model_is_not_certified(
    changes: dict[str, object], words: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_files, "peft_config", lambda config: {**peft_config(config), **changes})
    outcome = site.train(tmp_path / "run", "train.learning_rate=1e-2")
    assert outcome.status == FAILED
    assert outcome.message.startswith(f"{tmp_path / 'run' / 'adapter'}: {words}")
    assert read(tmp_path / "run" / "adapter" / "certificate.json")["passed"] is False


def test_adapter_with_one_wrong_number_is_not_certified(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_wrong(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        next(iter(tensors.values()))[0, 0] += 1e-6
        save_file(tensors, path, metadata=metadata)

    wrong = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    monkeypatch.setattr(export_files, "save_file", lambda tensors, path, metadata: save_wrong(clones_of(tensors), path, metadata))
    outcome = site.train(tmp_path / "run", "train.max_steps=1")
    assert outcome.status == FAILED
    assert outcome.message.endswith(f"adapter_model.safetensors: 1 tensors are not those of the model, first {wrong}")


def clones_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_card_of_the_adapter_names_base_and_command(site: Site, finished_run: Path) -> None:
    card = (finished_run / "adapter" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert json.loads(front)["base_model"] == str(site.model_dir)
    assert f"vllm serve {site.model_dir} --enable-lora" in card
    assert "Rank 8, alpha 16" in card


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 9, 64, 200, 300, 512])
def test_serve_command_asks_for_the_smallest_rank_that_vllm_allows(rank: int) -> None:
    words = shlex.split(serve_command(tiny_config("some/model", tuning={"lora_r": rank}), Path("run/adapter")))
    assert words[:5] == ["vllm", "serve", "some/model", "--enable-lora", "--lora-modules"]
    assert words[5] == "structcot=run/adapter"
    allowed = int(words[words.index("--max-lora-rank") + 1])
    assert allowed in VLLM_MAX_LORA_RANKS
    assert allowed >= rank
    assert not [smaller for smaller in VLLM_MAX_LORA_RANKS if rank <= smaller < allowed]


def test_serve_command_of_a_rank_beyond_what_vllm_allows_merges_first() -> None:
    command = serve_command(tiny_config(output_dir="run", tuning={"lora_r": 600}), Path("run/adapter"))
    assert command.startswith("structcot export run --merge && vllm serve run/model")
    assert "up to rank 512" in command


# model/


def test_merged_model_is_the_base_plus_the_adapter_in_fp32_rounded_once(site: Site, merged_run: Path) -> None:
    base, merged = (load_file(directory / "model.safetensors") for directory in (site.model_dir, merged_run / "model"))
    adapter = load_file(merged_run / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    num_merged = 0
    for name, weight in base.items():
        lora_A, lora_B = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        expected = weight
        if lora_A is not None and lora_B is not None:
            expected = (weight.float() + 16 / 8 * (lora_B @ lora_A)).bfloat16()
            assert not torch.equal(expected, weight), name
            num_merged += 1
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], expected), name
    assert num_merged == 14


def test_merged_model_loads_in_transformers_and_answers_as_the_adapter_does(site: Site, merged_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged_run / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(site.model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged_run / "model")
    prompt = tokenizer("What is 2 + 2?", return_tensors="pt")
    with torch.no_grad():
        merged, before = model(**prompt).logits, base(**prompt).logits
        adapted = PeftModel.from_pretrained(base, str(merged_run / "adapter"))(**prompt).logits
    assert (merged - adapted).norm() < 0.1 * (before - adapted).norm()  # apart by the rounding of weights to bfloat16
    certificate = read(merged_run / "model" / "certificate.json")
    assert certificate["passed"] is True


def test_export_again_gives_the_same_adapter_and_names_what_it_wrote(site: Site, finished_run: Path, merged_run: Path) -> None:
    assert adapter_of(merged_run) == adapter_of(finished_run)
    facts = read(merged_run / "export.json")
    assert facts.keys() == {"adapter", "model"}
    assert facts["model"] == {"path": str(merged_run / "model"), "serve": f"vllm serve {merged_run / 'model'}"}


def test_export_of_a_stopped_run_to_another_place_leaves_the_run_as_it_was(site: Site, half_run: Path, tmp_path: Path) -> None:
    run_dir = copy_run(half_run, tmp_path / "run")
    before = files_of(run_dir)
    outcome = site.run("export", str(run_dir), "--to", str(tmp_path / "to"))
    assert outcome.status == DONE, outcome.err
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"adapter"}
    assert read(tmp_path / "to" / "adapter" / "certificate.json")["passed"] is True
    assert files_of(run_dir) == before


def test_export_without_a_checkpoint_or_with_an_edited_config_is_refused(site: Site, half_run: Path, tmp_path: Path) -> None:
    outcome = site.run("export", str(tmp_path))
    assert outcome.status == FAILED
    assert "holds no complete checkpoint" in outcome.message
    run_dir = copy_run(half_run, tmp_path / "run")
    text = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(text.replace("lora_alpha = 16.0", "lora_alpha = 32.0"))
    outcome = site.run("export", str(run_dir))
    assert outcome.status == WRONG
    assert "tuning.lora_alpha was 16.0 and is 32.0" in outcome.message
    assert not (run_dir / "adapter").exists()


def test_full_training_writes_a_model_and_no_adapter(site: Site, full_run: Path) -> None:
    assert not (full_run / "adapter").exists()
    assert read(full_run / "model" / "certificate.json")["passed"] is True
    names = {path.name for path in (full_run / "model").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    base, trained = (load_file(directory / "model.safetensors") for directory in (site.model_dir, full_run / "model"))
    assert {name: (value.dtype, value.shape) for name, value in trained.items()} == {
        name: (value.dtype, value.shape) for name, value in base.items()
    }
    assert sum(not torch.equal(trained[name], base[name]) for name in base) > len(base) / 2
    AutoModelForCausalLM.from_pretrained(full_run / "model")


# report.html, and the other way to start


def test_report_is_one_page_that_needs_no_network(finished_run: Path) -> None:
    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href") and value]

    page = (finished_run / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert page.lower().startswith("<!doctype html>")
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert f"{read_jsonl(finished_run / 'metrics.jsonl')[-1]['train/loss']:.3f}" in page


def test_module_and_command_are_the_same(
    site: Site, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", str(TINY_CONFIG), *site.overrides(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("structcot.train", run_name="__main__")
    assert not ended.value.code
    assert f"report   {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run") == metrics_of(finished_run)
    assert adapter_of(tmp_path / "run") == adapter_of(finished_run)


@pytest.mark.parametrize(
    ("name", "expected"), [("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-32B-Instruct"), ("smollm2-135m", "/models/smollm2")]
)
def test_base_is_named_so_that_other_tools_find_it(name: str, expected: str) -> None:
    config = tiny_config().model_copy(update={"model_name_or_path": name})
    assert served(config, Path("/models/smollm2")).model_name_or_path == expected


@pytest.mark.parametrize("kind", ["activations", "optimizer", "parameters"])
def test_what_lies_in_host_memory_changes_nothing(kind: str, site: Site, finished_run: Path, tmp_path: Path) -> None:
    outcome = site.train(tmp_path / "run", f"parallel.cpu_offload={kind}")
    assert outcome.status == DONE, outcome.err
    assert metrics_of(tmp_path / "run") == metrics_of(finished_run)
    assert adapter_of(tmp_path / "run") == adapter_of(finished_run)
