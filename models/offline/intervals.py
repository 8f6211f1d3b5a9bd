"""The tests and 95 % intervals that measurements are judged by, all SciPy's.

The samples are what was drawn independently: prompts, not their tokens; draws of noise; repeats of
a timing. Fewer than a stated least number of them show nothing, whatever the values are.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sluice.models.profile.values import Interval

CONFIDENCE = 0.95
SIGNIFICANCE = 1 - CONFIDENCE
LEAST_REPEATS = 6
"""Fewer values than this give no 95 % interval of their median, however wide."""
LEAST_PROMPTS = 8
"""Fewer prompts than this show nothing: the t-tests below ask for means that are near normal."""

_RESAMPLES = 2000
_SEED = 0

_Array = NDArray[np.float64]


class Paired(NamedTuple):
    """Two answers to each item: how many items, and on how many only one of the two is right."""

    items: int
    gained: int
    lost: int

    @classmethod
    def of(cls, this: Sequence[bool], other: Sequence[bool]) -> Self:
        """Count, item by item: `gained` are those that only `this` has right."""
        pairs = [*zip(this, other, strict=True)]
        return cls(
            len(pairs),
            sum(one and not two for one, two in pairs),
            sum(two and not one for one, two in pairs),
        )


def share_interval(value: float, items: int) -> Interval:
    """Wilson's score interval of a share.

    It holds for the mean of numbers between 0 and 1 as well, where it is too wide rather than too
    narrow: of all such numbers with one mean, zeros and ones vary most.

    Args:
        value: share of the items, or mean over them, in [0, 1].
        items: how many.
    """
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    # `binomtest().proportion_ci` has the same interval, of whole counts only.
    middle = (value + z * z / (2 * items)) / (1 + z * z / items)
    spread = z / (1 + z * z / items)
    spread *= float(np.sqrt(value * (1 - value) / items + (z / (2 * items)) ** 2))
    # At 0 and 1 the interval ends there, and rounding must not push the value out of it.
    low, high = min(middle - spread, value), max(middle + spread, value)
    return Interval(value=value, low=max(low, 0.0), high=min(high, 1.0))


def paired_difference(tasks: Sequence[Paired]) -> Interval:
    """Difference of two shares of right answers to the same items, every task counting the same.

    The interval is Bonett and Price's (Journal of Educational and Behavioral Statistics 37, 2012),
    the task's variances added up. Unlike Student's it does not shrink to a point where the answers
    are equal throughout.
    """
    value = middle = variance = 0.0
    for items, gained, lost in tasks:
        value += (gained - lost) / items
        more, less = (gained + 1) / (items + 2), (lost + 1) / (items + 2)
        middle += more - less
        variance += (more + less - (more - less) ** 2) / (items + 2)
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * variance**0.5
    value, middle, reach = (each / len(tasks) for each in (value, middle, reach))
    return Interval(value=value, low=max(middle - reach, -1.0), high=min(middle + reach, 1.0))


def mcnemar(gained: int, lost: int) -> float:
    """p-value of McNemar's exact test, two-sided: that a change gains as many items as it loses."""
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)


