"""Soft targets, whole and decoupled; hints, attention maps and similarities."""

import math
from itertools import product

import pytest
import torch

from dfkt.errors import FlowShapeError
from dfkt.methods.losses import attention_loss, decoupled_loss, hint_loss, similarity_loss, soft_target_loss

LABELS = torch.tensor([4, 0, 2])
NORMS = ("sum", "mean", "relative")
GRIDS = {
    "equal": ((4, 6), (4, 6)),
    "student larger": ((4, 6), (2, 3)),
    "teacher larger, uneven windows": ((3, 2), (5, 7)),
    "one taller, one wider": ((6, 2), (3, 4)),
}


def soft(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return soft_target_loss(student, teacher, 3.0)


def decoupled(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return decoupled_loss(student, teacher, LABELS.to(student.device), 3.0)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LOSSES = {
    "soft": (soft, (3, 5)),
    "decoupled": (decoupled, (3, 5)),
    "hint, sum": (lambda s, t: hint_loss(s, t, "sum"), (3, 2, 4, 3)),
    "hint, mean": (lambda s, t: hint_loss(s, t, "mean"), (3, 2, 4, 3)),
    "hint, relative": (hint_loss, (3, 2, 4, 3)),
    "attention": (attention_loss, (3, 2, 4, 3)),
    "similarity": (similarity_loss, (3, 2, 4, 3)),
}
every_loss = pytest.mark.parametrize(("loss", "shape"), LOSSES.values(), ids=LOSSES)
every_map_loss = pytest.mark.parametrize(("loss", "shape"), list(LOSSES.values())[2:], ids=list(LOSSES)[2:])
every_grid = pytest.mark.parametrize(("ours", "theirs"), GRIDS.values(), ids=GRIDS)


# The papers' formulas, entry by entry.


def naive_softmax(row: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_divergence(teacher: list[float], student: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))


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


def naive_pool(channel: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Window i of n along a side of k entries reaches from floor(i k / n) to ceil((i + 1) k / n)."""

    def window(i: int, n: int, k: int) -> range:
        return range(i * k // n, -(-(i + 1) * k // n))

    pooled = [[0.0] * width for _ in range(height)]
    for i, j in product(range(height), range(width)):
        rows, columns = window(i, height, len(channel)), window(j, width, len(channel[0]))
        pooled[i][j] = sum(channel[r][c] for r in rows for c in columns) / (len(rows) * len(columns))
    return pooled


def flat(channels: list[list[list[float]]]) -> list[float]:
    return [value for channel in channels for row in channel for value in row]


def naive_hint(student, teacher, norm, grid) -> float:
    """Romero et al., Eq. 3, image by image."""
    total = 0.0
    for image in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = (flat([naive_pool(channel, *grid) for channel in channels]) for channels in image)
        scale = {"sum": 1.0, "mean": len(s), "relative": sum(b * b for b in t)}[norm]
        total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 2 / scale
    return total / len(student)


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


def naive_similarity(student, teacher) -> float:
    """Tung and Mori, entry by entry of the batch's similarities."""
    normal = []
    for batch in (student, teacher):
        rows = [flat(channels) for channels in batch.tolist()]
        products = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
        normal.append([[value / math.hypot(*row) for value in row] for row in products])
    return sum(math.dist(s, t) ** 2 for s, t in zip(*normal, strict=True)) / len(student) ** 2


def test_soft_target_loss_agrees_with_the_sum_over_classes():
    student, teacher = random(0, 3, 5), random(1, 3, 5)
    total = sum(
        naive_divergence(naive_softmax(t, 3.0), naive_softmax(s, 3.0))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    )

    assert soft_target_loss(student, teacher, 3.0).item() == pytest.approx(3.0**2 * total / 3)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 6.0)])
def test_decoupled_loss_agrees_with_the_sum_over_classes(weights):
    student, teacher = random(0, 3, 5), random(1, 3, 5)

    found = decoupled_loss(student, teacher, LABELS, 2.0, *weights)

    assert found.item() == pytest.approx(naive_decoupled(student, teacher, LABELS, 2.0, *weights), rel=1e-12)


@every_grid
@pytest.mark.parametrize("norm", NORMS)
def test_hint_loss_agrees_with_a_naive_loop(norm, ours, theirs):
    student, teacher = random(0, 3, 2, *ours), random(1, 3, 2, *theirs)
    grid = tuple(map(min, ours, theirs))

    assert hint_loss(student, teacher, norm).item() == pytest.approx(
        naive_hint(student, teacher, norm, grid), rel=1e-12
    )


@every_grid
def test_attention_loss_agrees_with_a_naive_loop_whatever_the_channels(ours, theirs):
    student, teacher = random(0, 3, 2, *ours), random(1, 3, 5, *theirs)
    grid = tuple(map(min, ours, theirs))

    assert attention_loss(student, teacher).item() == pytest.approx(naive_attention(student, teacher, grid), rel=1e-12)


@every_grid
def test_similarity_loss_agrees_with_a_naive_loop_whatever_the_channels(ours, theirs):
    student, teacher = random(0, 3, 2, *ours), random(1, 3, 5, *theirs)

    assert similarity_loss(student, teacher).item() == pytest.approx(naive_similarity(student, teacher), rel=1e-12)


