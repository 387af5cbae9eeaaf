"""Which modules are read, and which teacher tap meets which student tap.

A tap is named by the path of a module, and reads what that module returns.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import nn

from dfkt.errors import DfktError, TapError, one_line


@dataclass(frozen=True)
class Tap:
    """A tap and the shape of one image's activation there."""

    name: str
    """Path of the module whose output is read."""
    channels: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True)
class StudentTaps:
    """What a method's schedule needs to know of a student's taps; none for a method that reads none.

    Example:
        >>> StudentTaps.of([Tap("t", 1, size, size) for size in (8, 8, 8, 4, 4)])
        StudentTaps(count=5, group_ends=(0, 2, 4), matched=None)
        >>> StudentTaps.of(())
        StudentTaps(count=0, group_ends=(), matched=None)
    """

    count: int
    """Number of taps."""
    group_ends: tuple[int, ...]
    """Tap 0 and the last tap of every group of equal grids, as :func:`group_ends` gives them."""
    matched: tuple[int, ...] | None = None
    """The teacher tap that each one meets, as :func:`match_taps` gives it; ``None`` where no teacher is known."""

    @classmethod
    def of(cls, taps: Sequence[Tap], teacher: Sequence[Tap] | None = None) -> StudentTaps:
        """Return number and group ends of measured taps, matched with those of a teacher that is read at taps.

        Raises:
            TapError: As :func:`match_taps`.
        """
        return cls(len(taps), group_ends(taps), None if teacher is None else match_taps(taps, teacher))


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Give every module its own training or evaluation mode back, also where they differ."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def find_module(network: nn.Module, name: str) -> nn.Module:
    """Return the module at a path, or raise :class:`TapError` with the nearest paths."""
    paths: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    if not name or name not in paths:
        near = difflib.get_close_matches(name, paths, n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TapError(f"Unknown tap {name!r}: {type(network).__name__} has no module at this path.{meant}")
    return paths[name]


def record_calls(
    network: nn.Module, names: Sequence[str], input_shape: tuple[int, int, int]
) -> list[tuple[str, list[int] | None]]:
    """Run a network once and return what the named modules gave, in the order in which they ended.

    The pass is of zeros, in evaluation mode, without gradient. Whatever the forward pass raises is raised.

    Args:
        network: Left as it is, modes, running statistics and hooks included.
        names: Module paths; a module that runs twice is listed twice.
        input_shape: Channels, height and width of an image.

    Returns:
        Pairs of a path and the shape of what its module returned, ``None`` where that is no tensor.
    """
    calls: list[tuple[str, list[int] | None]] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls.append((name, list(output.shape) if isinstance(output, torch.Tensor) else None))

        return hook

    like = next(network.parameters(), torch.zeros(()))
    hooks = [find_module(network, name).register_forward_hook(record(name)) for name in names]
    try:
        with modes_kept(network), torch.no_grad():
            network.eval()
            network(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def measure_taps(network: nn.Module, names: Sequence[str], input_shape: tuple[int, int, int]) -> tuple[Tap, ...]:
    """Measure the activations at the taps, with one forward pass of zeros in evaluation mode without gradient.

    Args:
        network: Left as it is, modes and running statistics included.
        names: Module paths of the taps, from bottom to top; where there are none, nothing is run.
        input_shape: Channels, height and width of an image.

    Raises:
        TapError: If a path is unknown or its module does not run exactly once, an activation is not ``[B, C, H, W]``,
            the taps are not in the order in which they are computed, or a grid grows from one tap to the next.

    Example:
        >>> measure_taps(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), ["0", "1"], (3, 8, 8))[1]
        Tap(name='1', channels=5, height=6, width=6)
    """
    if not names:
        return ()
    try:
        calls = record_calls(network, names, input_shape)
    except DfktError:
        raise
    except (Exception, SystemExit) as error:  # a forward pass may raise anything
        shape = "x".join(map(str, input_shape))
        raise TapError(f"{type(network).__name__} cannot take images of {shape}: {one_line(error)}") from error
    return _checked_taps(names, calls)


def _checked_taps(names: Sequence[str], calls: Sequence[tuple[str, list[int] | None]]) -> tuple[Tap, ...]:
    order = [name for name, _ in calls]
    for name in names:
        if order.count(name) != 1:
            raise TapError(
                f"A tap must run exactly once, but {name!r} ran {order.count(name)} times in a forward pass."
            )
    if order != list(names):
        raise TapError(f"Taps must be named from bottom to top: {', '.join(order)}; but got {', '.join(names)}.")
    taps = tuple(_tap(name, shape) for name, shape in calls)
    for low, high in pairwise(taps):
        if high.height > low.height or high.width > low.width:
            grids = f"{low.name} {low.height}x{low.width}, {high.name} {high.height}x{high.width}"
            raise TapError(f"Grids must not grow from bottom to top, but got {grids}. Name other taps.")
    return taps


def _tap(name: str, shape: list[int] | None) -> Tap:
    if shape is None or len(shape) != 4:
        got = "no tensor" if shape is None else f"shape {shape}"
        raise TapError(f"The activation at a tap must be [B, C, H, W], but {name!r} gives {got}.")
    return Tap(name, *shape[1:])


def match_taps(student: Sequence[Tap], teacher: Sequence[Tap]) -> tuple[int, ...]:
    """Return, for each student tap, the index of the teacher tap that it meets.

    Tap 0 meets tap 0. The others fall into groups of equal grids, in order; within a group of ``n_s`` student and
    ``n_t`` teacher taps, student tap b (from 1) meets teacher tap ``ceil(b * n_t / n_s)``: the one that ends the same
    share of the group. So group ends meet group ends. The grids themselves may differ between the networks. Where the
    teacher has fewer taps in a group, several student taps meet the same one.

    Raises:
        TapError: If a network has no taps, or the two have different numbers of groups.

    Example:
        >>> grids = (8, 8, 8, 4, 4)  # stem, two blocks, two blocks
        >>> teacher = [Tap("t", 1, size, size) for size in grids]
        >>> match_taps([Tap("s", 1, size, size) for size in (8, 8, 4)], teacher)
        (0, 2, 4)
    """
    sizes_s, sizes_t = _group_sizes(student), _group_sizes(teacher)
    if not student or not teacher or len(sizes_s) != len(sizes_t):
        lists = f"teacher {_grids(teacher)}; student {_grids(student)}"
        remedy = "Name taps with --student-taps or --teacher-taps; those behind the first must fall into as many grids in both."
        raise TapError(f"Teacher and student grids cannot be matched: {lists}. {remedy}")
    matched = [0]
    below = 0
    for n_s, n_t in zip(sizes_s, sizes_t, strict=True):
        matched += [below - (-b * n_t // n_s) for b in range(1, n_s + 1)]
        below += n_t
    return tuple(matched)


def group_ends(taps: Sequence[Tap]) -> tuple[int, ...]:
    """Return tap 0 and the last tap of every group; nothing where there are no taps.

    Example:
        >>> group_ends([Tap("t", 1, size, size) for size in (8, 8, 8, 4, 4)])
        (0, 2, 4)
    """
    return tuple(accumulate(_group_sizes(taps), initial=0)) if taps else ()


def _group_sizes(taps: Sequence[Tap]) -> list[int]:
    return [len(list(run)) for _, run in groupby(taps[1:], key=lambda tap: tap.grid)]


def _grids(taps: Sequence[Tap]) -> str:
    return ", ".join(f"{tap.height}x{tap.width}" for tap in taps) or "none"
