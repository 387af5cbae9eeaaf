"""Functions of tensors that a GPU replays: recorded once as a CUDA graph, launched as a whole from then on.

A step of a small network is some hundred kernels of microseconds each; Python and their launches take longer than the card
does. A graph is one launch (docs/gpu.md has the times).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dfkt.config import CudaGraphs
from dfkt.errors import GraphError

WARM_UP = 3
"""Calls before a function is recorded: they make what lasts, such as the plan of a flow loss and the libraries' workspaces."""


class Replayed:
    """A function of tensors: called as it stands at first, then recorded and replayed.

    What it returns lies where the next call overwrites it. Whatever does not follow from the values of its tensors (shapes,
    numbers and branches of Python) stays as it was when the function was recorded; random draws of the card do not.

    Args:
        function: Takes tensors on one device, of the same shapes and types at every call; may change what it holds in place.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.read: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.found: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        """Return what the function returns for some tensors; those of the recording are where later ones are copied to.

        Raises:
            GraphError: If it cannot be recorded.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            return beside(self.function, *tensors)
        if self.replay is None:
            self.read = tensors
            self.replay, self.found = record(self.function, *tensors)
        with torch.inference_mode():  # which may change what was made under it
            for place, given in zip(self.read, tensors, strict=True):
                if place is not given:
                    place.copy_(given)
        self.replay()
        return self.found


def beside(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call a function on a stream of its own, in its turn, as it will be recorded."""
    device = tensors[0].device
    if device.type != "cuda":
        return function(*tensors)
    stream, ours = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(ours)
    with torch.cuda.stream(stream):
        found = function(*tensors)
    ours.wait_stream(stream)
    return found


def record(function: Callable[..., Any], *tensors: Tensor) -> tuple[Callable[[], None], Any]:
    """Return what replays a call, and where the result will lie; the call itself is not carried out.

    Raises:
        GraphError: If the function waits for the card, or does something else that a graph cannot hold.
    """
    device, graph = tensors[0].device, torch.cuda.CUDAGraph()
    try:  # thread_local: other threads may go on
        with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
            found = function(*tensors)
    except RuntimeError as error:
        _renew_draws(device)
        reason = str(error.__context__ or error).partition("\n")[0].rstrip(".")
        raise GraphError(f"A step cannot be recorded as a CUDA graph ({reason}). Take --cuda-graphs off.") from error
    return graph.replay, found


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which everything of a card is recorded, and tried before: torch's own belongs to the first card."""
    return torch.cuda.Stream(device)


def _renew_draws(device: torch.device) -> None:
    """Give a card's draws a state of their own again: after a recording that failed, torch takes them for recorded for good."""
    with torch.cuda.device(device):
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(
            torch.Generator(device).graphsafe_get_state()
        )


def replays(choice: CudaGraphs, device: torch.device, world: int, *, ours: bool) -> bool:
    """Whether a run's steps are recorded: on a GPU, by one worker; ``auto`` where networks and method are this package's.

    Others may hold branches of Python that differ from step to step, which would be lost without a word.
    """
    return device.type == "cuda" and world == 1 and (choice == "on" or (choice == "auto" and ours))
