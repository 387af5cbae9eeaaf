"""Similarity-preserving distillation: which images of a batch resemble each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfkt.methods.base import Method, Schedule, TaskTerm, searched, task_stage
from dfkt.methods.maps import MapTerm, check_images, unit_rows, wide
from dfkt.networks.taps import StudentTaps


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the similarity-preserving loss between two networks' maps at one tap.

    ``L = 1/B^2 * || G_T - G_S ||_F^2``, where ``G = Q @ Q.T``, its rows divided by their Euclidean norm, and row b of ``Q``
    holds all activations of image b. A row of zeros stays zeros.

    It sets the images of one batch against each other, so several workers gather what it reads (``whole_batch``).

    Args:
        student: Activation, ``[B, C, H, W]``.
        teacher: Activation, ``[B, C', H', W']``, of any channels and grid; receives no gradient.

    Returns:
        Scalar, float32 (float64 for float64 input), without unit.

    Raises:
        FlowShapeError: If batch sizes differ.

    References:
        Tung and Mori, ICCV 2019, section 3. Public code (RepDistiller, verified by the author) agrees; it weighs it with 3000.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(2).reshape(2, 2, 1, 1), torch.ones(2, 3, 4, 4)
        >>> round(similarity_loss(student, teacher).item(), 4)  # images at right angles against equal ones: 1 - 1 / sqrt(2)
        0.2929
    """
    check_images(student, teacher)
    ours, target = (unit_rows(q @ q.T) for q in (_features(student), _features(teacher.detach())))
    return (ours - target).square().mean()


def _features(maps: Tensor) -> Tensor:
    """Return ``[B, C * H * W]`` in the order in which the maps lie, so nothing is copied; products of rows do not mind."""
    return wide(maps if maps.is_contiguous() else maps.permute(0, 2, 3, 1)).flatten(1)


@dataclass(frozen=True, kw_only=True)
class SimilarityTerm(MapTerm):
    """Similarity between a batch's images; channels need not agree."""

    name = "similarity"
    whole_batch = True

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return :func:`similarity_loss`."""
        return similarity_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class Similarity(Method):
    """Similarities at the group ends, beside the labels from the first epoch (Tung and Mori, ICCV 2019).

    The paper's definition leaves the pairs of layers open and names the ends of blocks of the same place: here the group
    ends, whose losses are summed, so the weight is over all of them. Widely used public code takes the last one only.
    """

    name = "similarity"
    losses = ("task", "similarity")
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    weight: float = searched(3000.0, 300.0, 30_000.0, log=True)
    """gamma, the weight of the similarity loss beside cross-entropy."""

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one task stage."""
        term = SimilarityTerm(taps=taps.group_ends[1:], weight=self.weight)
        return (task_stage(epochs, self.rate, TaskTerm(), term),)
