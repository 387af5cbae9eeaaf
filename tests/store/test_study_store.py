"""Every finished trial is in the store exactly once, whatever happened to the process that wrote it."""

import datetime
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from dfkt.errors import StudyError
from dfkt.store.study_store import EPOCH_SCHEMA, TRIAL_SCHEMA, StudyStore, environment, read_study
from dfkt.store.files import Storage

PARAMS = {"pattern": str, "weight": float, "rounds": int, "freeze": bool}
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "toy"


@pytest.fixture
def store(folder: Path) -> StudyStore:
    return StudyStore.create(Storage(folder), PARAMS, {"note": "toy"})


def records(count: int = 3, **values: Any) -> list[dict[str, Any]]:
    return [{"index": i, "epoch": i + 1.0, "phase": "task", "loss": 1 / (i + 1)} | values for i in range(count)]


def complete(number: int, **values: Any) -> dict[str, Any]:
    return {"number": number, "state": "COMPLETE", "last_val_accuracy": 0.5, "param_pattern": "dense-3"} | values


def test_a_row_comes_back_as_it_was_saved(store: StudyStore, folder: Path) -> None:
    row = complete(0, seed=3, started=NOW, ended=NOW, param_weight=1.5, param_rounds=2, param_freeze=True, workers=2)
    store.save_trial(row, records())
    saved = StudyStore.open(Storage(folder)).trial_rows()[0]
    assert {name: value for name, value in saved.items() if value is not None} == row
    assert [record["loss"] for record in store.trial_epochs(0)] == [1, 1 / 2, 1 / 3]


def test_numpy_scalars_are_values_too(store: StudyStore) -> None:
    values = {"param_weight": np.float32(0.5), "param_rounds": np.int64(2), "param_freeze": np.bool_(False)}
    store.save_trial(complete(0, **values))
    row = store.trial_rows()[0]
    assert (row["param_weight"], row["param_rounds"], row["param_freeze"]) == (0.5, 2, False)


def test_saving_again_changes_nothing(store: StudyStore, folder: Path) -> None:
    store.save_trial(complete(0), records())
    store.save_trial(complete(1), records())
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    store.save_trial(complete(0), records()[::-1])
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before


def test_a_running_trial_becomes_a_complete_one(store: StudyStore, folder: Path) -> None:
    store.save_trial({"number": 4, "state": "RUNNING", "error": "will go"}, records(1))
    store.save_trial(complete(4), records(3))
    study = read_study(folder)
    assert study.trials.state.tolist() == ["COMPLETE"]
    assert study.trials.error.isna().all()
    assert study.epochs["index"].tolist() == [0, 1, 2]


def test_epochs_stay_when_a_row_is_saved_without_any(store: StudyStore) -> None:
    store.save_trial({"number": 0, "state": "RUNNING"}, records(2))
    store.save_trial({"number": 0, "state": "FAIL", "error": "killed"})
    assert len(store.trial_epochs(0)) == 2


def test_a_failed_trial_keeps_null_not_zero_and_a_measured_nan(store: StudyStore, folder: Path) -> None:
    store.save_trial({"number": 0, "state": "FAIL", "error": "nan"}, records(1, loss=math.nan, step=None))
    row = store.trial_rows()[0]
    assert all(row[name] is None for name in row if name not in ("number", "state", "error"))
    record = store.trial_epochs(0)[0]
    assert math.isnan(record["loss"])
    assert record["val_loss"] is None
    study = read_study(folder)
    assert study.trials.last_val_accuracy.isna().all()
    assert study.trials.steps.isna().all()
    assert study.epochs.step.isna().all()


def test_trials_in_any_order_fill_one_part_for_64_and_are_read_sorted(store: StudyStore, folder: Path) -> None:
    for number in (128, 3, 63, 64, 0):
        store.save_trial(complete(number), records(2))
    assert sorted(path.name for path in (folder / "trials").iterdir()) == [f"part-0000{k}.parquet" for k in range(3)]
    study = read_study(folder)
    assert study.trials.number.tolist() == [0, 3, 63, 64, 128]
    assert study.epochs[["number", "index"]].to_numpy().tolist() == [
        [n, i] for n in (0, 3, 63, 64, 128) for i in (0, 1)
    ]


def test_a_store_that_was_opened_again_goes_on(store: StudyStore, folder: Path) -> None:
    store.save_trial(complete(0), records())
    StudyStore.open(Storage(folder)).save_trial(complete(1), records())
    assert read_study(folder).epochs.groupby("number").size().tolist() == [3, 3]


