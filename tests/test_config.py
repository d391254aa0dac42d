"""The config: what it may hold, what it says of what it may not, and that the file a run writes back is the same config."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structcot.config import PROJECTIONS, Config, DataSource
from structcot.config_file import FOREIGN_NAMES, load_config, parse_config, valid_keys
from structcot.errors import ConfigError
from tests.tiny_run import ROOT, TINY_CONFIG

MINIMAL = """
model_name_or_path = "some/model"
output_dir = "runs/one"

[data]
train = ["train.jsonl"]
"""

# A key is a promise: one more or one fewer here is a decision, to be written into the documents and the changelog.
KEYS_AND_DEFAULTS = {
    "model_name_or_path": "some/model",
    "revision": "main",
    "output_dir": "runs/one",
    "seed": 0,
    "attn_implementation": "auto",
    "kernels": "auto",
    "data.train": [{"path": "train.jsonl", "split": "train", "weight": 1.0, "name": ""}],
    "data.eval": [],
    "data.eval_fraction": 0.0,
    "data.format": "auto",
    "data.max_length": 16384,
    "data.overlong": "error",
    "data.train_on": "assistant",
    "data.system_prompt": "",
    "data.on_bad_record": "error",
    "data.control_tokens": "reject",
    "tuning.method": "lora",
    "tuning.lora_r": 64,
    "tuning.lora_alpha": 128.0,
    "tuning.lora_dropout": 0.0,
    "tuning.lora_target_modules": "all-linear",
    "tuning.use_rslora": False,
    "train.batch_sequences": 96,
    "train.batch_tokens": None,
    "train.num_train_epochs": 3.0,
    "train.max_steps": -1,
    "train.learning_rate": 1e-4,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.optimizer": "adamw",
    "train.dtype": "bfloat16",
    "parallel.shard": -1,
    "parallel.replicate": 1,
    "parallel.sequence": 1,
    "parallel.max_tokens_per_microbatch": 32768,
    "parallel.recompute": "auto",
    "parallel.cpu_offload": "none",
    "parallel.hang_seconds": 1800.0,
    "checkpoint.save_steps": 50,
    "checkpoint.save_total_limit": 2,
    "log.report_to": [],
    "log.logging_steps": 1,
    "log.eval_steps": 0,
    "log.eval_tasks": [],
    "log.eval_limit": 16,
    "log.eval_max_new_tokens": 512,
    "log.eval_prompt": "boxed",
}


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_config(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    """The error message, without the path of the file in front of each line."""
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    assert error.value.exit_status == 2
    return str(error.value).replace(f"{tmp_path}/", "")


def with_lines(section: str, *lines: str) -> str:
    """MINIMAL with more lines in a section; "" is the top."""
    body = "\n".join(lines)
    if section == "data":
        return f"{MINIMAL}\n{body}\n"
    return f"{body}\n{MINIMAL}" if not section else f"{MINIMAL}\n[{section}]\n{body}\n"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


# What there is


def test_keys_and_defaults_are_as_promised(tmp_path: Path) -> None:
    assert set(valid_keys()) == set(KEYS_AND_DEFAULTS)
    assert flat(load(tmp_path, MINIMAL).model_dump(mode="json")) == KEYS_AND_DEFAULTS


def test_every_section_takes_what_it_says(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        model_name_or_path = "m"
        revision = "v1"
        output_dir = "o"
        seed = 7
        attn_implementation = "sdpa"
        kernels = "torch"
        [data]
        train = ["a.jsonl", {path = "owner/b", split = "test", weight = 0.5, name = "second"}]
        eval = ["c.parquet"]
        format = "sharegpt"
        max_length = 4096
        overlong = "truncate"
        train_on = "last-assistant"
        system_prompt = "Think."
        on_bad_record = "skip"
        control_tokens = "text"
        [tuning]
        method = "full"
        lora_r = 16
        lora_alpha = 32
        lora_dropout = 0.1
        lora_target_modules = ["v_proj", "q_proj"]
        use_rslora = true
        [train]
        batch_tokens = 100000
        num_train_epochs = 1.5
        max_steps = 10
        learning_rate = 1
        lr_scheduler_type = "linear"
        warmup_ratio = 0
        weight_decay = 0.1
        max_grad_norm = 0.5
        optimizer = "adamw-8bit"
        dtype = "float32"
        [parallel]
        shard = 8
        replicate = 2
        sequence = 4
        max_tokens_per_microbatch = 1024
        recompute = "block"
        cpu_offload = "optimizer"
        hang_seconds = 60
        [checkpoint]
        save_steps = 5
        save_total_limit = 1
        [log]
        report_to = ["wandb", "tensorboard"]
        logging_steps = 2
        eval_steps = 3
        eval_tasks = ["gsm8k", "mine.jsonl"]
        eval_limit = 4
        eval_max_new_tokens = 64
        eval_prompt = "sky-t1"
        """,
    )
    values = flat(config.model_dump(mode="json"))
    assert {key for key, default in KEYS_AND_DEFAULTS.items() if values[key] == default} == {"data.eval_fraction"}
    assert [source.label for source in config.data.train] == ["a.jsonl", "second"]
    assert config.train.batch_sequences is None
    assert config.tuning.target_modules == ("q_proj", "v_proj")  # in the model's order


