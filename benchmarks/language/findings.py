"""What a run of the command has found, as it is written to JSON, and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.language.grid import Search
from benchmarks.language.methods import METHODS, REFERENCE, Cell
from benchmarks.language.training import GROUPS, Record
from benchmarks.reporting.differences import compare_all, write_pairs
from benchmarks.reporting.intervals import compute_std, estimate_mean
from benchmarks.reporting.report import round_all


class Outcome(NamedTuple):
    """A method at its chosen cell: a record for every seed."""

    name: str
    search: Search
    records: Sequence[Record]
    seconds: float  # of all its runs, those of the grid included

    @property
    def cell(self) -> Cell:
        return self.search.chosen

    @property
    def losses(self) -> np.ndarray:
        """The validation loss behind the last step, one number per seed."""
        return np.array([record.validation[-1] for record in self.records])


def describe(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    # The best method has the smallest loss, and the largest gain.
    pairs = compare_all({name: -values for name, values in losses.items()})
    return {
        "evaluated_after": outcomes[0].records[0].steps,
        "methods": {outcome.name: describe_one(outcome, losses) for outcome in outcomes},
        "pairs": [pair.to_json() for pair in pairs],
        "verdict": [
            write_pairs("Validation loss", pairs, get_label),
            *write_against_reference(losses),
            write_edges(outcomes),
        ],
    }


def describe_one(outcome: Outcome, losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    method, records, own = METHODS[outcome.name], outcome.records, outcome.losses
    reference = losses.get(REFERENCE) if outcome.name != REFERENCE else None
    turns = {
        name: {
            quantity: describe_curve([getattr(record.turns[name], quantity) for record in records])
            for quantity in records[0].turns[name]._fields
        }
        for name in GROUPS
    }
    return {
        "label": method.label,
        **outcome.cell._asdict(),
        "at_edge": method.is_at_edge(outcome.cell),
        "loss": estimate_mean(own)._asdict(),
        "loss_of_seeds": round_all(own),
        "minus_reference": None if reference is None else estimate_mean(own - reference)._asdict(),
        "seconds_per_run": float(np.median([record.seconds for record in records])),
        "validation": describe_curve([record.validation for record in records]),
        "training": describe_curve([record.training for record in records]),
        "turns": turns,
        "grid": outcome.search.to_json(),
    }


def describe_curve(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean and standard deviation over the seeds, one number per evaluation."""
    values = np.array(curves)
    return {"mean": round_all(values.mean(0)), "std": round_all(compute_std(values))}


# --- sentences --------------------------------------------------------------------------------


def write_against_reference(losses: Mapping[str, np.ndarray]) -> list[str]:
    """Which methods end below and above AdamW, by intervals that hold for all of them at once."""
    others = [name for name in losses if name != REFERENCE]
    if REFERENCE not in losses or not others:
        return []
    label = get_label(REFERENCE)
    found = {name: estimate_mean(losses[name] - losses[REFERENCE], len(others)) for name in others}
    told = {name: estimate for name, estimate in found.items() if estimate.excludes_zero()}
    groups = {
        f"Lower than {label}": [name for name, estimate in told.items() if estimate.mean < 0],
        f"Higher than {label}": [name for name, estimate in told.items() if estimate.mean > 0],
        f"Not told apart from {label}": [name for name in others if name not in told],
    }
    written = {name: f"{get_label(name)} ({x.write(3, '+')})" for name, x in found.items()}
    texts = [
        f"{words}: {', '.join(written[name] for name in names)}."
        for words, names in groups.items()
        if names
    ]
    scope = f"that hold for all {len(others)} at once" if len(others) > 1 else "of the difference"
    return [f"{' '.join(texts)} In nats per character, with 95 % intervals {scope}."]


def write_edges(outcomes: Sequence[Outcome]) -> str:
    """Where a better decay may lie outside. Rates and ratios go on until the best one is inside."""
    names = [x.name for x in outcomes if METHODS[x.name].is_at_edge(x.cell)]
    if not names:
        return "No decay was chosen at the edge."
    words = "The largest decay was chosen, so that a better one may lie outside, for"
    return f"{words} {', '.join(map(get_label, names))}."


def get_label(name: str) -> str:
    return METHODS[name].label
