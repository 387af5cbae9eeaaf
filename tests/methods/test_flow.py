"""FSP matrices and the flow loss."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dfkt.errors import ConfigError, FlowShapeError
from dfkt.methods import flow
from dfkt.methods.flow import FLOW_NORMS, FlowLoss, flow_loss
from dfkt.methods.matrices import fsp_matrices, fsp_matrix
from dfkt.methods.patterns import flow_pairs

SHAPES = [(3, 8), (4, 8), (5, 4), (6, 2)]
every_norm = pytest.mark.parametrize("norm", FLOW_NORMS)


def random_taps(seed: int, shapes=SHAPES, images: int = 3, dtype=torch.float64) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        tap: torch.rand(images, channels, grid, grid, generator=generator, dtype=dtype)
        for tap, (channels, grid) in enumerate(shapes)
    }


def naive_fsp(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Yim et al., Eq. 1, entry by entry; ``lower`` and ``upper`` of one image on one grid."""
    matrix = torch.zeros(lower.shape[0], upper.shape[0], dtype=lower.dtype)
    for i, j in itertools.product(range(lower.shape[0]), range(upper.shape[0])):
        for s, t in itertools.product(range(lower.shape[1]), range(lower.shape[2])):
            matrix[i, j] += lower[i, s, t] * upper[j, s, t]
    return matrix / (lower.shape[1] * lower.shape[2])


@torch.no_grad()
def naive_loss(teacher, student, pairs, weights, norm) -> float:
    """Yim et al., Eq. 2, image by image."""
    total, images = 0.0, len(teacher[0])
    for (i, j), weight in zip(pairs, weights, strict=True):
        for b in range(images):
            t, s = (
                naive_fsp(F.adaptive_max_pool2d(taps[i][b], taps[j].shape[2:]), taps[j][b])
                for taps in (teacher, student)
            )
            if norm == "unit":
                t, s = (m / (m.square().sum().sqrt() or 1) for m in (t, s))
            distance = float((t - s).square().sum())
            scale = {"sum": 1.0, "mean": t.numel(), "relative": float(t.square().sum()) or math.inf, "unit": 1.0}[norm]
            total += weight * distance / scale / images
    return total


@every_norm
@pytest.mark.parametrize("pattern", ["adjacent", "sliding-2", "from-bottom", "to-top", "dense-2", "dense"])
def test_flow_loss_agrees_with_a_naive_loop_in_float64(norm, pattern):
    teacher, student, pairs = random_taps(0), random_taps(1), flow_pairs(pattern, 4)
    weights = [0.5 + k for k in range(len(pairs))]

    found = flow_loss(teacher, student, pairs, weights, norm)

    assert found.item() == pytest.approx(naive_loss(teacher, student, pairs, weights, norm), rel=1e-11)


def test_fsp_matrix_agrees_with_a_naive_loop_on_one_grid():
    lower, upper = random_taps(0)[0], random_taps(1)[1]

    found = fsp_matrix(lower, upper)

    torch.testing.assert_close(found[2], naive_fsp(lower[2], upper[2]))


@every_norm
def test_flow_loss_is_zero_for_identical_networks(norm):
    taps = random_taps(0)
    assert flow_loss(taps, taps, flow_pairs("dense", 4), [1.0] * 6, norm).item() == pytest.approx(0, abs=1e-12)


def test_no_gradient_reaches_the_teacher_and_all_of_the_student_gets_one():
    teacher, student = random_taps(0), random_taps(1)
    for tap in (*teacher.values(), *student.values()):
        tap.requires_grad_()

    flow_loss(teacher, student, flow_pairs("dense", 4), [1.0] * 6).backward()

    assert all(tap.grad is None for tap in teacher.values())
    assert all(tap.grad is not None and bool(tap.grad.abs().sum() > 0) for tap in student.values())


@every_norm
def test_gradient_agrees_with_finite_differences(norm):
    shapes = [(2, 4), (2, 4), (3, 2)]
    teacher, student = random_taps(0, shapes, 2), random_taps(1, shapes, 2)
    student = {tap: value.requires_grad_() for tap, value in student.items()}
    pairs = flow_pairs("dense", 3)

    def loss(*values):
        return flow_loss(teacher, dict(enumerate(values)), pairs, [1.0, 0.5, 2.0], norm)

    assert torch.autograd.gradcheck(loss, tuple(student.values()))


@every_norm
def test_channels_last_and_contiguous_maps_give_the_same_loss(norm):
    teacher, student, pairs = random_taps(0), random_taps(1), flow_pairs("dense", 4)
    last = [
        {t: v.contiguous(memory_format=torch.channels_last) for t, v in taps.items()} for taps in (teacher, student)
    ]

    first = flow_loss(teacher, student, pairs, [1.0] * 6, norm)

    torch.testing.assert_close(flow_loss(*last, pairs, [1.0] * 6, norm), first)


def scaled(taps, factor, dtype=torch.float32):
    return {tap: (factor * value).to(dtype).requires_grad_() for tap, value in taps.items()}


