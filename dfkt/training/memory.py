"""The most memory that a run held."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory held since :func:`reset_peak_memory`, in bytes, or ``None``: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
