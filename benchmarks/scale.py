"""What a large search costs the main process per trial, and where that bends: 10,000 trials, 1,000 at once, no training.

Tune's calls are made here, in its order, by a loop that trains nothing and starts no Ray: queue, search (Optuna's TPE and
its journal), rungs, recorder and store are the real ones, and the folder lies on disk. Every trial reports an epoch at a
time, those behind at a rung end there, some fail. Calls are timed by who spends the time, and counted to the trial that they
are made for. Then the process is killed, so to speak, with all its trials on their way, and the study is opened again.
What Tune and Ray cost per trial, :mod:`benchmarks.overhead` measures.

Command     python benchmarks/scale.py [--trials 10000] [--at-once 1000] [--epochs 30] [--folder /tmp]
Target      under 0.2 s of the main process per trial, also with 10,000 stored ones
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _common import processor
from ray.tune.schedulers import TrialScheduler

from dfkt import ArmConfig, Placement, StudentTaps, StudyConfig
from dfkt.config import TrainConfig
from dfkt.methods.dfkt import Dfkt
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.driver import Run
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import is_over, open_store
from dfkt.study.queue import Queue
from dfkt.study.recorder import QueueSearcher, Recorder
from dfkt.study.search import Journal, mend_journal
from dfkt.study.stopping import Stopping

TAPS = StudentTaps(4, (0, 1, 2, 3))
ABOUT = {"title": "none", "classes": 10, "channels": 3, "image_size": [32, 32]}
FAILING = 0.03
"""Share of the trials whose loss is not finite."""
STEPS = 390
TARGET = 0.2
EDGES: tuple[int, ...] = (0, 100, 1000, *range(2000, 100_001, 1000))
PARTS = ("propose", "report", "tell", "journal", "store", "rungs", "lines", "rest")


class Meter:
    """Adds up who spends the main process's time, by the trial that it is spent for; nested calls count once.

    Attributes:
        trial: For which trial the time is spent now.
        wall: Seconds by (bucket, part).
        cpu: Processor seconds by bucket.
    """

    def __init__(self) -> None:
        self.trial = 0
        self.wall: dict[tuple[int, str], float] = defaultdict(float)
        self.cpu: dict[int, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time is the part's, but for what other timed ones take within."""

        @functools.wraps(call)
        def counted(*args: Any, **given: Any) -> Any:
            began = 0.0 if self._open else time.process_time()
            self._switch()
            self._open.append(part)
            try:
                return call(*args, **given)
            finally:
                self._switch()
                self._open.pop()
                if not self._open:
                    self.cpu[bucket(self.trial)] += time.process_time() - began

        return counted

    def watch(self, part: str, owner: Any, *names: str) -> None:
        """Count an object's or a class's methods to a part from now on."""
        for name in names:
            setattr(owner, name, self.timed(part, getattr(owner, name)))

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.wall[bucket(self.trial), self._open[-1]] += now - self._since
        self._since = now


def bucket(trial: int) -> int:
    """Return the bucket of a trial: where it begins."""
    return max(edge for edge in EDGES if edge <= trial)


def payloads(run: Run, draws: random.Random) -> Iterator[dict[str, Any]]:
    """Yield what a run reports: an epoch at a time, the first share of them of flow stages, then the task stage."""
    method, epochs = run.job.config.method, int(run.job.config.train.epochs)
    assert isinstance(method, Dfkt)
    level = 0.5 + 0.3 * method.share - abs(method.rate - 0.1) + draws.gauss(0, 0.02)
    begins = int(method.share * epochs)
    fails = draws.randrange(epochs) if draws.random() < FAILING else None
    for k in range(epochs):
        record: dict[str, Any] = {"index": k, "epoch": k + 1.0, "step": STEPS * (k + 1), "images": 50_000 * (k + 1)}
        record |= {"lr": 0.1, "loss": draws.random(), "images_per_second": 1e4, "seconds": 5.0}
        payload: dict[str, Any] = {"wall_seconds": 5.0 * k, "device_seconds": 5.0 * k, "complete": k + 1 == epochs}
        if k == fails:
            yield payload | {"records": [], "failure": "the loss is nan", "complete": False}
            return
        if k < begins:
            record |= {"phase": "flow", "round": 1, "stage": 1, "flow_loss": draws.random(), "rung_epoch": None}
        else:
            judged = {"val_accuracy": level * (k + 1) / epochs, "rung_epoch": k + 1.0}
            record |= {"phase": "task", "task_loss": draws.random(), "train_accuracy": draws.random(), **judged}
            before, now = ((at - begins) / (epochs - begins) for at in (k, k + 1))
            reached = [rung for rung in run.job.rungs if before < rung <= now]
            record |= {"rung": reached[-1], "rung_accuracy": judged["val_accuracy"]} if reached else {}
            payload |= judged
        yield payload | {"records": [record]} | ({"test_accuracy": level, "test_loss": 1.0} if run.final else {})


