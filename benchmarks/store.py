"""How fast the trial store is: time to save one trial, and to write and read a whole study.

    python benchmarks/store.py [--trials N]

The whole study is written trial by trial, as a running study does it; every trial has 100 epoch records.
"""

import argparse
import datetime
import os
import random
import statistics
import tempfile
import time

from dfkt.store.study_store import StudyStore, read_study
from dfkt.store.files import Storage

EPOCHS = 100


def epoch_records() -> list[dict[str, object]]:
    losses = ["loss", "flow_loss", "task_loss", "soft_loss", "val_loss"]
    others = ["lr", "train_accuracy", "val_accuracy", "rung_epoch", "images_per_second", "seconds"]
    return [
        {"index": i, "epoch": i + 1.0, "phase": "task", "step": i * 390, "images": i * 50_000}
        | {name: random.random() for name in losses + others}
        for i in range(EPOCHS)
    ]


def trial_row(number: int) -> dict[str, object]:
    now = datetime.datetime.now(datetime.UTC)
    done = {"number": number, "state": "COMPLETE", "seed": 0, "started": now, "ended": now, "steps": 39_000}
    measured = {"last_val_accuracy": random.random(), "best_val_accuracy": random.random(), "wall_seconds": 100.0}
    params = {"param_pattern": "dense-3", "param_lr": random.random(), "param_rounds": 2}
    return done | measured | params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=10_000)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory(prefix="dfkt-store-") as folder:
        store = StudyStore.create(Storage(folder), {"pattern": str, "lr": float, "rounds": int}, {"name": "benchmark"})
        millis = []
        for number in range(trials):
            row, epochs = trial_row(number), epoch_records()
            start = time.perf_counter()
            store.save_trial(row, epochs)
            millis.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        study = read_study(folder)
        seconds = time.perf_counter() - start
        files = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
        size = sum(os.path.getsize(file) for file in files) / 2**20
    assert (len(study.trials), len(study.epochs)) == (trials, trials * EPOCHS)
    ordered = sorted(millis)
    print(f"{trials} trials x {EPOCHS} epoch records, {os.cpu_count()} logical cores")
    print(f"{'save a trial, median':<24}{statistics.median(millis):>9.1f} ms")
    print(f"{'save a trial, 99 %':<24}{ordered[int(0.99 * (trials - 1))]:>9.1f} ms")
    print(f"{'write all':<24}{sum(millis) / 1000:>9.1f} s")
    print(f"{'read_study':<24}{seconds:>9.2f} s")
    print(f"{'files':<24}{len(files):>9}")
    print(f"{'size':<24}{size:>9.1f} MiB")


if __name__ == "__main__":
    main()
