"""Tables say where what they hold side by side is not alike."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from made import Arm, trial, write_study

from dfkt.analysis.pages import study_page
from dfkt.store.study_store import read_study

SCRATCH = Arm("scratch", {1: 0.80, 2: 0.82, 3: 0.84})
KD = Arm("kd", {1: 0.79, 2: 0.79, 3: 0.78})
BEST = (("task", 0.7), ("task", 0.99))


def page(folder: Path, *arms: Arm, unfinished: Sequence[tuple[str, int]] = ()) -> list[str]:
    """Return the lines of a study's page; some of its final runs have not ended."""
    store = write_study(folder / "made", arms)
    for name, number in unfinished:
        (row,) = (row for row in store.rows("final", name) if row["number"] == number)
        store.save("final", name, row | {"state": "RUNNING", "test_accuracy": None})
    return study_page(read_study(folder / "made")).splitlines()


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ({1: 0.8, 2: 0.8}, "not over the same seeds: scratch (1, 2, 3); kd (1, 2)"),
        ({1: 0.8, 2: None, 3: 0.8}, "not over the same seeds: scratch (1, 2, 3); kd (1, 3)"),
        ({4: 0.8, 5: 0.8, 6: 0.8}, "not over the same seeds: scratch (1, 2, 3); kd (4, 5, 6)"),
        ({3: 0.8, 1: 0.8, 2: 0.8}, None),
    ],
)
def test_means_over_other_seeds_are_said_so(tests: dict[int, float | None], said: str | None, tmp_path: Path) -> None:
    lines = page(tmp_path, SCRATCH, replace(KD, tests=tests))
    assert [line for line in lines if line.startswith("not over")] == ([] if said is None else [said])


def test_without_a_seed_that_both_have_no_difference_is_told(tmp_path: Path) -> None:
    *_, last = page(tmp_path, SCRATCH, replace(KD, tests={4: 0.8}, curve=BEST))
    assert last == "best by val: kd, test 80.00 % over 1 of 3 seeds; its student that is best by val: students/kd-seed4"


def test_a_final_run_that_has_not_ended_is_said_to_be_missing(tmp_path: Path) -> None:
    lines = page(tmp_path, SCRATCH, KD, unfinished=[("kd", 0), ("kd", 2)])
    assert "unfinished, and in no table: kd seed 1, kd seed 3" in lines
    assert "not over the same seeds: scratch (1, 2, 3); kd (2)" in lines


@pytest.mark.parametrize(
    ("tests", "said"),
    [({1: 0.9, 2: None, 3: None}, "test 90.00 % over 1 of 3 seeds,"), ({1: 0.9, 2: 0.9, 3: 0.9}, "test 90.00 %,")],
)
def test_the_best_arm_says_when_only_some_of_its_runs_came_through(
    tests: dict[int, float | None], said: str, tmp_path: Path
) -> None:
    lines = page(tmp_path, SCRATCH, replace(KD, tests=tests, curve=BEST))
    (line,) = (line for line in lines if line.startswith("best by val"))
    assert line.startswith(f"best by val: kd, {said}")


@pytest.mark.parametrize("state", ["COMPLETE", "FAIL"])
def test_a_best_trial_whose_confirmation_failed_is_told_from_one_that_has_none(state: str, tmp_path: Path) -> None:
    searched = replace(KD, trials=[("COMPLETE", 0.5), ("COMPLETE", 0.9), ("COMPLETE", 0.6)], planned=3)
    store = write_study(tmp_path / "made", [SCRATCH, searched])
    store.save("confirmation", "kd", trial(0, "kd", "COMPLETE", 0.5))
    store.save("confirmation", "kd", trial(1, "kd", state, 0.8 if state == "COMPLETE" else None) | {"error": "it died"})
    text = study_page(read_study(tmp_path / "made"))
    rows = [line.split()[:3] for line in text.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]
    good = state == "COMPLETE"
    first, second = ["1", "90.00", "80.00" if good else "failed"], ["0", "50.00", "50.00"]
    assert rows[:2] == [first, second] if good else rows[0] == second
    assert first in rows
    assert "chosen by the mean of both" in text


def test_a_confirmation_that_failed_is_shown_though_no_other_was_made(tmp_path: Path) -> None:
    store = write_study(tmp_path / "made", [SCRATCH, replace(KD, trials=[("COMPLETE", 0.5)], planned=1)])
    store.save("confirmation", "kd", trial(0, "kd", "FAIL", None) | {"error": "it died"})
    text = study_page(read_study(tmp_path / "made"))
    assert "again %" in text
    assert " failed " in text


def test_an_arm_whose_search_never_got_anywhere_counts_as_not_searched_once_it_has_no_trials(tmp_path: Path) -> None:
    begun = replace(KD, trials=[("RUNNING", None)], planned=0)
    assert "at reference settings, not searched: scratch, kd" in page(tmp_path, SCRATCH, begun)
    ended = replace(KD, trials=[("FAIL", None)], planned=0)
    assert "at reference settings, not searched: scratch" in page(tmp_path / "other", SCRATCH, ended)