def test_more_parts_than_are_kept_in_memory(store: StudyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkt.store.study_store.PARTS_IN_MEMORY", 1)
    for number in (0, 64, 1, 65):
        store.save_trial(complete(number))
    assert [row["number"] for row in store.trial_rows()] == [0, 1, 64, 65]


def test_final_runs_have_the_test_accuracy_and_trials_have_not(store: StudyStore, folder: Path) -> None:
    store.save_final(complete(0, method="dfkt", seed=1, test_accuracy=0.75), records())
    with pytest.raises(StudyError, match="test_accuracy"):
        store.save_trial(complete(0, test_accuracy=0.75))
    assert store.final_rows()[0]["test_accuracy"] == 0.75
    study = read_study(folder)
    assert (len(study.trials), len(study.finals), len(study.final_epochs)) == (0, 1, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"param_other": 1.0}, "param_other"),
        ({"param_rounds": 1.5}, "param_rounds"),
        ({"param_rounds": True}, "param_rounds"),
        ({"param_weight": "1"}, "param_weight"),
        ({"param_freeze": 1}, "param_freeze"),
        ({"param_pattern": 3}, "param_pattern"),
        ({"workers": 2**40}, "workers"),
        ({"started": datetime.datetime(2026, 1, 1)}, "started"),
        ({"state": "DONE"}, "state"),
        ({"state": None}, "state"),
        ({"number": None}, "number"),
        ({"number": -1}, "number"),
    ],
)
def test_a_wrong_row_is_refused_by_the_columns_name_and_writes_nothing(
    store: StudyStore, folder: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(StudyError, match=named):
        store.save_trial(complete(0) | change, records())
    assert list(folder.rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("epochs", "named"),
    [
        ([{"index": 0, "other": 1.0}], "other"),
        ([{"epoch": 1.0}], "index"),
        ([{"index": 0}, {"index": 0}], "index"),
        ([{"index": 0, "number": 7}], "must be its own"),
        ([{"index": 0, "loss": "low"}], "loss"),
    ],
)
def test_a_wrong_epoch_record_is_refused(store: StudyStore, epochs: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(StudyError, match=named):
        store.save_trial(complete(0), epochs)
    assert store.trial_rows() == []


def test_there_is_one_study_in_a_folder(store: StudyStore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="needs a new folder"):
        StudyStore.create(Storage(folder), PARAMS, {})
    with pytest.raises(StudyError, match="has none"):
        read_study(tmp_path / "other")


def test_a_parameter_of_another_type_is_refused(folder: Path) -> None:
    with pytest.raises(StudyError, match="taps is list"):
        StudyStore.create(Storage(folder), {"taps": list}, {})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 9, "params": {}}', '{"format": 1, "params": {"a": "b"}}']
)
def test_a_damaged_study_file_is_refused(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "study.json").write_text(text)
    with pytest.raises(StudyError, match=r"study\.json"):
        read_study(folder)


def test_a_damaged_part_is_refused_by_name(store: StudyStore, folder: Path) -> None:
    store.save_trial(complete(0))
    (folder / "trials" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(StudyError, match="part-00000"):
        read_study(folder)


def test_meta_is_kept_and_changed_but_for_the_search_space(store: StudyStore, folder: Path) -> None:
    store.update_meta(sessions=[{"command": ["dfkt"]}])
    with pytest.raises(StudyError, match="params"):
        store.update_meta(params={})
    with pytest.raises(StudyError, match="JSON"):
        store.update_meta(value=math.nan)
    study = read_study(folder)
    assert study.meta == store.meta == json.loads((folder / "study.json").read_text())
    assert (study.name, study.meta["note"], study.meta["sessions"]) == ("toy", "toy", [{"command": ["dfkt"]}])


def test_an_empty_study_has_the_columns_and_types_of_a_full_one(store: StudyStore, folder: Path) -> None:
    empty = read_study(folder)
    store.save_trial(complete(0, started=NOW), records(round=1))
    store.save_final(complete(0))
    full = read_study(folder)
    for name in ("trials", "epochs", "finals", "final_epochs"):
        pd.testing.assert_series_equal(getattr(empty, name).dtypes, getattr(full, name).dtypes)
    assert full.epochs.columns.tolist() == EPOCH_SCHEMA.names
    assert set(full.trials.columns) == {*TRIAL_SCHEMA.names, *(f"param_{name}" for name in PARAMS)}
    types = full.trials.dtypes.astype(str)
    assert [types[name] for name in ("number", "seed", "epochs", "param_freeze", "param_rounds", "started")] == [
        "int64",
        "Int64",
        "float64",
        "boolean",
        "Int64",
        "datetime64[us, UTC]",
    ]


def test_any_tool_reads_the_folders_even_beside_what_a_kill_left(store: StudyStore, folder: Path) -> None:
    for number in (0, 1, 64):
        store.save_trial(complete(number, started=NOW), records())
    for name in ("trials", "epochs"):
        (folder / name / ".part-00000.parquet.0123.tmp").write_bytes(b"half a fi")
    for name, rows in (("trials", 3), ("epochs", 9)):
        assert len(pd.read_parquet(folder / name)) == rows
        assert ds.dataset(folder / name).count_rows() == ds.dataset(folder / name).to_table().num_rows == rows
        count = duckdb.sql(f"select count(distinct number), count(*) from read_parquet('{folder}/{name}/*.parquet')")
        assert count.fetchall() == [(3, rows)]
    assert len(read_study(folder).epochs) == 9


def test_a_study_behind_a_uri_is_the_same_study(store: StudyStore, folder: Path) -> None:
    store.save_trial(complete(0), records())
    assert read_study(folder.as_uri()).epochs.equals(read_study(str(folder)).epochs)


class Killed(BaseException):
    """The process is gone: nothing it does from here on happens."""


def kill_at(monkeypatch: pytest.MonkeyPatch, k: int, after: bool) -> None:
    """Let the k-th change to the disk be the last, before or after it is made."""
    done = 0

    def patch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > k or (done == k and not after):
                raise Killed
            result = real(*args, **kwargs)
            if done == k:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, operation)

    for name in ("makedirs", "fsync", "replace", "unlink"):
        patch(os, name)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("k", range(1, 7))
