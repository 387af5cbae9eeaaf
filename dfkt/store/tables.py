"""Typed tables in Parquet parts that any tool reads.

::

    trials/arm=dfkt/part-00000.parquet    runs 0 to 63 of the arm `dfkt`

A run's part is ``number // 64``, and a part is only ever replaced as a whole, by one atomic write. So there is no
compaction, during which a reader could see a run twice or miss it; saving the same run again changes nothing; the
number of files stays runs / 64; and a kill at any instant leaves every file readable.

The arm is in the folder's name alone, as tools that know hive partitions expect it; to them, and to
:func:`to_frame`, a table is one with a column ``arm``. All parts of a table shall have the same columns, because
those tools take them from the first file. Where a part lacks some, they read as null here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dfkt.errors import StudyError, one_line
from dfkt.store.columns import STATES, to_table
from dfkt.store.files import Storage

RUNS_PER_PART = 64
PARTS_IN_MEMORY = 32
REMEDY = "Put a copy of the file back, or move it away: when the study is resumed, runs without a row are done again."


def check_arm(name: str) -> None:
    """Refuse an arm whose name cannot be a folder's, the same for every tool.

    Raises:
        StudyError: If the name has other characters than letters, digits, ``.``, ``_`` and ``-``, or begins with ``.``.
    """
    if not _is_arm(name):
        raise StudyError(
            f"An arm's name must be of letters, digits, '.', '_' and '-', the first no '.', but got {name!r}."
        )


def _is_arm(name: str) -> bool:
    null = "__HIVE_DEFAULT_PARTITION__"  # so tools that know hive partitions write it
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None and name != null


class PartTable:
    """One table of a study, in parts of 64 runs of one arm, sorted by number; the newest parts are kept in memory.

    Args:
        folder: Holds a folder ``arm=ARM`` for every arm that has rows.
        schema: The table's columns, first of them ``number``.
    """

    def __init__(self, folder: Storage, schema: Any) -> None:
        self.folder, self.schema = folder, schema
        self.once = "index" not in schema.names
        """Whether a run has one row."""
        self._recent: dict[tuple[str, int], Any] = {}

    def get(self, arm: str, number: int) -> Any:
        """Return the rows of one run."""
        part = self._part(arm, number // RUNS_PER_PART)
        return part.filter(pc.equal(part["number"], number))

    def put(self, arm: str, number: int, rows: Any) -> None:
        """Replace the rows of one run."""
        k = number // RUNS_PER_PART
        old = self._part(arm, k)
        start, stop = np.searchsorted(old["number"].to_numpy(), [number, number + 1])
        table = pa.concat_tables([old.slice(0, start), rows, old.slice(stop)]).combine_chunks()
        self._write(arm, k, table)
        self._keep(arm, k, table)

    def read(self, arm: str) -> Any:
        """Return all rows of one arm, by number."""
        return self._concat(self._load(arm, k) for k in self._numbers(arm))

    def read_with(self, arm: str, column: str) -> Any:
        """Return those rows of one arm that have a value in a column, by number."""
        parts = (self._load(arm, k) for k in self._numbers(arm))
        return self._concat(part.filter(pc.is_valid(part[column])) for part in parts)

    def read_all(self) -> dict[str, Any]:
        """Return all rows, by arm; an arm without a part is absent."""
        with ThreadPoolExecutor(8) as pool:
            parts = self._parts(pool)
            tables = list(pool.map(lambda part: self._load(*part), parts))
        arms = dict.fromkeys(arm for arm, _ in parts)
        return {arm: self._concat(t for (a, _), t in zip(parts, tables, strict=True) if a == arm) for arm in arms}

    def unify(self) -> None:
        """Rewrite the parts that lack columns; a kill in between loses nothing, and the next call goes on.

        It begins with the first file, from which other tools take the columns: they see all of them from then on.
        """
        with ThreadPoolExecutor(8) as pool:
            parts = self._parts(pool)
        for arm, k in parts:
            table = self._fetch(arm, k)
            if table is not None and table.schema.names != self.schema.names:
                self._write(arm, k, self._conform(arm, k, table))

    def _concat(self, tables: Any) -> Any:
        return pa.concat_tables([self.schema.empty_table(), *tables])

    def _folder(self, arm: str) -> Storage:
        check_arm(arm)
        return self.folder.sub(f"arm={arm}")

    def _parts(self, pool: ThreadPoolExecutor) -> list[tuple[str, int]]:
        """Return arm and number of every part, in the order of their paths."""
        names = (name.removeprefix("arm=") for name in self.folder.folders() if name.startswith("arm="))
        arms = sorted(filter(_is_arm, names), key=lambda arm: f"{arm}/")
        return [(arm, k) for arm, found in zip(arms, pool.map(self._numbers, arms), strict=True) for k in found]

    def _numbers(self, arm: str) -> list[int]:
        folder = self._folder(arm)
        found = {
            name: int(match[1]) for name in folder.names() if (match := re.match(r"part-(\d{5,}).*\.parquet$", name))
        }
        for name, k in found.items():
            if name != _part_name(k):
                raise StudyError(
                    f"A part of {folder.path} must be there once, but {name} looks like a copy of {_part_name(k)}. "
                    "Move one of them away."
                )
        return sorted(found.values())

    def _part(self, arm: str, k: int) -> Any:
        if (arm, k) not in self._recent:
            self._keep(arm, k, self._load(arm, k))
        return self._recent[arm, k]

    def _keep(self, arm: str, k: int, table: Any) -> None:
        self._recent.pop((arm, k), None)
        self._recent[arm, k] = table
        if len(self._recent) > PARTS_IN_MEMORY:
            del self._recent[next(iter(self._recent))]

    def _load(self, arm: str, k: int) -> Any:
        table = self._fetch(arm, k)
        return self.schema.empty_table() if table is None else self._conform(arm, k, table)

    def _fetch(self, arm: str, k: int) -> Any:
        """Return a part with the columns that its file has, or ``None`` if there is no file."""
        folder, name = self._folder(arm), _part_name(k)
        for attempt in range(3):
            try:
                data = folder.read(name)
                return None if data is None else _parse(data)
            except (pa.ArrowException, OSError) as error:  # remotely, replaced between asking for its size and reading
                if attempt == 2:
                    raise StudyError(f"{name} in {folder.path} cannot be read: {one_line(error)}. {REMEDY}") from error
        return None

    def _conform(self, arm: str, k: int, table: Any) -> Any:
        """Return a part with all columns; refuse a column that the schema has not, or has otherwise."""
        names = set(table.schema.names)
        for field in table.schema:
            known = self.schema.field(field.name) if field.name in self.schema.names else None
            if known is None or not field.equals(known):
                self._refuse(arm, k, _text(field), _text(known) if known is not None else "no such column")
        for field in self.schema:
            if field.name not in names and not field.nullable:
                self._refuse(arm, k, f"no column {field.name}", _text(field))
        empty = {field.name: pa.nulls(len(table), field.type) for field in self.schema if field.name not in names}
        columns = [empty[name] if name in empty else table[name] for name in self.schema.names]
        self._check_numbers(arm, k, table["number"].to_numpy())
        return pa.table(columns, schema=self.schema)

    def _check_numbers(self, arm: str, k: int, numbers: Any) -> None:
        """Refuse runs that belong into another part, or that do not stand in their order: no file of ours has any."""
        at = f"{_part_name(k)} in {self._folder(arm).path}"
        for other in np.unique(numbers // RUNS_PER_PART).tolist():
            if other != k:
                raise StudyError(
                    f"{at} must hold runs {k * RUNS_PER_PART} to {(k + 1) * RUNS_PER_PART - 1}, but it holds some of "
                    f"{_part_name(other)}, of which it may be a copy. Move it away."
                )
        steps = np.diff(numbers)
        if (steps < 0).any() or (self.once and (steps == 0).any()):
            raise StudyError(f"{at} is damaged: its runs are not there once each, by number. {REMEDY}")

    def _refuse(self, arm: str, k: int, found: str, wanted: str) -> None:
        raise StudyError(
            f"{_part_name(k)} in {self._folder(arm).path} must have the columns that study.json implies, "
            f"but it has {found}, where study.json implies {wanted}. {REMEDY}"
        )

    def _write(self, arm: str, k: int, table: Any) -> None:
        texts = [field.name for field in self.schema if field.type == pa.string()]
        sink = pa.BufferOutputStream()
        options = {"compression": "zstd", "use_dictionary": texts}  # dictionaries of floats only cost time
        pq.write_table(table, sink, write_page_checksum=True, **options)
        self._folder(arm).write(_part_name(k), sink.getvalue().to_pybytes())


def _parse(data: bytes) -> Any:
    """Return the table in a part's bytes; pages are held against their checksums, where a part has any."""
    table = pq.read_table(pa.BufferReader(data), use_threads=False, page_checksum_verification=True)
    table.validate(full=True)
    return table


