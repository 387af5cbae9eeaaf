"""Every finished trial is in the store exactly once, whatever happened to the process that wrote it."""

import datetime
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from dfkt.config import to_dict
from dfkt.errors import StudyError
from dfkt.methods.scratch import Scratch
from dfkt.store.columns import epoch_schema, final_schema, trial_schema
from dfkt.store.files import Storage
from dfkt.store.study_store import STUDY_NAMES, StudyStore, claim, clear, hold, read_study
from dfkt.study.config import ArmConfig, StudyConfig

PARAMS: dict[str, type] = {"pattern": str, "weight": float, "rounds": int, "freeze": bool}
LOSSES = ["task", "flow"]
TABLES = ("trials", "epochs", "confirmations", "confirmation_epochs", "finals", "final_epochs")
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "toy"


@pytest.fixture
def store(place: Path) -> StudyStore:
    return StudyStore.create(Storage(place), PARAMS, LOSSES, {"note": "toy"})


def records(count: int = 3, **values: Any) -> list[dict[str, Any]]:
    return [{"index": i, "epoch": i + 1.0, "phase": "task", "loss": 1 / (i + 1)} | values for i in range(count)]


def complete(number: int, **values: Any) -> dict[str, Any]:
    return {"number": number, "state": "COMPLETE", "last_val_accuracy": 0.5, "param_pattern": "dense-3"} | values


def test_a_row_comes_back_as_it_was_saved(store: StudyStore, place: Path) -> None:
    row = complete(0, seed=3, started=NOW, ended=NOW, param_weight=1.5, param_rounds=2, param_freeze=True, workers=2)
    store.save("trial", "a", row, records())
    saved = StudyStore.open(Storage(place)).rows("trial", "a")[0]
    assert {name: value for name, value in saved.items() if value is not None} == row
    assert [record["loss"] for record in store.trial_epochs("a", 0)] == [1, 1 / 2, 1 / 3]


def test_the_records_at_rungs_are_those_that_were_looked_at_there(store: StudyStore) -> None:
    looks = [{"rung": None}, {"rung": 0.2, "rung_accuracy": 0.5}, {"rung": 0.4, "rung_accuracy": 0.75}]
    for number in (70, 3):
        made = [record | look for record, look in zip(records(3), looks, strict=True)]
        store.save("trial", "a", complete(number), made)
    store.save("trial", "b", complete(1), records())
    found = [(r["number"], r["rung"], r["rung_accuracy"]) for r in store.rung_records("a")]
    assert found == [(n, *look) for n in (3, 70) for look in ((0.2, 0.5), (0.4, 0.75))]
    assert store.rung_records("b") == []


def test_numpy_scalars_are_values_too(store: StudyStore) -> None:
    values = {"param_weight": np.float32(0.5), "param_rounds": np.int64(2), "param_freeze": np.bool_(False)}
    store.save("trial", "a", complete(0, **values))
    row = store.rows("trial", "a")[0]
    assert (row["param_weight"], row["param_rounds"], row["param_freeze"]) == (0.5, 2, False)


def test_saving_again_changes_nothing(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0), records())
    store.save("trial", "a", complete(1), records())
    before = {path: path.read_bytes() for path in place.rglob("*.parquet")}
    store.save("trial", "a", complete(0), records()[::-1])
    assert {path: path.read_bytes() for path in place.rglob("*.parquet")} == before


