"""The claims of the paper about its methods (Section 4.2), tested with a set of runs."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.reporting.intervals import estimate_mean
from benchmarks.training import recipes
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.run import Run

SMALLEST = 1e-12  # a loss can be 0


class Claim(NamedTuple):
    """Claims that each method of `better` is ahead of each method of `worse`."""

    quantity: str  # a key of QUANTITIES
    better: tuple[str, ...]
    worse: tuple[str, ...]
    words: str  # of the paper


PAPER = ("adam", "adamw", "adamg", "adams", "adamst", "adamsrt")


def _list_all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in PAPER if name not in names)


ACCURACY, FULL_RATE, WHOLE = (
    "test accuracy",
    "training loss, full rate",
    "training loss, all epochs",
)
_ADAM, _W, _G, _A, _AB, _ABC = ((name,) for name in PAPER)
CLAIMS = (
    Claim(ACCURACY, _A, _ADAM, "(a) neutralised: better accuracy"),
    Claim(ACCURACY, _AB, _A, "(ab): better accuracy than (a)"),
    Claim(ACCURACY, _AB, _list_all_but("adamst"), "(ab): overall best accuracy"),
    Claim(ACCURACY, _AB, _ADAM, "(ab): Table 2 has it above Adam"),
    Claim(ACCURACY, _ABC, _ADAM, "(abc): Table 2 has it above Adam"),
    Claim(ACCURACY, _G, _ADAM, "AdamG†: Table 2 has it above Adam"),
    Claim(ACCURACY, _ADAM, _W, "AdamW†: worse generalisation than Adam"),
    Claim(ACCURACY, _list_all_but("adamw"), _W, "AdamW†: overall worst generalisation"),
    *(
        Claim(quantity, *claim)
        for quantity in (FULL_RATE, WHOLE)
        for claim in (
            (_ADAM, _AB, "(ab) slows down training"),
            (_ABC, _AB, "(abc): a slight acceleration over (ab)"),
            (_W, _list_all_but("adamw"), "AdamW† is the fastest"),
            (_G, _list_all_but("adamw", "adamg"), "AdamG† is faster than the other variants"),
        )
    ),
)


def _measure_speed(run: Run, epochs: int) -> float:
    """Minus the mean logarithm of the training loss; losses scatter in proportion to their size."""
    return -float(np.log(np.maximum(run.train_loss[:epochs], SMALLEST)).mean())


# A larger value is better. After the learning rate has dropped, the loss tells the final level and no
# longer the speed.
QUANTITIES = {
    ACCURACY: lambda run: run.selected_test_accuracy,
    FULL_RATE: lambda run: _measure_speed(run, recipes.count_full_rate_epochs(len(run.train_loss))),
    WHOLE: lambda run: _measure_speed(run, len(run.train_loss)),
}


class Finding(NamedTuple):
    claim: Claim
    better: str  # this pair of methods supports the claim least of all its pairs
    worse: str
    difference: float  # in points of accuracy or of the log loss; positive if it supports the claim
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

    def name_methods(self) -> str:
        relation = "-" if self.claim.quantity == ACCURACY else "/"
        return f"{OPTIMIZERS[self.better].label} {relation} {OPTIMIZERS[self.worse].label}"


def judge_claims(runs: Mapping[str, Mapping[int, Run]]) -> list[Finding]:
    """Judges the claims about the methods in `runs`: method -> seed -> run."""
    found = []
    for claim in CLAIMS:
        pairs = [
            _compare(claim, better, worse, runs.get(better, {}), runs.get(worse, {}))
            for better, worse in itertools.product(claim.better, claim.worse)
        ]
        if None not in pairs:
            # All pairs must support the claim. Therefore the pair with the lowest bound decides.
            found.append(min(filter(None, pairs), key=lambda f: f.difference - f.halfwidth))
    return found


def _compare(
    claim: Claim, better: str, worse: str, ahead: Mapping[int, Run], behind: Mapping[int, Run]
) -> Finding | None:
    """Compares runs of the same seed, which start from the same weights."""
    seeds = [s for s in ahead if s in behind and not (ahead[s].diverged or behind[s].diverged)]
    if len(seeds) < 2:
        return None
    value = QUANTITIES[claim.quantity]
    differences = [value(ahead[seed]) - value(behind[seed]) for seed in seeds]
    mean, halfwidth = estimate_mean(np.array(differences))
    return Finding(claim, better, worse, mean, halfwidth, len(seeds))
