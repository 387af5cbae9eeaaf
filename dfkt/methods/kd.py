"""Knowledge distillation: soft targets beside the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dfkt.config import check_rule
from dfkt.methods.base import Features, Method, Schedule, TaskTerm, Term, searched, task_stage
from dfkt.methods.maps import wide
from dfkt.networks.taps import StudentTaps


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
        >>> import torch
        >>> soft_target_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 4.0).item()
        0.0
    """
    logits = wide(student) / temperature
    target = F.log_softmax(teacher.detach().to(logits.dtype) / temperature, dim=1)
    loss = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)
    return loss * temperature**2


@dataclass(frozen=True, kw_only=True)
class SoftTerm(Term):
    """Soft targets (:func:`soft_target_loss`)."""

    name = "soft"
    student_logits = True
    teacher_logits = True
    temperature: float

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the soft-target loss; labels are not read."""
        assert student.logits is not None
        assert teacher.logits is not None
        return soft_target_loss(student.logits, teacher.logits, self.temperature)

    def describe(self) -> str:
        """Return the term with its temperature."""
        return f"soft[T={self.temperature:g}]"


def mixed(weight: float, temperature: float) -> tuple[Term, ...]:
    """Return cross-entropy and soft targets whose weights add up to 1; one of weight 0 is left out."""
    terms = TaskTerm(weight=1 - weight), SoftTerm(temperature=temperature, weight=weight)
    return tuple(term for term in terms if term.weight)


@dataclass(frozen=True, kw_only=True)
class Kd(Method):
    """Soft targets from the first epoch (Hinton, Vinyals, Dean 2015)."""

    name = "kd"
    losses = ("task", "soft")
    tapped = False
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    weight: float = searched(0.9, 0.1, 0.95)
    """Weight of the soft targets; cross-entropy weighs ``1 - weight``."""
    temperature: float = searched(4.0, 1.0, 10.0, log=True)
    """Softens both networks' logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.weight <= 1, "weight <= 1", weight=self.weight)

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one task stage."""
        return (task_stage(epochs, self.rate, *mixed(self.weight, self.temperature)),)
