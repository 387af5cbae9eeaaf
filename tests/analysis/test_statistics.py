"""What the figures of a setting are."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dfkt.analysis.about import complete_about
from dfkt.analysis.estimates import holm, p_value
from dfkt.analysis.figures import Figures
from dfkt.analysis.statistics import accuracy_table, pair_table, reference_arm, scratch_level, speed_table
from dfkt.errors import StudyError

Runs = list[tuple[str, int, float | None]]
Curves = dict[tuple[str, int], list[float | None]]
SEEDS = (1, 2, 3, 4, 5)
TESTS = {
    "scratch": (0.80, 0.81, 0.80, 0.79, 0.80),
    "fsp": (0.78, 0.77, None, 0.79, 0.78),
    "dfkt": (0.82, 0.84, 0.83, 0.85, 0.86),
}
RUNS: Runs = [(arm, seed, test) for arm, tests in TESTS.items() for seed, test in zip(SEEDS, tests, strict=True)]


def made(runs: Runs, curves: Curves | None = None, **about: Any) -> Figures:
    """Make frames by hand: runs are (arm, seed, test accuracy); curves the val accuracy of every epoch of 10 steps."""
    curves = curves or {}
    rows = [
        {"setting": "s", "arm": arm, "method": arm, "seed": seed, "state": "FAIL" if a is None else "COMPLETE"}
        | {"test_accuracy": a, "last_val_accuracy": curves.get((arm, seed), [a])[-1], "best_val_accuracy": a}
        | {"steps": 40, "images": 0, "epochs": 1.0, "device_seconds": 3.0, "key": "k"}
        for arm, seed, a in runs
    ]
    records = [
        {"setting": "s", "arm": arm, "seed": seed, "epoch": k, "step": 10 * k, "images": 320 * k, "seconds": 2.0 * k}
        | {"phase": "flow" if val is None else "task", "stage": None, "loss": 0.1, "val_accuracy": val}
        for (arm, seed), curve in curves.items()
        for k, val in enumerate(curve, 1)
    ]
    columns = ["setting", "arm", "seed", "epoch", "step", "images", "seconds", "phase", "stage", "loss", "val_accuracy"]
    said = {"arms": list(dict.fromkeys(arm for arm, *_ in runs)), "teacher": {"test_accuracy": 0.9}} | about
    return Figures(
        runs=pd.DataFrame(rows),
        trials=pd.DataFrame(),
        curves=pd.DataFrame(records, columns=columns).astype({"val_accuracy": float, "seed": int, "step": int}),
        about={"format": 1, "settings": {"s": complete_about(said)}},
    )


def row_of(table: pd.DataFrame, arm: str) -> dict[str, Any]:
    return table[table.arm == arm].iloc[0].to_dict()


# --- accuracy


def test_means_gain_and_share_of_the_gap() -> None:
    table = accuracy_table(made(RUNS, arms=["scratch", "kd", "fsp", "dfkt"]), "s")
    ours, plain = row_of(table, "dfkt"), row_of(table, "scratch")

    assert table.arm.tolist() == ["scratch", "fsp", "dfkt"]  # as listed; what was not run is absent
    assert ours["test_mean"] == pytest.approx(0.84)
    assert ours["test_std"] == pytest.approx(math.sqrt(0.001 / 4))
    assert ours["gain"] == pytest.approx(0.04)
    assert ours["gap_share"] == pytest.approx(0.4)  # of 0.90 - 0.80
    assert (ours["device_seconds"], ours["epochs"]) == (3.0, 1.0)
    assert math.isnan(plain["gain"])
    assert math.isnan(ours["difference"])  # from itself


def test_pairs_are_seeds_that_both_completed() -> None:
    hints = row_of(accuracy_table(made(RUNS), "s"), "fsp")

    assert (hints["seeds"], hints["pairs"]) == (4, 4)
    assert hints["difference"] == pytest.approx((0.04 + 0.07 + 0.06 + 0.08) / 4)


def test_intervals_widen_and_p_rises_with_the_number_of_arms() -> None:
    alone = row_of(accuracy_table(made(RUNS), "s", ["scratch", "dfkt"]), "scratch")
    both = accuracy_table(made(RUNS), "s")
    pair = row_of(both, "scratch")
    spread = math.sqrt(0.0014 / 4 / 5)  # of 0.02, 0.03, 0.03, 0.06, 0.06

    assert alone["high"] - 0.04 == pytest.approx(2.776445 * spread)
    assert pair["high"] - 0.04 == pytest.approx(3.495406 * spread)  # t of 1 - 0.05 / 2 / 2
    assert pair["p"] >= alone["p"]
    assert sorted(both.p.dropna())[0] == pytest.approx(
        2 * row_of(accuracy_table(made(RUNS), "s", ["fsp", "dfkt"]), "fsp")["p"]
    )


def test_among_arms_that_do_not_differ_intervals_seldom_leave_zero_out() -> None:
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(20):
        runs: Runs = [(arm, seed, 0.5 + generator.normal(0, 0.01)) for arm in ("dfkt", *"abcdefgh") for seed in SEEDS]
        table = accuracy_table(made(runs), "s")
        wrong += bool(((table.low > 0) | (table.high < 0) | (table.p < 0.05)).any())

    assert wrong <= 2  # uncorrected, in 6 of these 20


def test_differences_are_against_the_best_by_val() -> None:
    runs: Runs = [("scratch", 1, 0.9), ("scratch", 2, 0.8), ("kd", 1, 0.7), ("kd", 2, 0.75)]
    curves: Curves = {("scratch", 1): [0.5], ("scratch", 2): [0.5], ("kd", 1): [0.6], ("kd", 2): [0.6]}
    table = accuracy_table(made(runs, curves), "s")

    assert set(table.against) == {"kd"}  # though scratch is the better one by test
    assert row_of(table, "scratch")["difference"] == pytest.approx(-0.125)
    assert set(accuracy_table(made([*runs, ("dfkt", 1, 0.1)], curves), "s", against="dfkt").against) == {"dfkt"}
    assert set(accuracy_table(made(runs, curves), "s", against="scratch").against) == {"scratch"}
    assert reference_arm(made(runs).runs.iloc[:0]) is None


def test_one_pair_has_no_interval_and_none_no_difference() -> None:
    table = accuracy_table(made([("scratch", 1, 0.8), ("kd", 2, 0.7), ("dfkt", 1, 0.85)]), "s")

    assert row_of(table, "scratch")["difference"] == pytest.approx(0.05)
    assert math.isnan(row_of(table, "scratch")["low"])
    assert math.isnan(row_of(table, "scratch")["p"])
    assert math.isnan(row_of(table, "kd")["difference"])


def test_no_share_of_a_gap_where_the_teacher_is_hardly_ahead() -> None:
    for teacher in (0.8, 0.809, 0.7, None):
        figures = made([("scratch", 1, 0.8), ("dfkt", 1, 0.85)], teacher={"test_accuracy": teacher})
        table = accuracy_table(figures, "s")
        assert table.gap_share.isna().all()
        assert row_of(table, "dfkt")["gain"] == pytest.approx(0.05)


def test_scratchs_mean_is_known_to_a_table_without_it() -> None:
    table = accuracy_table(made(RUNS), "s", ["dfkt", "fsp"])

    assert table.arm.tolist() == ["fsp", "dfkt"]
    assert row_of(table, "dfkt")["gain"] == pytest.approx(0.04)


def test_without_scratch_or_another_arm_the_rest_stands() -> None:
    table = accuracy_table(made([("kd", 1, 0.8), ("kd", 2, 0.9)]), "s")

    assert row_of(table, "kd")["test_mean"] == pytest.approx(0.85)
    assert table[["gain", "gap_share", "difference"]].isna().all(axis=None)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(StudyError, match="one of s, but got 'blob'"):
        accuracy_table(made(RUNS), "blob")


# --- speed


def speed(curves: Curves) -> pd.DataFrame:
    return speed_table(made([(arm, seed, 0.5) for arm, seed in curves], curves), "s")


def test_steps_until_scratchs_level_count_the_flow_stages() -> None:
    scratch: list[float | None] = [0.2, 0.4, 0.6, 0.8]
    fast: list[float | None] = [None, 0.7, 0.9, 0.9]
    table = speed({(arm, s): c for arm, c in (("scratch", scratch), ("dfkt", fast)) for s in SEEDS})
    ours = row_of(table, "dfkt")

    assert (ours["seeds"], ours["end"]) == (5, pytest.approx(0.9))
    assert (ours["steps"], ours["seconds"]) == pytest.approx((25, 5))  # half way from step 20 to 30
    assert ours["step_ratio"] == pytest.approx(25 / 40)
    assert row_of(table, "scratch")["step_ratio"] == 1


def test_a_peak_of_noise_is_no_crossing() -> None:
    scratch: list[float | None] = [0.2, 0.4, 0.5, 0.6]
    table = speed({("scratch", s): scratch for s in SEEDS} | {("kd", s): [0.3, 0.61, 0.35, 0.5] for s in SEEDS})
    kd = row_of(table, "kd")

    assert kd["steps"] == math.inf  # the first crossing of the raw curve would be at step 20
    assert kd["step_ratio"] == math.inf


def test_a_level_that_one_lucky_seed_passes_is_not_reached() -> None:
    scratch: list[float | None] = [0.2, 0.4, 0.5, 0.6]
    curves: Curves = {("scratch", s): scratch for s in SEEDS} | {("kd", s): [0.2, 0.3, 0.4, 0.5] for s in SEEDS}
    curves["kd", 1] = [0.2, 0.7, 0.7, 0.7]
    kd = row_of(speed(curves), "kd")

    assert kd["steps"] == math.inf
    assert kd["low"] < 1  # of the samples, some hold that seed often enough
    assert kd["high"] == math.inf


def test_the_ratio_has_an_interval_over_seeds_that_is_the_same_every_time() -> None:
    generator = np.random.default_rng(0)
    curves: Curves = {}
    for seed in SEEDS:
        shift = generator.normal(0, 0.01, 2)
        curves["scratch", seed] = [0.2 + shift[0], 0.4 + shift[0], 0.5 + shift[0], 0.6 + shift[0]]
        curves["kd", seed] = [0.3 + shift[1], 0.55 + shift[1], 0.7 + shift[1], 0.8 + shift[1]]
    first, second = speed(curves), speed(curves)
    kd = row_of(first, "kd")

    pd.testing.assert_frame_equal(first, second)
    assert kd["low"] < kd["step_ratio"] < kd["high"] < 1
    assert math.isnan(row_of(first, "scratch")["low"])


def test_one_seed_has_a_ratio_and_no_interval() -> None:
    kd = row_of(speed({("scratch", 1): [0.2, 0.4, 0.6], ("kd", 1): [0.6, 0.7, 0.8]}), "kd")

    assert kd["step_ratio"] == pytest.approx(10 / 30)
    assert math.isnan(kd["low"])
    assert math.isnan(kd["high"])


def test_an_arm_whose_seeds_scratch_lacks_has_no_interval_narrower_than_it_should() -> None:
    curves: Curves = {("scratch", s): [0.2, 0.4, 0.6 + 0.01 * s] for s in (1, 2)}
    curves |= {("kd", s): [0.5, 0.6 + 0.02 * s, 0.7] for s in (3, 4)}
    kd = row_of(speed(curves), "kd")

    assert kd["low"] <= kd["step_ratio"] <= kd["high"]


def test_failed_runs_are_in_no_curve() -> None:
    curves: Curves = {("scratch", 1): [0.2, 0.4], ("scratch", 2): [0.2, 0.9]}
    figures = made([("scratch", 1, 0.5), ("scratch", 2, None)], curves)

    assert scratch_level(figures, "s") == pytest.approx(0.4)


def test_a_curve_that_was_measured_otherwise_is_cut_to_the_steps_that_all_seeds_share() -> None:
    curves: Curves = {("scratch", 1): [0.2, 0.4, 0.6], ("scratch", 2): [0.2, None, 0.6]}
    table = speed(curves)

    assert row_of(table, "scratch")["steps"] == 30


def test_equal_ends_reach_their_own_mean() -> None:
    assert row_of(speed({("scratch", seed): [0.1] for seed in range(3)}), "scratch")["steps"] == 10


def test_without_scratch_there_is_no_level() -> None:
    figures = made([("kd", 1, 0.8), ("scratch", 1, None)], {("kd", 1): [0.8]})

    assert math.isnan(scratch_level(figures, "s"))
    assert speed_table(figures, "s").empty
    assert "step_ratio" in speed_table(figures, "s")


def test_any_two_arms_are_compared_once_and_corrected_for_all_pairs() -> None:
    tests = {"a": [0.90, 0.92, 0.91], "b": [0.80, 0.83, 0.80], "c": [0.80, 0.79, 0.84]}
    runs: Runs = [(arm, seed, value) for arm, values in tests.items() for seed, value in enumerate(values, 1)]
    table = pair_table(made(runs), "s")
    alone = [p_value(pd.Series(tests[x]) - pd.Series(tests[y])) for x, y in (("a", "b"), ("a", "c"), ("b", "c"))]

    assert list(zip(table["first"], table["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert table.difference.tolist() == pytest.approx([0.1, 0.1, 0.0], abs=1e-9)
    assert table.p.tolist() == pytest.approx(holm(alone))
    assert table.p[0] == pytest.approx(3 * alone[0])
