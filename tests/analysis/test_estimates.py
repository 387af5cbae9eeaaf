"""Intervals, tests and curves over seeds."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import isotonic_regression

from dfkt.analysis.estimates import bootstrap, crossing, holm, mean_interval, monotone, p_value


def test_the_interval_is_students() -> None:
    values = pd.Series([0.02, 0.03, 0.03, 0.06, 0.06])
    half = 2.776445 * values.std() / math.sqrt(5)

    assert mean_interval(values) == pytest.approx((0.04, 0.04 - half, 0.04 + half))


def test_p_is_that_of_a_paired_t_test() -> None:
    first, second = [0.82, 0.84, 0.83, 0.85], [0.80, 0.85, 0.80, 0.79]
    pairs = pd.Series(first) - pd.Series(second)

    assert p_value(pairs) == pytest.approx(stats.ttest_rel(first, second).pvalue)


@pytest.mark.parametrize("values", [[], [0.5], [0.1, 0.1], [0.3 - 0.1, 0.4 - 0.2, 0.2]])
def test_too_few_values_and_equal_ones_have_neither_interval_nor_p(values: list[float]) -> None:
    found = pd.Series(values, dtype=float)

    assert all(math.isnan(end) for end in mean_interval(found)[1:])
    assert math.isnan(p_value(found))


def test_holm_raises_by_rank_and_never_crosses() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_cannot_be_tested_does_not_count_for_holm() -> None:
    raised = holm([math.nan, 0.02, math.nan, 0.03])

    assert raised[1::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(raised[0])
    assert math.isnan(raised[2])


@pytest.mark.parametrize("seed", range(5))
def test_the_monotone_curve_is_the_closest_one(seed: int) -> None:
    noisy = np.linspace(0, 1, 40) + np.random.default_rng(seed).normal(0, 0.3, 40)

    np.testing.assert_allclose(monotone(noisy), isotonic_regression(noisy).x)


def test_noise_does_not_lift_the_monotone_curve_as_it_lifts_the_best_so_far() -> None:
    noisy = 0.5 + np.random.default_rng(0).normal(0, 0.02, (200, 60))  # curves that no longer rise

    ends = np.array([monotone(curve)[-1] for curve in noisy])
    assert np.mean(ends - 0.5) < 0.5 * np.mean(noisy.max(axis=1) - 0.5)
    assert np.mean([monotone(curve).mean() for curve in noisy]) == pytest.approx(0.5, abs=1e-3)


def test_a_level_is_crossed_between_epochs_at_the_first_or_never() -> None:
    steps, curve = np.array([10.0, 20.0, 30.0]), np.array([0.2, 0.2, 0.6])

    assert crossing(steps, curve, 0.3) == pytest.approx(22.5)
    assert crossing(steps, curve, 0.1) == 10
    assert crossing(steps, curve, 0.6) == 30
    assert crossing(steps, curve, 0.61) == math.inf
    assert crossing(steps, np.full(3, 0.1), np.mean([0.1] * 3)) == 10  # equal but for the last bit


def test_the_bootstrap_is_the_same_every_time_and_wider_for_fewer_seeds() -> None:
    values = np.random.default_rng(1).normal(0, 1, 20)

    def interval(seeds: int) -> tuple[float, float]:
        return bootstrap(lambda weights: float(weights @ values[:seeds] / weights.sum()), seeds, seeds)

    assert interval(20) == interval(20)
    low, high = interval(20)
    assert low < values.mean() < high
    half = stats.t.ppf(0.975, 19) * stats.sem(values)
    assert high - low == pytest.approx(2 * half, rel=0.15)  # the plain percentile interval is a sixteenth narrower


def test_a_handful_of_seeds_covers_the_truth_nearly_as_often_as_it_says() -> None:
    draws = np.random.default_rng(2).normal(0, 1, (200, 5))

    def covers(values: np.ndarray) -> bool:
        low, high = bootstrap(lambda weights: float(weights @ values / weights.sum()), 5, 5)
        return low < 0 < high

    assert sum(map(covers, draws)) >= 180  # the plain percentile interval covers it 172 times


def test_one_seed_and_samples_that_agree_have_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap(lambda weights: 1.0, 1, 1))
    assert all(math.isnan(end) for end in bootstrap(lambda weights: 1.0, 5, 5))
    assert all(math.isnan(end) for end in bootstrap(lambda weights: math.nan, 5, 5))


def test_an_end_may_be_never() -> None:
    low, high = bootstrap(lambda weights: math.inf if weights[0] == 0 else 1.0, 4, 4)

    assert (low, high) == (1.0, math.inf)
