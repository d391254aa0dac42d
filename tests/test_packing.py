"""Packing changes nothing: a document's loss and gradient are the same alone or with others, in any order, in any micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from structcot.data.batch import pack
from structcot.data.loader import Feed
from structcot.data.render import IGNORE
from structcot.model.decoder import Decoder
from structcot.model.lora import stable_hash
from structcot.model.weights import build_model
from structcot.train import evaluate, train_step
from structcot_kernels import low_rank
from structcot_kernels.reference import keep_mask, lora_linear
from tests.one_step import REORDERED, MemoryStore, assert_near, feed_of, loss_and_gradients, make_run, relative_error
from tests.tiny_models import MODELS, random_samples, randomise_adapters, tiny_checkpoint, tiny_config

LENGTHS = (37, 30, 64, 35, 2, 11)  # four micro-batches of at most 64 tokens


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_checkpoint(root / kind, kind) for kind in MODELS}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_documents_laid_together_give_the_sum_of_each_alone(kind: str, method: str, model_dirs: dict[str, Path]) -> None:
    model, samples = tiny(model_dirs[kind], method=method), random_samples(LENGTHS)
    together = loss_and_gradients(model, [pack(samples)])
    alone = [loss_and_gradients(model, [pack([sample])]) for sample in samples]
    total = {name: sum(gradients[name].double() for _, gradients in alone) for name in together[1]}
    assert relative_error(together[0], sum(loss for loss, _ in alone)) <= REORDERED
    assert_near(together[1], total, REORDERED)


@pytest.mark.parametrize("kind", MODELS)
def test_a_changed_token_changes_no_logit_of_another_document_by_one_bit(kind: str, model_dirs: dict[str, Path]) -> None:
    model = tiny(model_dirs[kind])
    samples = [replace(sample, labels_T=np.append(sample.tokens_T[1:], IGNORE)) for sample in random_samples(LENGTHS)]
    changed = 2
    tokens_T = samples[changed].tokens_T.copy()
    tokens_T[0] = (tokens_T[0] + 1) % 211
    others = [*samples[:changed], replace(samples[changed], tokens_T=tokens_T), *samples[changed + 1 :]]
    batch = pack(samples)
    with torch.no_grad():
        before_MV, after_MV = model(batch, logits=True), model(replace(pack(others), rows_M=batch.rows_M), logits=True)
    same_M = (before_MV == after_MV).all(dim=1)
    assert torch.equal(same_M, batch.documents_M != changed)


def test_a_changed_token_changes_no_logit_before_it(model_dirs: dict[str, Path]) -> None:
    model = tiny(model_dirs["qwen2"])
    (sample,) = random_samples([40])
    sample = replace(sample, labels_T=np.append(sample.tokens_T[1:], IGNORE))
    tokens_T = sample.tokens_T.copy()
    tokens_T[20] = (tokens_T[20] + 1) % 211
    with torch.no_grad():
        before_MV, after_MV = model(pack([sample]), logits=True), model(pack([replace(sample, tokens_T=tokens_T)]), logits=True)
    assert torch.equal((before_MV == after_MV).all(dim=1), torch.arange(39) < 20)


@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 3, 4)], ids=["reversed", "shuffled"])
def test_the_order_of_documents_does_not_matter(order: Sequence[int], model_dirs: dict[str, Path]) -> None:
    model, samples = tiny(model_dirs["qwen3"]), random_samples(LENGTHS)
    loss, gradients = loss_and_gradients(model, [pack(samples)])
    other_loss, other_gradients = loss_and_gradients(model, [pack([samples[number] for number in order])])
    assert relative_error(other_loss, loss) <= REORDERED
    assert_near(other_gradients, gradients, REORDERED)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
def test_a_step_in_one_microbatch_and_in_four_gives_the_same_gradient(dropout: float, model_dirs: dict[str, Path]) -> None:
    one, four = (six_in_a_step(max_tokens=max_tokens).step_batches(0) for max_tokens in (200, 64))
    assert [len(one), len(four)] == [1, 4]
    model = tiny(model_dirs["llama-yarn-biases"], lora_dropout=dropout)
    loss, gradients = loss_and_gradients(model, one)
    other_loss, other_gradients = loss_and_gradients(model, four)
    assert relative_error(other_loss, loss) <= REORDERED
    assert_near(other_gradients, gradients, REORDERED)


def test_a_step_divides_once_by_all_its_labels_however_many_microbatches_it_has(model_dirs: dict[str, Path]) -> None:
    reports = []
    for max_tokens in (400, 64):
        config = tiny_config(train={"batch_sequences": 6}, parallel={"max_tokens_per_microbatch": max_tokens})
        reports.append(train_step(*make_run(tiny(model_dirs["qwen2"]), random_samples(LENGTHS), config)))
    for name in ("loss", "loss_thought", "loss_solution", "loss_end", "grad_norm"):
        assert relative_error(getattr(reports[1], name), getattr(reports[0], name)) <= REORDERED
    mean = loss_and_gradients(tiny(model_dirs["qwen2"]), [pack(random_samples(LENGTHS))])[0] / reports[0].step_supervised_tokens
    assert relative_error(reports[0].loss, mean) <= REORDERED


@pytest.mark.parametrize("recompute", ["block", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputing_inside_blocks_gives_the_same_gradients_bit_for_bit(
    method: str, dropout: float, recompute: str, model_dirs: dict[str, Path]
) -> None:
    model = tiny(model_dirs["qwen3"], method=method, lora_dropout=dropout)
    batch = pack(random_samples(LENGTHS), dropout_keys=range(6) if dropout else None)
    kept = loss_and_gradients(model, [batch])
    model.recompute = recompute
    recomputed = loss_and_gradients(model, [batch])
    assert recomputed[0] == kept[0]
    assert_near(recomputed[1], kept[1], 0.0)


def test_pack_keeps_every_token_label_kind_position_and_border() -> None:
    samples = [replace(sample, origin=f"source-{number % 2}") for number, sample in enumerate(random_samples(LENGTHS))]
    batch = pack(samples)
    documents = zip(batch.cu_seqlens_S1[:-1], batch.cu_seqlens_S1[1:], strict=True)
    labels_T, kinds_T = torch.full((179,), IGNORE), torch.zeros(179, dtype=torch.int64)
    labels_T[batch.rows_M], kinds_T[batch.rows_M] = batch.labels_M, batch.kinds_M
    for number, ((start, end), sample) in enumerate(zip(documents, samples, strict=True)):
        inside = (batch.rows_M >= start) & (batch.rows_M < end)
        assert batch.tokens_T[start:end].tolist() == sample.tokens_T.tolist()
        assert batch.positions_T[start:end].tolist() == list(range(len(sample.tokens_T)))
        assert labels_T[start:end].tolist() == sample.labels_T.tolist()
        assert kinds_T[start:end].tolist() == sample.kinds_T.tolist()
        assert (batch.documents_M[inside] == number).all()
    assert (batch.num_tokens, batch.max_seqlen, batch.cu_seqlens_S1[-1]) == (179, 64, 179)
    assert batch.num_supervised == sum(int((sample.labels_T != IGNORE).sum()) for sample in samples)
    assert batch.sources_S == tuple(sample.source for sample in samples)
    assert batch.origins_S == ("source-0", "source-1") * 3


def test_a_token_drops_the_same_inputs_however_it_is_packed(model_dirs: dict[str, Path]) -> None:
    samples = random_samples(LENGTHS)
    keys = [101, 202, 303, 404, 505, 606]
    model = tiny(model_dirs["qwen2"], lora_dropout=0.3)
    together = loss_and_gradients(model, [pack(samples, dropout_keys=keys)])
    backwards = loss_and_gradients(model, [pack(samples[::-1], dropout_keys=keys[::-1])])
    alone = loss_and_gradients(model, [pack([sample], dropout_keys=[key]) for sample, key in zip(samples, keys, strict=True)])
    other_keys = loss_and_gradients(model, [pack(samples, dropout_keys=keys[::-1])])
    assert_near(backwards[1], together[1], REORDERED)
    assert_near(alone[1], together[1], REORDERED)
    assert relative_error(other_keys[0], together[0]) > 100 * REORDERED


def test_dropout_is_that_of_a_plain_implementation() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TK, weight_NK, a_RK, b_NR = (torch.randn(shape, generator=generator) for shape in ((7, 16), (9, 16), (3, 16), (9, 3)))
    keys = [0, 1, 2, 2**62, 2**63 - 1, -1, -(2**63)]
    wanted_TN = torch.empty(7, 9)
    for token, key in enumerate(keys):
        kept_K = torch.tensor([splitmix64_share(key, column) >= 0.4 for column in range(16)])
        wanted_TN[token] = weight_NK @ x_TK[token] + 2.0 * b_NR @ (a_RK @ (x_TK[token] * kept_K / 0.6))
    got_TN = lora_linear(x_TK, weight_NK, None, a_RK, b_NR, 2.0, 0.4, torch.tensor(keys))
    assert relative_error(got_TN, wanted_TN) <= REORDERED


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_dropout_keeps_a_share_of_one_minus_p_of_tokens_and_of_columns(dropout: float) -> None:
    num_tokens, num_columns = 512, 384
    mask = keep_mask(torch.arange(num_tokens) + stable_hash("a document"), num_columns, dropout)
    deviation = (dropout * (1.0 - dropout)) ** 0.5
    # 5 standard deviations: of some thousand counts not one lies beyond by chance.
    assert abs(float(mask.float().mean()) - (1.0 - dropout)) <= 5 * deviation / (num_tokens * num_columns) ** 0.5
    assert (mask.float().mean(0) - (1.0 - dropout)).abs().max() <= 5 * deviation / num_tokens**0.5
    assert (mask.float().mean(1) - (1.0 - dropout)).abs().max() <= 5 * deviation / num_columns**0.5


def test_masks_of_neighbours_in_position_column_and_module_are_independent(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Tensor] = []

    def noted(keys_T: Tensor, num_columns: int, dropout: float) -> Tensor:
        keys.append(keys_T)
        return keep_mask(keys_T, num_columns, dropout)

    monkeypatch.setattr(low_rank, "keep_mask", noted)
    with torch.no_grad():
        tiny(model_dirs["qwen2"], lora_dropout=0.5)(pack(random_samples([512]), dropout_keys=[2**55]))
    assert len(keys) == 8, "inputs of q/k/v, o, gate/up and down in each of two blocks"
    masks = torch.stack([keep_mask(keys_T, 64, 0.5) for keys_T in keys]).float() - 0.5
    across = [masks[:, 1:] * masks[:, :-1], masks[:, :, 1:] * masks[:, :, :-1]]
    across += [masks[one] * masks[two] for one in range(8) for two in range(one)]
    for product in across:
        # Independent halves agree as often as not; 5 standard deviations.
        assert abs(float(product.mean())) <= 5 * 0.25 / product.numel() ** 0.5


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed(model_dirs: dict[str, Path]) -> None:
    model = tiny(model_dirs["qwen2"], lora_dropout=0.3)
    losses = {loss_and_gradients(model, six_in_a_step(dropout_seed=seed).step_batches(step))[0] for step in (0, 1) for seed in (0, 1)}
    again = loss_and_gradients(model, six_in_a_step(dropout_seed=1).step_batches(1))[0]
    assert len(losses) == 4
    assert again in losses


def test_no_two_tokens_of_a_run_share_a_dropout_key() -> None:
    feed = six_in_a_step()
    keys = torch.cat([batch.dropout_keys_T for step in (0, 1) for batch in feed.step_batches(step)])
    assert len(keys.unique()) == len(keys) == 2 * 179


def test_nothing_is_dropped_in_evaluation(model_dirs: dict[str, Path]) -> None:
    samples = random_samples(LENGTHS)
    model = tiny(model_dirs["qwen2"], lora_dropout=0.9)
    wanted = loss_and_gradients(tiny(model_dirs["qwen2"]), [pack(samples)])[0]
    run, _ = make_run(model, samples, tiny_config(parallel={"max_tokens_per_microbatch": 64}))
    run.prepared.data = SimpleNamespace(eval=MemoryStore(samples), eval_indices=np.arange(6))  # type: ignore[misc]
    got = evaluate(run)
    assert got is not None
    assert relative_error(got, wanted / sum(int((sample.labels_T != IGNORE).sum()) for sample in samples)) <= REORDERED
    assert model.training, "evaluation should leave the model training"


def test_held_out_samples_are_seen_once_each_in_bins_under_the_cap() -> None:
    store, feed = MemoryStore(random_samples(LENGTHS)), six_in_a_step(max_tokens=64)
    batches = list(feed.eval_batches(store, np.array([4, 0, 3, 2])))  # type: ignore[arg-type]
    assert sorted(source for batch in batches for source in batch.sources_S) == [f"random.jsonl:{number}" for number in (0, 2, 3, 4)]
    assert max(batch.num_tokens for batch in batches) <= 64


@pytest.mark.parametrize(("attention_ratio", "borders"), [(0.0, [0, 20, 40, 60, 80]), (1.0, [0, 50])], ids=["by-tokens", "by-attention"])
def test_the_costliest_microbatch_of_the_run_is_found(attention_ratio: float, borders: list[int]) -> None:
    config = tiny_config(train={"batch_sequences": 4}, parallel={"max_tokens_per_microbatch": 80})
    feed = feed_of(random_samples([20] * 11 + [50]), config, attention_ratio)
    assert feed.costliest_batch().cu_seqlens_S1.tolist() == borders
    assert feed.max_microbatch_tokens() == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lora_b_NR": None}, "give both or neither"), ({"dropout": 0.1}, "give one int64 key for each token")],
    ids=["A-without-B", "dropout-without-keys"],
)
def test_half_an_adapter_and_dropout_without_keys_are_errors(arguments: dict[str, object], message: str) -> None:
    shapes = {"x_TK": (2, 4), "weight_NK": (3, 4), "lora_a_RK": (1, 4), "lora_b_NR": (3, 1)}
    with pytest.raises(ValueError, match=message):
        lora_linear(**{name: torch.ones(shape) for name, shape in shapes.items()} | arguments)


def tiny(model_dir: Path, **tuning: object) -> Decoder:
    """The model with adapters whose B is not zero."""
    model = build_model(model_dir, tiny_config(model_dir, tuning=tuning), torch.device("cpu"))
    randomise_adapters(model)
    return model


def six_in_a_step(*, max_tokens: int = 200, dropout_seed: int = 0) -> Feed:
    """Six samples, all of them in every step."""
    config = tiny_config(train={"batch_sequences": 6}, parallel={"max_tokens_per_microbatch": max_tokens})
    return feed_of(random_samples(LENGTHS), config, dropout_seed=dropout_seed)


def splitmix64_share(key: int, column: int) -> float:
    """Number in [0, 1) of (key, column) in plain integers: the finalizer of SplitMix64, its upper 24 bits."""
    value = (key + column * 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return ((value ^ (value >> 31)) >> 40) / 2**24


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_slices_put_together_are_the_whole_micro_batch(num_ranks: int) -> None:
    samples, keys = random_samples([9, 1, 17, 4]), [11, 22, 33, 44]
    whole = pack(samples, dropout_keys=keys)
    parts = [pack(samples, dropout_keys=keys, share=(rank, num_ranks)) for rank in range(num_ranks)]
    for name in ("tokens_T", "positions_T", "dropout_keys_T", "labels_M", "kinds_M", "documents_M"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    starts = np.cumsum([0, *parts[0].slices_U])
    assert torch.equal(torch.cat([part.rows_M + int(start) for part, start in zip(parts, starts, strict=False)]), whole.rows_M)
    for rank, part in enumerate(parts):
        assert part.slices_U == parts[0].slices_U
        assert part.num_tokens == part.slices_U[rank]
        assert torch.equal(part.cu_seqlens_S1, whole.cu_seqlens_S1)
        assert part.lengths_S == whole.lengths_S
    assert max(parts[0].slices_U) - min(parts[0].slices_U) <= 1


def test_a_micro_batch_without_a_document_is_one() -> None:
    nothing = pack([], dropout_keys=[])
    assert (nothing.num_tokens, nothing.num_supervised, nothing.max_seqlen) == (0, 0, 0)
    assert nothing.cu_seqlens_S1.tolist() == [0]
