"""What a study costs beyond its training: a search whose runs train nothing.

Every trial goes the whole way through Optuna, the queue, Ray Tune, a reused Tune process, the recorder and the store, and
reports one made-up epoch at once. The seconds between the first and the last finished trial, over the trials between
them and times the trials that run at once, are what a trial costs; starting Ray and its processes is printed beside it.

Command     python benchmarks/overhead.py [--trials 40]
Target      under 0.5 s per trial that spans one worker
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from ray import tune

from dfkt import ArmConfig, Placement, StudentTaps, StudyConfig
from dfkt.methods.dfkt import Dfkt
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.capacity import Capacity, Demand
from dfkt.study.cluster import cluster
from dfkt.study.driver import Run, Workers
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import open_store
from dfkt.study.queue import Queue
from dfkt.study.study import run_queue

TAPS = StudentTaps(4, (0, 1, 2, 3))
ABOUT = {"title": "none", "classes": 10, "channels": 3, "image_size": [32, 32]}


def idle(run: Run) -> None:
    """Train nothing: report one made-up epoch."""
    accuracy = run.params.get("share", 0.5)
    record = {"index": 0, "epoch": 1.0, "phase": "task", "step": 1, "images": 1, "loss": 0.0, "rung_epoch": 1.0}
    record["val_accuracy"] = accuracy
    report = {"records": [record], "val_accuracy": accuracy, "rung_epoch": 1.0, "complete": True}
    tune.report(report | ({"test_accuracy": accuracy} if run.final else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    trials = parser.parse_args().trials
    arm = ArmConfig(name="dfkt", method=Dfkt(), trials=trials)
    config = StudyConfig(name="overhead", arms=(arm,), seeds=1, confirm=0)
    saved: list[float] = []
    finished: list[float] = []
    workers = Workers(gpus=0)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(config, Storage(folder).sub("study"), ABOUT, TAPS)
        save = store.save
        store.save = lambda *args: _timed(saved, save, *args)  # type: ignore[method-assign]
        began = time.perf_counter()
        with cluster(None):
            ready = time.perf_counter()
            capacity = Capacity(workers, Demand())
            lanes = min(capacity.holds, trials)
            queue = Queue([OpenStudy(config, store, Placement(), TAPS)])
            run_queue(queue, idle, capacity, max_failures=0, log=lambda line: finished.append(time.perf_counter()))
        assert len(StudyStore.open(store.storage).rows("trial", "dfkt")) == trials
    finished = finished[1:-1]  # the first line is the queue's own, the last the final run's
    each = (finished[-1] - finished[lanes - 1]) / max(len(finished) - lanes, 1) * lanes
    print(f"{'starting Ray':<40}{ready - began:8.2f} s")
    print(f"{'until the first trial ended':<40}{finished[0] - ready:8.2f} s")
    print(f"{f'a further trial, {lanes} at a time':<40}{each:8.3f} s   target < 0.5")
    print(
        f"{'of which writing the store':<40}{2 * statistics.median(saved):8.3f} s   a row when it starts, all when it ends"
    )


def _timed(seconds: list[float], action: Any, *args: Any) -> None:
    began = time.perf_counter()
    action(*args)
    seconds.append(time.perf_counter() - began)


if __name__ == "__main__":
    main()
