"""Similarity-preserving distillation."""

import math

import pytest
import torch
from loss_checks import MAPS, every_grid, every_map_loss, flat, random

from dfkt.methods.similarity import Similarity, similarity_loss
from dfkt.networks.taps import StudentTaps


def naive_similarity(student, teacher) -> float:
    """Tung and Mori, entry by entry of the batch's similarities."""
    normal = []
    for batch in (student, teacher):
        rows = [flat(channels) for channels in batch.tolist()]
        products = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
        normal.append([[value / math.hypot(*row) for value in row] for row in products])
    return sum(math.dist(s, t) ** 2 for s, t in zip(*normal, strict=True)) / len(student) ** 2


@every_map_loss
def test_similarity_loss(holds):
    holds(similarity_loss, MAPS)


@every_grid
def test_similarity_loss_agrees_with_a_naive_loop_whatever_the_channels(ours, theirs):
    student, teacher = random(0, 3, 2, *ours), random(1, 3, 5, *theirs)

    assert similarity_loss(student, teacher).item() == pytest.approx(naive_similarity(student, teacher), rel=1e-12)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: 50 * m,
        lambda m: m[:, [2, 0, 1]],
        lambda m: (m.flatten(1) @ torch.linalg.qr(random(2, 72, 72)).Q).view_as(m),
    ],
    ids=["scaled as a whole", "channels permuted", "features rotated"],
)
def test_similarity_loss_does_not_see(change, side):
    maps = {"student": random(0, 3, 3, 4, 6), "teacher": random(1, 3, 3, 4, 6)}
    changed = maps | {side: change(maps[side])}

    torch.testing.assert_close(similarity_loss(**changed), similarity_loss(**maps))


def test_an_image_that_one_network_is_silent_on_spoils_no_gradient():
    student, teacher = random(0, 3, 2, 4, 3, dtype=torch.float32), random(1, 3, 2, 4, 3, dtype=torch.float32)
    student[0], teacher[1] = 0, 0
    student.requires_grad_()

    similarity_loss(student, teacher).backward()

    assert student.grad.abs().max() < 1
    assert student.grad[2].abs().max() > 0


def test_similarity_is_beside_the_labels_at_the_group_ends_and_reads_the_whole_batch():
    (stage,) = Similarity().schedule(30, StudentTaps(7, (0, 2, 4, 6)))

    assert stage.describe() == "task stage: 30 epochs at 0.1: 1 task + 3000 similarity at 2 4 6"
    assert [term.whole_batch for term in stage.terms] == [False, True]
    assert Similarity().describe() == "rate 0.1, weight 3000"