def test_a_kill_between_any_two_file_operations_leaves_every_finished_trial_once(
    store: StudyStore, folder: Path, monkeypatch: pytest.MonkeyPatch, k: int, after: bool
) -> None:
    store.save_trial(complete(0), records())
    store.save_trial({"number": 1, "state": "RUNNING"}, records(1))
    with monkeypatch.context() as patches:
        kill_at(patches, k, after)
        with pytest.raises(Killed):
            store.save_trial(complete(1), records(3))

    study = read_study(folder)
    last = k == 6 and after  # the row's rename is the sixth operation
    assert study.trials.number.tolist() == [0, 1]
    assert study.trials.state.tolist() == ["COMPLETE", "COMPLETE" if last else "RUNNING"]
    sizes = study.epochs.groupby("number").size()
    assert sizes[0] == 3
    assert sizes[1] == (3 if (k, after) >= (3, True) else 1)
    counts = {path.parent.name: pq.read_table(path).num_rows for path in folder.rglob("*.parquet")}
    assert counts == {"trials": 2, "epochs": 3 + sizes[1]}
    assert len(pd.read_parquet(folder / "trials")) == 2

    for resumed in (StudyStore.open(Storage(folder)), store):  # a new process, and the old one after an error
        resumed.save_trial(complete(1), records(3))
        again = read_study(folder)
        assert again.trials.state.tolist() == ["COMPLETE", "COMPLETE"]
        assert again.epochs.groupby("number").size().tolist() == [3, 3]


def test_epochs_without_their_row_are_left_out(
    store: StudyStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        kill_at(patches, 3, after=True)
        with pytest.raises(Killed):
            store.save_trial(complete(0), records())
    assert len(pd.read_parquet(folder / "epochs")) == 3
    assert len(read_study(folder).epochs) == 0


WRITER = """
import sys
from dfkt.store.study_store import StudyStore
from dfkt.store.files import Storage
store = StudyStore.create(Storage(sys.argv[1]), {}, {})
for number in range(10_000):
    store.save_trial({"number": number, "state": "RUNNING"})
    store.save_trial({"number": number, "state": "COMPLETE"}, [{"index": i} for i in range(5)])
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing_it_had_finished(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(3)]
    for i, folder in enumerate(folders):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while not read_study(folder).trials.size:
                pass
            time.sleep(0.2 + 0.0137 * i)
            writer.kill()
            said = [0, *(int(line) for line in writer.stdout.read().split())]
        study = read_study(folder)
        finished = study.trials[study.trials.state == "COMPLETE"]
        assert finished.number.tolist()[: len(said)] == said
        assert len(finished) <= len(said) + 1
        assert study.trials.number.is_unique
        sizes = study.epochs.groupby("number").size()
        assert (sizes.reindex(finished.number) == 5).all()
        assert len(pd.read_parquet(folder / "trials")) == len(study.trials)


def test_the_environment_is_what_figures_travel_with() -> None:
    found = json.loads(json.dumps(environment()))
    assert set(found) == {"versions", "commit", "dirty", "hardware", "command"}
    assert found["versions"]["pyarrow"]
    assert found["commit"] is None or len(found["commit"]) == 40
    assert (found["commit"] is None) == (found["dirty"] is None)
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**20
