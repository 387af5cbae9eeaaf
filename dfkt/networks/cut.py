"""Networks cut off behind their highest tap.

Networks are cut with :mod:`torch.fx`: what a tap does not depend on is not in the cut network, and what is in it is
shared with the whole network, parameters and running statistics alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from dfkt.errors import TapError
from dfkt.networks.taps import modes_kept
from dfkt.networks.trace import is_inplace, memory_homes, tap_node, trace


def _needed(network: nn.Module, nodes: Sequence[fx.Node], outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Return those of the nodes that the outputs depend on, also by overwriting what another one gave."""
    needed: set[fx.Node] = set()
    waiting = list(outputs)
    home = memory_homes(network, nodes)
    overwriting = [node for node in nodes if is_inplace(network, node)]
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        written = {home[node] for node in needed}
        waiting = [node for node in overwriting if node not in needed and home[node] in written]
    return needed


def _as_returned(network: nn.Module, graph: fx.Graph, taps: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """Copy the activations that are overwritten later: a tap is what its module returned."""
    home = memory_homes(network, graph.nodes)
    overwriting = [node for node in graph.nodes if is_inplace(network, node)]
    kept = {}
    for key, node in taps.items():
        kept[key] = node
        if any(node < other and home[other] is home[node] for other in overwriting):
            with graph.inserting_after(node):
                kept[key] = graph.call_method("clone", (node,))
    return kept


def _cut_graph(network: nn.Module, names: Mapping[str, str], logits: bool) -> fx.Graph:
    graph, tracer = trace(network)
    taps = {key: tap_node(network, tracer, name) for name, key in names.items()}
    end = graph.output_node()
    result = end.args[0]
    if logits and not isinstance(result, fx.Node):
        raise TapError(f"{type(network).__name__} must return logits, but returns several values.")
    whole = {"logits": result} if logits and isinstance(result, fx.Node) else {}
    graph.erase_node(end)
    nodes = list(graph.nodes)
    below = nodes if whole else nodes[: max(map(nodes.index, taps.values())) + 1]
    needed = _needed(network, below, [*taps.values(), *whole.values()])
    for node in reversed(nodes):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)
    graph.output(_as_returned(network, graph, taps) | whole)
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
    from torchvision.models.feature_extraction import DualGraphModule  # takes seconds to import

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
    return _paths(network, cut(network, {name: name}))


def parameters_unread(network: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that the logits do not depend on; none of a network that cannot be traced.

    Example:
        >>> parameters_unread(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        frozenset()
    """
    try:
        read = _paths(network, cut(network, {}, logits=True))
    except TapError:
        return frozenset()
    return frozenset(path for path, _ in network.named_parameters()) - read


def _paths(network: nn.Module, part: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that a part shares with its network."""
    shared = {id(parameter) for parameter in part.parameters()}
    return frozenset(path for path, parameter in network.named_parameters() if id(parameter) in shared)
