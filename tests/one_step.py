"""One training step in memory, and the comparison of what two ways of making it give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from structcot.checkpoint import CheckpointWriter, TrainState
from structcot.config import Config
from structcot.data.batch import MicroBatch
from structcot.data.loader import Feed
from structcot.data.plan import make_plan
from structcot.data.render import IGNORE, RenderedSample
from structcot.distributed import World
from structcot.model.decoder import Decoder
from structcot.optim import make_optimizer
from structcot.signals import StopFlag
from structcot.start import Run
from structcot.watchdog import Watchdog

# Relative errors that rounding alone may make; what is wrong in substance is wrong by far more.
REORDERED = 1e-6  # the same fp32 terms, added up in another order
# Ranks multiply fewer rows at once, for which the libraries of some processors choose another order in every product: on one with AMX ranks
# are 1.6e-6 off, and one process with other micro-batches 0.4e-6; on another processor both are below 1e-6.
RESHAPED = 2e-6
ROUNDED = 1e-5  # two fp32 computations of the same formula, or one and its value in fp64

ALONE = World()


@dataclass(frozen=True)
class MemoryStore:
    """Samples in memory, read as a SampleStore is."""

    samples: Sequence[RenderedSample]

    @property
    def lengths_S(self) -> np.ndarray:
        return np.array([len(sample.tokens_T) for sample in self.samples])

    @property
    def supervised_S(self) -> np.ndarray:
        return np.array([(sample.labels_T != IGNORE).sum() for sample in self.samples])

    @property
    def origin_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.origin for sample in self.samples))

    def sample(self, index: int) -> RenderedSample:
        return self.samples[index]


def feed_of(
    samples: Sequence[RenderedSample],
    config: Config,
    attention_ratio: float = 0.0,
    dropout_seed: int | None = None,
    world: World = ALONE,
) -> Feed:
    """Plan `samples` as `config` says and lay them into micro-batches."""
    store = MemoryStore(samples)
    return Feed(
        store=store,  # type: ignore[arg-type]
        indices_S=np.arange(len(samples)),
        plan=make_plan(store.lengths_S, config.train, config.seed),
        max_tokens=config.parallel.max_tokens_per_microbatch,
        attention_ratio=attention_ratio,
        device=torch.device("cpu"),
        dropout_seed=dropout_seed,
        rank=world.data_rank,
        num_ranks=world.num_data_ranks,
        share=(world.sequence_rank, world.sequence),
    )


def make_run(model: Decoder, samples: Sequence[RenderedSample], config: Config, world: World = ALONE) -> tuple[Run, TrainState]:
    """Build what `structcot.train.train_step` needs to train `model` on `samples`, and the state before the first step."""
    dropout_seed = config.seed if config.tuning.lora_dropout else None
    feed = feed_of(samples, config, model.spec.attention_ratio, dropout_seed, world)
    run = Run(
        config=config,
        output_dir=Path(config.output_dir),
        device=feed.device,
        world=world,
        prepared=SimpleNamespace(plan=feed.plan),  # type: ignore[arg-type]
        feed=feed,
        model=model,
        optimizer=make_optimizer(model.trained_parameters(), config.train),
        writer=CheckpointWriter(Path(config.output_dir) / "checkpoints", world, keep=1),
        peak_flops=1e12,
        stop=StopFlag(),
        watchdog=Watchdog(0, None, Path(config.output_dir)),
    )
    return run, TrainState(step=0, num_tokens=0, identity=config.identity(), plan_sha256=feed.plan.sha256, weights_sha256="")


def loss_and_gradients(model: Decoder, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Sum of the losses of `batches`, and its gradient by name of the trained parameter, as it stands after all of them."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss_sum, _ = model(batch)
        loss_sum.backward()
        total += loss_sum.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative_error(got: Tensor | float, wanted: Tensor | float) -> float:
    """|got - wanted| / |wanted| in the Frobenius norm, taken in fp64; 0 where they are equal."""
    got_64, wanted_64 = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (got, wanted))
    assert got_64.shape == wanted_64.shape
    if torch.equal(got_64, wanted_64):
        return 0.0
    return float((got_64 - wanted_64).norm() / wanted_64.norm())


def assert_near(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Both hold the same names, and under each name tensors whose relative error is at most `tolerance`; nan never is."""
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    far = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not far, far
