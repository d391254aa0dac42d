"""The trainer computes what transformers and PEFT compute: logits, losses, every gradient, and twenty steps of training.

The other side sees each document by itself, in a batch of one, by its own eager attention, its own shift of labels and its own loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from structcot.config import Config
from structcot.data.batch import pack
from structcot.data.records import Record
from structcot.data.render import IGNORE, RenderedSample, load_tokenizer, render_records
from structcot.errors import FetchError
from structcot.fetch import resolve_model
from structcot.model.decoder import Decoder
from structcot.model.lora import LoraPair
from structcot.model.weights import build_model
from structcot.train import train_step
from tests.chat_tokenizers import SHARED, conversation, data_config, qwen_tokenizer
from tests.one_step import ROUNDED, assert_near, loss_and_gradients, make_run, relative_error
from tests.tiny_models import MODELS, random_samples, randomise_adapters, tiny_checkpoint, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT calls it

# Twenty steps of Adam, whose first steps are near to the sign of the gradient, make more of the same rounding.
TWENTY_STEPS = 10 * ROUNDED

LENGTHS = (37, 5, 64, 23)
TUNINGS = {
    "all-linear": {},
    "q-and-v": {"lora_target_modules": ["q_proj", "v_proj"]},
    "o-and-down": {"lora_target_modules": ["o_proj", "down_proj"]},
    "k-gate-up-rslora": {"lora_target_modules": ["k_proj", "gate_proj", "up_proj"], "use_rslora": True},
    "all-linear-rslora": {"use_rslora": True},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_checkpoint(root / kind, kind) for kind in MODELS}


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_loss_and_every_gradient_are_those_of_transformers_and_peft(kind: str, tuning: str, model_dirs: dict[str, Path]) -> None:
    config = tiny_config(model_dirs[kind], tuning=TUNINGS[tuning])
    model = build_model(model_dirs[kind], config, torch.device("cpu"))
    randomise_adapters(model)
    samples = random_samples(LENGTHS)
    batch = pack(samples)

    theirs = their_model(model_dirs[kind], model, config)
    with torch.no_grad():
        their_logits_MV = torch.cat([theirs(ids_of(sample)).logits[0][sample.labels_T != IGNORE] for sample in samples])
        assert relative_error(model(batch, logits=True), their_logits_MV) <= ROUNDED
    check_loss_and_gradients(model, theirs, samples, [labels_of(sample) for sample in samples])


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_twenty_steps_are_those_of_peft_and_torch_made_by_hand(kind: str, method: str, model_dirs: dict[str, Path]) -> None:
    train = {"batch_sequences": 4, "max_steps": 20, "warmup_ratio": 0.2, "weight_decay": 0.1, "max_grad_norm": 1.0}
    config = tiny_config(
        model_dirs[kind],
        tuning={"method": method},
        train={**train, "learning_rate": 3e-3 if method == "lora" else 1e-3},
        parallel={"max_tokens_per_microbatch": 100},
    )
    model = build_model(model_dirs[kind], config, torch.device("cpu"))
    theirs = their_model(model_dirs[kind], model, config)
    samples = random_samples(range(20, 60, 4))
    run, state = make_run(model, samples, config)
    assert len(run.feed.layout(0)[0]) > 1, "the step should be made of several micro-batches"

    by_hand = make_by_hand(theirs, [[samples[number] for number in run.prepared.plan.samples_of(step)] for step in range(20)], config)
    for wanted_loss, wanted_norm in by_hand:
        report = train_step(run, state)
        assert relative_error(report.loss, wanted_loss) <= TWENTY_STEPS
        assert relative_error(report.grad_norm, wanted_norm) <= TWENTY_STEPS
        state = replace(state, step=report.step, num_tokens=report.num_tokens)
    assert_near(trained(model), their_trained(theirs, model), TWENTY_STEPS)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_real_traces_give_the_loss_and_gradients_of_apply_chat_template_and_transformers(method: str, tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model_dir = tiny_checkpoint(tmp_path, "qwen2", vocab_size=151_936, num_hidden_layers=1, **sizes)
    config = tiny_config(model_dir, tuning={"method": method})
    model = build_model(model_dir, config, torch.device("cpu"))
    randomise_adapters(model)
    records = shortest_traces("paper_outputs", 1) + shortest_traces("annotated", 1)
    check_real_traces(model, their_model(model_dir, model, config), tokenizer, records)


@pytest.mark.slow
def test_real_traces_through_smollm2_give_the_loss_and_gradients_of_transformers_and_peft() -> None:
    try:
        model_dir = resolve_model("smollm2-135m", "main")
    except FetchError as error:
        pytest.skip(f"SmolLM2-135M cannot be had: {error}")
    config = tiny_config(model_dir, tuning={"lora_r": 8, "lora_alpha": 16.0})
    model = build_model(model_dir, config, torch.device("cpu"))
    randomise_adapters(model)
    records = shortest_traces("paper_outputs", 1) + shortest_traces("annotated", 2)
    check_real_traces(model, their_model(model_dir, model, config), load_tokenizer(model_dir), records)


def check_real_traces(model: Decoder, theirs: nn.Module, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> None:
    """Render and pack `records` here; encode and mask them there with nothing but the tokenizer's own chat template."""
    samples = [sample for sample in render_records(records, tokenizer, data_config()) if isinstance(sample, RenderedSample)]
    assert len(samples) == len(records)
    their_labels = []
    for record, sample in zip(records, samples, strict=True):
        turns = [{"role": message.role, "content": message.content} for message in record.messages]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert ids == sample.tokens_T.tolist()
        assert len(ids) <= 700, "the check should stay short"
        end = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        their_labels.append(torch.tensor([IGNORE] * len(prompt) + ids[len(prompt) : end] + [IGNORE] * (len(ids) - end)))
    check_loss_and_gradients(model, theirs, samples, their_labels)


