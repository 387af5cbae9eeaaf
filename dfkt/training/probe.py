"""A network is tried before anything is written or trained: what would stop a run later is said here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkt.config import Precision
from dfkt.data.image_set import ImageSet
from dfkt.errors import DfktError, NetworkError, TapError, one_line
from dfkt.networks.tapped import TappedNetwork
from dfkt.networks.taps import Tap, find_module, modes_kept
from dfkt.training.optim import network_dtype
from dfkt.training.state import own_random

TOLERANCE = 1e-2
"""Of what a cut network gives, over the largest activation of the whole one; a GPU's rounding is far below it."""


@contextlib.contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Turn whatever a network's own code raises into one line; it may raise anything, and end the program.

    Raises:
        NetworkError: For every error that dfkt does not raise on purpose.
    """
    try:
        yield
    except DfktError:
        raise
    except (Exception, SystemExit) as error:
        raise NetworkError(f"Network {name} {what}: {one_line(error)}.") from error


def probe(tapped: TappedNetwork, name: str, data: ImageSet, precision: Precision, *, learns: bool) -> None:
    """Run a network as a training will, on noise: forward, cut behind its taps with the logits and, if it learns, backward.

    Batches of three images and of one; a network that learns is in training mode first. Its running statistics change.

    Args:
        tapped: The network with its taps, on the images' device.
        name: How messages call it.
        data: The images that it shall take, and their classes.
        precision: Of the run.
        learns: Whether it is to be trained.

    Raises:
        NetworkError: If it raises, its logits are not finite ``[B, classes]`` of the run's type, it changes its images,
            or it cannot learn.
        TapError: If it cannot be cut, or its parts give something else than the whole.
    """
    shape, dtype, device = (data.channels, *data.image_size), network_dtype(precision), data.device
    for training, batch in ((learns, 3), (False, 1)):
        mode = f"{'training' if training else 'evaluation'} mode"
        taken = f"cannot take {batch} image{'s' * (batch > 1)} of {'x'.join(map(str, shape))} in {mode}"
        with refusing(name, taken), modes_kept(tapped.network), torch.set_grad_enabled(training):
            with own_random(1, device):
                images = torch.randn(batch, *shape, dtype=dtype, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            tapped.network.to(dtype).train(training)
            _run(tapped, name, images, data.num_classes)


def _run(tapped: TappedNetwork, name: str, images: Tensor, classes: int) -> None:
    """Run the whole network once, then what is left of it behind its taps; both draw the same."""
    network, given = tapped.network, images.clone()
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    if network.training:
        _unfreeze(network, name)
    with own_random(0, images.device):
        seen, logits = _whole(network, tapped.taps, images)
    _check_logits(logits, name, (len(images), classes), images.dtype, network.training)
    if not torch.equal(images, given):
        raise NetworkError(
            f"Network {name} must leave its images as they are, but changes them. Let it copy them first."
        )
    if network.training:
        _check_learning(network, name, logits)
    if not tapped.taps:
        return
    part = tapped.part(tuple(range(len(tapped.taps))), True).train(network.training)
    with torch.no_grad(), own_random(0, images.device):
        for buffer, value in kept:  # as they were before the first pass: some weights follow from them
            buffer.copy_(value)
        outputs = part(given)
    for key, tap in enumerate(tapped.taps):
        _check_cut(seen[key], outputs[str(key)], name, tap.name)
    _check_cut(logits.detach(), outputs["logits"], name, "its end")


def _whole(network: nn.Module, taps: Sequence[Tap], images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Return what the taps' modules gave in a pass of the whole network, and what it returned."""
    seen: dict[int, Tensor] = {}
    hooks = [
        find_module(network, tap.name).register_forward_hook(
            lambda module, inputs, output, key=key: seen.update({key: output.detach().clone()})
        )
        for key, tap in enumerate(taps)
    ]
    try:
        return seen, network(images)
    finally:
        for hook in hooks:
            hook.remove()


def _check_logits(logits: object, name: str, shape: tuple[int, int], dtype: torch.dtype, training: bool) -> None:
    batch, classes = shape
    if not isinstance(logits, Tensor):
        got, remedy = f"a {type(logits).__name__}", "Let it return the logits alone."
    elif tuple(logits.shape) != shape:
        got, remedy = (
            f"{list(logits.shape)} for {batch} image{'s' * (batch > 1)}",
            "A logit for each class, in one row.",
        )
    elif logits.dtype != dtype:
        got, remedy = str(logits.dtype), "Let it compute in the type of its images."
    elif not bool(torch.isfinite(logits).all()):
        got, remedy = "nan or inf", "Look at its weights, and where it divides."
    else:
        return
    where = "training mode" if training else "evaluation mode"
    rule = f"must return finite logits [B, {classes}] of {dtype}"
    raise NetworkError(f"Network {name} {rule}, but returns {got} in {where}. {remedy}")


def _unfreeze(network: nn.Module, name: str) -> None:
    """Let all parameters learn, as a stage does; one at least must have been meant to."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise NetworkError(f"Network {name} has no parameter that requires a gradient, so it cannot learn.")
    for parameter in network.parameters():
        parameter.requires_grad_(True)


def _check_learning(network: nn.Module, name: str, logits: Tensor) -> None:
    if logits.requires_grad:
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)).backward()
    if all(parameter.grad is None for parameter in network.parameters()):
        raise NetworkError(f"Network {name} cannot learn: no gradient reaches a parameter of it from its logits.")
    network.zero_grad()


def _check_cut(whole: Tensor, part: Tensor, name: str, where: str) -> None:
    limit = TOLERANCE * float(whole.abs().max())
    if whole.shape != part.shape or not bool(((whole - part).abs() <= limit).all()):
        raise TapError(
            f"Network {name} must give the same when it is cut behind its taps, but gives something else at {where}: its "
            "forward pass depends on more than its images and weights, such as a counter or random numbers that "
            "torch.fx does not see."
        )