@pytest.mark.parametrize("factor", [7.0, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("norm", ["relative", "unit"])
def test_a_loss_without_unit_does_not_see_the_scale_of_activations(norm, factor):
    teacher, student, pairs = random_taps(0), random_taps(1), flow_pairs("dense", 4)
    exact = flow_loss(teacher, student, pairs, [1.0] * 6, norm)

    found = flow_loss(scaled(teacher, factor), scaled(student, factor), pairs, [1.0] * 6, norm)

    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("factor", [7.0, 1e-4, 1e-7])
def test_a_unit_loss_does_not_see_the_scale_of_one_network_and_keeps_a_gradient(factor):
    teacher, student, pairs = random_taps(0), random_taps(1), flow_pairs("dense", 4)
    ours = scaled(student, factor)

    found = flow_loss(scaled(teacher, 1.0), ours, pairs, [1.0] * 6, "unit")
    found.backward()

    assert found.item() == pytest.approx(flow_loss(teacher, student, pairs, [1.0] * 6, "unit").item(), rel=1e-5)
    assert all(value.grad.isfinite().all() and value.grad.abs().sum() > 0 for value in ours.values())


@every_norm
@pytest.mark.parametrize("silent", [(0,), (0, 1, 2, 3)], ids=["one tap", "every tap"])
def test_a_teacher_that_is_exactly_silent_leaves_a_finite_loss_and_gradient(norm, silent):
    """Where a matrix of the teacher is zero, ``relative`` says nothing, and ``unit`` that the student's should be zero too."""
    teacher = {tap: value * (tap not in silent) for tap, value in random_taps(0).items()}
    student, pairs = scaled(random_taps(1), 1.0, torch.float64), flow_pairs("from-bottom", 4)

    loss = flow_loss(teacher, student, pairs, [1.0] * 3, norm)
    loss.backward()

    assert loss.item() == pytest.approx(naive_loss(teacher, student, pairs, [1.0] * 3, norm))
    assert all(value.grad.isfinite().all() for value in student.values())
    assert norm != "relative" or loss.item() == max(value.grad.abs().max() for value in student.values()) == 0


@every_norm
def test_a_silent_student_has_a_finite_gradient(norm):
    teacher, student, pairs = random_taps(0), scaled(random_taps(1), 0.0, torch.float64), flow_pairs("dense", 4)

    loss = flow_loss(teacher, student, pairs, [1.0] * 6, norm)
    loss.backward()

    assert loss.item() == pytest.approx(naive_loss(teacher, student, pairs, [1.0] * 6, norm))
    assert all(value.grad.isfinite().all() for value in student.values())


@every_norm
def test_two_silent_networks_have_no_loss_and_no_gradient(norm):
    silent, student = (scaled(random_taps(0), 0.0, torch.float64) for _ in range(2))

    loss = flow_loss(silent, student, flow_pairs("dense", 4), [1.0] * 6, norm)
    loss.backward()

    assert loss.item() == 0
    assert all(value.grad.abs().max() == 0 for value in student.values())


@every_norm
def test_a_loss_that_was_measured_in_inference_mode_can_be_trained_by(norm):
    teacher, student, pairs = random_taps(0), scaled(random_taps(1), 1.0, torch.float64), flow_pairs("dense", 4)
    loss = FlowLoss(pairs, [1.0] * 6, norm)
    with torch.inference_mode():
        measured = loss(teacher, student)

    value = loss(teacher, student)
    value.backward()

    assert value.item() == measured.item()
    assert all(tap.grad.abs().sum() > 0 for tap in student.values())


def test_a_deep_networks_densest_loss_is_planned_once_for_all_steps(monkeypatch):
    """A ResNet-110 has 55 taps and 1485 pairs."""
    shapes = [(2, 8)] * 19 + [(3, 4)] * 18 + [(4, 2)] * 18
    planned = []
    plan = flow._plan_grids
    monkeypatch.setattr(flow, "_plan_grids", lambda *a: planned.append(a) or plan(*a))
    pairs = flow_pairs("dense", len(shapes))
    loss = FlowLoss(pairs, [1.0] * len(pairs))

    for seed in range(3):
        loss(random_taps(seed, shapes, 2, torch.float32), random_taps(9, shapes, 2, torch.float32))

    assert len(planned) == 1
    loss(random_taps(0, shapes, 1, torch.float32), random_taps(9, shapes, 1, torch.float32))  # the last, smaller batch
    loss(random_taps(0, shapes, 2, torch.float32), random_taps(9, shapes, 2, torch.float32))
    assert len(planned) == 2


def test_a_step_makes_no_tensor_from_numbers_of_the_host(monkeypatch):
    """On a GPU each would be a copy to it, and a wait."""
    teacher, student, pairs = random_taps(0), random_taps(1), flow_pairs("dense", 4)
    loss = FlowLoss(pairs, [1.0] * 6)
    loss(teacher, student)
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: pytest.fail("torch.tensor was called"))

    loss(teacher, student)


def test_a_pair_that_is_named_twice_weighs_twice():
    teacher, student = random_taps(0), random_taps(1)

    twice = flow_loss(teacher, student, [(0, 1), (0, 1)], [1.0, 0.5])

    torch.testing.assert_close(twice, flow_loss(teacher, student, [(0, 1)], [1.5]))


def test_a_loss_names_the_taps_that_it_reads():
    assert FlowLoss([(2, 3), (0, 2)], [1.0, 1.0]).taps == (0, 2, 3)


@pytest.mark.parametrize(
    ("pairs", "weights", "norm", "message"),
    [
        ([], [], "relative", "one weight per flow pair"),
        ([(0, 1)], [1.0, 2.0], "relative", "one weight per flow pair"),
        ([(0, 1)], [1.0], "literal", "`norm` must be one of relative, unit, mean, sum"),
    ],
)
def test_pairs_weights_and_norms_that_do_not_fit_are_refused(pairs, weights, norm, message):
    with pytest.raises(ConfigError, match=message):
        FlowLoss(pairs, weights, norm)


def test_teacher_and_student_may_live_on_different_grids():
    teacher = {0: torch.ones(1, 2, 16, 16), 1: torch.ones(1, 2, 8, 8)}
    student = {0: torch.ones(1, 2, 8, 8), 1: torch.ones(1, 2, 4, 4)}

    assert flow_loss(teacher, student, [(0, 1)], [1.0]).item() == 0


def test_bfloat16_maps_are_compared_in_float32():
    taps = [random_taps(seed, dtype=torch.bfloat16) for seed in (0, 1)]

    assert flow_loss(*taps, flow_pairs("dense", 4), [1.0] * 6).dtype == torch.float32


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ((2, 3, 4, 4), (2, 3, 8, 8), "lower is 4x4 and upper 8x8"),
        ((2, 3, 4, 4), (3, 3, 4, 4), "got 2 and 3"),
    ],
)
def test_maps_that_cannot_meet_are_refused(lower, upper, message):
    with pytest.raises(FlowShapeError, match=message):
        fsp_matrix(torch.ones(lower), torch.ones(upper))


