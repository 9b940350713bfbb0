"""What a run of the command has found, as it is written to JSON, and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.plasticity.grid import Search
from benchmarks.plasticity.methods import METHODS, REFERENCE, Cell
from benchmarks.plasticity.statistics import average_last_tasks
from benchmarks.plasticity.training import Curves
from benchmarks.reporting.differences import compare_all, write_pairs
from benchmarks.reporting.intervals import compute_std, estimate_mean
from benchmarks.reporting.report import round_all


class Outcome(NamedTuple):
    """A method at its chosen rate and decay."""

    cell: Cell
    curves: Curves  # (seeds, tasks)
    search: Search | None  # None where the rate was chosen in an earlier run

    @property
    def last_accuracy(self) -> np.ndarray:
        """One number per seed."""
        return average_last_tasks(self.curves.accuracy)


def describe(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    last = {name: outcome.last_accuracy for name, outcome in outcomes.items()}
    pairs = compare_all(last)
    return {
        "methods": {name: describe_one(name, outcomes[name], last) for name in outcomes},
        "pairs": [pair.to_json() for pair in pairs],
        "verdict": [
            write_pairs("Last tasks", pairs, get_label),
            write_losses(outcomes),
            write_edges(outcomes),
        ],
    }


def describe_one(name: str, outcome: Outcome, last: Mapping[str, np.ndarray]) -> dict[str, Any]:
    first = outcome.curves.accuracy[:, 0]
    reference = last.get(REFERENCE) if name != REFERENCE else None
    return {
        "label": METHODS[name].label,
        **outcome.cell._asdict(),
        "first_accuracy": estimate_mean(first)._asdict(),
        "last_accuracy": estimate_mean(last[name])._asdict(),
        "last_accuracy_of_seeds": round_all(last[name]),
        "last_minus_first": estimate_mean(last[name] - first)._asdict(),
        "minus_reference": None
        if reference is None
        else estimate_mean(last[name] - reference)._asdict(),
        "curves": {
            quantity: {"mean": round_all(values.mean(0)), "std": round_all(compute_std(values))}
            for quantity, values in outcome.curves._asdict().items()
        },
        "grid": outcome.search.to_json() if outcome.search else None,
    }


# --- sentences --------------------------------------------------------------------------------


def write_losses(outcomes: Mapping[str, Outcome]) -> str:
    """Which methods reach less on the last tasks than on the first one."""
    changes = {
        name: estimate_mean(outcome.last_accuracy - outcome.curves.accuracy[:, 0])
        for name, outcome in outcomes.items()
    }
    told = [name for name, change in changes.items() if change.excludes_zero()]
    less = [name for name in told if changes[name].mean < 0]
    more = [name for name in told if changes[name].mean > 0]
    groups = {
        "Less accurate on the last tasks than on the first": less,
        "More accurate": more,
        "No change that the intervals tell": [name for name in changes if name not in told],
    }
    return " ".join(f"{words}: {list_labels(names)}." for words, names in groups.items() if names)


def write_edges(outcomes: Mapping[str, Outcome]) -> str:
    names = [name for name, outcome in outcomes.items() if METHODS[name].is_at_edge(outcome.cell)]
    if not names:
        return "No rate or decay was chosen at the edge of its grid."
    words = "Chosen at the edge of the grid, so that a better value may lie outside"
    return f"{words}: {list_labels(names)}."


def list_labels(names: Sequence[str]) -> str:
    return "; ".join(map(get_label, names))


def get_label(name: str) -> str:
    return METHODS[name].label
