"""How fast the study store is: to save one trial, to write and read a whole study, to add columns to it.

    python benchmarks/store.py [--trials N] [--arms N]

The study is written trial by trial, its arms in turn, as a running study does it; every trial has 100 epoch records.
The default takes some seconds; a study of a large search has 10000.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import tempfile
import time

from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore, read_study

EPOCHS = 100
LOSSES = ["task", "soft", "flow", "hint", "attention", "similarity", "decoupled"]


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
    params = {"pattern": "dense-3", "rate": random.random(), "rounds": 2}
    done = {"number": number, "state": "COMPLETE", "seed": 0, "started": now, "ended": now, "steps": 39_000}
    measured = {"last_val_accuracy": random.random(), "best_val_accuracy": random.random(), "wall_seconds": 100.0}
    settings = {"settings": json.dumps({"name": "dfkt"} | params)}
    return done | measured | settings | {f"param_{name}": value for name, value in params.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--arms", type=int, default=4)
    options = parser.parse_args()
    trials = options.trials
    with tempfile.TemporaryDirectory(prefix="dfkt-store-") as folder:
        store = StudyStore.create(Storage(folder), {"pattern": str, "rate": float, "rounds": int}, LOSSES, {})
        millis = []
        for k in range(trials):
            row, epochs = trial_row(k // options.arms), epoch_records()
            start = time.perf_counter()
            store.save("trial", f"arm-{k % options.arms}", row, epochs)
            millis.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        study = read_study(folder)
        reading = time.perf_counter() - start
        files = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
        size = sum(os.path.getsize(file) for file in files) / 2**20
        start = time.perf_counter()
        store.add_columns({"temperature": float}, ["relation"])
        adding = time.perf_counter() - start
    assert (len(study.trials), len(study.epochs)) == (trials, trials * EPOCHS)
    ordered = sorted(millis)
    print(f"{trials} trials x {EPOCHS} epoch records in {options.arms} arms, {os.cpu_count()} logical cores")
    print(f"{'save a trial, median':<24}{statistics.median(millis):>9.1f} ms")
    print(f"{'save a trial, 99 %':<24}{ordered[int(0.99 * (trials - 1))]:>9.1f} ms")
    print(f"{'write all':<24}{sum(millis) / 1000:>9.1f} s")
    print(f"{'read_study':<24}{reading:>9.2f} s")
    print(f"{'add columns':<24}{adding:>9.2f} s")
    print(f"{'files':<24}{len(files):>9}")
    print(f"{'size':<24}{size:>9.1f} MiB")


if __name__ == "__main__":
    main()
