"""Tables as text."""

import pandas as pd

from dfkt.analysis.tables import accuracy_cells, markdown_table, speed_cells


def test_fewer_pairs_than_seeds_and_small_p_are_said() -> None:
    unknown = dict.fromkeys(["gain", "gap_share", "low", "high", "val_std"], float("nan"))
    known = {
        "arm": "kd",
        "seeds": 2,
        "test_mean": 0.5,
        "test_std": 0.1,
        "pairs": 1,
        "against": "dfkt",
        "difference": 0.1,
    }
    known |= {"p": 0.0001, "val_mean": 0.5, "device_seconds": 3.0, "epochs": 2.66}

    assert accuracy_cells(pd.DataFrame([known | unknown])).to_dict("records") == [
        {"arm": "kd", "seeds": "2", "test %": "50.00 ± 10.00", "dfkt ahead by": "+10.00 (1 seeds)", "p": "<0.001"}
        | {"val %": "50.00", "device s": "3.0", "epochs": "2.66"}
    ]


def test_an_interval_may_end_at_never() -> None:
    row = {"arm": "kd", "end": 0.5, "steps": 30.0, "seconds": 2.0, "step_ratio": 0.75, "low": 0.6, "high": float("inf")}

    assert speed_cells(pd.DataFrame([row])).iloc[0, -1] == "0.75 [0.60, never]"


def test_markdown_leaves_null_empty_and_escapes_bars() -> None:
    table = markdown_table(pd.DataFrame({"a|b": ["x", None], "n": pd.array([1, None], dtype="Int64")}))

    assert table.splitlines() == ["| a\\|b | n |", "|---|---|", "| x | 1 |", "|  |  |"]
