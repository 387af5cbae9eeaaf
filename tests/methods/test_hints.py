"""Hints: FitNets and layer-wise hints."""

import pytest
import torch
from loss_checks import MAPS, every_grid, every_map_loss, flat, naive_pool, random

from dfkt.errors import ConfigError, FlowShapeError
from dfkt.methods.hints import FitNets, LayerwiseHint, hint_loss
from dfkt.networks.taps import StudentTaps

NORMS = ("sum", "mean", "relative")
every_norm = pytest.mark.parametrize("norm", NORMS)
TAPS = StudentTaps(7, (0, 2, 4, 6))


def naive_hint(student, teacher, norm, grid) -> float:
    """Romero et al., Eq. 3, image by image."""
    total = 0.0
    for image in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = (flat([naive_pool(channel, *grid) for channel in channels]) for channels in image)
        scale = {"sum": 1.0, "mean": len(s), "relative": sum(b * b for b in t)}[norm]
        total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 2 / scale
    return total / len(student)


@every_norm
@every_map_loss
def test_hint_loss(holds, norm):
    holds(lambda student, teacher: hint_loss(student, teacher, norm), MAPS)


@every_norm
@every_grid
def test_hint_loss_agrees_with_a_naive_loop(norm, ours, theirs):
    student, teacher = random(0, 3, 2, *ours), random(1, 3, 2, *theirs)
    expected = naive_hint(student, teacher, norm, tuple(map(min, ours, theirs)))

    assert hint_loss(student, teacher, norm).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_agrees_with_finite_differences_through_pooling():
    student, teacher = random(0, 2, 2, 5, 2).requires_grad_(), random(1, 2, 2, 3, 4)

    assert torch.autograd.gradcheck(lambda s: hint_loss(s, teacher), student)


@every_norm
def test_a_teacher_that_is_exactly_silent_leaves_a_finite_loss_and_gradient(norm):
    student, teacher = torch.ones(2, 2, 4, 4).requires_grad_(), torch.zeros(2, 2, 4, 4)

    loss = hint_loss(student, teacher, norm)
    loss.backward()

    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert norm != "relative" or loss.item() == student.grad.abs().max() == 0


@pytest.mark.parametrize("scale", [7.0, 1e-3, 1e-4, 1e-8])
def test_a_relative_hint_does_not_see_the_scale_of_activations(scale):
    student, teacher = (random(seed, 3, 2, 4, 6, dtype=torch.float32) for seed in (0, 1))

    found = hint_loss(scale * student, scale * teacher)

    torch.testing.assert_close(found, hint_loss(student, teacher), rtol=1e-5, atol=0)


def test_a_hint_of_other_channels_is_refused_with_the_remedy():
    with pytest.raises(FlowShapeError, match=r"got \(3, 5\) and \(3, 2\)\. A 1x1 convolution"):
        hint_loss(torch.ones(3, 2, 4, 4), torch.ones(3, 5, 4, 4))


def test_fitnets_gives_one_hint_in_the_middle_then_kd_with_a_falling_weight():
    assert [stage.describe() for stage in FitNets().schedule(30, TAPS)] == [
        "hint stage 3: 10 epochs at 0.1: 1 hint[relative] at 3",
        "task stage: 20 epochs at 0.1: 1 task + 0.444->0.111 soft[T=3]",
    ]


def test_layerwise_hints_are_added_one_by_one_from_the_bottom():
    assert [stage.describe() for stage in LayerwiseHint().schedule(30, TAPS)] == [
        "hint stage 2: 3.33 epochs at 0.1: 1 hint[relative] at 2",
        "hint stage 4: 3.33 epochs at 0.1: 1 hint[relative] at 2 4",
        "hint stage 6: 3.33 epochs at 0.1: 1 hint[relative] at 2 4 6",
        "task stage: 20 epochs at 0.1: 1 task + 0.444->0.111 soft[T=3]",
    ]


@pytest.mark.parametrize("kind", [FitNets, LayerwiseHint])
def test_soft_targets_fall_to_a_quarter_whatever_the_temperature(kind):
    soft = kind(soft_weight=8.0, temperature=2.0).schedule(30, TAPS)[-1].terms[1]

    assert [soft.weight_at(done) * 2.0**2 for done in (0, 1)] == [8.0, 2.0]


@pytest.mark.parametrize("kind", [FitNets, LayerwiseHint])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"share": 1.0}, "`0 < share < 1`"),
        ({"norm": "unit"}, "`norm` must be one of relative, mean, sum"),
        ({"clip_norm": 0.0}, "`clip_norm > 0`"),
    ],
)
def test_settings_outside_their_rules_are_refused(kind, setting, message):
    with pytest.raises(ConfigError, match=message):
        kind(**setting)


@pytest.mark.parametrize("kind", [FitNets, LayerwiseHint])
def test_hints_are_clipped_and_described_by_what_is_searched(kind):
    stages = kind(clip_norm=2.0).schedule(30, TAPS)

    assert [stage.clip_norm for stage in stages] == [2.0] * (len(stages) - 1) + [None]
    assert kind().describe() == "share 0.3333, hint_rate 0.1, rate 0.1, soft_weight 4, temperature 3"
