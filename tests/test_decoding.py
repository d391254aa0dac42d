"""Decoding with the live weights gives the tokens of transformers' greedy `generate` on the merged model: alone, in batches, on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from structcot.config import Config
from structcot.data.batch import pack
from structcot.distributed import World, joined
from structcot.model.decoder import Decoder
from structcot.model.decoding import MIN_NEW_COLUMNS, Decoded, decode
from structcot.model.lora import adapters_of
from structcot.model.shard import groups_of
from structcot.model.weights import build_model
from tests.one_step import loss_and_gradients
from tests.ranks import CPU, fill_adapters, on_ranks
from tests.tiny_models import MODELS, random_samples, randomise_adapters, tiny_checkpoint, tiny_config

NUM_NEW = 24
PROMPTS = tuple(tuple(sample.tokens_T.tolist()) for sample in random_samples((7, 19, 1, 12, 19)))
NEVER: tuple[int, ...] = ()
TUNINGS = {
    "all-linear": {},
    "q-and-down-rslora": {"lora_target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_checkpoint(root / kind, kind) for kind in MODELS}


def live_model(model_dir: Path, config: Config) -> Decoder:
    model = build_model(model_dir, config, CPU)
    randomise_adapters(model)
    return model.eval()


def merged_model(model_dir: Path, model: Decoder) -> Any:
    """The same weights in plain transformers, adapters added to the matrices by hand."""
    theirs = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, pair in adapters_of(model):
            theirs.get_parameter(f"{name}.weight").add_(pair.scale * pair.lora_B @ pair.lora_A)
    return theirs


def their_tokens(theirs: Any, prompts: Sequence[Sequence[int]], end_ids: Sequence[int], num_new: int = NUM_NEW) -> list[tuple[int, ...]]:
    """What `generate` gives for prompts padded on the left, each up to its first end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, eos_token_id=list(end_ids) or None, pad_token_id=0
    )[:, width:].tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in end_ids), num_new) for row in rows]
    return [tuple(row[:end]) for row, end in zip(rows, ends, strict=True)]


