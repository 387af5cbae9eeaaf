"""One run in one process, alone or as one of several workers: from its checkpoint, if it has one, to its last report.

A :class:`Job` says what to run and where; :func:`run_job` does it and reports through a plain function, so the same
code serves a Tune process, a worker of Ray Train and the command line. What it runs on, device and threads, it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import nn

from dfkt.config import CudaGraphs, NetworkConfig, Placement, Precision, TeacherConfig
from dfkt.data.batches import steps_per_epoch
from dfkt.data.image_set import ImageSet
from dfkt.errors import DfktError
from dfkt.methods.base import Schedule
from dfkt.methods.dfkt import describe_left_out, left_out
from dfkt.networks.build import build_network, is_own, network_taps
from dfkt.networks.tapped import TappedNetwork
from dfkt.networks.taps import StudentTaps, Tap
from dfkt.store.files import Storage
from dfkt.training.cached import images_for, teacher_for, test_images_for
from dfkt.training.config import RunConfig
from dfkt.training.evaluate import check_finite, evaluate
from dfkt.training.loop import Record, Training
from dfkt.training.memory import peak_memory, reset_peak_memory
from dfkt.training.parallel import Group
from dfkt.training.probe import probe
from dfkt.training.replay import replays
from dfkt.training.resume import check_reported, resumed
from dfkt.training.stages import stage_ends
from dfkt.training.state import own_random, save_state
from dfkt.training.targets import Keeping
from dfkt.training.teacher import check_teacher

Payload = dict[str, Any]
Report = Callable[[Payload], None]


@dataclass(frozen=True, eq=False)
class Trained:
    """A student at the end of its run.

    Attributes:
        config: What trained it.
        network: Its network, on the images' device.
        data: The images.
        val_accuracy: At the end.
        test_accuracy: Likewise; ``None`` where ``test`` was not opened.
    """

    config: RunConfig
    network: nn.Module
    data: ImageSet
    val_accuracy: float
    test_accuracy: float | None


JUDGED = {"rung_epoch", "rung_accuracy", "val_accuracy"}
"""What of a record a search judges; a student in a flow stage cannot classify yet."""
Keep = Callable[[Storage, Trained], None]
"""Leaves a student in a folder; how that is done is the affair of rooms above this one."""


@dataclass(frozen=True)
class Job:
    """One run, and where it lies.

    Args:
        config: Everything that the result depends on.
        placement: Where things lie, and what the run is given: device and threads.
        storage: Folder of its checkpoint, readable by every process that may run it.
        teacher: Folder with the teacher's weights; ``None`` where the method reads none.
        test: Open the test split when training is over.
        keep: Leaves the student beside the checkpoint when training, and the test, are over; ``None`` leaves none. It travels
            with the job, so a function of a module.
        rungs: Shares of the last stage at which an average of the student's weights is judged and reported besides.
        keeping: Where what the teacher says is kept and looked for; ``None`` computes it at every step.
    """

    config: RunConfig
    placement: Placement
    storage: str
    teacher: str | None
    test: bool = False
    keep: Keep | None = None
    rungs: tuple[float, ...] = ()
    keeping: Keeping | None = None


class _Clock:
    """When a run started, in how many attempts, and the seconds that those which left a checkpoint took in all."""

    def __init__(self) -> None:
        self.started, self.attempts, self.before = datetime.now(UTC).isoformat(), 1, 0.0
        self.began = time.perf_counter()

    def go_on(self, earlier: Payload) -> None:
        """Count in the attempts before this one, as the last of them read."""
        self.started, self.attempts = earlier["started"], earlier["attempts"] + 1
        self.before = earlier["wall_seconds"]

    def read(self) -> Payload:
        """Return the entries of a report."""
        seconds = self.before + time.perf_counter() - self.began
        return {"started": self.started, "attempts": self.attempts, "wall_seconds": seconds}


def build_student(config: NetworkConfig, data: ImageSet, seed: int, *, tapped: bool = True) -> TappedNetwork:
    """Return a new student on the images' device; its initial weights depend on the seed alone."""
    device = data.device
    with own_random(seed, device):
        network = build_network(config, num_classes=data.num_classes, in_channels=data.channels)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TappedNetwork(network, network_taps(network, config) if tapped else (), data.shape)


def build_training(
    config: RunConfig,
    data: ImageSet,
    teacher_folder: str | None,
    group: Group | None = None,
    keeping: Keeping | None = None,
    graphs: CudaGraphs = "off",
) -> Training:
    """Return a run, ready to start, on the images' device.

    Raises:
        InputError: If networks, taps, pattern and lengths do not fit each other.
    """
    method, teacher = config.method, None
    student = build_student(config.student, data, config.train.seed, tapped=method.tapped)
    if method.taught:
        assert teacher_folder is not None
        teacher = teacher_for(
            config.teacher, data, teacher_folder, tapped=method.tapped, precision=config.train.precision
        )
    met = teacher.taps if teacher is not None and method.tapped else None
    schedule = method.schedule(config.train.epochs, StudentTaps.of(student.taps, met))
    ours = method.is_own() and is_own(config.student.name) and (teacher is None or is_own(config.teacher.network.name))
    replay = replays(graphs, data.device, group.world if group else 1, ours=ours)
    return Training(schedule, student, teacher, data, config.train, group, keeping, replay=replay)


