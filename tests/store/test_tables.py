"""A table's parts hold every run once, with the columns that the table has now."""

import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfkt.errors import StudyError
from dfkt.store import tables as module
from dfkt.store.columns import to_table
from dfkt.store.files import Storage
from dfkt.store.tables import PartTable, check_arm, to_frame

NUMBER = pa.field("number", pa.int64(), nullable=False)
SCHEMA = pa.schema([NUMBER, ("value", pa.float64())])
WIDER = pa.schema([NUMBER, ("text", pa.string()), ("value", pa.float64()), ("count", pa.int64())])


def put(table: PartTable, arm: str, number: int, **values: Any) -> None:
    table.put(arm, number, to_table(table.schema, [{"number": number} | values]))


def numbers(table: PartTable, arm: str) -> list[int]:
    return [row["number"] for row in table.read(arm).to_pylist()]


def test_runs_in_any_order_fill_one_part_for_64_and_are_read_sorted(folder: Storage) -> None:
    table = PartTable(folder, SCHEMA)
    for number in (128, 3, 63, 64, 0):
        put(table, "a", number)
    assert folder.sub("arm=a").names() == [f"part-0000{k}.parquet" for k in range(3)]
    assert numbers(table, "a") == numbers(PartTable(folder, SCHEMA), "a") == [0, 3, 63, 64, 128]


def test_rows_with_a_value_in_a_column_are_found_in_all_parts(folder: Storage) -> None:
    table = PartTable(folder, SCHEMA)
    for number in range(0, 200, 10):
        put(table, "a", number, value=None if number % 50 else 1.0)
    assert table.read_with("a", "value").to_pylist() == [{"number": n, "value": 1.0} for n in (0, 50, 100, 150)]
    assert table.read_with("none", "value").to_pylist() == []


def test_parts_are_read_in_the_order_of_their_numbers_not_of_their_names(tmp_path: Path) -> None:
    table = PartTable(Storage(tmp_path), SCHEMA)
    late = 64 * 100_000
    for number in (late, 64 * 99_999):
        put(table, "a", number)
    assert numbers(table, "a") == [64 * 99_999, late]


def test_the_same_number_in_two_arms_is_two_runs(folder: Storage) -> None:
    table = PartTable(folder, SCHEMA)
    put(table, "a", 5, value=1)
    put(table, "b", 5, value=2)
    put(table, "a", 5, value=3)
    assert {arm: rows.to_pylist() for arm, rows in table.read_all().items()} == {
        "a": [{"number": 5, "value": 3}],
        "b": [{"number": 5, "value": 2}],
    }
    assert table.get("b", 5).to_pylist() == [{"number": 5, "value": 2}]
    assert numbers(table, "c") == []


def test_more_parts_than_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS_IN_MEMORY", 1)
    table = PartTable(Storage(tmp_path), SCHEMA)
    for arm, number in (("a", 0), ("b", 0), ("a", 64), ("a", 1), ("b", 1), ("a", 65)):
        put(table, arm, number)
    assert (numbers(table, "a"), numbers(table, "b")) == ([0, 1, 64, 65], [0, 1])


def test_columns_that_a_file_lacks_are_null(folder: Storage) -> None:
    put(PartTable(folder, SCHEMA), "a", 0, value=0.5)
    wider = PartTable(folder, WIDER)
    put(wider, "a", 1, text="x")
    assert wider.read("a").to_pylist() == [
        {"number": 0, "text": None, "value": 0.5, "count": None},
        {"number": 1, "text": "x", "value": None, "count": None},
    ]


def test_unifying_gives_all_parts_all_columns_and_rewrites_only_those_without(folder: Storage, tmp_path: Path) -> None:
    old = PartTable(folder, SCHEMA)
    for arm, number in (("a", 0), ("a", 64), ("b", 0)):
        put(old, arm, number, value=0.5)
    wider = PartTable(folder, WIDER)
    put(wider, "b", 1)
    at = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    wider.unify()
    assert all(pq.read_schema(path).equals(WIDER) for path in at)
    rewritten = {path.parent.name for path, then in at.items() if path.stat().st_mtime_ns != then}
    assert rewritten == {"arm=a"}
    assert [row["value"] for row in wider.read("a").to_pylist()] == [0.5, 0.5]


