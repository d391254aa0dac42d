"""The embedded engine against `generate` of transformers, and its rows against themselves in other company."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, MistralConfig

from structcot.errors import ConfigError, FetchError, ModelError
from structcot.eval.batching import Batcher
from structcot.eval.decoding import Endings, choose_tokens, kept_probabilities, random_numbers
from structcot.eval.embedded import load_model, merge_adapter, open_embedded
from structcot.eval.engine import Output, Request, Sampling
from structcot.eval.slots import SlotCache
from structcot.fetch import resolve_model
from tests.chat_tokenizers import MISTRAL, tiny_tokenizer
from tests.tiny_models import MODELS, SIZES, randomise, tiny_chat_model, tiny_checkpoint

WORDS = [
    "So",
    "wait,",
    "the",
    "answer",
    "is",
    "42",
    "but",
    "let",
    "me",
    "check",
    "that",
    "again:",
    "é",
    "中文",
    "two",
    "",
    "spaces\n\nuser",
]
GREEDY = Sampling(max_new_tokens=24)
BF16_TIE = 0.3
"""Logits of SmolLM2 reach 30, where neighbours in bf16 lie 0.125 apart; two orders of summation move each by at most one of those."""


def save_tiny(directory: Path, kind: str = "qwen2", **changes: Any) -> Path:
    """A tiny model and the tokenizer of `tests.chat_tokenizers`, without any end of sequence unless `changes` say so."""
    tiny_checkpoint(directory, kind, vocab_size=384, **changes)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(directory))
    return directory


def opened(directory: Path, batch_size: int = 1, adapter: str = "", dtype: str = "float32") -> Callable[..., dict[str, Output]]:
    """The engine as a function to outputs by key."""
    engine = open_embedded(str(directory), revision="main", adapter=adapter, dtype=dtype, batch_size=batch_size)

    def answer(requests: Sequence[Request], sampling: Sampling = GREEDY) -> dict[str, Output]:
        outputs = list(engine(requests, sampling))
        assert sorted(output.key for output in outputs) == sorted(request.key for request in requests), "each request once"
        return {output.key: output for output in outputs}

    return answer


def plain(*prompts: str) -> list[Request]:
    return [Request(key=str(number), prompt=prompt) for number, prompt in enumerate(prompts)]


def prompts_of(*lengths: int, seed: int = 0) -> list[Request]:
    draw = random.Random(seed)
    return plain(*(" ".join(draw.choice(WORDS) for _ in range(length)) for length in lengths))


def theirs(directory: Path, prompt: str, max_new_tokens: int = 24, **arguments: Any) -> tuple[list[int], str]:
    """New tokens and text of transformers' greedy `generate`."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(directory)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    ids = tokenizer(prompt, return_tensors="pt")
    arguments = {"pad_token_id": 0, **arguments}
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **arguments,
        )
    tokens = out[0, ids["input_ids"].shape[1] :].tolist()
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends its turn by itself: no token of it is known to end one."""
    directory = save_tiny(tmp_path_factory.mktemp("endless"))
    (directory / "chat_template.jinja").unlink()
    return directory


@pytest.fixture(scope="module")
def alone(endless: Path) -> Callable[..., dict[str, Output]]:
    return opened(endless)


@pytest.fixture(scope="module")
def eight(endless: Path) -> Callable[..., dict[str, Output]]:
    return opened(endless, batch_size=8)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_outputs_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, kind)
    requests = prompts_of(1, 7, 40, 3, 90, 12, 2)
    single, batched = opened(directory)(requests), opened(directory, batch_size=4)(requests)
    ends = AutoTokenizer.from_pretrained(str(directory)).convert_tokens_to_ids("<|im_end|>")
    for request in requests:
        tokens, text = theirs(directory, request.prompt, eos_token_id=ends)
        for output in (single[request.key], batched[request.key]):
            assert (output.text, output.completion_tokens) == (text, len(tokens))
            assert output.finish_reason == ("stop" if tokens[-1] == ends else "length")
            assert output.prompt_tokens == len(AutoTokenizer.from_pretrained(str(directory))(request.prompt)["input_ids"])


@pytest.mark.parametrize(
    ("config_class", "values"),
    [
        (MistralConfig, {"sliding_window": 9}),
        (Gemma3TextConfig, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}),
    ],
    ids=["every-layer", "every-other-layer"],
)
def test_sliding_windows_are_kept_in_a_batch(config_class: Any, values: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, "vocab_size": 384, **values}), dtype=torch.float32)
    randomise(model, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(str(tmp_path))
    requests = prompts_of(1, 20, 2, 9, 4)
    for batch_size in (1, 5):
        outputs = opened(tmp_path, batch_size)(requests)
        for request in requests:
            assert outputs[request.key].text == theirs(tmp_path, request.prompt, eos_token_id=tokenizer.eos_token_id)[1]


def test_a_model_with_other_layers_is_refused(tmp_path: Path) -> None:
    from structcot.eval.embedded import _need_known_layers

    with pytest.raises(ModelError, match="linear_attention"):
        _need_known_layers(SimpleNamespace(layer_types=["full_attention", "linear_attention"]), tmp_path)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 120), min_size=2, max_size=11), limit=st.integers(1, 16), seed=st.integers(0, 3))
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_output_is_the_same_alone_and_in_any_batch(alone, eight, temperature: float, lengths: list[int], limit: int, seed: int) -> None:
    requests = prompts_of(*lengths, seed=seed)
    sampling = Sampling(max_new_tokens=limit, temperature=temperature, top_p=0.95, top_k=50)
    wanted, backwards = alone(requests, sampling), eight(requests[::-1], sampling)
    for request in requests:
        assert texts_of(backwards[request.key]) == texts_of(wanted[request.key])


def texts_of(output: Output) -> tuple[object, ...]:
    return output.text, output.finish_reason, output.prompt_tokens, output.completion_tokens


def test_sampled_outputs_depend_on_seed_and_key_and_on_nothing_else(eight) -> None:
    sampling = Sampling(max_new_tokens=16, temperature=1.0)
    requests = [Request(key=key, prompt="So wait", seed=seed) for key, seed in (("a", 0), ("b", 0))]
    first, again = eight(requests, sampling), eight(requests, sampling)
    assert first["a"].text == again["a"].text
    assert first["b"].text == again["b"].text
    other_seed = eight([Request(key="a", prompt="So wait", seed=1)], sampling)
    assert len({first["a"].text, first["b"].text, other_seed["a"].text}) == 3


@settings(max_examples=200)
@given(data=st.data())
def test_what_is_kept_is_what_a_plain_reference_keeps(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=40))
    temperature = data.draw(st.floats(0.1, 2.0))
    top_k, top_p = data.draw(st.integers(0, 45)), data.draw(st.floats(0.05, 1.0))
    kept_V = kept_probabilities(torch.tensor([values]), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))[0]
    wanted, doubtful = reference_kept(values, temperature, top_k, top_p)
    got = {index for index, probability in enumerate(kept_V.tolist()) if probability > 0.0}
    assert got - doubtful == wanted - doubtful
    assert got
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    for index in got:
        assert kept_V[index].item() / kept_V.sum().item() == pytest.approx(weights[index] / sum(weights[i] for i in got), rel=1e-4)


def reference_kept(values: list[float], temperature: float, top_k: int, top_p: float) -> tuple[set[int], set[int]]:
    """The indices kept, one by one from the likeliest down; and those on the edge, where a rounding decides."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    if top_k:
        order = [index for index in order if values[index] >= values[order[min(top_k, len(order)) - 1]]]
    weights = {index: math.exp((values[index] - max(values)) / temperature) for index in order}
    total, before = sum(weights.values()), 0.0
    kept: set[int] = set()
    doubtful: set[int] = set()
    last = math.inf
    for index in order:
        share = weights[index] / total
        if abs(before - top_p) < 1e-5 or share < 1e-30:
            doubtful.add(index)
        if before < top_p or top_p == 1.0 or values[index] == last:
            kept.add(index)
            last = values[index]
        before += share
    doubtful |= {index for index in order if any(abs(values[index] - values[edge]) < 1e-5 for edge in doubtful)}
    return kept, doubtful


