"""How long a search takes: this checkout, and an earlier commit in turns with it.

    python benchmarks/study.py [--against REV] [--trials N] [--epochs N] [--images N] [--turns N] [--precision P ...]
    python benchmarks/study.py --profile [--epochs N] [--images N] [--precision P ...]

A search of DFKT with ResNet-26 as teacher and ResNet-8 as student on noise of CIFAR's size (a folder of PNG files),
two trials at a time on a Ray of two CPUs, none stopped early. Every case is a process of its own with the code of its
checkout on its path. Optuna's TPE learns from accuracies, which rounding changes, so a random sampler draws instead:
all cases train the same trials, which is checked. What counts are the seconds from the start of the first trial to the
end of the last; a teacher of one epoch is trained before. Ratios are medians of those within one turn.

The earlier commit is measured in the first precision only. `process` is all that a case took but the teacher's
training: starting Ray, the search and a final run. `kept` is the share of the trials' steps that had the teacher's
answers ready; `teacher passes` the epochs, over all trials, in which it ran (before: whenever a stage read it).

`--profile` trains DFKT as it stands twice in this process, on one thread and without Ray: first as a trial that finds
nothing kept, then as a later one. Each second counts for the innermost of :data:`PARTS` that was running.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CLASSES, TEST_IMAGES = 10, 100
PARTS = (
    ("reading images", "dfkt.training.run:images_for"),
    ("reading the teacher", "dfkt.training.run:teacher_for"),
    ("building a run", "dfkt.training.run:build_training"),
    ("cutting networks", "dfkt.networks.tapped:TappedNetwork.part"),
    ("crops, flips, normalising", "dfkt.training.loop:train_batches"),
    ("teacher, its matrices", "dfkt.training.targets:Targets._compute"),
    ("keeping its answers", "dfkt.training.targets:Targets._keep"),
    ("reading kept answers", "dfkt.training.targets:Targets._rows"),
    ("reading kept answers", "dfkt.training.targets:Targets.begin"),
    ("student forward", "dfkt.networks.tapped:AdaptedNetwork.forward"),
    ("losses forward", "dfkt.training.loop:Training._losses"),
    ("backward", "torch:Tensor.backward"),
    ("optimizer", "torch.optim:SGD.step"),
    ("val", "dfkt.training.loop:evaluate"),
    ("checkpoints", "dfkt.training.run:save_state"),
)
"""What ``--profile`` tells apart: a label, and a function or method by its module and its name there."""
MEDIANS = ("seconds", "device", "process", "kept", "passes")
Found = dict[str, Any]


def write_images(folder: Path, count: int) -> None:
    """Write noise as a folder of images, class by class."""
    draws = np.random.default_rng(0)
    for part, images in (("train", count), ("test", TEST_IMAGES)):
        for number in range(images):
            place = folder / part / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(place / f"{number:06d}.png")


def study_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the study and where things lie; few images make small batches, so that every stage has steps."""
    from dfkt import ArmConfig, DataConfig, Placement, StudyConfig, TeacherConfig, TrainConfig
    from dfkt.config import NetworkConfig
    from dfkt.methods.dfkt import Dfkt

    folder, precision, batch = Path(options.folder), options.precision[0], max(1, min(128, options.images // 16))
    config = StudyConfig(
        name="search",
        data=DataConfig(name=str(folder / "images"), flip=True, padding=4, val_fraction=0.1),
        teacher=TeacherConfig(network=NetworkConfig(name="resnet26"), train=TrainConfig(epochs=1, precision=precision)),
        train=TrainConfig(epochs=options.epochs, batch_size=batch, precision=precision),
        arms=(ArmConfig(name="dfkt", method=Dfkt(), trials=options.trials),),
        seeds=1, confirm=0, early_stopping=False,
    )  # fmt: skip
    return config, Placement(data_root=str(folder / "data"), teacher_root=str(folder / "teachers"))


def search(options: argparse.Namespace) -> Found:
    """Search in this process, by whatever code is on its path, and return what it took."""
    import optuna
    import ray

    import dfkt.study.search
    from dfkt import read_study
    from dfkt.study.driver import Workers
    from dfkt.study.study import run_studies

    if not Path(dfkt.__file__).is_relative_to(wanted := os.environ["PYTHONPATH"]):
        raise SystemExit(f"The code of {wanted} was to be measured, but {dfkt.__file__} was imported.")
    began, folder = time.time(), Path(options.folder)
    maker = next(name for name in ("tpe", "_sampler") if hasattr(dfkt.study.search, name))  # now, and in older code
    setattr(dfkt.study.search, maker, lambda seed: optuna.samplers.RandomSampler(seed=seed))
    ray.init = functools.partial(ray.init, num_cpus=2, include_dashboard=True, object_store_memory=200 * 2**20)
    config, placement = study_of(options)
    with tempfile.TemporaryDirectory(dir=folder) as results:
        lines: list[str] = []
        given: Found = {"placement": placement, "workers": Workers(gpus=0), "address": "local"}
        outcome = run_studies([config], results, **given, log=lines.append)
        assert not outcome.failures, lines
        study = read_study(Path(results) / "search")
    trained = [path for path in (folder / "teachers").rglob("teacher.json") if path.stat().st_mtime >= began]
    return {
        "seconds": (study.trials.ended.max() - study.trials.started.min()).total_seconds(),
        "device": float(study.trials.device_seconds.median()),
        "teacher": sum(json.loads(path.read_text())["seconds"] for path in trained),
        "drawn": sorted(zip(study.trials.number.tolist(), study.trials.settings.tolist(), strict=True)),
    } | teaching(study.trials, study.epochs, options.epochs)


def teaching(trials: Any, epochs: Any, length: float) -> Found:
    """Return how much the teacher ran: the share of steps that did without, and passes over the training split."""
    epochs = epochs.merge(trials[["number", "steps", "param_soft_targets"]], on="number")
    epochs = epochs.sort_values(["number", "index"])
    steps = epochs.groupby("number").step.diff().fillna(epochs.step)
    passes = steps * length / epochs.steps  # a record's
    asked = (epochs.phase == "flow") | epochs.param_soft_targets.astype(bool)
    kept = epochs.kept_share if "kept_share" in epochs.columns else 0 * passes
    return {
        "kept": float((steps * kept).sum() / steps.sum()),
        "passes": float((passes * (1 - kept) * asked).sum()),
        "flow": float((passes * (epochs.phase == "flow")).groupby(epochs.number).sum().max()),
        "teaching": float((passes * asked).groupby(epochs.number).sum().max()),
    }


def measure(checkout: Path, precision: str, options: argparse.Namespace, folder: str) -> Found:
    """Search once in a process of its own."""
    given = [f"--{name}={getattr(options, name)}" for name in ("trials", "epochs", "images")]
    command = [sys.executable, str(Path(__file__).resolve()), *given, "--precision", precision, "--folder", folder]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HOME": folder}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The search of {checkout} failed:\n{done.stderr[-3000:]}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": time.perf_counter() - began - found["teacher"]}


class Timers:
    """Seconds by label, each second counted for the innermost part that was running."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)
        self.missing: list[str] = []
        self._inner = [0.0]

    def wrap(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed; of a generator, every item is."""

        @functools.wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self._inner.append(0.0)
            try:
                return call(*given, **named)
            finally:
                took = time.perf_counter() - began
                self.seconds[label] += took - self._inner.pop()
                self._inner[-1] += took

        @functools.wraps(call)
        def items(*given: Any, **named: Any) -> Iterator[Any]:
            following, over = self.wrap(label, functools.partial(next, call(*given, **named))), object()
            while (item := following(over)) is not over:
                yield item

        return items if inspect.isgeneratorfunction(call) else timed

    @contextlib.contextmanager
    def around(self, parts: tuple[tuple[str, str], ...]) -> Iterator[None]:
        """Time parts while the context lasts; what a checkout does not have is listed as missing."""
        with contextlib.ExitStack() as patches:
            for label, path in parts:
                module, _, names = path.partition(":")
                *owners, name = names.split(".")
                try:
                    owner = functools.reduce(getattr, owners, importlib.import_module(module))
                    call = getattr(owner, name)
                except (ImportError, AttributeError):
                    self.missing.append(path)
                    continue
                self.seconds[label] += 0.0  # found, though perhaps never called
                patches.enter_context(mock.patch.object(owner, name, self.wrap(label, call)))
            yield


def profile(options: argparse.Namespace) -> None:
    """Train one trial as the first and as a later one of a search, and print where their seconds went."""
    from dfkt.store.files import Storage
    from dfkt.study.keeping import keeping_for
    from dfkt.study.opening import check_study
    from dfkt.study.teaching import teach
    from dfkt.training.cached import _CACHE
    from dfkt.training.run import Job, run_job

    config, placement = study_of(options)
    placement = dataclasses.replace(placement, target_root=f"{options.folder}/targets")
    place, arm = f"{options.folder}/{options.precision[0]}", config.arms[0]
    Path(place).mkdir()
    pairs = check_study(config, Storage(place), placement, lambda line: None).pairs
    teach(config.teacher, config.data, placement, place, None, lambda line: None)
    keeping = keeping_for(config, "trial", placement, place, pairs)
    _CACHE.entries.clear()  # as in a process that has done no run
    runs: list[tuple[float, Timers]] = []
    for name in ("first", "later"):
        job = Job(config.run(arm, arm.method), placement, f"{place}/{name}", place, keeping=keeping)
        reports, timers = list[Found](), Timers()
        with timers.around(PARTS):
            began = time.perf_counter()
            run_job(job, reports.append)
            runs.append((time.perf_counter() - began, timers))
        assert reports[-1].get("complete"), reports[-1]
    (first, timers), (later, others) = runs
    print(f"{options.precision[0]}: a trial of {options.epochs} epochs of {options.images} images, by part")
    print(f"{'':<28}{'first, s':>10}{'share':>8}{'later, s':>12}{'share':>8}")
    rows = [(label, timers.seconds[label], others.seconds[label]) for label in timers.seconds]
    rows.append(("all else", first - sum(timers.seconds.values()), later - sum(others.seconds.values())))
    for label, once, then in (*rows, ("in all", first, later)):
        print(f"{label:<28}{once:>10.2f}{once / first:>8.1%}{then:>12.2f}{then / later:>8.1%}")
    if timers.missing:
        print(f"not found in this checkout, so counted elsewhere: {', '.join(timers.missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="an earlier commit")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12, help="of a trial (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true", help="where the seconds of one trial go")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(search(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", options.images)
        if options.profile:
            sys.path.insert(0, str(ROOT))
            for precision in options.precision:
                profile(argparse.Namespace(**vars(options) | {"folder": folder, "precision": [precision]}))
            return
        checkouts, worktree = {"now": ROOT}, ["git", "-C", str(ROOT), "worktree"]
        if options.against:
            checkouts = {options.against: Path(folder) / "earlier"} | checkouts
            subprocess.run([*worktree, "add", "-q", "--detach", f"{folder}/earlier", options.against], check=True)
        try:
            cases = [(name, precision) for precision in options.precision for name in checkouts]
            cases = [case for case in cases if case[0] == "now" or case[1] == options.precision[0]]
            turns = [
                {case: measure(checkouts[case[0]], case[1], options, folder) for case in cases[:: (-1) ** turn]}
                for turn in range(options.turns)
            ]
        finally:
            if options.against:
                subprocess.run([*worktree, "remove", "--force", f"{folder}/earlier"], check=False)
    report(turns, options)


def report(turns: list[dict[tuple[str, str], Found]], options: argparse.Namespace) -> None:
    """Print the table, after a look at whether all cases trained the same."""
    if len({json.dumps(found["drawn"]) for turn in turns for found in turn.values()}) > 1:
        raise SystemExit("The cases drew different trials, so they cannot be compared.")
    first = next(iter(turns[0]))
    size = f"{options.trials} trials of {options.epochs} epochs of {options.images} images"
    print(f"{size}, two at a time; {options.turns} turns")
    head = f"{'case':<22}{'seconds':>9}{'trials/h':>10}{'a trial, s':>12}"
    print(f"{head}{'process, s':>12}{'kept':>7}{'teacher passes':>16}  speed")
    for case in turns[0]:
        found = {name: statistics.median(turn[case][name] for turn in turns) for name in MEDIANS}
        ratio = statistics.median(turn[first]["seconds"] / turn[case]["seconds"] for turn in turns)
        spent = f"{found['seconds']:>9.1f}{3600 * options.trials / found['seconds']:>10.0f}{found['device']:>12.1f}"
        taught = f"{found['process']:>12.1f}{found['kept']:>7.2f}{found['passes']:>16.1f}"
        print(f"{f'{case[0][:10]} {case[1]}':<22}{spent}{taught}  {ratio:.2f}")
    one = turns[0][first]
    taught = f"flow stages of a trial took up to {one['flow']:.1f} epochs"
    print(f"{taught}, all that read the teacher up to {one['teaching']:.1f}")


if __name__ == "__main__":
    main()
