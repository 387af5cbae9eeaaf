"""Short runs for the tests of a real card, and what a process of several does in them.

    python card_runs.py FILE METHOD DEVICE                      a run; its losses are written as JSON
    python card_runs.py FILE METHOD DEVICE RANK WORLD MEETING   as one of several workers, on a device each

A run of a card that follows another order of additions ends elsewhere than the CPU's, and how far steps carry a rounding
differs from method to method. So nothing here has a tolerance of its own: the CPU says how far a rounding carries
(:func:`carries`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import synthetic_images
from small_runs import METHODS, RESNET, build, fitted
from torch import nn

from dfkt.config import Precision, TrainConfig
from dfkt.methods.base import Method
from dfkt.networks.build import network_taps
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import StudentTaps
from dfkt.training.loop import Training
from dfkt.training.parallel import Group

BATCH = 16
RATE = 0.001
"""Of every stage: at the reference rates steps carry a rounding so far that bfloat16 would mean nothing."""
WIDE = replace(RESNET, width=0.5)
METHODS_SEEN: dict[str, Method] = METHODS
PATIENCE = timedelta(seconds=60)
FLOAT32_ROUNDINGS = 30
"""A card may be so many times as far from the CPU's float32 as that is from float64: its convolutions may be Winograd's, whose
error is some ten times a plain sum's, and a few steps carry it further."""
NARROW_ROUNDINGS = 4
"""As above, of bfloat16 on a card and on the CPU: both round the same factors to 8 bits, in other places."""
FLOORS = {"float32": 2e-5, "bfloat16": 5e-3}
"""Least tolerances, relative: some roundings of 2**-24 (2**-9) each, where the CPU's two runs met by luck."""


def networks_on(
    device: str, method: Method, dtype: torch.dtype = torch.float32, count: int = 96
) -> tuple[Any, Any, Any]:
    """Return images, student and teacher on a device; weights and images are the same on every one."""
    data = synthetic_images(count=count, flip=True)
    built: list[nn.Module] = [build(RESNET, data, seed=1), fitted(build(WIDE, data, seed=2), data)]
    names = network_taps(built[0], RESNET) if method.tapped else ()
    moved = [network.to(device, dtype) for network in built]
    teacher = FrozenTeacher(moved[1], names, data.shape) if method.taught else None
    return data.to(device), TappedNetwork(moved[0], names, data.shape), teacher


def begin(
    name: str, device: str, precision: Precision = "float32", group: Group | None = None, rate: float = RATE
) -> Training:
    """Return a method's run of one epoch."""
    method = METHODS_SEEN[name]
    dtype = torch.float64 if precision == "float64" else torch.float32
    data, student, teacher = networks_on(device, method, dtype)
    schedule = tuple(replace(stage, rate=rate) for stage in method.schedule(1, StudentTaps.of(student.taps)))
    config = TrainConfig(epochs=1, batch_size=BATCH, precision=precision)
    return Training(schedule, student, teacher, data, config, group)


def whole_stages(
    name: str, device: str, precision: Precision = "float32", epochs: float = 1.0, **given: Any
) -> Training:
    """Return a method's run whose stages are an epoch each, or some; six steps an epoch."""
    begun = begin(name, device, precision)
    schedule = tuple(replace(stage, epochs=epochs) for stage in begun.schedule)
    return given.pop("kind", Training)(schedule, begun.student, begun.teacher, begun.data, begun.config, **given)


def losses(records: Iterable[dict[str, Any]]) -> list[float]:
    """Return every loss of a run, in order."""
    return [value for record in records for name, value in record.items() if name == "loss" or name.endswith("_loss")]


def apart(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))


@cache
def on_cpu(name: str, precision: Precision = "float32") -> list[float]:
    """Return the losses of a run on the CPU."""
    return losses(begin(name, "cpu", precision).run())


@cache
def carries(name: str, precision: Precision) -> float:
    """Return how far a method's losses may lie from the CPU's float32: some times what the CPU's own roundings make."""
    if precision == "float32":
        return max(FLOORS[precision], FLOAT32_ROUNDINGS * apart(on_cpu(name), on_cpu(name, "float64")))
    return max(FLOORS[precision], NARROW_ROUNDINGS * apart(on_cpu(name, precision), on_cpu(name)))


def work(file: str, name: str, device: str, rank: int = 0, world: int = 1, meeting: str = "") -> None:
    """Run a method, alone or as one of several workers, and write its losses."""
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if world > 1:
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE)
    Path(file).write_text(json.dumps(losses(begin(name, device, group=Group(rank, world)).run())))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    work(*sys.argv[1:4], *map(int, sys.argv[4:6]), *sys.argv[6:])  # type: ignore[arg-type]
