"""Hints: the student's maps themselves approach the teacher's, before the task stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dfkt.config import check_choice, check_rule
from dfkt.errors import FlowShapeError
from dfkt.methods.base import Method, Ramp, Schedule, Stage, TaskTerm, searched, task_stage
from dfkt.methods.kd import SoftTerm
from dfkt.methods.maps import MapTerm, meet, wide
from dfkt.networks.taps import StudentTaps

HintNorm = Literal["relative", "mean", "sum"]


def hint_loss(student: Tensor, teacher: Tensor, norm: HintNorm = "relative") -> Tensor:
    """Return the hint loss between two networks' maps at one tap, averaged over images.

    ``L = 1/B * sum over b of  1/2 * d(b)``, where with the maps ``S`` and ``T`` of image b

    - ``sum``: ``d = ||S - T||^2``, summed over C, H and W: the literal squared norm;
    - ``mean``: that over the number of entries, ``C * H * W``;
    - ``relative``: that over the teacher's ``||T||^2``, so that a weight means the same at every tap and data set,
      whatever the size of activations; where ``T`` is exactly zero, ``d = 0``.

    Args:
        student: Activation, ``[B, C, H, W]``; behind a regressor where the student's own channels differ.
        teacher: Activation, ``[B, C, H', W']``; receives no gradient.
        norm: How the distance is normalised.

    Returns:
        Scalar, float32 (float64 for float64 input); ``sum`` and ``mean`` in squared activation units, ``relative`` in none.

    Raises:
        FlowShapeError: If batch sizes or channels differ.

    References:
        Romero et al., ICLR 2015, Eq. 3 is ``sum``; ``mean`` and ``relative`` are this project's. Public codes
        (RepDistiller, mdistiller) take ``mean`` without the 1/2. Where grids differ, the larger one is adaptively
        average-pooled to the smaller, along each side: our choice, the paper's regressor shrinks it by its kernel.

    Example:
        >>> hint_loss(3 * torch.ones(1, 4, 4, 4), torch.ones(1, 4, 8, 8), "mean").item()
        2.0
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise FlowShapeError(
            f"Images and channels of teacher and student must agree, but got {tuple(teacher.shape[:2])} and "
            f"{tuple(student.shape[:2])}. A 1x1 convolution on the student's tap makes channels agree."
        )
    student, teacher = meet(wide(student), teacher.detach())
    difference = student - teacher
    distances = torch.linalg.vector_norm(difference, dim=(1, 2, 3)).square()
    if norm == "mean":
        distances = distances / student[0].numel()
    if norm == "relative":
        squares = torch.linalg.vector_norm(teacher, dim=(1, 2, 3), dtype=distances.dtype).square()
        distances = distances / squares.masked_fill(squares == 0, math.inf)
    return distances.mean() / 2


@dataclass(frozen=True, kw_only=True)
class HintTerm(MapTerm):
    """Hints (:func:`hint_loss`); the 1x1 convolution is FitNets' regressor."""

    name = "hint"
    adapted = True
    norm: HintNorm

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the hint loss."""
        return hint_loss(student, teacher, self.norm)

    def describe(self) -> str:
        """Return the term with its norm and taps."""
        return f"hint[{self.norm}] at {' '.join(map(str, self.taps))}"


@dataclass(frozen=True, kw_only=True)
class _Hinted(Method):
    """Hint stages, then the labels with soft targets whose weight falls linearly to a quarter."""

    losses = ("hint", "task", "soft")
    share: float = searched(1 / 3, 0.1, 0.6)
    """Share of the run's epochs spent in hint stages."""
    hint_rate: float = searched(0.1, 0.01, 1.0, log=True)
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    soft_weight: float = searched(4.0, 1.0, 16.0, log=True)
    """Weight of the soft targets beside cross-entropy at the task stage's start, as published: without Hinton's ``T^2``."""
    temperature: float = searched(3.0, 1.0, 10.0, log=True)
    norm: HintNorm = "relative"
    """``sum`` is the literal squared distance; see :func:`hint_loss`."""
    clip_norm: float | None = 1.0
    """Clips the gradient's norm in hint stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, get_args(HintNorm))
        check_rule(0 < self.share < 1, "0 < share < 1", share=self.share)
        check_rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)

    def _stages(self, epochs: float, hinted: Sequence[tuple[int, ...]]) -> Schedule:
        """Return a hint stage for every set of taps, then the task stage."""
        hints = (
            Stage(
                phase="hint",
                epochs=self.share * epochs / len(hinted),
                terms=(HintTerm(taps=taps, norm=self.norm),),
                rate=self.hint_rate,
                clip_norm=self.clip_norm,
                tap=max(taps),
            )
            for taps in hinted
        )
        start, end = (weight / self.temperature**2 for weight in (self.soft_weight, self.soft_weight / 4))
        soft = SoftTerm(temperature=self.temperature, weight=Ramp(start, end))
        return (*hints, task_stage(epochs * (1 - self.share), self.rate, TaskTerm(), soft))


@dataclass(frozen=True, kw_only=True)
class FitNets(_Hinted):
    """One hint at the middle tap, then KD with a falling weight (Romero et al., ICLR 2015)."""

    name = "fitnets"

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one hint stage and the task stage."""
        return self._stages(epochs, [(taps.count // 2,)])


@dataclass(frozen=True, kw_only=True)
class LayerwiseHint(_Hinted):
    """Hints at the group ends, added one by one from the bottom, then KD as for FitNets (Bae et al., ETRI Journal 2019)."""

    name = "layerwise-hint"

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return a hint stage for every group and the task stage."""
        ends = taps.group_ends[1:]
        return self._stages(epochs, [ends[: k + 1] for k in range(len(ends))])
