"""The trial store: what a study measured, as Parquet files that any tool reads.

::

    study.json                    configuration, search space, versions, commit, hardware, command, sessions
    trials/part-00000.parquet     one row per trial
    epochs/part-00000.parquet     one row per epoch record of a trial
    finals/part-00000.parquet     the final runs (method x seed), with the test accuracy
    final_epochs/…                one row per epoch record of a final run

A trial's part is ``number // 64``, and a part is only ever replaced as a whole, by one atomic write. So there is no
compaction, during which a reader could see a trial twice or miss it; saving the same trial again changes nothing; the
number of files stays trials / 64; and a kill at any instant leaves every file readable. A trial's epochs are written
before its row: a trial is finished when its row says so, and then its epochs are there. A kill in between leaves epochs
whose row is missing or still ``RUNNING``; they are replaced when the trial is saved again. One process writes
(:meth:`dfkt.store.files.Storage.lock`), any number may read meanwhile.

The columns follow from the search space when the study is created; no trial can change them. What was not measured is
null. A NaN that *was* measured, such as a loss that became NaN, stays NaN in the files.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dfkt.errors import StudyError
from dfkt.store.files import Storage

TRIALS_PER_PART = 64
PARTS_IN_MEMORY = 32
FORMAT = 2
STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL")
"""Optuna's words; ``PRUNED`` is a trial that was stopped early."""

_TIME = pa.timestamp("us", tz="UTC")
_PARAM_TYPES = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}
_PYTHON_TYPES: dict[Any, tuple[type, ...]] = {
    pa.float64(): (float, int, np.floating, np.integer),
    pa.int64(): (int, np.integer),
    pa.int32(): (int, np.integer),
    pa.bool_(): (bool, np.bool_),
    pa.string(): (str,),
    _TIME: (datetime.datetime,),
}


def _columns(kind: Any, names: str) -> list[Any]:
    return [pa.field(name, kind) for name in names.split()]


_NUMBER = pa.field("number", pa.int64(), nullable=False)

TRIAL_SCHEMA = pa.schema(
    [
        _NUMBER,
        pa.field("state", pa.string(), nullable=False),
        *_columns(pa.string(), "method"),
        *_columns(pa.int64(), "seed"),
        *_columns(pa.string(), "key"),  # dfkt.config.config_key; the columns param_<name> follow here
        *_columns(pa.float64(), "last_val_accuracy best_val_accuracy best_epoch epochs"),
        *_columns(pa.int64(), "steps images"),
        *_columns(pa.float64(), "wall_seconds device_seconds"),
        *_columns(pa.int64(), "peak_memory_bytes"),
        *_columns(pa.int32(), "workers attempts"),
        *_columns(pa.string(), "error"),
        *_columns(_TIME, "started ended"),
    ]
)
"""Columns of a trial, without its parameters. Accuracies are between 0 and 1."""

EPOCH_SCHEMA = pa.schema(
    [
        _NUMBER,
        pa.field("index", pa.int32(), nullable=False),  # place among the trial's records
        *_columns(pa.float64(), "epoch"),  # epochs of training done so far, flow stages counted in
        *_columns(pa.string(), "phase"),  # flow, hint or task
        *_columns(pa.int32(), "round stage"),  # stage is the upper tap; both null in the task stage
        *_columns(pa.int64(), "step images"),
        *_columns(pa.float64(), "lr loss task_loss soft_loss flow_loss hint_loss attention_loss similarity_loss"),
        *_columns(pa.float64(), "decoupled_loss train_accuracy val_accuracy val_loss"),
        *_columns(pa.float64(), "rung_epoch images_per_second seconds"),
    ]
)
"""Columns of an epoch record."""

FINAL_COLUMNS = _columns(pa.float64(), "test_accuracy test_loss")
"""What a final run has beyond a trial."""


