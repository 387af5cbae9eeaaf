"""How far a study is follows from its configuration and its rows."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from made import Arm, trial, write_study

from dfkt.analysis.progress import Progress, progress
from dfkt.store.study_store import StudyStore, read_study

START = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
ARMS = (Arm("scratch"), Arm("dfkt", planned=4))
TOTAL = 4 + 3 + 5 + 5
"""Trials, confirmations, and five seeds of two arms."""


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def save(
    store: StudyStore, number: int, state: str, began: float, ended: float | None, kind: str = "trial", **more: Any
) -> None:
    row = trial(number, "dfkt", state, None if state == "RUNNING" else 0.5) | {"attempts": 1, "started": at(began)}
    store.save(kind, "dfkt", row | ({} if ended is None else {"ended": at(ended)}) | more)


def seen(folder: Path, now: float) -> Progress:
    return progress(read_study(folder), at(now))


def test_a_study_that_has_only_begun_has_everything_before_it(tmp_path: Path) -> None:
    write_study(tmp_path / "s", ARMS)
    found = seen(tmp_path / "s", 0)
    assert (found.done, found.total, found.begun, found.over, found.left) == (0, TOTAL, 0, False, None)
    assert (
        found.describe()
        == f"0 of {TOTAL} runs done, 0 begun; 0 epochs trained of {4 * TOTAL} at most; nothing has ended yet"
    )


def test_runs_that_ended_are_done_however_they_did(tmp_path: Path) -> None:
    store = write_study(tmp_path / "s", ARMS)
    for number, state in enumerate(("COMPLETE", "PRUNED", "FAIL", "RUNNING")):
        save(store, number, state, 0, None if state == "RUNNING" else 10)
    found = seen(tmp_path / "s", 12)
    assert (found.done, found.begun) == (3, 1)
    assert found.total == 3 + 1 + 2 + 10  # of two trials that may be complete, both are confirmed
    assert found.epochs == 36


def test_the_time_left_is_that_of_the_runs_that_are_left(tmp_path: Path) -> None:
    store = write_study(tmp_path / "s", ARMS)
    save(store, 0, "COMPLETE", 0, 10)
    save(store, 1, "RUNNING", 10, None)
    found = seen(tmp_path / "s", 14)
    assert found.left == pytest.approx((TOTAL - 1) * 10 - 4)
    save(store, 2, "RUNNING", 10, None)
    assert seen(tmp_path / "s", 14).left == pytest.approx(((TOTAL - 1) * 10 - 8) / 2)
    assert "about " in seen(tmp_path / "s", 14).describe()


def test_a_study_that_has_been_silent_for_long_may_have_been_interrupted(tmp_path: Path) -> None:
    store = write_study(tmp_path / "s", ARMS)
    save(store, 0, "COMPLETE", 0, 10)
    save(store, 1, "RUNNING", 10, None)
    assert not seen(tmp_path / "s", 100).silent
    late = seen(tmp_path / "s", 4000)
    assert late.silent
    assert late.describe().endswith(
        "the last news is 66 min old: if nothing runs any more, python -m dfkt resume goes on with it"
    )


def test_a_final_run_that_was_given_up_is_still_to_be_done(tmp_path: Path) -> None:
    arm = Arm("scratch", {1: 0.9, 2: 0.9}, present=[0, 1, 2])
    store = write_study(tmp_path / "s", [arm])
    row = trial(2, "scratch", "RUNNING", None) | {"started": at(0), "ended": at(5), "error": "its process died"}
    store.save("final", "scratch", row)
    found = seen(tmp_path / "s", 10)
    assert (found.done, found.total, found.begun, found.over) == (2, 3, 0, False)


def test_a_study_is_over_when_its_present_final_runs_are_done(tmp_path: Path) -> None:
    write_study(tmp_path / "a", [Arm("scratch", {1: 0.9, 2: None}, present=[0, 1])])
    assert seen(tmp_path / "a", 0).over
    skipped = Arm("dfkt", trials=[("FAIL", None)], planned=1, skipped="no trial was completed")
    write_study(tmp_path / "b", [replace(skipped)])
    assert seen(tmp_path / "b", 0).over


def test_a_study_in_which_something_runs_is_not_over(tmp_path: Path) -> None:
    store = write_study(tmp_path / "s", (Arm("dfkt", planned=1),))
    save(store, 0, "COMPLETE", 0, 10)
    for number in range(5):
        save(store, number, "COMPLETE", 10, 20, "final", seed=number + 1)
    assert seen(tmp_path / "s", 30).over
    save(store, 0, "RUNNING", 20, None, "confirmation")
    assert not seen(tmp_path / "s", 30).over


def test_arms_that_the_last_command_did_not_name_are_not_waited_for(tmp_path: Path) -> None:
    store = write_study(tmp_path / "s", (Arm("dfkt", planned=1), Arm("kd")))
    save(store, 0, "COMPLETE", 0, 10)
    for number in range(5):
        save(store, number, "COMPLETE", 10, 20, "final", seed=number + 1)
    assert not seen(tmp_path / "s", 30).over
    sessions = store.meta["sessions"]
    store.update_meta(sessions=[*sessions, sessions[-1] | {"arms": ["dfkt"]}])
    assert seen(tmp_path / "s", 30).over
