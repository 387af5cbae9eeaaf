"""The one table from a network's name to its constructor, and where a network's taps are.

Four kinds of names are known: ``resnetN`` with N = 6n+2 (the networks of the method's own experiments),
``torchvision:NAME`` and ``timm:NAME`` for these libraries' classifiers, and ``package.module:function`` for anything else. Every
network maps images ``[B, C, H, W]`` to logits ``[B, num_classes]``; no weights are ever downloaded.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from dfkt.config import NetworkConfig
from dfkt.errors import ConfigError, NetworkError, TapError, one_line
from dfkt.imports import import_name
from dfkt.networks.resnet import ResNet
from dfkt.networks.suggest import suggest_taps

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 26, 32, 44, 56, 110)
}
"""The networks that dfkt brings along; any other ``resnetN`` with N = 6n+2 is built on demand."""


_OWN = re.compile(r"resnet(\d+)")
_LIBRARIES = ("torchvision", "timm")
"""What stands for a library before the colon of a network's name, not for a module."""


def _torchvision_names() -> list[str]:
    """Return torchvision's classifiers; detection, segmentation, video and quantised networks are not among them."""
    from torchvision import models  # takes seconds to import, and most networks are none of its

    return list(models.list_models(module=models))


def network_names() -> tuple[str, ...]:
    """Return the names that :func:`build_network` knows, besides ``package.module:function``.

    Example:
        >>> network_names()[:3]
        ('resnet8', 'resnet14', 'resnet20')
    """
    return (*NETWORKS, *(f"torchvision:{name}" for name in _torchvision_names()))


def is_own(name: str) -> bool:
    """Whether a network is one of this package's, a ``resnetN``."""
    return _OWN.fullmatch(name) is not None


def split_network_pair(pair: str) -> tuple[str, str]:
    """Return the two names of ``TEACHER:STUDENT``.

    A name has a colon of its own, as in ``torchvision:NAME`` and ``package.module:function``, unless it is a
    ``resnetN``; so no module of a pair can be called ``resnetN``, and no function ``torchvision`` or ``timm``.

    Raises:
        ConfigError: If the text is not two such names.

    Example:
        >>> split_network_pair("torchvision:resnet18:resnet8")
        ('torchvision:resnet18', 'resnet8')
        >>> split_network_pair("mynet:large:mynet:small")
        ('mynet:large', 'mynet:small')
    """
    names: list[str] = []
    words = iter(pair.split(":"))
    for word in words:
        names.append(word if is_own(word) else f"{word}:{next(words, '')}")
    if len(names) != 2 or not all(map(_is_network_name, names)):
        raise ConfigError(
            f"`TEACHER:STUDENT` must be two of resnetN, torchvision:NAME and package.module:function, but got {pair!r}."
        )
    return names[0], names[1]


def _is_network_name(name: str) -> bool:
    """Return whether a text has the form of a network's name, whether or not there is such a network."""
    before, colon, behind = name.partition(":")
    if not colon:
        return is_own(name)
    if before in _LIBRARIES:
        return bool(behind)
    return all(word.isidentifier() for word in (*before.split("."), behind)) and behind not in _LIBRARIES


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
    own = _OWN.fullmatch(config.name)
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
    if config.name.startswith("timm:"):
        return _from_timm(config.name, num_classes, in_channels)
    if ":" in config.name:
        return _from_import(config.name, num_classes, in_channels)
    raise _unknown(config.name)


def _unknown(name: str) -> NetworkError:
    known = f"{', '.join(NETWORKS)} (any 6n+2), torchvision:NAME and timm:NAME for classifiers, package.module:function"
    return NetworkError(f"Unknown network {name!r}.{_meant(name, network_names())} Known: {known}.")