def test_a_running_trial_becomes_a_complete_one(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", {"number": 4, "state": "RUNNING", "error": "will go"}, records(1))
    store.save("trial", "a", complete(4), records(3))
    study = read_study(place)
    assert study.trials.state.tolist() == ["COMPLETE"]
    assert study.trials.error.isna().all()
    assert study.epochs["index"].tolist() == [0, 1, 2]


def test_epochs_stay_when_a_row_is_saved_without_any(store: StudyStore) -> None:
    store.save("trial", "a", {"number": 0, "state": "RUNNING"}, records(2))
    store.save("trial", "a", {"number": 0, "state": "FAIL", "error": "killed"})
    assert len(store.trial_epochs("a", 0)) == 2


def test_a_failed_trial_keeps_null_not_zero_and_a_measured_nan(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", {"number": 0, "state": "FAIL", "error": "nan"}, records(1, loss=math.nan, step=None))
    row = store.rows("trial", "a")[0]
    assert all(row[name] is None for name in row if name not in ("number", "state", "error"))
    record = store.trial_epochs("a", 0)[0]
    assert math.isnan(record["loss"])
    assert record["val_loss"] is None
    study = read_study(place)
    assert study.trials.last_val_accuracy.isna().all()
    assert study.trials.steps.isna().all()
    assert study.epochs.step.isna().all()


def test_a_store_that_was_opened_again_goes_on(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0), records())
    StudyStore.open(Storage(place)).save("trial", "a", complete(1), records())
    assert read_study(place).epochs.groupby("number").size().tolist() == [3, 3]


def test_final_runs_have_the_test_accuracy_and_trials_have_not(store: StudyStore, place: Path) -> None:
    store.save("final", "a", complete(0, method="dfkt", seed=1, test_accuracy=0.75), records())
    with pytest.raises(StudyError, match="test_accuracy"):
        store.save("trial", "a", complete(0, test_accuracy=0.75))
    assert store.rows("final", "a")[0]["test_accuracy"] == 0.75
    study = read_study(place)
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
    store: StudyStore, place: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(StudyError, match=named):
        store.save("trial", "a", complete(0) | change, records())
    assert list(place.rglob("*.parquet")) == []


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
        store.save("trial", "a", complete(0), epochs)
    assert store.rows("trial", "a") == []


def test_there_is_one_study_in_a_folder(store: StudyStore, place: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="needs a new folder"):
        StudyStore.create(Storage(place), PARAMS, LOSSES, {})
    with pytest.raises(StudyError, match="has none"):
        read_study(tmp_path / "other")


def test_a_parameter_of_another_type_is_refused(place: Path) -> None:
    with pytest.raises(StudyError, match="taps is list"):
        StudyStore.create(Storage(place), {"taps": list}, [], {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        b"\xff",
        "{}",
        '{"format": 3}',
        '{"format": 3, "params": {}}',
        '{"format": 3, "params": {"a": "b"}, "losses": []}',
        '{"format": 3, "params": [], "losses": []}',
        '{"format": 3, "params": {}, "losses": 1}',
    ],
)
def test_a_damaged_study_file_is_refused(place: Path, text: str | bytes) -> None:
    place.mkdir()
    (place / "study.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StudyError, match=r"study\.json in .* is damaged"):
        read_study(place)


@pytest.mark.parametrize("written", [1, 2, 4, "3"])
def test_a_study_of_another_format_is_refused_with_what_to_do(place: Path, written: Any) -> None:
    place.mkdir()
    (place / "study.json").write_text(json.dumps({"format": written, "params": {}, "config": {}}))
    told = f"must have format 3, but {place} has {written!r}. Finish or read that study with the version of dfkt"
    for use in (read_study, lambda path: StudyStore.open(Storage(path)), lambda path: clear(Storage(path))):
        with pytest.raises(StudyError, match=re.escape(told)) as caught:
            use(place)
        assert "\n" not in str(caught.value)
        assert "another --name" in str(caught.value)


def test_a_damaged_part_is_refused_by_name(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0))
    (place / "trials" / "arm=a" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(StudyError, match="part-00000"):
        read_study(place)


def test_meta_is_kept_and_changed_but_for_the_columns(store: StudyStore, place: Path) -> None:
    store.update_meta(sessions=[{"command": ("dfkt",)}])
    for name in ("params", "losses", "columns"):
        with pytest.raises(StudyError, match=name):
            store.update_meta(**{name: {}})
    with pytest.raises(StudyError, match="JSON"):
        store.update_meta(value=math.nan)
    study = read_study(place)
    assert study.meta == store.meta == json.loads((place / "study.json").read_text())
    assert (study.name, study.meta["note"], study.meta["sessions"]) == ("toy", "toy", [{"command": ["dfkt"]}])


def test_a_study_has_the_name_of_its_configuration_wherever_it_lies(store: StudyStore, place: Path) -> None:
    store.update_meta(config=to_dict(StudyConfig(name="digits")))
    assert read_study(place).name == "digits"


def test_an_empty_study_has_the_columns_and_types_of_a_full_one(store: StudyStore, place: Path) -> None:
    empty = read_study(place)
    store.save("trial", "a", complete(0, started=NOW), records(round=1))
    store.save("confirmation", "a", complete(0), records())
    store.save("final", "a", complete(0), records())
    full = read_study(place)
    for name in TABLES:
        assert (len(getattr(empty, name)), len(getattr(full, name)) > 0) == (0, True)
        pd.testing.assert_series_equal(getattr(empty, name).dtypes, getattr(full, name).dtypes)
    kinds = {name: kind.__name__ for name, kind in PARAMS.items()}
    assert full.trials.columns.tolist() == ["arm", *trial_schema(kinds).names]
    assert full.finals.columns.tolist() == ["arm", *final_schema(kinds).names]
    assert full.epochs.columns.tolist() == full.final_epochs.columns.tolist() == ["arm", *epoch_schema(LOSSES).names]
    types = full.trials.dtypes.astype(str)
    assert types.arm == types.state == types.settings
    assert [types[name] for name in ("number", "seed", "epochs", "param_freeze", "param_rounds", "started")] == [
        "int64",
        "Int64",
        "float64",
        "boolean",
        "Int64",
        "datetime64[us, UTC]",
    ]


def test_an_arms_runs_are_its_own(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0, seed=1), records(2))
    store.save("trial", "b", complete(0, seed=2), records(3))
    store.save("trial", "a", complete(0, seed=3), records(1))
    assert [row["seed"] for row in store.rows("trial", "a")] == [3]
    assert [row["seed"] for row in store.rows("trial", "b")] == [2]
    assert (len(store.trial_epochs("a", 0)), len(store.trial_epochs("b", 0))) == (1, 3)
    study = read_study(place)
    assert study.trials[["arm", "number", "seed"]].to_numpy().tolist() == [["a", 0, 3], ["b", 0, 2]]
    assert study.epochs.arm.tolist() == ["a"] + 3 * ["b"]


def test_arms_come_in_the_order_of_the_study_and_unknown_ones_after(store: StudyStore, place: Path) -> None:
    arms = tuple(ArmConfig(name=name, method=Scratch()) for name in ("dfkt", "idle", "007", "scratch", "b"))
    store.update_meta(config=to_dict(StudyConfig(name="toy", arms=arms)))
    for arm in ("z", "b", "scratch", "y", "007", "dfkt"):
        store.save("trial", arm, complete(1), records(2))
        store.save("final", arm, complete(0), records(1))
        store.save("trial", arm, complete(0), records(1))
    study = read_study(place)
    order = ["dfkt", "007", "scratch", "b", "y", "z"]
    assert study.finals.arm.tolist() == study.final_epochs.arm.tolist() == order
    assert study.trials[["arm", "number"]].to_numpy().tolist() == [[arm, n] for arm in order for n in (0, 1)]
    assert study.epochs[["arm", "number", "index"]].to_numpy().tolist() == [
        [arm, *at] for arm in order for at in ((0, 0), (1, 0), (1, 1))
    ]


def test_an_arm_whose_name_looks_like_a_number_stays_text(store: StudyStore, place: Path) -> None:
    store.save("trial", "007", complete(0), records())
    study = read_study(place)
    assert study.trials.arm.tolist() == ["007"]
    assert set(study.epochs.arm) == {"007"}


def test_an_arms_name_that_cannot_be_a_folders_is_refused_before_anything_is_written(
    store: StudyStore, place: Path
) -> None:
    for save in (partial(store.save, "trial"), partial(store.save, "final")):
        with pytest.raises(StudyError, match=r"arm's name .* '\.\./a'"):
            save("../a", complete(0), records())
    assert [path.name for path in place.parent.rglob("*") if path.is_file()] == ["study.json"]


def plain_reads(folder: Path) -> dict[str, pd.DataFrame]:
    """Return a table as the three tools read it that know nothing of this package."""
    # a cast, for DuckDB and pandas alike would turn an arm `007` into a number
    query = f"select * replace (arm::varchar as arm) from read_parquet('{folder}/**/*.parquet', hive_partitioning=true)"
    frames = {
        "pandas": pd.read_parquet(folder),
        "pyarrow": ds.dataset(folder, partitioning="hive").to_table().to_pandas(),
        "duckdb": duckdb.sql(query).df(),
    }
    return {name: frame.sort_values(["arm", "number"], kind="stable") for name, frame in frames.items()}


def test_any_tool_reads_a_table_as_one_with_its_arms_even_beside_what_a_kill_left(
    store: StudyStore, place: Path
) -> None:
    for arm, number in (("a", 0), ("a", 64), ("b", 0)):
        store.save("trial", arm, complete(number, started=NOW), records())
    for name in ("trials", "epochs"):
        (place / name / "arm=a" / ".part-00000.parquet.0123.tmp").write_bytes(b"half a fi")
    study = read_study(place)
    for name, each in (("trials", 1), ("epochs", 3)):
        for tool, frame in plain_reads(place / name).items():
            found = frame[["arm", "number"]].astype({"arm": "str"}).to_numpy().tolist()
            assert found == each * [["a", 0]] + each * [["a", 64]] + each * [["b", 0]], tool
            assert set(frame.columns) == set(getattr(study, name).columns), tool
    assert len(study.epochs) == 9


def test_a_later_arm_adds_columns_that_are_null_in_older_rows(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0), records())
    store.save("final", "a", complete(0), records())
    store.add_columns({"rounds": int, "temperature": float}, ["soft", "task"])
    store.save("trial", "b", complete(0, param_temperature=4.0), records(soft_loss=0.5))
    for study in (read_study(place), StudyStore.open(Storage(place))._read("")):
        assert study.trials.param_temperature.fillna(-1).tolist() == [-1, 4]
        assert study.epochs.soft_loss.fillna(-1).tolist() == [-1, -1, -1, 0.5, 0.5, 0.5]
        assert study.finals.param_temperature.isna().all()
        assert study.final_epochs.soft_loss.isna().all()
        assert study.trials.param_pattern.tolist() == ["dense-3", "dense-3"]
        assert study.meta["losses"] == [*LOSSES, "soft"]


