"""Means with confidence intervals over the seeds, and differences between methods seed by seed."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.reporting.intervals import Estimate, estimate_mean

LAST_TASKS = 10


class Difference(NamedTuple):
    """The mean over the seeds of `ahead` minus `behind`."""

    ahead: str
    behind: str
    estimate: Estimate
    among_all: Estimate  # with an interval that holds for all pairs at once

    def is_told_apart(self) -> bool:
        return self.among_all.excludes_zero()


def average_last_tasks(accuracy: np.ndarray) -> np.ndarray:
    """The mean accuracy of the last ten tasks, or of all if there are fewer; tasks in the last axis."""
    return accuracy[..., -LAST_TASKS:].mean(-1)


def compare_all(values: Mapping[str, np.ndarray]) -> list[Difference]:
    """Every pair of methods, the one with the larger mean first, from the best method downwards.

    Seed by seed: both methods have started from the same weights and seen the same tasks.
    """
    ranked = sorted(values, key=lambda name: -values[name].mean())
    pairs = list(itertools.combinations(ranked, 2))
    return [
        Difference(ahead, behind, estimate_mean(gap), estimate_mean(gap, len(pairs)))
        for ahead, behind in pairs
        for gap in [values[ahead] - values[behind]]
    ]
