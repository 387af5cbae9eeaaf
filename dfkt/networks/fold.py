"""Teachers folded for inference: batch normalisations become part of the convolutions before them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfkt.errors import TapError
from dfkt.networks.trace import Tracer, tap_node, trace


def fold_batchnorm(network: nn.Module, taps: Iterable[str] = ()) -> nn.Module:
    """Return a copy in evaluation mode whose batch normalisations are folded into the convolutions before them.

    ``W' = W * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``. Where a convolution's
    output goes nowhere but into a batch normalisation with the same parent, the first becomes both and the second an
    identity, so all module paths remain. No parameter of the copy requires a gradient. A network that cannot be traced
    is copied unfolded.

    Args:
        network: Left as it is.
        taps: Module paths that will be read; a convolution that ends one of them is not folded. Elsewhere, a
            convolution's own output in the copy is already normalised.

    Raises:
        TapError: If one of ``taps`` is unknown, does not run exactly once or returns no tensor.

    Example:
        >>> folded = fold_batchnorm(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
        >>> [name for name, _ in folded.named_parameters()]
        ['0.weight', '0.bias']
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    try:
        graph, tracer = trace(copied)
    except TapError:
        return copied
    read = {tap_node(copied, tracer, name) for name in taps}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(before, fx.Node) and before not in read and _foldable(copied, tracer, before, node):
            conv, norm = (copied.get_submodule(str(n.target)) for n in (before, node))
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            _replace(copied, str(before.target), fuse_conv_bn_eval(conv, norm).requires_grad_(False))
            _replace(copied, str(node.target), nn.Identity().eval())
    return copied


def _foldable(network: nn.Module, tracer: Tracer, conv: fx.Node, norm: fx.Node) -> bool:
    if conv.op != "call_module" or len(conv.users) != 1:
        return False
    paths = str(conv.target), str(norm.target)
    first, second = (network.get_submodule(path) for path in paths)
    return (
        type(first) is nn.Conv2d
        and type(second) is nn.BatchNorm2d
        and second.running_mean is not None
        and paths[0].rpartition(".")[0] == paths[1].rpartition(".")[0]
        and all(len(tracer.outputs[path]) == 1 for path in paths)
    )


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