def test_a_single_path_stands_for_a_list_of_one(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL.replace('["train.jsonl"]', '"train.jsonl"') + 'eval = "held_out.jsonl"\n')
    assert config.data.train == [DataSource(path="train.jsonl")]
    assert config.data.eval == [DataSource(path="held_out.jsonl")]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 128 / 64), (True, 128 / 64**0.5)])
def test_scale_of_the_low_rank_product(rslora: bool, scale: float, tmp_path: Path) -> None:
    config = load(tmp_path, with_lines("tuning", f"use_rslora = {str(rslora).lower()}"))
    assert config.tuning.lora_scale == scale
    assert config.tuning.target_modules == PROJECTIONS


def test_config_cannot_be_changed_after_it_was_checked(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.max_steps = 5


# What there is not


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("", "model_name_or_pth", "model_name_or_path"),
        ("", "sed", "seed"),
        ("", "learning_rate", "train.learning_rate"),
        ("", "trian", "train"),
        ("data", "max_lenght", "data.max_length"),
        ("data", "overlng", "data.overlong"),
        ("tuning", "lora_alfa", "tuning.lora_alpha"),
        ("tuning", "lora_target_module", "tuning.lora_target_modules"),
        ("train", "learning_rte", "train.learning_rate"),
        ("train", "warmup_ratios", "train.warmup_ratio"),
        ("train", "save_steps", "checkpoint.save_steps"),
        ("parallel", "max_token_per_microbatch", "parallel.max_tokens_per_microbatch"),
        ("checkpoint", "save_step", "checkpoint.save_steps"),
        ("log", "report_too", "log.report_to"),
    ],
)
def test_unknown_key_is_named_with_its_file_and_the_nearest_valid_key(section: str, key: str, nearest: str, tmp_path: Path) -> None:
    dotted = f"{section}.{key}" if section else key
    assert refused(tmp_path, with_lines(section, f"{key} = 1")) == f"run.toml: unknown key {dotted}; did you mean {nearest}?"
    assert refused(tmp_path, MINIMAL, f"{dotted}=1") == f"run.toml: unknown key {dotted}; did you mean {nearest}?"


@pytest.mark.parametrize(("foreign", "ours"), FOREIGN_NAMES.items())
def test_what_other_trainers_call_it_is_named_and_not_accepted(foreign: str, ours: str, tmp_path: Path) -> None:
    assert ours in KEYS_AND_DEFAULTS
    section = ours.rpartition(".")[0]
    dotted = f"{section}.{foreign}" if section else foreign
    assert refused(tmp_path, with_lines(section, f"{foreign} = 1")) == f"run.toml: unknown key {dotted}; here it is called {ours}"


