"""How long a search takes: this checkout, and an earlier commit in turns with it.

    python benchmarks/study.py [--against REV] [--trials N] [--epochs N] [--images N] [--turns N] [--precision P ...]

A search of DFKT with ResNet-26 as teacher and ResNet-8 as student on noise of CIFAR's size (a folder of PNG files), two
trials at a time, none stopped early. Every case is a process of its own with the code of its checkout on its path; a random
sampler draws, so that all cases train the same trials, which is checked. What counts are the seconds from the start of the
first trial to the end of the last; a teacher of one epoch is trained before. Ratios are medians of those within one turn.

The earlier commit is measured in the first precision only. `kept` is the share of the trials' steps that had the teacher's
answers ready; `teacher passes` the epochs, over all trials, in which it ran (an earlier commit: whenever a stage read it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CLASSES, TEST_IMAGES = 10, 100
Found = dict[str, Any]


def write_images(folder: Path, count: int) -> None:
    """Write noise as a folder of images, class by class."""
    draws = np.random.default_rng(0)
    for part, images in (("train", count), ("test", TEST_IMAGES)):
        for number in range(images):
            place = folder / part / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(place / f"{number:06d}.png")


def search(options: argparse.Namespace) -> Found:
    """Search in this process, by whatever code is on its path, and return what it took."""
    import optuna

    import dfkt.study.search
    from dfkt import ArmConfig, DataConfig, Placement, StudyConfig, TeacherConfig, TrainConfig, read_study
    from dfkt.config import NetworkConfig
    from dfkt.methods.dfkt import Dfkt
    from dfkt.study.driver import Workers
    from dfkt.study.study import run_studies

    dfkt.study.search._sampler = lambda seed: optuna.samplers.RandomSampler(seed=seed)
    folder = Path(options.folder)
    config = StudyConfig(
        name="search",
        data=DataConfig(name=str(folder / "images"), flip=True, padding=4, val_fraction=0.1),
        teacher=TeacherConfig(
            network=NetworkConfig(name="resnet26"), train=TrainConfig(epochs=1, precision=options.precision[0])
        ),
        train=TrainConfig(epochs=options.epochs, precision=options.precision[0]),
        arms=(ArmConfig(name="dfkt", method=Dfkt(), trials=options.trials),),
        seeds=1,
        confirm=0,
        early_stopping=False,
    )
    with tempfile.TemporaryDirectory(dir=folder) as results:
        placement = Placement(data_root=str(folder / "data"), teacher_root=str(folder / "teachers"))
        lines: list[str] = []
        outcome = run_studies([config], results, placement=placement, workers=Workers(gpus=0), log=lines.append)
        assert not outcome.failures, lines
        study = read_study(Path(results) / "search")
    return {
        "seconds": (study.trials.ended.max() - study.trials.started.min()).total_seconds(),
        "device": float(study.trials.device_seconds.median()),
        "drawn": sorted(zip(study.trials.number.tolist(), study.trials.settings.tolist(), strict=True)),
    } | teaching(study.trials, study.epochs, options.epochs)


def teaching(trials: Any, epochs: Any, length: float) -> Found:
    """Return how much the teacher ran: the share of steps that did without, and passes over the training split."""
    epochs = epochs.merge(trials[["number", "steps", "param_soft_targets"]], on="number").sort_values(
        ["number", "index"]
    )
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
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The search of {checkout} failed:\n{done.stderr[-3000:]}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="an earlier commit")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12, help="of a trial (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(search(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", options.images)
        checkouts = {"now": ROOT}
        if options.against:
            checkouts = {options.against: Path(folder) / "earlier"} | checkouts
            subprocess.run(
                [
                    "git",
                    "-C",
                    str(ROOT),
                    "worktree",
                    "add",
                    "--quiet",
                    "--detach",
                    str(Path(folder) / "earlier"),
                    options.against,
                ],
                check=True,
            )
        try:
            cases = [(name, precision) for precision in options.precision for name in checkouts]
            cases = [case for case in cases if case[0] == "now" or case[1] == options.precision[0]]
            turns = [
                {case: measure(checkouts[case[0]], case[1], options, folder) for case in cases}
                for _ in range(options.turns)
            ]
        finally:
            if options.against:
                earlier = str(Path(folder) / "earlier")
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", earlier], check=False)
    report(turns, options)


def report(turns: list[dict[tuple[str, str], Found]], options: argparse.Namespace) -> None:
    """Print the table, after a look at whether all cases trained the same."""
    if len({json.dumps(found["drawn"]) for turn in turns for found in turn.values()}) > 1:
        raise SystemExit("The cases drew different trials, so they cannot be compared.")
    first = next(iter(turns[0]))
    print(
        f"{options.trials} trials of {options.epochs} epochs of {options.images} images, two at a time; {options.turns} turns"
    )
    print(f"{'case':<22}{'seconds':>9}{'trials/h':>10}{'a trial, s':>12}{'kept':>7}{'teacher passes':>16}  speed")
    for case in turns[0]:
        seconds, device, kept, passes = (
            statistics.median(turn[case][name] for turn in turns) for name in ("seconds", "device", "kept", "passes")
        )
        ratio = statistics.median(turn[first]["seconds"] / turn[case]["seconds"] for turn in turns)
        hourly = 3600 * options.trials / seconds
        name = f"{case[0][:10]} {case[1]}"
        print(f"{name:<22}{seconds:>9.1f}{hourly:>10.0f}{device:>12.1f}{kept:>7.2f}{passes:>16.1f}  {ratio:.2f}")
    one = turns[0][first]
    print(
        f"flow stages of a trial took up to {one['flow']:.1f} epochs, all that read the teacher up to {one['teaching']:.1f}"
    )


if __name__ == "__main__":
    main()
