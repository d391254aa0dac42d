"""From config to prepared data: what stops a run, what is written, what is held out, what is warned of."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from structcot.config import Config
from structcot.config_file import parse_config
from structcot.data.proof import prove
from structcot.data.records import Record, read_records
from structcot.data.render import KINDS
from structcot.data.samples import PreparedData, length_histogram, prepare_samples, write_data_files
from structcot.errors import DataError, ModelError
from tests import chat_tokenizers as chat
from tests.chat_tokenizers import qwen_tokenizer, tiny_tokenizer

TINY = tiny_tokenizer()
GOOD = {"prompt": "Q", "completion": "<think>Hm é🙂.</think> A"}


class Run:
    """An output directory, a model directory with a config.json, and one data file."""

    def __init__(self, root: Path) -> None:
        self.root, self.data, self.output, self.model = root, root / "a.jsonl", root / "out", root / "model"
        TINY.save_pretrained(self.model)
        self.model_config(vocab_size=len(TINY), max_position_embeddings=64)

    def model_config(self, **values: int) -> None:
        (self.model / "config.json").write_text(json.dumps(values))

    def write(self, *rows: object, name: str = "a.jsonl") -> str:
        (self.root / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(self.root / name)

    def config(self, seed: int = 0, **data: object) -> Config:
        values = {"model_name_or_path": "m", "output_dir": str(self.output), "seed": seed, "data": {"train": [str(self.data)], **data}}
        return parse_config(values, "test")

    def prepare(self, tokenizer=TINY, **options) -> PreparedData:
        return prepare_samples(self.config(**options), tokenizer, self.model, lambda: False, self.root / "cache")

    def rejected(self) -> list[dict]:
        return [json.loads(line) for line in (self.output / "data/rejected.jsonl").read_text().splitlines()]

    def proof(self, tokenizer=TINY, **options) -> dict:
        config = self.config(**options)
        write_data_files(self.output, self.prepare(tokenizer, **options), tokenizer, config)
        return json.loads((self.output / "data/proof.json").read_text())


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


# What stops a run


def test_all_bad_records_are_listed_before_training(run):
    long = {"prompt": "Q", "completion": "A" * 500}
    train, held_out = run.write(GOOD, {"prompt": "Q"}, "{broken", long), run.write({"text": 1}, GOOD, name="eval.jsonl")
    with pytest.raises(DataError) as caught:
        run.prepare(eval=[held_out], max_length=100)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"{train}:2", f"{train}:3", f"{train}:4", f"{held_out}:1"]
    assert "tokens, data.max_length is 100" in lines[2]
    assert lines[-1] == '4 records cannot be trained on; mend or remove them, or set data.on_bad_record = "skip"'
    listed = run.rejected()
    assert [set(entry) for entry in listed] == [{"source", "reason", "tokens"}] * 4
    assert [entry["source"] for entry in listed] == [line.split(": ")[0] for line in lines[:-1]]
    assert [entry["tokens"] is not None for entry in listed] == [False, False, True, False]


def test_long_list_is_cut_and_kept_whole_in_the_file(run):
    run.write(*[{"prompt": "Q"}] * 120)
    with pytest.raises(DataError) as caught:
        run.prepare()
    lines = str(caught.value).splitlines()
    assert lines[49].startswith(f"{run.data}:50: ")
    assert lines[50] == f"... and 70 more (all in {run.output}/data/rejected.jsonl)"
    assert len(lines) == 52
    assert len(run.rejected()) == 120


def test_skip_goes_on(run):
    run.write(GOOD, {"prompt": "Q"}, GOOD)
    prepared = run.prepare(on_bad_record="skip")
    assert prepared.summary() | {"tokens": 0, "supervised_tokens": 0} == {
        "samples": 2,
        "tokens": 0,
        "supervised_tokens": 0,
        "eval_samples": 0,
        "dropped": 0,
        "bad": 1,
        "truncated": 0,
        "merged_start": 0,
        "duplicates": 1,
    }
    assert [rejected.source for rejected in prepared.rejected] == [f"{run.data}:2"]


def test_dropped_records_never_stop_a_run(run):
    run.write(GOOD, {"prompt": "Q", "completion": "A" * 500})
    config = run.config(max_length=100, overlong="drop")
    write_data_files(run.output, prepared := run.prepare(max_length=100, overlong="drop"), TINY, config)
    assert (prepared.summary()["samples"], prepared.summary()["dropped"]) == (1, 1)
    assert [entry["source"] for entry in run.rejected()] == [f"{run.data}:2"]


def test_nothing_left(run):
    run.write({"prompt": "Q", "completion": "A" * 500})
    with pytest.raises(DataError, match=r"data.train: no sample is left of 1 records; first reason: .*a.jsonl:1: \d+ tokens"):
        run.prepare(max_length=100, overlong="drop")
    assert len(run.rejected()) == 1
    run.write(GOOD)
    with pytest.raises(DataError, match=r"data\.eval: no sample is left"):
        run.prepare(eval=[run.write({}, name="eval.jsonl")], on_bad_record="skip")


def test_vocabulary_that_does_not_fit(run):
    run.write(GOOD)
    run.model_config(vocab_size=10)
    with pytest.raises(ModelError, match=r"the tokenizer gives token \d+, but the model has only 10 tokens"):
        run.prepare()
    (run.model / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        run.prepare()


# What is held out


def test_held_out_files(run):
    run.write(GOOD, GOOD)
    prepared = run.prepare(eval=[run.write(GOOD, name="eval.jsonl")])
    assert prepared.eval is not None
    assert prepared.eval is not prepared.train
    assert (prepared.train_indices.tolist(), prepared.eval_indices.tolist()) == ([0, 1], [0])


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (40, 0.25, 10), (3, 0.5, 2)])
def test_held_out_fraction(run, count, fraction, held_out):
    run.write(*({"prompt": f"{number}?", "completion": "A"} for number in range(count)))
    first, again, other = (run.prepare(eval_fraction=fraction, seed=seed) for seed in (0, 0, 1))
    assert first.eval is first.train
    assert len(first.eval_indices) == held_out
    assert sorted([*first.train_indices, *first.eval_indices]) == list(range(count))
    assert first.eval_indices.tolist() == again.eval_indices.tolist()
    assert count < 40 or first.eval_indices.tolist() != other.eval_indices.tolist()
    assert first.summary()["tokens"] == first.train.lengths_S[first.train_indices].sum()


def test_nothing_can_be_held_out_of_one_sample(run):
    run.write(GOOD)
    with pytest.raises(DataError, match=r"data.eval_fraction: got 0.5, but there is only 1 sample"):
        run.prepare(eval_fraction=0.5)


# What is warned of


def test_no_warning_without_reason(run):
    run.write(GOOD)
    assert run.prepare().warnings == ()


def test_warnings(run):
    run.write({"prompt": "Q", "completion": "A" * 200}, {"prompt": "Q", "completion": "\n\nA"}, GOOD, GOOD)
    longest, merged, duplicates = run.prepare().warnings
    assert "tokens, the model's max_position_embeddings is 64" in longest
    assert merged.startswith("in 1 samples the assistant's first token also holds the end of the role header")
    assert duplicates == "1 samples have the same tokens as another sample"
    run.write(GOOD, {"messages": [{"role": "system", "content": "S"}, *({"role": r, "content": "x"} for r in ("user", "assistant"))]})
    (system,) = run.prepare(tiny_tokenizer(chat.CHATML_DEFAULT_SYSTEM)).warnings
    assert '1 samples have no system message and the chat template writes its own into them: "You are a small model."' in system
    (differs,) = run.prepare(tiny_tokenizer(chat.OPENS_THOUGHT)).warnings
    assert differs.startswith("in 2 samples the assistant does not start with the thought that the generation prompt")
    (dated,) = run.prepare(tiny_tokenizer(chat.CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}")).warnings
    assert "today's date" in dated


# What is written


def joined(proof: dict) -> str:
    return "".join(piece["text"] for piece in proof["pieces"])


def test_proof(run):
    for tokenizer in (TINY, qwen_tokenizer()):
        run.model_config()
        run.write({"prompt": "Q", "completion": "A"}, GOOD, {"prompt": "Q", "completion": "A" * 100})
        proof = run.proof(tokenizer)
        assert proof["source"] == f"{run.data}:2", "the sample of median length"
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": GOOD["completion"]}]
        assert joined(proof) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert [piece["id"] for piece in proof["pieces"]] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        parts = {what: "".join(piece["text"] for piece in proof["pieces"] if piece["trained"] == what) for what in KINDS[1:4]}
        assert parts == {"thought": "<think>Hm é🙂.</think>", "solution": " A", "end": "<|im_end|>"}
        assert {piece["trained"] for piece in proof["pieces"]} == {"no", *parts}
        assert (proof["tokens"], proof["supervised_tokens"]) == (
            len(proof["pieces"]),
            sum(piece["trained"] != "no" for piece in proof["pieces"]),
        )
    pieces = run.proof()["pieces"]
    bytes_of_smile = TINY("🙂", add_special_tokens=False)["input_ids"]
    place = next(index for index, piece in enumerate(pieces) if piece["text"] == "🙂")
    assert [piece["id"] for piece in pieces[place : place + 4]] == bytes_of_smile
    assert [piece["text"] for piece in pieces[place : place + 4]] == ["🙂", "", "", ""], "the first token of a character shows it"
    assert run.proof(train_on="all")["pieces"][1]["trained"] == "prompt"
    assert sorted(path.name for path in (run.output / "data").iterdir()) == ["proof.json", "rejected.jsonl"]


def test_proof_of_a_truncated_sample(run):
    run.write({"prompt": "Q", "completion": "<think>" + "é🙂" * 50})
    proof = run.proof(max_length=40, overlong="truncate")
    assert len(proof["pieces"]) == 40
    assert proof["pieces"][-1] == {"id": TINY.convert_tokens_to_ids("<|im_end|>"), "text": "<|im_end|>", "trained": "end"}
    text = joined(proof)
    assert text.endswith("<|im_end|>")
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>" + "é🙂" * 50}]
    assert TINY.apply_chat_template(messages, tokenize=False).startswith(text.removesuffix("<|im_end|>"))


def test_proof_of_control_tokens_as_text(run):
    run.write({"prompt": "Q", "completion": "After <|im_end|> comes nothing"})
    proof = run.proof(control_tokens="text")
    assert joined(proof).endswith("assistant\nAfter <|im_end|> comes nothing<|im_end|>\n")
    assert [piece["text"] for piece in proof["pieces"] if piece["trained"] == "end"] == ["<|im_end|>"]


def test_proof_is_of_the_training_data(run):
    run.write(*({"prompt": "Q", "completion": "A" * number} for number in range(1, 9)))
    prepared = run.prepare(eval_fraction=0.5)
    proof = run.proof(eval_fraction=0.5)
    assert proof["source"] in [prepared.train.sources_S[index] for index in prepared.train_indices]
    assert proof["tokens"] == np.sort(prepared.lengths_S)[(len(prepared.lengths_S) - 1) // 2]


def test_proof_that_does_not_hold(run):
    run.write(GOOD)
    config = run.config()
    sample = run.prepare().train.sample(0)
    (record,) = read_records(config.data.train[0], "auto", "")
    assert isinstance(record, Record)
    tokens_T, labels_T = sample.tokens_T.copy(), sample.labels_T.copy()
    tokens_T[5] += 1
    with pytest.raises(DataError, match=r"a.jsonl:1: token 5 is not what the tokenizer's apply_chat_template gives"):
        prove(replace(sample, tokens_T=tokens_T), record, TINY, config.data)
    short = replace(sample, tokens_T=sample.tokens_T[:-1], labels_T=sample.labels_T[:-1], kinds_T=sample.kinds_T[:-1])
    with pytest.raises(DataError, match=rf"token {len(tokens_T) - 1} is not"):
        prove(short, record, TINY, config.data)
    labels_T[-4] += 1
    with pytest.raises(DataError, match=rf"the label at token {len(labels_T) - 4} is not the next token"):
        prove(replace(sample, labels_T=labels_T), record, TINY, config.data)


def test_data_that_changes_meanwhile(run):
    run.write(GOOD)
    prepared = run.prepare()
    run.write("{broken")
    with pytest.raises(DataError, match=r"a.jsonl:1: is no longer there; did the data change meanwhile"):
        write_data_files(run.output, prepared, TINY, run.config())


@pytest.mark.parametrize("lengths", [[], [1], [5, 5, 6], list(range(1, 3000, 7)), [16384]])
def test_length_histogram_counts_every_sample(lengths):
    histogram = length_histogram(np.array(lengths, dtype=np.int64))
    edges, samples = histogram["edges_tokens"], histogram["samples"]
    assert len(edges) == len(samples) + 1 <= 26
    assert sum(samples) == len(lengths)
    for low, high, count in zip(edges, edges[1:], samples, strict=False):
        assert count == sum(low <= length < high for length in lengths)
    assert all(isinstance(number, int) for number in edges + samples)


@pytest.mark.slow
def test_twenty_thousand_records_take_less_than_a_minute(run):
    traces = chat.SHARED / "traces/paper_outputs.jsonl"
    if not traces.exists():
        pytest.skip("real traces are not at hand (../shared/data/traces)")
    text = "\n\n".join(json.loads(line)["response"] for line in traces.open())
    places = [(number * 263) % (len(text) - 2000) for number in range(20_000)]
    run.write(*({"prompt": f"Question {number}?", "completion": text[place : place + 2000]} for number, place in enumerate(places)))
    run.model_config()
    start = time.perf_counter()
    run.proof(qwen_tokenizer())
    assert time.perf_counter() - start < 60


def test_giant_line_is_neither_slow_nor_lost(run):
    run.write({"prompt": "Q", "completion": "giant " * 1_700_000}, GOOD)
    start = time.perf_counter()
    prepared = run.prepare(overlong="drop")
    assert time.perf_counter() - start < 20
    assert prepared.summary()["dropped"] == prepared.summary()["samples"] == 1
    assert prepared.rejected[0].reason.startswith("more than ")
