"""How fast a flow stage trains, beside what a user would use instead and beside the networks alone.

    python benchmarks/flow_step.py [--steps N] [--repeats N] [--only NAME ...]

ResNet-26 teaches ResNet-8 on 32x32 images; unless said otherwise by the flow pairs between the ends of adjacent groups.

ours             our loop: augmentation, folded teacher, cut student, flow loss, SGD
broadcast        our loop, FSP matrices as means of broadcast products, as a widely used repository computes them
broadcast-plain  that loss in a plain loop: whole networks with hooks, images from a DataLoader with two workers
torchdistill     torchdistill's DistillationBox with its FSPLoss, same DataLoader
ceiling          networks alone on one batch: whole teacher forwards, whole student forwards and backwards
ceiling-folded   the same with the folded teacher and the student cut behind its last tap
dense            ours with every flow pair
cut              ours with the pair of the first group only, both networks cut behind it

The rivals' losses differ from ours in pooling, reduction and normalisation; only the time is compared. Ratios are
medians of those within one turn, so that a machine that is slower for a while does not shift them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from _common import (
    BATCH,
    DECAY,
    MEAN,
    MOMENTUM,
    PADDING,
    RATE,
    SHAPE,
    SIZE,
    STD,
    Repeats,
    Row,
    build,
    flow_training,
    frozen,
    header,
    in_turns,
    print_table,
    random_images,
    tapped,
)  # fmt: skip
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from dfkt.data.image_set import ImageSet
from dfkt.methods.base import Features, Stage, Term
from dfkt.training.loop import Training

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


def repeats_of(training: Training) -> Repeats:
    """Run a training; a repeat is an epoch."""
    records = training.run()
    while True:
        start = time.perf_counter()
        next(records)
        yield time.perf_counter() - start


class PilImages(Dataset[tuple[Any, int]]):
    """Images in memory as a torchvision dataset gives them: PIL, then per-image transforms."""

    def __init__(self, data: ImageSet) -> None:
        self.images, self.labels = data.train.images.numpy(), data.train.labels.tolist()
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


def ceiling(steps: int, *, folded: bool) -> Repeats:
    """Run the networks alone on one batch: nothing that any flow stage could leave out."""
    images = torch.randn(BATCH, *SHAPE).contiguous(memory_format=torch.channels_last)
    teacher, student = _ceiling_networks(folded)
    while True:
        start = time.perf_counter()
        for _ in range(steps):
            with torch.no_grad():
                teacher(images)
            output = student(images)
            loss = output["3"].mean() if folded else output.sum()
            student.zero_grad(set_to_none=True)
            loss.backward()
        yield time.perf_counter() - start


def _ceiling_networks(folded: bool) -> tuple[nn.Module, nn.Module]:
    if folded:
        whole = frozen("resnet26")
        return whole.part((0, 4, 8, 12), logits=False), tapped("resnet8").part((0, 1, 2, 3), logits=False).train()
    teacher = build("resnet26").eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last), tapped("resnet8").network.train()  # type: ignore[call-overload]


class Recorder(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, backwards too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = (0, "", ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor):
                size = min(out.numel() * out.itemsize, out.untyped_storage().nbytes())
                self.largest = max(self.largest, (size, str(func), tuple(out.shape)), key=lambda entry: entry[0])
        return result


class RecordedTraining(Training):
    """A training that records its first step."""

    recorder: Recorder | None = None

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorder is not None:
            return super()._step(*args, **kwargs)
        self.recorder = Recorder()
        with self.recorder:
            return super()._step(*args, **kwargs)


def print_memory(name: str) -> None:
    """Compare the largest tensor of a flow step over every pair with the largest activation."""
    training = flow_training(random_images(BATCH), "dense", student=name, kind=RecordedTraining)
    next(training.run())
    assert isinstance(training, RecordedTraining)
    assert training.recorder is not None
    assert training.teacher is not None
    size, op, shape = training.recorder.largest
    taps = (*training.student.taps, *training.teacher.taps)
    activation = 4 * BATCH * max(tap.channels * tap.height * tap.width for tap in taps)
    told = f"{size / 2**20:.2f} MiB ({op} {list(shape)}), largest activation {activation / 2**20:.2f} MiB"
    print(f"largest tensor of a dense step, {name}: {told}, ratio {size / activation:.2f}, target <= 1")


def make_cases(data: ImageSet, steps: int) -> dict[str, Callable[[], Repeats]]:
    """Return all cases, unbuilt."""

    def broadcast(stage: Stage) -> BroadcastTerm:
        return BroadcastTerm(taps=stage.taps)

    return {
        "ours": lambda: repeats_of(flow_training(data, "group-ends")),
        "broadcast": lambda: repeats_of(flow_training(data, "group-ends", term=broadcast)),
        "broadcast-plain": lambda: broadcast_plain(data, steps),
        "torchdistill": lambda: torchdistill(data, steps),
        "ceiling": lambda: ceiling(steps, folded=False),
        "ceiling-folded": lambda: ceiling(steps, folded=True),
        "dense": lambda: repeats_of(flow_training(data, "dense")),
        "cut": lambda: repeats_of(flow_training(data, "dense", "local")),
    }


TARGETS = {
    "broadcast": ">= 4", "broadcast-plain": ">= 4", "torchdistill": ">= 1.5", "ceiling": ">= 0.8",
    "ceiling-folded": ">= 0.8", "dense": "<= 1.2", "cut": "<= 0.5",
}  # fmt: skip


def to_rows(times: Mapping[str, list[float]]) -> list[Row]:
    """Hold every case against ours: speeds where ours should be high, times of our own other stages."""
    rows = []
    for name, seconds in times.items():
        ratio = ""
        if "ours" in times and name != "ours":
            slower = statistics.median(a / b for a, b in zip(seconds, times["ours"], strict=True))
            own = name in ("dense", "cut")
            ratio = f"{slower:.2f} x the time of ours" if own else f"ours is {slower:.2f} x as fast"
        rows.append(Row(name, statistics.median(seconds), ratio, TARGETS.get(name, "") if ratio else ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="steps per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="repeats, the median counts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run, and `memory`")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = make_cases(random_images(options.steps * BATCH), options.steps)
    chosen = options.only or [*every, "memory"]
    unknown = sorted(set(chosen) - {*every, "memory"})
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(every)}, memory")
    print(f"{header()}, {options.repeats} repeats of {options.steps} steps")
    cases = {name: make() for name, make in every.items() if name in chosen}
    print_table(to_rows(in_turns(cases, options.steps, options.repeats)))
    if "memory" in chosen:
        for name in ("resnet8", "resnet26"):
            print_memory(name)


if __name__ == "__main__":
    main()
