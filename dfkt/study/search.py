"""Optuna: one Optuna study per arm, all in the study's journal.

A trial keeps its Optuna number for life: number 7 is row 7 of the arm's trials. The store decides what is finished;
whatever else Optuna knows of is handed out again, with the same parameters, before new ones are asked for.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dfkt.config import config_key
from dfkt.methods.base import Method, Params
from dfkt.methods.space import Draw, Range, Space
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.rows import trial_params
from dfkt.study.config import ArmConfig

METRIC = "val_accuracy"
JUDGED = "rung_accuracy"
CLOCK = "rung_epoch"
JOURNAL = "optuna.journal"
STATES = {"COMPLETE": TrialState.COMPLETE, "PRUNED": TrialState.PRUNED, "FAIL": TrialState.FAIL}
Row = Mapping[str, Any]


class Journal:
    """Optuna's journal of a study: in its folder, or for a remote one a local copy, sent there after every trial."""

    def __init__(self, storage: Storage) -> None:
        self.folder = storage
        if storage.is_local:
            self.path = Path(storage.path) / JOURNAL
        else:
            self.path = Path("~/.cache/dfkt/journals").expanduser() / f"{config_key({'path': storage.path})}.journal"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = storage.read(JOURNAL)
            self.path.unlink(missing_ok=True)
            if data is not None:
                self.path.write_bytes(data)
        Path(f"{self.path}.lock").unlink(missing_ok=True)  # a killed process left it; the study's folder is ours alone
        silence_optuna()
        self.optuna: BaseStorage = JournalStorage(JournalFileBackend(str(self.path)))

    def publish(self) -> None:
        """Send the journal to a remote study's folder."""
        if not self.folder.is_local:
            self.folder.write(JOURNAL, self.path.read_bytes())


class ArmSearch:
    """The search of one arm: asks Optuna for trials, and tells it how they ended.

    Args:
        arm: What is searched.
        taps: The student's.
        journal: The study's.
        rows: The arm's stored trials.
        seed: Of the study's search; the sampler's varies with what is stored, since the same seed proposes the same
            points again.
    """

    def __init__(self, arm: ArmConfig, taps: StudentTaps, journal: Journal, rows: Sequence[Row], seed: int) -> None:
        self.arm, self.taps = arm, taps
        self.optuna = optuna.create_study(
            storage=journal.optuna, study_name=arm.name, direction="maximize", load_if_exists=True
        )
        self._add_missing({row["number"]: row for row in rows})
        for params in self._starts()[len(self.optuna.trials) :]:  # trial k is start k
            self.optuna.enqueue_trial(params)
        self.asked: dict[int, optuna.trial.Trial] = {}
        self.unfinished = self._reconcile(rows)
        self.optuna.sampler = _sampler((seed * 100_003 + len(self.optuna.trials)) % 2**32)  # NumPy takes no larger one

    def ask(self) -> tuple[int, Method, Params]:
        """Return number, method and parameters of an unfinished trial, or of a new one."""
        if self.unfinished:
            frozen = self.optuna.trials[self.unfinished.pop(0)]
            trial = optuna.trial.Trial(self.optuna, frozen._trial_id)
        else:
            trial = self.optuna.ask()
        self.asked[trial.number] = trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings outside the method's own range are a start too
            return trial.number, *self.draw(trial)

    def draw(self, trial: Any) -> tuple[Method, Params]:
        """Return a method with its settings drawn, and the parameters that it was drawn by."""
        draw = Draw(trial, self.arm.space)
        return self.arm.method.sample(draw, self.taps), draw.params

    def report(self, number: int, accuracy: float, clock: float) -> None:
        """Pass on what a student that can classify reports."""
        with warnings.catch_warnings(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            warnings.simplefilter("ignore")  # a resumed trial may report again what it had reported
            self.asked[number].report(accuracy, round(clock))

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        """Tell Optuna how a trial ended, unless it knows."""
        self.asked.pop(number, None)
        value = value if state == "COMPLETE" else None
        self.optuna.tell(number, value, state=STATES[state], skip_if_finished=True)

    def _starts(self) -> list[Params]:
        """Return what is tried before anything is sampled; what is not in the study's space is left to be drawn."""
        seen: list[Params] = []
        for params in self.arm.method.starts(self.taps):
            start = {name: value for name, value in params.items() if _allows(self.arm.space, name, value)}
            if start not in seen:
                seen.append(start)
        return seen

    def _add_missing(self, rows: Mapping[int, Row]) -> None:
        """Add the trials that the store has and Optuna has not.

        A journal that was deleted, or whose remote copy is older than the store, would number new trials like stored ones.
        """
        for number in range(len(self.optuna.trials), max(rows, default=-1) + 1):
            row = rows.get(number)
            if row is None:  # asked for, but never started: to be asked for again
                self.optuna.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
                continue
            sample = optuna.trial.FixedTrial(trial_params(row), number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as when it was asked for
                self.draw(sample)
            kinds = {n: kind for n, kind in sample.distributions.items() if _is_within(sample.params[n], kind)}
            state = STATES.get(row["state"], TrialState.RUNNING)
            value = row["last_val_accuracy"] if state == TrialState.COMPLETE else None
            self.optuna.add_trial(
                optuna.trial.create_trial(
                    state=state, value=value, params={n: sample.params[n] for n in kinds}, distributions=kinds
                )
            )

    def _reconcile(self, rows: Iterable[Row]) -> list[int]:
        """Tell Optuna what the store knows to be finished; return the numbers that are still to be done.

        A kill between the store's write and Optuna's, in either order, leaves nothing lost and nothing doubled.
        """
        finished = {row["number"]: row for row in rows if row["state"] in STATES}
        for number, row in finished.items():
            self.tell(number, row["state"], row["last_val_accuracy"])
        return [t.number for t in self.optuna.trials if t.number not in finished and t.state != TrialState.WAITING]


def _allows(space: Space, name: str, value: Any) -> bool:
    """Whether a study lets a parameter have a value."""
    given = space.changes.get(name)
    return given is None or (given.low <= value <= given.high if isinstance(given, Range) else value in given)


def _is_within(value: Any, kind: optuna.distributions.BaseDistribution) -> bool:
    """Whether Optuna takes a trial with this value in: it hands out settings outside a range, but refuses them later."""
    return kind._contains(kind.to_internal_repr(value))


def random_draws(arm: ArmConfig, taps: StudentTaps, count: int) -> list[Method]:
    """Return random methods of an arm's space, the same at every call; nothing is kept."""
    silence_optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [arm.method.sample(Draw(study.ask(), arm.space), taps) for _ in range(count)]


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def silence_optuna() -> None:
    """Keep Optuna from printing a line per trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search").setLevel(logging.ERROR)
