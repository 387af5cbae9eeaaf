"""Optuna: one Optuna study per arm, all in the study's journal.

A trial keeps its Optuna number for life: number 7 is row 7 of the arm's trials. The store decides what is finished;
whatever else Optuna knows of is handed out again, with the same parameters, before new ones are asked for. A journal that
says otherwise than the store, or nothing that can be read, is put aside and made anew from the store.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from dfkt.config import config_key
from dfkt.errors import one_line
from dfkt.methods.base import Method, Params
from dfkt.methods.space import Draw, Range, Space
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.rows import trial_params
from dfkt.study.config import ArmConfig, is_name
from dfkt.study.sampler import tpe

METRIC = "val_accuracy"
JUDGED = "rung_accuracy"
CLOCK = "rung_epoch"
JOURNAL, OLD_JOURNAL = "optuna.journal", "optuna.journal.old"
STATES = {"COMPLETE": TrialState.COMPLETE, "PRUNED": TrialState.PRUNED, "FAIL": TrialState.FAIL}
Row = Mapping[str, Any]


class Journal:
    """Optuna's journal of a study: in its folder, or for a remote one a local copy, sent there after trials."""

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
        silence_optuna()
        self.lines = _File(self.path)
        self.optuna: BaseStorage = JournalStorage(self.lines)
        self._again = -math.inf

    def publish(self, *, last: bool = True) -> None:
        """Bring all to the disk, or to a remote study's folder.

        Sending it there takes a tenth of the time at most, but for the ``last`` trial: it grows, and what is missing there
        after a kill is made good from the store.
        """
        began = time.monotonic()
        if self.folder.is_local:
            self.lines.sync()
        elif last or began >= self._again:
            self.folder.write(JOURNAL, self.path.read_bytes())
            self._again = began + 10 * (time.monotonic() - began)


class Lines(BaseJournalBackend):
    """A journal's lines for the one process that has it: Optuna's storage reads each of them once, in their order."""

    def __init__(self, data: bytes) -> None:
        self.unread: Iterable[bytes] = io.BytesIO(data)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Return the entries that were not read yet."""
        unread, self.unread = self.unread, []
        return map(json.loads, unread)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write nothing."""


class _File(Lines):
    """A journal's file. The study's folder is ours alone, so no lock is taken, as Optuna's own takes for every line.

    Nor does every line wait for the disk, but a proposal's lines do together: what a power cut takes, the store makes good.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)
        super().__init__(path.read_bytes())

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries, one a line."""
        lines = [json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs]
        data = b"".join(lines)
        if os.write(self._file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.unread = [*self.unread, *lines]

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._file)


def mend_journal(storage: Storage, rows: Callable[[str], Sequence[Row]], log: Callable[[str], None]) -> None:
    """Put a journal aside that cannot be gone on with; the next :class:`ArmSearch` fills a new one from the store.

    Args:
        storage: The study's folder, which this process holds.
        rows: Returns an arm's stored trials.
        log: Receives a line if it is so.
    """
    data = storage.read(JOURNAL)
    if data is not None and (fault := _fault(data, rows)):
        storage.write(OLD_JOURNAL, data)
        storage.delete(JOURNAL)
        log(f"{JOURNAL} {fault}: it is made anew from the study's tables, and kept as {OLD_JOURNAL}")


def _fault(data: bytes, rows: Callable[[str], Sequence[Row]]) -> str | None:
    """Return what is wrong with a journal, in words; ``None`` if nothing is."""
    if data and not data.endswith(b"\n"):  # what is written next would stand on the same line
        return "is cut"
    silence_optuna()
    try:
        journal = JournalStorage(Lines(data))
        arms = {s.study_name: journal.get_all_trials(s._study_id, deepcopy=False) for s in journal.get_all_studies()}
    except Exception as error:  # whatever Optuna stumbles over
        return f"is damaged ({one_line(error)})"
    for arm, trials in arms.items():
        stored = {row["number"]: row for row in rows(arm)} if is_name(arm) else {}
        if others := [t.number for t in trials if not _agrees(t, stored.get(t.number))]:
            return f"and the study's tables do not say the same of trial {others[0]} of {arm}"
    return None


