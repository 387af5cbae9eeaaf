"""Knowledge distillation: soft targets beside the labels."""

import pytest
import torch
from loss_checks import LOGITS, every_loss, naive_divergence, naive_softmax, random

from dfkt.errors import ConfigError
from dfkt.methods.base import TaskTerm
from dfkt.methods.kd import Kd, SoftTerm, mixed, soft_target_loss
from dfkt.networks.taps import StudentTaps

NO_TAPS = StudentTaps.of(())


@every_loss
def test_soft_target_loss(holds):
    holds(lambda student, teacher: soft_target_loss(student, teacher, 3.0), LOGITS)


def test_soft_target_loss_agrees_with_the_sum_over_classes():
    student, teacher = random(0, 3, 5), random(1, 3, 5)
    total = sum(
        naive_divergence(naive_softmax(t, 3.0), naive_softmax(s, 3.0))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    )

    assert soft_target_loss(student, teacher, 3.0).item() == pytest.approx(3.0**2 * total / 3, rel=1e-12)


def test_a_constant_added_to_an_images_logits_changes_nothing():
    student, teacher, constants = random(0, 3, 5), random(1, 3, 5), 10 * random(2, 3, 1)

    shifted = soft_target_loss(student + constants, teacher - 2 * constants, 3.0)

    torch.testing.assert_close(shifted, soft_target_loss(student, teacher, 3.0))


def test_kd_mixes_soft_targets_and_labels_from_the_first_epoch_and_needs_no_taps():
    (stage,) = Kd().schedule(30, NO_TAPS)

    assert stage.describe() == "task stage: 30 epochs at 0.1: 0.1 task + 0.9 soft[T=4]"
    assert not Kd.tapped
    assert stage.taps == ()


@pytest.mark.parametrize(("weight", "kinds"), [(0.0, [TaskTerm]), (0.5, [TaskTerm, SoftTerm]), (1.0, [SoftTerm])])
def test_a_term_of_weight_zero_is_left_out(weight, kinds):
    assert [type(term) for term in mixed(weight, 4.0)] == kinds


def test_soft_targets_weigh_no_more_than_all():
    with pytest.raises(ConfigError, match=r"`weight <= 1` must hold, but got weight=1\.5"):
        Kd(weight=1.5)


def test_kd_is_described_by_what_is_searched():
    assert Kd().describe() == "rate 0.1, weight 0.9, temperature 4"
