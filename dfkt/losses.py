"""Losses other than the flow's: pure functions of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    wide = student.float() if student.dtype.itemsize < 4 else student
    target = F.log_softmax(teacher.detach().to(wide.dtype) / temperature, dim=1)
    return (
        F.kl_div(F.log_softmax(wide / temperature, dim=1), target, reduction="batchmean", log_target=True)
        * temperature**2
    )