def _meant(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    from torchvision import models

    short = name.removeprefix("torchvision:")
    if short not in _torchvision_names():
        if short in models.list_models():
            raise NetworkError(f"{name} is not a classifier of single images, so it cannot be a teacher or student.")
        raise _unknown(name)
    # These two add auxiliary logits in training mode, and warn unless told how to initialise.
    extra = {"aux_logits": False, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
    network: nn.Module = models.get_model(short, weights=None, num_classes=num_classes, **extra)
    if in_channels != 3:
        _replace_first_conv(network, in_channels)
    return network


def _from_timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Build a network of timm's; ``.tag`` behind its name says which weights :mod:`dfkt.training.pretrained` takes."""
    try:
        import timm
    except ImportError as error:
        raise NetworkError(
            f"{name} needs timm (pip install 'dfkt[timm]'), but it cannot be imported: {one_line(error)}."
        ) from error
    short = name.removeprefix("timm:")
    if not timm.is_model(short.partition(".")[0]):
        meant = _meant(name, [f"timm:{other}" for other in timm.list_models()])
        raise NetworkError(f"Unknown network {name!r}.{meant} `timm.list_models()` lists timm's.")
    try:
        network: nn.Module = timm.create_model(short, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:  # a tag that is none, or a network that takes no such images
        raise NetworkError(f"Cannot build network {name!r}: {one_line(error)}.") from error
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
    """Call ``package.module:function`` with those of ``num_classes`` and ``in_channels`` that it takes.

    Its weights are float32, whatever it made: a run gives them their precision.
    """
    try:
        function = import_name(name)
    except ConfigError as error:
        raise NetworkError(str(error)) from error
    try:
        takes = inspect.signature(function).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
        given = {"num_classes": num_classes, "in_channels": in_channels}
        network = function(**{k: v for k, v in given.items() if anything or k in takes})
    except (Exception, SystemExit) as error:  # nor is it known what a constructor raises
        raise NetworkError(f"Cannot build network {name!r}: {one_line(error)}.") from error
    if not isinstance(network, nn.Module):
        raise NetworkError(f"{name} must return a torch.nn.Module, but returned {type(network).__name__}.")
    for path, value in (*network.named_parameters(), *network.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise NetworkError(
                f"{name} must have its shapes when it is built, but {path} is lazy. Say how large it is."
            )
    return network.float()


def network_taps(
    network: nn.Module, config: NetworkConfig, input_shape: tuple[int, int, int] | None = None
) -> tuple[str, ...]:
    """Return the module paths of a network's taps, from bottom to top.

    ``config.taps`` if given; else the network's own ``taps``; else those of timm's ``feature_info``; else, for a network built
    like torchvision's ResNets, ``maxpool`` and every block of ``layer1`` … ``layer4``.

    Args:
        network: Left as it is.
        config: The taps that were asked for, if any.
        input_shape: Channels, height and width of an image, for the suggestions; ``None`` tries usual sizes.

    Raises:
        TapError: If none of these applies; the message lists modules that can be named.

    Example:
        >>> network_taps(build_network(NetworkConfig(name="resnet8"), num_classes=2, in_channels=3), NetworkConfig())
        ('stem', 'layer1.0', 'layer2.0', 'layer3.0')
    """
    if config.taps is not None:
        return config.taps
    own = getattr(network, "taps", None)
    if isinstance(own, (tuple, list)) and all(isinstance(tap, str) for tap in own):
        return tuple(own)
    if len(named := _feature_modules(network)) >= 2:
        return named
    groups = {f"layer{g}": getattr(network, f"layer{g}", None) for g in (1, 2, 3, 4)}
    if hasattr(network, "maxpool") and all(isinstance(group, nn.Sequential) for group in groups.values()):
        blocks = (f"{name}.{b}" for name, group in groups.items() if group is not None for b in range(len(group)))
        return ("maxpool", *blocks)
    suggested = ", ".join(suggest_taps(network, input_shape)) or "none was found that could be"
    raise TapError(
        f"{type(network).__name__} does not know its taps; name them, from bottom to top, such as: {suggested}."
    )


def _feature_modules(network: nn.Module) -> tuple[str, ...]:
    """Return the modules that timm says features are read at, as far as the network has them."""
    found: Any = getattr(network, "feature_info", ())
    listed = getattr(found, "info", found)
    modules = dict(network.named_modules())
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, (list, tuple)) else []
    return tuple(str(entry["module"]) for entry in entries if entry.get("module") in modules)
