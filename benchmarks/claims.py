"""What the paper says of its methods (Section 4.2), and whether a set of runs says the same."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.loop import Run
from benchmarks.methods import METHODS

CONFIDENCE = 0.95
SMALLEST = 1e-12  # a loss can be 0


class Claim(NamedTuple):
    """`better` is above `worse` in test accuracy, or below it in training loss."""

    quantity: str  # a key of QUANTITIES
    better: str
    worse: str
    words: str  # the paper's


ACCURACY, SPEED = "test accuracy", "training loss"
CLAIMS = (
    Claim(ACCURACY, "adams", "adam", "(a) neutralised: better accuracy"),
    Claim(ACCURACY, "adamst", "adams", "(ab): better accuracy than (a)"),
    Claim(ACCURACY, "adamst", "adam", "(ab): Table 2 has it above Adam"),
    Claim(ACCURACY, "adamst", "adamsrt", "(abc): lower accuracy than (ab)"),
    Claim(ACCURACY, "adamsrt", "adam", "(abc): Table 2 has it above Adam"),
    Claim(ACCURACY, "adam", "adamw", "AdamW†: worse generalisation than Adam"),
    Claim(SPEED, "adam", "adamst", "(ab) slows down training"),
    Claim(SPEED, "adamsrt", "adamst", "(abc): a slight acceleration"),
    Claim(SPEED, "adamw", "adam", "AdamW† is the fastest"),
    Claim(SPEED, "adamg", "adam", "AdamG† speeds up training"),
)
# The more the better. Speed: minus the training loss over all epochs; of its logarithm, because losses
# scatter in proportion.
QUANTITIES = {
    ACCURACY: lambda run: run.selected_test_accuracy,
    SPEED: lambda run: -float(np.log(np.maximum(run.train_loss, SMALLEST)).mean()),
}


class Finding(NamedTuple):
    claim: Claim
    difference: float  # in favour of the claim: points of accuracy, or a logarithm of the loss
    halfwidth: float  # of its confidence interval over the seeds
    seeds: int

    @property
    def verdict(self) -> str:
        if abs(self.difference) <= self.halfwidth:
            return "not told apart from chance"
        return "agrees" if self.difference > 0 else "the opposite"

    def describe(self) -> str:
        if self.claim.quantity == ACCURACY:
            return f"{self.difference:+.2f} ± {self.halfwidth:.2f} points"
        interval = (self.difference + x for x in (0.0, self.halfwidth, -self.halfwidth))
        return "x {:.2f} ({:.2f} to {:.2f})".format(*(math.exp(-x) for x in interval))

    def names(self) -> str:
        relation = "-" if self.claim.quantity == ACCURACY else "/"
        return f"{METHODS[self.claim.better].label} {relation} {METHODS[self.claim.worse].label}"


def findings(runs: Mapping[str, Mapping[int, Run]]) -> list[Finding]:
    """Of method -> seed -> run: a seed starts all methods alike, hence differences seed by seed."""
    found = []
    for claim in CLAIMS:
        better, worse = (
            {seed: run for seed, run in runs.get(name, {}).items() if not run.diverged}
            for name in (claim.better, claim.worse)
        )
        seeds = sorted(better.keys() & worse.keys())
        if len(seeds) < 2:
            continue
        value = QUANTITIES[claim.quantity]
        differences = [value(better[seed]) - value(worse[seed]) for seed in seeds]
        error = np.std(differences, ddof=1) / math.sqrt(len(seeds))
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)
        found.append(
            Finding(claim, float(np.mean(differences)), float(quantile * error), len(seeds))
        )
    return found
