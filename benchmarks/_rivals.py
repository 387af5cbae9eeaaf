"""What a user would use instead: the broadcast loss of a widely used repository, a plain loop with hooks, torchdistill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from _common import BATCH, DECAY, MEAN, MOMENTUM, PADDING, RATE, SIZE, STD, Repeats, build
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from dfkt.data.image_set import ImageSet
from dfkt.methods.base import Features, Term

SETTLE_STEPS = 5
"""Untimed steps before those of a DataLoader are timed; more than it holds ready."""
SETTLE_SECONDS = 0.5
"""Wait behind them, in which its workers fill it again and then disturb no other case."""


def broadcast_fsp(lower: Tensor, upper: Tensor) -> Tensor:
    """Return FSP matrices ``[B, M, N]``: the mean of a broadcast product ``[B, M, N, H * W]``, average-pooled."""
    if lower.shape[2] > upper.shape[2]:
        lower = F.adaptive_avg_pool2d(lower, (upper.shape[2], upper.shape[3]))
    return (lower.flatten(2).unsqueeze(2) * upper.flatten(2).unsqueeze(1)).mean(-1)


def broadcast_loss(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """Return the mean squared difference of FSP matrices, summed over adjacent activations."""
    pairs = zip(pairwise(teacher), pairwise(student), strict=True)
    return torch.stack([(broadcast_fsp(*s) - broadcast_fsp(*t)).square().mean() for t, s in pairs]).sum()


@dataclass(frozen=True, kw_only=True)
class BroadcastTerm(Term):
    """The broadcast loss as a term of our loop."""

    name = "flow"

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the loss; labels are not read."""
        return broadcast_loss([teacher.taps[t] for t in self.taps], [student.taps[t] for t in self.taps])


class PilImages(Dataset[tuple[Any, int]]):
    """Images in memory as a torchvision dataset gives them: PIL, then per-image transforms."""

    def __init__(self, data: ImageSet) -> None:
        images = data.train.images
        self.images, self.labels = (
            (images if isinstance(images, Tensor) else images.read()).numpy(),
            data.train.labels.tolist(),
        )
        crop = transforms.RandomCrop(SIZE, padding=PADDING)
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class EndlessSampler(RandomSampler):
    """Random images without end, so that no epoch ends within a repeat."""

    def __init__(self, dataset: PilImages) -> None:
        super().__init__(dataset, replacement=True, num_samples=10**9)


def repeats_of_loader(loader: DataLoader[Any], step: Callable[..., None], steps: int) -> Repeats:
    """Take steps on a DataLoader's batches, timed while it is in its steady state."""
    batches: Iterator[Any] = iter(loader)
    while True:
        for _ in range(SETTLE_STEPS):
            step(*next(batches))
        start = time.perf_counter()
        for _ in range(steps):
            step(*next(batches))
        yield time.perf_counter() - start
        time.sleep(SETTLE_SECONDS)


def group_ends(network: nn.Module) -> list[str]:
    """Return the paths of the stem and of every group's last block."""
    blocks = len(network.get_submodule("layer1"))  # type: ignore[arg-type]
    return ["stem", *(f"layer{g}.{blocks - 1}" for g in (1, 2, 3))]


def hooked(network: nn.Module) -> dict[str, Tensor]:
    """Return a dict in which forward hooks put the activations at the group ends."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: kept.update({name: output})

    for name in group_ends(network):
        network.get_submodule(name).register_forward_hook(keep(name))
    return kept


def broadcast_plain(data: ImageSet, steps: int) -> Repeats:
    """Train in a plain loop with hooks."""
    teacher, student = build("resnet26").eval().requires_grad_(False), build("resnet8")
    seen_teacher, seen_student = hooked(teacher), hooked(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    dataset = PilImages(data)
    loader = DataLoader(dataset, BATCH, sampler=EndlessSampler(dataset), num_workers=2, persistent_workers=True)

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            teacher(images)
        student(images)
        loss = broadcast_loss(list(seen_teacher.values()), list(seen_student.values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return repeats_of_loader(loader, step, steps)


def torchdistill(data: ImageSet, steps: int) -> Repeats:
    """Train in torchdistill's box, as its examples drive it."""
    from torchdistill.core.distillation import get_distillation_box

    teacher, student = build("resnet26"), build("resnet8")
    box = get_distillation_box(
        teacher, student, {"train": PilImages(data)}, _torchdistill_config(teacher, student), torch.device("cpu"), None,
        distributed=False, lr_factor=1,
    )  # fmt: skip
    box.pre_epoch_process(epoch=0)

    def step(images: Tensor, labels: Tensor, extra: dict[str, Any]) -> None:
        box.post_forward_process(loss=box.forward_process(images, labels, extra))

    return repeats_of_loader(box.train_data_loader, step, steps)


def _torchdistill_config(teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    ends = zip(pairwise(group_ends(teacher)), pairwise(group_ends(student)), strict=True)
    pairs = {
        f"pair{number}": {
            f"{who}_{place}": {"io": "output", "path": path}
            for who, paths in (("teacher", t), ("student", s))
            for place, path in zip(("first", "second"), paths, strict=True)
        }
        for number, (t, s) in enumerate(ends)
    }
    loss = {"criterion": {"key": "FSPLoss", "kwargs": {"fsp_pairs": pairs}}, "weight": 1.0}
    workers = {"batch_size": BATCH, "num_workers": 2, "persistent_workers": True}
    forward = {"forward_proc": "forward_batch_only"}
    sgd = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    return {
        "num_epochs": 1,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": EndlessSampler}, "kwargs": workers},
        "teacher": {"forward_hook": {"output": group_ends(teacher)}, "requires_grad": False} | forward,
        "student": {"forward_hook": {"output": group_ends(student)}} | forward,
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"fsp": loss}}},
        "optimizer": {"key": "SGD", "kwargs": sgd},
    }
