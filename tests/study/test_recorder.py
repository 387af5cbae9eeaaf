"""What Tune tells of a trial becomes its row and its epochs, and a line for the user."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dfkt.config import RunConfig, StudyConfig, config_key
from dfkt.study.recorder import Recorder, last_line, summarise
from dfkt.store.study_store import StudyStore
from dfkt.methods.space import SearchSpace, resolve
from dfkt.store.files import Storage

SPACE = SearchSpace(4)
CONFIG = StudyConfig(name="toy", base=RunConfig(), trials=3)
MEASURED = ("last_val_accuracy", "best_val_accuracy", "best_epoch", "epochs", "steps", "images")


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore.create(Storage(tmp_path / "toy"), SPACE.types(), {})


def trial_of(number: int, error: str | None = None) -> Any:
    config = SPACE.start() | {"pattern": "dense-3", "number": number}
    return SimpleNamespace(
        config=config, trial_id=f"t{number}", get_pickled_error=lambda: None, get_error=lambda: error
    )


def record(index: int, accuracy: float | None = None) -> dict[str, Any]:
    phase = {"phase": "flow", "round": 1, "stage": 1} if accuracy is None else {"phase": "task"}
    judged = {} if accuracy is None else {"val_accuracy": accuracy, "rung_epoch": float(index)}
    place = {"index": index, "epoch": float(index + 1), "step": 4 * (index + 1), "images": 256 * (index + 1)}
    return {**place, "loss": 1.0, **phase, **judged}


def payload(records: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"records": records, "wall_seconds": 2.0, "workers": 1, "complete": False, **more}


class Run:
    """A recorder with the callbacks that Tune makes, and the lines that it printed."""

    def __init__(self, store: StudyStore) -> None:
        self.store = store
        self.lines: list[str] = []
        self.recorder = Recorder(store, CONFIG, Path("unused"), self.lines.append)

    def start(self, trial: Any) -> None:
        """Tune starts the trial, or starts it again."""
        self.recorder.on_trial_start(0, [], trial)

    def result(self, trial: Any, reported: dict[str, Any]) -> None:
        """The trial reports."""
        self.recorder.on_trial_result(0, [], trial, reported)

    def complete(self, trial: Any) -> None:
        """The trial ended, or was stopped."""
        self.recorder.on_trial_complete(0, [], trial)

    def error(self, trial: Any) -> None:
        """The trial's process failed."""
        self.recorder.on_trial_error(0, [], trial)

    def row(self, number: int = 0) -> dict[str, Any]:
        """Return what the store has of a trial."""
        (found,) = (row for row in self.store.trial_rows() if row["number"] == number)
        return found


def test_a_trial_has_a_running_row_from_its_start(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0)
    run.start(trial)

    row = run.row()
    assert (row["state"], row["method"], row["attempts"], row["ended"]) == ("RUNNING", "dfkt", 1, None)
    assert row["started"] is not None
    assert row["param_pattern"] == "dense-3"
    assert row["param_kd_weight"] is None
    assert row["key"] == config_key(resolve(SPACE.start() | {"pattern": "dense-3"}, CONFIG.base))
    assert all(row[name] is None for name in MEASURED)
    assert trial.config["number"] == 0  # Tune's own dict is left alone
    assert run.lines == []


def test_a_complete_trial_has_its_measurements_and_every_epoch(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0)
    run.start(trial)
    run.result(trial, payload([record(0)]))
    run.result(trial, payload([record(1, 0.8)]))
    run.result(trial, payload([record(2, 0.7)], complete=True))
    run.complete(trial)

    row = run.row()
    assert (row["state"], row["error"]) == ("COMPLETE", None)
    assert [row[name] for name in MEASURED] == [0.7, 0.8, 2.0, 3.0, 12, 768]
    assert (row["wall_seconds"], row["workers"]) == (2.0, 1)
    assert row["ended"] >= row["started"]
    assert [r["index"] for r in store.trial_epochs(0)] == [0, 1, 2]
    (line,) = run.lines
    assert line.startswith("[1/3] trial   0: val 70.00 %")


def test_a_trial_that_the_scheduler_stopped_is_pruned(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0)
    run.start(trial)
    run.result(trial, payload([record(0), record(1, 0.2)]))
    run.complete(trial)
    assert (run.row()["state"], run.row()["last_val_accuracy"]) == ("PRUNED", 0.2)
    assert "stopped at epoch 2.0" in run.lines[0]