class _Parts:
    """One table in parts of 64 trials, sorted by number; the newest parts are kept in memory."""

    def __init__(self, folder: Storage, schema: Any) -> None:
        self.folder = folder
        self.schema = schema
        self.recent: dict[int, Any] = {}

    def part(self, k: int) -> Any:
        if k not in self.recent:
            self.keep(k, self.load(k))
        return self.recent[k]

    def keep(self, k: int, table: Any) -> None:
        self.recent.pop(k, None)
        self.recent[k] = table
        if len(self.recent) > PARTS_IN_MEMORY:
            del self.recent[next(iter(self.recent))]

    def load(self, k: int) -> Any:
        name = f"part-{k:05d}.parquet"
        for attempt in range(3):
            data = self.folder.read(name)
            if data is None:
                return self.schema.empty_table()
            try:
                table = pq.read_table(pa.BufferReader(data), use_threads=False)
                break
            except (pa.ArrowException, OSError) as error:  # remotely, replaced between asking for its size and reading
                if attempt == 2:
                    raise StudyError(f"{name} in {self.folder.path} cannot be read: {error}") from error
        if not table.schema.equals(self.schema):
            raise StudyError(f"{name} in {self.folder.path} must have the columns that study.json implies.")
        return table

    def put(self, number: int, new: Any) -> None:
        """Replace the rows of one trial."""
        k = number // TRIALS_PER_PART
        old = self.part(k)
        start, stop = np.searchsorted(old["number"].to_numpy(), [number, number + 1])
        rows = pa.concat_tables([old.slice(0, start), new, old.slice(stop)]).combine_chunks()
        texts = [field.name for field in self.schema if field.type == pa.string()]
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", use_dictionary=texts)  # dictionaries of floats only cost time
        self.folder.write(f"part-{k:05d}.parquet", sink.getvalue().to_pybytes())
        self.keep(k, rows)

    def read_all(self) -> Any:
        found = [re.fullmatch(r"part-(\d+)\.parquet", name) for name in self.folder.names()]
        with ThreadPoolExecutor(8) as pool:
            tables = list(pool.map(self.load, [int(match[1]) for match in found if match]))
        return pa.concat_tables([self.schema.empty_table(), *tables])


