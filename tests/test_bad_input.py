"""Whatever is wrong with what a run is given, it ends in one message that says what, where and what to do, never in a traceback."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from structcot import train
from tests.chat_tokenizers import CHATML_GENERATION, DROPS_THOUGHT, NO_END_OF_TURN
from tests.tiny_models import tiny_chat_model
from tests.tiny_run import (
    DONE,
    FAILED,
    TINY_CONFIG,
    WRONG,
    Outcome,
    Site,
    checkpoints_of,
    demonstration,
    files_of,
    metrics_of,
    read_jsonl,
    write_jsonl,
)

GOOD = [demonstration(number) for number in range(8)]


def message(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def train_on(site: Site, directory: Path, records: Sequence[Any], *more: str) -> Outcome:
    """Train two steps on records in `directory`/data.jsonl."""
    data = write_jsonl(directory / "data.jsonl", records)
    return site.train(directory / "run", f"data.train={data}", "train.max_steps=2", *more)


def assert_wrong(outcome: Outcome, *words: str) -> None:
    assert outcome.status == WRONG, outcome.err
    for word in words:
        assert word in outcome.message
    assert outcome.out == ""


def own_model(site: Site, directory: Path) -> Path:
    """A copy of the model that a test may break."""
    return shutil.copytree(site.model_dir, directory / "model")


# Lines of data


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"conversations": [', "is not valid JSON: Expecting value at column 20"),
        ("hello", "is not valid JSON"),
        ("[" * 100_000, "is JSON that cannot be read"),
        ("[]", "is a list, not a JSON object"),
        ("null", "is null, not a JSON object"),
        ({}, "misses the fields of a record: found nothing"),
        ({"text": "x"}, "misses the fields of a record: found text; needs messages (messages) or conversations (sharegpt)"),
        ({"prompt": "x"}, "misses the fields of a record: found prompt"),
        ({"conversations": "x"}, '"conversations" is a string, not a list'),
        ({"conversations": [{"from": "user"}]}, 'conversations[0] has no "value"; found from'),
        (message(("user", "x"), ("assistent", "y")), "messages[1] has the unknown role "),
        (message(("user", "x"), ("assistant", "y"), ("assistant", "z")), "message 3 is a second assistant turn in a row"),
        (message(("user", "x")), "has no assistant turn"),
        (message(("system", "x")), "has no user and no assistant turn"),
        (message(("assistant", "x")), "message 1 is an assistant turn; the first turn must be the user's"),
        (message(("user", "x"), ("assistant", "y"), ("user", "z")), "ends in a user turn; the last must be the assistant's"),
        (message(("user", "x"), ("assistant", "")), "message 2 (assistant) is empty"),
        ({"prompt": "x", "completion": " \n"}, "message 2 (assistant) is empty"),
        ({"prompt": "x", "completion": ["y"]}, '"prompt" is a string and "completion" a list'),
        ({"messages": [{"role": "user", "content": None}]}, "the content of messages[0] (user) is null, not a string"),
        (message(("user", "x\0y"), ("assistant", "z")), "message 1 (user) holds a NUL character at offset 1"),
        (b'{"prompt": "x", "completion": "\xff"}', "is not valid UTF-8 at byte offset 31 of the line"),
        ('{"prompt": "x", "completion": "a\\ud800"}', "message 2 (assistant) holds the lone surrogate U+D800 at offset 1"),
        ({"prompt": "x", "completion": "<|im_end|>y"}, 'message 2 (assistant) holds the control token "<|im_end|>" at offset 0'),
    ],
)
def test_bad_line_is_named_with_its_place_and_reason(line: Any, reason: str, site: Site, tmp_path: Path) -> None:
    outcome = train_on(site, tmp_path, [*GOOD[:6], line, GOOD[6]])
    assert_wrong(outcome, f"{tmp_path / 'data.jsonl'}:7: {reason}", "1 record cannot be trained on", 'data.on_bad_record = "skip"')
    assert not (tmp_path / "run" / "checkpoints").exists()
    (rejected,) = read_jsonl(tmp_path / "run" / "data" / "rejected.jsonl")
    assert rejected["source"] == f"{tmp_path / 'data.jsonl'}:7"
    assert rejected["reason"].startswith(reason)


def test_all_bad_lines_are_listed_at_once(site: Site, tmp_path: Path) -> None:
    records = [GOOD[0], "{", GOOD[1], message(("user", "x")), b"\xff", GOOD[2]]
    for command in ("train", "prepare"):
        data = write_jsonl(tmp_path / "data.jsonl", records)
        outcome = site.run(command, str(TINY_CONFIG), *site.overrides(tmp_path / "run", f"data.train={data}"))
        assert_wrong(outcome, "3 records cannot be trained on")
        places = re.findall(r"data\.jsonl:(\d+): ", outcome.message)
        assert places == ["2", "4", "5"]


def test_long_list_of_bad_lines_is_cut_and_kept_whole_in_a_file(site: Site, tmp_path: Path) -> None:
    outcome = train_on(site, tmp_path, [GOOD[0], *["{"] * 70])
    assert_wrong(outcome, f"... and 20 more (all in {tmp_path / 'run' / 'data' / 'rejected.jsonl'})", "70 records cannot be trained on")
    assert len(outcome.message.splitlines()) == 52
    assert len(read_jsonl(tmp_path / "run" / "data" / "rejected.jsonl")) == 70


def test_bad_lines_can_be_skipped(site: Site, tmp_path: Path) -> None:
    outcome = train_on(site, tmp_path, [*GOOD, "{", message(("user", "x"))], "data.on_bad_record=skip")
    assert outcome.status == DONE, outcome.err
    assert json.loads((tmp_path / "run" / "data" / "plan.json").read_text())["bad"] == 2
    assert len(read_jsonl(tmp_path / "run" / "data" / "rejected.jsonl")) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", b"", "holds no records; remove it from the config or fill it"),
        ("data.jsonl", b"\n \n", "holds no records; remove it from the config or fill it"),
        ("data.json", b"[]", "holds no records; remove it from the config or fill it"),
        ("data.json", b"hello", "is neither an array of records nor one record a line"),
        ("data.parquet", b"hello", "cannot be read as Parquet"),
        ("data.csv", b"a,b\n", "is of no known kind; convert it to .jsonl, .json, .parquet"),
    ],
)
def test_file_without_records_is_refused(name: str, content: bytes, words: str, site: Site, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_wrong(site.train(tmp_path / "run", f"data.train={path}"), str(path), words)


def test_file_that_is_not_there_is_refused(site: Site, tmp_path: Path) -> None:
    assert_wrong(site.train(tmp_path / "run", f"data.train={tmp_path / 'none.jsonl'}"), 'data.train: "', "does not exist")
    more = [f"data.eval={tmp_path / 'none.jsonl'}", "data.eval_fraction=0.0"]
    assert_wrong(site.train(tmp_path / "run", *more), 'data.eval: "', "does not exist")
    assert_wrong(site.train(tmp_path / "run", f"data.train={tmp_path}"), "is a directory; name the files in it")


def test_nothing_left_to_train_on_is_refused(site: Site, tmp_path: Path) -> None:
    outcome = train_on(site, tmp_path, ["{", "{"], "data.on_bad_record=skip")
    assert_wrong(outcome, "data.train: no sample is left of 2 records; first reason: ", "data.jsonl:1: is not valid JSON")


def test_one_sample_cannot_be_held_out_from_itself(site: Site, tmp_path: Path) -> None:
    assert_wrong(train_on(site, tmp_path, GOOD[:1]), "data.eval_fraction: got 0.1, but there is only 1 sample")
    assert train_on(site, tmp_path, GOOD[:1], "data.eval_fraction=0.0").status == DONE


# Length


def long_record(num_words: int) -> dict[str, Any]:
    return demonstration(5, "<|begin_of_thought|>" + "Wait. " * num_words + "<|end_of_thought|> 10")


def test_record_longer_than_allowed_stops_the_run(site: Site, tmp_path: Path) -> None:
    outcome = train_on(site, tmp_path, [*GOOD, long_record(3000)])
    assert_wrong(outcome, "data.jsonl:9: ", " tokens, data.max_length is 2048")


def test_record_longer_than_allowed_can_be_left_out(site: Site, tmp_path: Path) -> None:
    assert train_on(site, tmp_path, [*GOOD, long_record(3000)], "data.overlong=drop").status == DONE
    (rejected,) = read_jsonl(tmp_path / "run" / "data" / "rejected.jsonl")
    assert rejected["tokens"] > 2048


def test_record_longer_than_allowed_can_be_cut_and_still_ends(site: Site, tmp_path: Path) -> None:
    outcome = train_on(site, tmp_path, [long_record(3000)], "data.overlong=truncate", "data.eval_fraction=0.0")
    assert outcome.status == DONE, outcome.err
    proof = json.loads((tmp_path / "run" / "data" / "proof.json").read_text())
    assert proof["tokens"] == 2048
    assert (proof["pieces"][-1]["text"], proof["pieces"][-1]["trained"]) == ("<|im_end|>", "end")


def test_ten_megabytes_in_one_line_are_refused_in_short_time(site: Site, tmp_path: Path) -> None:
    start = time.process_time()
    outcome = train_on(site, tmp_path, [*GOOD, long_record(10 * 2**20 // 6)])
    assert_wrong(outcome, "data.jsonl:9: more than ", " tokens, data.max_length is 2048")
    assert time.process_time() - start < 10  # seconds


def test_sample_that_fits_no_micro_batch_is_refused(site: Site, tmp_path: Path) -> None:
    outcome = site.train(tmp_path / "run", "parallel.max_tokens_per_microbatch=50")
    assert_wrong(outcome, "parallel.max_tokens_per_microbatch: got 50, but the longest sample has", "raise it to")


# Control tokens, templates, tokenizers


def test_control_tokens_can_be_read_as_text(site: Site, tmp_path: Path) -> None:
    records = [*GOOD, demonstration(8, "The token <|im_end|> ends a turn.")]
    assert_wrong(train_on(site, tmp_path, records), 'data.jsonl:9: message 2 (assistant) holds the control token "<|im_end|>" at offset 10')
    outcome = train_on(site, tmp_path, records, "data.control_tokens=text")
    assert outcome.status == DONE, outcome.err


def test_padding_that_is_the_end_of_turn_does_not_hide_it_from_training(site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}", "train.max_steps=1")
    assert outcome.status == DONE, outcome.err
    proof = json.loads((tmp_path / "run" / "data" / "proof.json").read_text())
    assert [piece["text"] for piece in proof["pieces"] if piece["trained"] == "end"] == ["<|im_end|>"]
    assert metrics_of(tmp_path / "run")[0]["loss/end"] > 0


def test_generation_markers_of_a_template_change_nothing(site: Site, finished_run: Path, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    assert "generation" not in (model_dir / "chat_template.jinja").read_text().replace("add_generation_prompt", "")
    (model_dir / "chat_template.jinja").write_text(CHATML_GENERATION)
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}")
    assert outcome.status == DONE, outcome.err
    assert metrics_of(tmp_path / "run") == metrics_of(finished_run)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_END_OF_TURN, "closes an assistant turn with no end-of-turn token; the model would never learn to stop"),
        ("{% for message in messages %}{{ message.content }<|im_end|>", "the chat template refuses the conversation"),
    ],
)
def test_template_that_cannot_be_trained_with_is_refused(template: str, words: str, site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    (model_dir / "chat_template.jinja").write_text(template)
    assert_wrong(site.train(tmp_path / "run", f"model_name_or_path={model_dir}"), str(model_dir), words, "put a chat_template.jinja there")


def test_template_that_drops_the_thought_is_refused_with_the_records(site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    (model_dir / "chat_template.jinja").write_text(DROPS_THOUGHT)
    records = [demonstration(0), demonstration(1, "<think>Hm.</think> So.")]
    outcome = train_on(site, tmp_path, records, f"model_name_or_path={model_dir}")
    assert_wrong(outcome, "data.jsonl:2: the chat template drops or changes text of the assistant turn (message 2)")


def test_model_without_a_template_is_refused(site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    (model_dir / "chat_template.jinja").unlink()
    assert_wrong(site.train(tmp_path / "run", f"model_name_or_path={model_dir}"), "the tokenizer has no chat template")


def test_tokenizer_with_more_tokens_than_the_model_is_refused(site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}")
    assert_wrong(outcome, "but the model has only 100 tokens; use the tokenizer that belongs to the model")


# Models


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_and_not_opened(name: str, site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    (model_dir / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, model_dir / name)
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}")
    assert_wrong(outcome, f"{model_dir}: only {name}; pickled weights can run code when loaded: convert to safetensors")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_model_that_brings_code_is_refused_and_the_code_not_run(file: str, site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    values = json.loads((model_dir / file).read_text())
    (model_dir / file).write_text(json.dumps({**values, "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.T", None]}}))
    (model_dir / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}")
    assert_wrong(outcome, f'{model_dir / file}: "auto_map": needs remote code, which is never executed')
    assert not (tmp_path / "ran").exists()


def cut_short(model_dir: Path) -> None:
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_a_tensor(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model_dir / "model.safetensors")


def with_another_shape(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, model_dir / "model.safetensors")


def with_config(**values: Any) -> Callable[[Path], None]:
    def change(model_dir: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        (model_dir / "config.json").write_text(json.dumps({**config, **values}))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model_dir: (model_dir / "config.json").unlink(), "has no config.json; give the directory of a Hugging Face model"),
        (lambda model_dir: (model_dir / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda model_dir: (model_dir / "model.safetensors").unlink(), "has neither model.safetensors nor model.safetensors.index.json"),
        (lambda model_dir: (model_dir / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
        (cut_short, "model.safetensors"),
        (without_a_tensor, "the weights do not fit config.json: missing model.norm.weight, left over nothing"),
        (with_another_shape, "model.norm.weight has shape (7,), config.json says (32,)"),
        (with_config(model_type="gpt2"), 'model_type is "gpt2"; structcot trains dense llama, qwen2, qwen3 models'),
        (with_config(hidden_act="gelu"), 'hidden_act is "gelu"; only silu is supported'),
        (with_config(use_sliding_window=True), "use_sliding_window is true; only full causal attention is supported"),
        (with_config(quantization_config={"bits": 4}), "the weights are quantised"),
    ],
    ids=["no config", "config", "no weights", "tokenizer", "cut short", "tensor", "shape", "family", "act", "window", "quantised"],
)
def test_model_that_cannot_be_trained_is_refused(change: Callable[[Path], None], words: str, site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    change(model_dir)
    assert_wrong(site.train(tmp_path / "run", f"model_name_or_path={model_dir}"), str(model_dir), words)


def test_model_that_is_not_there_is_refused(site: Site, tmp_path: Path) -> None:
    outcome = site.train(tmp_path / "run", f"model_name_or_path={tmp_path / 'none'}")
    assert_wrong(outcome, f'"{tmp_path / "none"}" is no file or directory here')
    outcome = site.train(tmp_path / "run", "model_name_or_path=nobody/nothing")
    assert outcome.status == FAILED
    assert '"nobody/nothing" cannot be fetched from the hub' in outcome.message


# Settings


def test_config_that_is_not_there_is_refused(site: Site, tmp_path: Path) -> None:
    outcome = site.run("train", str(tmp_path / "none.toml"))
    assert_wrong(outcome, f"{tmp_path / 'none.toml'}: cannot be read as a config: [Errno 2] No such file or directory")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('tuning.lora_target_modules=["q_porj"]', '"q_porj" is no projection of the model (did you mean q_proj?)'),
        ("train.learning_rat=1", "unknown key train.learning_rat; did you mean train.learning_rate?"),
        ("attn_implementation=flash_attention_2", 'attn_implementation: got "flash_attention_2"'),
        ("parallel.sequence=2", "parallel.sequence: got 2 for 1 process, which it does not divide"),
        ("parallel.shard=8", "parallel: got shard = 8 and replicate = 1 for 1 process"),
        ("train.optimizer=adamw-8bit", 'train.optimizer: "adamw-8bit"'),
        ('log.report_to=["trackio"]', 'log.report_to: "trackio" needs the package trackio; run pip install trackio'),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused_before_any_work(
    override: str, words: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_step", None)  # not reached
    assert_wrong(site.train(tmp_path / "run", override), words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_processes_that_nobody_has_brought_together_are_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_wrong(site.train(tmp_path / "run"), "WORLD_SIZE is 2", "start them by torchrun")


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_output_directory_that_cannot_be_written_is_refused(command: str, site: Site, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a regular file")
    for output_dir in (file, file / "run", Path("/proc/run")):
        outcome = site.run(command, str(TINY_CONFIG), *site.overrides(output_dir))
        assert_wrong(outcome, f"output_dir: {output_dir} cannot be written: ", "name a directory that can")
    assert file.read_text() == "a regular file"


def test_cache_that_cannot_be_written_is_refused(site: Site, tmp_path: Path) -> None:
    own = Site(tmp_path)
    shutil.copytree(site.model_dir, own.model_dir)
    write_jsonl(own.data_path, GOOD)
    (tmp_path / "cache").write_text("a regular file")
    assert_wrong(own.train(tmp_path / "run"), "the prepared samples cannot be kept there", "set XDG_CACHE_HOME")


# Numbers that are none


def test_record_whose_loss_is_not_finite_stops_the_run_before_the_weights_change(site: Site, tmp_path: Path) -> None:
    """The embedding of one character, which stands in one record alone, is poisoned."""
    model_dir = tiny_chat_model(tmp_path / "model")
    tensors = load_file(model_dir / "model.safetensors")
    for token in tokens_of(model_dir, "~"):
        tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    records = [demonstration(6) for _ in range(11)] + [demonstration(0, "<think>~</think> 0")]
    more = [f"model_name_or_path={model_dir}", "train.max_steps=3", "data.eval_fraction=0.0", "checkpoint.save_steps=1"]
    outcome = train_on(site, tmp_path, records, *more)
    assert outcome.status == FAILED, outcome.err
    step = len(metrics_of(tmp_path / "run")) + 1
    assert outcome.message.startswith(f"step {step}: the loss is nan and the gradient norm is nan; the weights were not changed. ")
    assert f"Records with a non-finite loss: {tmp_path / 'data.jsonl'}:12. " in outcome.message
    assert step > 1, "the record came first: choose another seed"
    assert checkpoints_of(tmp_path / "run")[-1] == f"step-{step - 1:06d}"
    assert train_on(site, tmp_path, records, *more).message == outcome.message


def tokens_of(model_dir: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)(text, add_special_tokens=False)["input_ids"]


def test_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[bool] = []
    sources: list[str] = []

    def poisoned(run: train.Run, state: train.TrainState) -> train.StepReport:
        if state.step != 2:
            return real_step(run, state)
        parameters = list(run.model.trained_parameters().values())
        parameters[0].register_hook(lambda gradient: gradient * float("nan"))
        before = [parameter.detach().clone() for parameter in parameters]
        sources.extend(source for batch in run.feed.step_batches(2) for source in batch.sources_S)
        try:
            return real_step(run, state)
        finally:
            changed.append(any(not torch.equal(*pair) for pair in zip(before, parameters, strict=True)))

    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", poisoned)
    outcome = site.train(tmp_path / "run")
    assert outcome.status == FAILED
    assert re.match(r"step 3: the loss is \d\.\d+ and the gradient norm is nan; the weights were not changed\.", outcome.message)
    assert f"Records of this step: {', '.join(sources)}. " in outcome.message
    assert "lower train.learning_rate; the same command resumes from the last checkpoint" in outcome.message
    assert changed == [False]
    assert len(metrics_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_model_with_poisoned_weights_is_found_before_the_first_step(value: float, site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}")
    assert outcome.status == FAILED
    assert outcome.message.startswith(f"before step 1, on {site.data_path}:")
    assert "is missing or not finite; look at these records and at the base model" in outcome.message
    assert "checkpoints" not in {path.name for path in (tmp_path / "run").iterdir()}


def test_adapter_that_would_never_learn_is_found_before_the_first_step(site: Site, tmp_path: Path) -> None:
    model_dir = own_model(site, tmp_path)
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()  # so that nothing comes back to gate_proj and up_proj
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    outcome = site.train(tmp_path / "run", f"model_name_or_path={model_dir}", 'tuning.lora_target_modules=["gate_proj", "q_proj"]')
    assert outcome.status == FAILED
    expected = "the gradient of model.layers.0.mlp.gate_proj.lora_B is zero everywhere, so this adapter would never learn"
    assert outcome.message.endswith(expected)


def test_refused_run_leaves_no_half_written_files(site: Site, tmp_path: Path) -> None:
    assert train_on(site, tmp_path, ["{"]).status == WRONG
    assert set(files_of(tmp_path / "run")) == {".lock", "data/rejected.jsonl"}