def test_a_nucleus_wider_than_the_first_candidates_is_found() -> None:
    logits_BV = torch.zeros(2, 5000)
    logits_BV[1, 7] = 30.0
    kept_BV = kept_probabilities(logits_BV + torch.linspace(0, 1e-3, 5000), Sampling(temperature=1.0, top_p=0.5))
    num_kept = (kept_BV > 0).sum(-1).tolist()
    assert 2450 <= num_kept[0] <= 2550
    assert num_kept[1] == 1


def test_draws_fall_on_tokens_in_proportion_to_their_probability() -> None:
    probabilities = [0.5, 0.0, 0.25, 0.125, 0.125]
    logits_BV = torch.tensor([[math.log(value) if value else -math.inf for value in probabilities]] * 1000)
    tokens = choose_tokens(logits_BV, Sampling(temperature=1.0), [number / 1000 for number in range(1000)])
    assert [tokens.count(token) for token in range(5)] == pytest.approx([500, 0, 250, 125, 125], abs=1)
    assert tokens[0] == 0
    assert tokens[-1] == 4


def test_random_numbers_of_requests_differ_and_stay_the_same() -> None:
    first = [random_numbers(seed, key).random() for seed in range(3) for key in ("a", "b", "1a")]
    assert len(set(first)) == 9
    assert random_numbers(0, "a").random() == 0.42323789123250954, "an evaluation that is repeated years later must draw the same"


