"""Large images: they stay in the file that keeps them decoded, and a batch of them is read, and sent, ahead of its use.

Processes of one machine share what the operating system holds of that file, so ten runs take no more memory than one.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARE = 0.1
"""Of a device's memory that images may take; larger sets stay mapped and are sent batch by batch."""
AHEAD = 2
"""Batches that are read before they are asked for."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some images of an array that is mapped from a file; what is asked of them is read, nothing before.

    Args:
        array: ``[M, H, W, C]``, uint8.
        rows: ``[N]``, int64: which of its images, in which order.
    """

    array: NDArray[np.uint8]
    rows: Tensor

    @property
    def shape(self) -> torch.Size:
        """As a tensor's: ``[N, H, W, C]``."""
        return torch.Size((len(self.rows), *self.array.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Rows:
        """Return some of them; nothing is read."""
        return Rows(self.array, self.rows[part])

    def read(self) -> Tensor:
        """Return them in memory, ``[N, H, W, C]``."""
        return torch.from_numpy(self.array.take(self.rows.numpy(), axis=0))  # NumPy lets other threads work meanwhile

    def split(self, count: int) -> Iterator[Tensor]:
        """Yield ``count`` at a time, as a tensor's ``split`` does, each read when it is asked for."""
        for start in range(0, len(self), count):
            yield self[start : start + count].read()

    def on(self, device: torch.device | str) -> Rows | Tensor:
        """Return them in a device's memory, if they take no more than :data:`SHARE` of it; the CPU is left as it is."""
        device = torch.device(device)
        if device.type == "cpu" or self.shape.numel() > SHARE * _memory(device):
            return self
        return self.read().to(device)


Images = Tensor | Rows
"""``[N, H, W, C]``, uint8, in a device's memory or mapped."""


def is_mapped(array: NDArray[np.uint8]) -> bool:
    """Whether an array's values lie in a file, not in this process's own memory."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def read_ahead(images: Rows, batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield batches of mapped images on a device, read and sent while those before them are used.

    Args:
        images: Where they are read from.
        batches: ``[B]`` each, on the CPU: which images.
        device: Where they are wanted.

    Yields:
        ``[B, H, W, C]``, uint8.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="images") as reader:
        for batch in batches:
            waiting.append(reader.submit(_sent, Rows(images.array, images.rows[batch]), device, stream))
            if len(waiting) > AHEAD:
                yield _arrived(waiting.popleft(), stream)
        while waiting:
            yield _arrived(waiting.popleft(), stream)


def _sent(images: Rows, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    if stream is None:
        return images.read().to(device)
    with torch.cuda.stream(stream):
        return images.read().pin_memory().to(device, non_blocking=True)


def _arrived(sent: Future[Tensor], stream: torch.cuda.Stream | None) -> Tensor:
    """Return a batch; what the device does next with it waits until it is there."""
    images = sent.result()
    if stream is not None:
        using = torch.cuda.current_stream(images.device)
        using.wait_stream(stream)
        images.record_stream(using)  # its memory is not given to the next batch before it was used
    return images


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
