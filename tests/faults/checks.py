"""What must hold of a study's folder after a fault, and of a study that came to its end in spite of faults.

Tables are read with pyarrow alone, as any other tool would; whether this project's own reader takes them is asked besides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dfkt import load_student
from dfkt.cli.resume import read_config
from dfkt.config import Placement
from dfkt.methods.base import Method
from dfkt.store.files import Storage
from dfkt.store.rows import row_settings
from dfkt.store.study_store import TABLES, StudyStore, read_study
from dfkt.study.config import StudyConfig
from dfkt.study.ended import summarise
from dfkt.training.run import Job, run_job
from dfkt.training.state import STATE_FILE, hash_weights, load_state, read_weights

Run = tuple[str, str, int]
"""Kind, arm and number."""
MEASURED = {"kept_share", "images_per_second", "seconds"}
"""Columns of an epoch that two runs of one configuration need not have alike."""
ALIKE = ("last_val_accuracy", "best_val_accuracy", "best_epoch", "epochs", "steps", "images", "workers")
"""Columns of a run that they must have alike; a final run also those of its test."""
STAYS = {
    ".lock",
    "study.json",
    "teacher.pt",
    "optuna.journal",
    "students",
    *(n for both in TABLES.values() for n in both),
}


@dataclass(frozen=True)
class Seen:
    """The tables of a study at one instant.

    Attributes:
        rows: By run.
        epochs: By run, its records by index.
    """

    rows: Mapping[Run, dict[str, Any]]
    epochs: Mapping[Run, list[dict[str, Any]]]

    @property
    def finished(self) -> list[Run]:
        """Runs that have come to their end."""
        return [run for run, row in self.rows.items() if row["state"] != "RUNNING"]

    @property
    def running(self) -> list[Run]:
        """Runs that have begun, and not ended as far as the study knows."""
        return [run for run, row in self.rows.items() if row["state"] == "RUNNING"]

    def attempts(self, run: Run) -> int:
        """How often a run was begun."""
        return self.rows[run]["attempts"] if run in self.rows else 0


def look(folder: Path) -> Seen:
    """Read all tables of a study; rows before epochs, since a run's epochs are written first.

    Raises:
        AssertionError: If a run is there twice.
    """
    rows: dict[Run, dict[str, Any]] = {}
    epochs: dict[Run, list[dict[str, Any]]] = {}
    for kind, (table, _) in TABLES.items():
        for arm, row in _records(folder / table):
            run = (kind, arm, row["number"])
            assert run not in rows, f"{run} is there twice"
            rows[run] = row
    for kind, (_, table) in TABLES.items():
        for arm, record in _records(folder / table):
            epochs.setdefault((kind, arm, record["number"]), []).append(record)
    return Seen(rows, epochs)


def _records(table: Path) -> list[tuple[str, dict[str, Any]]]:
    parts = sorted(table.glob("arm=*/part-*.parquet"))
    return [
        (part.parent.name.removeprefix("arm="), row)
        for part in parts
        for row in pq.ParquetFile(part).read().to_pylist()
    ]


def faults_of_files(folder: Path) -> list[str]:
    """Return what cannot be read of a study's files, whether it is finished or was ended by a fault."""
    found: list[str] = []
    if not (folder / "study.json").exists():
        return found
    readers: dict[str, Callable[[Path], Any]] = {
        "study.json": lambda path: json.loads(path.read_bytes()),
        "teacher.pt": lambda path: read_weights(str(path)),
        STATE_FILE: lambda path: load_state(Storage(path.parent)),
    }
    for path in sorted(folder.rglob("*")):
        if path.name in readers and not path.is_relative_to(folder / "ray"):
            found += _fault(path, readers[path.name])
    for kind, arm, number in (seen := look(folder)).finished:
        if kind == "final":
            found += _fault(folder / "students" / f"{arm}-seed{seen.rows[kind, arm, number]['seed']}", load_student)
    return found + _fault(folder, read_study)


def _fault(path: Path, read: Callable[[Path], Any]) -> list[str]:
    try:
        read(path)
    except Exception as error:  # whatever it is, the file cannot be read
        return [f"{path} cannot be read: {type(error).__name__}: {error}"]
    return []


def faults_since(before: Seen, after: Seen) -> list[str]:
    """Return which of the runs that were finished before a fault are lost or changed after it, epochs counted in."""
    found = []
    for run in before.finished:
        if run not in after.rows:
            found.append(f"{run} was finished and is lost")
        elif repr((before.rows[run], before.epochs[run])) != repr((after.rows[run], after.epochs.get(run))):
            found.append(f"{run} was finished and has changed")
    return found + [f"{run} was begun and is lost" for run in before.running if run not in after.rows]


