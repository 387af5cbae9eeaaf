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
kept             ours, where an earlier run has kept the teacher's FSP matrices of every flow pair
kept-dense       the same with every flow pair
kept-bfloat16    kept with networks in bfloat16, kept by a teacher in bfloat16; plain-bfloat16 computes the teacher
cut              ours with the pair of the first group only, both networks cut behind it

The rivals' losses differ from ours in pooling, reduction and normalisation; only the time is compared. Ratios are
medians of those within one turn, so that a machine that is slower for a while does not shift them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from _common import (
    BATCH,
    SHAPE,
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
)
from _rivals import BroadcastTerm, broadcast_plain, torchdistill
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfkt.config import Precision
from dfkt.data.image_set import ImageSet
from dfkt.methods.base import Stage
from dfkt.training.loop import Training
from dfkt.training.targets import Keeping


def repeats_of(training: Training, *, kept: bool = False) -> Repeats:
    """Run a training; a repeat is an epoch."""
    records = training.run()
    while True:
        start = time.perf_counter()
        record = next(records)
        yield time.perf_counter() - start
        assert record["kept_share"] == kept


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
    return teacher.to(memory_format=torch.channels_last), tapped("resnet8").network.train()


class Recorder(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, backwards too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: tuple[int, str, tuple[int, ...]] = (0, "", ())

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


def make_cases(data: ImageSet, steps: int, repeats: int, folder: str) -> dict[str, Callable[[], Repeats]]:
    """Return all cases, unbuilt; what is kept lies in a folder."""

    def broadcast(stage: Stage) -> BroadcastTerm:
        return BroadcastTerm(taps=stage.taps)

    def kept(pattern: str, precision: Precision = "float32") -> Repeats:
        keeping = Keeping(tempfile.mkdtemp(dir=folder), "benchmark", None, tuple(combinations(range(4), 2)))
        first = flow_training(data, pattern, precision=precision, keeping=keeping).run()
        for _ in range(repeats + 1):
            next(first)
        return repeats_of(flow_training(data, pattern, precision=precision, keeping=keeping), kept=True)

    return {
        "ours": lambda: repeats_of(flow_training(data, "group-ends")),
        "broadcast": lambda: repeats_of(flow_training(data, "group-ends", term=broadcast)),
        "broadcast-plain": lambda: broadcast_plain(data, steps),
        "torchdistill": lambda: torchdistill(data, steps),
        "ceiling": lambda: ceiling(steps, folded=False),
        "ceiling-folded": lambda: ceiling(steps, folded=True),
        "dense": lambda: repeats_of(flow_training(data, "dense")),
        "cut": lambda: repeats_of(flow_training(data, "dense", "local")),
        "kept": lambda: kept("group-ends"),
        "kept-dense": lambda: kept("dense"),
        "plain-bfloat16": lambda: repeats_of(flow_training(data, "group-ends", precision="bfloat16")),
        "kept-bfloat16": lambda: kept("group-ends", "bfloat16"),
    }


RIVALS = {  # names of rivals: the goals of ours, of kept, and of kept-bfloat16 over them
    "broadcast": (">= 4", "", ""), "broadcast-plain": (">= 4", ">= 7", ">= 9"), "torchdistill": (">= 1.9", ">= 3.3", ">= 4.5"),
    "ceiling": (">= 0.8", "", ""), "ceiling-folded": (">= 0.8", "", ""),
}  # fmt: skip
OWN = {"dense": ("ours", "<= 1.2"), "cut": ("ours", "<= 0.5"), "kept": ("ours", ""), "kept-dense": ("kept", "<= 1.1"),
       "plain-bfloat16": ("ours", ""), "kept-bfloat16": ("kept", "")}  # fmt: skip


def to_rows(times: Mapping[str, list[float]]) -> list[Row]:
    """Hold every case against ours: speeds where ours should be high, times of our own other stages."""
    rows = []
    for name, seconds in times.items():
        ratio = target = ""
        base, goal = OWN.get(name, ("ours", RIVALS.get(name, ("",))[0]))
        if name != "ours" and base in times:
            slower = _ratio(seconds, times[base])
            ratio = f"{slower:.2f} x the time of {base}" if name in OWN else f"ours is {slower:.2f} x as fast"
            target = goal
        rows.append(Row(name, statistics.median(seconds), ratio, target))
    return rows


def print_kept(times: Mapping[str, list[float]]) -> None:
    """Hold kept targets against the rivals."""
    for k, ours in enumerate(("kept", "kept-bfloat16"), 1):
        for rival in ("torchdistill", "broadcast-plain"):
            if ours in times and rival in times:
                ratio = _ratio(times[rival], times[ours])
                print(f"{ours} is {ratio:.2f} x as fast as {rival}, goal {RIVALS[rival][k]}")


def _ratio(seconds: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="steps per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="repeats, the median counts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run, and `memory`")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        _measure(parser, options, folder)


def _measure(parser: argparse.ArgumentParser, options: argparse.Namespace, folder: str) -> None:
    every = make_cases(random_images(options.steps * BATCH), options.steps, options.repeats, folder)
    chosen = options.only or [*every, "memory"]
    unknown = sorted(set(chosen) - {*every, "memory"})
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(every)}, memory")
    print(f"{header()}, {options.repeats} repeats of {options.steps} steps")
    cases = {name: make() for name, make in every.items() if name in chosen}
    times = in_turns(cases, options.steps, options.repeats)
    print_table(to_rows(times))
    print_kept(times)
    if "memory" in chosen:
        for name in ("resnet8", "resnet26"):
            print_memory(name)


if __name__ == "__main__":
    main()
