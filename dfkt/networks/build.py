"""The ResNets, and the one table from a network's name to its constructor.

Three kinds of names are known: ``resnetN`` with N = 6n+2 (the networks of the method's own experiments),
``torchvision:NAME`` for torchvision's classifiers, and ``package.module:function`` for anything else. Every
network maps images ``[B, C, H, W]`` to logits ``[B, num_classes]``; no weights are ever downloaded.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from dfkt.config import NetworkConfig
from dfkt.errors import NetworkError, TapError, one_line


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; ReLU after the addition.

    The shortcut has no parameters (option A): every ``stride``-th row and column of the input, with channels of
    zeros appended. In-place operations only touch tensors made inside the block, never its input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's activation, ``[B, out_channels, ceil(H / stride), ceil(W / stride)]``."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.added_channels))
        out += x
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """ResNet of depth 6n+2 for small images: a stem, three groups of n basic blocks, and a linear classifier.

    Convolutions are drawn from a normal distribution with variance ``2 / fan_out`` (MSRA, ``fan_out`` =
    9 * output channels), the classifier with variance ``1 / fan_in`` and a bias of zero.

    Args:
        depth: Number of layers with weights, 8, 14, 20, 26, 32, …
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Multiplies the groups' channels 16, 32, 64; rounded, at least 1.

    Raises:
        NetworkError: If the depth is not 6n+2 with n >= 1.

    References:
        He et al., "Deep residual learning for image recognition", 2015, Sec. 4.2, shortcut option A.

    Example:
        >>> ResNet(8, num_classes=10).taps
        ('stem', 'layer1.0', 'layer2.0', 'layer3.0')
    """

    def __init__(self, depth: int, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise NetworkError(f"`depth = 6n+2, n >= 1` must hold, but got resnet{depth}. The nearest is resnet{near}.")
        channels = [max(1, round(base * width)) for base in (16, 32, 64)]
        parts = {"conv": _conv3x3(in_channels, channels[0]), "bn": nn.BatchNorm2d(channels[0])}
        self.stem = nn.Sequential(OrderedDict(parts, relu=nn.ReLU(inplace=True)))
        self.layer1 = self._group(channels[0], channels[0], blocks, stride=1)
        self.layer2 = self._group(channels[0], channels[1], blocks, stride=2)
        self.layer3 = self._group(channels[1], channels[2], blocks, stride=2)
        self.fc = nn.Linear(channels[2], num_classes)
        self.taps: tuple[str, ...] = ("stem", *(f"layer{g}.{b}" for g in (1, 2, 3) for b in range(blocks)))
        """Behind the stem, then behind every block, from bottom to top."""
        self._initialise()

    @staticmethod
    def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_in", nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 26, 32, 44, 56, 110)
}
"""The networks that dfkt brings along; any other ``resnetN`` with N = 6n+2 is built on demand."""


def _torchvision_names() -> list[str]:
    """Return torchvision's classifiers; detection, segmentation, video and quantised networks are not among them."""
    return list(torchvision.models.list_models(module=torchvision.models))


def network_names() -> tuple[str, ...]:
    """Return the names that :func:`build_network` knows, besides ``package.module:function``.

    Example:
        >>> network_names()[:3]
        ('resnet8', 'resnet14', 'resnet20')
    """
    return (*NETWORKS, *(f"torchvision:{name}" for name in _torchvision_names()))


