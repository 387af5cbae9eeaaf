"""A study's tables as text."""

from pathlib import Path
from typing import Any

import pytest

from dfkt.config import RunConfig, TrainConfig, to_dict
from dfkt.errors import StudyError
from dfkt.store.rows import best_trials, finals_table, study_report, trial_config, trial_params, trials_table
from dfkt.store.study_store import Study, StudyStore, read_study
from dfkt.methods.space import SearchSpace, resolve
from dfkt.store.files import Storage

SPACE = SearchSpace(4)
META = {
    "config": {"base": {"method": "dfkt", "student": {"name": "resnet8"}}},
    "teacher": {"network": "resnet26", "val_accuracy": 0.9, "test_accuracy": 0.8912},
}
PARAMS = SPACE.start() | {"pattern": "dense-3"}


def trial(number: int, state: str = "COMPLETE", accuracy: float | None = None, **more: Any) -> dict[str, Any]:
    row = {"number": number, "state": state, "method": "dfkt", "seed": 0, "epochs": 12.0, "wall_seconds": 60.4}
    row |= {f"param_{name}": value for name, value in PARAMS.items()}
    return row | {"last_val_accuracy": accuracy, "best_val_accuracy": accuracy} | more


def final(number: int, method: str, accuracy: float | None, state: str = "COMPLETE", seed: int = 1) -> dict[str, Any]:
    row: dict[str, Any] = {"number": number, "state": state, "method": method, "seed": seed, "epochs": 12.0}
    return row | {"test_accuracy": accuracy, "last_val_accuracy": accuracy, "device_seconds": 30.0}


def study(folder: Path, trials: list[dict[str, Any]], finals: list[dict[str, Any]], meta: Any = META) -> Study:
    store = StudyStore.create(Storage(folder / "made"), SPACE.types(), meta)
    for row in trials:
        store.save_trial(row)
    for row in finals:
        store.save_final(row)
    return read_study(folder / "made")


