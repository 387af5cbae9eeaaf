"""What every loss between two networks must hold, and the papers' sums entry by entry."""

import math
from itertools import product

import pytest
import torch

GRIDS = {
    "equal": ((4, 6), (4, 6)),
    "student larger": ((4, 6), (2, 3)),
    "teacher larger, uneven windows": ((3, 2), (5, 7)),
    "one taller, one wider": ((6, 2), (3, 4)),
}
LOGITS, MAPS = (3, 5), (3, 2, 4, 3)
every_grid = pytest.mark.parametrize(("ours", "theirs"), GRIDS.values(), ids=GRIDS)


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_softmax(row, temperature):
    exponentials = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_divergence(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))


def naive_pool(channel, height, width):
    """Window i of n along a side of k entries reaches from floor(i k / n) to ceil((i + 1) k / n)."""

    def window(i, n, k):
        return range(i * k // n, -(-(i + 1) * k // n))

    pooled = [[0.0] * width for _ in range(height)]
    for i, j in product(range(height), range(width)):
        rows, columns = window(i, height, len(channel)), window(j, width, len(channel[0]))
        pooled[i][j] = sum(channel[r][c] for r in rows for c in columns) / (len(rows) * len(columns))
    return pooled


def flat(channels):
    return [value for channel in channels for row in channel for value in row]


def equal_networks_have_no_loss_and_no_gradient(loss, shape):
    student = random(0, *shape, dtype=torch.float32).requires_grad_()

    value = loss(student, student.detach().clone())
    value.backward()

    assert value.item() == pytest.approx(0, abs=1e-7)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-6)


def the_gradient_agrees_with_finite_differences_and_none_reaches_the_teacher(loss, shape):
    student, teacher = random(0, *shape).requires_grad_(), random(1, *shape).requires_grad_()

    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


def a_teacher_run_in_inference_mode_gives_the_same_gradient(loss, shape):
    def gradient(teacher, dtype):
        student = random(0, *shape, dtype=dtype).requires_grad_()
        loss(student, teacher).backward()
        return student.grad

    for dtype in (torch.float64, torch.bfloat16):
        with torch.inference_mode():
            teacher = random(1, *shape, dtype=dtype)
        assert teacher.is_inference()
        plain = gradient(random(1, *shape, dtype=dtype), dtype)
        torch.testing.assert_close(gradient(teacher, dtype), plain, rtol=0, atol=0)


def it_may_first_be_called_in_inference_mode(loss, shape):
    student, teacher = random(0, *shape).requires_grad_(), random(1, *shape)
    with torch.inference_mode():
        first = loss(student, teacher)

    value = loss(student, teacher)
    value.backward()

    assert value.item() == first.item()
    assert student.grad.abs().sum() > 0


def narrow_inputs_are_compared_in_float32(loss, shape):
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = random(0, *shape, dtype=dtype), random(1, *shape, dtype=dtype)
        found = loss(student, teacher)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(student.float(), teacher.float()))


def it_looks_at_no_value_so_it_never_waits_for_the_device(loss, shape):
    """On the meta device there are no values: whatever asks for one raises."""
    student, teacher = (torch.empty(shape, device="meta") for _ in range(2))

    loss(student.requires_grad_(), teacher).backward()

    assert student.grad.shape == student.shape


def channels_last_and_contiguous_maps_give_the_same_loss(loss, shape):
    student, teacher = random(0, *shape), random(1, *shape)
    last = [m.contiguous(memory_format=torch.channels_last) for m in (student, teacher)]

    torch.testing.assert_close(loss(*last), loss(student, teacher))
    torch.testing.assert_close(loss(last[0], teacher), loss(student, teacher))


def a_teacher_on_a_larger_grid_may_have_run_in_inference_mode(loss, shape):
    student = random(0, *shape).requires_grad_()
    with torch.inference_mode():
        teacher = random(1, *shape[:2], 2 * shape[2], 2 * shape[3])

    loss(student, teacher).backward()

    assert student.grad.abs().sum() > 0


def batches_that_differ_are_refused(loss, shape):
    from dfkt.errors import FlowShapeError

    with pytest.raises(FlowShapeError, match=r"got .*1.* and .*3"):
        loss(torch.ones(3, *shape[1:]), torch.ones(1, *shape[1:]))


def two_silent_networks_have_no_loss_and_no_gradient(loss, shape):
    student = torch.zeros(shape).requires_grad_()

    value = loss(student, torch.zeros(shape))
    value.backward()

    assert value.item() == 0
    assert student.grad.abs().max() == 0


ANY = (
    equal_networks_have_no_loss_and_no_gradient,
    the_gradient_agrees_with_finite_differences_and_none_reaches_the_teacher,
    a_teacher_run_in_inference_mode_gives_the_same_gradient,
    it_may_first_be_called_in_inference_mode,
    narrow_inputs_are_compared_in_float32,
    it_looks_at_no_value_so_it_never_waits_for_the_device,
)
every_loss = pytest.mark.parametrize("holds", ANY, ids=lambda check: check.__name__)
every_map_loss = pytest.mark.parametrize(
    "holds",
    [
        *ANY,
        channels_last_and_contiguous_maps_give_the_same_loss,
        a_teacher_on_a_larger_grid_may_have_run_in_inference_mode,
        batches_that_differ_are_refused,
        two_silent_networks_have_no_loss_and_no_gradient,
    ],
    ids=lambda check: check.__name__,
)