def test_unifying_begins_with_the_file_from_which_other_tools_take_the_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = PartTable(Storage(tmp_path), SCHEMA)
    for arm in ("a", "a-b", "a.b"):  # '-' and '.' come before the '/' that ends a folder's name
        put(old, arm, 0)

    def full(*_: Any) -> None:
        raise OSError("disk full")

    replace, done = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: full() if done else done.append(replace(*paths)))
    with pytest.raises(OSError, match="disk full"):
        PartTable(Storage(tmp_path), WIDER).unify()
    assert set(WIDER.names) < set(pd.read_parquet(tmp_path).columns)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (pa.schema([*SCHEMA, ("other", pa.int64())]), "other of type int64, where study.json implies no such column"),
        (pa.schema([NUMBER, ("value", pa.int64())]), "value of type int64, .* value of type double"),
        (pa.schema([("value", pa.float64())]), "no column number"),
        (pa.schema([("number", pa.int64()), *list(SCHEMA)[1:]]), "number of type int64, .* int64, not null"),
    ],
)
def test_a_part_with_other_columns_is_refused_by_their_name(tmp_path: Path, found: Any, named: str) -> None:
    (tmp_path / "arm=a").mkdir()
    pq.write_table(found.empty_table(), tmp_path / "arm=a" / "part-00000.parquet")
    for read in (PartTable(Storage(tmp_path), SCHEMA).read_all, lambda: PartTable(Storage(tmp_path), SCHEMA).read("a")):
        with pytest.raises(StudyError, match=f"part-00000.*{named}"):
            read()


@pytest.mark.parametrize("error", [None, PermissionError("not yours")])
def test_a_part_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    table = PartTable(Storage(tmp_path), SCHEMA)
    put(table, "a", 0)
    (tmp_path / "arm=a" / "part-00000.parquet").write_bytes(b"PAR1")

    def read(*_: Any) -> None:
        raise error or AssertionError

    if error:
        monkeypatch.setattr(Storage, "read", read)
    with pytest.raises(StudyError, match=r"part-00000\.parquet in .*arm=a cannot be read"):
        table.read("a")


def test_what_is_no_part_of_an_arm_is_passed_over(tmp_path: Path) -> None:
    table = PartTable(Storage(tmp_path), SCHEMA)
    put(table, "a", 0)
    for name in ("notes", "arm=.b", "arm=b c", "other=b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00000.parquet").write_bytes(b"no table")
    (tmp_path / "arm=a" / "notes.parquet").write_bytes(b"no table")
    assert list(table.read_all()) == ["a"]


@pytest.mark.parametrize("name", ["dfkt", "007", "dfkt-without_x", "a.b", "-", "_"])
def test_an_arms_name_is_of_letters_digits_and_some_marks(name: str) -> None:
    check_arm(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "../a", "a b", "a=b", "a\n", "é", "a%20", "__HIVE_DEFAULT_PARTITION__"]
)
def test_an_arms_name_that_cannot_be_a_folders_is_refused_and_writes_nothing(tmp_path: Path, name: str) -> None:
    table = PartTable(Storage(tmp_path / "t"), SCHEMA)
    for use in (lambda: put(table, name, 0), lambda: table.read(name), lambda: table.get(name, 0)):
        with pytest.raises(StudyError, match=re.escape(repr(name))):
            use()
    assert list(tmp_path.iterdir()) == []


def test_a_frame_has_the_arm_as_text_in_its_first_column() -> None:
    rows = to_table(WIDER, [{"number": 1, "text": "x"}])
    frame = to_frame(WIDER, {"b": rows, "007": rows})
    assert frame.columns.tolist() == ["arm", *WIDER.names]
    assert frame.arm.tolist() == ["b", "007"]
    assert frame.arm.dtype == frame.text.dtype
    pd.testing.assert_series_equal(to_frame(WIDER, {}).dtypes, frame.dtypes)
    assert frame.dtypes.astype(str)[["number", "value", "count"]].tolist() == ["int64", "float64", "Int64"]
