"""What a network costs: parameters, multiply-accumulates, bytes on disk, and the time that an image takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfkt.config import NetworkConfig
from dfkt.errors import NetworkError
from dfkt.networks.build import build_network
from dfkt.networks.taps import modes_kept
from dfkt.training.state import own_random

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""
Answer = Callable[[Tensor], object]
"""Takes normalised float32 images ``[B, C, H, W]`` on the device where they lie."""
ROUNDS = (7, 200)
"""Fewest and most times that each network answers, however long that takes."""
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Counts:
    """What of a network's cost depends on no machine."""

    parameters: int
    macs: int | None
    """Multiply-accumulates of one image's forward pass; ``None`` where they cannot be counted."""
    bytes: int
    """Of its parameters and buffers; a file has a few thousand more, for their names."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per image: the median, and the quartiles beside it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """One network's costs beside what it is worth; what is not known is ``None``."""

    name: str
    parameters: int | None = None
    macs: int | None = None
    size: int | None = None
    """Bytes on disk."""
    test_accuracy: float | None = None
    latencies: Mapping[int, Latency] = field(default_factory=dict)
    """By batch size."""


def count(network: nn.Module, shape: Shape) -> Counts:
    """Count a network's parameters and bytes, and the MACs of an image: half of what torch's ``FlopCounterMode`` counts.

    It counts convolutions, matrix products and attention; normalisations, activations and pooling are left out.

    Args:
        network: Left as it is, modes and running statistics included.
        shape: Of an image.

    Example:
        >>> count(nn.Conv2d(3, 5, 3, bias=False), (3, 8, 8))  # 135 weights at 6x6 places
        Counts(parameters=135, macs=4860, bytes=540)
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    state = [value for value in network.state_dict().values() if isinstance(value, Tensor)]
    size = sum(value.numel() * value.element_size() for value in state)
    like = next(network.parameters(), torch.zeros(()))
    images = torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention is one operation, which nobody counts
    try:
        with (
            modes_kept(network),
            torch.no_grad(),
            own_random(0, like.device),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            network.eval()(images)
    except Exception:  # a user's network may bear no dispatch mode; its students are no worse for that
        return Counts(parameters, None, size)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Counts(parameters, counter.get_total_flops() // 2, size)


def count_named(config: NetworkConfig, *, classes: int, shape: Shape) -> dict[str, int | None]:
    """Return the counts of a network that is built for it, as JSON values.

    Raises:
        NetworkError: If it cannot be built.
    """
    return asdict(count(fresh(config, classes=classes, shape=shape), shape))


def fresh(config: NetworkConfig, *, classes: int, shape: Shape) -> nn.Module:
    """Return a new network on the CPU; nothing else draws otherwise for it.

    Raises:
        NetworkError: If it cannot be built.
    """
    with own_random(0, torch.device("cpu")):
        return build_network(config, num_classes=classes, in_channels=shape[0])


def weight_bytes(weights: Mapping[str, Any]) -> bytes:
    """Return weights as a ``.safetensors`` file; tensors that share memory are written each for itself.

    Raises:
        NetworkError: If a state dict holds something else, as modules with an extra state may.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise NetworkError(f"A network that is kept must have tensors alone in its state, but {name} is {kind}.")
    own = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    return bytes(safetensors.torch.save(own))


def measure(answers: Sequence[tuple[Answer, Shape]], batch: int, device: torch.device, seconds: float) -> list[Latency]:
    """Return how long each of some networks takes per image of a batch.

    They answer in turns, so that what else the machine does, and how fast it runs just then, hits all alike. Before that each
    answers for a tenth of its time, at least twice. What the networks themselves do is measured, normalised images lie ready.

    Args:
        answers: Networks, and the shape of their images.
        batch: Images at a time.
        device: Where the images lie.
        seconds: Of measuring, for each network; at least 7 answers, at most 200.
    """
    inputs = [_images(batch, shape, device) for _, shape in answers]
    with torch.inference_mode():
        for (answer, _), images in zip(answers, inputs, strict=True):
            began, calls = time.perf_counter(), 0
            while calls < 2 or time.perf_counter() - began < seconds / 10:
                _timed(answer, images)
                calls += 1
        taken: list[list[float]] = [[] for _ in answers]
        began = time.perf_counter()
        while len(taken[0]) < ROUNDS[0] or (
            len(taken[0]) < ROUNDS[1] and time.perf_counter() - began < seconds * len(answers)
        ):
            for times, (answer, _), images in zip(taken, answers, inputs, strict=True):
                times.append(1000 * _timed(answer, images) / batch)
    return [_latency(times) for times in taken]


def scaled(number: float) -> str:
    """Return a count of parameters or operations in three digits; millions begin at a tenth of one.

    Example:
        >>> scaled(269722), scaled(40551040), scaled(1814073344), scaled(4900), scaled(12)
        ('0.27 M', '40.6 M', '1.81 G', '4.9 k', '12')
    """
    for size, unit in _UNITS:
        if number >= (size / 10 if unit == "M" else size):
            return f"{float(f'{number / size:.3g}'):g} {unit}"
    return f"{number:g}"


def _images(batch: int, shape: Shape, device: torch.device) -> Tensor:
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(device, memory_format=torch.channels_last)


def _timed(answer: Answer, images: Tensor) -> float:
    began = time.perf_counter()
    answer(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began


def _latency(times: Sequence[float]) -> Latency:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, low, high)
