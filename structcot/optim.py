"""The optimizer and its learning rate.

The schedule is a pure function of the step, so a resumed run needs nothing of it saved. Warm-up is linear; step 0 already uses
1 / warmup_steps of the peak. The decay ends at 0 after the last step.
Sources: Loshchilov and Hutter 2017 (arXiv 1608.03983, eq. 5, one cycle) and 2019 (arXiv 1711.05101, AdamW).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from structcot.config import TrainConfig
from structcot.errors import ConfigError

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `num_steps`."""
    warmup_steps = math.ceil(round(config.warmup_ratio * num_steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * decay[config.lr_scheduler_type]


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over fp32 parameters, its state allocated at once; one fused kernel where the device has it. Matrices alone decay.

    Raises:
        ConfigError: if the optimizer cannot run here.
    """
    if config.optimizer != "adamw":
        raise ConfigError(
            f'train.optimizer: "{config.optimizer}" keeps its state in 8 bits on a CUDA device and is not available here; use adamw'
        )
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