def test_unknown_key_of_a_data_source_is_named_with_the_valid_ones(tmp_path: Path) -> None:
    text = MINIMAL.replace('"train.jsonl"', '{path = "train.jsonl", wieght = 2.0}')
    message = "run.toml: unknown key data.train.0.wieght; valid: path split weight name (did you mean weight?)"
    assert refused(tmp_path, text) == message


def test_unknown_section_is_an_unknown_key(tmp_path: Path) -> None:
    assert refused(tmp_path, with_lines("lora", "r = 8")).startswith("run.toml: unknown key lora; did you mean ")


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir", "data.train"])
def test_missing_key_is_named(key: str, tmp_path: Path) -> None:
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(key.rpartition(".")[2]))
    assert refused(tmp_path, text) == f"run.toml: {key} is missing; set it in the file or as {key}=... on the command line"


def test_missing_section_is_a_missing_key(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL.partition("[data]")[0])
    assert message == "run.toml: data.train is missing; set it in the file or as data.train=... on the command line"


# Bad values


@pytest.mark.parametrize(
    ("section", "line", "found", "allowed"),
    [
        ("", "seed = -1", "-1", ">= 0 and < 4294967296"),
        ("", "seed = 4294967296", "4294967296", ">= 0 and < 4294967296"),
        ("data", "max_length = 1", "1", ">= 2"),
        ("data", "eval_fraction = 1.0", "1.0", ">= 0.0 and < 1.0"),
        ("data", "eval_fraction = -0.1", "-0.1", ">= 0.0 and < 1.0"),
        ("tuning", "lora_r = 0", "0", ">= 1 and <= 4096"),
        ("tuning", "lora_r = 4097", "4097", ">= 1 and <= 4096"),
        ("tuning", "lora_alpha = 0", "0", "> 0.0"),
        ("tuning", "lora_dropout = 1.0", "1.0", ">= 0.0 and < 1.0"),
        ("train", "batch_sequences = 0", "0", ">= 1"),
        ("train", "batch_tokens = 0", "0", ">= 1"),
        ("train", "num_train_epochs = 0", "0", "> 0.0"),
        ("train", "max_steps = -2", "-2", ">= -1"),
        ("train", "learning_rate = 0", "0", "> 0.0"),
        ("train", "learning_rate = -1e-4", "-0.0001", "> 0.0"),
        ("train", "warmup_ratio = 1.5", "1.5", ">= 0.0 and <= 1.0"),
        ("train", "weight_decay = -1", "-1", ">= 0.0"),
        ("train", "max_grad_norm = 0", "0", "> 0.0"),
        ("parallel", "shard = -2", "-2", ">= -1"),
        ("parallel", "replicate = 0", "0", ">= 1"),
        ("parallel", "max_tokens_per_microbatch = 1", "1", ">= 2"),
        ("checkpoint", "save_steps = 0", "0", ">= 1"),
        ("checkpoint", "save_total_limit = 0", "0", ">= 1"),
        ("log", "logging_steps = 0", "0", ">= 1"),
        ("log", "eval_steps = -1", "-1", ">= 0"),
        ("log", "eval_limit = 0", "0", ">= 1"),
        ("log", "eval_max_new_tokens = 0", "0", ">= 1"),
    ],
)
def test_number_out_of_range_is_named_with_the_range(section: str, line: str, found: str, allowed: str, tmp_path: Path) -> None:
    key = f"{section}.{line.split()[0]}".removeprefix(".")
    assert refused(tmp_path, with_lines(section, line)) == f"run.toml: {key}: got {found}; allowed is {allowed}"


