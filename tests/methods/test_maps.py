"""What losses over activation maps share."""

import pytest
import torch
from loss_checks import random

from dfkt.errors import FlowShapeError
from dfkt.methods.base import Features
from dfkt.methods.maps import MapTerm, check_images, meet, unit_rows, wide


class Difference(MapTerm):
    """The mean difference of two maps."""

    name = "difference"

    def loss(self, student, teacher):
        """Return it."""
        return (student - teacher).mean()


def test_a_term_adds_up_its_taps_and_reads_no_others():
    student = Features({k: torch.full((1, 1, 1, 1), float(k)) for k in range(4)})
    teacher = Features({k: torch.zeros(1, 1, 1, 1) for k in range(4)})

    assert Difference(taps=(1, 3))(teacher, student, torch.zeros(1)).item() == 4
    assert Difference(taps=(2,))(teacher, student, torch.zeros(1)).item() == 2


def test_rows_are_divided_by_their_norm_and_a_row_of_zeros_gets_no_gradient():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)

    found = unit_rows(rows)
    found.sum().backward()

    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert rows.grad.isfinite().all()
    assert rows.grad[1].tolist() == [0, 0]


def test_the_larger_map_is_averaged_along_each_side_and_an_equal_one_is_left_alone():
    tall, broad = random(0, 2, 3, 6, 2), random(1, 2, 3, 3, 4)

    found = meet(tall, broad)
    same = meet(tall, tall)

    assert [tuple(m.shape[-2:]) for m in found] == [(3, 2), (3, 2)]
    torch.testing.assert_close(found[0], tall.unflatten(2, (3, 2)).mean(3))
    assert all(m is tall for m in same)


def test_half_types_are_widened_and_others_kept():
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    assert [wide(torch.zeros(1, dtype=t)).dtype for t in types] == [torch.float32] * 3 + [torch.float64]


def test_different_numbers_of_images_are_refused():
    with pytest.raises(FlowShapeError, match="the same images, but got 2 and 3"):
        check_images(torch.zeros(3, 1), torch.zeros(2, 1))