def test_after_columns_were_added_any_tool_sees_them_in_all_parts(store: StudyStore, place: Path) -> None:
    for arm, number in (("a", 0), ("a", 64), ("b", 0)):
        store.save("trial", arm, complete(number), records())
    store.add_columns({"temperature": float}, ["soft"])
    store.save("trial", "c", complete(0, param_temperature=4.0), records(1, soft_loss=0.5))
    for tool, frame in plain_reads(place / "trials").items():
        assert frame.param_temperature.fillna(-1).tolist() == [-1, -1, -1, 4], tool
    for tool, frame in plain_reads(place / "epochs").items():
        assert frame.soft_loss.fillna(-1).tolist() == 9 * [-1] + [0.5], tool


def test_columns_that_are_there_are_not_written_again(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0), records())
    store.add_columns({"temperature": float}, ["soft"])
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    for again in (store, StudyStore.open(Storage(place))):
        again.add_columns({"weight": float, "temperature": float}, ["soft", "task"])
        again.add_columns({}, [])
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("params", "losses", "named"),
    [
        ({"rounds": float}, [], "rounds is int and float"),
        ({"freeze": int}, [], "freeze is bool and int"),
        ({"taps": list}, [], "taps is list"),
        ({}, ["val"], "val_loss"),
    ],
)
def test_columns_that_cannot_be_are_refused_and_nothing_is_written(
    store: StudyStore, place: Path, params: dict[str, type], losses: list[str], named: str
) -> None:
    before = (place / "study.json").read_bytes()
    with pytest.raises(StudyError, match=named):
        store.add_columns({"new": float} | params, ["new", *losses])
    assert (place / "study.json").read_bytes() == before
    store.save("trial", "a", complete(0), records())
    assert "param_new" not in read_study(place).trials


