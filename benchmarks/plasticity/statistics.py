"""Means with confidence intervals over the seeds, and differences between methods seed by seed."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
LAST_TASKS = 10


class Estimate(NamedTuple):
    """A mean, and half the width of its confidence interval by the t distribution."""

    mean: float
    halfwidth: float  # NaN with a single seed

    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.halfwidth  # False with a single seed


class Difference(NamedTuple):
    """The mean over the seeds of `ahead` minus `behind`."""

    ahead: str
    behind: str
    estimate: Estimate


def estimate_mean(values: np.ndarray) -> Estimate:
    """The mean over the seeds, one value per seed."""
    count = len(values)
    if count < 2:
        return Estimate(float(np.mean(values)), math.nan)
    error = np.std(values, ddof=1) / math.sqrt(count)
    return Estimate(
        float(np.mean(values)), float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    )


def average_last_tasks(accuracy: np.ndarray) -> np.ndarray:
    """The mean accuracy of the last ten tasks, or of all if there are fewer; tasks in the last axis."""
    return accuracy[..., -LAST_TASKS:].mean(-1)


def subtract(values: Mapping[str, np.ndarray], ahead: str, behind: str) -> Difference:
    """Seed by seed: both methods have started from the same weights and seen the same tasks."""
    return Difference(ahead, behind, estimate_mean(values[ahead] - values[behind]))


def compare_all(values: Mapping[str, np.ndarray]) -> list[Difference]:
    """Every pair of methods, the one with the larger mean first, from the best method downwards."""
    ranked = sorted(values, key=lambda name: -values[name].mean())
    return [subtract(values, *pair) for pair in itertools.combinations(ranked, 2)]
