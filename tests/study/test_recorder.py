"""What Tune tells of a run becomes its row and its epochs, and a line for the user."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from study.played import Played, arm, ended, payloads, toy
from terminals import terminal

from dfkt.store.files import Storage
from dfkt.students.package import WEIGHTS_FILE
from dfkt.study.config import ablations
from dfkt.study.ended import summarise
from dfkt.study.failures import DIED
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
        (OSError("far\naway"), "OSError: far away"),
        (ActorDiedError(), DIED),
        (None, "its process ended without a word"),
    ],
)
def test_a_trial_that_tune_gave_up_says_why_on_one_line_and_keeps_null_not_zero(
    error: Exception | None, text: str, tmp_path: Path
) -> None:
    run = Played(tmp_path, toy("s", arm("dfkt", 3), seeds=1, max_failures=0))
    run.die(run.ask(), error)
    row = ended(run, "dfkt", 0)
    assert (row["state"], row["error"]) == ("FAIL", text)
    assert all(row[name] is None for name in (*MEASURED, "wall_seconds", "device_seconds"))
    assert run.lines == [f"[1/4] dfkt trial 0: failed: {text}; more in {tmp_path / 's' / 'errors.txt'}"]
    assert "===== dfkt trial 0, " in (tmp_path / "s" / "errors.txt").read_text()


def test_a_run_whose_process_died_says_that_it_starts_again(run: Played) -> None:
    trial = run.ask()
    run.report(trial, payload(record(0)))
    run.die(trial, ActorDiedError(), recover=True)
    assert run.lines == [f"dfkt trial 0: {DIED}; it starts again from its last checkpoint"]
    assert (ended(run, "dfkt", 0)["state"], ended(run, "dfkt", 0)["attempts"]) == ("RUNNING", 2)


@pytest.mark.parametrize("arm_of", ["dfkt", "scratch"])
def test_a_run_that_tune_gave_up_too_early_is_handed_out_again(arm_of: str, tmp_path: Path) -> None:
    """Tune does so with a run that takes over the process of another one just as that is killed."""
    run = Played(tmp_path, toy("s", arm(arm_of, 1 if arm_of == "dfkt" else 0), seeds=1, max_failures=2))
    for left in (2, 1, 0):
        trial = run.ask()
        assert trial.config["run"].number == 0
        run.report(trial, payload(record(0)))
        run.die(trial, ActorDiedError())
        assert sum("it starts again" in line for line in run.lines) == 3 - max(left, 1)
    assert "failed: its process died" in run.lines[-1]
    kind = "trial" if arm_of == "dfkt" else "final"
    (row,) = [row for row in run.store().rows(kind, arm_of) if row["number"] == 0]
    assert (row["attempts"], row["epochs"]) == (3, 1.0)
    assert row["state"] == ("FAIL" if arm_of == "dfkt" else "RUNNING")
    assert run.ask() is None
    assert run.finished


RAISED = {"failure": "ValueError: no (mine.py:3)", "traceback": "Traceback\n  mine.py\nValueError: no\n"}


def test_a_trial_whose_code_raised_keeps_what_it_had_measured_and_its_traceback_where_the_line_says(
    run: Played, tmp_path: Path
) -> None:
    for number in range(2):
        trial = run.ask()
        run.report(trial, payload(record(0)))
        run.report(trial, RAISED)
        run.complete(trial, RAISED)
        row = ended(run, "dfkt", number)
        assert (row["state"], row["error"], row["attempts"]) == ("FAIL", RAISED["failure"], 1)
        assert (row["wall_seconds"], row["epochs"]) == (2.0, 1.0)
    file = tmp_path / "s" / "errors.txt"
    assert run.lines[0] == f"[1/4] dfkt trial 0: failed: {RAISED['failure']}; more in {file}"
    assert [line.split(",")[0] for line in file.read_text().splitlines() if line.startswith("=====")] == [
        "===== dfkt trial 0",
        "===== dfkt trial 1",
    ]
    assert file.read_text().count("  mine.py\nValueError: no\n") == 2
    assert run.queue.failures == 2


def test_a_final_run_whose_code_raised_stays_to_be_done(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch"), seeds=1))
    final = run.ask()
    run.report(final, RAISED)
    run.complete(final, RAISED)
    row = ended(run, "scratch", 0, final=True)
    assert (row["state"], row["error"], run.queue.failures) == ("RUNNING", RAISED["failure"], 1)
    assert Played(tmp_path, toy("s", arm("scratch"), seeds=1)).ask() is not None


@pytest.mark.parametrize("said", [{"failure": ""}, {"failure": None}])
def test_a_failure_without_words_is_one_nevertheless(run: Played, said: dict[str, Any]) -> None:
    trial = run.ask()
    run.report(trial, payload(record(0), **said))
    run.complete(trial, {})
    assert ended(run, "dfkt", 0)["state"] == "FAIL"
    assert run.lines == ["[1/4] dfkt trial 0: failed: it could not go on, and did not say why"]


def test_a_confirmation_without_a_last_report_was_not_stopped_early_but_failed(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch", 2), seeds=1, confirm=2))
    for _ in range(2):
        run.end(run.ask())
    again = run.ask()
    run.report(again, payload(record(0, 0.5)))
    run.complete(again, {})
    (row,) = run.store().rows("confirmation", "scratch")
    assert (row["state"], row["error"]) == ("FAIL", "it ended before its last report")


def test_a_final_run_without_a_last_report_is_no_success(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch"), seeds=1))
    final = run.ask()
    run.report(final, payload(record(0, 0.5)))
    run.complete(final, {})
    row = ended(run, "scratch", 0, final=True)
    assert (row["state"], row["error"]) == ("RUNNING", "it ended before its last report")


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


def test_records_that_a_restart_has_not_are_gone(run: Played) -> None:
    trial = run.ask()
    for index in range(3):
        run.report(trial, payload(record(index, 0.1 * (index + 1))))
    run.start(trial)  # from a checkpoint of the first epoch
    run.report(trial, payload(record(0, 0.1)))
    run.report(trial, payload(record(1, 0.5), complete=True))
    run.complete(trial, {})
    assert [r["index"] for r in run.store().trial_epochs("dfkt", 0)] == [0, 1]


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
    for name in (STATE_FILE, WEIGHTS_FILE):
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
    assert [path.name for path in (tmp_path / "s" / "students" / "dfkt-seed1").iterdir()] == [WEIGHTS_FILE]


def test_a_lost_final_runs_checkpoint_stays(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch"), seeds=1))
    final = run.ask()
    folder = leave_files(final)
    run.die(final, OSError("far away"))
    assert folder.exists(STATE_FILE)
    row = ended(run, "scratch", 0, final=True)
    assert (row["state"], row["error"], row["test_accuracy"]) == ("RUNNING", "OSError: far away", None)


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
    assert [row["number"] for row in run.store().rows("final", "scratch")] == [0]


def test_the_counter_ends_at_its_total_though_arms_were_skipped(tmp_path: Path) -> None:
    searched = arm("dfkt", 2)
    run = Played(tmp_path, toy("s", searched, *ablations(searched, ["dense", "adjacent"]))).run()
    assert run.lines[0].startswith("[1/8] ")
    assert run.lines[-1].startswith("[6/6] ")


class Clock:
    """A clock that stands until it is set."""

    now = 0.0

    def __call__(self) -> float:
        """Return the time that it was set to."""
        return self.now


def step(run: Played, clock: Clock, seconds: float) -> None:
    """Let time pass, and Tune take a step."""
    clock.now += seconds
    run.recorder.on_step_end(0, [])


def test_off_a_terminal_a_line_a_minute_says_how_far_everything_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    run = Played(tmp_path, toy("s", arm("scratch", 3), seeds=1), clock=clock)
    trials = [run.ask(), run.ask()]
    run.report(trials[0], payload(record(0, 0.5)))
    step(run, clock, 59)
    assert capsys.readouterr().err == ""
    step(run, clock, 1)
    step(run, clock, 1)
    assert capsys.readouterr().err == "s: 0/4 runs done, 2 running\n"
    step(run, clock, 59)
    run.end(trials[0])  # after 2 minutes
    run.ask()
    step(run, clock, 60)  # the second is overdue, the third has 1 minute to go; a final run waits
    assert capsys.readouterr().err.splitlines() == [
        "s: 0/4 runs done, 2 running",
        "s: 1/4 runs done, 2 running, best val 60.00 % (scratch), about 2 min left",
    ]
    assert len(run.lines) == 1


def test_runs_that_ended_before_count_as_best_but_not_for_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, clock = toy("s", arm("scratch", 3), seeds=1), Clock()
    Played(tmp_path, config).run(limit=1)
    run = Played(tmp_path, config, clock=clock)
    trial = run.ask()
    step(run, clock, 60)
    run.fail(trial)
    step(run, clock, 60)
    assert capsys.readouterr().err.splitlines() == [
        "s: 0/3 runs done, 1 running, best val 60.00 % (scratch)",
        "s: 1/3 runs done, 0 running, best val 60.00 % (scratch)",
    ]


def test_the_time_left_counts_what_waits_whether_it_was_handed_out_or_not(tmp_path: Path) -> None:
    clock = Clock()
    run = Played(tmp_path, toy("s", arm("scratch", 3), seeds=1), clock=clock)
    trial = run.ask()
    clock.now = 100.0
    run.end(trial)
    assert run.recorder.status.seconds_left() == 300  # two trials and a final run
    run.searcher.suggest("t1")  # Tune has it, but has not started it
    assert run.recorder.status.seconds_left() == 300


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "10 s"), (44, "40 s"), (90, "2 min"), (3000, "50 min"), (7500, "2 h 5 min")]
)
def test_the_time_left_is_rounded(seconds: float, text: str, tmp_path: Path) -> None:
    clock = Clock()
    run = Played(tmp_path, toy("s", arm("scratch", 1), seeds=1), clock=clock)
    trial = run.ask()
    clock.now = seconds
    run.end(trial)
    assert run.recorder.status.bar.text.endswith(f", about {text} left")


def test_of_several_studies_the_best_is_of_the_one_whose_run_ended_last(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("one", arm("scratch"), seeds=1), toy("two", arm("dfkt"), seeds=1))
    run.run(limit=1)
    assert "best val 60.00 % (one scratch)" in run.recorder.status.bar.text
    run.run(limit=1)
    assert " (two dfkt)" in run.recorder.status.bar.text


def test_on_a_terminal_the_study_and_every_run_have_a_bar_and_they_are_wiped_before_a_lasting_line(
    tmp_path: Path,
) -> None:
    with terminal(columns=100) as written:
        clock = Clock()
        run = Played(tmp_path, toy("s", arm("scratch"), seeds=1), clock=clock)
        final = run.ask()
        for reported in payloads(final.config["run"]):
            run.report(final, reported)
            clock.now += 1
        shown = written()
        assert "s   0% |" in shown
        assert "| 0/1 runs done, 1 running" in shown
        for epoch in (1, 2):
            assert f"| {epoch}/3 epochs, task stage, loss 1.000" in shown
        assert "scratch seed 1  33% |" in shown
        run.complete(final, {})
        assert not written().strip("\r\n \x1b[A")
        run.recorder.close()
        assert "%" not in written()
    assert run.lines == ["[1/1] scratch seed 1: test 30.00 %, 3 s"]


def test_on_a_terminal_the_bars_are_drawn_ten_times_a_second_at_most(tmp_path: Path) -> None:
    with terminal(columns=100) as written:
        clock = Clock()
        run = Played(tmp_path, toy("s", arm("dfkt", 1), seeds=1), clock=clock)
        trial = run.ask()
        for k in range(100):
            run.report(trial, payload(record(k)))
            clock.now += 0.01
        assert 9 <= written().count("epochs,") <= 11


@pytest.mark.parametrize(("at_once", "failing"), [(1, 5), (59, 5), (101, 10)])
def test_of_many_runs_at_once_a_tenth_that_fail_alike_end_the_study_and_fewer_do_not(
    at_once: int, failing: int, tmp_path: Path
) -> None:
    run = Played(tmp_path, toy("s", arm("dfkt", 200), seeds=1))
    trials = [run.ask() for _ in range(at_once)]
    for _ in range(failing):
        assert run.queue.broken is None
        run.fail(trials.pop(0))
        trials.append(run.ask())
    assert f"the first {failing} runs failed alike (The loss became nan)" in str(run.queue.broken)


def test_a_run_that_ended_well_before_them_lets_any_number_fail_alike(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("dfkt", 20), seeds=1))
    run.end(run.ask())
    for _ in range(12):
        run.fail(run.ask())
    assert run.queue.broken is None


def test_a_measured_nan_is_never_the_best() -> None:
    records = [record(0, float("nan")), record(1, 0.5), record(2, 0.4)]
    assert summarise(records, {})["best_val_accuracy"] == 0.5
    assert summarise([], {"workers": 2}) == {"workers": 2}


def test_what_tune_pickles_holds_nothing(run: Played) -> None:
    for part in (run.recorder, run.searcher, run.queue):
        assert len(pickle.dumps(part)) < 1000


def test_optuna_notes_what_a_trial_cost_and_why_it_failed_and_so_does_a_journal_made_anew(tmp_path: Path) -> None:
    config = toy("s", arm("dfkt", 3), seeds=1)
    run = Played(tmp_path, config)
    trials = [run.ask(), run.ask()]
    for reported in payloads(trials[0].config["run"]):
        run.report(trials[0], reported)
    run.complete(trials[0], {})
    run.fail(trials[1])
    search = next(iter(run.queue.arms.values())).search
    expected: list[dict[str, Any]] = [{"device_seconds": k, "epochs": k} for k in (3.0, 1.0)]
    expected[1] |= {"error": "The loss became nan"}
    assert [trial.user_attrs for trial in search.optuna.trials] == expected
    (tmp_path / "s/optuna.journal").unlink()
    search = next(iter(Played(tmp_path, config).queue.arms.values())).search
    assert [trial.user_attrs for trial in search.optuna.trials] == expected
