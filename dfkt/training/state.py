"""A run's place in its schedule, as bytes; weights in files; and random draws that belong to one run alone."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkt.errors import CheckpointError
from dfkt.store.files import Storage

STATE_FILE = "state.pt"
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before names."""


def save_state(storage: Storage, state: Mapping[str, Any], name: str = STATE_FILE) -> None:
    """Write a state as one file; a reader sees the old one or the new one, whole."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    storage.write(name, buffer.getvalue())


def load_state(storage: Storage, name: str = STATE_FILE) -> dict[str, Any] | None:
    """Return what :func:`save_state` wrote, tensors on the CPU, or ``None`` when nothing was written.

    Raises:
        CheckpointError: If the file is damaged.
    """
    data = storage.read(name)
    if data is None:
        return None
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"Checkpoint {storage.path}/{name} cannot be read ({_reason(error)}); delete it."
        ) from error
    return state


@contextlib.contextmanager
def own_random(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed while the context lasts; then torch's generators go on as if nothing had been drawn.

    So a network that draws (initial weights, dropout, stochastic depth) depends on the seed, not on what the process
    did before, and what the process does next does not depend on it.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of what a worker draws from a step on: no two workers drop the same, and a resumed run needs no state."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]) >> 1


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return 12 hexadecimal digits that name weights by their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Return the state dict in a user's file: bare, or under ``state_dict``, ``model`` or ``student``; weights only.

    Raises:
        CheckpointError: If the file is absent, cannot be read, or holds no state dict.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"Teacher checkpoint {path} does not exist.") from error
    except Exception as error:
        raise CheckpointError(
            f"Teacher checkpoint {path} must be a state dict saved by torch.save, but cannot be read: {_reason(error)}"
        ) from error
    for name in ("state_dict", "model", "student"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise CheckpointError(f"Teacher checkpoint {path} must hold a state dict, but holds {type(loaded).__name__}.")
    return {_unwrapped(str(name)): value for name, value in loaded.items()}


def load_weights(network: nn.Module, weights: Mapping[str, torch.Tensor], path: str, what: str) -> None:
    """Load weights into a network, every name and shape checked.

    Raises:
        CheckpointError: If a name is missing or unexpected, or a shape differs; the first of them is named.
    """
    own = network.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    differ = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    problems = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(extra)} unexpected, such as {extra[0]}"] if extra else []
    if differ:
        n = differ[0]
        problems.append(f"{n} has shape {tuple(weights[n].shape)} instead of {tuple(own[n].shape)}")
    if problems:
        raise CheckpointError(f"Checkpoint {path} does not fit {what}: {'; '.join(problems)}.")
    network.load_state_dict(dict(weights))


def _unwrapped(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers, in whatever order they were put on."""
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _reason(error: Exception) -> str:
    """Return the first line of an error's text; a file that ends too soon raises one without any."""
    return (str(error) or type(error).__name__).splitlines()[0]
