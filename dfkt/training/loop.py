"""The one loop that runs a schedule, and evaluate().

Knows no ray and writes no files: a :class:`Training` yields one record per epoch and stage, and hands out its state in between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dfkt.training.state import random_state, set_random_state
from dfkt.config import TrainConfig
from dfkt.data.load import ImageSet, Split, eval_batches, steps_per_epoch, train_batches
from dfkt.errors import CheckpointError, NonFiniteLossError
from dfkt.methods.builders import Schedule, Stage
from dfkt.training.optim import autocast, build_optimizer, learning_rate
from dfkt.networks.tapped import AdaptedNetwork, FrozenTeacher, TappedNetwork
from dfkt.networks.taps import match_taps
from dfkt.methods.terms import Features, weight_at

CHECK_STEPS = 50
"""Steps between looks at whether the loss is still finite; on a GPU every look waits for the device."""
Record = dict[str, Any]


class Training:
    """One student on its way through a schedule; iterate over :meth:`run` for its records.

    Args:
        schedule: The stages.
        student: The student with its taps, on the device.
        teacher: The teacher; ``None`` only where no stage reads one.
        data: The image set, on the device.
        config: What the stages share.
        rank, world: This process among the data-parallel ones; the default process group must exist when ``world > 1``.
    """

    def __init__(
        self,
        schedule: Schedule,
        student: TappedNetwork,
        teacher: FrozenTeacher | None,
        data: ImageSet,
        config: TrainConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.schedule, self.student, self.teacher, self.data, self.config = schedule, student, teacher, data, config
        self.rank, self.world = rank, world
        self.device = data.train.images.device
        self.epoch_steps = steps_per_epoch(data, config.batch_size)
        self.batch_size = min(config.batch_size, len(data.train))
        ends = [round(sum(s.epochs for s in schedule[: k + 1]) * self.epoch_steps) for k in range(len(schedule))]
        self.ends = [max(end, k + 1) for k, end in enumerate(ends)]
        self.step = 0
        self.index = 0
        self.device_seconds = 0.0
        self.teacher_taps = match_taps(student.taps, teacher.taps) if teacher and any(s.taps for s in schedule) else ()
        self.adapters = self._build_adapters()
        self._resumed_optimizer: dict[str, Any] | None = None

    def run(self) -> Iterator[Record]:
        """Train from the present place to the end, yielding a record at the end of every epoch and of every stage.

        Raises:
            NonFiniteLossError: If a loss became nan or inf; stage, epoch and step are named.
        """
        start = 0
        for stage, end in zip(self.schedule, self.ends, strict=True):
            if self.step < end:
                yield from self._run_stage(stage, start, end)
            start = end

    def state(self) -> dict[str, Any]:
        """Return all that :meth:`load` needs to go on from here, bit for bit."""
        return {
            "student": self.student.network.state_dict(),
            "adapters": self.adapters.state_dict(),
            "optimizer": self._optimizer.state_dict() if self.step and self.step not in self.ends else None,
            "random": random_state(),
            "step": self.step,
            "index": self.index,
            "device_seconds": self.device_seconds,
            "ends": list(self.ends),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take the place of a state that :meth:`state` returned.

        Raises:
            CheckpointError: If it belongs to another schedule.
        """
        if state["ends"] != self.ends:
            raise CheckpointError(f"Stages must end at steps {self.ends}, but the checkpoint has {state['ends']}.")
        self.student.network.load_state_dict(state["student"])
        self.adapters.load_state_dict(state["adapters"])
        set_random_state(state["random"])
        self.step, self.index, self.device_seconds = state["step"], state["index"], state["device_seconds"]
        self._resumed_optimizer = state["optimizer"]

    def _build_adapters(self) -> nn.ModuleDict:
        """Build 1x1 convolutions for every tap where a stage needs channels to agree, and they do not."""
        adapters = nn.ModuleDict()
        if not self.teacher_taps or self.teacher is None:
            return adapters
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for tap in sorted({tap for stage in self.schedule for tap in stage.adapted_taps}):
                ours, theirs = self.student.taps[tap].channels, self.teacher.taps[self.teacher_taps[tap]].channels
                if ours != theirs:
                    adapters[str(tap)] = nn.Conv2d(ours, theirs, 1, bias=False)
        return adapters.to(self.device)

    def _run_stage(self, stage: Stage, start: int, end: int) -> Iterator[Record]:
        model, trainable, frozen_norms = self._prepare(stage)
        optimizer = self._optimizer = build_optimizer(trainable, stage.optimizer)
        if self._resumed_optimizer is not None:
            optimizer.load_state_dict(self._resumed_optimizer)
            self._resumed_optimizer = None
        while self.step < end:
            epoch, first = divmod(self.step, self.epoch_steps)
            count = min(self.epoch_steps - first, end - self.step)
            model.train()
            for norm in frozen_norms:
                norm.eval()
            began = time.perf_counter()
            record = self._run_steps(stage, model, trainable, epoch, first, count, start, end)
            seconds = time.perf_counter() - began
            record |= self._evaluate(stage)
            self.device_seconds += time.perf_counter() - began
            images = count * self.batch_size
            record |= {"images_per_second": images / seconds, "seconds": seconds, **self._place(stage, start, end)}
            self.index += 1
            yield record

    def _prepare(self, stage: Stage) -> tuple[nn.Module, list[nn.Parameter], list[nn.Module]]:
        """Cut the student for a stage and decide what trains; returns model, parameters and frozen batch norms."""
        part = self.student.part(stage.taps, stage.needs("student_logits"))
        frozen = self.student.below(stage.frozen_below) if stage.frozen_below is not None else frozenset()
        for name, parameter in self.student.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
            parameter.grad = None
        norms: list[nn.Module] = [
            module
            for name, module in self.student.network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen
        ]
        used = nn.ModuleDict({str(t): self.adapters[str(t)] for t in stage.adapted_taps if str(t) in self.adapters})
        model: nn.Module = AdaptedNetwork(part, used)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if self.config.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        if self.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        return model, trainable, norms

    def _run_steps(
        self,
        stage: Stage,
        model: nn.Module,
        trainable: list[nn.Parameter],
        epoch: int,
        first: int,
        count: int,
        start: int,
        end: int,
    ) -> Record:
        """Take ``count`` steps from step ``first`` of an epoch on; return the mean losses."""
        batches = train_batches(
            self.data,
            self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start=first,
            rank=self.rank,
            world=self.world,
        )
        losses = torch.zeros(count, len(stage.terms) + 1, device=self.device)  # every term's, then their weighted sum
        correct = torch.zeros((), device=self.device)
        seen, lr = 0, 0.0
        for number in range(count):
            images, labels = next(batches)
            done = (self.step - start) / (end - start)
            lr = learning_rate(stage.optimizer, done)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            weights = [weight_at(term.weight, done) for term in stage.terms]
            values, logits = self._step(stage, weights, model, trainable, images, labels)
            losses[number] = values
            if logits is not None:
                correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            self.step += 1
            if (number + 1) % CHECK_STEPS == 0 or number + 1 == count:
                _check_finite(losses[: number + 1], stage, epoch, self.step - number - 1)
        means = self._mean(torch.cat([losses.mean(0), correct[None] / seen]))
        record: Record = {"lr": lr} | {
            f"{term.name}_loss": value for term, value in zip(stage.terms, means, strict=False)
        }
        record["loss"] = means[-2]
        if stage.needs("student_logits"):
            record["train_accuracy"] = means[-1]
        return record

    def _step(
        self,
        stage: Stage,
        weights: list[float],
        model: nn.Module,
        trainable: list[nn.Parameter],
        images: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Update the student once; return the terms' values with their weighted sum, and the logits."""
        teacher = self._run_teacher(stage, images)
        with self._autocast():
            outputs = model(images)
        student = Features({int(k): v for k, v in outputs.items() if k != "logits"}, outputs.get("logits"))
        values = [term(teacher, student, labels) for term in stage.terms]
        loss = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if stage.clip_norm is not None:
            nn.utils.clip_grad_norm_(trainable, stage.clip_norm)
        self._optimizer.step()
        logits = student.logits
        logged = torch.stack([v.detach().float() for v in (*values, loss)])
        return logged, None if logits is None else logits.detach()

    def _run_teacher(self, stage: Stage, images: Tensor) -> Features:
        """Run the teacher no further than the stage reads it; activations come by student tap."""
        if not stage.reads_teacher:
            return Features({})
        assert self.teacher is not None
        taps = tuple(sorted({self.teacher_taps[tap] for tap in stage.taps}))
        with torch.inference_mode(), self._autocast():
            outputs = self.teacher.part(taps, stage.needs("teacher_logits"))(images)
        return Features({tap: outputs[str(self.teacher_taps[tap])] for tap in stage.taps}, outputs.get("logits"))

    def _autocast(self) -> torch.autocast:
        return autocast(self.config, self.device)

    def _mean(self, values: Tensor) -> list[float]:
        """Average over the workers."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return [float(v) for v in values]

    def _evaluate(self, stage: Stage) -> Record:
        """Measure ``val`` at the end of an epoch of the task stage; a student in a flow stage cannot classify yet."""
        if self.world > 1:
            self._average_buffers()
        if stage.phase != "task":
            return {}
        accuracy, loss = evaluate(self.student.network, self.data, self.data.val, self.config, self.rank, self.world)
        return {"val_accuracy": accuracy, "val_loss": loss}

    def _average_buffers(self) -> None:
        """Make the workers' batch-norm statistics agree: each saw only its share of every batch."""
        for buffer in self.student.network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world

    def _place(self, stage: Stage, start: int, end: int) -> Record:
        """Say where the run stands; ``rung_epoch`` is the scheduler's clock (docs/architecture.md)."""
        share = (self.step - start) / (end - start) if stage.phase == "task" else None
        return {
            "index": self.index,
            "epoch": self.step / self.epoch_steps,
            "phase": stage.phase,
            "round": stage.round,
            "stage": stage.tap,
            "step": self.step,
            "images": self.step * self.batch_size,
            "rung_epoch": None if share is None else share * self.ends[-1] / self.epoch_steps,
        }


def evaluate(
    network: nn.Module, data: ImageSet, split: Split, config: TrainConfig, rank: int = 0, world: int = 1
) -> tuple[float, float]:
    """Return accuracy (0 to 1) and mean cross-entropy (nats) over a split, in evaluation mode; the mode is put back.

    With several workers each looks at its share, and all return the same.
    """
    was_training = network.training
    network.eval()
    shard = Split(split.images[rank::world], split.labels[rank::world])
    sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    with torch.inference_mode(), autocast(config, split.images.device):
        for images, labels in eval_batches(data, shard, 512):
            logits = network(images).float()
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
    if world > 1:
        dist.all_reduce(sums)
    network.train(was_training)
    accuracy, loss = (sums / len(split)).tolist()
    return accuracy, loss


def _check_finite(losses: Tensor, stage: Stage, epoch: int, first_step: int) -> None:
    bad = ~torch.isfinite(losses).all(1)
    if bool(bad.any()):
        step = int(bad.int().argmax())
        values = ", ".join(f"{t.name} {v:g}" for t, v in zip(stage.terms, losses[step].tolist(), strict=False))
        raise NonFiniteLossError(
            f"The loss became nan or inf in {stage.name}, epoch {epoch + 1}, step {first_step + step + 1} ({values}). "
            f"Lower the learning rate ({stage.optimizer.lr:g}) or set clip_norm."
        )
