"""FSP matrices and the flow loss: pure functions of tensors.

Shapes: B images, M and N channels of the lower and the upper tap, H x W grid.

The flow loss of many pairs is computed grid by grid. All lower maps that meet on one grid are pooled to it
and laid side by side, likewise the upper ones; one batched matrix product then holds the FSP matrix of every
pair as a block. Sums over blocks are two more, tiny, products. So a dense pattern costs hardly more than one pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfkt.config import FlowNorm
from dfkt.errors import FlowShapeError
from dfkt.methods.patterns import FlowPair

EPSILON = 1e-8
"""Smallest squared norm of a teacher's FSP matrix that a relative loss divides by."""


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
    return _fsp([_pool(lower, *upper.shape[2:])], [upper])


def flow_loss(
    teacher: Mapping[int, Tensor],
    student: Mapping[int, Tensor],
    pairs: Sequence[FlowPair],
    weights: Sequence[float],
    norm: FlowNorm = "relative",
) -> Tensor:
    """Return the flow loss between two networks, averaged over images and summed over pairs.

    ``L = 1/B * sum over b, p of  weights[p] * d_p(b)``, where with the FSP matrices ``T`` and ``S`` of pair p

    - ``sum``: ``d = ||T - S||_F^2``, the literal squared Frobenius norm;
    - ``mean``: that over the number of entries, ``M * N``;
    - ``relative``: that over the teacher's ``||T||_F^2``, so that a weight means the same in every pair and data set;
    - ``unit``: ``||T / ||T||_F - S / ||S||_F||_F^2``, which does not ask for the teacher's size of activations.

    Larger lower grids are max-pooled to the upper one. No gradient reaches the teacher.

    Args:
        teacher: Activations by tap, ``[B, C, H, W]`` each; channels agree with the student's, grids need not.
        student: Activations by tap.
        pairs: (lower tap, upper tap) of each flow pair.
        weights: One weight per pair, not negative.
        norm: How a pair's distance is normalised.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        FlowShapeError: If batch sizes or channels differ, or an upper grid is larger than a lower one.

    References:
        Yim et al., CVPR 2017, Eq. 2 is ``sum``; ``mean``, ``relative`` and ``unit`` are this project's.
        Two public implementations differ from Eq. 2: one adds unsquared column norms, the other pools by averaging.

    Example:
        >>> teacher = {0: torch.ones(4, 2, 8, 8), 1: torch.ones(4, 3, 8, 8)}
        >>> flow_loss(teacher, {0: 2 * teacher[0], 1: teacher[1]}, [(0, 1)], [1.0], "mean").item()
        1.0
    """
    for tap in {tap for pair in pairs for tap in pair}:
        if teacher[tap].shape[:2] != student[tap].shape[:2]:
            raise FlowShapeError(
                f"Images and channels of teacher and student must agree, but tap {tap} has "
                f"{tuple(teacher[tap].shape[:2])} and {tuple(student[tap].shape[:2])}."
            )
    pooled = {id(taps): dict(taps) for taps in (teacher, student)}
    largest = max(student[tap][0].numel() for pair in pairs for tap in pair)
    total = torch.zeros((), device=student[pairs[0][0]].device)
    for grid, members in _by_grid(student, teacher, pairs):
        lowers, uppers = (sorted({pairs[p][end] for p in members}) for end in (0, 1))
        factors = tuple(tuple(sum(weights[p] for p in members if pairs[p] == (i, j)) for j in uppers) for i in lowers)
        maps: list[list[Tensor]] = []
        for taps, side in ((teacher, grid[2:]), (student, grid[:2])):
            kept = pooled[id(taps)]
            kept |= {i: _pool(kept[i] if _divides(side, kept[i]) else taps[i], *side) for i in lowers}
            maps += [[kept[i] for i in lowers], [taps[j] for j in uppers]]
        for part in _parts(maps, largest):
            total = total + _grid_loss(part, factors, norm)
    return total / student[pairs[0][0]].shape[0]


def _grid_loss(maps: list[list[Tensor]], factors: tuple[tuple[float, ...], ...], norm: FlowNorm) -> Tensor:
    """Return the weighted sum of distances over all pairs that meet on one grid and over the images."""
    teacher_lowers, teacher_uppers, student_lowers, student_uppers = maps
    with torch.no_grad():
        target = _fsp(teacher_lowers, teacher_uppers)
    heights = tuple(t.shape[1] for t in student_lowers)
    widths = tuple(t.shape[1] for t in student_uppers)
    weight = _constant(factors, target.device, target.dtype)
    matrices = _fsp(student_lowers, student_uppers)
    if norm == "unit":
        scale = _block_sums(matrices.square(), heights, widths) * _block_sums(target.square(), heights, widths)
        cosines = _block_sums(matrices * target, heights, widths) * scale.clamp_min(EPSILON**2).rsqrt()
        distances = 2 - 2 * cosines
    else:
        distances = _block_sums((matrices - target).square(), heights, widths)
    if norm == "relative":
        distances = distances / _block_sums(target.square(), heights, widths).clamp_min(EPSILON)
    if norm == "mean":
        entries = tuple(tuple(1 / (h * w) for w in widths) for h in heights)
        weight = weight * _constant(entries, target.device, target.dtype)
    return (weight * distances).sum()


