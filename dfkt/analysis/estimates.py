"""What can be said of seeds: intervals, tests and curves, as functions of plain numbers; knows no study."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
TOLERANCE = 1e-9
"""What differs by less is equal: the mean of equal accuracies differs from them in its last bit."""
DRAWS = 2000
"""Samples of a bootstrap."""


def mean_interval(values: pd.Series[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper end of its confidence interval by Student's t.

    Both ends are null for fewer than two values, and for values that are all the same: a spread of zero over a handful
    of seeds is chance, and no certainty.

    Example:
        >>> [round(x, 3) for x in mean_interval(pd.Series([1.0, 2.0, 3.0]))]
        [2.0, -0.484, 4.484]
    """
    mean, error = float(values.mean()), _standard_error(values)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error) if error else math.nan
    return mean, mean - half, mean + half


def p_value(values: pd.Series[float]) -> float:
    """Return the two-sided p of a mean of zero by Student's t; null where :func:`mean_interval` has no ends.

    Example:
        >>> round(p_value(pd.Series([1.0, 2.0, 3.0])), 4)
        0.0742
    """
    error = _standard_error(values)
    return float(2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1)) if error else math.nan


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values as Holm's step-down procedure raises them for their number; null ones stay and do not count.

    The chance that any true hypothesis has one below 0.05 is at most 5 %, however the hypotheses hang together.

    References:
        Holm, Scandinavian Journal of Statistics 6 (1979).

    Example:
        >>> holm([0.04, 0.01, math.nan, 0.03])
        [0.06, 0.03, nan, 0.06]
    """
    order = [k for k in np.argsort(values, kind="stable").tolist() if not math.isnan(values[k])]
    raised, least = list(values), 0.0
    for place, k in enumerate(order):
        least = max(least, min((len(order) - place) * values[k], 1.0))
        raised[k] = least
    return raised


def monotone(values: Array) -> Array:
    """Return the non-decreasing curve closest to a measured one, by least squares (isotonic regression).

    Neighbours that fall are averaged until none is left (pool adjacent violators). The highest value so far would be no
    less monotone, but the maximum of noisy values lies above what they measure, the more so the more there are.

    Example:
        >>> monotone(np.array([0.2, 0.5, 0.3, 0.9]))
        array([0.2, 0.4, 0.4, 0.9])
    """
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(means, counts)


def crossing(steps: Array, curve: Array, level: float) -> float:
    """Return the step at which a non-decreasing curve reaches a level, linear between its points.

    Infinite if it ends below; its first step if it begins above, as nothing was measured before.

    Example:
        >>> crossing(np.array([10.0, 20.0, 30.0]), np.array([0.1, 0.3, 0.5]), 0.4)
        25.0
    """
    reached = np.flatnonzero(curve >= level - TOLERANCE)
    if not len(reached):
        return math.inf
    k = int(reached[0])
    if k == 0:
        return float(steps[0])
    share = min((level - curve[k - 1]) / (curve[k] - curve[k - 1]), 1.0)
    return float(steps[k - 1] + share * (steps[k] - steps[k - 1]))


def bootstrap(
    estimate: Callable[[Array], float], seeds: int, effective: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return both ends of a bootstrap interval over seeds; null for fewer than two seeds, and where all samples agree.

    The percentile interval of a handful of seeds is too narrow; its percentiles are moved outwards as far as Student's t
    lies beyond the normal distribution. The random numbers are the same in every call.

    Args:
        estimate: The estimate for one sample, given how often it holds each seed, ``[seeds]``; NaN where it holds none
            that the estimate needs, infinite for what does not happen.
        seeds: How many there are.
        effective: How many of them the estimate rests on.
        confidence: Share of such intervals that hold the true value.

    References:
        Hesterberg, The American Statistician 69 (2015), "expanded percentile".
    """
    if effective < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    different, which = np.unique(drawn, axis=0, return_inverse=True)
    found = np.array([estimate(weights) for weights in different.astype(np.float64)])[which.ravel()]
    found = np.sort(found[~np.isnan(found)])
    if not len(found):
        return math.nan, math.nan
    wide = math.sqrt(effective / (effective - 1)) * stats.t.ppf((1 + confidence) / 2, effective - 1)
    cut = int(len(found) * stats.norm.cdf(-wide))
    low, high = float(found[cut]), float(found[-1 - cut])
    return (low, high) if low < high else (math.nan, math.nan)


def _standard_error(values: pd.Series[float]) -> float | None:
    error = float(values.to_numpy().std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return error if error > TOLERANCE else None