def an_end(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Two tokens of which some of the rows have one somewhere in the middle, so that they end at different times."""
    return rows[0][5], rows[1][NUM_NEW // 2]


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_those_of_generate_alone_and_in_a_batch(kind: str, tuning: str, model_dirs: dict[str, Path]) -> None:
    model = live_model(model_dirs[kind], tiny_config(model_dirs[kind], tuning=TUNINGS[tuning]))
    theirs = merged_model(model_dirs[kind], model)
    endless = their_tokens(theirs, PROMPTS, NEVER)
    for end_ids in (NEVER, an_end(endless)):
        wanted = their_tokens(theirs, PROMPTS, end_ids)
        together = decode(model, PROMPTS, CPU, end_ids=end_ids, max_new_tokens=NUM_NEW)
        alone = [decode(model, [prompt], CPU, end_ids=end_ids, max_new_tokens=NUM_NEW)[0] for prompt in PROMPTS]
        assert [row.tokens for row in together] == wanted
        assert [row.tokens for row in alone] == wanted
        assert [row.ended for row in together] == [tokens[-1] in end_ids for tokens in wanted]
    assert len({len(tokens) for tokens in wanted}) > 1, "rows should end at different times"


def test_adapters_change_what_is_said(model_dirs: dict[str, Path]) -> None:
    config = tiny_config(model_dirs["qwen2"])
    model, base = live_model(model_dirs["qwen2"], config), build_model(model_dirs["qwen2"], config, CPU)
    said, by_base = (decode(one, PROMPTS, CPU, end_ids=NEVER, max_new_tokens=NUM_NEW) for one in (model, base))
    assert all(row.tokens != other.tokens for row, other in zip(said, by_base, strict=True))


def test_end_probability_is_that_of_the_place_where_the_last_token_was_chosen(model_dirs: dict[str, Path]) -> None:
    model = live_model(model_dirs["qwen3"], tiny_config(model_dirs["qwen3"]))
    theirs = merged_model(model_dirs["qwen3"], model)
    end_ids = an_end(their_tokens(theirs, PROMPTS, NEVER))
    rows = decode(model, PROMPTS, CPU, end_ids=end_ids, max_new_tokens=NUM_NEW)
    assert {row.ended for row in rows} == {True, False}
    for prompt, row in zip(PROMPTS, rows, strict=True):
        with torch.no_grad():
            logits_V = theirs(torch.tensor([[*prompt, *row.tokens[:-1]]])).logits[0, -1]
        assert row.end_probability == pytest.approx(float(logits_V.softmax(-1)[list(end_ids)].sum()), rel=1e-3)


def test_cache_grows_beyond_its_first_size(model_dirs: dict[str, Path]) -> None:
    model = live_model(model_dirs["llama3-rope-tied"], tiny_config(model_dirs["llama3-rope-tied"]))
    num_new = MIN_NEW_COLUMNS + 70
    said = {token for row in decode(model, PROMPTS[:2], CPU, end_ids=NEVER, max_new_tokens=num_new) for token in row.tokens}
    unsaid = min(set(range(100)) - said)
    rows = decode(model, PROMPTS[:2], CPU, end_ids=[unsaid], max_new_tokens=num_new)
    assert [len(row.tokens) for row in rows] == [num_new] * 2
    for prompt, row in zip(PROMPTS, rows, strict=False):
        whole = torch.tensor([*prompt, *row.tokens])
        with torch.no_grad():
            logits_MV = model(with_tokens(pack(random_samples((len(whole),))), whole), logits=True)
        assert isinstance(logits_MV, Tensor)
        assert logits_MV.argmax(-1)[len(prompt) - 1 :].tolist() == list(row.tokens)
        assert row.end_probability == pytest.approx(float(logits_MV[-1].softmax(-1)[unsaid]), rel=1e-4)


def with_tokens(batch: Any, tokens_T: Tensor) -> Any:
    """The same layout with these tokens, every place but the last a row."""
    return replace(batch, tokens_T=tokens_T, rows_M=torch.arange(len(tokens_T) - 1))


def test_bfloat16_is_what_the_model_itself_says_in_bfloat16(model_dirs: dict[str, Path]) -> None:
    config = tiny_config(model_dirs["qwen2"], train={"dtype": "bfloat16"})
    model = live_model(model_dirs["qwen2"], config)
    rows = decode(model, PROMPTS, CPU, end_ids=NEVER, max_new_tokens=NUM_NEW)
    agree, total = 0, 0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens_T = torch.tensor([*prompt, *row.tokens])
        batch = with_tokens(pack(random_samples((len(tokens_T),))), tokens_T)
        with torch.no_grad():
            logits_MV = model(batch, logits=True)
        assert isinstance(logits_MV, Tensor)
        chosen_M, best_M = logits_MV.gather(1, tokens_T[1:, None])[:, 0], logits_MV.amax(-1)
        gaps = (best_M - chosen_M)[len(prompt) - 1 :]
        agree, total = agree + int((gaps <= 0.05 * best_M[len(prompt) - 1 :].abs()).sum()), total + len(row.tokens)
    assert agree == total, "a chosen token is the best one up to rounding"


def test_training_goes_on_as_if_nothing_was_decoded(model_dirs: dict[str, Path]) -> None:
    config = tiny_config(model_dirs["qwen2"], tuning={"lora_dropout": 0.1})
    model = live_model(model_dirs["qwen2"], config).train()
    batches = [pack(random_samples((20, 9)), CPU, dropout_keys=(3, 4))]
    before, state = loss_and_gradients(model, batches), torch.get_rng_state()
    decode(model, PROMPTS, CPU, end_ids=NEVER, max_new_tokens=NUM_NEW)
    after = loss_and_gradients(model, batches)
    assert before[0] == after[0]
    assert all(torch.equal(gradient, after[1][name]) for name, gradient in before[1].items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_asked_to_stop_it_stops_before_the_next_token(model_dirs: dict[str, Path]) -> None:
    class Stop(BaseException):
        pass

    asked: list[bool] = []

    def go_on(has_rows: bool) -> bool:
        asked.append(has_rows)
        if len(asked) == 4:
            raise Stop
        return has_rows

    model = live_model(model_dirs["qwen2"], tiny_config(model_dirs["qwen2"]))
    with pytest.raises(Stop):
        decode(model, PROMPTS, CPU, end_ids=NEVER, max_new_tokens=NUM_NEW, go_on=go_on)
    assert asked == [True] * 4


def test_no_prompts_give_nothing_and_an_empty_one_is_refused(model_dirs: dict[str, Path]) -> None:
    model = live_model(model_dirs["qwen2"], tiny_config(model_dirs["qwen2"]))
    assert decode(model, [], CPU, end_ids=NEVER, max_new_tokens=NUM_NEW) == []
    with pytest.raises(ValueError, match="a prompt is empty"):
        decode(model, [(1, 2), ()], CPU, end_ids=NEVER, max_new_tokens=NUM_NEW)


# Sharded


def decode_on_rank(model_dir: Path, config: Config, shares: Sequence[Sequence[Sequence[int]]], end_ids: Sequence[int]) -> Any:
    """This rank's share of the prompts, and whether a forward and backward after it give the same as one before."""
    with joined(config.parallel, CPU) as world:
        model = build_model(model_dir, config, CPU, world.mesh)
        fill_adapters(model)
        first = decode_share(model, shares[world.rank], end_ids, world)  # the first thing that this model does
        batches = [pack(random_samples((20, 9)), CPU)]
        before = loss_and_gradients(model, batches)
        second = decode_share(model, shares[world.rank], end_ids, world)
        after = loss_and_gradients(model, batches)
        held = [parameter.to_local().numel() < parameter.numel() for parameter in model.parameters() if world.size > 1]  # type: ignore[operator]
        same = before[0] == after[0] and all(torch.equal(before[1][name].to_local(), after[1][name].to_local()) for name in before[1])  # type: ignore[operator]
        return first, second, same, all(held), len(groups_of(model))


def decode_share(model: Decoder, prompts: Sequence[Sequence[int]], end_ids: Sequence[int], world: World) -> list[Decoded]:
    """Between two tokens, blocks must be shards again: whole, they would not fit."""

    def go_on(has_rows: bool) -> bool:
        assert all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
        return world.any(has_rows)

    return decode(model, prompts, CPU, end_ids=end_ids, max_new_tokens=NUM_NEW, go_on=go_on)


@pytest.mark.parametrize(
    ("kind", "tuning", "parallel"),
    [
        ("qwen2", {}, {}),
        ("llama3-rope-tied", {}, {}),
        ("qwen3", {"method": "full"}, {}),
        ("qwen2", {}, {"replicate": 2}),
        ("qwen2", {}, {"cpu_offload": "parameters"}),
    ],
)
def test_two_ranks_say_what_one_says(kind: str, tuning: dict[str, Any], parallel: dict[str, Any], model_dirs: dict[str, Path]) -> None:
    config = tiny_config(model_dirs[kind], tuning=tuning, parallel=parallel)
    model = live_model(model_dirs[kind], config)
    end_ids = an_end([row.tokens for row in decode(model, PROMPTS, CPU, end_ids=NEVER, max_new_tokens=NUM_NEW)])
    wanted = decode(model, PROMPTS, CPU, end_ids=end_ids, max_new_tokens=NUM_NEW)
    shares = (PROMPTS[:4], PROMPTS[4:]) if kind == "qwen2" else (PROMPTS, ())  # the second rank is done early, or has nothing to do
    results = on_ranks(2, decode_on_rank, model_dirs[kind], config, shares, end_ids)
    for turn in (0, 1):
        got = [row for result in results for row in result[turn]]
        assert [row.tokens for row in got] == [row.tokens for row in wanted]
        assert [row.ended for row in got] == [row.ended for row in wanted]
        assert [row.end_probability for row in got] == pytest.approx([row.end_probability for row in wanted], rel=1e-4)
    for _, _, same, is_sharded, num_groups in results:
        assert same
        assert num_groups > 0
        assert is_sharded or "replicate" in parallel


def test_one_process_with_its_parameters_in_host_memory_says_the_same(model_dirs: dict[str, Path]) -> None:
    config = tiny_config(model_dirs["qwen2"], parallel={"cpu_offload": "parameters"})
    wanted = decode(live_model(model_dirs["qwen2"], config), PROMPTS, CPU, end_ids=NEVER, max_new_tokens=NUM_NEW)
    [(first, second, same, _, num_groups)] = on_ranks(1, decode_on_rank, model_dirs["qwen2"], config, (PROMPTS,), NEVER)
    assert num_groups > 0
    assert same
    assert [row.tokens for row in first] == [row.tokens for row in second] == [row.tokens for row in wanted]
