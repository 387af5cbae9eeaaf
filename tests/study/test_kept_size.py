"""What a study of N runs keeps is bounded, while it runs and after its end; docs/reliability.md has the same figures.

Files: ``study.json``, ``teacher.pt``, ``.lock``; ``optuna.journal`` if anything is searched; two tables for each kind of run of
an arm, each in parts of 64 numbers; three files for every final run's student; ``errors.txt`` if a run failed, and
``optuna.journal.old`` if one had to be made anew.

Bytes, at most: 20 kB a part, 1 kB a run and 160 B an epoch record for tables; 6 kB a trial and 150 B an epoch of its task stage
for the journal of the methods here; 12 kB, and 3 kB for every command that went on, for ``study.json`` of two arms; 1 MiB for
``errors.txt``; the weights of the teacher and of the final students.
"""

import json
import math
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from study.played import Played, arm, open_study, toy

from dfkt.config import TrainConfig
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.failures import ERRORS_FILE, KEPT_BYTES, keep
from dfkt.training.state import STATE_FILE

RUN, EPOCH, PART = 1_000, 160, 20_000
TRIAL, REPORT = 6_000, 150
STUDY, SESSION = 12_000, 3_000


def files(folder: Path) -> dict[str, int]:
    """Return the size of every file of a study."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def parts(runs: int) -> int:
    """Return the files of one table."""
    return math.ceil(runs / 64)


def noisy(field: Any, draws: random.Random) -> Any:
    """Return a value of a column that no compression makes shorter."""
    name, kind = field.name, str(field.type)
    if name in ("state", "phase"):
        return "COMPLETE" if name == "state" else "task"
    if name == "settings":
        return json.dumps({f"setting_{k}": draws.random() for k in range(20)})
    values = {
        "double": draws.random,
        "int64": lambda: draws.getrandbits(60),
        "int32": lambda: draws.getrandbits(30),
        "string": lambda: draws.randbytes(16).hex(),
        "bool": lambda: draws.random() < 0.5,
    }
    return values[kind]() if kind in values else datetime.fromtimestamp(draws.random() * 1e9, UTC)


def filled(table: Any, draws: random.Random, **given: Any) -> dict[str, Any]:
    """Return a row with a value in every column."""
    return {field.name: noisy(field, draws) for field in table.schema} | given


def test_tables_take_so_many_files_and_bytes_at_most_whatever_was_measured(tmp_path: Path) -> None:
    draws, runs, epochs = random.Random(0), 130, 40
    study = open_study(toy("s", arm("dfkt", runs)), tmp_path)
    store: StudyStore = study.store
    rows, records = store._tables["trials"], store._tables["epochs"]
    for number in range(runs):
        kept = [filled(records, draws, number=number, index=k) for k in range(epochs)]
        store.save("trial", "dfkt", filled(rows, draws, number=number), kept)
    found = files(tmp_path / "s")
    tables = {name: size for name, size in found.items() if name.endswith(".parquet")}
    assert len(tables) == 2 * parts(runs) == 6
    assert sum(tables.values()) <= runs * (RUN + epochs * EPOCH) + len(tables) * PART
    assert len(found) == 1 + len(tables)
    for number in range(runs):  # runs that are saved again replace what was there
        store.save("trial", "dfkt", filled(rows, draws, number=number), ())
    assert files(tmp_path / "s").keys() == found.keys()


class Checkpointed(Played):
    """Tune played, with a checkpoint and a student as a run's process leaves them.

    Attributes:
        most: The most checkpoints that there were at once.
    """

    most = 0

    def start(self, trial: Any) -> None:
        """Leave a checkpoint as soon as the trial has begun."""
        super().start(trial)
        Storage(trial.config["run"].job.storage).write(STATE_FILE, bytes(1000))
        self.most = max(self.most, len(list(self.results.rglob(STATE_FILE))))

    def complete(self, trial: Any, payload: dict[str, Any]) -> None:
        """Leave a final run's student before it ends."""
        if trial.config["run"].final:
            Storage(trial.config["run"].job.storage).write("student", bytes(1000))
        super().complete(trial, payload)


@pytest.mark.slow
def test_a_study_keeps_so_many_files_and_one_checkpoint_for_each_run_on_its_way(tmp_path: Path) -> None:
    trials, seeds, slots, epochs = 70, 3, 4, 12
    config = toy(
        "s",
        arm("dfkt", trials),
        arm("scratch"),
        seeds=seeds,
        confirm=3,
        train=TrainConfig(epochs=epochs, batch_size=32),
    )
    played = Checkpointed(tmp_path, config)
    played.run(slots)
    assert played.most == slots
    assert not list((tmp_path / "s" / "runs").glob("*"))
    found = files(tmp_path / "s")
    students = {f"students/{name}-seed{seed}/student" for name in ("dfkt", "scratch") for seed in (1, 2, 3)}
    tables = [name for name in found if name.endswith(".parquet")]
    trial_parts, final_parts = 2 * parts(trials), 2 * parts(seeds)
    assert (
        len(tables) <= trial_parts + min(2 * 3, trial_parts) + 2 * final_parts
    )  # a confirmation has its trial's number
    assert found.keys() - tables == {"study.json", "optuna.journal", *students}
    assert found["optuna.journal"] <= trials * (TRIAL + epochs * REPORT)
    assert found["study.json"] <= STUDY
    assert Played(tmp_path, config).queue.over
    again = files(tmp_path / "s")
    assert again["study.json"] <= found["study.json"] + SESSION
    assert {**again, "study.json": 0} == {**found, "study.json": 0}


def test_the_errors_of_any_number_of_runs_take_a_mebibyte(tmp_path: Path) -> None:
    folder = Storage(tmp_path)
    for k in range(40):
        keep(folder, f"trial {k}", "x" * 50_000)
    assert KEPT_BYTES == 2**20
    assert files(tmp_path) == {ERRORS_FILE: KEPT_BYTES}
    assert b"trial 39" in (folder.read(ERRORS_FILE) or b"")