def test_a_reader_that_began_before_columns_were_added_reads_them_too(
    store: StudyStore, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save("trial", "a", complete(0), records())
    opened = StudyStore.open

    def then_add(storage: Storage) -> StudyStore:
        reader = opened(storage)
        store.add_columns({"temperature": float}, ["soft"])
        return reader

    monkeypatch.setattr(StudyStore, "open", then_add)
    study = read_study(place)
    assert study.trials.param_temperature.isna().tolist() == [True]
    assert "soft_loss" in study.epochs


def test_a_part_with_columns_of_nobody_is_refused_by_their_name(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0), records())
    study_file = (place / "study.json").read_bytes()
    store.add_columns({"temperature": float}, [])
    (place / "study.json").write_bytes(study_file)
    with pytest.raises(StudyError, match=r"param_temperature of type double, where study\.json implies no such column"):
        read_study(place)


def test_a_study_is_the_same_wherever_it_lies(folder: Storage) -> None:
    store = StudyStore.create(folder, PARAMS, LOSSES, {})
    store.save("trial", "a", complete(0), records())
    store.add_columns({"temperature": float}, ["soft"])
    StudyStore.open(folder).save("final", "b", complete(0, param_temperature=4.0), records(2))
    study = read_study(folder)
    assert study.name == "study"
    assert [len(getattr(study, name)) for name in TABLES] == [1, 3, 0, 0, 1, 2]
    assert [row["param_temperature"] for row in store.rows("trial", "a") + store.rows("final", "b")] == [None, 4]


