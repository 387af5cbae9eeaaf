"""Soft targets."""

import math

import pytest
import torch

from dfkt.losses import soft_target_loss


def logits(seed: int) -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_target_loss_agrees_with_the_sum_over_classes():
    student, teacher, temperature = logits(0), logits(1), 3.0
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(v / temperature) for v in row] for row in (t, s))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    assert soft_target_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * total / 3)


def test_soft_target_loss_is_zero_for_equal_logits_and_ignores_a_constant_added_to_them():
    student = logits(0)
    assert soft_target_loss(student, student + 7, 4.0).item() == pytest.approx(0, abs=1e-12)


def test_gradient_agrees_with_finite_differences_and_none_reaches_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()

    assert torch.autograd.gradcheck(lambda s: soft_target_loss(s, teacher, 2.0), student)
    soft_target_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
