"""Where a network that does not know its taps could be read: behind its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from dfkt.networks.taps import record_calls

SIZES = (64, 224, 32, 28, 8)
"""Heights and widths at which a network is tried where the images are not known, until it takes one."""

Shapes = dict[str, list[int]]
"""What modules returned, by path, in order; only of those that ran once and returned ``[B, C, H, W]``, not 1x1."""


def suggest_taps(
    network: nn.Module, input_shape: tuple[int, int, int] | None = None, *, limit: int = 8
) -> tuple[str, ...]:
    """Return module paths that can be named as taps, from bottom to top, at most ``limit``, evenly spread.

    A block is a module with convolutions in it; containers (``nn.Sequential`` of such modules, and whatever is not
    called itself, as ``nn.ModuleList``) are opened, and so is a module that holds the whole network. A convolution that
    belongs to no block is read behind the normalisation and the activation that follow it. The network is run once, on
    zeros, to see what it computes in which order.

    Args:
        network: Left as it is.
        input_shape: Channels, height and width of an image; ``None`` tries usual sizes.
        limit: At least 2.

    Returns:
        Nothing if the network does not take the images, or has fewer than two such places.

    Example:
        >>> def block(inside, outside):
        ...     return nn.Sequential(nn.Conv2d(inside, outside, 3), nn.BatchNorm2d(outside), nn.ReLU())
        >>> suggest_taps(nn.Sequential(block(3, 4), block(4, 8), block(8, 8)))
        ('0', '1', '2')
    """
    shapes = _shapes(network, input_shape)
    found = tuple(_narrowing(_Blocks(network, shapes).all(), shapes))
    if len(found) < 2:
        return ()
    if len(found) > limit:
        return tuple(found[round(k * (len(found) - 1) / (limit - 1))] for k in range(limit))
    return found


def _shapes(network: nn.Module, input_shape: tuple[int, int, int] | None) -> Shapes:
    """Run the network on the images, or at the first size that it takes."""
    channels = [module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    usual = [(channels[0], size, size) for size in SIZES] if channels else []
    paths = [path for path, _ in network.named_modules() if path]
    for shape in [input_shape] if input_shape else usual:
        try:
            calls = record_calls(network, paths, shape)
        except (Exception, SystemExit):  # a forward pass may raise anything when the size does not fit
            continue
        times = Counter(path for path, _ in calls)
        return {p: shape for p, shape in calls if times[p] == 1 and shape and len(shape) == 4 and shape[2:] != [1, 1]}
    return {}


def _narrowing(paths: Iterable[str], shapes: Shapes) -> Iterator[str]:
    """Yield the paths in the order in which they are computed, without those whose grid is larger than one before."""
    order = list(shapes)
    height, width = float("inf"), float("inf")
    for path in sorted(paths, key=order.index):
        if shapes[path][2] <= height and shapes[path][3] <= width:
            height, width = shapes[path][2:]
            yield path


class _Blocks:
    """The blocks of a network, from what its modules returned."""

    def __init__(self, network: nn.Module, shapes: Shapes) -> None:
        self.network, self.shapes = network, shapes
        self.order = {path: position for position, path in enumerate(shapes)}

    def all(self) -> list[str]:
        """Return the blocks, opening modules from the outside until there are two to choose from."""
        blocks = self.inside("")
        while len(blocks) < 2:
            opened = [deeper for block in blocks for deeper in self.inside(block) or [block]]
            if opened == blocks:
                break
            blocks = opened
        return blocks

    def inside(self, path: str) -> list[str]:
        """Return the blocks among a module's children."""
        blocks: list[str] = []
        bare = False  # the last block is a convolution, or what followed it
        for child in self.children(path):
            module = self.network.get_submodule(child)
            if not _has_convolution(module):
                if bare and self.shapes.get(child) == self.shapes[blocks[-1]]:
                    blocks[-1] = child
            elif self.is_container(child, module):
                blocks += self.inside(child)
                bare = False
            elif child in self.shapes:
                blocks.append(child)
                bare = isinstance(module, nn.Conv2d)
        return blocks

    def children(self, path: str) -> list[str]:
        """Return the paths of a module's children in the order in which they are computed, as far as they are."""
        paths = [f"{path}.{name}".lstrip(".") for name, _ in self.network.get_submodule(path).named_children()]
        return sorted(paths, key=self.position)

    def position(self, path: str) -> int:
        """Return where a module, or the first one inside it, comes in the order of computing."""
        if path in self.order:
            return self.order[path]
        return next((k for inner, k in self.order.items() if inner.startswith(f"{path}.")), len(self.order))

    def is_container(self, path: str, module: nn.Module) -> bool:
        """Return whether the blocks are inside a module rather than the module itself."""
        if path not in self.shapes:
            return True
        inner = [child for child in module.children() if _has_convolution(child)]
        return isinstance(module, nn.Sequential) and not all(isinstance(child, nn.Conv2d) for child in inner)


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Conv2d) for inner in module.modules())