class Killed(BaseException):
    """The process is gone: nothing it does from here on happens."""


def kill_at(
    monkeypatch: pytest.MonkeyPatch,
    k: int,
    after: bool,
    names: Sequence[str] = ("makedirs", "fsync", "replace", "unlink"),
) -> None:
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

    for name in names:
        patch(os, name)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("k", range(1, 7))
def test_a_kill_between_any_two_file_operations_leaves_every_finished_trial_once(
    store: StudyStore, place: Path, monkeypatch: pytest.MonkeyPatch, k: int, after: bool
) -> None:
    store.save("trial", "a", complete(0), records())
    store.save("trial", "a", {"number": 1, "state": "RUNNING"}, records(1))
    with monkeypatch.context() as patches:
        kill_at(patches, k, after)
        with pytest.raises(Killed):
            store.save("trial", "a", complete(1), records(3))

    study = read_study(place)
    last = k == 6 and after  # the row's rename is the sixth operation
    assert study.trials.number.tolist() == [0, 1]
    assert study.trials.state.tolist() == ["COMPLETE", "COMPLETE" if last else "RUNNING"]
    sizes = study.epochs.groupby("number").size()
    assert sizes[0] == 3
    assert sizes[1] == (3 if (k, after) >= (3, True) else 1)
    counts = {path.parent.parent.name: pq.ParquetFile(path).metadata.num_rows for path in place.rglob("*.parquet")}
    assert counts == {"trials": 2, "epochs": 3 + sizes[1]}
    assert len(pd.read_parquet(place / "trials")) == 2

    for resumed in (StudyStore.open(Storage(place)), store):  # a new process, and the old one after an error
        resumed.save("trial", "a", complete(1), records(3))
        again = read_study(place)
        assert again.trials.state.tolist() == ["COMPLETE", "COMPLETE"]
        assert again.epochs.groupby("number").size().tolist() == [3, 3]


