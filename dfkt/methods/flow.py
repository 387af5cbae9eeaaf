"""The flow loss between two networks: functions of their activations.

Shapes: B images, M and N channels of the lower and the upper tap, H x W grid.

The student's side of a flow loss of many pairs is computed grid by grid. All lower maps that meet on one grid are pooled
to it and laid side by side, likewise the upper ones; one batched matrix product then holds the FSP matrix of every
pair as a block. Sums over blocks are two more, tiny, products. So a dense pattern costs hardly more than one pair.
The teacher's matrices come pair by pair, so that they may as well be kept ones.
What follows from pairs and shapes alone is planned once and kept (:class:`FlowLoss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dfkt.config import check_choice, check_rule
from dfkt.errors import FlowShapeError
from dfkt.methods.matrices import Matrices, Taps, TeacherMatrices, divides, pool, products, rows_of
from dfkt.methods.patterns import FlowPair

FlowNorm = Literal["relative", "unit", "mean", "sum"]
FLOW_NORMS: tuple[FlowNorm, ...] = get_args(FlowNorm)


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

    def __call__(self, teacher: Taps, student: Taps, matrices: Matrices | None = None) -> Tensor:
        """Return the loss.

        Args:
            teacher: Activations by tap, ``[B, C, H, W]`` each; channels agree with the student's, grids need not.
            student: Activations by tap.
            matrices: The teacher's FSP matrices by flow pair, as :func:`fsp_matrices` gives them; its activations are not
                read then. The loss is the same to the last bit.

        Returns:
            Scalar, float32 (float64 for float64 input).

        Raises:
            FlowShapeError: If batch sizes or channels differ, or an upper grid is larger than a lower one.
        """
        self._check(teacher, student, matrices)
        pooled, size = dict(student), student[self.pairs[0][0]].shape[0]
        total = torch.zeros((), device=student[self.pairs[0][0]].device)
        computed = TeacherMatrices(teacher)
        for grid in self._plan(student):
            pooled |= {
                i: pool(pooled[i] if divides(grid.size, pooled[i]) else student[i], *grid.size) for i in grid.lowers
            }
            lowers, uppers = [pooled[i] for i in grid.lowers], [student[j] for j in grid.uppers]
            for rows in _chunks(size, grid.chunk):
                found = {p: computed(p, rows) if matrices is None else rows_of(matrices[p], rows) for p in grid.pairs}
                ours = products([rows_of(m, rows) for m in lowers], [rows_of(m, rows) for m in uppers])
                total = total + self._distance(ours, grid.joined(found), grid)
        return total / size

    def _check(self, teacher: Taps, student: Taps, matrices: Matrices | None) -> None:
        """Raise :class:`FlowShapeError` unless both networks have the same images and channels."""
        if matrices is not None:
            for i, j in self.pairs:
                wanted, got = (*student[i].shape[:2], student[j].shape[1]), tuple(matrices[i, j].shape)
                if wanted != got:
                    raise FlowShapeError(
                        f"The teacher's FSP matrices of pair ({i}, {j}) must be {wanted}, but are {got}."
                    )
            return
        for tap in self.taps:
            if teacher[tap].shape[:2] != student[tap].shape[:2]:
                raise FlowShapeError(
                    f"Images and channels of teacher and student must agree, but tap {tap} has "
                    f"{tuple(teacher[tap].shape[:2])} and {tuple(student[tap].shape[:2])}."
                )

    def _plan(self, student: Taps) -> list[_Grid]:
        """Return what follows from the shapes, kept from step to step."""
        some = student[self.pairs[0][0]]
        dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
        key = (tuple(student[tap].shape for tap in self.taps), some.device, dtype)
        if key not in self._plans:
            with torch.inference_mode(False):  # what was made under it could not be used in a later backward pass
                self._plans[key] = list(_plan_grids(self, student, some.device, dtype))
        return self._plans[key]

    def _distance(self, matrices: Tensor, target: Tensor, grid: _Grid) -> Tensor:
        """Return the weighted sum of distances over all pairs that meet on one grid and over the images."""
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
    """The flow pairs whose upper taps lie on one grid of the student's."""

    size: tuple[int, ...]
    pairs: tuple[FlowPair, ...]
    lowers: tuple[int, ...]
    uppers: tuple[int, ...]
    weights: Tensor
    """``[lowers, uppers]``, zero where there is no pair."""
    rows: Tensor
    """``[lowers, sum of M]``: one where a row of the block matrix belongs to a lower tap."""
    columns: Tensor
    """``[uppers, sum of N]``, likewise."""
    corners: tuple[tuple[int, int], ...]
    """Row and column at which each pair's block begins."""
    chunk: int
    """Images at a time, so that nothing outgrows the largest activation."""

    def block_sums(self, matrix: Tensor) -> Tensor:
        """Sum a block matrix ``[B, sum of M, sum of N]`` block by block: ``[B, lowers, uppers]``."""
        if len(self.lowers) == len(self.uppers) == 1:
            return matrix.sum((1, 2), keepdim=True)
        return self.rows @ (matrix @ self.columns.T)

    def joined(self, matrices: Matrices) -> Tensor:
        """Lay pairs' matrices out as the blocks of one; there are zeros where there is no pair."""
        if len(self.pairs) == 1:
            return matrices[self.pairs[0]].to(self.rows.dtype)
        count = len(matrices[self.pairs[0]])
        whole = self.rows.new_zeros(count, self.rows.shape[1], self.columns.shape[1])
        for (i, j), (top, left) in zip(self.pairs, self.corners, strict=True):
            block = matrices[i, j]
            whole[:, top : top + block.shape[1], left : left + block.shape[2]] = block
        return whole


