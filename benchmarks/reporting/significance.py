"""Whether differences between methods are larger than chance, with few seeds."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from benchmarks.reporting.report import Result

LEVEL = 0.05


class Comparison:
    """Fisher's least significant difference of the methods' means, with the seeds as blocks.

    A seed gives every method the same initial weights and the same batches. The effect that a seed has
    on all methods alike is removed before the scatter is computed.
    """

    def __init__(self, labels: Sequence[str], values: np.ndarray):  # values: (methods, seeds)
        methods, seeds = values.shape
        means = values.mean(1)
        residuals = values - means[:, None] - values.mean(0)[None] + values.mean()
        freedom = (methods - 1) * (seeds - 1)
        self.scatter = math.sqrt((residuals**2).sum() / freedom)
        threshold = stats.t.ppf(1 - LEVEL / 2, freedom)
        self.least_difference = float(threshold) * self.scatter * math.sqrt(2 / seeds)
        self.ranked = [(labels[int(i)], float(means[i])) for i in np.argsort(-means)]

    def summarize(self) -> str:
        gaps = [a - b for (_, a), (_, b) in itertools.combinations(self.ranked, 2)]
        clear = sum(gap > self.least_difference for gap in gaps)
        return (
            f"{clear} of the {len(gaps)} pairs of methods differ by more; chance alone would give "
            f"about {LEVEL * len(gaps):.0f}."
        )


def write_verdict(results: Sequence[Result]) -> str:
    """Compares the methods of which no seed diverged, over the seeds that all of them have run."""
    complete = [r for r in results if len(r.test_accuracies) == len(r.runs)]
    shared = set.intersection(*({run.seed for run in r.runs} for r in complete)) if complete else ()
    complete = [
        replace(r, runs=sorted((x for x in r.runs if x.seed in shared), key=lambda run: run.seed))
        for r in complete
    ]
    if len(complete) < 2 or len(shared) < 2:
        return "Fewer than two methods finished two seeds: nothing to compare."
    labels = [result.label for result in complete]
    accuracy = Comparison(labels, np.array([result.test_accuracies for result in complete]))
    # The logarithm, because losses scatter in proportion to their size.
    loss = Comparison(labels, -np.log([result.train_losses for result in complete]))

    (best, first), (second, next_best), *_ = accuracy.ranked
    level = [m for m, mean in accuracy.ranked[1:] if first - mean <= accuracy.least_difference]
    texts = (
        f"Test accuracy: at {len(complete[0].runs)} seeds two methods must be "
        f"{accuracy.least_difference:.2f} points apart before chance is an unlikely explanation "
        f"({LEVEL:.0%} level for one pair, seeds as blocks). {accuracy.summarize()} "
        f"{best} leads {second} by {first - next_best:.2f}: "
        + ("too little to rank them. " if second in level else "more than that. ")
        + (f"Not told apart from {best}: {', '.join(level)}." if level else ""),
        f"Final training loss: two methods must differ by a factor of "
        f"{math.exp(loss.least_difference):.2f}. {loss.summarize()} {loss.ranked[0][0]} has the "
        f"lowest, {loss.ranked[-1][0]} the highest.",
        "This counts the seeds only: other training images or a finer grid of learning rates would "
        "move the numbers too.",
    )
    return "\n".join(textwrap.fill(text, 79) for text in texts)
