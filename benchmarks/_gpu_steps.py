"""Steps on a card: our loop's, the same mathematics as one function, that compiled, and that captured as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any, Literal

import torch
from _common import BATCH, DECAY, MOMENTUM, RATE, Repeats, frozen, random_images, tapped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from dfkt.config import OptimizerConfig, Precision, TrainConfig
from dfkt.data.batches import train_batches
from dfkt.data.image_set import ImageSet
from dfkt.methods.base import Features, Stage
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import StudentTaps, match_taps
from dfkt.training.loop import Training
from dfkt.training.targets import Keeping

Number = Literal["float32", "tf32", "bfloat16"]
NUMBERS: tuple[Number, ...] = ("float32", "tf32", "bfloat16")
"""``float32`` is without TF32, ``tf32`` with it in convolutions and products, ``bfloat16`` autocast, its float32 without TF32."""
STAGES = ("group-ends", "dense", "kd")
"""Flow stages by their pattern, and the task stage with soft targets."""
TEACHER, STUDENT = "resnet26", "resnet8"
JUDGED = 16
"""Images of `val`, at which the loop looks at the end of every epoch of the task stage."""
WARM_UP = 3
"""Steps before a capture: the flow loss plans, libraries choose."""
LONG = 1e6


@contextmanager
def computing(number: Number) -> Iterator[None]:
    """Let float32 be what a case says while the context lasts."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = number == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@cache
def teacher_on(device: torch.device) -> FrozenTeacher:
    """Return the teacher that all cases on a device share."""
    teacher = frozen(TEACHER)
    teacher.network.to(device)
    return teacher


class Clock:
    """Seconds between two moments of a device: by its events, or the host's clock where it has none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began: Any = None

    def start(self) -> None:
        """Begin when all before is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.began = torch.cuda.Event(enable_timing=True)
            self.began.record()
        else:
            self.began = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds until all that was asked for is done."""
        if self.device.type != "cuda":
            return float(time.perf_counter() - self.began)
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        ended.synchronize()
        return float(self.began.elapsed_time(ended)) / 1000


@dataclass(frozen=True, eq=False)
class Setting:
    """What a case trains."""

    name: str
    """Of the stage, one of :data:`STAGES`."""
    number: Number
    stage: Stage
    data: ImageSet
    student: TappedNetwork
    teacher: FrozenTeacher
    config: TrainConfig

    @classmethod
    def make(cls, name: str, number: Number, device: torch.device, steps: int) -> Setting:
        """Return a stage with networks of its own; an epoch has so many steps."""
        data = random_images(steps * BATCH)
        data = replace(data, val=replace(data.val, images=data.val.images[:JUDGED], labels=data.val.labels[:JUDGED]))
        student, teacher = tapped(STUDENT), teacher_on(device)
        student.network.to(device)
        taps = StudentTaps.of(student.taps, teacher.taps)
        method = Kd(rate=RATE) if name == "kd" else Dfkt(pattern=name, order="joint", flow_rate=RATE)
        stage = replace(method.schedule(LONG, taps)[0], epochs=LONG)
        optimizer = OptimizerConfig(schedule="constant", momentum=MOMENTUM, weight_decay=DECAY)
        precision: Precision = "bfloat16" if number == "bfloat16" else "float32"
        config = TrainConfig(batch_size=BATCH, epochs=LONG, precision=precision, optimizer=optimizer)
        return cls(name, number, stage, data.to(device), student, teacher, config)

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.data.device

    def training(self, keeping: Keeping | None = None, *, replay: bool = False) -> Training:
        """Return our loop of it, its steps recorded as CUDA graphs or not, what the teacher says kept and read or not."""
        return Training((self.stage,), self.student, self.teacher, self.data, self.config, None, keeping, replay=replay)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end."""
        epoch = 0
        while True:
            yield from train_batches(self.data, BATCH, seed=0, epoch=epoch)
            epoch += 1


