"""Losses other than the flow's: pure functions of tensors.

Shapes: B images, C channels, H x W grid. Every loss averages over images. The teacher receives no gradient and may be an
inference tensor: the backward pass keeps only what was computed from it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkt.config import HintNorm
from dfkt.errors import FlowShapeError
from dfkt.methods.flow import EPSILON

SMALLEST_NORM = 1e-12
"""Attention maps and similarity rows of a smaller norm count as zero: they have no direction and get no gradient."""


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the soft-target loss between two networks' logits, averaged over images.

    ``L = T^2 / B * sum over b of KL(softmax(teacher[b] / T) || softmax(student[b] / T))``

    Args:
        student: Logits, ``[B, classes]``.
        teacher: Logits, ``[B, classes]``; receives no gradient.
        temperature: T, positive; ``T^2`` keeps the gradient's size independent of it.

    Returns:
        Scalar, float32 (float64 for float64 input), in nats.

    References:
        Hinton, Vinyals, Dean 2015, section 2. They state cross-entropy with the soft targets, which differs
        by the teacher's entropy, a constant; so the loss is zero for equal logits.

    Example:
        >>> soft_target_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 4.0).item()
        0.0
    """
    wide = _wide(student)
    target = F.log_softmax(teacher.detach().to(wide.dtype) / temperature, dim=1)
    return (
        F.kl_div(F.log_softmax(wide / temperature, dim=1), target, reduction="batchmean", log_target=True)
        * temperature**2
    )


def decoupled_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """Return the decoupled soft-target loss between two networks' logits, averaged over images.

    ``L = T^2 / B * sum over b of  target_weight * TCKD(b) + other_weight * NCKD(b)``, where, of probabilities
    softened by T, both are KL(teacher || student)

    - ``TCKD`` over two cases, the labelled class and all others together;
    - ``NCKD`` over the other classes alone, as if the labelled one did not exist.

    With weights 1 and ``1 - p``, p the teacher's softened probability of the label, it is the soft-target loss.

    Args:
        student: Logits, ``[B, classes]``.
        teacher: Logits, ``[B, classes]``; receives no gradient.
        labels: Class numbers, ``[B]``, int64, each in ``0 .. classes - 1``.
        temperature: T, positive.
        target_weight: alpha, the weight of TCKD.
        other_weight: beta, the weight of NCKD; with two classes NCKD is zero.

    Returns:
        Scalar, float32 (float64 for float64 input), in nats.

    References:
        Zhao et al., CVPR 2022, Eq. 7; alpha 1 and beta 8 are their code's defaults. Their formula has no ``T^2``, their
        public code (mdistiller) has it, and so have we: it keeps the gradient's size independent of the temperature,
        and weights mean what they report. That code also raises the loss linearly over the first epochs, which is the
        schedule's task here, and subtracts 1000 from the label's logit where we leave the label out.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[1.0, 1.5, 0.5]]).log()
        >>> loss = decoupled_loss(student, teacher, torch.tensor([0]), 1.0, other_weight=1.0)
        >>> round(loss.item(), 4)  # 0.75 log 1.5 + 0.25 log 0.5: the label's probability agrees, the others' do not
        0.1308
    """
    turns = (labels[:, None] + torch.arange(student.shape[1], device=labels.device)) % student.shape[1]
    losses = [
        soft_target_loss(of_student, of_teacher, 1.0)
        for of_student, of_teacher in zip(
            _decouple(_wide(student) / temperature, turns),
            _decouple(_wide(teacher.detach()) / temperature, turns),
            strict=True,
        )
    ]
    return (target_weight * losses[0] + other_weight * losses[1]) * temperature**2


def hint_loss(student: Tensor, teacher: Tensor, norm: HintNorm = "relative") -> Tensor:
    """Return the hint loss between two networks' maps at one tap, averaged over images.

    ``L = 1/B * sum over b of  1/2 * d(b)``, where with the maps ``S`` and ``T`` of image b

    - ``sum``: ``d = ||S - T||^2``, summed over C, H and W: the literal squared norm;
    - ``mean``: that over the number of entries, ``C * H * W``;
    - ``relative``: that over the teacher's ``||T||^2``, so that a weight means the same at every tap and data set.

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
    student, teacher = _meet(_wide(student), teacher.detach())
    difference = student - teacher
    distances = torch.linalg.vector_norm(difference, dim=(1, 2, 3)).square()
    if norm == "mean":
        distances = distances / student[0].numel()
    if norm == "relative":
        squares = torch.linalg.vector_norm(teacher, dim=(1, 2, 3), dtype=distances.dtype).square()
        distances = distances / squares.clamp_min(EPSILON)
    return distances.mean() / 2


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
    _check_images(student, teacher)
    maps = _meet(_attention_map(student), _attention_map(teacher.detach()))
    ours, target = (_unit(m.flatten(1)) for m in maps)
    return torch.linalg.vector_norm(ours - target, dim=1).mean() / (2 * target.shape[1])


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the similarity-preserving loss between two networks' maps at one tap.

    ``L = 1/B^2 * || G_T - G_S ||_F^2``, where ``G = Q @ Q.T``, its rows divided by their Euclidean norm, and row b of ``Q``
    holds all activations of image b. A row of zeros stays zeros.

    It sets the images of one batch against each other: under data parallelism B is the worker's share, and the average over
    workers is not the loss of the whole batch.

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
        >>> student, teacher = torch.eye(2).reshape(2, 2, 1, 1), torch.ones(2, 3, 4, 4)
        >>> round(similarity_loss(student, teacher).item(), 4)  # images at right angles against equal ones: 1 - 1 / sqrt(2)
        0.2929
    """
    _check_images(student, teacher)
    ours, target = (_unit(q @ q.T) for q in (_features(student), _features(teacher.detach())))
    return (ours - target).square().mean()


def _decouple(logits: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of (label, all others together), ``[B, 2]``, and of the others, ``[B, classes - 1]``.

    ``turns`` are each row's columns in the order that begins at its label; they are gathered, so that nothing is masked.
    """
    turned = logits.gather(1, turns)
    label, others = turned[:, :1], turned[:, 1:]
    return torch.cat([label, others.logsumexp(1, keepdim=True)], 1), others


def _attention_map(maps: Tensor) -> Tensor:
    """Return the squares summed over channels, ``[B, H, W]``: as a norm, so that no square of a whole map is held."""
    return torch.linalg.vector_norm(maps, dim=1, dtype=_wide_type(maps)).square()


def _features(maps: Tensor) -> Tensor:
    """Return ``[B, C * H * W]`` in the order in which the maps lie, so nothing is copied; products of rows do not mind."""
    return _wide(maps if maps.is_contiguous() else maps.permute(0, 2, 3, 1)).flatten(1)


def _unit(rows: Tensor) -> Tensor:
    """Divide each row by its norm. A row without one becomes zero and, divided by infinity, gets no gradient."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.masked_fill(norms < SMALLEST_NORM, math.inf)


def _meet(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger grid to the smaller, along each side."""
    grid = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    pooled = [m if tuple(m.shape[-2:]) == grid else F.adaptive_avg_pool2d(_wide(m), grid) for m in (student, teacher)]
    return pooled[0], pooled[1]


def _check_images(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise FlowShapeError(
            f"Teacher and student must have seen the same images, but got {len(teacher)} and {len(student)}."
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_type(tensor))


def _wide_type(tensor: Tensor) -> torch.dtype:
    """Return the type to compute in: half and bfloat16 are widened."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
