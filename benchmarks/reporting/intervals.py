"""Means over seeds, with confidence intervals by the t distribution."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean, and half the width of its confidence interval."""

    mean: float
    halfwidth: float  # NaN with a single seed, or if one of them has diverged

    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.halfwidth  # False if that is NaN

    def write(self, digits: int, sign: str = "") -> str:
        """The mean, with `sign` "+" with that of a positive one too, and its interval."""
        # A single seed has no interval.
        width = "" if math.isnan(self.halfwidth) else f" ± {self.halfwidth:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{width}"


def estimate_mean(values: np.ndarray, intervals: int = 1) -> Estimate:
    """The mean over the seeds, one value per seed.

    Of several `intervals` each is so wide (Bonferroni) that all hold at once with the confidence of one.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2 or not np.isfinite(values).all():
        return Estimate(mean, math.nan)
    error = np.std(values, ddof=1) / math.sqrt(count)
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * intervals), count - 1)
    return Estimate(mean, float(quantile * error))


def compute_std(values: np.ndarray) -> np.ndarray:
    """Over the seeds, the first axis, of the sample; NaN with a single seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], math.nan)
