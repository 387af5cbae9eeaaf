"""Studies without training: Ray Tune played in this process, and drivers that report made-up epochs.

:class:`Played` makes Tune's calls in Tune's order; queue, searches, schedulers, recorder and stores are the real ones.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.schedulers import TrialScheduler

from dfkt.config import DataConfig, NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.scratch import Scratch
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.study_store import Study, StudyStore, read_study
from dfkt.study.config import ArmConfig, StudyConfig
from dfkt.study.driver import Run
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import check_store, open_store
from dfkt.study.queue import Queue
from dfkt.study.recorder import QueueSearcher, Recorder
from dfkt.study.stopping import Stopping

TAPS = StudentTaps(4, (0, 1, 2, 3))
ABOUT = {"title": "toys", "classes": 4, "train": 96, "val": 24, "image_size": [8, 8], "channels": 1, "checksum": 7}
Judge = Callable[[Run], float]


def toy(name: str = "toy", *arms: ArmConfig, **settings: Any) -> StudyConfig:
    """Return a study of three epochs; without arms, of scratch and a search of two trials of DFKT."""
    usual: dict[str, Any] = {"student": NetworkConfig(name="resnet8"), "train": TrainConfig(epochs=3, batch_size=32)}
    usual |= {"arms": arms or (arm("scratch"), arm("dfkt", 2)), "seeds": 2, "early_stopping": False, "confirm": 0}
    return StudyConfig(name=name, **usual | settings)


def tiny(name: str = "tiny", *arms: ArmConfig, **settings: Any) -> StudyConfig:
    """Return a study that can really be run, in seconds: of digits, with networks of quarter and half width."""
    usual: dict[str, Any] = {
        "data": DataConfig(name="digits", limit_train=300, limit_test=60),
        "teacher": TeacherConfig(
            network=NetworkConfig(name="resnet8", width=0.5), train=TrainConfig(epochs=1, batch_size=64)
        ),
        "student": NetworkConfig(name="resnet8", width=0.25),
        "train": TrainConfig(epochs=3, batch_size=64),
        "seeds": 1,
    }
    return toy(name, *arms, **usual | settings)


def arm(name: str, trials: int = 0, **settings: Any) -> ArmConfig:
    """Return an arm of scratch or, where the name says so, of DFKT."""
    method = Dfkt() if name.startswith("dfkt") else Scratch()
    return ArmConfig(**{"name": name, "method": method, "trials": trials} | settings)


def accuracy(run: Run) -> float:
    """Return a made-up val accuracy: the higher the rate, the better, and every run another."""
    rate: float = run.job.config.method.rate  # type: ignore[attr-defined]
    return 0.5 + rate - run.number / 1e4


def payloads(run: Run, judge: Judge = accuracy) -> Iterator[dict[str, Any]]:
    """Yield what a run reports: one record per epoch, for a DFKT run the first one of a flow stage."""
    epochs = int(run.job.config.train.epochs)
    value = judge(run)
    for k in range(epochs):
        place: dict[str, Any] = {
            "index": k,
            "epoch": k + 1.0,
            "step": 4 * (k + 1),
            "images": 128 * (k + 1),
            "loss": 1.0,
            "lr": 0.1,
        }
        payload: dict[str, Any] = {"wall_seconds": k + 1.0, "device_seconds": k + 1.0, "workers": 1}
        payload |= {"peak_memory_bytes": 2**20, "complete": k + 1 == epochs}
        if k == 0 and run.job.config.method.name == "dfkt" and epochs > 1:
            place |= {"phase": "flow", "round": 1, "stage": 1, "flow_loss": 1.0, "rung_epoch": None}
        else:
            judged = {"val_accuracy": value * (k + 1) / epochs, "rung_epoch": k + 1.0}
            place |= {"phase": "task", "round": None, "stage": None, "task_loss": 1.0, **judged}
            reached = [share for share in run.job.rungs if round(share * epochs, 6) == k + 1]
            place |= {"rung": reached[-1], "rung_accuracy": judged["val_accuracy"]} if reached else {}
            payload |= judged
        if run.job.test and payload["complete"]:
            payload |= {"test_accuracy": value / 2, "test_loss": 1.5}
        yield payload | {"records": [place]}


def idle(run: Run) -> None:
    """Report made-up epochs at once: a driver for Ray."""
    for payload in payloads(run):
        tune.report(payload)


def faulty(run: Run) -> None:
    """A driver whose process is killed in the first attempt of trial 0; trial 1 cannot reach its storage."""
    tried = Path(run.study) / "students" / "tried"
    if run.number == 0 and not tried.exists():
        tried.parent.mkdir(exist_ok=True)
        tried.touch()
        tune.report(next(payloads(run)))
        os.kill(os.getpid(), signal.SIGKILL)
    if run.number == 1:
        raise OSError("no way\nto the storage")
    idle(run)


def hopeless(run: Run) -> None:
    """A driver whose every run raises, and always the same."""
    tune.report({"records": [], "failure": "KeyError: 'x' (mine.py:3)", "traceback": "Traceback\nKeyError: 'x'"})


def patient(run: Run) -> None:
    """A driver that ends trial 0 as soon as trial 1 has begun, and nothing else."""
    begun = Path(run.study) / "students" / "begun"
    first, *others = payloads(run)
    tune.report(first)
    if run.number > 0:
        begun.parent.mkdir(exist_ok=True)
        begun.touch()
    while run.number > 0 or not begun.exists():
        time.sleep(0.05)
    for payload in others:
        tune.report(payload)


def open_study(config: StudyConfig, results: Path) -> OpenStudy:
    """Open a study for the first time or again, as a run of it does; its images are never looked at."""
    storage = Storage(results / config.name)
    check_store(config, storage, ABOUT)
    return OpenStudy(config, open_store(config, storage, ABOUT, TAPS), Placement(), TAPS)


class Played:
    """Some studies on their way, with Tune played; made anew from the folder, it is what a killed run's successor sees.

    Args:
        results: The folder of all studies.
        configs: The studies.
        judge: Says how good a run will be.
        clock: What the recorder times runs by.
    """

    def __init__(
        self, results: Path, *configs: StudyConfig, judge: Judge = accuracy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.results, self.judge = results, judge
        self.lines: list[str] = []
        self.queue = Queue([open_study(config, results) for config in configs], self.lines.append)
        self.recorder = Recorder(self.queue, self.lines.append, clock)
        self.searcher = QueueSearcher(self.queue)
        self.scheduler = Stopping.of(self.queue)
        self.handed: list[Run] = []
        self.finished = False

    def ask(self) -> Any:
        """Return the next trial, started; ``None`` when none can begin now."""
        asked = self.searcher.suggest(f"t{len(self.handed)}")
        self.finished = asked == QueueSearcher.FINISHED
        if not isinstance(asked, dict):
            return None
        trial = SimpleNamespace(
            trial_id=f"t{len(self.handed)}", config=dict(asked), error_file=None, pickled_error_file=None
        )
        self.handed.append(asked["run"])
        self.scheduler.on_trial_add(None, trial)
        self.start(trial)
        return trial

    def start(self, trial: Any) -> None:
        """The trial starts, or starts again."""
        self.recorder.on_trial_start(0, [], trial)

    def report(self, trial: Any, payload: dict[str, Any]) -> bool:
        """The trial's process reports; return whether it may go on."""
        decision = self.scheduler.on_trial_result(None, trial, payload)
        self.recorder.on_trial_result(0, [], trial, payload)
        return bool(decision == TrialScheduler.CONTINUE)

    def complete(self, trial: Any, payload: dict[str, Any]) -> None:
        """The trial came to its end, or was stopped by the scheduler."""
        self.scheduler.on_trial_complete(None, trial, payload)
        self.searcher.on_trial_complete(trial.trial_id, payload)
        try:
            self.recorder.on_trial_complete(0, [], trial)
        except Exception:  # so does Tune
            self.recorder.on_trial_error(0, [], trial)

    def end(self, trial: Any) -> None:
        """The trial reports all its epochs, unless the scheduler stops it, and ends."""
        for payload in payloads(trial.config["run"], self.judge):
            if not self.report(trial, payload):
                break
        self.complete(trial, payload)

    def fail(self, trial: Any, reason: str = "The loss became nan") -> None:
        """The trial reports one epoch, then that it cannot go on, and ends."""
        first = next(payloads(trial.config["run"], self.judge))
        self.report(trial, first)
        last = {"records": first["records"], "failure": reason, "wall_seconds": 3.0}
        self.report(trial, last)
        self.complete(trial, last)

    def die(self, trial: Any, error: Exception | None = None, *, recover: bool = False) -> None:
        """The trial's process raised, or died, once or too often; Tune writes down what it knows, if anything."""
        if error is not None:
            wrapped = error if isinstance(error, RayError) else RayTaskError("train", f"Traceback\n{error!r}\n", error)
            trial.error_file = self.results / "error.txt"
            trial.error_file.write_text(f"Failure # 1 (occurred at noon)\n{wrapped}\n")
            trial.pickled_error_file = self.results / "error.pkl"
            trial.pickled_error_file.write_bytes(cloudpickle.dumps(wrapped))
        if recover:
            self.recorder.on_trial_recover(0, [], trial)
            self.start(trial)
        else:
            self.recorder.on_trial_error(0, [], trial)

    def run(self, slots: int = 1, limit: int | None = None) -> "Played":
        """Run to the end with some slots, the oldest run ending first; or until so many have ended, as a kill would."""
        live: list[Any] = []
        while limit is None or limit > 0:
            while len(live) < slots and (trial := self.ask()) is not None:
                live.append(trial)
            if self.queue.broken is not None:
                raise self.queue.broken
            if not live:
                assert self.finished, "Tune would wait for ever"
                return self
            self.end(live.pop(0))
            limit = None if limit is None else limit - 1
        return self

    def study(self, number: int = 0) -> Study:
        """Return one of the studies, as it reads now."""
        return read_study(self.store(number).storage)

    def store(self, number: int = 0) -> StudyStore:
        """Return its store."""
        return self.queue.studies[number].store

    def told(self) -> list[str]:
        """Return what was handed out, such as ``dfkt trial 0`` or ``scratch seed 1``, in order."""
        return [told(run) for run in self.handed]


def told(run: Run) -> str:
    """Return what a run is, in a few words."""
    again = " again" if run.kind == "confirmation" else ""
    return f"{run.arm} seed {run.job.config.train.seed}" if run.final else f"{run.arm} trial {run.number}{again}"


def ended(run: Played, arm_name: str, number: int, *, final: bool = False) -> dict[str, Any]:
    """Return a run's row."""
    store = run.store()
    rows = store.rows("final", arm_name) if final else store.rows("trial", arm_name)
    (found,) = (row for row in rows if row["number"] == number)
    return found


def with_seeds(config: StudyConfig, seeds: int) -> StudyConfig:
    """Return a study with another number of final runs."""
    return replace(config, seeds=seeds)
