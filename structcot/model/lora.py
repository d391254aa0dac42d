"""Low-rank adapters: a pair of fp32 matrices beside a frozen projection, made equal on every machine.

A is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), which is PEFT's default (Kaiming uniform with a = sqrt(5)), from a generator seeded by
(seed, name of the projection) over the full shape, so that neither world size nor the order of layers changes it; B starts at zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from structcot.config import PROJECTIONS, TuningConfig, nearest
from structcot.errors import ConfigError
from structcot.model.parts import local_part, local_rows

PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


class LoraPair(nn.Module):
    """`lora_A` (r, inputs) and `lora_B` (outputs, r) of the projection `name`, both fp32; the product is scaled by `scale`."""

    def __init__(self, name: str, outputs: int, inputs: int, tuning: TuningConfig):
        super().__init__()
        self.name, self.scale, self.dropout = name, tuning.lora_scale, tuning.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(tuning.lora_r, inputs, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(outputs, tuning.lora_r, dtype=torch.float32))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw A, zero B; a rank that holds some rows of A draws all and keeps those."""
        generator = torch.Generator().manual_seed(stable_hash(f"{seed}/{self.name}"))
        bound = self.lora_A.shape[1] ** -0.5
        drawn_RK = torch.rand(self.lora_A.shape, generator=generator, device="cpu") * (2 * bound) - bound
        local_part(self.lora_A.data).copy_(drawn_RK[local_rows(self.lora_A)])
        local_part(self.lora_B.data).zero_()


def attach_lora(model: nn.Module, tuning: TuningConfig) -> None:
    """Freeze every weight and put an adapter, still to be initialised, beside each projection that `tuning` names, in every block.

    Raises:
        ConfigError: if a name is no projection of the model.
    """
    for name in tuning.target_modules:
        if name not in PARENTS:
            raise ConfigError(f"tuning.lora_target_modules: the model has no {name}{nearest(name, PROJECTIONS)}")
    model.requires_grad_(False)
    for number, block in enumerate(model.get_submodule("model.layers").children()):
        for name in tuning.target_modules:
            path = f"model.layers.{number}.{PARENTS[name]}.{name}"
            outputs, inputs = model.get_parameter(f"{path}.weight").shape
            block.get_submodule("adapters").add_module(name, LoraPair(path, outputs, inputs, tuning))


def adapters_of(model: nn.Module) -> Iterator[tuple[str, LoraPair]]:
    """(name of the projection, its pair) in the model's order; the name is that of the Hugging Face module."""
    for module in model.modules():
        if isinstance(module, LoraPair):
            yield module.name, module


def stable_hash(text: str) -> int:
    """A 56-bit number that is the same on every machine; seeds the initialisation and salts the dropout of each projection."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