def check_loss_and_gradients(model: Decoder, theirs: nn.Module, samples: Sequence[RenderedSample], their_labels: Sequence[Tensor]) -> None:
    """The loss sum of `samples` packed together, and its gradient for every trained parameter, against one document after the other."""
    loss_sum, gradients = loss_and_gradients(model, [pack(samples)])
    their_sum = exact_sum = 0.0
    for sample, labels_T in zip(samples, their_labels, strict=True):
        out = theirs(ids_of(sample), labels=labels_T.unsqueeze(0), num_items_in_batch=1)
        their_sum += out.loss.item()
        exact_sum += backward_in_fp64(out.logits[0, :-1], labels_T[1:])
    assert relative_error(loss_sum, their_sum) <= ROUNDED
    assert relative_error(loss_sum, exact_sum) <= ROUNDED
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert_near(gradients, their_gradients(theirs, model), ROUNDED)


def backward_in_fp64(logits_TV: Tensor, labels_T: Tensor) -> float:
    """Sum of the cross-entropies, and the backward of it; both in fp64 from the logits on.

    On a CPU torch's fp32 log-softmax over 150 thousand entries is off by 1e-5, which is much where a model is sure of a token.
    """
    loss_sum, gradients = 0.0, []
    for logits_tV, labels_t in zip(logits_TV.detach().split(64), labels_T.split(64), strict=True):
        wide_tV = logits_tV.double().requires_grad_()
        loss = F.cross_entropy(wide_tV, labels_t, ignore_index=IGNORE, reduction="sum")
        (gradient_tV,) = torch.autograd.grad(loss, wide_tV)
        gradients.append(gradient_tV.float())
        loss_sum += loss.item()
    logits_TV.backward(torch.cat(gradients))
    return loss_sum


def make_by_hand(theirs: nn.Module, steps: Sequence[Sequence[RenderedSample]], config: Config) -> Iterable[tuple[float, float]]:
    """Loss and gradient norm of each step, written out as in a textbook: warm-up, cosine, clipping, AdamW that decays matrices."""
    train = config.train
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    matrices = {"params": [parameter for parameter in parameters if parameter.dim() == 2], "weight_decay": train.weight_decay}
    vectors = {"params": [parameter for parameter in parameters if parameter.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.999), eps=1e-8, fused=False)
    warmup = round(train.warmup_ratio * len(steps))
    for step, samples in enumerate(steps):
        num_labels = sum(int((sample.labels_T != IGNORE).sum()) for sample in samples)
        loss = sum(theirs(ids_of(sample), labels=labels_of(sample).unsqueeze(0), num_items_in_batch=num_labels).loss for sample in samples)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in parameters))
        for parameter in parameters:
            parameter.grad.mul_(min(1.0, train.max_grad_norm / norm))
        decay = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (len(steps) - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * ((step + 1) / warmup if step < warmup else decay)
        optimizer.step()
        yield loss.item(), norm


def their_model(model_dir: Path, model: Decoder, config: Config) -> nn.Module:
    """The same model in plain transformers, with the same adapters in PEFT if `model` has any."""
    theirs = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32, attn_implementation="eager")
    if config.tuning.method == "full":
        return theirs
    tuning = config.tuning
    lora = LoraConfig(
        r=tuning.lora_r, lora_alpha=int(tuning.lora_alpha), target_modules=list(tuning.target_modules), use_rslora=tuning.use_rslora
    )
    theirs = get_peft_model(theirs, lora)
    with torch.no_grad():
        for name, parameter in their_trained(theirs, model).items():
            parameter.copy_(model.get_parameter(name))
    return theirs


def their_trained(theirs: nn.Module, model: Decoder) -> dict[str, nn.Parameter]:
    """What they train, all of it, under the names that `model` has for it."""
    own_names = {f"base_model.model.{pair.name}": name for name, pair in model.named_modules() if isinstance(pair, LoraPair)}
    found = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    if not own_names:
        return found
    parts = {name: name.removesuffix(".default.weight").rpartition(".") for name in found}
    return {f"{own_names[parts[name][0]]}.{parts[name][2]}": parameter for name, parameter in found.items()}


def their_gradients(theirs: nn.Module, model: Decoder) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in their_trained(theirs, model).items() if parameter.grad is not None}


def trained(model: Decoder) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def ids_of(sample: RenderedSample) -> Tensor:
    """The tokens as a batch of one."""
    return torch.from_numpy(sample.tokens_T.astype(np.int64)).unsqueeze(0)


def labels_of(sample: RenderedSample) -> Tensor:
    """Labels before the shift: each token that is trained on at its own place."""
    labels_T = np.full(len(sample.tokens_T), IGNORE, dtype=np.int64)
    trained_on = np.flatnonzero(sample.labels_T != IGNORE) + 1
    labels_T[trained_on] = sample.tokens_T[trained_on]
    return torch.from_numpy(labels_T)


def shortest_traces(name: str, count: int) -> list[Record]:
    """Conversations of the shortest responses of a file of real traces; skips the test where it is not at hand."""
    path = SHARED / "traces" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"the real traces are not at hand (../shared/data/traces/{name}.jsonl)")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [(row.get("question", "What is the answer?"), row.get("response") or row["solution"]) for row in rows]
    return [conversation(question, response) for question, response in sorted(texts, key=lambda text: len(text[1]))[:count]]