def test_epochs_without_their_row_are_left_out(store: StudyStore, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        kill_at(patches, 1, after=True, names=["replace"])
        with pytest.raises(Killed):
            store.save("trial", "a", complete(0), records())
    assert len(pd.read_parquet(place / "epochs")) == 3
    assert len(read_study(place).epochs) == 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("k", range(1, 7))  # study.json, four parts, study.json again
def test_a_kill_while_columns_are_added_leaves_all_readable_and_is_mended_by_the_next_writing(
    store: StudyStore, place: Path, monkeypatch: pytest.MonkeyPatch, k: int, after: bool
) -> None:
    for number in (0, 64):
        store.save("trial", "a", complete(number), records())
    old = read_study(place)
    with monkeypatch.context() as patches:
        kill_at(patches, k, after, names=["replace"])
        with pytest.raises(Killed):
            store.add_columns({"temperature": float}, ["soft"])

    for name in ("trials", "epochs"):
        read, before = getattr(read_study(place), name), getattr(old, name)
        pd.testing.assert_frame_equal(read[before.columns], before)
        assert len(read.columns) == len(before.columns) + ((k, after) >= (1, True))
        assert len(pd.read_parquet(place / name)) == len(before)

    for mend in (
        lambda s: s.save("trial", "a", complete(64)),
        lambda s: s.add_columns({"temperature": float}, ["soft"]),
    ):
        mend(StudyStore.open(Storage(place)))
        for name in ("trials", "epochs"):
            schemas = [pq.read_schema(path) for path in (place / name).rglob("*.parquet")]
            assert schemas[0].equals(schemas[1])
    for name, column in (("trials", "param_temperature"), ("epochs", "soft_loss")):
        for tool, frame in plain_reads(place / name).items():
            assert frame[column].isna().all(), tool
            assert len(frame) == len(getattr(old, name)), tool


def test_a_store_goes_on_after_an_error_while_columns_were_added(
    store: StudyStore, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 64):
        store.save("trial", "a", complete(number), records())
    with monkeypatch.context() as patches:
        kill_at(patches, 2, after=True, names=["replace"])
        with pytest.raises(Killed):
            store.add_columns({"temperature": float}, ["soft"])
    store.save("trial", "b", complete(0, param_temperature=4.0), records(soft_loss=0.5))
    assert read_study(place).trials.param_temperature.fillna(-1).tolist() == [-1, -1, 4]
    assert len({str(pq.read_schema(path)) for path in (place / "epochs").rglob("*.parquet")}) == 1


def test_columns_that_this_version_has_beyond_an_older_one_come_into_all_parts(store: StudyStore, place: Path) -> None:
    store.save("trial", "a", complete(0, settings="{}"), records())
    path = place / "trials" / "arm=a" / "part-00000.parquet"
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["settings"]), path)
    meta = json.loads((place / "study.json").read_text())
    meta["columns"]["trials"] = meta["columns"]["trials"].replace(" settings", "")
    (place / "study.json").write_text(json.dumps(meta))

    assert read_study(place).trials.settings.isna().tolist() == [True]
    StudyStore.open(Storage(place)).save("trial", "b", complete(0, settings="{}"))
    assert plain_reads(place / "trials")["duckdb"].settings.isna().tolist() == [True, False]


def test_a_folder_with_foreign_files_is_no_studys_and_stays_as_it_is(folder: Storage) -> None:
    folder.write("keep", b"thesis")
    folder.sub("trials").write("mine", b"too")
    for use in (claim, clear, lambda storage: hold(storage).__enter__()):
        with pytest.raises(StudyError, match=r"must be empty or hold a study\.json, but .*study holds keep, trials"):
            use(folder)
    assert folder.entries() == ["keep", "trials"]  # no lock either
    assert folder.read("keep") == b"thesis"
    assert folder.sub("trials").read("mine") == b"too"


@pytest.mark.parametrize("name", [".notes", ".git.tmp", "teacher.pt", "trials", ".probe-mine"])
def test_no_name_makes_a_foreign_folder_a_studys(folder: Storage, name: str) -> None:
    folder.write(name, b"")
    with pytest.raises(StudyError, match="must be empty"):
        claim(folder)


def test_an_empty_folder_may_become_a_studys_even_beside_what_a_kill_left(folder: Storage) -> None:
    claim(folder)
    assert folder.entries() == []
    for name in (".lock", f".probe-{32 * 'a'}", f".study.json.{32 * '0'}.tmp"):
        folder.write(name, b"")
    claim(folder)
    with hold(folder):
        StudyStore.create(folder, PARAMS, LOSSES, {})
    with hold(folder):
        assert StudyStore.open(folder).rows("trial", "a") == []


def test_a_folder_that_cannot_be_listed_is_refused(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Storage, "_scan", denied)
    with pytest.raises(StudyError, match=r"must be readable, but .*study is not: .*not yours"):
        claim(folder)


def test_what_came_between_the_claim_and_the_lock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path / "study")
    check = Storage.check_writable

    def other_program(self: Storage) -> None:
        check(self)
        self.write("keep", b"thesis")

    monkeypatch.setattr(Storage, "check_writable", other_program)
    with pytest.raises(StudyError, match="holds keep"), hold(storage):
        pass
    with storage.lock():  # and the lock was given back
        assert storage.read("keep") == b"thesis"


def fill(storage: Storage) -> None:
    """Write all that a study writes, and beside it what it does not."""
    store = StudyStore.create(storage, PARAMS, LOSSES, {})
    for kind in ("trial", "confirmation", "final"):
        store.save(kind, "a", complete(0), records())
    for name in ("teacher.pt", "optuna.journal", "optuna.journal.lock", "optuna.journal.old", "errors.txt", "keep"):
        storage.write(name, b"")
    for name in ("students", "runs", "ray", "plots"):
        storage.sub(name, "below").write("file", b"")


