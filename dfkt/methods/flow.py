"""FSP matrices and the flow loss: functions of tensors.

Shapes: B images, M and N channels of the lower and the upper tap, H x W grid.

The flow loss of many pairs is computed grid by grid. All lower maps that meet on one grid are pooled to it
and laid side by side, likewise the upper ones; one batched matrix product then holds the FSP matrix of every
pair as a block. Sums over blocks are two more, tiny, products. So a dense pattern costs hardly more than one pair.
What follows from pairs and shapes alone is planned once and kept (:class:`FlowLoss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfkt.config import check_choice, check_rule
from dfkt.errors import FlowShapeError
from dfkt.methods.patterns import FlowPair

FlowNorm = Literal["relative", "unit", "mean", "sum"]
FLOW_NORMS: tuple[FlowNorm, ...] = get_args(FlowNorm)
Taps = Mapping[int, Tensor]


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
    teacher: Taps, student: Taps, pairs: Sequence[FlowPair], weights: Sequence[float], norm: FlowNorm = "relative"
) -> Tensor:
    """Return the flow loss between two networks once; a stage keeps a :class:`FlowLoss`, which says what it is.

    Example:
        >>> teacher = {0: torch.ones(4, 2, 8, 8), 1: torch.ones(4, 3, 8, 8)}
        >>> flow_loss(teacher, {0: 2 * teacher[0], 1: teacher[1]}, [(0, 1)], [1.0], "mean").item()
        1.0
    """
    return FlowLoss(pairs, weights, norm)(teacher, student)


class FlowLoss:
    """The flow loss between two networks, averaged over images and summed over pairs.

    ``L = 1/B * sum over b, p of  weights[p] * d_p(b)``, where with the FSP matrices ``T`` and ``S`` of pair p

    - ``sum``: ``d = ||T - S||_F^2``, the literal squared Frobenius norm;
    - ``mean``: that over the number of entries, ``M * N``;
    - ``relative``: that over the teacher's ``||T||_F^2``, so that a weight means the same in every pair and data set,
      whatever the size of activations; where ``T`` is exactly zero, ``d = 0``;
    - ``unit``: ``||T / ||T||_F - S / ||S||_F||_F^2``, which does not ask for the teacher's size of activations; a matrix
      that is exactly zero stays zero and gets no gradient.

    Larger lower grids are max-pooled to the upper one. No gradient reaches the teacher.

    Args:
        pairs: (lower tap, upper tap) of each flow pair.
        weights: One weight per pair, not negative.
        norm: How a pair's distance is normalised.

    Raises:
        ConfigError: If there are no pairs, another number of weights, or the norm is unknown.

    References:
        Yim et al., CVPR 2017, Eq. 2 is ``sum``; ``mean``, ``relative`` and ``unit`` are this project's.
        Two public implementations differ from Eq. 2: one adds unsquared column norms, the other pools by averaging.
    """

    def __init__(self, pairs: Sequence[FlowPair], weights: Sequence[float], norm: FlowNorm = "relative") -> None:
        check_rule(0 < len(pairs) == len(weights), "one weight per flow pair", pairs=len(pairs), weights=len(weights))
        check_choice("norm", norm, FLOW_NORMS)
        self.pairs, self.weights, self.norm = tuple(pairs), tuple(weights), norm
        self.taps = tuple(sorted({tap for pair in pairs for tap in pair}))
        self._plans: dict[tuple[Any, ...], list[_Grid]] = {}

    def __call__(self, teacher: Taps, student: Taps) -> Tensor:
        """Return the loss.

        Args:
            teacher: Activations by tap, ``[B, C, H, W]`` each; channels agree with the student's, grids need not.
            student: Activations by tap.

        Returns:
            Scalar, float32 (float64 for float64 input).

        Raises:
            FlowShapeError: If batch sizes or channels differ, or an upper grid is larger than a lower one.
        """
        pooled = dict(teacher), dict(student)
        total = torch.zeros((), device=student[self.pairs[0][0]].device)
        for grid in self._plan(teacher, student):
            maps: list[list[Tensor]] = []
            for taps, kept, side in zip((teacher, student), pooled, (grid.teacher, grid.student), strict=True):
                kept |= {i: _pool(kept[i] if _divides(side, kept[i]) else taps[i], *side) for i in grid.lowers}
                maps += [[kept[i] for i in grid.lowers], [taps[j] for j in grid.uppers]]
            for chunk in _chunks(maps, grid.chunk):
                total = total + self._distance(chunk, grid)
        return total / student[self.pairs[0][0]].shape[0]

    def _plan(self, teacher: Taps, student: Taps) -> list[_Grid]:
        """Return what follows from the shapes, kept from step to step."""
        some = student[self.pairs[0][0]]
        dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
        shapes = tuple((teacher[tap].shape, student[tap].shape) for tap in self.taps)
        key = (shapes, some.device, dtype)
        if key not in self._plans:
            with torch.inference_mode(False):  # what was made under it could not be used in a later backward pass
                self._plans[key] = list(_plan_grids(self, teacher, student, some.device, dtype))
        return self._plans[key]

    def _distance(self, maps: list[list[Tensor]], grid: _Grid) -> Tensor:
        """Return the weighted sum of distances over all pairs that meet on one grid and over the images."""
        teacher_lowers, teacher_uppers, student_lowers, student_uppers = maps
        with torch.no_grad():
            target = _fsp(teacher_lowers, teacher_uppers)
        matrices = _fsp(student_lowers, student_uppers)
        if self.norm == "unit":
            ours, theirs = (grid.block_sums(m.square()) for m in (matrices, target))
            products = grid.block_sums(matrices * target)  # divided by roots: the gradient of rsqrt would overflow
            cosines = products / _or_infinite(ours).sqrt() / _or_infinite(theirs).sqrt()
            distances = (ours != 0).to(ours) + (theirs != 0).to(ours) - 2 * cosines
        else:
            distances = grid.block_sums((matrices - target).square())
        if self.norm == "relative":
            distances = distances / _or_infinite(grid.block_sums(target.square()))
        return (grid.weights * distances).sum()


@dataclass(frozen=True, eq=False)
class _Grid:
    """The flow pairs whose upper taps lie on one grid, the student's and the teacher's."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    lowers: tuple[int, ...]
    uppers: tuple[int, ...]
    weights: Tensor
    """``[lowers, uppers]``, zero where there is no pair."""
    rows: Tensor
    """``[lowers, sum of M]``: one where a row of the block matrix belongs to a lower tap."""
    columns: Tensor
    """``[uppers, sum of N]``, likewise."""
    chunk: int
    """Images at a time, so that nothing outgrows the largest activation."""

    def block_sums(self, matrix: Tensor) -> Tensor:
        """Sum a block matrix ``[B, sum of M, sum of N]`` block by block: ``[B, lowers, uppers]``."""
        if len(self.lowers) == len(self.uppers) == 1:
            return matrix.sum((1, 2), keepdim=True)
        return self.rows @ (matrix @ self.columns.T)