class StudyStore:
    """A study's folder, for the one process that writes it.

    Attributes:
        storage: The folder.
        meta: What ``study.json`` says; change it with :meth:`update_meta`.
    """

    def __init__(self, storage: Storage, meta: dict[str, Any]) -> None:
        self.storage = storage
        self.meta = meta
        params = [pa.field(f"param_{name}", _PARAM_TYPES[kind]) for name, kind in meta["params"].items()]
        at = TRIAL_SCHEMA.get_field_index("key") + 1
        trials = pa.schema([*list(TRIAL_SCHEMA)[:at], *params, *list(TRIAL_SCHEMA)[at:]])
        self._trials = _Parts(storage.sub("trials"), trials)
        self._epochs = _Parts(storage.sub("epochs"), EPOCH_SCHEMA)
        self._finals = _Parts(storage.sub("finals"), pa.schema([*trials, *FINAL_COLUMNS]))
        self._final_epochs = _Parts(storage.sub("final_epochs"), EPOCH_SCHEMA)

    @classmethod
    def create(cls, storage: Storage, params: Mapping[str, type], meta: dict[str, Any]) -> StudyStore:
        """Create the folder of a new study.

        Args:
            storage: Where.
            params: The search space: the type of every parameter, ``float``, ``int``, ``bool`` or ``str``.
            meta: What else ``study.json`` shall say, as JSON values.

        Raises:
            StudyError: If there is a study already, a type is another one, or ``meta`` is not JSON.
        """
        if storage.exists("study.json"):
            raise StudyError(
                f"A new study needs a new folder, but {storage.path} has one. Resume it, or take another name."
            )
        kinds = {name: kind.__name__ for name, kind in params.items()}
        for name, kind in kinds.items():
            if kind not in _PARAM_TYPES:
                raise StudyError(f"A parameter must be one of {', '.join(_PARAM_TYPES)}, but {name} is {kind}.")
        store = cls(storage, {"format": FORMAT, "params": kinds})
        store.update_meta(**meta)
        return store

    @classmethod
    def open(cls, storage: Storage) -> StudyStore:
        """Open the study in a folder.

        Raises:
            StudyError: If there is none, or its ``study.json`` cannot be read, is damaged or of another format.
        """
        try:
            data = storage.read("study.json")
        except (OSError, pa.ArrowException) as error:
            raise StudyError(f"A study's folder must be readable, but {storage.path} is not: {error}.") from error
        if data is None:
            raise StudyError(f"A study's folder must have a study.json, but {storage.path} has none.")
        try:
            meta = json.loads(data)
            if meta["format"] != FORMAT:
                raise StudyError(f"study.json must have format {FORMAT}, but {storage.path} has {meta['format']!r}.")
            return cls(storage, meta)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(f"study.json in {storage.path} is damaged: {error!r}.") from error

    def update_meta(self, **changes: Any) -> None:
        """Set entries of ``study.json``; the search space cannot change."""
        for name in ("format", "params"):
            if name in changes and changes[name] != self.meta[name]:
                raise StudyError(
                    f"`{name}` of a study cannot change, but {changes[name]!r} differs from {self.meta[name]!r}."
                )
        meta = self.meta | changes
        try:
            text = json.dumps(meta, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StudyError(f"study.json takes JSON values only: {error}.") from error
        self.storage.write("study.json", text.encode())
        self.meta = meta

    def save_trial(self, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]] = ()) -> None:
        """Save a trial in place of what was saved under its number.

        Args:
            row: ``number``, ``state`` and whatever else was measured; columns left out are null.
            epochs: All its epoch records, each with its ``index``. Without any, those saved before stay.

        Raises:
            StudyError: If a column is unknown, a value has another type than its column, or two records share an index.
        """
        _save(self._trials, self._epochs, row, epochs)

    def save_final(self, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]] = ()) -> None:
        """Save a final run, as :meth:`save_trial` saves a trial; final runs are numbered for themselves."""
        _save(self._finals, self._final_epochs, row, epochs)

    def trial_rows(self) -> list[dict[str, Any]]:
        """Return the saved trials, by number; what is null is ``None``."""
        return cast(list[dict[str, Any]], self._trials.read_all().to_pylist())

    def final_rows(self) -> list[dict[str, Any]]:
        """Return the saved final runs, by number."""
        return cast(list[dict[str, Any]], self._finals.read_all().to_pylist())

    def trial_epochs(self, number: int) -> list[dict[str, Any]]:
        """Return a trial's epoch records, by index."""
        part = self._epochs.part(number // TRIALS_PER_PART)
        return cast(list[dict[str, Any]], part.filter(pc.equal(part["number"], number)).to_pylist())

    def _read(self, name: str) -> Study:
        # Rows before epochs: a writer does it the other way round, so every finished trial seen has its epochs.
        trials, epochs = self._trials.read_all(), self._epochs.read_all()
        finals, final_epochs = self._finals.read_all(), self._final_epochs.read_all()
        return Study(
            name=name,
            meta=self.meta,
            trials=_frame(trials),
            epochs=_frame(_of(trials, epochs)),
            finals=_frame(finals),
            final_epochs=_frame(_of(finals, final_epochs)),
        )


@dataclass(frozen=True, eq=False)
class Study:
    """A study as it was read: tidy tables, by number and index.

    Floats are ``float64`` (null is NaN, as a measured NaN is), texts pandas' strings, times ``datetime64[us, UTC]``,
    integers ``Int64`` and truth values ``boolean``, so that null neither turns integers into floats nor becomes zero;
    ``number`` and ``index`` are never null and ``int64``. The types are the same for empty tables.
    """

    name: str
    meta: dict[str, Any]
    trials: pd.DataFrame
    epochs: pd.DataFrame
    finals: pd.DataFrame
    final_epochs: pd.DataFrame


def read_study(path: str | os.PathLike[str] | Storage) -> Study:
    """Read a study, finished or running.

    Raises:
        StudyError: If there is none in the folder, or a file is damaged.
    """
    storage = path if isinstance(path, Storage) else Storage(path)
    store = StudyStore.open(storage)
    folder = storage.path.partition("?")[0].rstrip("/").rpartition("/")[2]
    return store._read(str(store.meta.get("name", folder)))


def to_table(schema: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """Return records as an Arrow table; what they leave out is null.

    Raises:
        StudyError: If a column is unknown, or a value has another type than its column.
    """
    unknown = sorted({name for record in records for name in record} - set(schema.names))
    if unknown:
        raise StudyError(f"Unknown column {', '.join(unknown)}; known: {', '.join(schema.names)}.")
    return pa.table([_array(field, [record.get(field.name) for record in records]) for field in schema], schema=schema)


def _array(field: Any, values: list[Any]) -> Any:
    examples = {(type(value), getattr(value, "tzinfo", None) is None): value for value in values}
    for value in examples.values():  # one of each type is enough; checking every value takes milliseconds
        if not _fits(field, value):
            needed = f"{field.type}{'' if field.nullable else ', not null'}"
            raise StudyError(f"Column {field.name} must be {needed}, but got {value!r}.")
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError) as error:
        raise StudyError(f"Column {field.name} must be {field.type}: {error}.") from error


def _fits(field: Any, value: Any) -> bool:
    kinds = _PYTHON_TYPES[field.type]
    if value is None:
        return bool(field.nullable)
    if isinstance(value, datetime.datetime) and value.tzinfo is None:  # Arrow would take it for UTC
        return False
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _save(rows: _Parts, records: _Parts, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
    new_row = to_table(rows.schema, [row])  # refuses a wrong row before its epochs are written
    number = int(row["number"])
    if number < 0 or row["state"] not in STATES:
        rule = f"number >= 0 and state one of {', '.join(STATES)}"
        raise StudyError(f"`{rule}` must hold, but got number={number}, state={row['state']!r}.")
    if epochs:
        new = to_table(records.schema, [{"number": number} | dict(record) for record in epochs]).sort_by("index")
        if len(pc.unique(new["index"])) < len(epochs) or pc.unique(new["number"]).to_pylist() != [number]:
            raise StudyError(f"The epoch records of trial {number} must be its own and differ in their index.")
        records.put(number, new)
    rows.put(number, new_row)


def _of(rows: Any, epochs: Any) -> Any:
    """Leave out the epochs of trials that have no row yet."""
    known = pc.is_in(epochs["number"], value_set=rows["number"].combine_chunks())
    return epochs if pc.all(known).as_py() in (True, None) else epochs.filter(known)


def _frame(table: Any) -> pd.DataFrame:
    kinds = {pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = cast(pd.DataFrame, table.to_pandas(types_mapper=kinds.get))
    return frame.astype({name: "int64" for name in ("number", "index") if name in frame})


def environment() -> dict[str, Any]:
    """Return what figures travel with: versions, commit, hardware and command, as JSON values.

    ``commit`` is the one of the checkout that this package runs from, ``None`` if it runs from none; ``dirty`` says
    whether tracked files differ from it. The host's name is left out.
    """
    packages = ["dfkt", "torch", "torchvision", "ray", "optuna", "pyarrow", "pandas", "numpy"]
    here = os.path.dirname(os.path.abspath(__file__))
    tracked = _output("git", "-C", here, "ls-files", os.path.basename(__file__))
    changes = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "commit": _output("git", "-C", here, "rev-parse", "HEAD") if tracked else None,
        "dirty": None if changes is None else bool(changes),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": platform.platform(),
            "gpus": (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
        },
        "command": list(sys.argv),
    }


def _output(*command: str) -> str | None:
    """Return what a command prints, or ``None`` if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
