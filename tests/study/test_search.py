"""An interrupted study goes on where it was, whatever its store and Optuna's journal know of each trial."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from dfkt.config import RunConfig, StudyConfig, TrainConfig
from dfkt.study.search import ResumingSearch, build_scheduler, build_search, open_optuna, reconcile
from dfkt.methods.space import SearchSpace

SPACE = SearchSpace(4)
CONFIG = StudyConfig(name="toy", base=RunConfig(train=TrainConfig(epochs=9)), reduction_factor=3)
FLOW_RESULT = {"records": [{"phase": "flow"}], "training_iteration": 1, "complete": False}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "optuna.journal"


def begin(journal: Path, rows: list[dict[str, Any]]) -> tuple[optuna.Study, ResumingSearch]:
    """Do what a study does when it is run, first or again."""
    study = open_optuna(CONFIG, journal, SPACE, rows)
    return study, build_search(CONFIG, journal, SPACE, reconcile(study, rows))


def row(number: int, state: str, accuracy: float | None = None, **params: Any) -> dict[str, Any]:
    """Return a trial's row as the store gives it: every column there, ``None`` where nothing was measured."""
    every = {f"param_{name}": params.get(name) for name in SPACE.types()}
    return {"number": number, "state": state, "last_val_accuracy": accuracy, **every}


def judged(accuracy: float, clock: float = 9.0, **more: Any) -> dict[str, Any]:
    return {"val_accuracy": accuracy, "rung_epoch": clock, "complete": False, **more}


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.trials]


def without_number(params: dict[str, Any] | None) -> dict[str, Any]:
    assert params is not None
    return {name: value for name, value in params.items() if name != "number"}


def test_the_starting_point_is_trial_0_and_asked_for_once(journal: Path) -> None:
    _, search = begin(journal, [])
    first, second = search.suggest("a"), search.suggest("b")
    assert first is not None
    assert second is not None
    start = SPACE.start()
    assert {name: first[name] for name in start} == start
    assert (first["number"], second["number"]) == (0, 1)
    assert without_number(second) != without_number(first)

    open_optuna(CONFIG, journal, SPACE)  # opened again, nothing more is put in front
    assert len(open_optuna(CONFIG, journal, SPACE).trials) == 2


def test_an_unfinished_trial_is_handed_out_again_with_number_and_parameters_before_new_ones(journal: Path) -> None:
    _, search = begin(journal, [])
    before = [search.suggest(name) for name in "abc"]
    search.on_trial_complete("b", judged(0.5, complete=True))

    study, again = begin(journal, [row(1, "COMPLETE", 0.5)])

    assert [again.suggest(name) for name in "xy"] == [before[0], before[2]]
    new = again.suggest("z")
    assert new is not None
    assert new["number"] == 3
    assert len(study.trials) == 4


def test_asking_twice_for_the_same_trial_takes_up_one(journal: Path) -> None:
    _, search = begin(journal, [])
    before = [search.suggest(name) for name in "ab"]

    _, again = begin(journal, [])

    assert [again.suggest(name) for name in ("x", "x", "y")] == [before[0], before[0], before[1]]


def test_a_kill_between_the_stores_write_and_optunas_is_made_good(journal: Path) -> None:
    _, search = begin(journal, [])
    for name in "abc":
        search.suggest(name)

    study = open_optuna(CONFIG, journal, SPACE)
    rows = [row(0, "COMPLETE", 0.75), row(1, "PRUNED", 0.25), row(2, "FAIL")]
    assert reconcile(study, rows) == []

    assert states(study) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert study.trials[0].value == 0.75
    assert study.trials[2].value is None


@pytest.mark.parametrize("rows", [[], [row(0, "RUNNING")]], ids=["no row", "a running row"])
def test_a_kill_between_optunas_write_and_the_stores_does_the_trial_again(
    journal: Path, rows: list[dict[str, Any]]
) -> None:
    _, search = begin(journal, [])
    before = search.suggest("a")
    search.on_trial_complete("a", judged(0.5, complete=True))

    study, again = begin(journal, rows)

    assert states(study) == [TrialState.COMPLETE, TrialState.WAITING]
    assert again.suggest("x") == before
    again.on_trial_result("x", FLOW_RESULT)
    again.on_trial_result("x", judged(0.6, 3.0))
    again.on_trial_complete("x", judged(0.7, complete=True))
    assert study.trials[0].value == 0.5  # what Optuna knows stays


def test_a_trial_that_both_know_to_be_finished_stays_as_it_is(journal: Path) -> None:
    _, search = begin(journal, [])
    search.suggest("a")
    search.on_trial_complete("a", judged(0.5, complete=True))

    study, again = begin(journal, [row(0, "COMPLETE", 0.5)])

    assert (states(study), study.trials[0].value) == ([TrialState.COMPLETE, TrialState.WAITING], 0.5)
    new = again.suggest("x")
    assert new is not None
    assert new["number"] == 1


def test_a_trial_that_both_know_to_be_running_is_done_again(journal: Path) -> None:
    _, search = begin(journal, [])
    before = search.suggest("a")
    study, again = begin(journal, [row(0, "RUNNING")])
    assert again.suggest("x") == before
    again.on_trial_complete("x", judged(0.5, complete=True))
    assert states(study) == [TrialState.COMPLETE, TrialState.WAITING]