def ratio_of_sums(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Sum of one measure over the sum of another, with its bootstrap interval over items.

    Args:
        one: item by item, all above 0.
        other: of the same items, likewise. Of a single item the interval is its own ratio.
    """
    above, below = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return Interval(value=value, low=value, high=value)
    found = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_RESAMPLES // 20,  # Memory grows with it, and with the items.
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(value=value, low=float(found.low), high=float(found.high))


def median_interval(values: Sequence[float]) -> Interval:
    """Median, and the interval between two order statistics that holds it whatever the noise is.

    The median lies under the k-th smallest of n values where fewer than k fall under it, which has
    the probability of fewer than k heads in n tosses; the innermost such pair of values is taken
    whose two tails are within 5 % together. Of 6 to 8 values it is the smallest and the largest.

    Raises:
        ValueError: there are fewer than `LEAST_REPEATS` values.
    """
    if len(values) < LEAST_REPEATS:
        raise ValueError(f"{len(values)} values give no 95 % interval: {LEAST_REPEATS} are needed")
    ordered = sorted(values)
    k = int(stats.binom.ppf(SIGNIFICANCE / 2, len(ordered), 0.5))
    return Interval(value=statistics.median(ordered), low=ordered[k - 1], high=ordered[-k])


def mean_interval(values: ArrayLike) -> tuple[_Array, _Array]:
    """Student's interval of means, by column.

    Args:
        values: (samples, ...), two samples or more.

    Returns:
        Low and high ends, (...).
    """
    found = np.asarray(values, dtype=np.float64)
    middle = found.mean(0)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stats.sem(found, axis=0)
    return middle - reach, middle + reach


def ratio_residuals(sums: ArrayLike, counts: ArrayLike) -> _Array:
    """Values whose mean is `sum(sums) / sum(counts)`, one for each sample.

    Their standard error is that of the ratio, linearised: prompts are the samples of a mean over
    tokens, and the tokens of one prompt vary together.

    Args:
        sums: (samples, ...), over each sample's tokens.
        counts: (samples,), its tokens.
    """
    total, tokens = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    weights = tokens.reshape(-1, *[1] * (total.ndim - 1))
    ratio = total.sum(0) / tokens.sum()
    return np.asarray(ratio + (total - ratio * weights) / tokens.mean())


def token_share(agreed: Sequence[int], compared: Sequence[int]) -> Interval:
    """A share of tokens; its interval is over texts, as the tokens of one vary together.

    Args:
        agreed: tokens of each text that agree.
        compared: tokens of each text. Of a single text the interval is everything.
    """
    value = sum(agreed) / sum(compared)
    if len(agreed) < 2:
        return Interval(value=value, low=0.0, high=1.0)
    low, high = mean_interval(ratio_residuals(agreed, compared))
    return Interval(
        value=value, low=max(0.0, min(float(low), value)), high=min(1.0, max(float(high), value))
    )


def welch(more: ArrayLike, less: ArrayLike) -> tuple[_Array, _Array, _Array]:
    """Whether one group's means are above another's: Welch's t-test, one-sided, by column.

    Args:
        more: (samples, ...), `LEAST_PROMPTS` or more.
        less: (samples, ...), likewise.

    Returns:
        p-values, and the low and high ends of the differences' two-sided intervals, (...). A column
        that varies in neither group has no noise: p-value 0 where its difference is above 0, or 1.
    """
    one, other = np.asarray(more, dtype=np.float64), np.asarray(less, dtype=np.float64)
    varies = (np.ptp(one, axis=0) > 0) | (np.ptp(other, axis=0) > 0)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        # SciPy warns of columns that hardly vary; how small a difference counts is the caller's.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ttest_ind(one, other, equal_var=False)
        ends = found.confidence_interval(CONFIDENCE)
        above = np.where(found.statistic > 0, found.pvalue / 2, 1 - found.pvalue / 2)
    difference = one.mean(0) - other.mean(0)
    low, high = (np.where(varies, end, difference) for end in (ends.low, ends.high))
    return np.where(varies, above, difference <= 0), low, high


def mean_above(values: ArrayLike) -> float:
    """p-value of a mean above 0: Student's t-test of one sample, one-sided.

    Values that are all equal are no noise: 0 where they are above 0, and 1 where they are not.
    """
    found = np.asarray(values, dtype=np.float64)
    if np.ptp(found) == 0:
        return float(found[0] <= 0)
    return float(stats.ttest_1samp(found, 0.0, alternative="greater").pvalue)


def corrected(p_values: Sequence[float] | _Array) -> _Array:
    """p-values of many tests, adjusted for their number (Benjamini and Hochberg).

    Of the tests whose adjusted value is within `SIGNIFICANCE`, that share at most is wrong on
    average.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if not given.size:
        return given
    return np.asarray(stats.false_discovery_control(given.ravel())).reshape(given.shape)