def test_channels_that_differ_are_refused_with_the_tap_named():
    teacher, student = random_taps(0), random_taps(1, [(3, 8), (9, 8), (5, 4), (6, 2)])
    with pytest.raises(FlowShapeError, match="tap 1 has"):
        flow_loss(teacher, student, [(0, 1)], [1.0])


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("blocks", [1, 4, 9], ids=["resnet8", "resnet26", "resnet56"])
def test_no_intermediate_of_the_densest_loss_outgrows_the_largest_activation(blocks):
    shapes = [(16, 32)] + [(16, 32)] * blocks + [(32, 16)] * blocks + [(64, 8)] * blocks
    teacher, student = (random_taps(seed, shapes, 40, torch.float32) for seed in (0, 1))
    pairs = flow_pairs("dense", len(shapes))
    largest = LargestTensor()

    with largest:
        flow_loss(teacher, {t: v.requires_grad_() for t, v in student.items()}, pairs, [1.0] * len(pairs)).backward()

    assert largest.numel <= teacher[0].numel()


@every_norm
@pytest.mark.parametrize("pattern", ["dense", "to-top", "sliding-2", "adjacent"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_given_matrices_of_more_pairs_make_the_same_loss_and_gradients_to_the_last_bit(norm, pattern, kind):
    teacher, pairs = random_taps(0, dtype=kind), flow_pairs(pattern, 4)
    loss = FlowLoss(pairs, [1.0 + k for k in range(len(pairs))], norm)
    given = fsp_matrices(teacher, flow_pairs("dense", 4))
    found = []
    for matrices in (None, given):
        student = scaled(random_taps(1), 1.0, torch.float32)
        value = loss(teacher if matrices is None else {}, student, matrices)
        value.backward()
        found.append([value, *(tap.grad for tap in student.values() if tap.grad is not None)])

    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_matrices_are_kept_in_16_bits_where_activations_are():
    taps = random_taps(0, dtype=torch.bfloat16)

    rounded = fsp_matrices(taps, [(0, 1)])[0, 1]

    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, fsp_matrix(taps[0], taps[1]).bfloat16(), rtol=0, atol=0)
    assert fsp_matrices(random_taps(0, dtype=torch.float32), [(0, 1)])[0, 1].dtype == torch.float32


def test_given_matrices_may_be_cut_with_the_batch():
    shapes = [(16, 8)] * 9
    teacher, student = (random_taps(seed, shapes, 8, torch.float32) for seed in (0, 1))
    pairs = flow_pairs("dense", len(shapes))
    loss = FlowLoss(pairs, [1.0] * len(pairs))

    value = loss(teacher, student)

    assert min(grid.chunk for grid in next(iter(loss._plans.values()))) < 8
    assert torch.equal(loss({}, student, fsp_matrices(teacher, pairs)), value)


def test_matrices_of_another_shape_are_refused():
    teacher, student = random_taps(0), random_taps(1)
    matrices = fsp_matrices(teacher, [(0, 1)])

    with pytest.raises(FlowShapeError, match=r"matrices of pair \(0, 1\) must be"):
        flow_loss_of(matrices, {tap: value[:1] for tap, value in student.items()})


def flow_loss_of(matrices, student):
    return FlowLoss([(0, 1)], [1.0])({}, student, matrices)