def checkpoints(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return by a run's key the epoch records in its checkpoint: epochs that shall never be done again."""
    states = (load_state(Storage(path.parent)) for path in folder.glob(f"*/*/{STATE_FILE}"))
    return {state["key"]: state["history"] for state in states if state is not None}


def faults_at_end(folder: Path, kept: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Return what is wrong with a study that has ended: runs missing, there twice or failed, epochs missing or done again.

    Args:
        folder: The study's.
        kept: What :func:`checkpoints` returned at some time before, for every key the longest.
    """
    seen, config = look(folder), read_config(StudyStore.open(Storage(folder)))
    wanted = {("trial", arm.name, k) for arm in config.arms for k in range(arm.trials)}
    wanted |= {("final", arm.name, k) for arm in config.arms for k in range(config.seeds)}
    again = [run for run in seen.rows if run[0] == "confirmation"]
    searched = [arm for arm in config.arms if arm.trials > 1]
    found = [f"{run} is missing" for run in sorted(wanted - seen.rows.keys())]
    found += [f"{run} was not asked for" for run in sorted(seen.rows.keys() - wanted - set(again))]
    found += [
        f"{len(again)} confirmations" for _ in [0] if len(again) != sum(min(config.confirm, a.trials) for a in searched)
    ]
    found += [f"epochs of {run}, which has no row" for run in seen.epochs.keys() - seen.rows.keys()]
    found += faults_of_files(folder)
    found += [f"{path.name} was left behind" for path in folder.iterdir() if path.name not in STAYS]
    for run, row in seen.rows.items():
        if row["state"] != "COMPLETE" or row["error"]:
            found.append(f"{run} ended as {row['state']}: {row['error']}")
        indices = [record["index"] for record in seen.epochs.get(run, [])]
        if indices != list(range(len(indices))) or not indices:
            found.append(f"{run} has epochs {indices}")
        elif repeated := _repeated(kept.get(row["key"], []), seen.epochs[run]):
            found.append(f"{run} did {repeated} epochs again that a checkpoint had")
    return found


def _repeated(kept: list[dict[str, Any]], stored: list[dict[str, Any]]) -> int:
    """Return how many epochs that a checkpoint had were done again; the seconds that an epoch took tell it from another."""
    seconds = [(record["index"], record.get("seconds")) for record in stored]
    return sum((record["index"], record.get("seconds")) not in seconds for record in kept)


class Undisturbed:
    """What runs measure when nothing happens to them: each is done once more in this process, without Ray, and remembered.

    Args:
        scratch: A folder for what these runs write.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.known: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        self.teacher: str | None = None

    def faults(self, folder: Path) -> list[str]:
        """Return which runs of a finished study measured something else, and whether its teacher is another than the first's."""
        teacher = hash_weights(read_weights(str(folder / "teacher.pt")))
        self.teacher = self.teacher or teacher
        found = [] if teacher == self.teacher else [f"the teacher is {teacher}, and was {self.teacher}"]
        config, seen = read_config(StudyStore.open(Storage(folder))), look(folder)
        for run, row in seen.rows.items():
            if row["key"] not in self.known:
                self.known[row["key"]] = self._do(config, run, row, folder)
            records, measured = self.known[row["key"]]
            found += [
                f"{run}: {n} is {row[n]!r}, undisturbed {measured.get(n)!r}" for n in measured if row[n] != measured[n]
            ]
            if _compared(seen.epochs[run]) != _compared(records):
                found.append(f"{run}: its epochs differ from those of an undisturbed run")
        return found

    def _do(
        self, study: StudyConfig, run: Run, row: dict[str, Any], folder: Path
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        kind, name, _ = run
        (arm,) = (arm for arm in study.arms if arm.name == name)
        config = study.run(arm, Method.from_json(row_settings(row)), row["seed"])
        assert config.key == row["key"], f"{run} has settings that do not belong to its key"
        records: list[dict[str, Any]] = []
        last: dict[str, Any] = {}

        def report(payload: dict[str, Any]) -> None:
            records.extend(record for record in payload["records"] if record not in records)
            last.update(payload)

        place = replace(Placement(), data_root=str(self.scratch), threads=1)
        teacher = str(folder) if config.method.taught else None
        run_job(Job(config, place, str(self.scratch / config.key), teacher, test=kind == "final"), report)
        summary = summarise(records, last)
        measured = {name: summary[name] for name in ALIKE if name in summary}
        return records, measured | {name: last[name] for name in ("test_accuracy", "test_loss") if name in last}


def _compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is compared of epoch records: null and not there are the same, as are two that are nan."""
    return [
        {
            n: repr(v) if isinstance(v, float) and math.isnan(v) else v
            for n, v in record.items()
            if v is not None and n not in {"number", *MEASURED}
        }
        for record in records
    ]