@pytest.mark.parametrize(
    ("section", "key", "choices"),
    [
        ("", "attn_implementation", ["auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"]),
        ("", "kernels", ["auto", "triton", "torch"]),
        ("data", "format", ["auto", "messages", "sharegpt", "prompt-completion"]),
        ("data", "overlong", ["error", "drop", "truncate"]),
        ("data", "train_on", ["assistant", "last-assistant", "all"]),
        ("data", "on_bad_record", ["error", "skip"]),
        ("data", "control_tokens", ["reject", "text"]),
        ("tuning", "method", ["lora", "full"]),
        ("train", "lr_scheduler_type", ["cosine", "linear", "constant"]),
        ("train", "optimizer", ["adamw", "adamw-8bit"]),
        ("train", "dtype", ["bfloat16", "float32"]),
        ("parallel", "recompute", ["none", "block", "full", "auto"]),
        ("parallel", "cpu_offload", ["none", "activations", "optimizer", "parameters"]),
    ],
)
def test_unknown_choice_is_named_with_all_choices(section: str, key: str, choices: list[str], tmp_path: Path) -> None:
    dotted = f"{section}.{key}".removeprefix(".")
    message = refused(tmp_path, with_lines(section, f'{key} = "other"'))
    assert message.startswith(f'run.toml: {dotted}: got "other"; input should be ')
    assert [choice for choice in choices if f"'{choice}'" not in message] == []
    for choice in choices:
        load(tmp_path, with_lines(section, f'{key} = "{choice}"'))


@pytest.mark.parametrize("degree", [0, 3, 16])
def test_sequence_degree_is_one_that_divides_heads(degree: int, tmp_path: Path) -> None:
    message = refused(tmp_path, with_lines("parallel", f"sequence = {degree}"))
    assert message == f"run.toml: parallel.sequence: got {degree}; input should be 1, 2, 4 or 8"


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", 'learning_rate = "1e-4"', 'train.learning_rate: got "1e-4"; input should be a valid number'),
        ("train", "learning_rate = nan", "train.learning_rate: got NaN; input should be a finite number"),
        ("train", "learning_rate = inf", "train.learning_rate: got Infinity; input should be a finite number"),
        ("train", "batch_sequences = 1.5", "train.batch_sequences: got 1.5; input should be a valid integer"),
        ("train", "max_steps = 8.0", "train.max_steps: got 8.0; input should be a valid integer"),
        ("", "seed = true", "seed: got true; input should be a valid integer"),
        ("tuning", "use_rslora = 1", "tuning.use_rslora: got 1; input should be a valid boolean"),
        ("data", "system_prompt = 5", "data.system_prompt: got 5; input should be a valid string"),
        ("log", 'report_to = "wandb"', 'log.report_to: got "wandb"; input should be a valid list'),
        ("", "tuning = 3", "tuning: got 3; use a table, [tuning]"),
        ("train", "max_steps = 0", "train.max_steps: got 0; use -1 for whole epochs or a number of steps from 1"),
    ],
)
def test_value_of_a_wrong_type_is_named(section: str, line: str, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, with_lines(section, line)) == f"run.toml: {message}"


@pytest.mark.parametrize("value", ["5", "[5]", '["a.jsonl", 5]', "true"])
def test_data_that_is_no_path_is_refused(value: str, tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL.replace('["train.jsonl"]', value))
    assert message.endswith('give paths, or tables such as {path = "data.jsonl", weight = 2.0}')
    assert "data.train: got " in message


@pytest.mark.parametrize("value", ["[]", '[""]', "[{weight = 1.0}]", '[{path = "a", weight = 0.0}]'])
def test_empty_data_is_refused(value: str, tmp_path: Path) -> None:
    assert "run.toml: data.train" in refused(tmp_path, MINIMAL.replace('["train.jsonl"]', value))


@pytest.mark.parametrize("value", ['"q_proj"', "[]", "[1]", '["q_porj"]', "3"])
def test_bad_target_modules_are_named_with_the_valid_ones(value: str, tmp_path: Path) -> None:
    message = refused(tmp_path, with_lines("tuning", f"lora_target_modules = {value}"))
    assert message.startswith(f"run.toml: tuning.lora_target_modules: got {value}; ")
    assert "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj" in message
    assert "\n" not in message


