"""A run's place in its schedule, as bytes; weights in files; and random draws that belong to one run alone."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO

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
        state = _load(io.BytesIO(data))
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(f"it holds no state, but {type(state).__name__}")
    except CheckpointError as error:
        raise CheckpointError(f"Checkpoint {storage.path}/{name} cannot be read ({error}); delete it.") from error
    return state


def _load(file: BinaryIO) -> Any:
    """Return what a file holds, tensors on the CPU; never any code.

    Raises:
        CheckpointError: If it cannot be read, with the reason alone: torch's own lines advise what is not safe.
    """
    start = file.read(2)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an archive that is then refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if not start:
            reason = "it is empty"
        elif start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle: torch's earlier files
            reason = "torch.save did not write it"
        elif "TorchScript" in str(error):
            reason = "it is a TorchScript archive; save the state_dict() of the network itself"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds more than weights; save the state_dict() alone"
        else:
            reason = "it is damaged or cut off"
        raise CheckpointError(reason) from error


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
    if not os.path.isfile(path):  # a pipe would be waited for
        found = "must be a file, but is a folder or a device" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"Teacher checkpoint {path} {found}.")
    try:
        with open(path, "rb") as file:
            loaded = _load(file)
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"Teacher checkpoint {path} must be a state dict saved by torch.save, but cannot be read: {reason}."
        ) from error
    for name in ("state_dict", "model", "student"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise CheckpointError(f"Teacher checkpoint {path} must hold a state dict, but holds {type(loaded).__name__}.")
    return {_unwrapped(str(name)): value for name, value in loaded.items()}


def load_weights(network: nn.Module, weights: Mapping[str, Any], path: str, what: str, remedy: str = "") -> None:
    """Load weights into a network, every name, shape and type checked, and that all are finite.

    Raises:
        CheckpointError: If a name is missing or unexpected, or a value cannot be a weight's; the first of them is named.
    """
    if problems := misfits(network.state_dict(), weights):
        raise CheckpointError(f"Checkpoint {path} does not fit {what}: {'; '.join(problems)}. {remedy}".rstrip())
    network.load_state_dict(dict(weights))


def misfits(own: Mapping[str, Any], given: Any) -> list[str]:
    """Return what keeps values from taking the place of a network's own: names that differ, and the first wrong value."""
    if not isinstance(given, Mapping):
        return [f"it holds {type(given).__name__}"]
    missing, extra = sorted(own.keys() - given.keys()), sorted(map(str, given.keys() - own.keys()))
    problems = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(extra)} unexpected, such as {extra[0]}"] if extra else []
    wrong = (f"{name} {fault}" for name in own if name in given and (fault := _fault(own[name], given[name])))
    return [*problems, *islice(wrong, 1)]


def _fault(own: Any, given: Any) -> str:
    """Say why a value cannot take a weight's place; empty if it can."""
    if not isinstance(own, torch.Tensor):  # a module's extra state
        return ""
    if not isinstance(given, torch.Tensor):
        return f"is {type(given).__name__}, no tensor"
    if own.shape != given.shape:
        return f"has shape {tuple(given.shape)} instead of {tuple(own.shape)}"
    if given.is_meta or given.layout is not torch.strided:
        return "is a meta tensor, without values" if given.is_meta else "is a sparse tensor"
    if given.is_complex() or given.is_floating_point() != own.is_floating_point():
        return f"is of {given.dtype} instead of {own.dtype}"
    if own.is_floating_point() and not _finite(given.to(own.dtype)) and _finite(own):  # a mask may be made of -inf
        return "holds nan or inf"
    return ""


def _finite(values: torch.Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _unwrapped(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers, in whatever order they were put on."""
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name