def _part_name(k: int) -> str:
    return f"part-{k:05d}.parquet"


def _text(field: Any) -> str:
    return f"{field.name} of type {field.type}{'' if field.nullable else ', not null'}"


class RunTables:
    """Two tables that belong together: a row for every run, and the epoch records of these runs."""

    def __init__(self, rows: PartTable, epochs: PartTable) -> None:
        self.rows, self.epochs = rows, epochs

    def save(self, arm: str, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
        """Save a run in place of what was saved under its number, the epochs first; without any, the old ones stay.

        Raises:
            StudyError: As :meth:`dfkt.store.study_store.StudyStore.save` says.
        """
        new_row = to_table(self.rows.schema, [row])  # refuses a wrong row before its epochs are written
        number = int(row["number"])
        if number < 0 or row["state"] not in STATES:
            rule = f"number >= 0 and state one of {', '.join(STATES)}"
            raise StudyError(f"`{rule}` must hold, but got number={number}, state={row['state']!r}.")
        if epochs:
            records = [{"number": number} | dict(record) for record in epochs]
            new = to_table(self.epochs.schema, records).sort_by("index")
            if len(pc.unique(new["index"])) < len(epochs) or pc.unique(new["number"]).to_pylist() != [number]:
                raise StudyError(f"The epoch records of run {number} must be its own and differ in their index.")
            self.epochs.put(arm, number, new)
        self.rows.put(arm, number, new_row)

    def read(self, order: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return both tables, by arm, number and index: first the arms in ``order``, then the others by name.

        The epochs of runs that have no row yet are left out.
        """
        # Rows before epochs: a writer does it the other way round, so every finished run seen has its epochs.
        rows, epochs = self.rows.read_all(), self.epochs.read_all()
        arms = [arm for arm in order if arm in rows]
        arms += sorted(rows.keys() - set(arms))
        of_rows = {arm: _of(rows[arm], epochs[arm]) for arm in arms if arm in epochs}
        return to_frame(self.rows.schema, {arm: rows[arm] for arm in arms}), to_frame(self.epochs.schema, of_rows)


def _of(rows: Any, epochs: Any) -> Any:
    """Leave out the epochs of runs that have no row."""
    known = pc.is_in(epochs["number"], value_set=rows["number"].combine_chunks())
    return epochs if pc.all(known).as_py() in (True, None) else epochs.filter(known)


def to_frame(schema: Any, tables: Mapping[str, Any]) -> pd.DataFrame:
    """Return the tables of some arms as one frame, in their order, the arm in the first column.

    Floats are ``float64`` (null is NaN, as a measured NaN is), texts pandas' strings, times ``datetime64[us, UTC]``,
    integers ``Int64`` and truth values ``boolean``, so that null neither turns integers into floats nor becomes zero;
    ``number`` and ``index`` are never null and ``int64``. The types are the same for empty tables.
    """
    named = [t.add_column(0, "arm", pa.repeat(arm, len(t))) for arm, t in [("", schema.empty_table()), *tables.items()]]
    kinds = {pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = cast(pd.DataFrame, pa.concat_tables(named).to_pandas(types_mapper=kinds.get))
    return frame.astype({name: "int64" for name in ("number", "index") if name in frame})
