"""SGD, how its rate falls over a stage, and the precision of the networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dfkt.config import OptimizerConfig, Precision, RateSchedule

CPU_FILE, CPU_FLAGS = Path("/proc/cpuinfo"), {"avx512_bf16", "amx_bf16"}
"""Where Linux says what the processors compute, and either of what bfloat16 takes."""


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
    """Return the mixed-precision context: bfloat16 where asked for, or where ``auto`` was left to a GPU that computes it.

    Studies and single runs decide ``auto`` before (:func:`decided`); what was not decided is float32 on every CPU.
    """
    auto = precision == "auto" and device.type == "cuda" and computes_bfloat16("cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=auto or precision == "bfloat16")


def computes_bfloat16(device: str) -> bool:
    """Whether this machine's processor or GPU computes bfloat16 itself; one that only emulates it is many times slower with it.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if not device.startswith("cpu"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        lines = CPU_FILE.read_text().splitlines()
    except OSError:
        return False
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return bool(flags & CPU_FLAGS)


def decided(precision: Precision, device: str) -> Precision:
    """Return the precision that ``auto`` stands for on a device of this machine; any other as it is."""
    if precision != "auto":
        return precision
    return "bfloat16" if computes_bfloat16(device) else "float32"


def network_dtype(precision: Precision) -> torch.dtype:
    """Return the type of weights and images; bfloat16 is left to :func:`autocast`."""
    return torch.float64 if precision == "float64" else torch.float32