def build_network(config: NetworkConfig, *, num_classes: int, in_channels: int) -> nn.Module:
    """Build the network that ``config.name`` names, with fresh weights.

    Args:
        config: Name and width.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Raises:
        NetworkError: If the name is unknown, cannot be imported or built, or has no width to be changed.

    Example:
        >>> import torch
        >>> network = build_network(NetworkConfig(name="resnet8"), num_classes=10, in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    own = re.fullmatch(r"resnet(\d+)", config.name)
    if own:
        build = NETWORKS.get(config.name, partial(ResNet, int(own[1])))
        try:
            return build(num_classes=num_classes, in_channels=in_channels, width=config.width)
        except NetworkError as error:
            elsewhere = f"torchvision:{config.name}"
            hint = f" {elsewhere} exists as well." if elsewhere in network_names() else ""
            raise NetworkError(f"{error}{hint}") from None
        except RuntimeError as error:
            raise NetworkError(f"Cannot build {config.name} of width {config.width:g}: {one_line(error)}.") from error
    if config.width != 1.0:
        raise NetworkError(
            f"`width = 1` must hold for {config.name}, but got width={config.width}; only resnetN has it."
        )
    if config.name.startswith("torchvision:"):
        return _from_torchvision(config.name, num_classes, in_channels)
    if ":" in config.name:
        return _from_import(config.name, num_classes, in_channels)
    raise _unknown(config.name)


def _unknown(name: str) -> NetworkError:
    near = difflib.get_close_matches(name, network_names(), n=3)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    known = f"{', '.join(NETWORKS)} (any 6n+2), torchvision:NAME for its classifiers, package.module:function"
    return NetworkError(f"Unknown network {name!r}.{meant} Known: {known}.")


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    short = name.removeprefix("torchvision:")
    if short not in _torchvision_names():
        if short in torchvision.models.list_models():
            raise NetworkError(f"{name} is not a classifier of single images, so it cannot be a teacher or student.")
        raise _unknown(name)
    # These two add auxiliary logits in training mode, and warn unless told how to initialise.
    extra = {"aux_logits": False, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(short, weights=None, num_classes=num_classes, **extra)
    if in_channels != 3:
        _replace_first_conv(network, in_channels)
    return network


def _replace_first_conv(network: nn.Module, in_channels: int) -> None:
    path, old = next((path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        (old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, last = path.rpartition(".")
    setattr(network.get_submodule(parent), last, new)


def _from_import(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Call ``package.module:function`` with those of ``num_classes`` and ``in_channels`` that it takes."""
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise NetworkError(f"Cannot import network {name!r}: {one_line(error)}.") from error
    try:
        takes = inspect.signature(function).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
        given = {"num_classes": num_classes, "in_channels": in_channels}
        network = function(**{k: v for k, v in given.items() if anything or k in takes})
    except Exception as error:  # nor is it known what a constructor raises
        raise NetworkError(f"Cannot build network {name!r}: {one_line(error)}.") from error
    if not isinstance(network, nn.Module):
        raise NetworkError(f"{name} must return a torch.nn.Module, but returned {type(network).__name__}.")
    return network


def network_taps(network: nn.Module, config: NetworkConfig) -> tuple[str, ...]:
    """Return the module paths of a network's taps, from bottom to top.

    ``config.taps`` if given; else the network's own ``taps``; else, for a network built like torchvision's
    ResNets, ``maxpool`` and every block of ``layer1`` … ``layer4``.

    Raises:
        TapError: If none of these applies; the message lists modules that could be named.

    Example:
        >>> network_taps(build_network(NetworkConfig(name="resnet8"), num_classes=2, in_channels=3), NetworkConfig())
        ('stem', 'layer1.0', 'layer2.0', 'layer3.0')
    """
    if config.taps is not None:
        return config.taps
    own = getattr(network, "taps", None)
    if isinstance(own, (tuple, list)) and all(isinstance(tap, str) for tap in own):
        return tuple(own)
    groups = {f"layer{g}": getattr(network, f"layer{g}", None) for g in (1, 2, 3, 4)}
    if hasattr(network, "maxpool") and all(isinstance(group, nn.Sequential) for group in groups.values()):
        blocks = (f"{name}.{b}" for name, group in groups.items() if group is not None for b in range(len(group)))
        return ("maxpool", *blocks)
    candidates = ", ".join(_tap_candidates(network)) or "none with a convolution"
    raise TapError(
        f"{type(network).__name__} does not know its taps; name them, from bottom to top, such as: {candidates}."
    )


def _tap_candidates(network: nn.Module, limit: int = 8) -> list[str]:
    """Return paths of modules with convolutions in them, evenly spread, as deep as needed to have a choice."""
    convolutional = [p for p, m in network.named_modules() if p and any(isinstance(c, nn.Conv2d) for c in m.modules())]
    found: list[str] = []
    for depth in range(1, 5):
        shallow = [p for p in convolutional if p.count(".") < depth]
        found = [p for p in shallow if not any(q.startswith(f"{p}.") for q in shallow)]
        if len(found) >= 4:
            break
    if len(found) <= limit:
        return found
    return [found[round(k * (len(found) - 1) / (limit - 1))] for k in range(limit)]