def test_bf16_ties_go_to_the_first_as_in_generate() -> None:
    assert choose_tokens(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]], dtype=torch.bfloat16), GREEDY, [0.0, 0.0]) == [1, 0]


# Where an output ends.


def test_stop_strings_cut_the_text_before_them_wherever_tokens_meet(endless: Path, alone, eight) -> None:
    requests = prompts_of(5, 9, 2)
    sampling = Sampling(max_new_tokens=40)
    full = alone(requests, sampling)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(endless))
    for request in requests:
        text = full[request.key].text
        clean = [start for start in range(8, len(text) - 4) if "\ufffd" not in text[start - 1 : start + 5]]
        for start in clean[:: max(1, len(clean) // 3)]:
            string = text[start : start + 4]
            for engine in (alone, eight):
                output = engine([request], Sampling(max_new_tokens=40, stop=("never written", string)))[request.key]
                assert output.text == text[: text.index(string)]
                assert output.finish_reason == "stop"
                needed = output.completion_tokens
                assert string in tokenizer.decode(tokens_of(endless, request.prompt, 40)[:needed])
                assert string not in tokenizer.decode(tokens_of(endless, request.prompt, 40)[: needed - 1])


def tokens_of(directory: Path, prompt: str, count: int) -> list[int]:
    key = (directory, prompt, count)
    if key not in TOKENS:
        TOKENS[key] = theirs(directory, prompt, count)[0]
    return TOKENS[key]


TOKENS: dict[tuple[Path, str, int], list[int]] = {}


@settings(max_examples=150)
@given(
    text=st.text("ab\né中 \U0001f999", min_size=1, max_size=30),
    strings=st.lists(st.text("ab\né中 \U0001f999", min_size=1, max_size=6), max_size=3),
)
def test_a_stop_string_is_seen_with_the_token_that_completes_it(text: str, strings: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    endings = Endings(tokenizer=tokenizer, token_ids=frozenset(), strings=tuple(strings))
    tokens = tokenizer(text)["input_ids"]
    for count in range(1, len(tokens) + 1):
        whole = str(tokenizer.decode(tokens[:count]))
        places = [whole.find(string) for string in strings if string in whole]
        if places:
            assert endings.is_ended(tokens[:count])
            assert endings.text(tokens[:count]) == (whole[: min(places)], True)
            return
        assert not endings.is_ended(tokens[:count])
    assert endings.text(tokens) == (text, False)


def test_a_special_token_as_stop_string_ends_the_output(endless: Path, alone) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(endless))
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for request in prompts_of(*range(1, 30), seed=5):
        tokens = tokens_of(endless, request.prompt, 24)
        special = [token for token in tokens if token in special_ids]
        if special:
            (output,) = alone([request], Sampling(max_new_tokens=24, stop=(tokenizer.decode([special[0]]),))).values()
            assert output.completion_tokens == tokens.index(special[0]) + 1
            assert output.finish_reason == "stop"
            return
    pytest.fail("no output of the tiny model holds a special token")


def test_text_cut_within_a_character_has_its_sign(eight) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("é")["input_ids"]
    if len(tokens) == 1:
        tokens = tokenizer("\U0001f999")["input_ids"]
    assert Endings(tokenizer=tokenizer, token_ids=frozenset()).text(tokens[:1]) == ("\ufffd", False)


@pytest.mark.parametrize("where", ["generation_config", "generation_config_list", "tokenizer", "template"])
def test_every_end_that_a_model_knows_ends_its_outputs(where: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    eos = {"generation_config": end, "generation_config_list": [end, 3]}.get(where)
    model_dir = tiny_checkpoint(tmp_path, "qwen2", vocab_size=384, eos_token_id=eos)
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir))
    with torch.no_grad():  # a head that soon prefers the end to everything else
        model.lm_head.weight[end] = model.lm_head.weight.abs().amax(0) * torch.randn(48, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    tokenizer.eos_token = "<|im_end|>" if where == "tokenizer" else None
    if where != "template":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(str(tmp_path))
    outputs = opened(tmp_path, 3)(prompts_of(*range(1, 13)), Sampling(max_new_tokens=200))
    assert {output.finish_reason for output in outputs.values()} == {"stop"}
    assert all("<|im_end|>" not in output.text and output.completion_tokens < 200 for output in outputs.values())


def test_the_context_cuts_outputs_and_refuses_prompts_that_fill_it(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, max_position_embeddings=32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    tokens = tokenizer(" ".join(WORDS * 6))["input_ids"]
    prompts = {str(length): tokenizer.decode(tokens[:length]) for length in (20, 31, 32, 50)}
    requests = [Request(key=key, prompt=prompt) for key, prompt in prompts.items()]
    assert [len(tokenizer(request.prompt)["input_ids"]) for request in requests] == [20, 31, 32, 50]
    outputs = opened(directory, 4)([*requests, Request(key="empty")], Sampling(max_new_tokens=1000))
    assert [outputs[key].completion_tokens for key in prompts] == [12, 1, 0, 0]
    assert [outputs[key].finish_reason for key in prompts] == ["length", "length", "refused", "refused"]
    assert outputs["50"].reason == "the prompt has 50 tokens, the model's context 32"
    assert outputs["32"].prompt_tokens == 32
    assert (outputs["empty"].finish_reason, outputs["empty"].reason) == ("refused", "the prompt has no tokens")


def test_outputs_come_as_they_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny(tmp_path, max_position_embeddings=64)
    (directory / "chat_template.jinja").unlink()
    engine = open_embedded(str(directory), revision="main", adapter="", dtype="float32", batch_size=3)
    sizes: list[int] = []
    step = Batcher.step
    monkeypatch.setattr(Batcher, "step", lambda self, rows, cache: (sizes.append(len(rows)), step(self, rows, cache))[1])
    requests = [*prompts_of(3, 12, 6), Request(key="late", prompt="So")]
    stream = engine(requests, Sampling(max_new_tokens=500))
    first = next(stream)
    assert first.key == "1", "the longest prompt is the first at the end of the context"
    assert sizes == [3] * (first.completion_tokens - 1)
    outputs = [first, *stream]
    assert [output.prompt_tokens for output in outputs] == sorted((output.prompt_tokens for output in outputs), reverse=True)
    assert [output.prompt_tokens + output.completion_tokens for output in outputs] == [64] * 4
    assert sizes == sorted(sizes, reverse=True), "the late request takes the free slot before another step is made"
    assert all(0.0 < output.seconds < 60.0 for output in outputs)


def test_nothing_is_asked_of_no_requests(alone) -> None:
    assert alone([]) == {}


def test_inference_mode_does_not_leak_into_the_caller(alone) -> None:
    engine = alone
    engine(plain("So"), Sampling(max_new_tokens=2))
    assert not torch.is_inference_mode_enabled()
    assert torch.zeros(1, requires_grad=True).requires_grad


# Messages, adapters, and what cannot be used.


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    directory = tiny_chat_model(tmp_path)
    answer = opened(directory, 2)
    messages = (("system", "Be brief."), ("user", "What is 2 + 2?"))
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    outputs = answer([Request(key="chat", messages=messages), Request(key="plain", prompt=text)])
    assert outputs["chat"].text == outputs["plain"].text
    assert outputs["chat"].prompt_tokens == outputs["plain"].prompt_tokens


def test_a_missing_or_refusing_template_is_the_users_to_mend(tmp_path: Path) -> None:
    request = Request(key="a", messages=(("system", "Be brief."), ("user", "What?")))
    without = tiny_chat_model(tmp_path / "without")
    for name in ("chat_template.jinja",):
        (without / name).unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        opened(without)([request])
    refusing = tiny_chat_model(tmp_path / "refusing", template=MISTRAL)
    with pytest.raises(ConfigError, match=r"refuses the messages of a, with roles system, user: only user and assistant"):
        opened(refusing)([request])


def test_an_adapter_is_merged_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    directory = save_tiny(tmp_path / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.bfloat16)
    base.save_pretrained(str(directory))
    base = base.float()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "adapter"))
    exact = model.merge_and_unload()
    merged = merge_adapter(load_model(directory, torch.bfloat16, torch.device("cpu")), tmp_path / "adapter")
    for (name, got), wanted in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(got, wanted.bfloat16()), name
    exact.save_pretrained(str(tmp_path / "exact"))
    AutoTokenizer.from_pretrained(str(directory)).save_pretrained(str(tmp_path / "exact"))
    (request,) = prompts_of(4)
    texts = [
        opened(path, adapter=adapter)([request])["0"].text
        for path, adapter in ((directory, str(tmp_path / "adapter")), (tmp_path / "exact", ""), (directory, ""))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_cannot_be_used_is_said_in_words(endless: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='dtype: got "float16"'):
        open_embedded(str(endless), revision="main", adapter="", dtype="float16", batch_size=1)
    with pytest.raises(ConfigError, match="batch_size: got 0"):
        open_embedded(str(endless), revision="main", adapter="", dtype="float32", batch_size=0)
    with pytest.raises(ModelError, match=r"no config\.json|config\.json"):
        open_embedded(str(tmp_path), revision="main", adapter="", dtype="float32", batch_size=1)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        open_embedded(str(endless), revision="main", adapter=str(tmp_path), dtype="float32", batch_size=1)


# The cache.


@settings(max_examples=60)
@given(data=st.data())
def test_slots_hold_what_rows_were_given(data: st.DataObject) -> None:
    cache = SlotCache(num_slots=3, max_columns=1000)
    rows: list[list[float]] = []
    value = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["put", "step", "drop"]))
        if action == "put" and len(rows) < 3:
            lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=3 - len(rows)))
            new = [[value + 1000 * row + column for column in range(length)] for row, length in enumerate(lengths)]
            value += 10_000
            padded = torch.tensor([row + [-1.0] * (max(lengths) - len(row)) for row in new])[:, None, :, None]
            cache.put(len(rows), lengths, [(padded, -padded), (padded, -padded)])
            rows += new
        elif action == "step" and rows:
            lengths = [len(row) for row in rows]
            cache.expect(torch.tensor(lengths), lengths)
            token = torch.tensor([value + row for row in range(len(rows))])[:, None, None, None]
            value += 10_000
            for layer in (0, 1):
                keys, values = cache.update(token, -token, layer)
                assert keys.shape == values.shape == (len(rows), 1, max(lengths) + 1, 1)
            rows = [[*row, token[index].item()] for index, row in enumerate(rows)]
            for index, row in enumerate(rows):
                assert keys[index, 0, : len(row), 0].tolist() == row
                assert values[index, 0, : len(row), 0].tolist() == [-number for number in row]
            assert torch.isfinite(keys).all()
        elif action == "drop" and rows:
            slot = data.draw(st.integers(0, len(rows) - 1))
            last = rows.pop()
            if slot < len(rows):
                cache.move(len(rows), slot, len(last))
                rows[slot] = last