def test_clearing_takes_what_a_study_writes_and_nothing_else(folder: Storage) -> None:
    fill(folder)
    assert {*folder.entries()} == {*STUDY_NAMES, "keep", "plots"}
    clear(folder)
    assert folder.entries() == ["keep", "plots"]
    assert folder.sub("plots", "below").names() == ["file"]


def test_clearing_what_is_hardly_a_study_or_nothing_is_no_error(folder: Storage) -> None:
    clear(folder)
    StudyStore.create(folder, PARAMS, LOSSES, {})
    clear(folder)
    assert folder.entries() == []


def test_clearing_keeps_the_lock_that_is_held(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "study")
    with hold(storage):
        StudyStore.create(storage, PARAMS, LOSSES, {})
        clear(storage)
        assert storage.entries() == [".lock"]
        with pytest.raises(StudyError, match="in use by"), hold(Storage(tmp_path / "study")):
            pass
        StudyStore.create(storage, PARAMS, LOSSES, {})


def test_clearing_refuses_a_folder_whose_study_file_is_another_programs(folder: Storage) -> None:
    folder.write("study.json", b'{"title": "my thesis"}')
    folder.sub("students").write("names", b"")
    with pytest.raises(StudyError, match="is damaged"):
        clear(folder)
    assert folder.entries() == ["students", "study.json"]


@pytest.mark.parametrize("k", range(1, 5))
def test_a_kill_while_a_study_is_cleared_leaves_a_folder_that_is_still_a_studys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    storage = Storage(tmp_path / "study")
    fill(storage)
    storage.delete("keep")
    storage.sub("plots").delete_all()
    with monkeypatch.context() as patches:
        left = iter(range(k - 1))

        def delete(self: Storage, name: str, real: Any = Storage.delete) -> None:
            if next(left, None) is None:
                raise Killed
            real(self, name)

        patches.setattr(Storage, "delete", delete)
        with pytest.raises(Killed):
            clear(storage)
    claim(storage)
    clear(storage)
    assert storage.entries() == []


def test_a_reader_beside_a_writer_sees_every_finished_run_with_its_epochs(store: StudyStore, place: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        for number in itertools.count():
            for arm in ("a", "b"):
                store.save("trial", arm, {"number": number, "state": "RUNNING"})
                store.save("trial", arm, complete(number), records())
            if number % 8 == 0:
                store.add_columns({f"p{number}": float}, [f"l{number}"])
            if stop.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        seen = []
        while len(set(seen)) < 5 and not writing.done():
            study = read_study(place)
            finished = study.trials[study.trials.state == "COMPLETE"]
            keys = pd.MultiIndex.from_frame(finished[["arm", "number"]])
            assert keys.is_unique
            assert (study.epochs.groupby(["arm", "number"]).size().reindex(keys) == 3).all()
            seen.append(len(finished))
        stop.set()
        writing.result()
    assert seen == sorted(seen)
    assert len(set(seen)) == 5


WRITER = """
import sys
from dfkt.store.study_store import StudyStore
from dfkt.store.files import Storage
store = StudyStore.create(Storage(sys.argv[1]), {}, [], {})
for number in range(10_000):
    store.save("trial", "a", {"number": number, "state": "RUNNING"})
    store.save("trial", "a", {"number": number, "state": "COMPLETE"}, [{"index": i} for i in range(5)])
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing_it_had_finished(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(3)]
    for i, place in enumerate(folders):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while not read_study(place).trials.size:
                pass
            time.sleep(0.2 + 0.0137 * i)
            writer.kill()
            said = [0, *(int(line) for line in writer.stdout.read().split())]
        study = read_study(place)
        finished = study.trials[study.trials.state == "COMPLETE"]
        assert finished.number.tolist()[: len(said)] == said
        assert len(finished) <= len(said) + 1
        assert study.trials.number.is_unique
        sizes = study.epochs.groupby("number").size()
        assert (sizes.reindex(finished.number) == 5).all()
        assert len(pd.read_parquet(place / "trials")) == len(study.trials)
