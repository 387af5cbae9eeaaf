"""Networks cut off behind their highest tap, and teachers folded for inference.

Networks are cut with :mod:`torch.fx`: what a tap does not depend on is not in the cut network, and what is in it is
shared with the whole network, parameters and running statistics alike.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torchvision
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import DualGraphModule

from dfkt.errors import TapError, one_line
from dfkt.networks.taps import find_module, modes_kept


class _Tracer(fx.Tracer):
    """Records what every module returned, besides the graph."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops))
        self.outputs: dict[str, list[Any]] = {}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        self.outputs.setdefault(self.path_of_module(m), []).append(output)
        return output


def _trace(network: nn.Module) -> tuple[fx.Graph, _Tracer]:
    tracer = _Tracer()
    try:
        return tracer.trace(network), tracer
    except Exception as error:  # a forward pass may raise anything when it is run on proxies
        raise TapError(
            f"{type(network).__name__} cannot be traced by torch.fx ({one_line(error)}). Write its forward pass "
            "without control flow that depends on the input, or hide the part in a function marked with torch.fx.wrap."
        ) from error


def _tap_node(network: nn.Module, tracer: _Tracer, name: str) -> fx.Node:
    outputs = tracer.outputs.get(tracer.path_of_module(find_module(network, name)), [])
    if len(outputs) != 1:
        raise TapError(f"A tap must run exactly once, but {name!r} ran {len(outputs)} times when traced.")
    if not isinstance(outputs[0], fx.Proxy):
        raise TapError(f"The activation at a tap must be [B, C, H, W], but {name!r} gives no tensor.")
    return outputs[0].node


_INPLACE_OPERATORS = {
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "pow")
}


def _overwritten(network: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the node whose value ``node`` overwrites, if it does."""
    if node.op == "call_module":
        inplace = bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    elif node.op == "call_method":
        inplace = str(node.target).endswith("_") and not str(node.target).endswith("__")
    elif node.op == "call_function":
        inplace = node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True
    else:
        return None
    first = node.args[0] if node.args else None
    return first if inplace and isinstance(first, fx.Node) else None


def _needed(network: nn.Module, nodes: list[fx.Node], outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that the outputs depend on, those that only overwrite one of them included."""
    needed: set[fx.Node] = set()
    waiting = list(outputs)
    last = max(nodes.index(node) for node in waiting)
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        waiting = [n for n in nodes[:last] if n not in needed and _overwritten(network, n) in needed]
    return needed


def _cut_graph(network: nn.Module, names: Mapping[str, str], logits: bool) -> fx.Graph:
    graph, tracer = _trace(network)
    outputs = {key: _tap_node(network, tracer, name) for name, key in names.items()}
    nodes = list(graph.nodes)
    end = nodes.pop()
    if logits:
        if not isinstance(end.args[0], fx.Node):
            raise TapError(f"{type(network).__name__} must return logits, but returns several values.")
        outputs["logits"] = end.args[0]
    graph.erase_node(end)
    needed = _needed(network, nodes, outputs.values())
    for node in reversed(nodes):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)
    overwritten = {_overwritten(network, node) for node in graph.nodes}
    for key, node in outputs.items():
        if node in overwritten:  # the tap is what the module returned, not what a later in-place operation leaves
            with graph.inserting_after(node):
                outputs[key] = graph.call_method("clone", (node,))
    graph.output(outputs)
    return graph


def cut(network: nn.Module, names: Mapping[str, str], *, logits: bool = False) -> nn.Module:
    """Return the part of a network that its taps depend on; its forward pass returns a dict of activations.

    Parameters and buffers are shared with ``network``, under the same names. ``train()`` and ``eval()`` of the cut
    network act on the shared layers. A part of the forward pass that depends on the mode follows the cut network's own
    mode, so change the mode there, not on ``network``.

    Args:
        network: Must be traceable by :mod:`torch.fx`. Left as it is.
        names: Key in the returned dict by module path.
        logits: Return the network's output too, under the key ``logits``; then nothing is cut off.

    Raises:
        TapError: If a path is unknown, its module does not run exactly once or returns no tensor, two taps have one
            key, there is nothing to return, or the network cannot be traced.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 9, 3))
        >>> lower = cut(network, {"1": "tap1"})
        >>> {key: list(value.shape) for key, value in lower(torch.zeros(1, 3, 8, 8)).items()}
        {'tap1': [1, 5, 6, 6]}
        >>> [name for name, _ in lower.named_parameters()]
        ['0.weight', '0.bias']
    """
    keys = [*names.values(), *(["logits"] if logits else [])]
    if not keys or len(set(keys)) != len(keys):
        raise TapError(f"A cut network must return something, under keys that differ, but got keys={keys}.")
    with modes_kept(network):
        graphs = [_cut_graph(network.train(mode), names, logits) for mode in (True, False)]
    with modes_kept(network):
        part: nn.Module = DualGraphModule(network, *graphs, class_name=f"Cut{type(network).__name__}")
        part.train(network.training)
    return part


def parameters_below(network: nn.Module, name: str) -> frozenset[str]:
    """Return the names of the parameters that the activation at a tap depends on.

    Raises:
        TapError: As :func:`cut`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 9, 3))
        >>> sorted(parameters_below(network, "1"))
        ['0.bias', '0.weight']
    """
    shared = {id(parameter) for parameter in cut(network, {name: name}).parameters()}
    return frozenset(path for path, parameter in network.named_parameters() if id(parameter) in shared)


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
        graph, tracer = _trace(copied)
    except TapError:
        return copied
    read = {_tap_node(copied, tracer, name) for name in taps}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(before, fx.Node) and before not in read and _foldable(copied, tracer, before, node):
            conv, norm = (copied.get_submodule(str(n.target)) for n in (before, node))
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            _replace(copied, str(before.target), fuse_conv_bn_eval(conv, norm).requires_grad_(False))
            _replace(copied, str(node.target), nn.Identity())
    return copied


def _foldable(network: nn.Module, tracer: _Tracer, conv: fx.Node, norm: fx.Node) -> bool:
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
