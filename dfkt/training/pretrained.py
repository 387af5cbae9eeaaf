"""Weights that somebody else trained, as the beginning of a teacher's training: a library's own, or a file's.

The last layer is new where the classes are others; all else must fit, but for a first convolution over colours whose images are
grey: its kernels are summed over the colours, so it answers a grey image as it would the same one in colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dfkt.config import PRETRAINED_OWN, TeacherConfig
from dfkt.errors import CheckpointError, ConfigError, one_line
from dfkt.training.state import misfits, read_weights

Weights = dict[str, Tensor]
Moments = tuple[tuple[float, ...], tuple[float, ...]]
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Heads of torchvision's weights that its networks have in their own training only."""


def load_pretrained(network: nn.Module, config: TeacherConfig, *, num_classes: int, in_channels: int) -> list[str]:
    """Let a new network begin with the weights that ``config.pretrained`` names; return what stays new, by name.

    Args:
        network: As :func:`dfkt.networks.build.build_network` returns it; changed in place.
        config: The teacher's.
        num_classes: Of the images.
        in_channels: Of the images.

    Raises:
        CheckpointError: If the weights cannot be had or do not fit.
        ConfigError: If the network's library has none.
    """
    name, own = config.network.name, config.pretrained == PRETRAINED_OWN
    source = f"the weights of {name}" if own else str(config.pretrained)
    given = _library_weights(name, in_channels) if own else read_weights(str(config.pretrained))
    begun, fresh = fitted(network.state_dict(), given, num_classes)
    if problems := misfits(network.state_dict(), begun):
        raise CheckpointError(
            f"Weights to begin with must fit {name} but for its last layer, but {source} do not: {'; '.join(problems)}. "
            "Take the network that they were saved of (--teacher)."
        )
    network.load_state_dict(begun)
    return fresh


def fitted(own: Mapping[str, Tensor], given: Mapping[str, Tensor], num_classes: int) -> tuple[Weights, list[str]]:
    """Return weights with the last layer of a network's own, where the classes are others, and which these are.

    What does not fit otherwise is left as it is given.

    Args:
        own: The new network's.
        given: The ones to begin with.
        num_classes: Of the new network.
    """
    begun = {key: value for key, value in given.items() if key in own or not key.startswith(_AUXILIARY)}
    fresh: list[str] = []
    for key, mine in own.items():
        theirs = begun.get(key)
        if theirs is None or theirs.shape == mine.shape:
            continue
        if mine.dim() and mine.shape[0] == num_classes and theirs.dim() and mine.shape[1:] == theirs.shape[1:]:
            begun[key] = mine
            fresh.append(key)
        elif mine.dim() == 4 and mine.shape[1] == 1 and theirs.dim() == 4 and theirs.shape[1] == 3:
            begun[key] = theirs.sum(1, keepdim=True)
    return begun, fresh


def own_normalisation(config: TeacherConfig) -> Moments | None:
    """Return mean and standard deviation, of images in 0..1, by which a library's weights were trained; ``None`` for others."""
    if config.pretrained != PRETRAINED_OWN:
        return None
    library, _, short = config.network.name.partition(":")
    if library == "timm":
        import timm

        told: Any = timm.get_pretrained_cfg(short)
        return None if told is None else (tuple(told.mean), tuple(told.std))
    shown: Any = _torchvision_weights(short).transforms()
    return tuple(shown.mean), tuple(shown.std)


def _library_weights(name: str, in_channels: int) -> Weights:
    """Return a library's weights, from its own cache or the network.

    Raises:
        CheckpointError: If they cannot be had.
        ConfigError: If it has none.
    """
    library, _, short = name.partition(":")
    if library not in ("timm", "torchvision"):
        raise ConfigError(
            f"Only torchvision:NAME and timm:NAME have weights of their own, but got {name}. "
            "Give a file: --teacher-pretrained FILE."
        )
    weights = _torchvision_weights(short) if library == "torchvision" else None
    try:
        if weights is not None:
            found: Weights = weights.get_state_dict(progress=False, check_hash=True)
            return found
        import timm

        network: nn.Module = timm.create_model(short, pretrained=True, in_chans=in_channels)
        return network.state_dict()
    except Exception as error:  # no network, no such file, a cut one: libraries raise what theirs raise
        raise CheckpointError(
            f"The weights of {name} cannot be had: {one_line(error)}. "
            "Without a network, give a file that holds them: --teacher-pretrained FILE."
        ) from error


def _torchvision_weights(short: str) -> Any:
    from torchvision import models

    try:
        return models.get_model_weights(short).DEFAULT
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"torchvision has no weights for {short}. Give a file: --teacher-pretrained FILE.") from error
