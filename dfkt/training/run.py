"""Runs training in one process, alone or as one of Ray Train's workers; reports and checkpoints.

A :class:`Job` is one run of one configuration. :func:`run_job` does it and reports through a plain function, so the same
code serves a Tune process, a worker of Ray Train and the command line. A job that was interrupted goes on from the
checkpoint in its folder, in whatever process it is started again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkt.training.state import load_state, save_state
from dfkt.config import DataConfig, NetworkConfig, RunConfig, TeacherConfig, config_key
from dfkt.data.load import ImageSet, load_data
from dfkt.errors import RunError
from dfkt.methods.builders import build_schedule, needs_teacher
from dfkt.networks.build import build_network, network_taps
from dfkt.store.files import Storage
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import group_ends
from dfkt.training.teacher import load_teacher
from dfkt.training.loop import Record, Training, evaluate

Payload = dict[str, Any]
Report = Callable[[Payload], None]
RESULT_FILE = "result.json"
STUDENT_FILE = "student.pt"


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        config: Everything that it depends on.
        storage: Folder of its checkpoint, readable by every process that may run it.
        teacher: Folder with the teacher's weights; ``None`` where the method reads none.
        number: Its number in its table.
        test: Open the test split when training is over; keep the student and the last report beside the checkpoint.
    """

    config: RunConfig
    storage: str
    teacher: str | None
    number: int = 0
    test: bool = False


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


class _Cache:
    """What one process keeps from run to run: the latest image set and the latest teacher."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, key: str, make: Callable[[], Any]) -> Any:
        """Return the kept value of this kind, made anew when its key is another."""
        if self.entries.get(kind, ("",))[0] != key:
            self.entries[kind] = (key, make())
        return self.entries[kind][1]


_CACHE = _Cache()
_CLEAR_REFS = Path("/proc/self/clear_refs")


def images_for(config: DataConfig, device: torch.device, *, test: bool = False) -> ImageSet:
    """Return a configuration's image set on a device, kept for the next run of this process."""
    key = f"{config_key(config)} {device} {test}"
    data: ImageSet = _CACHE.get(f"images {test}", key, lambda: load_data(config, test=test).to(device))
    return data


def teacher_for(config: TeacherConfig, data: ImageSet, folder: str) -> FrozenTeacher:
    """Return a frozen teacher on the images' device, kept for the next run of this process."""
    device = data.train.images.device

    def make() -> FrozenTeacher:
        network = load_teacher(config, data, Storage(folder))
        return FrozenTeacher(network, network_taps(network, config.network), _shape(data))

    key = f"{config_key(config)} {folder} {device}"
    teacher: FrozenTeacher = _CACHE.get("teacher", key, make)
    return teacher


def build_student(config: NetworkConfig, data: ImageSet, seed: int) -> TappedNetwork:
    """Return a new student on the images' device; its initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config, num_classes=data.num_classes, in_channels=data.channels)
    network = network.to(data.train.images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TappedNetwork(network, network_taps(network, config), _shape(data))


def build_training(
    config: RunConfig, data: ImageSet, teacher_folder: str | None, rank: int = 0, world: int = 1
) -> Training:
    """Return a run, ready to start, on the images' device."""
    student = build_student(config.student, data, config.train.seed)
    teacher = None
    if needs_teacher(config):
        assert teacher_folder is not None
        teacher = teacher_for(config.teacher, data, teacher_folder)
    schedule = build_schedule(config, len(student.taps), group_ends(student.taps))
    return Training(schedule, student, teacher, data, config.train, rank=rank, world=world)


def run_job(job: Job, report: Report, *, device: torch.device, rank: int = 0, world: int = 1) -> None:
    """Run a job to its end, from its checkpoint if it has one.

    Every report holds ``records`` (the epochs not reported by this attempt before; after a restart, all of them),
    ``val_accuracy`` and ``rung_epoch`` once the student can classify, and
    ``complete``. A run that cannot go on reports ``failure``, with all its records.
    A job with ``test`` that is done already returns at once.

    Args:
        job: What to run.
        report: Called after every epoch and stage.
        device: Where to train.
        rank, world: This process among the data-parallel ones.
    """
    storage = Storage(job.storage)
    if job.test and storage.exists(RESULT_FILE):
        return
    clock = _Clock()
    history: list[Record] = []
    _reset_peak_memory(device)
    try:
        data = images_for(job.config.data, device)
        training = build_training(job.config, data, job.teacher, rank, world)
        state = load_state(storage)
        if state is not None:
            history += state.pop("history")
            clock.go_on(state.pop("clock"))
            training.load(state)
        _train(job, training, storage, history, clock, report, device)
    except RunError as error:
        spent = {"device_seconds": sum(record["seconds"] for record in history) * world, "workers": world}
        failure = {"records": history, "failure": str(error), "peak_memory_bytes": _peak_memory(device)}
        _finish(job, failure | spent | clock.read(), history, report, rank)


def _train(
    job: Job,
    training: Training,
    storage: Storage,
    history: list[Record],
    clock: _Clock,
    report: Report,
    device: torch.device,
) -> None:
    reported = 0
    every = job.config.train.checkpoint_every
    total = training.ends[-1]
    for record in training.run():
        history.append(record)
        if training.rank == 0 and (training.index % every == 0 or training.step == total):
            save_state(storage, training.state() | {"history": history, "clock": clock.read()})
        if training.step < total:
            report(_payload(history, reported, training, device) | clock.read())
            reported = len(history)
    last = _payload(history, min(reported, len(history) - 1), training, device) | {"complete": True}
    if job.test:
        last |= _test(job, training.student.network, training, device)
        if training.rank == 0:
            save_state(storage, training.student.network.state_dict(), STUDENT_FILE)
    _finish(job, last | clock.read(), history, report, training.rank)


def _finish(job: Job, payload: Payload, history: list[Record], report: Report, rank: int) -> None:
    """Make a job's last report; a job that opened the test split keeps it, with all records, as a file, written last."""
    if job.test and rank == 0:
        Storage(job.storage).write(RESULT_FILE, json.dumps(payload | {"records": history}).encode())
    report(payload)


def _payload(history: list[Record], reported: int, training: Training, device: torch.device) -> Payload:
    payload: Payload = {
        "records": history[reported:],
        "device_seconds": training.device_seconds * training.world,
        "peak_memory_bytes": _peak_memory(device),
        "workers": training.world,
        "complete": False,
    }
    if history[-1]["phase"] == "task":
        payload |= {name: history[-1][name] for name in ("val_accuracy", "rung_epoch")}
    return payload


def _test(job: Job, network: nn.Module, training: Training, device: torch.device) -> Payload:
    """Open the test split: once, for a run that is over."""
    data = images_for(job.config.data, device, test=True)
    assert data.test is not None
    accuracy, loss = evaluate(network, data, data.test, job.config.train, training.rank, training.world)
    return {"test_accuracy": accuracy, "test_loss": loss}


def pick_device() -> torch.device:
    """Return the GPU that this process was given, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(count: int) -> None:
    """Let torch use so many CPU threads in this process."""
    torch.set_num_threads(max(1, count))


def _shape(data: ImageSet) -> tuple[int, int, int]:
    return (data.channels, *data.image_size)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM


def _peak_memory(device: torch.device) -> int | None:
    """Return the most memory held since the run began, in bytes: the GPU's, or the process's; ``None`` if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
