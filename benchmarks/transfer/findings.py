"""What a run of the command has found, as it is written to JSON, and in sentences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.reporting.intervals import Estimate, estimate_mean
from benchmarks.reporting.report import round_all
from benchmarks.transfer.methods import METHODS
from benchmarks.transfer.statistics import (
    compare_losses,
    compute_logs,
    find_best_cell,
    find_best_exponents,
    fit_slope,
    is_at_edge,
)
from benchmarks.transfer.training import Ends


class Outcome(NamedTuple):
    """A method at all widths, from the narrowest to the widest."""

    name: str
    ends: Mapping[int, Ends]  # of each width, arrays of shape (rates, seeds)

    @property
    def widths(self) -> list[int]:
        return list(self.ends)

    @property
    def best_exponents(self) -> np.ndarray:
        """log2 of the best rates, (widths, seeds)."""
        exponents = METHODS[self.name].exponents
        return np.stack([find_best_exponents(exponents, end.loss) for end in self.ends.values()])

    @property
    def slope(self) -> Estimate | None:
        """The change of log2 of the best rate per doubling of the width; None with a single width."""
        return fit_slope(self.widths, self.best_exponents) if len(self.ends) > 1 else None

    @property
    def penalty(self) -> Estimate:
        """log of the factor in loss that the narrowest network's best rate costs in the widest."""
        narrowest, widest = (self.ends[self.widths[place]].loss for place in (0, -1))
        return compare_losses(widest, find_best_cell(narrowest))


def describe(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "methods": {outcome.name: describe_one(outcome) for outcome in outcomes},
        "verdict": [*map(write_movement, outcomes), write_edges(outcomes)],
    }


def describe_one(outcome: Outcome) -> dict[str, Any]:
    method, slope, best = METHODS[outcome.name], outcome.slope, outcome.best_exponents
    return {
        "label": method.label,
        "rates": method.rates,
        "slope": slope._asdict() if slope else None,
        "penalty": to_factor(outcome.penalty),
        "widths": {
            str(width): describe_width(end, exponents)
            for (width, end), exponents in zip(outcome.ends.items(), best, strict=True)
        },
    }


def describe_width(end: Ends, exponents: np.ndarray) -> dict[str, Any]:
    """One method at one width. The loss and the accuracy at its best rate are those of a cell."""
    cell = find_best_cell(end.loss)
    return {
        "log2_best_rate": estimate_mean(exponents)._asdict(),
        "log2_best_rate_of_seeds": round_all(exponents),
        "at_edge": is_at_edge(end.loss),
        "best_cell": cell,
        "loss": to_factor(estimate_mean(compute_logs(end.loss[cell]))),
        "accuracy": estimate_mean(end.accuracy[cell])._asdict(),
        "losses": [round_all(row) for row in end.loss],  # (rates, seeds)
        "accuracies": [round_all(row) for row in end.accuracy],
    }


def to_factor(log: Estimate) -> dict[str, float]:
    """A geometric mean with its interval, from the mean of the logarithms."""
    low, high = log.mean - log.halfwidth, log.mean + log.halfwidth
    mean, low, high = (float(np.exp(x)) for x in (log.mean, low, high))
    return {"mean": mean, "low": low, "high": high}


# --- sentences --------------------------------------------------------------------------------


def write_movement(outcome: Outcome) -> str:
    """Whether the best rate moves with the width, by how much, and what that costs."""
    label, slope = METHODS[outcome.name].label, outcome.slope
    if slope is None:
        return f"{label}: a single width, nothing to compare."
    if math.isnan(slope.halfwidth):
        movement = "one seed cannot tell whether the best rate moves with the width"
    elif slope.excludes_zero():
        movement = f"the best rate {'falls' if slope.mean < 0 else 'rises'} with the width"
    else:
        movement = "no movement of the best rate with the width is told apart from none"
    narrowest, *_, widest = outcome.widths
    factor = write_factor(to_factor(outcome.penalty))
    return (
        f"{label}: {movement}; log2 of it changes by {slope.write(2)} per doubling, and the best "
        f"rate of width {narrowest} multiplies the loss at width {widest} by {factor}."
    )


def write_edges(outcomes: Sequence[Outcome]) -> str:
    found = [
        f"{METHODS[outcome.name].label} at width {width}"
        for outcome in outcomes
        for width, end in outcome.ends.items()
        if is_at_edge(end.loss)
    ]
    if not found:
        return "No seed has its best rate at the edge of the grid."
    words = "The best rate of a seed at the edge of the grid, so that a better one may lie outside"
    return f"{words}: {'; '.join(found)}."


def write_factor(factor: Mapping[str, float]) -> str:
    text = f"{factor['mean']:.2f}"
    # A single seed has no interval, and neither has a rate that is the best one at both widths.
    if math.isnan(factor["low"]) or factor["low"] == factor["high"]:
        return text
    return f"{text} ({factor['low']:.2f} to {factor['high']:.2f})"
