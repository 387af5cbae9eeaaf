"""SGD, how its rate falls over a stage, and mixed precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dfkt.config import OptimizerConfig, TrainConfig


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.SGD:
    """Return SGD as configured; the loop sets its rate at every step."""
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """Return the rate at a share of a stage.

    Args:
        config: Start rate and schedule.
        progress: Steps done over steps of the stage, in [0, 1).

    Example:
        >>> [round(learning_rate(OptimizerConfig(lr=0.1, schedule="step"), p), 4) for p in (0.0, 0.5, 0.75)]
        [0.1, 0.01, 0.001]
    """
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return config.lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return config.lr


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context: bfloat16 where asked for, or where a GPU has it and ``auto`` leaves the choice."""
    auto = config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=auto or config.precision == "bfloat16")
