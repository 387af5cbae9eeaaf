"""The one loop that runs a schedule.

Knows no ray and writes no files: a :class:`Training` yields one record per epoch and stage, and hands out its state in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkt.config import TrainConfig, check_rule
from dfkt.data.batches import steps_per_epoch, train_batches
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError
from dfkt.methods.base import Schedule, Stage
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import match_taps
from dfkt.training.average import WeightAverage
from dfkt.training.evaluate import check_finite, diverged, evaluate
from dfkt.training.optim import learning_rate, network_dtype
from dfkt.training.parallel import Group, synchronise_batch_norms
from dfkt.training.stages import RunningStage, build_adapters, rung_steps, stage_ends
from dfkt.training.state import draw_seed, own_random
from dfkt.training.targets import Keeping, Targets
from dfkt.training.update import Update, Updates

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
        group: The data-parallel processes, of which this is one.
        keeping: Where what the teacher says is kept and looked for; ``None`` computes it at every step.
        replay: Record what a step computes as CUDA graphs, and replay them: on a GPU, one worker alone.

    Raises:
        ConfigError: If there are fewer steps than stages, or fewer images in a batch than workers.
        TapError: If a stage reads taps, and the networks' taps cannot be matched.
    """

    def __init__(
        self,
        schedule: Schedule,
        student: TappedNetwork,
        teacher: FrozenTeacher | None,
        data: ImageSet,
        config: TrainConfig,
        group: Group | None = None,
        keeping: Keeping | None = None,
        *,
        replay: bool = False,
    ) -> None:
        self.schedule, self.student, self.teacher, self.data, self.config = schedule, student, teacher, data, config
        self.group, self.replay = group or Group(), replay
        self.device = data.device
        self.epoch_steps = steps_per_epoch(data, config.batch_size)
        self.batch_size = min(config.batch_size, len(data.train))
        world = self.group.world
        check_rule(world <= self.batch_size, "workers <= batch_size", workers=world, batch_size=self.batch_size)
        self.ends = stage_ends(schedule, self.epoch_steps)
        self.step = self.index = 0
        self.device_seconds = 0.0
        dtype = network_dtype(config.precision)
        student.network.to(dtype)
        self.adapters, self.teacher_taps = nn.ModuleDict(), tuple[int, ...]()
        if teacher is not None and any(stage.taps for stage in schedule):
            self.teacher_taps = match_taps(student.taps, teacher.taps)
            self.adapters = build_adapters(schedule, student, teacher, self.teacher_taps, config.seed)
        self.adapters.to(self.device, dtype)
        self.targets = Targets(teacher, self.teacher_taps, data, config, self.group, keeping, replay=replay)
        if world > 1 and config.sync_batch_norm:
            synchronise_batch_norms(student.network)
        self.running: RunningStage | None = None
        self._resumed_optimizer: dict[str, Any] | None = None
        self.average: WeightAverage | None = None
        self._rungs: dict[int, float] = {}
        self._on_rung: Callable[[Record], None] | None = None
        self._since = self._away = 0.0

    def run(self, rungs: Sequence[float] = (), on_rung: Callable[[Record], None] | None = None) -> Iterator[Record]:
        """Train from the present place to the end, yielding a record at the end of every epoch and of every stage.

        Args:
            rungs: Shares of the last stage at which ``val`` judges a running average of the student's weights besides
                (``rung_accuracy``; ``rung`` is the share); training is not changed by that.
            on_rung: Called at a rung within an epoch, with a record of that alone. A rung at an epoch's end is its record's.

        Raises:
            NonFiniteLossError: If a loss, that of ``val`` too, became nan or inf; stage, epoch and step are named.
        """
        start = 0
        self._rungs, self._on_rung = rung_steps(rungs, self.ends), on_rung
        try:
            for stage, end in zip(self.schedule, self.ends, strict=True):
                if self.step < end:
                    yield from self._run_stage(stage, start, end)
                start = end
        finally:
            self.targets.close()
            self._on_rung = None  # who is called may hold this run, which would then outlive itself in its process

    def state(self) -> dict[str, Any]:
        """Return all that :meth:`load` needs to go on from here, bit for bit."""
        midway = self.running is not None and self.running.start < self.step < self.running.end
        return {
            "student": self.student.network.state_dict(),
            "adapters": self.adapters.state_dict(),
            "optimizer": self.running.optimizer.state_dict() if self.running is not None and midway else None,
            "step": self.step,
            "index": self.index,
            "device_seconds": self.device_seconds,
            "average": self.average.state() if self.average is not None else None,
            "ends": list(self.ends),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the place of a state that :meth:`state` returned.

        Raises:
            CheckpointError: If it belongs to another schedule.
        """
        if state["ends"] != self.ends:
            raise CheckpointError(f"Stages must end at steps {self.ends}, but the checkpoint has {state['ends']}.")
        self.student.network.load_state_dict(state["student"])
        self.adapters.load_state_dict(state["adapters"])
        self.step, self.index, self.device_seconds = state["step"], state["index"], state["device_seconds"]
        self._resumed_optimizer = state["optimizer"]
        if state["average"] is not None:
            self.average = WeightAverage(self.student.network)
            self.average.load(state["average"])

    def _run_stage(self, stage: Stage, start: int, end: int) -> Iterator[Record]:
        running = RunningStage.prepare(stage, start, end, self.student, self.adapters, self.config, self.group)
        self.running = running
        updates = Updates(running, self.batch_size, self.config, self.group, replay=self.replay)
        if self._resumed_optimizer is not None:
            running.optimizer.load_state_dict(self._resumed_optimizer)
            self._resumed_optimizer = None
        if end == self.ends[-1] and self.average is None and any(step > self.step for step in self._rungs):
            self.average = WeightAverage(self.student.network)
        try:
            while self.step < end:
                epoch, first = divmod(self.step, self.epoch_steps)
                count = min(self.epoch_steps - first, end - self.step)
                running.train_mode()
                began = self._since = time.perf_counter()
                self._away = 0.0
                with own_random(draw_seed(self.config.seed, self.step, self.group.rank), self.device):
                    record = self._run_steps(running, updates, epoch, first, count)
                seconds = time.perf_counter() - began - self._away
                record |= self._evaluate(stage) | self._judge()
                self.device_seconds += (time.perf_counter() - self._since) * self.group.world  # of all workers
                speed = {"images_per_second": count * self.batch_size / seconds, "seconds": seconds}
                yield record | speed | self._place(running)
        finally:
            updates.close()

    def _look(self, running: RunningStage) -> None:
        """Report how it does at a rung within an epoch."""
        began = time.perf_counter()
        record = {"lr": running.optimizer.param_groups[0]["lr"]} | self._judge()
        self.device_seconds += (time.perf_counter() - self._since) * self.group.world  # of all workers
        if self._on_rung is not None:
            self._on_rung(record | self._place(running))
        self._since = time.perf_counter()
        self._away += self._since - began

    def _run_steps(self, running: RunningStage, updates: Updates, epoch: int, first: int, count: int) -> Record:
        """Take ``count`` steps from step ``first`` of an epoch on; return the mean losses."""
        stage, group = running.stage, self.group
        batches = train_batches(
            self.data, self.config.batch_size, seed=self.config.seed, epoch=epoch, start=first,
            rank=group.rank, world=group.world,
        )  # fmt: skip
        dtype = network_dtype(self.config.precision)
        columns = len(stage.terms) + 1  # every term's value, then their weighted sum
        losses = torch.zeros(count, columns, dtype=dtype, device=self.device)
        correct = torch.zeros((), dtype=dtype, device=self.device)
        self.targets.begin(stage, epoch, first)
        seen, rate = 0, 0.0
        for number in range(count):
            images, labels = next(batches)
            rate = learning_rate(stage.rate, self.config.optimizer.schedule, running.done(self.step))
            for parameters in running.optimizer.param_groups:
                parameters["lr"] = rate
            losses[number], logits = self._step(updates, images, labels)
            if logits is not None:
                correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            self.step += 1
            if self.average is not None:
                self.average.update()
            if self.step in self._rungs and number + 1 < count:
                self._look(running)
            if (number + 1) % CHECK_STEPS == 0 or number + 1 == count:
                self._check_finite(losses[: number + 1], stage, epoch, self.step - number - 1)
        accuracy = correct[None] / seen * (seen * group.world / (count * self.batch_size))
        means = group.mean(torch.cat([losses.mean(0), accuracy])).tolist()
        record: Record = {f"{term.name}_loss": value for term, value in zip(stage.terms, means, strict=False)}
        record |= {"lr": rate, "loss": means[-2], "kept_share": self.targets.served / count}
        return record | ({"train_accuracy": means[-1]} if stage.needs("student_logits") else {})

    def _step(self, updates: Updates, images: Tensor, labels: Tensor) -> Update:
        images = images.to(network_dtype(self.config.precision))
        return updates(images, labels, self.targets.next(images), updates.running.done(self.step))

    def _check_finite(self, losses: Tensor, stage: Stage, epoch: int, first_step: int) -> None:
        """Look at the whole batch's losses: what one worker saw ends all, and none waits for another for ever."""
        losses = self.group.mean(losses)
        bad = ~torch.isfinite(losses).all(1)
        if bool(bad.any()):
            step = int(bad.int().argmax())
            values = {t.name: v for t, v in zip(stage.terms, losses[step].tolist(), strict=False)}
            raise diverged(stage, f"epoch {epoch + 1}, step {first_step + step + 1}", values)

    def _evaluate(self, stage: Stage) -> Record:
        """Measure ``val`` at the end of an epoch of the task stage; a student in a flow stage cannot classify yet."""
        if not self.config.sync_batch_norm:
            self.group.average_buffers(self.student.network)
        if stage.phase != "task":
            return {}
        accuracy, loss = self._measure()
        check_finite(stage, f"at the end of epoch {math.ceil(self.step / self.epoch_steps)}", {"val": loss})
        return {"val_accuracy": accuracy, "val_loss": loss}

    def _judge(self) -> Record:
        """Measure ``val`` at a rung, by the average of the weights; the student trains on as if it had not been looked at."""
        if self.step not in self._rungs:
            return {}
        assert self.average is not None
        with self.average.applied():
            if not self.config.sync_batch_norm:
                self.group.average_buffers(self.student.network)
            accuracy, _ = self._measure()
        if self.step == max(self._rungs):
            self.average = None
        return {"rung": self._rungs[self.step], "rung_accuracy": accuracy}

    def _measure(self) -> tuple[float, float]:
        return evaluate(self.student.network, self.data, self.data.val, self.config.precision, self.group)

    def _place(self, running: RunningStage) -> Record:
        """Say where the run stands; ``rung_epoch`` is the scheduler's clock (docs/architecture.md)."""
        stage = running.stage
        task = stage.phase == "task"
        index, self.index = self.index, self.index + 1
        return {
            "index": index,
            "epoch": self.step / self.epoch_steps,
            "phase": stage.phase,
            "round": stage.round,
            "stage": stage.tap,
            "step": self.step,
            "images": self.step * self.batch_size,
            "rung_epoch": running.done(self.step) * self.ends[-1] / self.epoch_steps if task else None,
        }
