"""One set of images: the padded training images, ``val``, and how both are normalised.

The training images are held once. They lie in memory with the zeros around them that random crops run into; what
:attr:`ImageSet.train` gives is a view of their inside. Large ones, which are not padded, stay mapped from their file
(``mapped.py``).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkt.data.mapped import Images, Rows

CHUNK = 1024
"""Images that are copied at a time where a whole copy would cost memory."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in one order."""

    images: Images
    """``[N, H, W, C]``, uint8; on the labels' device, or mapped from a file."""
    labels: Tensor
    """``[N]``, int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device; tensors that are there already are not copied."""
        images = self.images.on(device) if isinstance(self.images, Rows) else self.images.to(device)
        return Split(images, self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The splits of one set of images that training sees, and how they are normalised and augmented.

    The test split is not among them: :func:`dfkt.data.load.load_test` reads it when a run is to be reported.
    """

    name: str
    title: str
    """Name for tables."""
    classes: tuple[str, ...]
    padded: Split
    """The training split, its images ``[N, H + 2 * padding, W + 2 * padding, C]`` with zeros at their edges."""
    val: Split
    mean: Tensor
    """``[C]``, of the training split in units of 0..1."""
    std: Tensor
    """``[C]``, as ``mean``."""
    padding: int
    flip: bool
    resized: bool = False
    """Whether training sees areas of random size, resized (:func:`dfkt.data.batches.random_areas`)."""
    notes: tuple[str, ...] = ()
    """What the user must be told."""

    @classmethod
    def make(
        cls,
        train: Split,
        val: Split,
        classes: tuple[str, ...],
        *,
        name: str,
        title: str = "",
        mean: Tensor | None = None,
        std: Tensor | None = None,
        padding: int = 0,
        flip: bool = False,
        notes: tuple[str, ...] = (),
    ) -> ImageSet:
        """Return a set of a training split that is not padded yet.

        Args:
            train: Training images and labels; with padding the images are copied.
            val: Images and labels that select.
            classes: Name of every label.
            name: Name in a configuration.
            title: Name for tables; empty takes ``name``.
            mean: ``[C]``, in units of 0..1; ``None`` takes the training images' own.
            std: As ``mean``.
            padding: Pixels of zeros around every training image.
            flip: Whether training images are flipped at random.
            notes: What the user must be told.

        Example:
            >>> split = Split(torch.full((2, 8, 8, 1), 51, dtype=torch.uint8), torch.tensor([0, 1]))
            >>> data = ImageSet.make(split, split, ("dark", "light"), name="grey", padding=1)
            >>> data.padded.images.shape, data.train.images.shape, data.mean
            (torch.Size([2, 10, 10, 1]), torch.Size([2, 8, 8, 1]), tensor([0.2000]))
        """
        if mean is None or std is None:
            own = channel_moments(train.images)
            mean, std = own[0] if mean is None else mean, own[1] if std is None else std
        images = train.images
        if isinstance(images, Tensor):
            images = F.pad(images, (0, 0, *(padding,) * 4)) if padding else images.contiguous()
        return cls(
            name=name, title=title or name, classes=classes, padded=Split(images, train.labels), val=val,
            mean=mean, std=std, padding=padding, flip=flip, notes=notes,
        )  # fmt: skip

    @property
    def train(self) -> Split:
        """The training split; its images are a view of :attr:`padded` and not contiguous in memory."""
        return Split(inside(self.padded.images, self.padding), self.padded.labels)

    def describe(self) -> str:
        """Return on one line what training sees: sizes, classes, colours, augmentation."""
        height, width = self.image_size
        colour = "grey" if self.channels == 1 else "colour"
        moments = "; ".join(
            f"{name} {' '.join(f'{value:.3f}' for value in values.tolist())}"
            for name, values in (("mean", self.mean), ("std", self.std))
        )
        crop = (
            "random areas, resized"
            if self.resized
            else f"crops padded by {self.padding}"
            if self.padding
            else "no crops"
        )
        return (
            f"{self.title}: {len(self.padded)} train and {len(self.val)} val images, {height}x{width} {colour}, "
            f"{self.num_classes} classes; {moments}; augmented by {crop}, {'mirrored' if self.flip else 'not mirrored'}"
        )

    @property
    def device(self) -> torch.device:
        """Where batches are made: all lies there but images that stay mapped."""
        return self.padded.labels.device

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.padded.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        _, rows, columns, _ = self.padded.images.shape
        return rows - 2 * self.padding, columns - 2 * self.padding

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.channels, *self.image_size)

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the training images (image by image, row by row) and labels: 0..2**32 - 1.

        It does not depend on padding and device, and tells whether two processes train on the same images.
        """
        value = 0
        for images in self.train.images.split(CHUNK):
            value = zlib.crc32(images.cpu().contiguous().numpy().data, value)
        return zlib.crc32(self.padded.labels.cpu().contiguous().numpy().data, value)

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set on a device; tensors that are there already are not copied."""
        mean, std = self.mean.to(device), self.std.to(device)
        return replace(self, padded=self.padded.to(device), val=self.val.to(device), mean=mean, std=std)

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 ``[B, H, W, C]`` as float32 ``[B, C, H, W]`` of mean 0 and std 1, channels last in memory."""
        batch, height, width, channels = images.shape
        # Per-channel factors repeated over a row: the inner loop is then W * C long instead of C.
        scale = (1 / (255 * self.std)).repeat(width)
        shift = (-self.mean / self.std).repeat(width)
        flat = images.reshape(batch, height, width * channels).float().mul_(scale).add_(shift)
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


def inside(padded: Images, padding: int) -> Images:
    """Return a view of ``[N, H + 2 * padding, W + 2 * padding, C]`` without its edges: ``[N, H, W, C]``."""
    if isinstance(padded, Rows):  # which are never padded
        return padded
    _, rows, columns, _ = padded.shape
    return padded[:, padding : rows - padding, padding : columns - padding]


def channel_moments(images: Images) -> tuple[Tensor, Tensor]:
    """Return mean and std per channel of uint8 ``[N, H, W, C]`` on the CPU: two float32 ``[C]`` in units of 0..1.

    std is at least 1/255, so constant images stay finite.
    """
    channels, count = images.shape[3], images.shape[:3].numel()
    total = np.zeros((2, channels))
    # Chunks fit the processor's cache; NumPy, because thousands of small parallel loops stall on a busy machine.
    for places in np.array_split(np.arange(len(images)), len(images) // 64 + 1):
        part = images[int(places[0]) : int(places[-1]) + 1]
        chunk = (part.read() if isinstance(part, Rows) else part).numpy()
        rows = chunk.reshape(-1, images.shape[2] * channels).astype(np.float32)
        sums = np.stack((rows.sum(0), np.square(rows).sum(0))).astype(np.float64)
        total += sums.reshape(2, -1, channels).sum(1)
    mean, square = torch.from_numpy(total) / count
    std = (square - mean.square()).clamp(min=1.0).sqrt()
    return (mean / 255).float(), (std / 255).float()
