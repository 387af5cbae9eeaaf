"""Attention transfer."""

import math

import pytest
import torch
from loss_checks import MAPS, every_grid, every_map_loss, flat, naive_pool, random

from dfkt.methods.attention import Attention, attention_loss
from dfkt.networks.taps import StudentTaps


def naive_attention(student, teacher, grid) -> float:
    """Zagoruyko and Komodakis, Eq. 2, image by image, beta one over the elements and the batch size."""
    total = 0.0
    for image in zip(student.tolist(), teacher.tolist(), strict=True):
        maps = []
        for channels in image:
            height, width = len(channels[0]), len(channels[0][0])
            squares = [[sum(c[h][w] ** 2 for c in channels) for w in range(width)] for h in range(height)]
            values = flat([naive_pool(squares, *grid)])
            maps.append([value / math.hypot(*values) for value in values])
        total += math.dist(*maps) / 2 / (grid[0] * grid[1])
    return total / len(student)


@every_map_loss
def test_attention_loss(holds):
    holds(attention_loss, MAPS)


@every_grid
def test_attention_loss_agrees_with_a_naive_loop_whatever_the_channels(ours, theirs):
    student, teacher = random(0, 3, 2, *ours), random(1, 3, 5, *theirs)
    grid = tuple(map(min, ours, theirs))

    assert attention_loss(student, teacher).item() == pytest.approx(naive_attention(student, teacher, grid), rel=1e-12)


def test_the_gradient_agrees_with_finite_differences_through_pooling():
    student, teacher = random(0, 2, 2, 5, 2).requires_grad_(), random(1, 2, 2, 3, 4)

    assert torch.autograd.gradcheck(lambda s: attention_loss(s, teacher), student)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m * torch.tensor([0.1, 3.0, 50.0]).double()[:, None, None, None],
        lambda m: m[:, [2, 0, 1]],
        lambda m: torch.cat([m, -m], 1),
    ],
    ids=["scaled image by image", "channels permuted", "channels doubled"],
)
def test_attention_loss_does_not_see(change, side):
    maps = {"student": random(0, 3, 3, 4, 6), "teacher": random(1, 3, 3, 4, 6)}
    changed = maps | {side: change(maps[side])}

    torch.testing.assert_close(attention_loss(**changed), attention_loss(**maps))


def test_a_silent_student_has_a_loss_and_no_gradient():
    student = torch.zeros(3, 2, 4, 3).requires_grad_()

    value = attention_loss(student, random(1, 3, 2, 4, 3, dtype=torch.float32))
    value.backward()

    assert value.item() == pytest.approx(1 / 2 / 12)
    assert student.grad.abs().max() == 0


def test_an_image_that_one_network_is_silent_on_spoils_no_gradient():
    student, teacher = random(0, 3, 2, 4, 3, dtype=torch.float32), random(1, 3, 2, 4, 3, dtype=torch.float32)
    student[0], teacher[1] = 0, 0
    student.requires_grad_()

    attention_loss(student, teacher).backward()

    assert student.grad.abs().max() < 1
    assert student.grad[2].abs().max() > 0


def test_attention_is_beside_the_labels_at_the_group_ends():
    (stage,) = Attention().schedule(30, StudentTaps(7, (0, 2, 4, 6)))

    assert stage.describe() == "task stage: 30 epochs at 0.1: 1 task + 1000 attention at 2 4 6"
    assert Attention().describe() == "rate 0.1, weight 1000"
