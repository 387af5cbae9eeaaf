"""SGD, how its rate falls over a stage, and the precision of the networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dfkt.config import OptimizerConfig, Precision, RateSchedule


def build_optimizer(parameters: Sequence[nn.Parameter], rate: float, config: OptimizerConfig) -> torch.optim.SGD:
    """Return SGD as configured; the loop sets its rate at every step."""
    return torch.optim.SGD(
        parameters,
        lr=rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def learning_rate(rate: float, schedule: RateSchedule, progress: float) -> float:
    """Return the rate at a share of a stage.

    Args:
        rate: At the stage's start.
        schedule: How it falls.
        progress: Steps done over steps of the stage, in [0, 1).

    Example:
        >>> [round(learning_rate(0.1, "step", p), 4) for p in (0.0, 0.5, 0.75)]
        [0.1, 0.01, 0.001]
    """
    if schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return rate * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return rate


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context: bfloat16 where asked for, or where ``auto`` finds a GPU that computes it.

    A GPU that only emulates bfloat16 is slower with it than without.
    """
    auto = precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=auto or precision == "bfloat16")


def network_dtype(precision: Precision) -> torch.dtype:
    """Return the type of weights and images; bfloat16 is left to :func:`autocast`."""
    return torch.float64 if precision == "float64" else torch.float32
