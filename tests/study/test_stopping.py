"""Early stopping judges every arm by itself, never a final run, and knows what earlier trials reached."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from study.played import TAPS, Played, arm, toy

from dfkt.config import TrainConfig
from dfkt.errors import ConfigError
from dfkt.methods.dfkt import Dfkt
from dfkt.study.driver import Run
from dfkt.study.stopping import Rungs


def long(*arms: Any, **settings: Any) -> Any:
    """A study of nine epochs whose arms are stopped early, at epochs 3 and 6."""
    usual: dict[str, Any] = {"train": TrainConfig(epochs=9), "rungs": (1 / 3, 2 / 3), "spared": 0.0, "seeds": 1}
    usual |= {"reduction_factor": 3}
    return toy("long", *arms, **{"early_stopping": True} | usual | settings)


def falling(run: Run) -> float:
    """Every trial is worse than the one before it; arm ``bad`` is much worse than the others."""
    return (0.1 if run.arm == "bad" else 0.9) - 0.01 * run.number


def states(run: Played, name: str) -> list[str]:
    return [row["state"] for row in run.store().rows("trial", name)]


def test_trials_that_fall_behind_their_arm_are_stopped(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 4)), judge=falling).run()
    assert states(run, "good") == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    row = run.store().rows("trial", "good")[1]
    assert row["epochs"] == 3.0  # at the first rung
    assert any("trial 1: val" in line and "stopped at epoch 3.0" in line for line in run.lines)


def test_a_trial_among_the_best_share_goes_on_and_a_worse_one_ends() -> None:
    rungs = Rungs(long())  # the best third
    values = [0.5, 0.4, 0.3, 0.5, 0.6, 0.2, 0.45]
    goes_on = []
    for number, value in enumerate(values):
        rungs.note(number, [{"rung": None}, {"rung": 1 / 3, "rung_accuracy": value}])
        goes_on.append(not rungs.stops(number, 1 / 3))

    assert goes_on == [True, False, False, True, True, False, False]  # the equal of the best is not behind it


def test_a_share_of_the_trials_never_ends_early(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 11), spared=0.2), judge=falling).run()
    assert [k for k, state in enumerate(states(run, "good")) if state == "COMPLETE"] == [0, 4, 9]
    assert not any(long(spared=0.0).is_spared(k) for k in range(99))
    assert all(long(spared=1.0).is_spared(k) for k in range(99))
    assert sum(long(spared=0.3).is_spared(k) for k in range(100)) == 30


def test_only_a_trial_that_is_at_a_rung_right_now_ends(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 2)), judge=falling)
    run.end(run.ask())
    late = run.ask()
    records = [{"index": 0, "rung": 1 / 3, "rung_accuracy": 0.1}, {"index": 1, "val_accuracy": 0.1}]
    payload: Any = {"records": records, "complete": False}
    assert run.scheduler.on_trial_result(None, late, payload) == TrialScheduler.CONTINUE  # taken up again behind it
    assert run.scheduler.on_trial_result(None, late, payload | {"records": records[:1]}) == TrialScheduler.STOP


def test_no_trial_is_stopped_before_the_least_number_of_task_epochs(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rungs": (0.25, 0.5, 0.75), "least_epochs": 3.0, "early_stopping": True}
    config = toy("s", train=TrainConfig(epochs=9), **settings)
    found = [
        config.rungs_in(config.run(config.arms[1], Dfkt(share=share)).method.schedule(9, TAPS))
        for share in (0.1, 1 / 3, 0.5, 0.6)
    ]
    assert found == [(0.5, 0.75), (0.5, 0.75), (0.75,), ()]  # of 8.1, 6, 4.5 and 3.6 task epochs
    assert replace(config, early_stopping=False).rungs_in(Dfkt().schedule(99, TAPS)) == ()


def test_an_arm_that_is_too_short_for_any_rung_says_so_and_is_never_stopped(tmp_path: Path) -> None:
    short = long(arm("good", 4), arm("brief", 4, epochs=3), least_epochs=3.0)
    run = Played(tmp_path, short, judge=falling)
    assert run.lines == [
        "early stopping is off for brief: its task stage of 3 epochs has no rung at or behind epoch 3 (the last one is at 2)"
    ]
    run.run()
    assert states(run, "brief") == ["COMPLETE"] * 4
    assert states(run, "good") == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]


def test_rungs_that_make_no_sense_are_refused() -> None:
    for settings, rule in (
        ({"rungs": (0.5, 0.25)}, "rungs rise, 0 < rung < 1"),
        ({"rungs": (0.5, 1.0)}, "rungs rise, 0 < rung < 1"),
        ({"rungs": (float("nan"),)}, "rungs rise, 0 < rung < 1"),
        ({"least_epochs": -1.0}, "least_epochs >= 0"),
        ({"spared": 1.5}, "0 <= spared <= 1"),
    ):
        with pytest.raises(ConfigError, match=rule):
            long(**settings)


def test_an_arm_is_not_judged_by_another(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 2), arm("bad", 2)), judge=falling).run(slots=4)
    alone = Played(tmp_path / "alone", long(arm("bad", 2)), judge=falling).run(slots=4)
    assert states(run, "bad") == states(alone, "bad")
    assert states(run, "bad")[0] == "COMPLETE"


def test_studies_are_not_judged_by_one_another_where_their_arms_share_a_name(tmp_path: Path) -> None:
    def judge(run: Run) -> float:
        return 0.9 if run.study.endswith("one") else 0.1

    configs = [replace(long(arm("scratch", 1)), name=name) for name in ("one", "two")]
    run = Played(tmp_path, *configs, judge=judge).run(slots=2)
    assert [list(run.study(k).trials.state) for k in (0, 1)] == [["COMPLETE"], ["COMPLETE"]]


def test_final_runs_are_never_stopped(tmp_path: Path) -> None:
    def judge(run: Run) -> float:
        return 0.01 if run.final else 0.9

    run = Played(tmp_path, long(arm("good", 3)), judge=judge).run(slots=3)
    assert list(run.study().finals.state) == ["COMPLETE"]
    assert list(run.study().finals.epochs) == [9.0]


def test_a_flow_stage_is_not_judged(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("dfkt", 1)))
    trial = run.ask()
    assert run.report(trial, {"records": [], "complete": False, "training_iteration": 1})
    reported: Any = {"records": [], "val_accuracy": 0.1, "rung_epoch": None}
    assert run.scheduler.on_trial_result(None, trial, reported) == TrialScheduler.CONTINUE


def test_the_rungs_of_earlier_trials_are_known_after_a_resume(tmp_path: Path) -> None:
    Played(tmp_path, long(arm("good", 3)), judge=falling).run()

    later = Played(tmp_path, long(arm("good", 4)), judge=lambda run: 0.2).run()
    assert states(later, "good")[3] == "PRUNED"
    better = Played(tmp_path, long(arm("good", 5)), judge=lambda run: 0.95).run()
    assert states(better, "good")[4] == "COMPLETE"


def test_failed_and_unfinished_trials_are_no_measure() -> None:
    record = {"rung_accuracy": 0.9, "rung": 1 / 3}
    for state, stops in (("COMPLETE", True), ("PRUNED", True), ("FAIL", False), ("RUNNING", False)):
        earlier = [({"number": n, "state": state}, [{"rung": None}, record]) for n in range(3)]
        rungs = Rungs(long(), earlier)
        rungs.note(9, [{"rung": 1 / 3, "rung_accuracy": 0.1}])
        assert rungs.stops(9, 1 / 3) == stops


def test_without_early_stopping_or_without_trials_left_nothing_judges(tmp_path: Path) -> None:
    assert Played(tmp_path, toy("s", arm("a", 2))).scheduler.arms == {}
    run = Played(tmp_path, long(arm("good", 1), arm("plain")))
    assert [name for _, name in run.scheduler.arms] == ["good"]
    run.run()
    assert Played(tmp_path, long(arm("good", 1), arm("plain"))).scheduler.arms == {}
