"""The model's shape, its rotary tables, its weights in and out, and its adapters: as the checkpoint says, or an error that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from structcot.config import TuningConfig
from structcot.errors import ConfigError, ModelError
from structcot.model import weights as weights_module
from structcot.model.decoder import Decoder
from structcot.model.lora import LoraPair, adapters_of, attach_lora
from structcot.model.rotary import inverse_frequencies, rotary_tables
from structcot.model.spec import ModelSpec, read_spec
from structcot.model.weights import build_model, load_weights, read_tensors, save_weights, weights_fingerprint
from structcot.model_files import weight_files
from tests.one_step import REORDERED, ROUNDED, relative_error
from tests.tiny_models import LLAMA3_ROPE, MODELS, YARN_ROPE, tiny_checkpoint, tiny_config

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
ROPES = {
    "default": {"rope_theta": 500_000.0},
    "default-older-spelling": {"rope_theta": 500_000.0, "rope_scaling": None},
    "llama3": {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131_072},
    "llama3-older-spelling": {
        "rope_theta": 500_000.0,
        "rope_scaling": {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"},
        "max_position_embeddings": 131_072,
    },
    "yarn": {"rope_parameters": YARN_ROPE},
    "yarn-older-spelling": {
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    },
    "yarn-without-original-length": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}},
    "yarn-betas": {"rope_parameters": YARN_ROPE | {"beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn-not-truncated": {"rope_parameters": YARN_ROPE | {"truncate": False}},
    "yarn-attention-factor": {"rope_parameters": YARN_ROPE | {"attention_factor": 1.7}},
    "yarn-two-mscales": {"rope_parameters": YARN_ROPE | {"mscale": 1.2, "mscale_all_dim": 0.7}},
    "yarn-one-mscale": {"rope_parameters": YARN_ROPE | {"mscale": 1.2}},
    "yarn-factor-below-one": {"rope_parameters": YARN_ROPE | {"factor": 0.5}},
    "yarn-narrow": {"rope_parameters": YARN_ROPE | {"original_max_position_embeddings": 64, "beta_slow": 30.0}},  # no pair is blended
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "qwen2")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in MODELS),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "mlp_bias": True}),
        ("llama3-rope-tied", {"attention_bias": True}),
        ("llama3-rope-tied", {"mlp_bias": True}),
        ("llama3-rope-tied", {"head_dim": 20}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_the_shape_read_is_that_of_the_model_that_transformers_builds(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, kind, **changes))
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    model = Decoder(spec, torch.float32)
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == {
        name: tuple(value.shape) for name, value in theirs.named_parameters()
    }
    config = theirs.config
    assert spec.tied_head == config.tie_word_embeddings
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads) == (2, 4, 2)
    assert (spec.rms_norm_eps, spec.max_positions) == (config.rms_norm_eps, config.max_position_embeddings)
    matrices = [value.numel() for name, value in theirs.named_parameters() if name.endswith("_proj.weight")]
    assert spec.body_matmul_parameters == sum(matrices)
    assert spec.head_matmul_parameters == theirs.lm_head.weight.numel()
    assert spec.attention_ratio == pytest.approx(2 * 4 * spec.head_dim / (sum(matrices) + 211 * 48))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str, tmp_path: Path) -> None:
    given = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    spec = spec_of(tmp_path, {name: value for name, value in LLAMA.items() if name in given} | {"model_type": family})
    theirs = AutoConfig.from_pretrained(str(tmp_path))
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 48 // 4)
    assert (spec.max_positions, spec.rms_norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (spec.tied_head, spec.rope.theta) == (theirs.tie_word_embeddings, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, 'model_type is "mixtral"; structcot trains dense llama, qwen2, qwen3 models'),
        ({"model_type": None}, 'model_type is "None"'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only silu'),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention is supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope parameters differ by full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only whole heads are rotated"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised; give the model in bfloat16 or float32"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope type "dynamic" is not supported; use default, llama3 or yarn'),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 'rope type "linear" is not supported'),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
    ],
    ids=[
        "family",
        "no-family",
        "activation",
        "sliding-window",
        "layer-types",
        "rope-by-layer",
        "part-of-head",
        "quantised",
        "rope-dynamic",
        "rope-linear",
        "rope-incomplete",
    ],
)
def test_what_the_decoder_cannot_do_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        spec_of(tmp_path, LLAMA | changes)
    assert str(raised.value).startswith(str(tmp_path / "config.json"))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not there; model_name_or_path must name"),
        ("{", "cannot be read"),
        ('{"model_type": "llama"}', "lacks 'num_attention_heads'"),
        ("[]", "holds a value of a wrong type"),
        (json.dumps(LLAMA | {"num_attention_heads": "4"}), "holds a value of a wrong type"),
        (json.dumps(LLAMA | {"rope_parameters": YARN_ROPE | {"factor": None}}), "holds a value of a wrong type"),
    ],
    ids=["missing", "no-json", "incomplete", "no-object", "text-for-a-number", "null-for-a-number"],
)
def test_a_config_that_cannot_be_used_is_a_model_error(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_spec(tmp_path)


@pytest.mark.filterwarnings("ignore")  # transformers finds fault with some of these on purpose
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_those_of_transformers(rope: str, tmp_path: Path) -> None:
    values = LLAMA | {"hidden_size": 256} | ROPES[rope]  # heads of width 64: every branch has some frequency
    spec = spec_of(tmp_path, values)
    theirs = AutoConfig.from_pretrained(str(tmp_path))
    embedding = LlamaRotaryEmbedding(theirs)
    cos_1Pd, sin_1Pd = embedding(torch.zeros(1), torch.arange(5000).unsqueeze(0))

    cos_Pd, sin_Pd = rotary_tables(spec, 5000)
    assert relative_error(inverse_frequencies(spec.rope, 64), embedding.inv_freq) <= REORDERED
    if spec.rope.kind != "default":
        wanted_h, factor = ROPE_INIT_FUNCTIONS[spec.rope.kind](theirs, torch.device("cpu"))
        assert relative_error(inverse_frequencies(spec.rope, 64), wanted_h) <= REORDERED
        assert spec.rope.attention_factor == pytest.approx(factor)
    # One unit in the last place of a frequency is 3e-4 of a radian at position 5000.
    assert (cos_Pd - cos_1Pd[0]).abs().max() <= 1e-3
    assert (sin_Pd - sin_1Pd[0]).abs().max() <= 1e-3
    assert relative_error(cos_Pd[:64], cos_1Pd[0, :64]) <= ROUNDED


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_the_stretched_tables_keep_some_frequencies_stretch_some_and_blend_some(kind: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LLAMA | {"hidden_size": 256} | ROPES[kind])
    plain = inverse_frequencies(spec_of(tmp_path, LLAMA | {"rope_theta": spec.rope.theta}).rope, 64)
    ratio_h = inverse_frequencies(spec.rope, 64) / plain
    kept, stretched = ratio_h == 1.0, (ratio_h * spec.rope.factor - 1.0).abs() < 1e-6
    assert kept.any()
    assert stretched.any()
    assert (~(kept | stretched)).any()


def test_tables_grow_with_the_longest_document(checkpoint: Path) -> None:
    model = build_model(checkpoint, tiny_config(checkpoint), CPU)
    short = model._rotary_tables(10, CPU)
    assert model._rotary_tables(1000, CPU)[0] is short[0]
    long = model._rotary_tables(3000, CPU)
    assert long[0].shape[0] == 3000
    assert torch.equal(long[0][: len(short[0])], short[0])


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_is_the_checkpoints(kind: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, kind)
    model = build_model(tmp_path, tiny_config(tmp_path, tuning={"method": "full"}), CPU)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.spec.tied_head


@pytest.mark.parametrize(("method", "stored"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_frozen_weights_are_kept_in_the_compute_dtype_and_trained_ones_in_fp32(method: str, stored: torch.dtype, checkpoint: Path) -> None:
    model = build_model(checkpoint, tiny_config(checkpoint, tuning={"method": method}, train={"dtype": "bfloat16"}), CPU)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "adapters." not in name and "norm" not in name}
    assert dtypes == {stored}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "norm" in name} == {torch.float32}
    assert {parameter.dtype for parameter in model.trained_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.bias", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_an_error_that_names_it(name: str, checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"do not fit config.json: missing {name}, left over nothing"):
        load(checkpoint)


def test_a_tensor_left_over_is_an_error_that_names_it(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)}))
    with pytest.raises(ModelError, match=r"missing nothing, left over model\.layers\.0\.self_attn\.o_proj\.bias"):
        load(checkpoint)


def test_many_tensors_that_do_not_fit_are_counted(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"missing model\.layers\.2\.\S+, \S+, \S+, \S+ and 8 more, left over nothing"):
        load(checkpoint)


def test_a_tensor_of_another_shape_is_an_error_that_says_both(checkpoint: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(48, 80)}))
    with pytest.raises(ModelError, match=rf"{name} has shape \(48, 80\), config.json says \(80, 48\)"):
        load(checkpoint)


def test_a_tied_head_that_is_stored_too_may_not_differ(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen3")
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1e-3))
    with pytest.raises(ModelError, match="ties the head to the embedding, but"):
        load(tmp_path)


def test_old_checkpoints_that_store_rotary_frequencies_load(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))
    load(checkpoint)


def test_a_sharded_checkpoint_loads_as_one_file_does(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(checkpoint, tmp_path / "shards", monkeypatch)
    assert len(weight_files(tmp_path / "shards")) > 2
    whole, sharded = load(checkpoint), load(tmp_path / "shards")
    assert all(torch.equal(value, dict(whole.named_parameters())[name]) for name, value in sharded.named_parameters())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_leaves_its_directory_is_refused(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match="is no plain name of a safetensors file; such an index is not followed"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), 'index.json: has no "weight_map"'),
        (lambda path: (path / "model.safetensors").write_bytes(b"not weights"), "cannot be read as safetensors"),
    ],
    ids=["no-weights", "index-without-map", "damaged"],
)
def test_weights_that_cannot_be_read_are_a_model_error(break_it: Callable[[Path], Any], message: str, checkpoint: Path) -> None:
    break_it(checkpoint)
    with pytest.raises(ModelError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
def test_saved_weights_load_in_transformers_as_they_were(kind: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "source", kind)
    if sharded:
        shard(source, tmp_path / "saved", monkeypatch)
    else:
        save(source, tmp_path / "saved")
    one, two = (AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).state_dict() for path in (source, tmp_path / "saved"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_the_fingerprint_sees_a_changed_tensor(name: str, checkpoint: Path) -> None:
    before = weights_fingerprint(checkpoint)
    assert weights_fingerprint(checkpoint) == before
    change_tensors(checkpoint, lambda tensors: tensors[name].add_(1.0))
    assert weights_fingerprint(checkpoint) != before


def test_the_fingerprint_sees_a_tensor_changed_in_a_file_too_large_to_read_whole(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2**19) for name in "abcdefgh"}  # 16 MiB, of which 1 MiB is read
    save_file(tensors, tmp_path / "model.safetensors")
    fingerprints = {weights_fingerprint(tmp_path)}
    for name in tensors:
        save_file(tensors | {name: torch.ones(2**19)}, tmp_path / "model.safetensors")
        fingerprints.add(weights_fingerprint(tmp_path))
    assert len(fingerprints) == 9


def test_the_fingerprint_sees_a_renamed_tensor_late_in_a_long_header(tmp_path: Path) -> None:
    tensors = {f"tensor-{number:03d}": torch.zeros(4) for number in range(300)} | {"zeros": torch.zeros(2**22)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = weights_fingerprint(tmp_path)
    tensors["tensor-25x"] = tensors.pop("tensor-250")
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != before


def test_the_fingerprint_sees_how_a_checkpoint_is_cut_into_files(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(checkpoint, tmp_path / "shards", monkeypatch)
    assert weights_fingerprint(checkpoint) != weights_fingerprint(tmp_path / "shards")


def test_adapters_start_as_in_peft_a_uniform_and_b_zero(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2", hidden_size=64, intermediate_size=256)
    model = build_model(tmp_path, tiny_config(tmp_path, tuning={"lora_r": 64}), CPU)
    pairs = dict(adapters_of(model))
    assert len(pairs) == 14
    for name, pair in pairs.items():
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        bound, lora_A = inputs**-0.5, pair.lora_A.detach()
        assert (tuple(pair.lora_A.shape), tuple(pair.lora_B.shape)) == ((64, inputs), (outputs, 64))
        assert not pair.lora_B.any()
        assert 0.99 * bound <= float(lora_A.abs().max()) <= bound
        # Of 4096 draws or more the mean and the deviation lie within 5 of their own standard deviations.
        assert abs(float(lora_A.mean())) <= 5 * bound / 3**0.5 / lora_A.numel() ** 0.5
        assert float(lora_A.std()) == pytest.approx(bound / 3**0.5, rel=5 * 0.45 / lora_A.numel() ** 0.5)


def test_only_adapters_are_trained(checkpoint: Path) -> None:
    model = build_model(checkpoint, tiny_config(checkpoint, tuning={"lora_target_modules": ["q_proj", "down_proj"]}), CPU)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"model.layers.{layer}.adapters.{name}.lora_{matrix}" for layer in (0, 1) for name in ("q_proj", "down_proj") for matrix in "AB"
    }


def test_each_adapter_starts_at_values_of_its_own_which_depend_on_the_seed_alone(checkpoint: Path) -> None:
    def matrices(seed: int, **tuning: Any) -> dict[str, Tensor]:
        model = build_model(checkpoint, tiny_config(checkpoint, tuning=tuning, seed=seed), CPU)
        return {name: pair.lora_A.detach() for name, pair in adapters_of(model)}

    first, again, other_seed = matrices(0), matrices(0), matrices(1)
    some = matrices(0, lora_target_modules=["down_proj", "v_proj"])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other_seed[name]) for name in first)
    assert all(torch.equal(first[name], some[name]) for name in some)
    assert len(some) == 4
    values = [tuple(matrix.flatten()[:48].tolist()) for matrix in first.values()]
    assert len(set(values)) == len(values) == 14


def test_a_target_that_the_model_lacks_is_an_error(checkpoint: Path) -> None:
    tuning = TuningConfig.model_construct(lora_target_modules=["q_proj", "qproj"])
    with pytest.raises(ConfigError, match=r"tuning\.lora_target_modules: the model has no qproj \(did you mean q_proj\?\)"):
        attach_lora(load(checkpoint), tuning)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4.0), (True, 8.0)], ids=["lora", "rslora"])
def test_the_scale_is_alpha_over_r_or_over_its_root(use_rslora: bool, scale: float, checkpoint: Path) -> None:
    tuning = {"lora_r": 4, "lora_alpha": 16.0, "use_rslora": use_rslora}
    model = build_model(checkpoint, tiny_config(checkpoint, tuning=tuning), CPU)
    assert {pair.scale for pair in model.modules() if isinstance(pair, LoraPair)} == {scale}


def spec_of(directory: Path, values: dict[str, Any]) -> ModelSpec:
    """The shape read from a config.json of `values`."""
    (directory / "config.json").write_text(json.dumps(values))
    return read_spec(directory)


def load(model_dir: Path) -> Decoder:
    model = Decoder(read_spec(model_dir), torch.float32)
    load_weights(model, model_dir)
    return model


def tensors_of(model_dir: Path) -> dict[str, Tensor]:
    return {name: read() for name, read in read_tensors(model_dir)}


def change_tensors(model_dir: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = tensors_of(model_dir)
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})


def shard(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the weights again in several files."""
    monkeypatch.setattr(weights_module, "MAX_SHARD_BYTES", 100_000)
    save(source, target)


def save(source: Path, target: Path) -> None:
    """Save the weights again as they are, with the config beside them."""
    target.mkdir()
    readers = dict(read_tensors(source))
    save_weights(readers, lambda name: readers[name](), target)
    shutil.copy(source / "config.json", target)