def _block_sums(matrix: Tensor, heights: tuple[int, ...], widths: tuple[int, ...]) -> Tensor:
    """Sum a block matrix ``[B, sum of heights, sum of widths]`` block by block: ``[B, len(heights), len(widths)]``."""
    if len(heights) == len(widths) == 1:
        return matrix.sum((1, 2), keepdim=True)
    rows, columns = (_members(sizes, matrix.device, matrix.dtype) for sizes in (heights, widths))
    return rows @ (matrix @ columns.T)


@lru_cache(maxsize=256)
def _members(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``[len(sizes), sum of sizes]``: one where an entry belongs to a block. Kept, so that no step sends it anew."""
    return torch.block_diag(*(torch.ones(1, size) for size in sizes)).to(device, dtype)


@lru_cache(maxsize=256)
def _constant(values: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _fsp(lowers: list[Tensor], uppers: list[Tensor]) -> Tensor:
    """Return the FSP matrices of every lower with every upper map, all on one grid: ``[B, sum of M, sum of N]``."""
    if lowers[0].shape[0] != uppers[0].shape[0]:
        raise FlowShapeError(f"Batch sizes must agree, but got {lowers[0].shape[0]} and {uppers[0].shape[0]}.")
    product: Tensor = _Product.apply(_side_by_side(lowers), _side_by_side(uppers))
    return product


class _Product(torch.autograd.Function):
    """``left[b].T @ right[b] / positions``, whose gradients lie as its inputs do.

    PyTorch's own gradient of ``bmm`` would lie transposed, and everything below it in the student's backward pass would
    copy its way back to channels-last.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        """Multiply ``[B, P, M]`` with ``[B, P, N]`` to ``[B, M, N]``."""
        ctx.save_for_backward(left, right)
        return torch.bmm(left.transpose(1, 2), right).mul_(1 / right.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both factors."""
        left, right = ctx.saved_tensors
        gradient = gradient * (1 / right.shape[1])
        return torch.bmm(right, gradient.transpose(1, 2)), torch.bmm(left, gradient)


def _side_by_side(maps: list[Tensor]) -> Tensor:
    """Return ``[B, positions, sum of channels]``: the order in which channels-last maps lie, so nothing is copied."""
    joined = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
    joined = joined if joined.dtype == torch.float64 else joined.float()
    return joined.permute(0, 2, 3, 1).flatten(1, 2)


def _pool(maps: Tensor, height: int, width: int) -> Tensor:
    h, w = maps.shape[2:]
    if (h, w) == (height, width):
        return maps
    if h < height or w < width:
        raise FlowShapeError(f"The upper grid must not be larger, but lower is {h}x{w} and upper {height}x{width}.")
    if _divides((height, width), maps):
        return F.max_pool2d(maps, (h // height, w // width))
    return F.adaptive_max_pool2d(maps, (height, width))


def _divides(grid: Sequence[int], maps: Tensor) -> bool:
    """Whether maps can be pooled to a grid by equal windows; then it does not matter in how many steps."""
    return maps.shape[2] % grid[0] == 0 and maps.shape[3] % grid[1] == 0


def _by_grid(
    student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], pairs: Sequence[FlowPair]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Group the pairs' numbers by the grids, the student's and the teacher's, of their upper taps; largest grids first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, upper) in enumerate(pairs):
        grid = (*student[upper].shape[2:], *teacher[upper].shape[2:])
        groups.setdefault(grid, []).append(number)
    return sorted(groups.items(), reverse=True)


def _parts(maps: list[list[Tensor]], largest: int) -> Iterator[list[list[Tensor]]]:
    """Cut the batch so that neither the joined maps nor the FSP matrices outgrow the largest activation."""
    lowers, uppers = maps[-2:]
    images = uppers[0].shape[0]
    m, n = (sum(t.shape[1] for t in taps) for taps in (lowers, uppers))
    most = max(max(m, n) * uppers[0].shape[2:].numel(), m * n)
    size = max(1, images * largest // most)
    if size >= images:
        yield maps
        return
    pieces = [[t.split(size) for t in taps] for taps in maps]
    for k in range(len(pieces[0][0])):
        yield [[piece[k] for piece in taps] for taps in pieces]