def cells(table: str) -> list[list[str]]:
    """Return a table's cells; columns are two blanks apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]


def test_methods_stand_side_by_side_with_mean_and_standard_deviation(tmp_path):
    rows = [
        *(final(k, "scratch", a, seed=k) for k, a in enumerate((0.80, 0.82))),
        *(final(2 + k, "dfkt", a, seed=k) for k, a in enumerate((0.84, 0.88))),
        *(final(4 + k, "kd", a, seed=k) for k, a in enumerate((0.79, 0.79))),
    ]
    table = cells(finals_table(study(tmp_path, [], rows)))

    assert table[0] == ["method", "seeds", "test %", "over scratch", "val %", "device s", "epochs"]
    assert table[1] == ["scratch", "2", "81.00 ± 1.41", "81.00 ± 1.41", "30.0", "12"]
    assert table[2] == ["kd", "2", "79.00 ± 0.00", "-2.00", "79.00 ± 0.00", "30.0", "12"]
    assert table[3] == ["dfkt", "2", "86.00 ± 2.83", "+5.00", "86.00 ± 2.83", "30.0", "12"]  # last, whatever its number


def test_one_seed_has_no_spread(tmp_path):
    table = finals_table(study(tmp_path, [], [final(0, "scratch", 0.8), final(1, "dfkt", 0.9)]))

    assert "±" not in table
    assert "nan" not in table
    assert "90.00" in table


def test_without_scratch_nothing_stands_over_it(tmp_path):
    table = finals_table(study(tmp_path, [], [final(0, "kd", 0.8), final(1, "dfkt", 0.9)]))

    assert "+" not in table
    assert "nan" not in table


def test_failed_final_runs_are_counted_and_left_out(tmp_path):
    rows = [final(0, "scratch", 0.8), final(1, "scratch", None, "FAIL", 2), final(2, "dfkt", None, "FAIL")]
    table = finals_table(study(tmp_path, [], rows))

    assert cells(table)[1][:3] == ["scratch", "1", "80.00"]
    assert "dfkt" not in table
    assert table.endswith("2 final runs failed and are not in the table.")


def test_final_runs_that_all_failed_are_no_missing_ones(tmp_path):
    assert finals_table(study(tmp_path, [], [final(0, "dfkt", None, "FAIL")])) == "no final run is complete, 1 failed"


def test_a_study_before_its_final_runs_says_so(tmp_path):
    assert finals_table(study(tmp_path, [trial(0, accuracy=0.5)], [])) == "no final runs yet"


def test_a_study_without_trials_says_so(tmp_path):
    made = study(tmp_path, [], [], {"config": META["config"]})

    assert trials_table(made).startswith("0 trials: no trials yet\n")
    assert "no final runs yet" in study_report(made)
    assert "teacher" not in study_report(made)


def test_trials_are_counted_by_how_they_ended_and_the_best_come_first(tmp_path):
    rows = [
        trial(0, accuracy=0.5),
        trial(1, "PRUNED", 0.99),
        trial(2, accuracy=0.7),
        trial(3, "FAIL", error="The loss became nan"),
        trial(4, "RUNNING"),
        trial(5, accuracy=0.7),
        trial(6, "PRUNED", 0.1),
    ]
    made = study(tmp_path, rows, [])
    lines = trials_table(made, 2).splitlines()

    assert lines[0] == "7 trials: 3 complete, 2 stopped early, 1 failed, 1 unfinished"
    assert [line.split()[0] for line in lines[2:]] == ["2", "5"]
    assert lines[2].split()[1:5] == ["70.00", "70.00", "12.0", "60"]
    assert "dense-3 cumulative x1" in lines[2]
    assert best_trials(made.trials, 10).number.tolist() == [2, 5, 0]


def test_parameters_that_a_condition_left_out_are_absent_and_the_others_plain(tmp_path):
    made = study(tmp_path, [trial(0, accuracy=0.5)], [])
    params = trial_params(made.trials.iloc[0])

    assert params == PARAMS
    assert all(type(value) in (str, int, float, bool) for value in params.values())


@pytest.mark.parametrize("teacher", [META["teacher"], {"network": "resnet26", "val_accuracy": 0.9}])
def test_the_report_names_teacher_and_student(tmp_path, teacher):
    report = study_report(
        study(tmp_path, [trial(0, accuracy=0.5)], [final(0, "dfkt", 0.8)], META | {"teacher": teacher})
    )

    assert ("teacher resnet26: val 90.00 %, test 89.12 %" in report) == ("test_accuracy" in teacher)
    assert "teacher resnet26: val 90.00 %" in report
    assert "student resnet8" in report


def test_a_trials_configuration_is_what_it_ran_with(tmp_path: Path) -> None:
    base = RunConfig(train=TrainConfig(epochs=7))
    store = StudyStore.create(Storage(tmp_path / "s"), SPACE.types(), {"config": {"base": to_dict(base)}})
    for number, accuracy in enumerate((0.5, 0.9)):
        store.save_trial(trial(number, accuracy=accuracy, param_flow_lr=0.25 + number))
    study = read_study(tmp_path / "s")

    assert trial_config(study) == trial_config(study, 1)
    assert trial_config(study, 0) == resolve(PARAMS | {"flow_lr": 0.25}, base)
    with pytest.raises(StudyError, match="has no trial 2"):
        trial_config(study, 2)


def test_runs_of_an_earlier_winner_stay_out_of_the_table(tmp_path: Path) -> None:
    store = StudyStore.create(Storage(tmp_path / "s"), SPACE.types(), META | {"present_finals": [0, 2]})
    for number, (method, accuracy) in enumerate([("scratch", 0.5), ("dfkt", 0.1), ("dfkt", 0.7)]):
        store.save_final(final(number, method, accuracy))

    table = finals_table(read_study(tmp_path / "s"))

    assert "70.00" in table
    assert "10.00" not in table
    assert "40.00" not in table  # the mean of both
