"""A running average of a network's weights: it tells earlier than the weights themselves how a run will end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DECAY = 0.95
"""Of the average per step, once there were enough steps (docs/log.md: how well it ranks trials)."""


class WeightAverage:
    """The exponential moving average of a network's weights and running statistics; the network trains on unchanged.

    The decay is warmed up, ``min(DECAY, (1 + n) / (10 + n))`` at step n, so that the start is forgotten soon.

    Args:
        network: What is averaged; its present weights are the start.
    """

    def __init__(self, network: nn.Module) -> None:
        tensors = (*network.parameters(), *network.buffers())
        self.theirs: list[Tensor] = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
        self.ours = [tensor.clone() for tensor in self.theirs]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Count in the network's present weights."""
        decay = min(DECAY, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.ours, self.theirs, 1 - decay)
        self.steps += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network have the average while the context lasts; then it has its own weights back, bit for bit."""
        kept = [tensor.clone() for tensor in self.theirs]
        try:
            _copy(self.theirs, self.ours)
            yield
        finally:
            _copy(self.theirs, kept)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` needs."""
        return {"weights": self.ours, "steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state` returned."""
        _copy(self.ours, state["weights"])
        self.steps = state["steps"]


@torch.no_grad()
def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
