"""The best learning rate of every seed between the rates of the grid, and its slope over the width."""

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.reporting.intervals import Estimate, estimate_mean


def compute_logs(losses: np.ndarray) -> np.ndarray:
    """The logarithms of losses; infinity for a run that diverged."""
    return np.log(np.where(np.isfinite(losses), losses, np.inf))


def find_best_exponents(exponents: Sequence[int], losses: np.ndarray) -> np.ndarray:
    """log2 of the best rate of every seed; `losses` are (rates, seeds), `exponents` follow one another.

    It is the minimum of the parabola of the log loss through the best rate and its two neighbours. At an
    edge of the grid, or beside a run that diverged, it is the best rate itself.
    """
    best = [find_vertex(column) for column in compute_logs(losses).T]
    return exponents[0] + np.array(best)


def find_vertex(values: np.ndarray) -> float:
    """The index of the smallest value, and the part of a step to the minimum of the parabola there."""
    i = int(np.argmin(values))
    if not 0 < i < len(values) - 1:
        return float(i)
    before, here, after = values[i - 1 : i + 2]
    curvature = before - 2 * here + after
    if not 0 < curvature < math.inf:
        return float(i)
    return i + float((before - after) / (2 * curvature))


def find_best_cell(losses: np.ndarray) -> int:
    """The rate with the smallest geometric mean of the loss over the seeds, as an index."""
    return int(np.argmin(compute_logs(losses).mean(1)))


def is_at_edge(losses: np.ndarray) -> bool:
    """Whether the grid ends at the best rate of a seed, so that a better one may lie outside."""
    return bool(np.isin(compute_logs(losses).argmin(0), (0, len(losses) - 1)).any())


def fit_slope(widths: Sequence[int], best: np.ndarray) -> Estimate:
    """The change of log2 of the best rate per doubling of the width, from a line for every seed.

    `best` has the shape (widths, seeds).
    """
    slopes, _ = np.polyfit(np.log2(widths), best, 1)
    return estimate_mean(slopes)


def compare_losses(losses: np.ndarray, cell: int) -> Estimate:
    """log of the loss at the rate of `cell`, minus log of that at the best rate, seed by seed."""
    logs = compute_logs(losses)
    return estimate_mean(logs[cell] - logs[find_best_cell(losses)])
