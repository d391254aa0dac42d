"""The engine vLLM: what it is asked for, and what becomes of its steps. A stand-in plays vLLM; bench/vllm_on_cpu.sh runs the real one."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from structcot.errors import ConfigError, ServerError
from structcot.eval.engine import Engine, Output, Request, Sampling
from structcot.eval.seeds import seed_of
from structcot.eval.vllm_engine import open_vllm
from tests.chat_tokenizers import MISTRAL
from tests.tiny_models import tiny_chat_model

CONTEXT = 64
HELLO = Request(key="task/0", messages=(("user", "Hello"),))


class Dead(Exception):
    """The stand-in's EngineDeadError."""


@dataclass
class StandIn:
    """Plays vLLM's engine: each step writes one token of every request that it holds, the last of which ends it."""

    lengths: dict[str, int] = field(default_factory=dict)
    max_num_seqs: int = 3
    dies_at_step: int = 0
    reason: str = "stop"
    measures: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    vllm_config: Any = None
    engine_core: Any = None
    is_shut_down: bool = False
    added: list[SimpleNamespace] = field(default_factory=list)
    running: dict[str, SimpleNamespace] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    late: list[SimpleNamespace] = field(default_factory=list)
    most_running: int = 0
    steps: int = 0

    def add_request(self, number: str, prompt: dict[str, Any], params: SimpleNamespace, lora_request: Any = None) -> None:
        request = SimpleNamespace(number=number, prompt=prompt["prompt_token_ids"], params=params, lora=lora_request, written=0)
        assert prompt["type"] == "token"
        assert params.max_tokens >= 1
        assert number not in {one.number for one in self.added}
        assert len(request.prompt) + params.max_tokens <= CONTEXT
        self.added.append(request)
        self.running[number] = request
        self.most_running = max(self.most_running, len(self.running))

    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        if self.steps == self.dies_at_step:
            raise Dead("EngineCore encountered an issue")
        outputs, self.late = self.late, []
        for number, request in list(self.running.items()):
            request.written += 1
            length = self.lengths.get(number, 2)
            is_finished = request.written >= min(length, request.params.max_tokens)
            if is_finished:
                del self.running[number]
            outputs.append(self._output(request, is_finished, self.reason if request.written == length else "length"))
        return outputs

    def _output(self, request: SimpleNamespace, is_finished: bool, reason: str) -> SimpleNamespace:
        written = SimpleNamespace(
            text=f"text {request.number}", token_ids=[5] * request.written, finish_reason=reason if is_finished else None
        )
        times = SimpleNamespace(scheduled_ts=100.0, last_token_ts=100.0 + request.written) if self.measures else None
        return SimpleNamespace(
            request_id=request.number, finished=is_finished, outputs=[written], prompt_token_ids=request.prompt, metrics=times
        )

    def abort_request(self, numbers: list[str]) -> None:
        if self.dies_at_step and self.steps >= self.dies_at_step:
            raise Dead
        self.aborted += numbers
        for number in numbers:
            self.late.append(self._output(self.running.pop(number), True, "abort"))


