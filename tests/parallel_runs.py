"""What a worker process of a data-parallel run does in tests, and what it leaves behind.

Every process goes through the same cases, one process group per number of workers, and writes what it saw to a file.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import synthetic_images
from small_runs import DROPPING, METHODS, RESNET, records, start, timeless, weights
from torch import nn

from dfkt.config import NetworkConfig, TrainConfig
from dfkt.errors import DfktError
from dfkt.methods.base import Method, Term
from dfkt.methods.dfkt import Dfkt
from dfkt.training.evaluate import evaluate
from dfkt.training.loop import Training
from dfkt.training.parallel import Group, synchronise_batch_norms
from dfkt.training.targets import Keeping

BARE, USUAL = (NetworkConfig(name=f"small_runs:{name}_norms") for name in ("bare", "usual"))
WIDE = replace(RESNET, width=0.5)
FROZEN = Dfkt(pattern="sliding-2", order="local", freeze_below=True, share=0.6)
PATIENCE = timedelta(seconds=30)
"""After which a worker that waits for another one gives up."""
Seen = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A run that several workers do together."""

    method: Method
    batch_size: int = 16
    world: int = 2
    student: NetworkConfig = RESNET
    teacher: NetworkConfig = WIDE
    sync_batch_norm: bool = True


CASES = {name: Case(METHODS[name], 15) for name in METHODS}  # shares of 8 and 7 images
CASES |= {f"{name}, equal shares": Case(METHODS[name]) for name in ("kd", "similarity", "dfkt")}
CASES |= {f"{name}, 3 workers": Case(METHODS[name], world=3) for name in ("similarity", "dfkt")}
CASES |= {
    "frozen layers": Case(FROZEN, 15),
    "odd batch norms": Case(replace(FROZEN, freeze_below=False), 15, student=BARE, teacher=USUAL),
}
CASES |= {"parameters that are never read": Case(METHODS["kd"], 15, student=NetworkConfig(name="small_runs:Unread"))}
APART = "statistics apart"
CASES |= {APART: Case(METHODS["dfkt"], sync_batch_norm=False)}


def started(case: Case, group: Group | None = None, precision: Any = "float64") -> Training:
    """Return a case's run, of four steps."""
    train = TrainConfig(epochs=1, batch_size=case.batch_size, precision=precision, sync_batch_norm=case.sync_batch_norm)
    return start(
        synthetic_images(count=64, flip=True),
        case.method,
        train,
        student=case.student,
        teacher=case.teacher,
        group=group,
    )


def observe(training: Training) -> Seen:
    """Run to the end; return record, gradients of the last step, weights and buffers at the end of every stage."""
    seen = []
    for record in training.run():
        parts = (training.student.network, training.adapters)
        named = [(f"{k}.{name}", p.grad) for k, part in enumerate(parts) for name, p in part.named_parameters()]
        grads = {name: grad.clone() for name, grad in named if grad is not None}
        seen.append({"record": timeless(record), "gradients": grads, "weights": weights(training)})
    return seen


class SeenByOne(Term):
    """Becomes nan for the last worker, in a way that no weight feels: the others cannot know."""

    name = "task"
    student_logits = True

    def __call__(self, teacher, student, labels):  # noqa: D102
        loss = nn.functional.cross_entropy(student.logits, labels)
        return loss + (torch.nan if dist.get_rank() == dist.get_world_size() - 1 else 0.0)


def nan_of_one(group: Group) -> str:
    """Train with a loss that one worker alone sees go wrong; return how that ended."""
    training = started(Case(METHODS["scratch"]), group)
    training.schedule = (replace(training.schedule[0], terms=(SeenByOne(),)),)
    try:
        records(training)
    except DfktError as error:
        return f"{type(error).__name__}: {error}"
    return "ended well"


def resumed(group: Group) -> bool:
    """Whether a run with dropout, on shares that differ, goes on as if it had not stopped."""
    images = synthetic_images()

    def begun() -> Training:
        train = TrainConfig(epochs=2, batch_size=15)
        return start(images, METHODS["kd"], train, student=DROPPING, group=group)

    whole = begun()
    expected = records(whole)
    first = begun()
    found = [timeless(next(first.run()))]
    state = [first.state()]
    dist.broadcast_object_list(state, src=0)  # the first worker's is the one that is kept
    second = begun()
    second.load(state[0])
    found += records(second)
    ours, theirs = weights(whole), weights(second)
    return found == expected and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def drops(group: Group) -> torch.Tensor:
    """Return what the worker's dropout left of ones in a run's first step."""
    kept = []

    class Drop(nn.Dropout):
        def forward(self, x):
            kept.append(super().forward(torch.ones(64)) > 0)
            return super().forward(x)

    training = start(synthetic_images(), METHODS["scratch"], TrainConfig(epochs=1, batch_size=96), student=DROPPING)
    training.student.network.late = Drop()
    other = Training(training.schedule, training.student, None, training.data, training.config, group)
    records(other)
    return kept[0]


def evaluated_apart(group: Group) -> tuple[float, float]:
    """Evaluate a network whose batch norm keeps no statistics, on shares of which one has a batch more."""
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    network.append(nn.Linear(3 * 36, 4))
    data = synthetic_images(count=1025, padding=0)
    return evaluate(synchronise_batch_norms(network), data, data.train, "float32", group)


def kept(group: Group) -> bool:
    """Whether a run that keeps the teacher's answers, and one that reads them, are the run without, to the last bit."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        keeping = Keeping(folder, "study", 10**9, tuple((i, j) for i in range(4) for j in range(i + 1, 4)))
        for place in (None, keeping, keeping):
            train = TrainConfig(epochs=2, batch_size=15)
            training = start(synthetic_images(), METHODS["dfkt"], train, teacher=WIDE, group=group, keeping=place)
            found.append((records(training), weights(training), training.targets.served))
    plain, _, read = found
    same = all(f[0] == plain[0] and all(torch.equal(v, f[1][n]) for n, v in plain[1].items()) for f in found)
    return same and read[2] > 0


PROBES: dict[str, Callable[[Group], Any]] = {
    "nan of one": nan_of_one,
    "resumed": resumed,
    "kept": kept,
    "drops": drops,
    "evaluated apart": evaluated_apart,
}


def work(rank: int, folder: Path) -> None:
    """Go through all cases and probes as one of the workers."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world, timeout=PATIENCE
            )
            group = Group(rank, world)
            found: dict[str, Any] = {n: observe(started(c, group)) for n, c in CASES.items() if c.world == world}
            if world == 2:
                found |= {name: probe(group) for name, probe in PROBES.items()}
            torch.save(found, folder / f"{world}-{rank}.pt")
            dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