# The embedded model.


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_in_bf16_differs_from_generate_only_at_ties() -> None:
    try:
        directory = resolve_model("smollm2-135m", "main")
    except FetchError as error:
        pytest.skip(f"SmolLM2-135M cannot be had: {error}")
    model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.bfloat16).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    questions = ["What is the capital of France?", "Hi", "Explain gravity. " * 20, "Write a story about a dragon who bakes bread."]
    requests = [Request(key=str(n), messages=(("user", question),)) for n, question in enumerate(questions)]
    single = opened(directory, 1, dtype="bfloat16")(requests, Sampling(max_new_tokens=60))
    batched = opened(directory, 3, dtype="bfloat16")(requests, Sampling(max_new_tokens=60))
    for request in requests:
        turns = [{"role": role, "content": content} for role, content in request.messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=60, do_sample=False)
        prompt, tokens = ids["input_ids"][0].tolist(), out[0, ids["input_ids"].shape[1] :].tolist()
        assert single[request.key].text == tokenizer.decode(tokens, skip_special_tokens=True)
        check_ties(model, prompt, tokens, tokenizer, batched[request.key])


def check_ties(model: Any, prompt: list[int], tokens: list[int], tokenizer: Any, output: Output) -> None:
    """Where the output leaves the other, the two likeliest tokens there must be as good as equal."""
    if output.text == tokenizer.decode(tokens, skip_special_tokens=True):
        return
    shared = next(n for n in range(len(tokens) + 1) if not output.text.startswith(tokenizer.decode(tokens[:n], skip_special_tokens=True)))
    with torch.inference_mode():
        best = model(torch.tensor([prompt + tokens[: shared - 1]])).logits[0, -1].float().topk(2).values
    assert best[0] - best[1] <= BF16_TIE, f"at token {shared - 1}"
