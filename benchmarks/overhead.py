"""What a study costs beyond its training: a search whose trials train nothing.

Every trial goes the whole way through Optuna, Ray Tune, a reused Tune process, the recorder and the store, and reports
one made-up epoch at once. The seconds between the first and the last finished trial, over the trials between them and
times the trials that run at once, are what a trial costs; starting Ray and its processes is printed beside it.

Command     python benchmarks/overhead.py [--trials 40]
Target      under 0.5 s per trial that spans one worker
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

from ray import tune

from dfkt.study import study
from dfkt.study.cluster import cluster, count_groups
from dfkt.config import DataConfig, RunConfig, StudyConfig
from dfkt.data.load import load_data
from dfkt.store.study_store import StudyStore
from dfkt.methods.space import SearchSpace
from dfkt.store.files import Storage
from dfkt.study.driver import Driver, Workers

NUM_TAPS = 4


class IdleDriver(Driver):
    """A trial that trains nothing."""

    def __call__(self, params: Mapping[str, Any]) -> None:
        """Report one made-up epoch."""
        record = {"index": 0, "epoch": 1.0, "phase": "task", "step": 1, "images": 1, "loss": 0.0, "rung_epoch": 1.0}
        record["val_accuracy"] = params["flow_share"]
        tune.report({"records": [record], "val_accuracy": params["flow_share"], "rung_epoch": 1.0, "complete": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    trials = parser.parse_args().trials
    config = StudyConfig(name="overhead", base=RunConfig(data=DataConfig(name="digits")), trials=trials)
    saved: list[float] = []
    finished: list[float] = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(study, "Driver", IdleDriver):
        store = study.open_store(
            config, Storage(folder).sub("study"), load_data(config.base.data), SearchSpace(NUM_TAPS)
        )
        save = store.save_trial
        store.save_trial = lambda *args: _timed(saved, save, *args)  # type: ignore[method-assign]
        began = time.perf_counter()
        with cluster(None):
            ready = time.perf_counter()
            workers = Workers(gpus=0)
            lanes = min(count_groups(workers), trials)
            study._search(
                config, store, SearchSpace(NUM_TAPS), workers, lambda line: finished.append(time.perf_counter())
            )
        assert len(StudyStore.open(store.storage).trial_rows()) == trials
    finished = finished[1:]  # the first line is the search's own
    each = (finished[-1] - finished[lanes - 1]) / (len(finished) - lanes) * lanes
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
