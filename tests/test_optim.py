"""The optimizer: AdamW of the textbook, wherever its state lies, and a learning rate that is a function of the step alone."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from structcot.config import TrainConfig
from structcot.errors import ConfigError
from structcot.optim import block_size, learning_rate, make_optimizer
from tests.one_step import REORDERED, ROUNDED, assert_near
from tests.ranks import on_ranks

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: nothing of adamw-8bit is tested"
)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1.0, *(0.5 * (1.0 + math.cos(math.pi * step / 8)) for step in range(8))]),
    ],
)
def test_a_rate_warms_up_from_its_first_step_and_decays_to_zero_after_the_last(name: str, rates: list[float]) -> None:
    config = train(lr_scheduler_type=name, warmup_ratio=0.2, learning_rate=3.0)
    assert [learning_rate(config, step, 10) / 3.0 for step in range(10)] == pytest.approx(rates)
    assert learning_rate(config, 10, 10) == pytest.approx(3.0 if name == "constant" else 0.0)


@pytest.mark.parametrize(
    ("ratio", "num_steps", "warmup_steps"), [(0.0, 10, 0), (0.1, 10, 1), (0.1, 11, 2), (0.1, 1, 1), (1.0, 4, 4), (0.01, 20, 1)]
)
def test_warm_up_takes_its_share_of_the_steps_rounded_up(ratio: float, num_steps: int, warmup_steps: int) -> None:
    config = train(warmup_ratio=ratio, learning_rate=1.0, lr_scheduler_type="constant")
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert rates == [min(1.0, (step + 1) / max(1, warmup_steps)) for step in range(num_steps)]


def test_no_step_is_made_at_rate_zero() -> None:
    for num_steps in range(1, 40):
        assert min(learning_rate(train(warmup_ratio=0.1), step, num_steps) for step in range(num_steps)) > 0.0


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_a_step_is_that_of_adamw_written_out(offload: bool) -> None:
    parameters = make_parameters(matrix=(4, 3), vector=(5,))
    optimizer = make_optimizer(parameters, train(weight_decay=0.1, learning_rate=1e-2), offload=offload)
    wanted = {name: parameter.detach().double() for name, parameter in parameters.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in wanted.items()} for _ in range(2))
    for step in range(1, 6):
        rate = 1e-2 / step
        give_gradients(parameters, step)
        for name, parameter in parameters.items():
            gradient = parameter.grad.double()  # type: ignore[union-attr]
            wanted[name] = wanted[name] * (1.0 - rate * (0.1 if name == "matrix" else 0.0))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            size = (second[name] / (1.0 - 0.999**step)).sqrt() + 1e-8
            wanted[name] = wanted[name] - rate * first[name] / (1.0 - 0.9**step) / size
        optimizer.step(rate)
    assert_near({name: parameter.detach() for name, parameter in parameters.items()}, wanted, ROUNDED)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_state_is_there_before_the_first_step_under_the_names_of_the_parameters(offload: bool) -> None:
    tensors = make_optimizer(make_parameters(a=(4, 3), b=(5,)), train(), offload=offload).tensors()
    shapes = {"a.step": (), "a.exp_avg": (4, 3), "a.exp_avg_sq": (4, 3), "b.step": (), "b.exp_avg": (5,), "b.exp_avg_sq": (5,)}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes
    assert not any(value.any() or value.requires_grad for value in tensors.values())
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_zero_grad_leaves_no_gradient() -> None:
    parameters = make_parameters(a=(4, 3), b=(5,))
    give_gradients(parameters, 1)
    make_optimizer(parameters, train()).zero_grad()
    assert [parameter.grad for parameter in parameters.values()] == [None, None]


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_matrices_alone_decay(offload: bool) -> None:
    parameters = make_parameters(matrix=(2, 2), vector=(2,), tensor=(2, 2, 2))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = make_optimizer(parameters, train(weight_decay=0.25), offload=offload)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, kept in (("matrix", 0.875), ("vector", 1.0), ("tensor", 0.875)):
        assert torch.equal(parameters[name], before[name] * kept), name


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_what_has_no_gradient_stays(offload: bool) -> None:
    parameters = make_parameters(a=(4, 3), b=(5,))
    optimizer = make_optimizer(parameters, train(weight_decay=0.1), offload=offload)
    give_gradients(parameters, 1)
    optimizer.step(1e-2)  # leaves a gradient in the host's buffer, which the next step must not use
    before = {name: value.detach().clone() for name, value in {**parameters, **optimizer.tensors()}.items()}
    give_gradients(parameters, 2)
    parameters["a"].grad = None
    optimizer.step(1e-2)
    after = {**parameters, **optimizer.tensors()}
    assert {name for name in before if not torch.equal(after[name], before[name])} == {"b", "b.step", "b.exp_avg", "b.exp_avg_sq"}


def test_what_is_trained_must_be_fp32() -> None:
    with pytest.raises(TypeError, match=r"a is torch.bfloat16; .* must be torch.float32"):
        make_optimizer({"a": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}, train())


# In host memory


def test_in_host_memory_every_bit_is_the_same() -> None:
    parameters = make_parameters(matrix=(37, 53), vector=(101,), one=(1,), none=(0, 4))
    others = copy.deepcopy(parameters)
    here, there = make_optimizer(parameters, train(weight_decay=0.1)), make_optimizer(others, train(weight_decay=0.1), offload=True)
    for step in range(1, 5):
        for optimizer, trained in ((here, parameters), (there, others)):
            give_gradients(trained, step)
            optimizer.step(1e-2 / step)
        assert_same(others, parameters)
        assert_same(there.tensors(), here.tensors())
    assert all(parameter.grad is None for parameter in others.values()), "gradients that were copied stay on the device"


def test_parameters_and_host_share_no_memory() -> None:
    parameters = make_parameters(a=(4, 3))
    before = parameters["a"].detach().clone()
    make_optimizer(parameters, train(), offload=True)._copies.masters["a"].data.zero_()  # type: ignore[union-attr]
    assert torch.equal(parameters["a"], before)


@pytest.mark.parametrize("saved_by", [False, True], ids=["from-device", "from-host"])
@pytest.mark.parametrize("offload", [False, True], ids=["to-device", "to-host"])
def test_a_run_goes_on_wherever_its_state_is_loaded_to(saved_by: bool, offload: bool) -> None:
    parameters, others = make_parameters(a=(4, 3), b=(5,)), make_parameters(seed=9, a=(4, 3), b=(5,))
    optimizer, other = make_optimizer(parameters, train(), offload=saved_by), make_optimizer(others, train(), offload=offload)
    take_steps(optimizer, parameters, 1, 2)
    saved = {**parameters, **optimizer.tensors()}
    with torch.no_grad():
        for name, tensor in {**others, **other.tensors()}.items():
            tensor.copy_(saved[name])
    other.loaded()
    take_steps(optimizer, parameters, 3, 4)
    take_steps(other, others, 3, 4)
    assert_same({**others, **other.tensors()}, {**parameters, **optimizer.tensors()})


# Sharded


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_two_processes_learn_and_save_what_one_does(offload: bool, tmp_path: Path) -> None:
    on_ranks(2, learn_sharded, tmp_path, {"offload": offload})
    model = Model()
    optimizer, other = (make_optimizer(dict(each.named_parameters()), train(weight_decay=0.1)) for each in (model, Model()))
    learn(model, optimizer, range(1, 4))
    loaded = other.tensors()
    load(loaded, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert_near(loaded, optimizer.tensors(), REORDERED)  # the last elements of a shard take another way through the processor


def learn_sharded(directory: Path, options: Mapping[str, Any]) -> None:
    """Train a model on its own and one that is sharded, save that and go on: in the end all is the same."""
    torch.distributed.init_process_group("gloo")
    size, config = options.get("size", 6), train(weight_decay=0.1, optimizer=options.get("optimizer", "adamw"))
    plain, sharded, other = Model(size), fully_shard(Model(size)), fully_shard(Model(size, seed=9))
    parameters, others = dict(sharded.named_parameters()), dict(other.named_parameters())
    on_its_own = make_optimizer(dict(plain.named_parameters()), config)
    optimizer, fresh = (make_optimizer(each, config, offload=options.get("offload", False)) for each in (parameters, others))
    for parameter in parameters.values():
        parameter._local_tensor = parameter._local_tensor.clone()  # as FSDP2's first forward may, after what moved the parameters
    learn(plain, on_its_own, range(1, 4))
    learn(sharded, optimizer, range(1, 4))
    tensors = optimizer.tensors()
    assert_near(whole(tensors), on_its_own.tensors(), REORDERED)
    assert_near(whole(parameters), dict(plain.named_parameters()), REORDERED)
    for name, value in tensors.items():
        owner, _, key = name.partition(".")
        if key not in ("step", "exp_avg.qmap", "exp_avg_sq.qmap"):
            assert isinstance(value, DTensor), name
            assert value.placements == parameters[owner].placements, name
    save({**tensors, **{name: parameter.data for name, parameter in parameters.items()}}, checkpoint_id=directory / "checkpoint")
    load({**fresh.tensors(), **{name: parameter.data for name, parameter in others.items()}}, checkpoint_id=directory / "checkpoint")
    fresh.loaded()
    learn(sharded, optimizer, range(4, 6))
    learn(other, fresh, range(4, 6))
    assert_same(whole({**others, **fresh.tensors()}), whole({**parameters, **optimizer.tensors()}))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


class Model(nn.Module):
    """Two matrices and two vectors: of `odd` the two halves differ, of `one` a process holds nothing."""

    def __init__(self, size: int = 6, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"odd": (size + 1, size), "even": (size, size), "one": (1, size), "vector": (7,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, rows_TD: Tensor) -> Tensor:
        return (rows_TD @ self.even.T * self.one @ self.odd.T).square().mean() + self.vector.square().sum()


def learn(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(torch.randn(3, model.even.shape[1], generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step(1e-2 / step)
        optimizer.zero_grad()


# In 8 bits


def test_where_torchao_is_missing_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r'train.optimizer: "adamw-8bit" needs the package torchao.*pip install "structcot\[cuda\]"'):
        make_optimizer(make_parameters(a=(4, 3)), train(optimizer="adamw-8bit"))


def test_8_bits_and_host_memory_are_not_for_the_same_run() -> None:
    with pytest.raises(ConfigError, match=r'train.optimizer: "adamw-8bit".*parallel.cpu_offload = "optimizer"'):
        make_optimizer(make_parameters(a=(4, 3)), train(optimizer="adamw-8bit"), offload=True)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 512), 256), ((64, 896), 128), ((64, 576), 64), ((8, 3, 256), 256), ((128, 48), None), ((15, 256), None), ((4096,), None)],
)
def test_blocks_lie_inside_rows(shape: tuple[int, ...], block: int | None) -> None:
    assert block_size(nn.Parameter(torch.empty(shape))) == block


@needs_torchao
def test_state_in_8_bits_is_that_and_small_tensors_keep_theirs() -> None:
    parameters = make_parameters(large=(64, 128), small=(4, 128), vector=(8192,))
    optimizer = make_optimizer(parameters, train(optimizer="adamw-8bit"))
    described = {name: (value.dtype, tuple(value.shape)) for name, value in optimizer.tensors().items()}
    assert described == {
        "large.step": (torch.float32, ()),
        "large.exp_avg.codes": (torch.uint8, (64, 128)),
        "large.exp_avg.scale": (torch.float32, (64, 1)),
        "large.exp_avg.qmap": (torch.float32, (256,)),
        "large.exp_avg_sq.codes": (torch.uint8, (64, 128)),
        "large.exp_avg_sq.scale": (torch.float32, (64, 1)),
        "large.exp_avg_sq.qmap": (torch.float32, (256,)),
        **{f"{name}.step": (torch.float32, ()) for name in ("small", "vector")},
        **{f"small.{key}": (torch.float32, (4, 128)) for key in ("exp_avg", "exp_avg_sq")},
        **{f"vector.{key}": (torch.float32, (8192,)) for key in ("exp_avg", "exp_avg_sq")},
    }


@needs_torchao
@pytest.mark.slow
def test_steps_in_8_bits_follow_those_in_32_and_go_on_from_what_was_saved(tmp_path: Path) -> None:
    sizes = {"large": (64, 128), "vector": (77,)}
    parameters, wanted, others = make_parameters(**sizes), make_parameters(**sizes), make_parameters(seed=9, **sizes)
    optimizer, other = (make_optimizer(each, train(optimizer="adamw-8bit", weight_decay=0.1)) for each in (parameters, others))
    exact = make_optimizer(wanted, train(weight_decay=0.1))
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    take_steps(optimizer, parameters, 1, 2)
    take_steps(exact, wanted, 1, 2)
    moved = {name: parameter.detach() - start[name] for name, parameter in parameters.items()}
    assert_near({"vector": moved["vector"]}, {"vector": wanted["vector"].detach() - start["vector"]}, 1e-3)
    assert_near({"large": moved["large"]}, {"large": wanted["large"].detach() - start["large"]}, 0.05)  # 8 bits of precision at best
    save({**optimizer.tensors(), **parameters}, checkpoint_id=tmp_path, no_dist=True)
    load({**other.tensors(), **{name: parameter.data for name, parameter in others.items()}}, checkpoint_id=tmp_path, no_dist=True)
    other.loaded()
    take_steps(optimizer, parameters, 3, 4)
    take_steps(other, others, 3, 4)
    assert_same({**others, **other.tensors()}, {**parameters, **optimizer.tensors()})


@needs_torchao
@pytest.mark.slow
def test_two_processes_learn_and_save_in_8_bits_what_one_does(tmp_path: Path) -> None:
    on_ranks(2, learn_sharded, tmp_path, {"optimizer": "adamw-8bit", "size": 64})
    config, model = train(weight_decay=0.1, optimizer="adamw-8bit"), Model(64)
    optimizer, other = (make_optimizer(dict(each.named_parameters()), config) for each in (model, Model(64)))
    assert optimizer.tensors()["odd.exp_avg.codes"].shape == (65, 64)
    learn(model, optimizer, range(1, 4))
    loaded = other.tensors()
    load(loaded, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert_near(loaded, optimizer.tensors(), REORDERED)  # the last elements of a shard take another way through the processor


@needs_torchao
@pytest.mark.slow
def test_without_a_compiler_the_step_in_8_bits_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-compiler",))
    parameters = make_parameters(large=(65, 192))
    optimizer = make_optimizer(parameters, train(optimizer="adamw-8bit"))
    give_gradients(parameters, 1)
    with pytest.raises(ConfigError, match=r'(?s)train.optimizer: "adamw-8bit" compiles its step.*use "adamw"'):
        optimizer.step(1e-2)


def make_parameters(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def give_gradients(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(optimizer: Any, parameters: Mapping[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        give_gradients(parameters, step)
        optimizer.step(1e-2 / step)


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Both hold the same names, and under each name the same bits."""
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    differing = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not differing, differing


def train(**values: Any) -> TrainConfig:
    return TrainConfig(**values)