class Step:
    """One update of a student as a function of a batch, as the loop does it at a rate that stays.

    Args:
        setting: What is trained.
        compiled: Compile the student's part, forwards and backwards.
    """

    def __init__(self, setting: Setting, *, compiled: bool = False) -> None:
        self.setting, stage = setting, setting.stage
        part = setting.student.part(stage.taps, stage.needs("student_logits")).train()
        self.model: Callable[[Tensor], dict[str, Tensor]] = torch.compile(part) if compiled else part
        self.trainable = list(part.parameters())
        self.optimizer = torch.optim.SGD(
            self.trainable, stage.rate, momentum=MOMENTUM, weight_decay=DECAY, foreach=True
        )
        self.matched = match_taps(setting.student.taps, setting.teacher.taps) if stage.taps else ()
        self.above = setting.teacher.part(
            tuple(sorted({self.matched[tap] for tap in stage.taps})), stage.needs("teacher_logits")
        )

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Update the student; return the loss."""
        stage, narrow = self.setting.stage, self.setting.number == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=narrow):
            with torch.no_grad():
                theirs = self.above(images)
            ours = self.model(images)
        teacher = Features({tap: theirs[str(self.matched[tap])] for tap in stage.taps}, theirs.get("logits"))
        student = Features({tap: ours[str(tap)] for tap in stage.taps}, ours.get("logits"))
        values = [term.weight_at(0.0) * term(teacher, student, labels) for term in stage.terms]
        loss = torch.stack(values).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if stage.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trainable, stage.clip_norm)
        self.optimizer.step()
        return loss.detach()


class CapturedStep:
    """A step as a CUDA graph: a batch is copied to where the graph reads it, and the whole step is one launch.

    The first steps, on a stream beside, make what a graph cannot: plans, momentum, the libraries' workspaces. Its rate of
    learning cannot change, so it holds SGD's step too, which our loop takes outside its graphs.
    """

    def __init__(self, setting: Setting) -> None:
        self.step = step = Step(setting)  # kept: the graph writes into the optimizer's momentum
        images, labels = next(setting.batches())
        self.images, self.labels = images.clone(), labels.clone()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                step(self.images, self.labels)
        torch.cuda.current_stream().wait_stream(beside)
        step.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step(self.images, self.labels)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Update the student; return the loss, which the next call overwrites."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss


def loop_repeats(
    setting: Setting, *, replay: bool = False, folder: str | None = None, reading: bool = False
) -> Repeats:
    """Run our loop; a repeat is an epoch, with its look at the losses, and at `val` in the task stage.

    Args:
        setting: What is trained.
        replay: Record its steps as CUDA graphs.
        folder: Where what the teacher says is kept; ``None`` keeps nothing.
        reading: Another case has kept it: none of it may have to be computed.
    """
    name = f"{setting.name}-{setting.number}"
    keeping = None if folder is None else Keeping(folder, name, None, tuple(combinations(range(4), 2)))
    records, clock = setting.training(keeping, replay=replay).run(), Clock(setting.device)
    while True:
        with computing(setting.number):
            clock.start()
            record = next(records)
            seconds = clock.seconds()
        if record["kept_share"] != reading:
            raise RuntimeError(f"Of {name} the share {record['kept_share']} was read.")
        yield seconds


def step_repeats(
    setting: Setting, make: Callable[[Setting], Callable[[Tensor, Tensor], Tensor]], steps: int
) -> Repeats:
    """Take single steps; their batches are made on the device, as the loop makes them."""
    batches, clock = setting.batches(), Clock(setting.device)
    with computing(setting.number):
        step = make(setting)
    while True:
        with computing(setting.number):
            clock.start()
            for _ in range(steps):
                loss = step(*next(batches))
            seconds = clock.seconds()
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"The loss of {setting.name} in {setting.number} became nan or inf; its times mean nothing."
            )
        yield seconds


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each tensor once for each; what only looks at memory reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.itemsize for t in tensors)
        return result


def work_of(setting: Setting) -> tuple[int, int]:
    """Return the floating-point operations of a step's convolutions and products, and the bytes that its operations move."""
    with computing(setting.number):
        step, (images, labels) = Step(setting), next(setting.batches())
        step(images, labels)
        with FlopCounterMode(display=False) as flops:
            step(images, labels)
        with Traffic() as traffic:
            step(images, labels)
    return flops.get_total_flops(), traffic.bytes
