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

RULE = "A step that is recorded as a CUDA graph must do the same with tensors of the same shapes and types"
REMEDY = "Take --cuda-graphs off."
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
            GraphError: If it cannot be recorded, or the tensors are of other shapes or types than at the recording.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            return beside(self.function, *tensors)
        if self.replay is None:
            self.read = tensors
            self.replay, self.found = record(self.function, *tensors)
        with torch.inference_mode():  # which may change what was made under it
            for place, given in zip(self.read, tensors, strict=True):
                if (place.shape, place.dtype) != (given.shape, given.dtype):
                    raise GraphError(f"{RULE}, but {describe(place)} became {describe(given)}. {REMEDY}")
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
        OutOfMemoryError: If there is no room for it.
    """
    device = tensors[0].device
    try:
        with torch.cuda.stream(
            torch.cuda.current_stream(device)
        ):  # of its card, and there again where a recording fails
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):  # others may go on
                found = function(*tensors)
    except RuntimeError as error:
        torch.cuda.default_generators[device.index].graphsafe_set_state(torch.Generator(device))
        cause = error.__context__ or error
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise GraphError(f"{RULE}, but this: {str(cause).partition(chr(10))[0].rstrip('.')}. {REMEDY}") from error
    return graph.replay, found


def describe(tensor: Tensor) -> str:
    """Return a tensor's shape and type."""
    return f"{list(tensor.shape)} of {tensor.dtype}"


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which a card's functions are recorded, and tried before; torch's own is the first card's alone."""
    return torch.cuda.Stream(device)


def replays(choice: CudaGraphs, device: torch.device, world: int, *, ours: bool) -> bool:
    """Whether a run's steps are recorded: on a GPU, by one worker; ``auto`` where networks and method are this package's.

    Others may hold branches of Python that differ from step to step, which would be lost without a word.
    """
    return device.type == "cuda" and world == 1 and (choice == "on" or (choice == "auto" and ours))
