"""The memory of one rank in a training step, found by running the step's real code on tensors without memory.

Forward, backward, clipping and optimizer run under torch's FakeTensorMode with a process group that sends nothing, so a laptop can weigh a
rank of any number of GPUs. The fake tensors say that they lie on a CPU, since FSDP2 asks a GPU for its streams; what runs on them are the
Triton paths of a GPU, whose kernels are not started, or those of a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from structcot.config import Config
from structcot.data.batch import MicroBatch, pack
from structcot.data.render import unmasked_sample
from structcot.ledger import GRADIENTS, HOST, Ledger
from structcot.model.decoder import Decoder
from structcot.model.parts import local_part
from structcot.model.spec import ModelSpec
from structcot.model.weights import empty_model
from structcot.offload import HostMemory, host_empty
from structcot.optim import BLOCK_SIZES, clip_gradients, make_optimizer
from structcot_kernels.launch import HOPPER, backend, skipped_launches, use_backend

CPU = torch.device("cpu")
WEIGHTS, OPTIMIZER = "weights", "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes on the device by kind: at the peak of a step, between steps, and in host memory; and bytes of a micro-batch's collectives."""

    peak_bytes: dict[str, int]
    resting_bytes: dict[str, int]
    host_bytes: int
    collective_bytes: dict[str, int]

    @property
    def peak_total(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.peak_bytes.values())


def predict_memory(spec: ModelSpec, config: Config, lengths: Sequence[int], *, num_ranks: int, recompute: str, triton: bool) -> StepMemory:
    """Weigh the first of `num_ranks` ranks in a step of two micro-batches of documents of these `lengths`, every token with a label.

    Where ranks share a micro-batch, `lengths` are those of all of it. `triton` weighs the kernels of a GPU, else PyTorch's on a CPU.
    """
    with ExitStack() as stack:
        mesh = stack.enter_context(fake_ranks(num_ranks, config.parallel.replicate)) if num_ranks > 1 else None
        stack.enter_context(running(triton))
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        ledger = Ledger(gpu=triton)
        model = empty_model(spec, config, mesh, device="cpu")
        model.recompute, model.attention = recompute, "sdpa"  # whose name runs here; the ledger knows what a GPU's library needs
        offload = config.parallel.cpu_offload
        ledger.register(model.parameters(), HOST if offload == "parameters" else WEIGHTS)
        ledger.register(model.buffers(), WEIGHTS)
        if config.parallel.sequence > 1:
            model.sequence_group = dist.new_group(list(range(config.parallel.sequence)))  # type: ignore[assignment]
        batch = fake_batch(fake, lengths, config)
        with ledger:
            if offload == "activations":
                model.host_memory = HostMemory(CPU, empty=in_host_memory(ledger))
            with ledger.counting_as(HOST if offload in ("optimizer", "parameters") else OPTIMIZER):
                if config.train.optimizer == "adamw-8bit":  # its step is compiled, which fake tensors cannot be run through
                    optimizer, states = None, [eight_bit_state(parameter) for parameter in model.trained_parameters().values()]
                else:
                    optimizer, states = make_optimizer(model.trained_parameters(), config.train, offload=offload == "optimizer"), []
            resting_bytes = dict(ledger.current_bytes)
            for _ in range(2):
                run_microbatch(model, batch, ledger)
            one_microbatch = {kind: size // 2 for kind, size in ledger.collective_bytes.items()}
            clip_gradients(model.trained_parameters().values(), config.train.max_grad_norm)
            if optimizer is not None:
                optimizer.step(config.train.learning_rate)
        del states
        host_bytes = ledger.current_bytes.pop(HOST, 0)
        return StepMemory(
            peak_bytes={kind: size for kind, size in ledger.peak_bytes.items() if size and kind != HOST},
            resting_bytes={kind: size for kind, size in resting_bytes.items() if size and kind != HOST},
            host_bytes=host_bytes,
            collective_bytes=one_microbatch,
        )


def run_microbatch(model: Decoder, batch: MicroBatch, ledger: Ledger) -> None:
    """Forward and backward."""
    loss_sum, _ = model(batch)
    ledger.keep()
    loss_sum.backward()
    ledger.register((parameter.grad for parameter in model.parameters() if parameter.grad is not None), GRADIENTS)


def fake_batch(fake: FakeTensorMode, lengths: Sequence[int], config: Config) -> MicroBatch:
    """A micro-batch of documents of these lengths, of which the first rank takes its slice."""
    documents = [unmasked_sample(np.zeros(length, dtype=np.int64), source="") for length in lengths]
    keys = [0] * len(lengths) if config.tuning.lora_dropout else None
    with torch._C._DisableTorchDispatch():
        batch = pack(documents, CPU, keys, (0, config.parallel.sequence))
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor)}
    return replace(batch, **{name: fake.from_tensor(tensor) for name, tensor in tensors.items()})


def eight_bit_state(parameter: Tensor) -> Tensor:
    """As many bytes as two moments in 8 bits take on this rank: one for each element, and a scale in fp32 for each block of them."""
    num_elements = local_part(parameter).numel()
    return torch.empty(2 * (num_elements + 4 * num_elements // BLOCK_SIZES[0]), dtype=torch.uint8)


@contextmanager
def fake_ranks(num_ranks: int, replicate: int) -> Iterator[DeviceMesh]:
    """The mesh of so many ranks that are not there; this process is the first."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend known, too

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (replicate, num_ranks // replicate), mesh_dim_names=("replicate", "shard"))
        yield mesh if replicate > 1 else mesh["shard"]
    finally:
        dist.destroy_process_group()


@contextmanager
def running(triton: bool) -> Iterator[None]:
    """Operations take the way of a GPU, or that of a CPU."""
    chosen = backend()
    use_backend("triton" if triton else "torch")
    try:
        with ExitStack() as stack:
            if triton:
                stack.enter_context(skipped_launches(HOPPER))
            yield
    finally:
        use_backend(chosen)


def in_host_memory(ledger: Ledger):
    """What `structcot.offload.host_empty` gives, counted as host memory."""

    def empty(num_bytes: int, *, pinned: bool) -> Tensor:
        with ledger.counting_as(HOST):
            return host_empty(num_bytes, pinned=pinned)

    return empty
