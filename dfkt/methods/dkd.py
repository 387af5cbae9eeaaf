"""Decoupled knowledge distillation: the labelled class and the others, each with a weight of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkt.config import check_rule
from dfkt.methods.base import Features, Method, Ramp, Schedule, TaskTerm, Term, searched, task_stage
from dfkt.methods.kd import soft_target_loss
from dfkt.methods.maps import wide
from dfkt.networks.taps import StudentTaps


def decoupled_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """Return the decoupled soft-target loss between two networks' logits, averaged over images.

    ``L = T^2 / B * sum over b of  target_weight * TCKD(b) + other_weight * NCKD(b)``, where, of probabilities softened by T, both
    are KL(teacher || student): ``TCKD`` over two cases, the label and all others together; ``NCKD`` over the others alone.
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
        Zhao et al., CVPR 2022, Eq. 7, with their public code's ``T^2``; that code masks the label by subtracting 1000.

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
            _decouple(wide(student) / temperature, turns),
            _decouple(wide(teacher.detach()) / temperature, turns),
            strict=True,
        )
    ]
    return (target_weight * losses[0] + other_weight * losses[1]) * temperature**2


def _decouple(logits: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of (label, all others together), ``[B, 2]``, and of the others, ``[B, classes - 1]``.

    ``turns`` are each row's columns in the order that begins at its label; they are gathered, so that nothing is masked.
    """
    turned = logits.gather(1, turns)
    label, others = turned[:, :1], turned[:, 1:]
    return torch.cat([label, others.logsumexp(1, keepdim=True)], 1), others


@dataclass(frozen=True, kw_only=True)
class DecoupledTerm(Term):
    """Decoupled soft targets (:func:`decoupled_loss`)."""

    name = "decoupled"
    student_logits = True
    teacher_logits = True
    temperature: float
    target_weight: float
    other_weight: float

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the decoupled loss."""
        assert student.logits is not None
        assert teacher.logits is not None
        weights = (self.target_weight, self.other_weight)
        return decoupled_loss(student.logits, teacher.logits, labels, self.temperature, *weights)

    def describe(self) -> str:
        """Return the term with its temperature and weights."""
        return f"decoupled[T={self.temperature:g}, {self.target_weight:g} target, {self.other_weight:g} others]"


@dataclass(frozen=True, kw_only=True)
class Dkd(Method):
    """Decoupled soft targets beside the labels (Zhao et al., CVPR 2022; alpha 1 and beta 8 are their code's defaults)."""

    name = "dkd"
    losses = ("task", "decoupled")
    tapped = False
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    other_weight: float = searched(8.0, 0.5, 16.0, log=True)
    """beta, the weight of the classes other than the labelled one."""
    temperature: float = searched(4.0, 1.0, 10.0, log=True)
    target_weight: float = 1.0
    """alpha, the weight of the labelled class against all others together."""
    warmup: float = 1 / 12
    """Share of the run in which the loss grows linearly from nothing to its weight (20 of 240 epochs there)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.warmup <= 1, "warmup <= 1", warmup=self.warmup)

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one task stage."""
        term = DecoupledTerm(
            temperature=self.temperature,
            target_weight=self.target_weight,
            other_weight=self.other_weight,
            weight=Ramp(0.0, 1.0, self.warmup),
        )
        return (task_stage(epochs, self.rate, TaskTerm(), term),)
