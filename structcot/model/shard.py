"""Weights sharded over ranks with FSDP2.

Every half of a block is gathered for its own forward and backward and freed after it; adapters and norms, fp32 on every layout, are a group
of their own per block, since a group holds one dtype. Gradients are summed, not averaged: the loss is divided once, by the supervised
tokens of the whole step. Frozen weights have no gradient and nothing to reduce. Inside a block the parameters are plain tensors, so no
kernel ever sees a DTensor.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from structcot.config import Config
from structcot.model.decoder import Decoder


def shard_model(model: Decoder, mesh: DeviceMesh, config: Config) -> None:
    """Shard the parameters of `model`, which may lie on the device `meta`, over `mesh`, (shard) or (replicate, shard).

    After full fine-tuning's fp32 masters the products are made in the dtype of the computation, and gradients reduced in fp32.
    """
    in_compute_dtype = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype if config.tuning.method == "full" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    as_stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.parallel.cpu_offload == "parameters" else OffloadPolicy()

    def shard(module: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy, *, free: bool | None = None) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free)  # type: ignore[arg-type]

    for block in model.model.layers:
        shard(block.get_submodule("self_attn"), in_compute_dtype)
        shard(block.get_submodule("mlp"), in_compute_dtype)
        shard(block, as_stored)
    # The head's backward follows its forward at once, so it is not freed between them; the embedding is looked up in as it is stored,
    # since its gradient adds up rows, which bf16 would lose.
    if model.spec.tied_head:
        shard([model.model.embed_tokens, model.lm_head], as_stored, free=False)
    else:
        shard(model.model.embed_tokens, as_stored)
        shard(model.lm_head, in_compute_dtype, free=False)
    shard(model, as_stored)
    for module in groups_of(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def groups_of(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are sharded as a group; none where nothing is sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def free_unsharded(model: nn.Module) -> None:
    """Free what a forward without a backward has left gathered, so that parameters are shards again."""
    for module in groups_of(model):
        module.reshard()
