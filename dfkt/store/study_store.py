"""The study store: one folder with all that a study measured.

::

    study.json                            configuration, columns, versions, commit, hardware, command, sessions
    trials/arm=ARM/part-00000.parquet     one row per trial
    epochs/arm=ARM/…                      one row per epoch record of a trial
    confirmations/arm=ARM/…               the best trials again, with another seed, by the trial's number
    confirmation_epochs/arm=ARM/…         one row per epoch record of these
    finals/arm=ARM/…                      the final runs, with the test accuracy
    final_epochs/arm=ARM/…                one row per epoch record of a final run
    teacher.pt, optuna.journal, students/, errors.txt if a run failed, optuna.journal.old if one had to be made anew,
    and while it runs runs/ and ray/

Arm and number name a run: every arm counts from 0. How tables become files, :mod:`dfkt.store.tables` says. A run's
epochs are written before its row: a run is finished when its row says so, and then its epochs are there. A kill in
between leaves epochs whose row is missing or still ``RUNNING``; they are replaced when the run is saved again. One
process writes (:func:`hold`), any number may read meanwhile.

The columns follow from the methods of the study's arms; no run can change them, a later arm can add some. What was not
measured is null. A NaN that *was* measured, such as a loss that became NaN, stays NaN in the files.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from dfkt.errors import StudyError
from dfkt.store.columns import epoch_schema, final_schema, trial_schema, widened
from dfkt.store.files import Storage, is_leftover, readable
from dfkt.store.lock import LOCK_FILE
from dfkt.store.study_file import FORMAT, STUDY_FILE, read_study_file
from dfkt.store.tables import PartTable, RunTables

TABLES = {
    "trial": ("trials", "epochs"),
    "confirmation": ("confirmations", "confirmation_epochs"),
    "final": ("finals", "final_epochs"),
}
"""By kind of run, its two tables."""
STUDY_FOLDERS = (*(name for names in TABLES.values() for name in names), "students", "runs", "ray")
STUDY_FILES = (
    "teacher.pt", "optuna.journal", "optuna.journal.lock", "optuna.journal.old", "errors.txt", STUDY_FILE,
)  # fmt: skip
STUDY_NAMES = frozenset(STUDY_FOLDERS + STUDY_FILES)
"""All that a study writes into its folder, but for ``.lock``."""


def claim(storage: Storage) -> None:
    """Refuse a folder that is neither empty nor a study's. Nothing is written.

    Raises:
        StudyError: If something lies in the folder, but no ``study.json``; or if the folder cannot be read.
    """
    storage.check_folder()
    with readable(storage):
        found = [name for name in storage.entries() if name != LOCK_FILE and not is_leftover(name)]
    if found and STUDY_FILE not in found:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise StudyError(
            f"A study's folder must be empty or hold a study.json, but {storage.path} holds {shown}. "
            "Take another --name, or move these away."
        )


@contextlib.contextmanager
def hold(storage: Storage) -> Iterator[None]:
    """Claim a study's folder and hold its lock while the context lasts; a folder that is not a study's gets no lock.

    Raises:
        StudyError: If the folder is not a study's (:func:`claim`), not writable, or held by another process.
    """
    claim(storage)
    with storage.lock():
        claim(storage)  # between the two, another program may have put something there
        yield


def clear(storage: Storage) -> None:
    """Delete a study from its folder; what it has not written itself stays, and the lock that is held on it.

    ``study.json`` goes last: a kill before leaves a study that can be cleared again.

    Raises:
        StudyError: If the folder is not a study's, or its ``study.json`` is damaged or of another format.
    """
    claim(storage)
    if storage.exists(STUDY_FILE):
        StudyStore.open(storage)
    for name in sorted({*STUDY_FOLDERS} & {*storage.folders()}):
        storage.sub(name).delete_all()
    for name in STUDY_FILES:
        storage.delete(name)


class StudyStore:
    """A study's folder, for the one process that writes it.

    Attributes:
        storage: The folder.
        meta: What ``study.json`` says; change it with :meth:`update_meta` and :meth:`add_columns`.
    """

    def __init__(self, storage: Storage, meta: dict[str, Any]) -> None:
        self.storage = storage
        self._use(meta)

    @classmethod
    def create(
        cls, storage: Storage, params: Mapping[str, type], losses: Sequence[str], meta: Mapping[str, Any]
    ) -> StudyStore:
        """Create the folder of a new study.

        Args:
            storage: Where.
            params: The type of every parameter, ``float``, ``int``, ``bool`` or ``str``; ``param_NAME`` is its column.
            losses: Names of the losses that are recorded beside their sum; ``NAME_loss`` is the column.
            meta: What else ``study.json`` shall say, as JSON values.

        Raises:
            StudyError: If there is a study already, a type is another one, a loss's column is taken, or ``meta`` is
                not JSON.
        """
        if storage.exists(STUDY_FILE):
            raise StudyError(
                f"A new study needs a new folder, but {storage.path} has one. Resume it, or take another name."
            )
        store = cls(storage, {"format": FORMAT, **widened({}, [], params, losses)})
        store._check_own(meta)
        store._write({**store.meta, "columns": store._columns, **meta})
        return store

    @classmethod
    def open(cls, storage: Storage, *needed: str) -> StudyStore:
        """Open the study in a folder; nothing is written.

        Args:
            storage: The folder.
            needed: As for :func:`dfkt.store.study_file.read_study_file`.

        Raises:
            StudyError: As there.
        """
        return cls(storage, read_study_file(storage, *needed))

    def update_meta(self, **changes: Any) -> None:
        """Set entries of ``study.json``; those that describe the columns cannot be changed so."""
        self._check_own(changes)
        self._settle()
        self._write(self.meta | changes)

    def add_columns(self, params: Mapping[str, type], losses: Sequence[str]) -> None:
        """Add what a later arm has to the tables' columns; where they are new, the rows saved before are null.

        ``study.json`` knows the columns before the first part has them, and says that all parts have them after the
        last one. A kill in between leaves a study that reads whole; the next writing here goes on with the parts.

        Raises:
            StudyError: If a type is none of a parameter's or not the one that it has, or a loss's column is taken.
        """
        wider = widened(self.meta["params"], self.meta["losses"], params, losses)
        if any(self.meta[name] != value for name, value in wider.items()):
            self._write(self.meta | wider)
        self._settle()

    def save(self, kind: str, arm: str, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]] = ()) -> None:
        """Save a run in place of what was saved under its kind, arm and number.

        Args:
            kind: ``trial``, ``confirmation``, which has its trial's number, or ``final``; each is numbered for itself.
            arm: Whose run it is.
            row: ``number``, ``state`` and whatever else was measured; columns left out are null.
            epochs: All its epoch records, each with its ``index``. Without any, those saved before stay.

        Raises:
            StudyError: If a column is unknown, a value has another type than its column, two records share an index,
                or the arm has a name that cannot be a folder's.
        """
        self._settle()
        self._runs[kind].save(arm, row, epochs)

    def rows(self, kind: str, arm: str) -> list[dict[str, Any]]:
        """Return an arm's saved runs of a kind, by number; what is null is ``None``."""
        return cast(list[dict[str, Any]], self._runs[kind].rows.read(arm).to_pylist())

    def trial_epochs(self, arm: str, number: int) -> list[dict[str, Any]]:
        """Return a trial's epoch records, by index."""
        return cast(list[dict[str, Any]], self._runs["trial"].epochs.get(arm, number).to_pylist())

    def rung_records(self, arm: str) -> list[dict[str, Any]]:
        """Return the records of an arm's trials at rungs, by number and index."""
        return cast(list[dict[str, Any]], self._runs["trial"].epochs.read_with(arm, "rung").to_pylist())

    def _use(self, meta: dict[str, Any]) -> None:
        params, epochs = meta["params"], epoch_schema(meta["losses"])
        trials, finals = trial_schema(params), final_schema(params)
        schemas = {"trials": trials, "epochs": epochs, "confirmations": trials, "confirmation_epochs": epochs}
        schemas |= {"finals": finals, "final_epochs": epochs}
        self.meta = meta
        self._tables = {name: PartTable(self.storage.sub(name), schema) for name, schema in schemas.items()}
        self._columns = {name: " ".join(schema.names) for name, schema in schemas.items()}
        self._runs = {kind: RunTables(*(self._tables[name] for name in names)) for kind, names in TABLES.items()}

    def _check_own(self, changes: Mapping[str, Any]) -> None:
        for name in ("format", "params", "losses", "columns"):
            if name in changes and changes[name] != self.meta.get(name):
                raise StudyError(
                    f"`{name}` of a study cannot change, but {changes[name]!r} differs from {self.meta.get(name)!r}."
                )

    def _write(self, meta: dict[str, Any]) -> None:
        try:
            text = json.dumps(meta, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StudyError(f"study.json takes JSON values only: {error}.") from error
        self.storage.write(STUDY_FILE, text.encode())
        if any(self.meta[name] != meta[name] for name in ("params", "losses")):
            self._use(json.loads(text))
        else:
            self.meta = json.loads(text)

    def _settle(self) -> None:
        """Give all parts the same columns, if ``study.json`` does not say that they have them."""
        if self.meta.get("columns") != self._columns:
            for table in self._tables.values():
                table.unify()
            self._write(self.meta | {"columns": self._columns})

    def _read(self, folder: str) -> Study:
        config = self.meta.get("config", {"name": folder, "arms": []})
        arms = [arm["name"] for arm in config["arms"]]
        return Study(
            config["name"], self.meta, *(frame for tables in self._runs.values() for frame in tables.read(arms))
        )


@dataclass(frozen=True, eq=False)
class Study:
    """A study as it was read: tidy tables, by arm in the study's order, number and index.

    :func:`dfkt.store.tables.to_frame` says which types the columns have; they are the same for empty tables.
    """

    name: str
    meta: dict[str, Any]
    trials: pd.DataFrame
    epochs: pd.DataFrame
    confirmations: pd.DataFrame
    confirmation_epochs: pd.DataFrame
    finals: pd.DataFrame
    final_epochs: pd.DataFrame


def read_study(path: str | os.PathLike[str] | Storage, *needed: str) -> Study:
    """Read a study, finished or running.

    Args:
        path: Its folder.
        needed: Entries that its ``study.json`` must have beside those that every study has.

    Raises:
        StudyError: If there is none in the folder, or a file is damaged.
    """
    storage = path if isinstance(path, Storage) else Storage(path)
    folder = storage.path.partition("?")[0].rstrip("/").rpartition("/")[2]
    store = StudyStore.open(storage, *needed)
    while True:
        try:
            return store._read(folder)
        except StudyError:  # a writer that adds columns changes study.json before the parts, maybe since we read it
            latest = StudyStore.open(storage, *needed)
            if latest._columns == store._columns:
                raise
            store = latest


def studies_below(storage: Storage) -> list[Storage]:
    """Return the folders directly below one that are a study's, damaged or not, by name."""
    below = [storage.sub(name) for name in storage.folders()]
    return [place for place in below if place.exists(STUDY_FILE)]