class Play:
    """A study on its way, with Tune's calls made in its order.

    Args:
        config: The study.
        folder: Holds it.
        meter: Counts the calls.
        draws: What is left to chance.
    """

    def __init__(self, config: StudyConfig, folder: Storage, meter: Meter, draws: random.Random) -> None:
        self.meter, self.draws = meter, draws
        self.store = StudyStore.open(folder)
        study = OpenStudy(config, self.store, Placement(), TAPS)
        self.queue = Queue([study], log=lambda line: None)
        self.recorder = Recorder(self.queue, log=lambda line: None)
        self.recorder.progress.live = True  # bars are drawn, as on a terminal
        self.searcher, self.scheduler = QueueSearcher(self.queue), Stopping.of(self.queue)
        self.live: list[tuple[Any, Iterator[dict[str, Any]]]] = []
        self.begun = self.ended = 0
        self._watch(study.open_journal())

    def _watch(self, journal: Journal) -> None:
        meter = self.meter
        meter.watch("journal", journal.optuna._backend, "append_logs")
        meter.watch("journal", journal, "publish")
        meter.watch("store", self.store, "save")
        meter.watch("lines", self.recorder, "_show")
        meter.watch("rungs", self.scheduler, "on_trial_result")
        search = self.queue.arms[self.store.storage.path, "dfkt"].search
        for part, name in (("propose", "ask"), ("report", "report"), ("tell", "tell")):
            meter.watch(part, search, name)
        meter.watch("rest", self.searcher, "suggest")
        names = [name for name in dir(Recorder) if name.startswith("on_trial_") and name in vars(Recorder)]
        meter.watch("rest", self.recorder, *names, "on_step_end")

    def fill(self, at_once: int) -> bool:
        """Begin runs until so many are on their way; return whether none can begin any more."""
        while len(self.live) < at_once:
            self.meter.trial = self.begun
            asked = self.searcher.suggest(f"{self.begun}")
            if not isinstance(asked, dict):
                return True
            trial = SimpleNamespace(trial_id=f"{self.begun}", config=asked)
            self.recorder.on_trial_start(0, [], trial)
            self.begun += 1
            self.live.append((trial, payloads(asked["run"], self.draws)))
        return False

    def step(self) -> None:
        """Let one of the runs report, and end it if it is over."""
        k = self.draws.randrange(len(self.live))
        trial, reports = self.live[k]
        self.meter.trial = trial.config["run"].number
        payload = next(reports)
        decision = self.scheduler.on_trial_result(None, trial, payload)
        self.recorder.on_trial_result(0, [], trial, payload)
        if decision == TrialScheduler.STOP or payload["complete"] or "failure" in payload:
            self.live[k] = self.live[-1]
            self.live.pop()
            self.recorder.on_trial_complete(0, [], trial)
            self.ended += 1
        self.recorder.on_step_end(0, [])
        if self.queue.broken is not None:
            raise self.queue.broken


def search(config: StudyConfig, folder: Storage, at_once: int) -> tuple[Meter, int]:
    """Play a study until all its trials have begun and so many are on their way; return what they cost, and how many ended."""
    meter, draws = Meter(), random.Random(0)
    play = Play(config, folder, meter, draws)
    trials = config.arms[0].trials
    with open(os.devnull, "w") as unseen, contextlib.redirect_stderr(unseen):  # where the bars go
        while play.begun < trials:
            play.fill(min(at_once, len(play.live) + trials - play.begun))
            if play.begun < trials:
                play.step()
    return meter, play.ended


def again(config: StudyConfig, folder: Storage, at_once: int) -> dict[str, float]:
    """Open a killed study and hand its unfinished trials out again; return the seconds of each part of that."""
    took: dict[str, float] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        took[what] = time.perf_counter() - began
        return found

    timed("is anything left to do", lambda: is_over([config], [folder], [TAPS]))
    store = timed("open the store", lambda: StudyStore.open(folder))
    timed(
        "hold the journal against the store", lambda: mend_journal(folder, lambda arm: store.rows("trial", arm), print)
    )
    study = OpenStudy(config, store, Placement(), TAPS)
    timed("read the journal", study.open_journal)
    queue = timed("build the queue", lambda: Queue([study], log=lambda line: None))
    timed("rungs of earlier trials", lambda: Stopping.of(queue))
    timed("recorder", lambda: Recorder(queue, log=lambda line: None))
    number = min(at_once, len(next(iter(queue.arms.values())).search.unfinished))
    timed(f"hand out the {number} unfinished", lambda: [queue.next() for _ in range(number)])
    return took


def show(meter: Meter, trials: int) -> None:
    """Print what a trial costs, by how many there were before it."""
    print(f"{'trials':<14}{'wall':>8}{'cpu':>8}  " + "".join(f"{part:>9}" for part in PARTS) + "   ms per trial")
    for at in sorted(meter.cpu):
        end = min((edge for edge in (*EDGES, trials) if edge > at), default=trials)
        count = min(end, trials) - at
        parts = [1000 * meter.wall[at, part] / count for part in PARTS]
        print(f"{f'{at}-{at + count}':<14}{sum(parts):>8.1f}{1000 * meter.cpu[at] / count:>8.1f}  ", end="")
        print("".join(f"{millis:>9.2f}" for millis in parts), flush=True)


def peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--folder", help="where the study's folder is made, and deleted again")
    options = parser.parse_args()
    arm = ArmConfig(name="dfkt", method=Dfkt(), trials=options.trials)
    config = StudyConfig(name="scale", arms=(arm,), train=TrainConfig(epochs=options.epochs), seeds=1, confirm=0)
    with tempfile.TemporaryDirectory(prefix="dfkt-scale-", dir=options.folder) as path:
        folder = Storage(path).sub("study")
        open_store(config, folder, ABOUT, TAPS)
        began, memory = time.perf_counter(), peak()
        meter, ended = search(config, folder, options.at_once)
        print(f"{options.trials} trials of {options.epochs} epochs, {options.at_once} at once, on {processor()}")
        show(meter, options.trials)
        print(f"{ended} ended, {time.perf_counter() - began:.0f} s in all; ", end="")
        print(f"peak memory {peak():.0f} MiB, of which {memory:.0f} before the first trial")
        for name in sorted(os.listdir(folder.path)):
            place = Path(folder.path) / name
            files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
            print(f"{name:<20}{sum(file.stat().st_size for file in files) / 2**20:>9.2f} MiB in {len(files)} files")
        for what, seconds in again(config, folder, options.at_once).items():
            print(f"{what:<40}{seconds:>8.2f} s")


if __name__ == "__main__":
    main()