def test_misspelt_target_module_is_named_with_the_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, with_lines("tuning", 'lora_target_modules = ["k_proj", "dwon_proj"]'))
    assert '"dwon_proj" is no projection of the model (did you mean down_proj?)' in message


def test_two_sizes_of_a_step_exclude_each_other(tmp_path: Path) -> None:
    message = refused(tmp_path, with_lines("train", "batch_sequences = 8", "batch_tokens = 1000"))
    assert message == "run.toml: train.batch_sequences and train.batch_tokens both say how large a step is; keep one"
    by_tokens = load(tmp_path, with_lines("train", "batch_tokens = 1000")).train
    assert (by_tokens.batch_sequences, by_tokens.batch_tokens) == (None, 1000)


def test_two_ways_to_hold_out_exclude_each_other(tmp_path: Path) -> None:
    message = refused(tmp_path, with_lines("data", 'eval = ["b.jsonl"]', "eval_fraction = 0.1"))
    assert message == "run.toml: data.eval and data.eval_fraction both say what is held out; keep one"


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    text = with_lines("train", "learning_rate = 0", "epochs = 3") + "[log]\neval_steps = -1\n[tuning]\nmethod = 'qlora'\n"
    lines = refused(tmp_path, text).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("run.toml: ") for line in lines)


# Files and overrides


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    for path, words in ((missing, "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=words) as error:
            load_config(path)
        assert str(error.value).startswith(f"{path}: cannot be read as a config")
    (tmp_path / "latin.toml").write_bytes('output_dir = "é"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as a config"):
        load_config(tmp_path / "latin.toml")


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "\n[train\n")
    assert message.startswith("run.toml: is not valid TOML: ")
    assert "line 8" in message


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),
        ("train.learning_rate = 2e-4", "train.learning_rate", 2e-4),
        ("tuning.use_rslora=true", "tuning.use_rslora", True),
        ('output_dir="runs/two"', "output_dir", "runs/two"),
        ("output_dir=runs/two", "output_dir", "runs/two"),
        ("output_dir=runs/a=b", "output_dir", "runs/a=b"),
        ("output_dir=/runs/run 1", "output_dir", "/runs/run 1"),
        ("data.system_prompt=", "data.system_prompt", ""),
        ("data.overlong=drop", "data.overlong", "drop"),
        ('log.report_to=["wandb"]', "log.report_to", ["wandb"]),
        ("data.train=b.jsonl", "data.train", [{"path": "b.jsonl", "split": "train", "weight": 1.0, "name": ""}]),
        ('data.train={path="b", weight=2.0}', "data.train", [{"path": "b", "split": "train", "weight": 2.0, "name": ""}]),
    ],
)
def test_override_beats_the_file(override: str, key: str, value: object, tmp_path: Path) -> None:
    config = load(tmp_path, with_lines("", "seed = 1"), override)
    assert flat(config.model_dump(mode="json"))[key] == value


def test_last_override_wins_and_overrides_can_complete_a_file(tmp_path: Path) -> None:
    config = load(tmp_path, "", "model_name_or_path=m", "output_dir=o", "data.train=a.jsonl", "seed=1", "seed=2")
    assert (config.model_name_or_path, config.output_dir, config.seed) == ("m", "o", 2)


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "data.=1", ".seed=1", ""])
def test_override_that_is_no_assignment_is_refused(override: str, tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL, override)
    assert message == f'override "{override}": use key=value, for example train.learning_rate=2e-4'


def test_override_into_a_value_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, with_lines("", "seed = 1"), "seed.x=1") == 'override "seed.x=1": seed is a value, not a table'
    assert refused(tmp_path, MINIMAL, "data.train.0=x") == 'override "data.train.0=x": train is a value, not a table'


