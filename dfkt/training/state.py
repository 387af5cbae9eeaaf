"""A run's place in its schedule, as bytes: student, optimizer, random states, history; never the teacher."""

from __future__ import annotations

import io
from typing import Any

import torch

from dfkt.errors import CheckpointError
from dfkt.store.files import Storage

STATE_FILE = "state.pt"


def save_state(storage: Storage, state: dict[str, Any], name: str = STATE_FILE) -> None:
    """Write a state as one file; a reader sees the old one or the new one, whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
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


def random_state() -> dict[str, torch.Tensor]:
    """Return the states of torch's generators, for networks that draw (dropout, stochastic depth)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


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
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in loaded.items()}


def load_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor], path: str, what: str) -> None:
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
        raise CheckpointError(f"Teacher checkpoint {path} does not fit {what}: {'; '.join(problems)}.")
    network.load_state_dict(weights)


def _reason(error: Exception) -> str:
    """Return the first line of an error's text; a file that ends too soon raises one without any."""
    return (str(error) or type(error).__name__).splitlines()[0]
