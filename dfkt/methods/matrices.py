"""FSP matrices: functions of tensors.

Shapes: B images, M and N channels of the lower and the upper tap, H x W grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfkt.errors import FlowShapeError
from dfkt.methods.patterns import FlowPair

Taps = Mapping[int, Tensor]
Matrices = Mapping[FlowPair, Tensor]


def fsp_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the FSP matrix of a flow pair.

    ``G[b, m, n] = mean over h, w of lower[b, m, h, w] * upper[b, n, h, w]``

    Args:
        lower: Activation at the lower tap, ``[B, M, H1, W1]``.
        upper: Activation at the upper tap, ``[B, N, H2, W2]``; its grid is not larger.

    Returns:
        ``[B, M, N]``, float32 (float64 for float64 input), in squared activation units.

    Raises:
        FlowShapeError: If batch sizes differ, or the upper grid is larger.

    References:
        Yim et al., CVPR 2017, Eq. 1; a larger lower grid is max-pooled, as there.

    Example:
        >>> fsp_matrix(torch.ones(1, 2, 8, 8), 2 * torch.ones(1, 3, 4, 4))
        tensor([[[2., 2., 2.],
                 [2., 2., 2.]]])
    """
    return products([pool(lower, *upper.shape[2:])], [upper])


def fsp_matrices(taps: Taps, pairs: Iterable[FlowPair]) -> dict[FlowPair, Tensor]:
    """Return the FSP matrices of some flow pairs, ``[B, M, N]`` each, as a flow loss computes the teacher's: without gradient.

    They are float32, float64 of float64 activations, and rounded to 16 bits of activations in 16 bits.

    Args:
        taps: Activations by tap, ``[B, C, H, W]`` each.
        pairs: (lower tap, upper tap) of each.

    Raises:
        FlowShapeError: If batch sizes differ, or an upper grid is larger than a lower one.
    """
    computed = TeacherMatrices(taps)
    return {pair: computed(pair) for pair in pairs}


class TeacherMatrices:
    """A teacher's FSP matrices, computed from its activations when they are asked for."""

    def __init__(self, taps: Taps) -> None:
        self.taps, self.pooled = taps, dict(taps)

    @torch.no_grad()
    def __call__(self, pair: FlowPair, rows: slice = slice(None)) -> Tensor:
        """Return a pair's matrices of some images, ``[B, M, N]``.

        Each pair has a product of its own, so its last bits do not depend on which others are asked for. Of activations in
        16 bits they are rounded to 16 bits too: half as much to keep.
        """
        i, j = pair
        upper, lower = self.taps[j], self.pooled[i]
        size = upper.shape[2:]
        if lower.shape[2:] != size:
            self.pooled[i] = lower = pool(lower if divides(size, lower) else self.taps[i], *size)
        found = products([rows_of(lower, rows)], [rows_of(upper, rows)])
        return found.to(upper.dtype) if upper.dtype.itemsize < 4 else found


def products(lowers: list[Tensor], uppers: list[Tensor]) -> Tensor:
    """Return the FSP matrices of every lower with every upper map, all on one grid: ``[B, sum of M, sum of N]``."""
    if lowers[0].shape[0] != uppers[0].shape[0]:
        raise FlowShapeError(f"Batch sizes must agree, but got {lowers[0].shape[0]} and {uppers[0].shape[0]}.")
    left, right = _side_by_side(lowers), _side_by_side(uppers)
    if left.dtype != right.dtype:
        left, right = left.float(), right.float()
    found: Tensor = _Product.apply(left, right)
    return found


class _Product(torch.autograd.Function):
    """``left[b].T @ right[b] / positions``, float32 or float64, whose gradients lie as its inputs do and have their type.

    Of bfloat16 factors each sum is rounded to bfloat16 once, at its end.

    PyTorch's own gradient of ``bmm`` would lie transposed, and everything below it in the student's backward pass would
    copy its way back to channels-last.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        """Multiply ``[B, P, M]`` with ``[B, P, N]`` to ``[B, M, N]``."""
        ctx.save_for_backward(left, right)
        found = torch.bmm(left.transpose(1, 2), right)
        found = found.float() if found.dtype.itemsize < 4 else found
        return found.mul_(1 / right.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both factors."""
        left, right = ctx.saved_tensors
        gradient = (gradient * (1 / right.shape[1])).to(left.dtype)
        return torch.bmm(right, gradient.transpose(1, 2)), torch.bmm(left, gradient)


def _side_by_side(maps: list[Tensor]) -> Tensor:
    """Return ``[B, positions, sum of channels]``: the order in which channels-last maps lie, so nothing is copied.

    What comes in float16 is widened: sums of its products overflow.
    """
    joined = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
    joined = joined.float() if joined.dtype == torch.float16 else joined
    return joined.permute(0, 2, 3, 1).flatten(1, 2)


def pool(maps: Tensor, height: int, width: int) -> Tensor:
    """Max-pool maps to a grid that is not larger."""
    h, w = maps.shape[2:]
    if (h, w) == (height, width):
        return maps
    if h < height or w < width:
        raise FlowShapeError(f"The upper grid must not be larger, but lower is {h}x{w} and upper {height}x{width}.")
    if divides((height, width), maps):
        return F.max_pool2d(maps, (h // height, w // width))
    return F.adaptive_max_pool2d(maps, (height, width))


def divides(grid: Sequence[int], maps: Tensor) -> bool:
    """Whether maps can be pooled to a grid by equal windows; then it does not matter in how many steps."""
    return maps.shape[2] % grid[0] == 0 and maps.shape[3] % grid[1] == 0


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Return some images' rows; a tensor that needs no cut is passed on as it is."""
    return tensor if rows == slice(None) else tensor[rows]
