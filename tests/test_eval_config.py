"""The config of an evaluation, from flags, file and overrides, and what is said where it is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from structcot.errors import ConfigError
from structcot.eval.command import read_config
from structcot.eval.config import EvalConfig
from structcot.eval.tasks import find_task

ROOT = Path(__file__).parent.parent


def test_flags_alone_make_a_config() -> None:
    config = read_config((), {"model_name_or_path": "m", "tasks": "aime24, math500", "limit": 3, "adapter": None})
    assert [task.name for task in config.tasks] == ["aime24", "math500"]
    assert (config.model_name_or_path, config.limit, config.engine, config.adapter) == ("m", 3, "transformers", "")
    assert (config.sampling.temperature, config.sampling.num_samples, config.sampling.max_new_tokens) == (0.0, 1, 0)


def test_overrides_beat_flags_and_flags_beat_the_file(tmp_path: Path) -> None:
    path = tmp_path / "eval.toml"
    path.write_text('model_name_or_path = "file"\ntasks = ["aime24"]\nseed = 1\n[sampling]\ntop_p = 0.95\n', encoding="utf-8")
    config = read_config((str(path), "seed=3", "sampling.temperature=0.6"), {"model_name_or_path": "flag"})
    assert (config.model_name_or_path, config.seed, config.sampling.top_p, config.sampling.temperature) == ("flag", 3, 0.95, 0.6)


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [("gsm8k", "gsm8k", ""), ("data/my.set.jsonl", "my.set", "data/my.set.jsonl"), ("gsm8k=x/y.jsonl", "gsm8k", "x/y.jsonl")],
)
def test_a_task_may_be_a_name_a_path_or_both(text: str, name: str, path: str) -> None:
    task = read_config((), {"model_name_or_path": "m", "tasks": text}).tasks[0]
    assert (task.name, task.path) == (name, path)


def test_a_written_config_loads_back() -> None:
    config = read_config(("sampling.stop=['\\n']",), {"model_name_or_path": "m", "tasks": "gsm8k=x/y.jsonl,aime24"})
    assert EvalConfig.model_validate(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"model_name_or_path": "m"}, "tasks: is missing; name some by --tasks"),
        ((), {"tasks": "aime24"}, "model_name_or_path: is missing; name a model, a run, or an adapter"),
        (("seed",), {"tasks": "aime24"}, "seed: cannot be read as a config"),
        (("seed=1", "limit"), {"tasks": "aime24"}, '"limit": is no key=value'),
        (("samplings.top_p=1",), {"tasks": "aime24", "model_name_or_path": "m"}, "unknown key samplings; did you mean sampling?"),
        (("sampling.top_p=1.5",), {"tasks": "aime24", "model_name_or_path": "m"}, "sampling.top_p: got 1.5; allowed is > 0.0 and <= 1.0"),
        (("top_p=0.5",), {"tasks": "aime24", "model_name_or_path": "m"}, "unknown key top_p; did you mean sampling.top_p?"),
        ((), {"tasks": "aime24", "model_name_or_path": "m", "engine": "vlm"}, "engine: got \"vlm\"; input should be 'transformers'"),
        ((), {"tasks": "aime24", "engine": "openai"}, 'engine = "openai" needs server.url and server.model'),
        ((), {"tasks": "a/x.jsonl,b/x.jsonl", "model_name_or_path": "m"}, "tasks: x, x: two have the same name"),
        ((), {"tasks": "no such task", "model_name_or_path": "m"}, "tasks.0.name: got"),
    ],
)
def test_what_is_wrong_is_said_once(arguments: tuple[str, ...], options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(arguments, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.toml")), ids=lambda path: path.name)
def test_the_configs_that_come_with_it_are_right(path: Path) -> None:
    config = read_config((str(path),), {"model_name_or_path": "m"} if path.name == "clock.toml" else {})
    assert all(find_task(task) for task in config.tasks)