# The way back


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
SOURCES = st.fixed_dictionaries(
    {"path": TEXTS},
    optional={"split": TEXTS, "weight": st.floats(min_value=0.0, max_value=1000.0, exclude_min=True), "name": TEXTS},
)
CONFIGS = st.fixed_dictionaries(
    {
        "model_name_or_path": TEXTS,
        "output_dir": TEXTS,
        "data": st.fixed_dictionaries(
            {"train": st.lists(SOURCES | TEXTS, min_size=1, max_size=3)},
            optional={
                "eval": st.lists(SOURCES, max_size=2),
                "max_length": st.integers(2, 2**40),
                "overlong": st.sampled_from(["error", "drop", "truncate"]),
                "system_prompt": TEXTS,
            },
        ),
        "tuning": st.fixed_dictionaries(
            {},
            optional={
                "lora_r": st.integers(1, 4096),
                "lora_alpha": POSITIVE | st.integers(1, 1000),
                "lora_target_modules": st.just("all-linear") | st.lists(st.sampled_from(PROJECTIONS), min_size=1),
                "use_rslora": st.booleans(),
            },
        ),
        "train": st.fixed_dictionaries({}, optional={"batch_sequences": st.integers(1, 2**40), "learning_rate": POSITIVE})
        | st.fixed_dictionaries({"batch_tokens": st.integers(1, 2**40)}, optional={"weight_decay": st.floats(0.0, 1e300)}),
        "log": st.fixed_dictionaries(
            {},
            optional={
                "report_to": st.lists(st.sampled_from(["tensorboard", "wandb", "trackio", "mlflow"])),
                "eval_tasks": st.lists(TEXTS, max_size=3),
                "eval_limit": st.integers(1, 2**40),
            },
        ),
    },
    optional={"seed": st.integers(0, 2**32 - 1), "revision": TEXTS, "kernels": st.sampled_from(["auto", "triton", "torch"])},
)


@given(CONFIGS)
def test_resolved_file_loads_back_equal(values: dict[str, Any]) -> None:
    config = parse_config(values, origin="made up")
    again = parse_config(tomllib.loads(config.to_toml()), origin="written back")
    assert again == config
    assert again.sha256 == config.sha256
    assert again.identity() == config.identity()
    assert again.to_toml() == config.to_toml()


def test_hash_tells_configs_apart_and_identity_only_what_is_learned(tmp_path: Path) -> None:
    one = load(tmp_path, MINIMAL)
    for override in ("seed=1", "train.batch_tokens=9", "data.train=b.jsonl", "tuning.lora_alpha=1.0"):
        other = load(tmp_path, MINIMAL, override)
        assert other.sha256 != one.sha256
        assert other.identity() != one.identity()
    for override in (
        "output_dir=o",
        "log.eval_steps=5",
        'log.eval_tasks=["gsm8k"]',
        "checkpoint.save_steps=5",
        "parallel.shard=8",
        "kernels=torch",
    ):
        other = load(tmp_path, MINIMAL, override)
        assert other.sha256 != one.sha256
        assert other.identity() == one.identity()


# The configs that come with it


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_config_that_comes_along_loads(path: Path) -> None:
    of_any_model = path.name in ("tiny.toml", "clock.toml", "clock_base.toml")
    load_config(path, ["model_name_or_path=m", "data.train=a.jsonl", "output_dir=o"] if of_any_model else [])


def test_tiny_config_needs_three_keys_and_no_more() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TINY_CONFIG)
    missing = [line.split()[1] for line in str(error.value).splitlines()]
    assert missing == ["model_name_or_path", "output_dir", "data.train"]


@pytest.mark.parametrize(("key", "value", "other"), [("batch_tokens", 5000, "batch_sequences"), ("batch_sequences", 3, "batch_tokens")])
def test_batch_size_of_the_command_line_beats_the_other_one_of_the_file(tmp_path: Path, key: str, value: int, other: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'model_name_or_path = "m"\noutput_dir = "o"\n[data]\ntrain = ["a.jsonl"]\n[train]\n{other} = 8\n')
    train = load_config(path, [f"train.{key}={value}"]).train
    assert (getattr(train, key), getattr(train, other)) == (value, None)
    with pytest.raises(ConfigError, match="both say how large a step is"):
        load_config(path, [f"train.{key}={value}", f"train.{other}=8"])
