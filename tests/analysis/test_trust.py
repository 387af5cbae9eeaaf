"""How far a search can be trusted."""

import math

import pandas as pd
import pytest

from dfkt.analysis.trust import rank_correlation, rung_table, val_error


def trials(*states: str) -> pd.DataFrame:
    """Trials of one arm, each a point better than the one before."""
    ends = [0.5 + k / 100 if state == "COMPLETE" else None for k, state in enumerate(states)]
    return pd.DataFrame({"arm": "dfkt", "number": range(len(states)), "state": states, "last_val_accuracy": ends})


def looks(*rows: tuple[int, float | None, float]) -> pd.DataFrame:
    """Epoch records: number, rung, val accuracy."""
    return pd.DataFrame(rows, columns=["number", "rung", "rung_accuracy"]).assign(arm="dfkt")


def test_every_rung_has_its_trials_those_that_ended_there_and_how_it_ranked_the_others() -> None:
    table = rung_table(
        trials("COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL"),
        looks(
            (0, 0.25, 0.1), (1, 0.25, 0.05), (2, 0.25, 0.2), (3, 0.25, 0.4), (4, 0.25, 0.3), (5, 0.25, 0.2), (6, 0.25, 0.9),
            (0, None, 0.6), (0, 0.5, 0.4), (2, 0.5, 0.3), (3, 0.5, 0.2), (4, 0.5, 0.1), (5, 0.5, 0.05),
        ),
    )  # fmt: skip
    assert table.to_dict("records") == [
        {"arm": "dfkt", "rung": 0.25, "passed": 7, "stopped": 1, "complete": 4, "rank": pytest.approx(0.8)},
        {"arm": "dfkt", "rung": 0.5, "passed": 5, "stopped": 1, "complete": 4, "rank": pytest.approx(-1.0)},
    ]


def test_a_study_without_rungs_has_an_empty_table() -> None:
    table = rung_table(trials("COMPLETE"), looks((0, None, 0.5)))
    assert table.empty
    assert list(table) == ["arm", "rung", "passed", "stopped", "complete", "rank"]


def test_too_few_or_equal_trials_have_no_rank() -> None:
    few = pd.Series([1.0, 2.0, 3.0])
    assert math.isnan(rank_correlation(few, few))
    assert math.isnan(rank_correlation(pd.Series([1.0] * 5), pd.Series([1.0, 2.0, 3.0, 4.0, 5.0])))


def test_ties_share_their_rank() -> None:
    first, second = pd.Series([1.0, 1.0, 2.0, 3.0]), pd.Series([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(first, second) == pytest.approx(0.948683298)  # scipy.stats.spearmanr


def test_the_standard_error_of_an_accuracy() -> None:
    assert val_error(0.5, 304) == pytest.approx(0.02868, abs=1e-5)
    assert val_error(1.0, 10) == 0