@every_loss
def test_equal_networks_have_no_loss_and_no_gradient(loss, shape):
    student = random(0, *shape, dtype=torch.float32).requires_grad_()

    value = loss(student, student.detach().clone())
    value.backward()

    assert value.item() == pytest.approx(0, abs=1e-7)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-6)


@every_loss
def test_gradient_agrees_with_finite_differences_and_none_reaches_the_teacher(loss, shape):
    student, teacher = random(0, *shape).requires_grad_(), random(1, *shape).requires_grad_()

    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [hint_loss, attention_loss])
def test_gradient_agrees_with_finite_differences_through_pooling(loss):
    student, teacher = random(0, 2, 2, 5, 2).requires_grad_(), random(1, 2, 2, 3, 4)

    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_run_in_inference_mode_gives_the_same_gradient(loss, shape, dtype):
    def gradient(teacher):
        student = random(0, *shape, dtype=dtype).requires_grad_()
        loss(student, teacher).backward()
        return student.grad

    with torch.inference_mode():
        teacher = random(1, *shape, dtype=dtype)

    assert teacher.is_inference()
    torch.testing.assert_close(gradient(teacher), gradient(random(1, *shape, dtype=dtype)), rtol=0, atol=0)


@every_map_loss
def test_a_teacher_on_a_larger_grid_may_have_run_in_inference_mode(loss, shape):
    student = random(0, *shape).requires_grad_()
    with torch.inference_mode():
        teacher = random(1, *shape[:2], 2 * shape[2], 2 * shape[3])

    loss(student, teacher).backward()

    assert student.grad.abs().sum() > 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_compared_in_float32(loss, shape, dtype):
    student, teacher = random(0, *shape, dtype=dtype), random(1, *shape, dtype=dtype)

    found = loss(student, teacher)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(student.float(), teacher.float()))


@every_loss
def test_no_loss_looks_at_values_so_none_waits_for_the_device(loss, shape):
    """On the meta device there are no values: whatever asks for one raises."""
    student, teacher = (torch.empty(shape, device="meta") for _ in range(2))

    loss(student.requires_grad_(), teacher).backward()

    assert student.grad.shape == student.shape


@every_map_loss
def test_channels_last_and_contiguous_maps_give_the_same_loss(loss, shape):
    student, teacher = random(0, *shape), random(1, *shape)
    last = [m.contiguous(memory_format=torch.channels_last) for m in (student, teacher)]

    torch.testing.assert_close(loss(*last), loss(student, teacher))
    torch.testing.assert_close(loss(last[0], teacher), loss(student, teacher))


@pytest.mark.parametrize("loss", [attention_loss, similarity_loss])
def test_an_image_that_one_network_is_silent_on_spoils_no_gradient(loss):
    student, teacher = random(0, 3, 2, 4, 3, dtype=torch.float32), random(1, 3, 2, 4, 3, dtype=torch.float32)
    student[0], teacher[1] = 0, 0
    student.requires_grad_()

    loss(student, teacher).backward()

    assert student.grad.abs().max() < 1
    assert student.grad[2].abs().max() > 0


def test_a_silent_students_attention_has_a_loss_and_no_gradient():
    student = torch.zeros(3, 2, 4, 3).requires_grad_()

    value = attention_loss(student, random(1, 3, 2, 4, 3, dtype=torch.float32))
    value.backward()

    assert value.item() == pytest.approx(1 / 2 / 12)
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("loss", [attention_loss, similarity_loss])
def test_two_silent_networks_have_no_loss_and_no_gradient(loss):
    student = torch.zeros(3, 2, 4, 3).requires_grad_()

    value = loss(student, torch.zeros(3, 5, 4, 3))
    value.backward()

    assert value.item() == 0
    assert student.grad.abs().max() == 0


def test_a_relative_hint_of_a_silent_teacher_is_finite():
    assert hint_loss(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)).isfinite()


def test_a_relative_hint_does_not_change_when_both_networks_are_scaled():
    student, teacher = random(0, 3, 2, 4, 6), random(1, 3, 2, 4, 6)

    torch.testing.assert_close(hint_loss(7 * student, 7 * teacher), hint_loss(student, teacher))


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


@pytest.mark.parametrize("loss", [soft, decoupled])
def test_a_constant_added_to_an_images_logits_changes_nothing(loss):
    student, teacher, constants = random(0, 3, 5), random(1, 3, 5), 10 * random(2, 3, 1)

    torch.testing.assert_close(loss(student + constants, teacher - 2 * constants), loss(student, teacher))


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


@pytest.mark.parametrize("loss", [attention_loss, similarity_loss, hint_loss])
def test_batches_that_differ_are_refused(loss):
    with pytest.raises(FlowShapeError, match=r"got .*1.* and .*3"):
        loss(torch.ones(3, 2, 4, 4), torch.ones(1, 2, 4, 4))


def test_a_hint_of_other_channels_is_refused_with_the_remedy():
    with pytest.raises(FlowShapeError, match=r"got \(3, 5\) and \(3, 2\)\. A 1x1 convolution"):
        hint_loss(torch.ones(3, 2, 4, 4), torch.ones(3, 5, 4, 4))
