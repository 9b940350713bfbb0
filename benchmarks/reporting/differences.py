"""Differences between methods, seed by seed: as numbers, for JSON, and in a sentence."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.reporting.intervals import Estimate, estimate_mean


class Difference(NamedTuple):
    """The mean over the seeds of `ahead` minus `behind`."""

    ahead: str
    behind: str
    estimate: Estimate
    among_all: Estimate  # with an interval that holds for all pairs at once

    def is_told_apart(self) -> bool:
        return self.among_all.excludes_zero()

    def to_json(self) -> dict[str, Any]:
        return {
            "ahead": self.ahead,
            "behind": self.behind,
            **self.estimate._asdict(),
            "halfwidth_for_all_pairs_at_once": self.among_all.halfwidth,
            "told_apart": self.is_told_apart(),
        }


def compare_all(values: Mapping[str, np.ndarray]) -> list[Difference]:
    """Every pair of methods, the one with the larger mean first, from the best method downwards.

    Seed by seed: both methods have started from the same weights and seen the same data.
    """
    ranked = sorted(values, key=lambda name: -values[name].mean())
    pairs = list(itertools.combinations(ranked, 2))
    return [
        Difference(ahead, behind, estimate_mean(gap), estimate_mean(gap, len(pairs)))
        for ahead, behind in pairs
        for gap in [values[ahead] - values[behind]]
    ]


def write_pairs(subject: str, pairs: Sequence[Difference], get_label: Callable[[str], str]) -> str:
    """How many pairs are told apart, and which are not."""
    if not pairs:
        return "One method alone: nothing to compare."
    level = [pair for pair in pairs if not pair.is_told_apart()]
    text = (
        f"{subject}: {len(pairs) - len(level)} of the {len(pairs)} pairs of methods are told apart by "
        "intervals of their differences that hold for all pairs at once with 95 %."
    )
    names = "; ".join(f"{get_label(p.ahead)} and {get_label(p.behind)}" for p in level)
    return f"{text} Not told apart: {names}." if level else text