def install(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in the place of the package."""

    def llm(**options: Any) -> SimpleNamespace:
        engine.options = options
        if options.get("tensor_parallel_size") == 99:
            raise ValueError("no 99 GPUs")
        engine.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=options.get("max_model_len", CONTEXT)),
            scheduler_config=SimpleNamespace(max_num_seqs=engine.max_num_seqs),
        )
        engine.engine_core = SimpleNamespace(shutdown=lambda: setattr(engine, "is_shut_down", True))
        return SimpleNamespace(llm_engine=engine)

    members: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": llm, "SamplingParams": SimpleNamespace},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda *given: given},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": Dead},
    }
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    install(stand_in, monkeypatch)
    return stand_in


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny")


def asks(number: int) -> list[Request]:
    return [Request(key=f"task/{index}", messages=(("user", f"{index}"),)) for index in range(number)]


def collect(outputs: Iterator[Output]) -> tuple[list[Output], ServerError | None]:
    kept: list[Output] = []
    try:
        for output in outputs:
            kept.append(output)
    except ServerError as error:
        return kept, error
    return kept, None


def adapter_in(directory: Path, **changes: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 16, "rank_pattern": {}, "modules_to_save": None} | changes))
    return str(directory)


def test_the_model_is_opened_as_it_was_asked_for(vllm: StandIn, model_dir: Path) -> None:
    open_vllm(str(model_dir), dtype="float32", max_model_len=50, tensor_parallel_size=2, gpu_memory_utilization=0.5, enforce_eager=True)
    assert vllm.options == {
        "model": str(model_dir),
        "dtype": "float32",
        "max_model_len": 50,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    open_vllm(str(model_dir))
    assert "max_model_len" not in vllm.options


def test_a_prompt_is_the_tokens_of_the_chat_template(vllm: StandIn, model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    turns = (("system", "Be brief."), ("user", "2 + 2?"))
    requests = [Request(key="chat", messages=turns), Request(key="plain", prompt="2 + 2 is")]
    outputs = list(open_vllm(str(model_dir))(requests, Sampling(max_new_tokens=4)))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(vllm.added[0].prompt) == expected
    assert tokenizer.decode(vllm.added[1].prompt) == "2 + 2 is"
    assert [output.prompt_tokens for output in outputs] == [len(request.prompt) for request in vllm.added]


def test_sampling_is_handed_over_as_vllm_calls_it(vllm: StandIn, model_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    engine = open_vllm(str(model_dir))
    list(engine([HELLO], Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=7, stop=("END", "<|eot_id|>", ""))))
    list(engine([HELLO], Sampling(max_new_tokens=7)))
    sampled, greedy = (vars(request.params) for request in vllm.added)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sampled == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_tokens": 7,
        "stop": ["END"],
        "stop_token_ids": sorted([end, tokenizer.convert_tokens_to_ids("<|eot_id|>")]),
        "seed": seed_of(HELLO),
    }
    assert (greedy["temperature"], greedy["top_k"], greedy["seed"], greedy["stop"]) == (0.0, -1, None, [])
    assert greedy["stop_token_ids"] == [end]


def test_an_output_is_what_was_written_and_how_long_it_took(vllm: StandIn, model_dir: Path) -> None:
    vllm.lengths = {"0": 3}
    (output,) = open_vllm(str(model_dir))([HELLO], Sampling(max_new_tokens=9))
    prompt_tokens = len(vllm.added[0].prompt)
    assert output == Output(
        key="task/0", text="text 0", finish_reason="stop", prompt_tokens=prompt_tokens, completion_tokens=3, seconds=3.0
    )


def test_the_time_is_taken_here_where_vllm_measures_none(vllm: StandIn, model_dir: Path) -> None:
    vllm.measures = False
    (output,) = open_vllm(str(model_dir))([HELLO], Sampling(max_new_tokens=9))
    assert 0 < output.seconds < 10


def test_outputs_come_as_they_are_finished_while_as_many_are_written_as_may_be(vllm: StandIn, model_dir: Path) -> None:
    vllm.lengths = {"0": 6, "1": 2, "2": 1, "3": 1, "4": 1}
    outputs = list(open_vllm(str(model_dir))(asks(5), Sampling(max_new_tokens=10)))
    assert [output.key for output in outputs] == ["task/2", "task/1", "task/3", "task/4", "task/0"]
    assert [output.text for output in outputs] == ["text 2", "text 1", "text 3", "text 4", "text 0"]
    assert vllm.most_running == 3
    assert vllm.steps == 6


def test_a_prompt_that_leaves_no_room_is_refused_and_the_others_are_answered(vllm: StandIn, model_dir: Path) -> None:
    long = [Request(key=f"long/{number}", prompt=" 1 2" * 40) for number in range(7)]
    outputs = list(open_vllm(str(model_dir))([*long, *asks(2), Request(key="none")], Sampling(max_new_tokens=10)))
    refused = [output for output in outputs if output.finish_reason == "refused"]
    assert [output.key for output in refused] == [*(request.key for request in long), "none"]
    assert refused[0].reason == f"the prompt has {refused[0].prompt_tokens} tokens, the context 64"
    assert refused[0].prompt_tokens >= CONTEXT
    assert refused[-1].reason == "the prompt has no tokens"
    assert {output.key for output in outputs} - {output.key for output in refused} == {"task/0", "task/1"}


def test_one_token_of_room_is_enough(vllm: StandIn, model_dir: Path) -> None:
    requests = [Request(key=str(length), prompt="1" * length) for length in (CONTEXT - 1, CONTEXT)]
    outputs = {output.key: output for output in open_vllm(str(model_dir))(requests, Sampling(max_new_tokens=10))}
    assert {key: output.prompt_tokens for key, output in outputs.items()} == {"63": 63, "64": 64}
    assert {key: (output.finish_reason, output.completion_tokens) for key, output in outputs.items()} == {
        "63": ("length", 1),
        "64": ("refused", 0),
    }


def test_an_output_ends_where_the_context_does(vllm: StandIn, model_dir: Path) -> None:
    vllm.lengths = {"0": 1000}
    (output,) = open_vllm(str(model_dir))([HELLO], Sampling(max_new_tokens=32768))
    assert output.finish_reason == "length"
    assert output.prompt_tokens + output.completion_tokens == CONTEXT


def test_what_nobody_waits_for_any_more_is_aborted(vllm: StandIn, model_dir: Path) -> None:
    vllm.lengths = {"0": 1}
    engine = open_vllm(str(model_dir))
    outputs = engine(asks(9), Sampling(max_new_tokens=10))
    assert next(outputs).key == "task/0"
    outputs.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert vllm.aborted == ["1", "2"]
    assert [output.key for output in engine(asks(1), Sampling(max_new_tokens=10))] == ["task/0"]


def test_vllm_is_shut_down_when_nobody_can_ask_it_any_more_and_not_before(vllm: StandIn, model_dir: Path) -> None:
    outputs = open_vllm(str(model_dir))(asks(5), Sampling(max_new_tokens=10))
    next(outputs)
    gc.collect()
    assert not vllm.is_shut_down
    assert len(list(outputs)) == 4
    del outputs
    gc.collect()
    assert vllm.is_shut_down


def test_an_engine_that_dies_ends_the_run_after_what_was_finished(vllm: StandIn, model_dir: Path) -> None:
    vllm.lengths, vllm.dies_at_step = {"0": 1, "1": 9, "2": 9}, 2
    outputs, error = collect(open_vllm(str(model_dir))(asks(3), Sampling(max_new_tokens=10)))
    assert [output.key for output in outputs] == ["task/0"]
    assert "vllm has ended" in str(error)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_vllm_gave_up_is_no_output(reason: str, vllm: StandIn, model_dir: Path) -> None:
    vllm.reason = reason
    outputs, error = collect(open_vllm(str(model_dir))(asks(1), Sampling(max_new_tokens=10)))
    assert not outputs
    assert f"vllm ended task/0 with '{reason}'" in str(error)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (16, 16), (64, 64), (100, 128), (257, 320), (512, 512)])
def test_an_adapter_goes_in_unmerged_with_a_rank_that_vllm_takes(
    rank: int, allowed: int, vllm: StandIn, model_dir: Path, tmp_path: Path
) -> None:
    adapter = adapter_in(tmp_path, r=rank)
    list(open_vllm(str(model_dir), adapter=adapter)(asks(1), Sampling(max_new_tokens=4)))
    assert (vllm.options["enable_lora"], vllm.options["max_lora_rank"]) == (True, allowed)
    assert vllm.added[0].lora == ("adapter", 1, adapter)


def test_no_adapter_means_none(vllm: StandIn, model_dir: Path) -> None:
    list(open_vllm(str(model_dir))(asks(1), Sampling(max_new_tokens=4)))
    assert "enable_lora" not in vllm.options
    assert vllm.added[0].lora is None


def test_the_largest_rank_of_an_adapter_counts(vllm: StandIn, model_dir: Path, tmp_path: Path) -> None:
    open_vllm(str(model_dir), adapter=adapter_in(tmp_path, r=8, rank_pattern={"q_proj": 40}))
    assert vllm.options["max_lora_rank"] == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 513}, "has rank 513, and vLLM takes at most 512; merge it"),
        ({"use_dora": True}, "use_dora = true, which vLLM does not apply; merge it"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\]'),
        ({"r": None}, "no config of a LoRA adapter"),
        ({"rank_pattern": []}, None),
    ],
)
def test_an_adapter_that_vllm_cannot_apply_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], words: str | None, vllm: StandIn, model_dir: Path, tmp_path: Path
) -> None:
    adapter = adapter_in(tmp_path, **changes)
    if words is None:
        open_vllm(str(model_dir), adapter=adapter)
        return
    with pytest.raises(ConfigError, match=words):
        open_vllm(str(model_dir), adapter=adapter)
    assert not vllm.options


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_a_broken_adapter_config_is_named(text: str, vllm: StandIn, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"adapter_config\.json is no config of a LoRA adapter"):
        open_vllm(str(model_dir), adapter=str(tmp_path))
    with pytest.raises(ConfigError, match=r"adapter_config\.json is no config of a LoRA adapter"):
        open_vllm(str(model_dir), adapter=str(tmp_path / "nowhere"))


def test_without_vllm_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vllm is not installed; pip install structcot\[vllm\].*docs/engines.md"):
        open_vllm(str(model_dir))


def test_what_vllm_refuses_to_open_is_a_mistake_of_the_user(vllm: StandIn, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm cannot open .*: no 99 GPUs"):
        open_vllm(str(model_dir), tensor_parallel_size=99)


def test_a_template_that_refuses_the_messages_is_a_mistake_of_the_user(vllm: StandIn, model_dir: Path, tmp_path: Path) -> None:
    engine = open_vllm(str(tiny_chat_model(tmp_path, template=MISTRAL)))
    system = Request(key="task/7", messages=(("system", "Be brief."), ("user", "Hello")))
    with pytest.raises(ConfigError, match="the chat template refuses the messages of task/7: only user and assistant roles"):
        list(engine([system], Sampling()))


def test_a_model_without_a_template_takes_plain_prompts_alone(vllm: StandIn, model_dir: Path, tmp_path: Path) -> None:
    directory = tiny_chat_model(tmp_path)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    engine: Engine = open_vllm(str(directory))
    with pytest.raises(ConfigError, match="no chat template"):
        list(engine([HELLO], Sampling()))
    assert len(list(engine([Request(key="a", prompt="b")], Sampling()))) == 1
    assert vllm.added[-1].params.stop_token_ids == []


@settings(max_examples=50)
@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 5), st.integers(1, 8))
def test_every_request_is_answered_once_whatever_the_lengths(
    model_dir: Path, lengths: list[int], max_num_seqs: int, max_new_tokens: int
) -> None:
    stand_in = StandIn(lengths={str(number): length for number, length in enumerate(lengths)}, max_num_seqs=max_num_seqs)
    with pytest.MonkeyPatch.context() as patch:
        install(stand_in, patch)
        outputs = list(open_vllm(str(model_dir))(asks(len(lengths)), Sampling(max_new_tokens=max_new_tokens)))
    assert sorted(output.key for output in outputs) == sorted(request.key for request in asks(len(lengths)))
    for output in outputs:
        length = lengths[int(output.key.removeprefix("task/"))]
        assert output.completion_tokens == min(length, max_new_tokens)
        assert output.finish_reason == ("stop" if length <= max_new_tokens else "length")
    assert stand_in.most_running <= max_num_seqs
