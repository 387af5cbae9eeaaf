"""One flow weight per span, or one per pair: which does the search find better settings with?

Runs the same number of Optuna trials, drawn as a study draws them, with either space and several sampler seeds, on
digits with two fifths of
the training images as val; no early stopping, one process. Prints the best val accuracy after every quarter of the trials.

Command     python benchmarks/weights.py [--trials 24] [--searches 4] [--teacher-epochs 20]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from dataclasses import replace

import optuna

from dfkt import DataConfig, Draw, NetworkConfig, Placement, RunConfig, StudentTaps, TeacherConfig, TrainConfig
from dfkt.methods.dfkt import Dfkt
from dfkt.store.files import Storage
from dfkt.study.search import silence_optuna
from dfkt.training.cached import images_for
from dfkt.training.run import Job, Payload, run_job
from dfkt.training.teacher import find_teacher

BASE = RunConfig(
    data=DataConfig(name="digits", val_fraction=0.4),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet14"), train=TrainConfig(epochs=20, batch_size=64)),
    student=NetworkConfig(name="resnet8", width=0.5),
    train=TrainConfig(epochs=6, batch_size=64),
)
PLACEMENT = Placement(checkpoint_every=100)
TAPS = StudentTaps(4, (0, 1, 2, 3))


def search(base: RunConfig, weights: str, seed: int, trials: int, folder: str) -> list[float]:
    """Return the best val accuracy so far after each trial."""
    method = Dfkt(weights="pair" if weights == "pair" else "span")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(method.starts(TAPS)[0])
    best: list[float] = []
    for number in range(trials):
        trial = study.ask()
        reports: list[Payload] = []
        run = replace(base, method=method.sample(Draw(trial), TAPS))
        run_job(Job(run, PLACEMENT, f"{folder}/{weights}-{seed}-{number}", folder), reports.append)
        accuracy = reports[-1].get("val_accuracy")
        study.tell(trial, accuracy, state=None if accuracy is not None else optuna.trial.TrialState.FAIL)
        best.append(max([accuracy or 0.0, *best[-1:]]))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--searches", type=int, default=4)
    parser.add_argument("--teacher-epochs", type=float, default=20)
    arguments = parser.parse_args()
    teacher = replace(BASE.teacher, train=replace(BASE.teacher.train, epochs=arguments.teacher_epochs))
    base = replace(BASE, teacher=teacher)
    silence_optuna()
    with tempfile.TemporaryDirectory() as folder:
        find_teacher(base.teacher, images_for(base.data, PLACEMENT), PLACEMENT, print, Storage(folder))
        marks = [round(arguments.trials * quarter / 4) for quarter in range(1, 5)]
        print(f"best val %, mean and standard deviation over {arguments.searches} searches, after so many trials:")
        print(f"{'weights':<10}" + "".join(f"{mark:>16}" for mark in marks))
        for weights in ("span", "pair"):
            runs = [search(base, weights, seed, arguments.trials, folder) for seed in range(arguments.searches)]
            cells = []
            for mark in marks:
                values = [100 * run[mark - 1] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
            print(f"{weights:<10}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
