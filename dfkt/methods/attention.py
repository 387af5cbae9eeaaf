"""Attention transfer: where in the image activations are large."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkt.methods.base import Method, Schedule, TaskTerm, searched, task_stage
from dfkt.methods.maps import MapTerm, check_images, meet, unit_rows, wide_type
from dfkt.networks.taps import StudentTaps


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the attention-transfer loss between two networks' maps at one tap, averaged over images.

    ``L = 1/B * sum over b of  1/2 * || Q_S / ||Q_S||_2 - Q_T / ||Q_T||_2 ||_2 / (H * W)``, where the attention map
    ``Q[h, w] = sum over c of activation[b, c, h, w]^2`` is taken as one vector. An attention map of zeros stays zeros.

    Args:
        student: Activation, ``[B, C, H, W]``.
        teacher: Activation, ``[B, C', H', W']``, of any number of channels; receives no gradient.

    Returns:
        Scalar, float32 (float64 for float64 input), without unit. Its gradient is zero for equal and for zero maps.

    Raises:
        FlowShapeError: If batch sizes differ.

    References:
        Zagoruyko and Komodakis, ICLR 2017, Eq. 2 with p = 2, for one tap and beta = 1. They set beta to 1e3 over the
        map's elements and the batch size; these two are divided by here, so the weight to pass is 1e3.
        The norm of the difference is not squared in Eq. 2. Their public code takes the mean of squared differences,
        without the 1/2, times 1e3: another function, whose gradient fades as the maps meet. We follow the paper.
        Where grids differ, the larger attention map is adaptively average-pooled to the smaller: our choice.

    Example:
        >>> student = torch.zeros(1, 3, 2, 2)
        >>> student[:, :, 0, 0] = 5.0
        >>> attention_loss(student, torch.ones(1, 7, 2, 2)).item()  # (1, 0, 0, 0) against (1, 1, 1, 1) / 2
        0.125
    """
    check_images(student, teacher)
    maps = meet(_attention_map(student), _attention_map(teacher.detach()))
    ours, target = (unit_rows(m.flatten(1)) for m in maps)
    return torch.linalg.vector_norm(ours - target, dim=1).mean() / (2 * target.shape[1])


def _attention_map(maps: Tensor) -> Tensor:
    """Return the squares summed over channels, ``[B, H, W]``: as a norm, so that no square of a whole map is held."""
    return torch.linalg.vector_norm(maps, dim=1, dtype=wide_type(maps)).square()


@dataclass(frozen=True, kw_only=True)
class AttentionTerm(MapTerm):
    """Attention transfer; channels need not agree."""

    name = "attention"

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return :func:`attention_loss`."""
        return attention_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class Attention(Method):
    """Attention maps at the group ends, beside the labels from the first epoch (Zagoruyko and Komodakis, ICLR 2017)."""

    name = "attention"
    losses = ("task", "attention")
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    weight: float = searched(1000.0, 100.0, 10_000.0, log=True)
    """beta, the weight of the attention loss beside cross-entropy."""

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one task stage."""
        term = AttentionTerm(taps=taps.group_ends[1:], weight=self.weight)
        return (task_stage(epochs, self.rate, TaskTerm(), term),)
