"""A row is turned back into what it was made of, and the best trials are the best by the last `val` accuracy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dfkt.errors import StudyError
from dfkt.store.files import Storage
from dfkt.store.rows import best_trials, row_settings, trial_params
from dfkt.store.study_store import StudyStore, read_study

PARAMS = {"pattern": "dense-3", "rate": 0.5, "rounds": 2, "freeze": False}
SETTINGS = {"name": "dfkt", "pattern": "dense-3", "weights": [1.0, 0.5], "share": None}


def store(folder: Path) -> StudyStore:
    types: dict[str, type] = {name: type(value) for name, value in PARAMS.items()}
    return StudyStore.create(Storage(folder), types | {"weight": float}, [], {})


def trial(number: int, accuracy: float | None = None, state: str = "COMPLETE") -> dict[str, Any]:
    return {"number": number, "state": state, "last_val_accuracy": accuracy}


def test_parameters_are_plain_values_without_those_that_a_condition_left_out(tmp_path: Path) -> None:
    made = store(tmp_path)
    made.save("trial", "dfkt", trial(0) | {f"param_{name}": value for name, value in PARAMS.items()})
    for row in (read_study(tmp_path).trials.iloc[0], made.rows("trial", "dfkt")[0]):
        params = trial_params(row)
        assert params == PARAMS
        assert {type(value) for value in params.values()} == {str, float, int, bool}


def test_numpy_scalars_become_plain_values() -> None:
    params = trial_params({"param_a": np.float32(0.5), "param_b": np.bool_(True), "param_c": np.nan, "other": 1})
    assert params == {"a": 0.5, "b": True}
    assert [type(value) for value in params.values()] == [float, bool]


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    made = store(tmp_path)
    made.save("trial", "dfkt", trial(0) | {"settings": json.dumps(SETTINGS)})
    assert row_settings(read_study(tmp_path).trials.iloc[0]) == row_settings(made.rows("trial", "dfkt")[0]) == SETTINGS


@pytest.mark.parametrize("text", [None, math.nan, pd.NA, "", "{", "[1]", "null"])
def test_a_row_without_settings_is_refused_by_its_number(text: Any) -> None:
    with pytest.raises(StudyError, match="settings of run 7"):
        row_settings({"number": 7, "settings": text})


def test_the_best_come_first_and_the_earlier_where_equal(tmp_path: Path) -> None:
    made = store(tmp_path)
    rows = [
        trial(0, 0.5),
        trial(1, 0.99, "PRUNED"),
        trial(2, 0.7),
        trial(3, 0.98, "FAIL"),
        trial(4, None, "RUNNING"),
        trial(5, 0.7),
        trial(6),
        trial(7, 0.9),
    ]
    for row in rows[::-1]:
        made.save("trial", "dfkt", row)
    trials = read_study(tmp_path).trials
    assert best_trials(trials, 10).number.tolist() == [7, 2, 5, 0]
    assert best_trials(trials[::-1], 2).number.tolist() == [7, 2]
    assert best_trials(trials.head(0), 2).empty


def test_confirmed_trials_count_by_the_mean_of_both_seeds_and_stand_first() -> None:
    trials = pd.DataFrame([trial(0, 0.5), trial(1, 0.9), trial(2, 0.8), trial(3, 0.7), trial(4, None, "PRUNED")])
    again = pd.DataFrame([trial(1, 0.4), trial(2, 0.6), trial(3, None, "FAIL")])
    best = best_trials(trials, 9, again)

    assert list(best.number) == [2, 1, 3, 0]  # (0.8 + 0.6) / 2, (0.9 + 0.4) / 2, then those without a second seed
    assert best.again.tolist()[:2] == [0.6, 0.4]
    assert best.again.isna().tolist() == [False, False, True, True]
    assert list(best_trials(trials, 1).number) == [1]
    arms = pd.concat([trials.assign(arm="a"), trials.assign(arm="b")], ignore_index=True)
    both = best_trials(arms, 2, again.assign(arm="b"))
    assert list(zip(both.arm, both.number, strict=True)) == [("b", 2), ("b", 1)]
    assert list(best_trials(trials, 1, again.iloc[:0]).number) == [1]
