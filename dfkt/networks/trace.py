"""Networks as graphs: which node is a tap, and which values lie in the same memory."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from dfkt.errors import TapError, one_line
from dfkt.networks.taps import find_module


class Tracer(fx.Tracer):
    """Records what every module returned, by its path, besides the graph."""

    def __init__(self) -> None:
        ops = sys.modules.get("torchvision.ops")  # a network that calls them has imported them
        super().__init__(autowrap_modules=(math, ops) if ops else (math,))  # type: ignore[arg-type]  # one in its stub
        self.outputs: dict[str, list[Any]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called as a whole; every batch normalisation is.

        Its forward pass counts batches, which a trace would do once and a graph never again; and what replaces batch
        normalisations, or folds them, must find them in the cut network.
        """
        return isinstance(m, nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call and keep what it returned."""
        output = super().call_module(m, forward, args, kwargs)
        self.outputs.setdefault(self.path_of_module(m), []).append(output)
        return output


def trace(network: nn.Module) -> tuple[fx.Graph, Tracer]:
    """Record a network's forward pass, in the mode in which it is.

    Raises:
        TapError: If the network cannot be run on stand-ins for tensors.
    """
    tracer = Tracer()
    try:
        return tracer.trace(network), tracer
    except (Exception, SystemExit) as error:  # a forward pass may raise anything when it is run on proxies
        raise TapError(
            f"{type(network).__name__} cannot be traced by torch.fx ({one_line(error)}). Write its forward pass "
            "without control flow that depends on the input, or hide the part in a function marked with torch.fx.wrap."
        ) from error


def tap_node(network: nn.Module, tracer: Tracer, name: str) -> fx.Node:
    """Return the node of a graph whose value a tap reads.

    Raises:
        TapError: If the path is unknown, or its module does not run exactly once or returns no tensor.
    """
    outputs = tracer.outputs.get(tracer.path_of_module(find_module(network, name)), [])
    if len(outputs) != 1:
        raise TapError(f"A tap must run exactly once, but {name!r} ran {len(outputs)} times when traced.")
    if not isinstance(outputs[0], fx.Proxy):
        raise TapError(f"The activation at a tap must be [B, C, H, W], but {name!r} gives no tensor.")
    return outputs[0].node


_INPLACE_OPERATORS = {
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "pow")
}
_SAME_MEMORY = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)
_VIEWS = (
    "getattr getitem dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth "
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to transpose "
    "swapaxes swapdims permute movedim moveaxis chunk split tensor_split unbind select narrow diagonal unfold "
    "contiguous to float type type_as detach"
)
_SAME_MEMORY_NAMES = frozenset(_VIEWS.split())
"""Calls that may return a tensor in the memory of their first argument."""


def is_inplace(network: nn.Module, node: fx.Node) -> bool:
    """Return whether a node overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    name = _called(node)
    marked = name.endswith("_") and not name.endswith("__")
    return marked or node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True


def _called(node: fx.Node) -> str:
    """Return the name of the method or function that a node calls; empty if it calls none."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def memory_homes(network: nn.Module, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, for every node, the one whose memory its value may lie in; itself where the value is new."""
    home: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        first = node.args[0] if node.args else None
        same = is_inplace(network, node) or _called(node) in _SAME_MEMORY_NAMES
        if node.op == "call_module":
            same = same or isinstance(network.get_submodule(str(node.target)), _SAME_MEMORY)
        home[node] = home[first] if same and isinstance(first, fx.Node) else node
    return home
