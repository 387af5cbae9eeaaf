"""What Tune tells of a run becomes its row and its epochs, and a line for the user."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from study.played import Played, arm, ended, payloads, toy

from dfkt.store.files import Storage
from dfkt.study.config import ablations
from dfkt.study.recorder import summarise
from dfkt.training.run import STUDENT_FILE
from dfkt.training.state import STATE_FILE

MEASURED = ("last_val_accuracy", "best_val_accuracy", "best_epoch", "epochs", "steps", "images")


@pytest.fixture
def run(tmp_path: Path) -> Played:
    """A study with a search of DFKT on its way."""
    return Played(tmp_path, toy("s", arm("dfkt", 3), seeds=1))


def record(index: int, accuracy: float | None = None) -> dict[str, Any]:
    phase = {"phase": "flow", "round": 1, "stage": 1} if accuracy is None else {"phase": "task"}
    judged = {} if accuracy is None else {"val_accuracy": accuracy, "rung_epoch": float(index)}
    place = {"index": index, "epoch": float(index + 1), "step": 4 * (index + 1), "images": 256 * (index + 1)}
    return {**place, "loss": 1.0, **phase, **judged}


def payload(*records: dict[str, Any], **more: Any) -> dict[str, Any]:
    judged = {n: records[-1][n] for n in ("val_accuracy", "rung_epoch") if n in records[-1]}
    return {"records": list(records), "wall_seconds": 2.0, "workers": 1, "complete": False, **judged, **more}


def test_a_run_has_a_running_row_from_its_start(run: Played) -> None:
    trial = run.ask()
    row = ended(run, "dfkt", 0)
    assert (row["state"], row["method"], row["attempts"], row["ended"]) == ("RUNNING", "dfkt", 1, None)
    assert row["started"] is not None
    assert (row["param_pattern"], row["param_weight"]) == ("dense-3", None)
    assert row["key"] == trial.config["run"].job.config.key
    assert all(row[name] is None for name in MEASURED)
    assert run.lines == []


def test_a_complete_trial_has_its_measurements_and_every_epoch(run: Played) -> None:
    trial = run.ask()
    for k, accuracy in enumerate((None, 0.8, 0.7)):
        run.report(trial, payload(record(k, accuracy), complete=k == 2))
    run.complete(trial, {})

    row = ended(run, "dfkt", 0)
    assert (row["state"], row["error"]) == ("COMPLETE", None)
    assert [row[name] for name in MEASURED] == [0.7, 0.8, 2.0, 3.0, 12, 768]
    assert (row["wall_seconds"], row["workers"]) == (2.0, 1)
    assert row["ended"] >= row["started"]
    assert [r["index"] for r in run.store().trial_epochs("dfkt", 0)] == [0, 1, 2]
    (line,) = run.lines
    assert line.startswith("[1/4] dfkt trial 0: val 70.00 %, 2 s  dense-3 cumulative x1")
    assert line.count("trial 0") == 1


def test_a_trial_that_the_scheduler_stopped_is_pruned(run: Played) -> None:
    trial = run.ask()
    run.report(trial, payload(record(0), record(1, 0.2)))
    run.complete(trial, {})
    row = ended(run, "dfkt", 0)
    assert (row["state"], row["last_val_accuracy"]) == ("PRUNED", 0.2)
    assert "stopped at epoch 2.0" in run.lines[0]


def test_a_run_that_ended_by_itself_is_failed_with_its_reason_and_the_epochs_before(run: Played) -> None:
    trial = run.ask()
    run.report(trial, payload(record(0)))
    run.report(trial, payload(record(0), failure="The loss became nan", wall_seconds=3.0))
    run.complete(trial, {})
    row = ended(run, "dfkt", 0)
    assert (row["state"], row["error"], row["wall_seconds"]) == ("FAIL", "The loss became nan", 3.0)
    assert (row["last_val_accuracy"], row["epochs"]) == (None, 1.0)
    assert len(run.store().trial_epochs("dfkt", 0)) == 1
    assert run.lines == ["[1/4] dfkt trial 0: failed: The loss became nan"]
    assert run.queue.failures == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("Traceback:\n  somewhere\nValueError: deep inside\n\n", "ValueError: deep inside"),
        ("Failure # 1\nfirst\nFailure # 2\nsecond\n", "second"),
        (None, "its process ended without a message"),
        ("  \n", "its process ended without a message"),
    ],
)
def test_a_trial_whose_process_raised_keeps_the_last_line_and_null_not_zero(
    error: str | None, text: str, run: Played
) -> None:
    run.die(run.ask(), error)
    row = ended(run, "dfkt", 0)
    assert (row["state"], row["error"]) == ("FAIL", text)
    assert all(row[name] is None for name in (*MEASURED, "wall_seconds", "device_seconds"))
    assert run.lines == [f"[1/4] dfkt trial 0: failed: {text}"]


def test_a_restart_adds_an_attempt_and_its_records_replace_those_of_the_same_index(run: Played) -> None:
    trial = run.ask()
    started = ended(run, "dfkt", 0)["started"]
    run.report(trial, payload(record(0)))
    run.report(trial, payload(record(1, 0.1)))
    run.start(trial)  # its process died, and reports all it has from its checkpoint on
    run.report(trial, payload(record(0), record(1, 0.5)))
    run.report(trial, payload(record(2, 0.6), complete=True))
    run.complete(trial, {})
    row = ended(run, "dfkt", 0)
    assert (row["attempts"], row["started"]) == (2, started)
    assert [(r["index"], r["val_accuracy"]) for r in run.store().trial_epochs("dfkt", 0)] == [
        (0, None), (1, 0.5), (2, 0.6),
    ]  # fmt: skip


def test_after_a_kill_of_the_main_process_attempts_count_on_and_epochs_are_complete(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", 1), seeds=1)
    for attempt in (1, 2):  # killed twice: in a trial, then in a final run
        run = Played(tmp_path, config)
        trial = run.ask()
        if attempt == 2:
            for reported in payloads(trial.config["run"]):
                run.report(trial, reported)
            run.complete(trial, reported)
            trial = run.ask()
        run.report(trial, next(payloads(trial.config["run"])))
    last = Played(tmp_path, config)
    final = last.ask()
    everything = list(payloads(final.config["run"]))
    first = everything[0] | {
        "records": [r for p in everything[:2] for r in p["records"]]
    }  # it had got one epoch further
    for reported in (first, everything[2]):
        last.report(final, reported)
    last.complete(final, reported)
    study = last.study()
    assert (list(study.trials.attempts), list(study.finals.attempts)) == ([2], [2])
    assert list(study.final_epochs["index"]) == list(study.epochs["index"]) == [0, 1, 2]
    assert list(study.finals.state) == ["COMPLETE"]


def test_runs_at_the_same_time_are_kept_apart(run: Played) -> None:
    trials = [run.ask(), run.ask()]
    for trial, accuracy in zip(trials, (0.1, 0.2), strict=True):
        run.report(trial, payload(record(0, accuracy), complete=True))
    run.complete(trials[1], {})
    assert [ended(run, "dfkt", n)["state"] for n in (0, 1)] == ["RUNNING", "COMPLETE"]
    run.complete(trials[0], {})
    assert [ended(run, "dfkt", n)["last_val_accuracy"] for n in (0, 1)] == [0.1, 0.2]


def test_a_final_run_has_its_test_figures_and_a_line(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch"), seeds=1)).run()
    row = ended(run, "scratch", 0, final=True)
    assert (row["test_accuracy"], row["test_loss"], row["seed"]) == (0.3, 1.5, 1)
    assert run.lines == ["[1/1] scratch seed 1: test 30.00 %, 3 s"]


def leave_files(trial: Any) -> Storage:
    """Leave what a run has in its folder on its way."""
    folder = Storage(trial.config["run"].job.storage)
    for name in (STATE_FILE, STUDENT_FILE):
        folder.write(name, b"weights")
    return folder


def test_a_finished_trial_leaves_nothing_and_a_final_run_its_student(run: Played, tmp_path: Path) -> None:
    trial = run.ask()
    folder = leave_files(trial)
    assert folder.exists(STATE_FILE)
    run.end(trial)
    assert not (tmp_path / "s" / "runs" / "dfkt-00000").exists()
    run.run(limit=2)
    final = run.ask()
    assert leave_files(final).path == str(tmp_path / "s" / "students" / "dfkt-seed1")
    run.end(final)
    assert [path.name for path in (tmp_path / "s" / "students" / "dfkt-seed1").iterdir()] == ["student.pt"]


def test_a_lost_final_runs_checkpoint_stays(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch"), seeds=1))
    final = run.ask()
    folder = leave_files(final)
    run.die(final)
    assert folder.exists(STATE_FILE)
    row = ended(run, "scratch", 0, final=True)
    assert (row["state"], row["error"], row["test_accuracy"]) == ("RUNNING", "ValueError: deep inside", None)


def test_a_final_run_that_failed_leaves_no_student_not_even_an_earlier_winners(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch"), seeds=1))
    final = run.ask()
    folder = leave_files(final)
    run.fail(final)
    assert folder.entries() == []


def test_a_trial_done_again_because_its_row_was_lost_keeps_one_row(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", 1), seeds=1)
    for _ in range(2):
        run = Played(tmp_path, config).run()
        (tmp_path / "s" / "trials" / "arm=scratch" / "part-00000.parquet").unlink()
    assert [row["number"] for row in run.store().final_rows("scratch")] == [0]


def test_the_counter_ends_at_its_total_though_arms_were_skipped(tmp_path: Path) -> None:
    searched = arm("dfkt", 2)
    run = Played(tmp_path, toy("s", searched, *ablations(searched, ["dense", "adjacent"]))).run()
    assert run.lines[0].startswith("[1/8] ")
    assert run.lines[-1].startswith("[6/6] ")


def test_a_measured_nan_is_never_the_best() -> None:
    records = [record(0, float("nan")), record(1, 0.5), record(2, 0.4)]
    assert summarise(records, {})["best_val_accuracy"] == 0.5
    assert summarise([], {"workers": 2}) == {"workers": 2}


def test_what_tune_pickles_holds_nothing(run: Played) -> None:
    for part in (run.recorder, run.searcher, run.queue):
        assert len(pickle.dumps(part)) < 1000
