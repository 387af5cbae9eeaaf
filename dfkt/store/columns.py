"""The columns of a study's tables, and how what a run measured becomes typed values in them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dfkt.errors import StudyError

STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL")
"""Optuna's words; ``PRUNED`` is a trial that was stopped early."""
PARAM_TYPES = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}
"""What a parameter may be: the name of its Python type, and the type of its column."""

_TIME = pa.timestamp("us", tz="UTC")
_PYTHON_TYPES: dict[Any, tuple[type, ...]] = {
    pa.float64(): (float, int, np.floating, np.integer),
    pa.int64(): (int, np.integer),
    pa.int32(): (int, np.integer),
    pa.bool_(): (bool, np.bool_),
    pa.string(): (str,),
    _TIME: (datetime.datetime,),
}
_NUMBER = pa.field("number", pa.int64(), nullable=False)


def _columns(kind: Any, names: str) -> list[Any]:
    return [pa.field(name, kind) for name in names.split()]


def trial_schema(params: Mapping[str, str]) -> Any:
    """Return the columns of a trial; ``params`` gives the name of every parameter's type. Accuracies are 0 to 1."""
    return pa.schema(
        [
            _NUMBER,
            pa.field("state", pa.string(), nullable=False),
            *_columns(pa.string(), "method"),
            *_columns(pa.int64(), "seed"),
            *_columns(pa.string(), "key settings"),  # key of the configuration; the method as JSON
            *(pa.field(f"param_{name}", PARAM_TYPES[kind]) for name, kind in params.items()),
            *_columns(pa.float64(), "last_val_accuracy best_val_accuracy best_epoch epochs"),
            *_columns(pa.int64(), "steps images"),
            *_columns(pa.float64(), "wall_seconds device_seconds"),
            *_columns(
                pa.float64(), "kept_share"
            ),  # steps to which the teacher's answers were kept ones, over all steps
            *_columns(pa.int64(), "peak_memory_bytes"),
            *_columns(pa.int32(), "workers attempts"),
            *_columns(pa.string(), "error"),
            *_columns(_TIME, "started ended"),
        ]
    )


def final_schema(params: Mapping[str, str]) -> Any:
    """Return the columns of a final run: those of a trial, and what the test split said."""
    return pa.schema([*trial_schema(params), *_columns(pa.float64(), "test_accuracy test_loss")])


def epoch_schema(losses: Sequence[str]) -> Any:
    """Return the columns of an epoch record, with one for each of the losses that a loss is summed from."""
    return pa.schema(
        [
            _NUMBER,
            pa.field("index", pa.int32(), nullable=False),  # place among the run's records
            *_columns(pa.float64(), "epoch"),  # epochs of training done so far, all stages counted in
            *_columns(pa.string(), "phase"),
            *_columns(pa.int32(), "round stage"),  # both null in the task stage
            *_columns(pa.int64(), "step images"),
            *_columns(pa.float64(), "lr loss"),
            *(pa.field(f"{name}_loss", pa.float64()) for name in losses),
            *_columns(pa.float64(), "train_accuracy val_accuracy val_loss"),
            *_columns(pa.float64(), "rung_epoch"),  # the task stage's share that is done, times the run's length
            *_columns(
                pa.float64(), "rung rung_accuracy"
            ),  # that share where early stopping compares trials, by the latter
            *_columns(pa.float64(), "images_per_second seconds kept_share"),
        ]
    )


def widened(
    old: Mapping[str, str], old_losses: Sequence[str], params: Mapping[str, type], losses: Sequence[str]
) -> dict[str, Any]:
    """Return what ``study.json`` says of the columns, ``params`` and ``losses``, when some are added to the old ones.

    Raises:
        StudyError: If a type is none of a parameter's, or not the one that it has; or if a loss's column is taken.
    """
    kinds = dict(old)
    for name, kind in ((name, kind.__name__) for name, kind in params.items()):
        if kind not in PARAM_TYPES:
            raise StudyError(f"A parameter must be one of {', '.join(PARAM_TYPES)}, but {name} is {kind}.")
        if kinds.setdefault(name, kind) != kind:
            raise StudyError(f"A parameter must have one type in all arms, but {name} is {kinds[name]} and {kind}.")
    names = list(dict.fromkeys([*old_losses, *losses]))
    if (taken := loss_without_column(names)) is not None:
        raise StudyError(f"A loss must have a column of its own, but every study has a column {taken}_loss.")
    return {"params": kinds, "losses": names}


def loss_without_column(losses: Sequence[str]) -> str | None:
    """Return a loss that is listed twice or whose column every study has, if there is one."""
    taken = {name for name in losses if f"{name}_loss" in epoch_schema([]).names or losses.count(name) > 1}
    return min(taken, default=None)


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