def check_networks(
    student: NetworkConfig,
    teacher: TeacherConfig | None,
    data: ImageSet,
    *,
    tapped: bool = True,
    precision: Precision = "auto",
) -> tuple[StudentTaps, tuple[Tap, ...]]:
    """Build and try both networks as a run will; return the student's taps, matched with the teacher's, and these.

    Raises:
        InputError: If a network or tap is unknown or does not fit, or a user's teacher cannot be read.
    """
    built, read = build_student(student, data, seed=0, tapped=tapped), tuple[Tap, ...]()
    probe(built, student.name, data, precision, learns=True)
    if teacher is not None:
        read = check_teacher(teacher, data, tapped=tapped, precision=precision)
    return StudentTaps.of(built.taps, read if tapped and teacher is not None else None), read


def check_run(config: RunConfig, data: ImageSet, log: Callable[[str], None] = lambda line: None) -> Schedule:
    """Build networks and schedule of a run, and return the schedule; ``log`` is told which flow pairs are left out.

    Raises:
        InputError: If networks, taps, pattern and lengths do not fit each other, or a user's teacher cannot be read.
    """
    method = config.method
    teacher, precision = config.teacher if method.taught else None, config.train.precision
    taps, _ = check_networks(config.student, teacher, data, tapped=method.tapped, precision=precision)
    schedule = method.schedule(config.train.epochs, taps)
    stage_ends(schedule, steps_per_epoch(data, config.train.batch_size))
    if pairs := left_out(method, config.train.epochs, taps):
        log(describe_left_out(pairs))
    return schedule


def run_job(
    job: Job,
    report: Report,
    group: Group | None = None,
    *,
    warned: Callable[[], bool] = lambda: False,
    yields: Callable[[], bool] | None = None,
) -> bool:
    """Run a job from its checkpoint, if it has one, to its end; return whether that was reached.

    Every report holds ``records`` (the epochs not reported by this attempt before; after a restart, all of them),
    ``rung_epoch`` once the student can classify, with ``val_accuracy`` or, at a rung, ``rung_accuracy``, the newest
    record's other numbers, and ``complete``. A run that cannot go on reports ``failure``, with all its records.

    Args:
        job: What to run.
        report: Called after every epoch and stage, and at every rung.
        group: The data-parallel processes, of which this is one.
        warned: Whether this machine may be taken away soon: then every epoch and stage leaves a checkpoint.
        yields: Whether the run shall end at the next checkpoint, to be taken up by other processes; all workers are told alike.
    """
    group = group or Group()
    device = torch.device(job.placement.device)
    torch.set_num_threads(job.placement.threads)
    clock = _Clock()
    history: list[Record] = []
    training: Training | None = None
    reset_peak_memory(device)
    try:
        data = images_for(job.config.data, job.placement)
        make = partial(build_training, job.config, data, job.teacher, group, job.keeping, job.placement.cuda_graphs)
        training = _resume(job, make, history, clock)
        return _train(job, training, history, clock, report, warned, yields or (lambda: False))
    except DfktError as error:
        seconds = 0.0 if training is None else training.device_seconds
        spent = {"device_seconds": seconds, "workers": group.world}
        failure = {"records": history, "failure": str(error), "peak_memory_bytes": peak_memory(device)}
        report(failure | spent | clock.read())
        return True


def _resume(job: Job, make: Callable[[], Training], history: list[Record], clock: _Clock) -> Training:
    """Go on from the checkpoint; a damaged one, another run's, or none starts the run anew."""
    training, state = resumed(make, Storage(job.storage), partial(check_reported, key=job.config.key))
    if state is not None:
        history += state["history"]
        clock.go_on(state["clock"])
    return training


def _train(
    job: Job,
    training: Training,
    history: list[Record],
    clock: _Clock,
    report: Report,
    warned: Callable[[], bool],
    yields: Callable[[], bool],
) -> bool:
    reported = 0
    storage, every = Storage(job.storage), job.placement.checkpoint_every
    total = training.ends[-1]

    def send(record: Record) -> None:
        nonlocal reported
        history.append(record)
        report(_payload(history, reported, training) | clock.read())
        reported = len(history)

    for record in training.run(job.rungs, on_rung=send):
        over = training.step == total
        ends_here = not over and yields()
        if training.group.rank == 0 and (training.index % every == 0 or over or ends_here or warned()):
            extra = {"history": [*history, record], "clock": clock.read(), "key": job.config.key}
            save_state(storage, training.state() | extra)
        if over:
            history.append(record)
        else:
            send(record)
        if ends_here:
            return False
    last = _payload(history, min(reported, len(history) - 1), training) | {"complete": True}
    if job.test:
        last |= _test(job, training)
    if job.keep is not None and training.group.rank == 0:
        found = last["val_accuracy"], last.get("test_accuracy")
        job.keep(storage, Trained(job.config, training.student.network, training.data, *found))
    report(last | clock.read())
    return True


def _payload(history: list[Record], reported: int, training: Training) -> Payload:
    payload: Payload = {
        "records": history[reported:],
        "device_seconds": training.device_seconds,
        "peak_memory_bytes": peak_memory(training.device),
        "workers": training.group.world,
        "complete": False,
    }
    newest = history[-1]
    judged = JUDGED if newest["phase"] == "task" else set()
    numbers = {n: v for n, v in newest.items() if isinstance(v, int | float) and (n not in JUDGED or n in judged)}
    return payload | numbers


def _test(job: Job, training: Training) -> Payload:
    """Open the test split: once, for a run that is over."""
    network, split = training.student.network, test_images_for(job.config.data, job.placement)
    accuracy, loss = evaluate(network, training.data, split, job.config.train.precision, training.group)
    check_finite(training.schedule[-1], "when all training was over", {"test": loss})
    return {"test_accuracy": accuracy, "test_loss": loss}