def test_a_kill_before_the_first_trial_was_asked_for_leaves_it_to_be_asked_for(journal: Path) -> None:
    study = open_optuna(CONFIG, journal, SPACE)
    assert reconcile(study, []) == []
    _, search = begin(journal, [])
    first = search.suggest("a")
    assert first is not None
    assert first["number"] == 0


def test_a_lost_journal_is_made_again_from_the_store(journal: Path) -> None:
    _, search = begin(journal, [])
    before = [search.suggest(name) for name in "abcd"]
    rows = [
        row(0, "COMPLETE", 0.5, **without_number(before[0])),
        row(1, "RUNNING", **without_number(before[1])),
        row(3, "PRUNED", 0.25, **without_number(before[3])),
    ]
    journal.unlink()

    study, again = begin(journal, rows)

    assert states(study) == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED]
    assert study.trials[0].value == 0.5
    handed = [again.suggest(name) for name in "xyz"]
    assert handed[0] == before[1]
    assert [params["number"] for params in handed if params] == [1, 2, 4]


def test_optuna_is_told_how_a_trial_ended(journal: Path) -> None:
    study, search = begin(journal, [])
    for name in "abcdef":
        search.suggest(name)

    search.on_trial_complete("a", judged(0.5, complete=True))
    search.on_trial_complete("b", judged(0.25, 3.0))
    search.on_trial_complete("c", {"records": [], "failure": "the loss became nan"})
    search.on_trial_complete("d", judged(0.75, 3.0), error=True)
    search.on_trial_complete("e", None, error=True)
    search.on_trial_complete("f", judged(0.5, failure="the loss became nan"))
    search.on_trial_complete("a", judged(0.9, complete=True))  # told twice, heard once

    complete, pruned, fail = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    assert states(study) == [complete, pruned, fail, fail, fail, fail]
    assert (study.trials[0].value, study.best_trial.number) == (0.5, 0)
    assert study.trials[1].intermediate_values == {3: 0.25}


def test_reports_of_flow_stages_without_accuracy_disturb_neither_searcher_nor_scheduler(journal: Path) -> None:
    study, search = begin(journal, [])
    search.suggest("a")
    scheduler = build_scheduler(CONFIG, [], {})
    trial = SimpleNamespace(trial_id="a")
    scheduler.on_trial_add(None, trial)

    search.on_trial_result("a", FLOW_RESULT)
    assert scheduler.on_trial_result(None, trial, FLOW_RESULT) == TrialScheduler.CONTINUE
    assert study.trials[0].intermediate_values == {}

    search.on_trial_result("a", judged(0.5, 1.0))
    search.on_trial_result("a", judged(0.5, 1.0))  # a restarted trial reports again
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_a_resumed_study_does_not_propose_the_same_points_again(tmp_path: Path) -> None:
    def propose(journal: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        _, search = begin(journal, rows)
        names = [f"{len(rows)}-{k}" for k in range(2)]
        proposed = [without_number(search.suggest(name)) for name in names]
        for name in names:
            search.on_trial_complete(name, {"failure": "x"})
        return proposed

    first = propose(tmp_path / "one", [])
    later = propose(tmp_path / "one", [row(0, "FAIL"), row(1, "FAIL")])

    assert propose(tmp_path / "two", []) == first  # the same study run anew is the same study
    assert not any(params in first for params in later)


def test_a_lock_that_a_killed_process_left_on_the_journal_is_not_waited_for(journal: Path) -> None:
    open_optuna(CONFIG, journal, SPACE)
    Path(f"{journal}.lock").symlink_to(journal)
    _, search = begin(journal, [])
    assert search.suggest("a") is not None


def test_the_scheduler_knows_the_rungs_that_earlier_trials_reached() -> None:
    rows = [row(n, "COMPLETE", 0.9) for n in range(3)] + [row(3, "FAIL"), row(4, "RUNNING")]
    epochs = {
        n: [
            {"index": 0, "val_accuracy": None, "rung_epoch": None},
            {"index": 1, "val_accuracy": 0.8, "rung_epoch": 1.0},
            {"index": 2, "val_accuracy": 0.9, "rung_epoch": 3.0},
        ]
        for n in range(4)
    }
    late, good = SimpleNamespace(trial_id="late"), SimpleNamespace(trial_id="good")
    primed, fresh = build_scheduler(CONFIG, rows, epochs), build_scheduler(CONFIG, [], {})
    for scheduler in (primed, fresh):
        scheduler.on_trial_add(None, late)
        scheduler.on_trial_add(None, good)

    assert primed.on_trial_result(None, good, judged(0.95, 1.0)) == TrialScheduler.CONTINUE
    assert primed.on_trial_result(None, late, judged(0.1, 1.0)) == TrialScheduler.STOP
    assert fresh.on_trial_result(None, late, judged(0.1, 1.0)) == TrialScheduler.CONTINUE


def test_without_early_stopping_there_is_no_scheduler() -> None:
    assert build_scheduler(StudyConfig(name="toy", early_stopping=False), [], {}) is None


def test_a_study_begins_with_its_starts_without_and_with_soft_targets(journal: Path) -> None:
    _, search = begin(journal, [])
    first, second = search.suggest("a"), search.suggest("b")

    assert first is not None
    assert second is not None
    assert (first["number"], second["number"]) == (0, 1)
    assert {name: second[name] for name in first if name not in ("number", "soft_targets")} == {
        name: value for name, value in first.items() if name not in ("number", "soft_targets")
    }
    assert (first["soft_targets"], second["kd_weight"], second["temperature"]) == (False, 0.9, 4.0)