def _plan_grids(
    loss: FlowLoss, teacher: Taps, student: Taps, device: torch.device, dtype: torch.dtype
) -> Iterator[_Grid]:
    """Group the pairs by the grids of their upper taps; largest grids first."""
    for tap in loss.taps:
        if teacher[tap].shape[:2] != student[tap].shape[:2]:
            raise FlowShapeError(
                f"Images and channels of teacher and student must agree, but tap {tap} has "
                f"{tuple(teacher[tap].shape[:2])} and {tuple(student[tap].shape[:2])}."
            )
    groups: dict[tuple[int, ...], dict[FlowPair, float]] = {}
    for pair, weight in zip(loss.pairs, loss.weights, strict=True):
        grid = (*student[pair[1]].shape[2:], *teacher[pair[1]].shape[2:])
        group = groups.setdefault(grid, {})
        group[pair] = group.get(pair, 0) + weight
    largest = max(student[tap][0].numel() for tap in loss.taps)
    for grid, group in sorted(groups.items(), reverse=True):
        lowers, uppers = (tuple(sorted({pair[end] for pair in group})) for end in (0, 1))
        heights, widths = ([student[tap].shape[1] for tap in taps] for taps in (lowers, uppers))
        weights = torch.tensor([[group.get((i, j), 0.0) for j in uppers] for i in lowers], dtype=dtype)
        if loss.norm == "mean":
            weights = weights * torch.tensor([[1 / (h * w) for w in widths] for h in heights], dtype=dtype)
        rows, columns = (torch.block_diag(*(torch.ones(1, n) for n in sizes)) for sizes in (heights, widths))
        most = max(max(sum(heights), sum(widths)) * math.prod(grid[:2]), sum(heights) * sum(widths))
        yield _Grid(
            student=grid[:2], teacher=grid[2:], lowers=lowers, uppers=uppers, weights=weights.to(device),
            rows=rows.to(device, dtype), columns=columns.to(device, dtype),
            chunk=max(1, len(student[lowers[0]]) * largest // most),
        )  # fmt: skip


def _or_infinite(squares: Tensor) -> Tensor:
    """Return squared norms to divide by: what was exactly zero, by infinity, so that nothing comes of it."""
    return squares.masked_fill(squares == 0, math.inf)


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


def _chunks(maps: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """Cut the batch into chunks; one that needs no cut is passed on as it is."""
    if size >= maps[-1][0].shape[0]:
        yield maps
        return
    pieces = [[t.split(size) for t in taps] for taps in maps]
    for k in range(len(pieces[0][0])):
        yield [[piece[k] for piece in taps] for taps in pieces]