def test_a_run_that_ended_by_itself_is_failed_with_its_reason_and_the_epochs_before(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0)
    run.start(trial)
    run.result(trial, payload([record(0)]))
    run.result(trial, {"records": [], "failure": "The loss became nan", "wall_seconds": 3.0})
    run.complete(trial)

    row = run.row()
    assert (row["state"], row["error"], row["wall_seconds"]) == ("FAIL", "The loss became nan", 3.0)
    assert row["last_val_accuracy"] is None
    assert row["epochs"] == 1.0
    assert len(store.trial_epochs(0)) == 1
    assert run.lines == ["[1/3] trial   0: failed: The loss became nan"]


def test_a_trial_whose_process_died_before_it_reported_keeps_null_not_zero(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0, "Traceback:\n  somewhere\nValueError: deep inside\n")
    run.start(trial)
    run.error(trial)
    row = run.row()
    assert (row["state"], row["error"]) == ("FAIL", "ValueError: deep inside")
    assert all(row[name] is None for name in (*MEASURED, "wall_seconds", "device_seconds"))


def test_a_restart_adds_an_attempt_and_its_records_replace_those_of_the_same_index(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0)
    run.start(trial)
    started = run.row()["started"]
    run.result(trial, payload([record(0)]))
    run.result(trial, payload([record(1, 0.1)]))
    run.start(trial)  # its process died, and reports all it has from its checkpoint on
    run.result(trial, payload([record(0), record(1, 0.5)]))
    run.result(trial, payload([record(2, 0.6)], complete=True))
    run.complete(trial)

    assert (run.row()["attempts"], run.row()["started"]) == (2, started)
    assert [(r["index"], r["val_accuracy"]) for r in store.trial_epochs(0)] == [(0, None), (1, 0.5), (2, 0.6)]


def test_a_trial_taken_up_by_a_later_run_counts_its_attempts_on(store: StudyStore) -> None:
    first, trial = Run(store), trial_of(0)
    first.start(trial)
    first.result(trial, payload([record(0)]))  # then the main process is killed

    later = Run(StudyStore.open(store.storage))
    later.start(trial)
    later.result(trial, payload([record(0), record(1, 0.5)], complete=True))
    later.complete(trial)

    assert (later.row()["attempts"], later.row()["state"]) == (2, "COMPLETE")
    assert later.row()["started"] == first.row()["started"]
    assert later.lines[0].startswith("[1/3]")


def test_trials_at_the_same_time_are_kept_apart(store: StudyStore) -> None:
    run, trials = Run(store), [trial_of(0), trial_of(1)]
    for trial in trials:
        run.start(trial)
    for trial, accuracy in zip(trials, (0.1, 0.2), strict=True):
        run.result(trial, payload([record(0, accuracy)], complete=True))
    run.complete(trials[1])
    assert (run.row(0)["state"], run.row(1)["state"]) == ("RUNNING", "COMPLETE")
    run.complete(trials[0])
    assert [run.row(n)["last_val_accuracy"] for n in (0, 1)] == [0.1, 0.2]


def test_a_finished_trials_checkpoint_is_deleted(store: StudyStore) -> None:
    run, trial = Run(store), trial_of(0)
    folder = store.storage.sub("runs", "trial-00000")
    folder.write("state.pt", b"state")
    run.start(trial)
    assert folder.exists("state.pt")
    run.result(trial, payload([record(0, 0.5)], complete=True))
    run.complete(trial)
    assert not folder.exists("state.pt")


def test_a_trial_done_again_because_its_row_was_lost_keeps_one_row(store: StudyStore) -> None:
    for _ in range(2):
        run, trial = Run(store), trial_of(0)
        run.start(trial)
        run.result(trial, payload([record(0, 0.5)], complete=True))
        run.complete(trial)
    assert [row["number"] for row in store.trial_rows()] == [0]


def test_a_measured_nan_is_never_the_best() -> None:
    records = [record(0, float("nan")), record(1, 0.5), record(2, 0.4)]
    assert summarise(records, {})["best_val_accuracy"] == 0.5


def test_the_last_line_of_an_error_is_what_happened() -> None:
    assert last_line("a\n b \n\n") == "b"
    assert last_line("") == "the trial's process ended without a message"


def test_the_line_of_another_method_names_its_settings_and_not_the_number_twice(tmp_path: Path) -> None:
    space = SearchSpace(4, method="kd")
    config = StudyConfig(name="toy", base=RunConfig(method="kd"), baselines=())
    lines: list[str] = []
    recorder = Recorder(StudyStore.create(Storage(tmp_path / "kd"), space.types(), {}), config, Path("u"), lines.append)
    trial = SimpleNamespace(config=space.start() | {"number": 0})
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_result(0, [], trial, payload([record(0, 0.5)], complete=True))
    recorder.on_trial_complete(0, [], trial)

    assert lines == ["[1/40] trial   0: val 50.00 %, 2 s  task_lr 0.1, kd_weight 0.9, temperature 4"]
