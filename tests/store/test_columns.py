"""The columns follow from parameters and losses, and only values of their type get in."""

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dfkt.errors import StudyError
from dfkt.store.columns import epoch_schema, final_schema, to_table, trial_schema, widened


def test_parameters_and_losses_have_columns_of_their_own_where_they_are_looked_for() -> None:
    trial = trial_schema({"rate": "float", "pattern": "str"})
    start = "number state method seed key settings param_rate param_pattern last_val_accuracy best_val_accuracy "
    assert " ".join(trial.names).startswith(start)
    assert (trial.field("param_rate").type, trial.field("param_pattern").type) == (pa.float64(), pa.string())
    assert final_schema({"rate": "float"}).names[-2:] == ["test_accuracy", "test_loss"]
    epoch = epoch_schema(["task", "flow"]).names
    assert epoch[epoch.index("lr") :][:5] == ["lr", "loss", "task_loss", "flow_loss", "train_accuracy"]


def test_only_what_names_a_row_is_never_null() -> None:
    assert [field.name for field in trial_schema({"rate": "float"}) if not field.nullable] == ["number", "state"]
    assert [field.name for field in epoch_schema(["task"]) if not field.nullable] == ["number", "index"]


def test_added_columns_come_after_the_old_ones_and_each_once() -> None:
    wider = widened({"b": "int", "a": "str"}, ["task"], {"c": float, "a": str}, ["soft", "task", "soft"])
    assert list(wider["params"].items()) == [("b", "int"), ("a", "str"), ("c", "float")]
    assert wider["losses"] == ["task", "soft"]


def test_a_loss_whose_column_every_study_has_is_refused() -> None:
    with pytest.raises(StudyError, match="column val_loss"):
        widened({}, [], {}, ["task", "val"])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.float64(), True),
        (pa.float64(), "1"),
        (pa.int64(), 1.0),
        (pa.int64(), 2**63),
        (pa.int32(), np.int64(2**31)),
        (pa.bool_(), 0),
        (pa.string(), 1),
        (pa.timestamp("us", tz="UTC"), datetime.datetime(2026, 1, 1)),
        (pa.timestamp("us", tz="UTC"), "2026-01-01"),
    ],
)
def test_a_value_of_another_type_is_refused_even_behind_good_ones(kind: Any, value: Any) -> None:
    schema = pa.schema([("x", kind)])
    with pytest.raises(StudyError, match="Column x must be"):
        to_table(schema, [{"x": None}, {}, {"x": value}])


def test_a_time_is_kept_as_the_instant_that_it_is() -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=zone)
    assert to_table(pa.schema([("x", pa.timestamp("us", tz="UTC"))]), [{"x": moment}])["x"].to_pylist() == [moment]
