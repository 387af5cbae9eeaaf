"""Decoupled knowledge distillation."""

import pytest
import torch
from loss_checks import LOGITS, every_loss, naive_divergence, naive_softmax, random

from dfkt.errors import ConfigError
from dfkt.methods.dkd import Dkd, decoupled_loss
from dfkt.methods.kd import soft_target_loss
from dfkt.networks.taps import StudentTaps

LABELS = torch.tensor([4, 0, 2])


def naive_decoupled(student, teacher, labels, temperature, target_weight, other_weight) -> float:
    """Zhao et al., Eq. 7, image by image, times the squared temperature."""
    total = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        both = [naive_softmax(row, temperature) for row in (t, s)]
        others = [[p for k, p in enumerate(row) if k != label] for row in both]
        binary = [[row[label], sum(rest)] for row, rest in zip(both, others, strict=True)]
        others = [[p / sum(rest) for p in rest] for rest in others]
        total += target_weight * naive_divergence(*binary) + other_weight * naive_divergence(*others)
    return temperature**2 * total / len(labels)


@every_loss
def test_decoupled_loss(holds):
    holds(lambda student, teacher: decoupled_loss(student, teacher, LABELS.to(student.device), 3.0), LOGITS)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 6.0)])
def test_decoupled_loss_agrees_with_the_sum_over_classes(weights):
    student, teacher = random(0, 3, 5), random(1, 3, 5)

    found = decoupled_loss(student, teacher, LABELS, 2.0, *weights)

    assert found.item() == pytest.approx(naive_decoupled(student, teacher, LABELS, 2.0, *weights), rel=1e-12)


def test_a_constant_added_to_an_images_logits_changes_nothing():
    student, teacher, constants = random(0, 3, 5), random(1, 3, 5), 10 * random(2, 3, 1)

    shifted = decoupled_loss(student + constants, teacher - 2 * constants, LABELS, 3.0)

    torch.testing.assert_close(shifted, decoupled_loss(student, teacher, LABELS, 3.0))


def test_decoupled_loss_is_the_soft_target_loss_at_the_weight_that_couples_it():
    """KD = TCKD + (1 - p) NCKD, with p the teacher's softened probability of the label."""
    student, teacher, label, temperature = random(0, 1, 5), random(1, 1, 5), torch.tensor([3]), 2.5
    rest = 1 - (teacher / temperature).softmax(1)[0, 3].item()

    found = decoupled_loss(student, teacher, label, temperature, 1.0, rest)

    torch.testing.assert_close(found, soft_target_loss(student, teacher, temperature))


def test_with_two_classes_the_decoupled_loss_is_the_soft_target_loss():
    student, teacher, labels = random(0, 3, 2), random(1, 3, 2), torch.tensor([0, 1, 1])

    torch.testing.assert_close(decoupled_loss(student, teacher, labels, 2.0), soft_target_loss(student, teacher, 2.0))


def test_labels_may_come_from_inference_mode():
    student = random(0, 3, 5).requires_grad_()
    with torch.inference_mode():
        labels = LABELS.clone()

    decoupled_loss(student, random(1, 3, 5), labels, 3.0).backward()

    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("label", [0, 1, 2])
def test_decoupled_loss_of_logits_a_hundred_apart_is_exact_in_float32(label):
    student, teacher = torch.tensor([[-100.0, 0.0, 1.0]]), torch.tensor([[100.0, 0.0, 3.0]])
    labels = torch.tensor([label])
    expected = naive_decoupled(student.double(), teacher.double(), labels, 1.0, 1.0, 8.0)

    assert decoupled_loss(student, teacher, labels, 1.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_decoupled_loss_of_probabilities_that_underflow_is_finite(label):
    student = torch.tensor([[-1e4, 0.0, 1e3]]).requires_grad_()

    value = decoupled_loss(student, torch.tensor([[1e4, 0.0, -1e3]]), torch.tensor([label]), 1.0)
    value.backward()

    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_decoupled_soft_targets_warm_up_in_the_first_twelfth_and_need_no_taps():
    (stage,) = Dkd().schedule(30, StudentTaps.of(()))

    assert stage.describe() == (
        "task stage: 30 epochs at 0.1: 1 task + 0->1 in 0.0833 of it decoupled[T=4, 1 target, 8 others]"
    )
    assert not Dkd.tapped


def test_a_warmup_is_no_longer_than_the_run():
    with pytest.raises(ConfigError, match="`warmup <= 1` must hold"):
        Dkd(warmup=1.5)


def test_dkd_is_described_by_what_is_searched():
    assert Dkd().describe() == "rate 0.1, other_weight 8, temperature 4"