def _plan_grids(loss: FlowLoss, student: Taps, device: torch.device, dtype: torch.dtype) -> Iterator[_Grid]:
    """Group the pairs by the grids of their upper taps; largest grids first."""
    groups: dict[tuple[int, ...], dict[FlowPair, float]] = {}
    for pair, weight in zip(loss.pairs, loss.weights, strict=True):
        group = groups.setdefault(tuple(student[pair[1]].shape[2:]), {})
        group[pair] = group.get(pair, 0) + weight
    largest = max(student[tap][0].numel() for tap in loss.taps)
    for size, group in sorted(groups.items(), reverse=True):
        lowers, uppers = (tuple(sorted({pair[end] for pair in group})) for end in (0, 1))
        heights, widths = ([student[tap].shape[1] for tap in taps] for taps in (lowers, uppers))
        weights = torch.tensor([[group.get((i, j), 0.0) for j in uppers] for i in lowers], dtype=dtype)
        if loss.norm == "mean":
            weights = weights * torch.tensor([[1 / (h * w) for w in widths] for h in heights], dtype=dtype)
        rows, columns = (torch.block_diag(*(torch.ones(1, n) for n in sizes)) for sizes in (heights, widths))
        tops, lefts = (
            dict(zip(taps, accumulate(sizes, initial=0), strict=False))
            for taps, sizes in ((lowers, heights), (uppers, widths))
        )
        most = max(max(sum(heights), sum(widths)) * math.prod(size), sum(heights) * sum(widths))
        yield _Grid(
            size=size, pairs=tuple(group), lowers=lowers, uppers=uppers, weights=weights.to(device),
            rows=rows.to(device, dtype), columns=columns.to(device, dtype),
            corners=tuple((tops[i], lefts[j]) for i, j in group),
            chunk=max(1, len(student[lowers[0]]) * largest // most),
        )  # fmt: skip


def _or_infinite(squares: Tensor) -> Tensor:
    """Return squared norms to divide by: what was exactly zero, by infinity, so that nothing comes of it."""
    return squares.masked_fill(squares == 0, math.inf)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Yield the rows of every chunk of a batch; all of them where it needs no cut."""
    for start in range(0, count, size):
        yield slice(None) if size >= count else slice(start, start + size)
