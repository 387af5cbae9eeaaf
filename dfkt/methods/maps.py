"""What losses over activation maps share.

Shapes: B images, C channels, H x W grid. Every loss averages over images. The teacher receives no gradient and may be an
inference tensor: the backward pass keeps only what was computed from it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkt.errors import FlowShapeError
from dfkt.methods.base import Features, Term

SMALLEST_NORM = 1e-12
"""Attention maps and similarity rows of a smaller norm count as zero: they have no direction and get no gradient."""


@dataclass(frozen=True, kw_only=True)
class MapTerm(Term):
    """A loss between the two networks' maps at one tap, summed over taps; labels and logits are not read."""

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss at one tap."""

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the sum over taps."""
        return reduce(add, (self.loss(student.taps[tap], teacher.taps[tap]) for tap in self.taps))


def unit_rows(rows: Tensor) -> Tensor:
    """Divide each row by its norm. A row without one becomes zero and, divided by infinity, gets no gradient."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.masked_fill(norms < SMALLEST_NORM, math.inf)


def meet(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger grid to the smaller, along each side."""
    grid = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    pooled = [m if tuple(m.shape[-2:]) == grid else F.adaptive_avg_pool2d(wide(m), grid) for m in (student, teacher)]
    return pooled[0], pooled[1]


def check_images(student: Tensor, teacher: Tensor) -> None:
    """Raise :class:`FlowShapeError` unless both have the same number of images."""
    if len(student) != len(teacher):
        raise FlowShapeError(
            f"Teacher and student must have seen the same images, but got {len(teacher)} and {len(student)}."
        )


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the type to compute in."""
    return tensor.to(wide_type(tensor))


def wide_type(tensor: Tensor) -> torch.dtype:
    """Return the type to compute in: half and bfloat16 are widened."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
