"""Early stopping judges every arm by itself, never a final run, and knows what earlier trials reached."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from study.played import Played, arm, toy

from dfkt.config import TrainConfig
from dfkt.methods.scratch import Scratch
from dfkt.study.driver import Run
from dfkt.study.stopping import Stopping, asha
from dfkt.study.study import _judges


def long(*arms: Any, **settings: Any) -> Any:
    """A study of nine epochs whose arms are stopped early: the first rung is at epoch 1, the next one at 3."""
    return toy("long", *arms, train=TrainConfig(epochs=9), seeds=1, early_stopping=True, **settings)


def falling(run: Run) -> float:
    """Every trial is worse than the one before it; arm ``bad`` is much worse than the others."""
    return (0.1 if run.arm == "bad" else 0.9) - 0.01 * run.number


def states(run: Played, name: str) -> list[str]:
    return [row["state"] for row in run.store().trial_rows(name)]


def test_trials_that_fall_behind_their_arm_are_stopped(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 4)), judge=falling).run()
    assert states(run, "good") == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    row = run.store().trial_rows("good")[1]
    assert row["epochs"] == 1.0  # at the first rung
    assert any("trial 1: val" in line and "stopped at epoch 1.0" in line for line in run.lines)


def test_an_arm_is_not_judged_by_another(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 2), arm("bad", 2)), judge=falling).run(slots=4)
    alone = Played(tmp_path / "alone", long(arm("bad", 2)), judge=falling).run(slots=4)
    assert states(run, "bad") == states(alone, "bad")
    assert states(run, "bad")[0] == "COMPLETE"


def test_studies_are_not_judged_by_one_another_where_their_arms_share_a_name(tmp_path: Path) -> None:
    def judge(run: Run) -> float:
        return 0.9 if run.study.endswith("one") else 0.1

    configs = [
        toy(name, arm("scratch", 1), train=TrainConfig(epochs=9), early_stopping=True) for name in ("one", "two")
    ]
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
    record = {"val_accuracy": 0.9, "rung_epoch": 1.0}
    late = SimpleNamespace(trial_id="late")
    for state, decision in [("COMPLETE", TrialScheduler.STOP), ("PRUNED", TrialScheduler.STOP)] + [
        (state, TrialScheduler.CONTINUE) for state in ("FAIL", "RUNNING")
    ]:
        earlier = [({"number": n, "state": state}, [{"rung_epoch": None}, record]) for n in range(3)]
        primed = asha(9, 3, earlier)
        primed.on_trial_add(None, late)
        assert primed.on_trial_result(None, late, {"val_accuracy": 0.1, "rung_epoch": 1.0}) == decision


def test_without_early_stopping_or_without_trials_left_nothing_judges(tmp_path: Path) -> None:
    assert _judges(Played(tmp_path, toy("s", arm("a", 2))).queue) == {}
    run = Played(tmp_path, long(arm("good", 1), arm("plain")))
    assert [name for _, name in _judges(run.queue)] == ["good"]
    run.run()
    assert _judges(Played(tmp_path, long(arm("good", 1), arm("plain"))).queue) == {}


@pytest.mark.parametrize("longest", [0.5, 1, 3, 60])
def test_runs_of_any_length_can_be_judged(longest: float) -> None:
    scheduler, run = asha(longest, 3, []), SimpleNamespace(final=False, study="s", arm="a")
    stopping = Stopping({("s", "a"): scheduler})
    trial: Any = SimpleNamespace(trial_id="t", config={"run": run})
    stopping.on_trial_add(None, trial)
    report = {"val_accuracy": 0.5, "rung_epoch": longest}
    assert stopping.on_trial_result(None, trial, report) == TrialScheduler.CONTINUE
    stopping.on_trial_complete(None, trial, report)


def test_an_arm_of_another_length_has_rungs_of_its_own(tmp_path: Path) -> None:
    run = Played(tmp_path, long(arm("good", 2), arm("brief", 2, method=Scratch(), epochs=3)))
    (first, second) = _judges(run.queue).values()
    assert (first._max_t, second._max_t) == (9, 3)
