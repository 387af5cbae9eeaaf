"""Taps are measured as the network computes them; teacher taps meet student taps at the same share of a group."""

import copy

import pytest
import torch
from tiny_networks import Odd, modes, resnet
from torch import nn

from dfkt.errors import TapError
from dfkt.networks.taps import StudentTaps, Tap, group_ends, match_taps, measure_taps


def taps_of(depth):
    """Return what measuring a ResNet of this depth on images of 32x32 gives, without the network."""
    blocks = (depth - 2) // 6
    grids = [32] * (1 + blocks) + [16] * blocks + [8] * blocks
    return [Tap("t", 1, grid, grid) for grid in grids]


# ---------------------------------------------------------------- measuring


def test_measured_shapes_are_those_of_the_activations():
    network = resnet(8, 0.5)
    assert measure_taps(network, network.taps, (3, 28, 20)) == (
        Tap("stem", 8, 28, 20),
        Tap("layer1.0", 8, 28, 20),
        Tap("layer2.0", 16, 14, 10),
        Tap("layer3.0", 32, 7, 5),
    )


def test_measuring_leaves_modes_statistics_and_hooks_as_they_were():
    network = resnet()
    network.layer1.eval()
    before, state = modes(network), copy.deepcopy(network.state_dict())
    measure_taps(network, network.taps, (3, 8, 8))
    assert modes(network) == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_without_names_nothing_is_run():
    class NeverRun(nn.Module):
        def forward(self, x):
            raise AssertionError("was run")

    assert measure_taps(NeverRun(), (), (3, 8, 8)) == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["frist"], "Unknown tap 'frist'.*Did you mean first"),
        ([""], "Unknown tap ''"),
        (["first", "unused"], "'unused' ran 0 times"),
        (["first", "twice"], "'twice' ran 2 times"),
        (["first", "first"], "'first' ran 2 times"),
        (["widen", "first"], "from bottom to top: first, widen; but got widen, first"),
        (["first", "pair"], "'pair' gives no tensor"),
        (["first", "widen"], "must not grow.*first 6x6, widen 12x12"),
    ],
)
def test_taps_that_cannot_be_measured_are_refused(names, message):
    with pytest.raises(TapError, match=message):
        measure_taps(Odd(), names, (3, 8, 8))


def test_activations_that_are_no_maps_and_images_that_do_not_fit_are_refused():
    network = resnet()
    with pytest.raises(TapError, match=r"'fc' gives shape \[1, 5\]"):
        measure_taps(network, ["stem", "fc"], (3, 8, 8))
    with pytest.raises(TapError, match="ResNet cannot take images of 1x8x8: RuntimeError"):
        measure_taps(network, ["stem"], (1, 8, 8))
    assert not network.stem._forward_hooks


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (8, 26, (0, 4, 8, 12)),
        (8, 32, (0, 5, 10, 15)),
        (14, 32, (0, 3, 5, 8, 10, 13, 15)),
        (20, 32, (0, 2, 4, 5, 7, 9, 10, 12, 14, 15)),
        (14, 14, (0, 1, 2, 3, 4, 5, 6)),
        (14, 8, (0, 1, 1, 2, 2, 3, 3)),
        (26, 14, (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)),
    ],
)
def test_each_student_tap_meets_the_teacher_tap_at_the_same_share_of_its_group(student, teacher, expected):
    assert match_taps(taps_of(student), taps_of(teacher)) == expected


def test_group_ends_meet_group_ends_for_every_pair_of_depths():
    for n_s in range(1, 8):
        for n_t in range(1, 8):
            student, teacher = ([Tap("t", 1, g, g) for g in (9, *[9] * n, *[5] * n, *[3] * n)] for n in (n_s, n_t))
            matched = match_taps(student, teacher)
            assert [matched[g * n_s] for g in range(4)] == [g * n_t for g in range(4)]
            assert list(matched) == sorted(matched)


def test_different_numbers_of_groups_are_refused_with_both_lists_of_grids():
    student, teacher = taps_of(8), [Tap("t", 1, g, g) for g in (8, 8, 4)]
    with pytest.raises(TapError, match=r"cannot be matched: teacher 8x8, 8x8, 4x4; student 32x32.*--student-taps"):
        match_taps(student, teacher)
    with pytest.raises(TapError, match="teacher none"):
        match_taps(student, [])


def test_a_schedule_is_told_the_number_of_taps_and_where_groups_end():
    assert StudentTaps.of(taps_of(14)) == StudentTaps(7, (0, 2, 4, 6))
    assert StudentTaps.of(taps_of(8)[:1]) == StudentTaps(1, (0,))
    assert StudentTaps.of(()) == StudentTaps(0, ())
    assert StudentTaps.of(taps_of(14), taps_of(8)) == StudentTaps(7, (0, 2, 4, 6), (0, 1, 1, 2, 2, 3, 3))
    with pytest.raises(TapError, match="teacher none"):
        StudentTaps.of(taps_of(14), ())
    assert group_ends(()) == ()