def _agrees(trial: FrozenTrial, row: Row | None) -> bool:
    """Whether Optuna knows nothing of a trial that its row does not say; a trial that has not ended may have no row yet."""
    if row is None:
        return not trial.state.is_finished()
    params = trial_params(row)
    same = all(params.get(name) == value for name, value in trial.params.items())
    if not trial.state.is_finished():
        return same and trial.state != TrialState.WAITING
    value = row["last_val_accuracy"] if trial.state == TrialState.COMPLETE else trial.value
    return same and STATES.get(row["state"]) == trial.state and value == trial.value


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
        self.arm, self.taps, self.journal = arm, taps, journal
        self.optuna = optuna.create_study(
            storage=journal.optuna, study_name=arm.name, direction="maximize", load_if_exists=True
        )
        self._add_missing({row["number"]: row for row in rows})
        for params in self._starts()[len(self._trials) :]:  # trial k is start k
            self.optuna.enqueue_trial(params)
        self.asked: dict[int, optuna.trial.Trial] = {}
        self.unfinished = self._reconcile(rows)
        self.optuna.sampler = tpe((seed * 100_003 + len(self._trials)) % 2**32)  # NumPy takes no larger one

    def ask(self) -> tuple[int, Method, Params]:
        """Return number, method and parameters of an unfinished trial, or of a new one."""
        if self.unfinished:
            frozen = self._trials[self.unfinished.pop(0)]
            trial = optuna.trial.Trial(self.optuna, frozen._trial_id)
        else:
            trial = self.optuna.ask()
        self.asked[trial.number] = trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings outside the method's own range are a start too
            drawn = self.draw(trial)
        self.journal.lines.sync()  # before its row: a trial that has one is handed out again with what the journal says
        return trial.number, *drawn

    @property
    def _trials(self) -> list[FrozenTrial]:
        """Optuna's own objects, by number: copies of thousands take seconds."""
        return self.optuna.get_trials(deepcopy=False)

    def draw(self, trial: Any) -> tuple[Method, Params]:
        """Return a method with its settings drawn, and the parameters that it was drawn by."""
        draw = Draw(trial, self.arm.space)
        return self.arm.method.sample(draw, self.taps), draw.params

    def report(self, number: int, accuracy: float, clock: float) -> None:
        """Pass on what a student that can classify reports."""
        with warnings.catch_warnings(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            warnings.simplefilter("ignore")  # a resumed trial may report again what it had reported
            self.asked[number].report(accuracy, round(clock))

    def tell(self, number: int, state: str, value: float | None = None, attributes: Row | None = None) -> None:
        """Tell Optuna how a trial ended, with what is noted of it, unless it knows."""
        self.asked.pop(number, None)
        value = value if state == "COMPLETE" else None
        if not (frozen := self._trials[number]).state.is_finished():
            for name, what in (attributes or {}).items():
                self.optuna._storage.set_trial_user_attr(frozen._trial_id, name, what)
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
        for number in range(len(self._trials), max(rows, default=-1) + 1):
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
            params, more = {n: sample.params[n] for n in kinds}, noted(row) if state.is_finished() else {}
            given = {"params": params, "distributions": kinds, "user_attrs": more}
            self.optuna.add_trial(optuna.trial.create_trial(state=state, value=value, **given))

    def _reconcile(self, rows: Iterable[Row]) -> list[int]:
        """Tell Optuna what the store knows to be finished; return the numbers that are still to be done.

        A kill between the store's write and Optuna's, in either order, leaves nothing lost and nothing doubled.
        """
        finished = {row["number"]: row for row in rows if row["state"] in STATES}
        known = {trial.number for trial in self._trials if trial.state.is_finished()}
        for number, row in finished.items():
            if number not in known:
                self.tell(number, row["state"], row["last_val_accuracy"], noted(row))
        return [t.number for t in self._trials if t.number not in finished and t.state != TrialState.WAITING]


def noted(row: Row) -> dict[str, Any]:
    """Return a trial's user attributes in Optuna, where optuna-dashboard shows them: what it cost, and why it failed."""
    return {name: row[name] for name in ("device_seconds", "epochs", "error") if row.get(name) is not None}


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


def silence_optuna() -> None:
    """Keep Optuna from printing a line per trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search").setLevel(logging.ERROR)
